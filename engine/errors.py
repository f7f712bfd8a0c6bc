"""Every error that a caller can meet, in one tree that says whose fault it is.

    EngineError
    ├── RequestError           the caller's: the same request will fail again
    │   ├── InvalidInput       it is malformed, or does not fit the model
    │   ├── NotFound           no such endpoint, model or version
    │   ├── MethodNotAllowed   the endpoint exists, this method on it does not
    │   ├── TooLarge           it passes a bound on size
    │   ├── Unsupported        a media type or encoding that is not served
    │   ├── Unimplemented      it is well-formed, and asks for what this server or model does not do
    │   ├── LoadFailed         a model cannot be loaded as the caller wants it; what was served before still is
    │   ├── Cancelled          the caller took it back
    │   └── TooSlow            the caller stalled while sending it
    ├── ServiceError           ours: the same request may succeed later
    │   ├── ModelError         the model failed on this very input
    │   ├── NotReady           starting, draining, or the lane is dead
    │   └── DeviceLost         the device is beyond repair
    └── ConfigError            the operator's: met at start, never by a client

and, from the queue, `batching.QueueFull` (come back later) and `batching.DeadlineExceeded` (the time the caller gave
is over). The text of each goes to the client as it is: it names the field, never a path, never a traceback.
Which status or code a class becomes is the front's business: one table in each front.
"""


class EngineError(Exception):
    """The root. Catch it to catch all of ours."""


class RequestError(EngineError):
    """The caller's fault."""


class InvalidInput(RequestError):
    """The request is malformed, or does not fit the model; the text names the field."""


class NotFound(RequestError):
    """No such endpoint, model or version."""


class MethodNotAllowed(RequestError):
    """The endpoint exists, this method on it does not.

    Attributes:
        allow: the methods that do exist on it, as the Allow header wants them.
    """

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class TooLarge(RequestError):
    """The request passes a bound on size; the text says which."""


class Unsupported(RequestError):
    """A media type or encoding that is not served."""


class Unimplemented(RequestError):
    """It is well-formed, and asks for what this server, or this model, does not do."""


# Why a model that gives any number of responses is not to be inferred with.
NOT_DECOUPLED = "HTTP end point doesn't support models with decoupled transaction policy"


class LoadFailed(RequestError):
    """A model cannot be loaded as the caller wants it; what was served before still is."""


class Cancelled(RequestError):
    """The caller took the request back, and the model says so."""


class TooSlow(RequestError):
    """The caller did not finish sending in time."""


class ServiceError(EngineError):
    """The service's fault."""


class ModelError(ServiceError):
    """The model failed on this very input, or answered with something that is not what its config promises."""


class NotReady(ServiceError):
    """The engine is starting or draining, or its lane is dead."""


class DeviceLost(ServiceError):
    """The device is beyond repair: nothing will run on it again in this process."""


class ConfigError(EngineError):
    """A setting or a model's config cannot be served; the text names the variable, or file, field and value."""
