"""What the fronts and the engine say to each other: tensors by name, and what a model expects and gives.

A datatype travels under its Open Inference Protocol name ("FP32"). In this process a tensor is a C-contiguous
numpy array of the dtype that DATATYPES gives for that name; an element of BYTES is a Python `bytes`. A shape may hold
-1: any size, decided per request.
"""

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Open Inference Protocol name -> numpy dtype, little-endian as on the wire (PROTOCOL.md section 4).
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

# What a parameter of a request or of a response may be.
Parameter = str | int | bool | float

# Bits of InferRequest.flags.
SEQUENCE_START = 1
SEQUENCE_END = 2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: as in the model's config.
        datatype: a key of DATATYPES.
        shape: what a request sends or receives, the batch dimension included (-1) where the model batches.
        labels: class names of an output, by index along its last dimension; empty if the model ships none.
        optional: whether a request may leave this input out.
        reshape: what the model itself takes or gives, the batch dimension included; None where that is `shape`.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    optional: bool = False
    reshape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a client may know of a model version.

    Attributes:
        versions: the versions that are served, ascending, as strings.
        platform: the config's platform, or its backend where it names none, as Triton reports it.
        max_batch_size: rows one request may hold; 0 when the model has no batch dimension.
        inputs, outputs: by name, in the model's order.
        ragged: input whose size may differ within a batch -> index in its shape of the dimension that does. Within a
            request, all of them have the same size there: the request's length.
        lengths: what a request's length is padded up to, ascending; none is longer than the last. Empty: any, as it is.
        max_cost: most padded rows times padded length of a request; 0 for any.
        row_grid: what a request's rows are padded up to, ascending. Empty: they are not.
        decoupled: whether a request gets any number of responses, so that only `Engine.stream` serves it.
        resend: whether a request may be sent again if the engine's process ended while the model had it: false where
            the model must never see the same request twice.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    max_batch_size: int
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    ragged: Mapping[str, int] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    max_cost: int = 0
    row_grid: tuple[int, ...] = ()
    decoupled: bool = False
    resend: bool = True


@dataclass(slots=True)
class InferRequest:
    """One inference request, decoded, not yet checked against the model.

    Attributes:
        version: a version's number as text; "" means the highest that is served.
        inputs: arrays by input name.
        outputs: names of the outputs wanted; None means all.
        id: echoed in the answer; "" if the client gave none.
        deadline: `time.monotonic()` seconds after which the model must not be started for this request.
        priority: 1 is the highest; 0, or one that the model does not have, is the model's default.
        timeout: seconds that it may wait in the queue, where the model lets it say so; 0 for the model's own.
        client: whose fair share of the model it counts against; all that say "" share one.
        parameters: what the client says besides, for the model to read; none of the protocol's own.
        correlation_id: the sequence that it belongs to; 0 or "" for none.
        flags: SEQUENCE_START, SEQUENCE_END.
        alone: whether it must not share a batch with any other.
        like: what it shares with others that differ from it in nothing but the elements of their tensors, and what else
            is an attribute here; compared by identity. None if nobody knows.
        boarding: called when a batch with it is about to be run, on the event loop, with the item's answer, see
            `batching.Item`; not for an answer from the cache.
    """

    model: str
    version: str
    inputs: dict[str, Array]
    outputs: tuple[str, ...] | None = None
    id: str = ""
    deadline: float = math.inf
    priority: int = 0
    timeout: float = 0.0
    client: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    correlation_id: int | str = 0
    flags: int = 0
    alone: bool = False
    boarding: Callable[[Any], None] | None = None
    like: object = None


@dataclass(slots=True)
class InferResponse:
    """The answer: every output of the model, in the model's order.

    Attributes:
        version: the version that ran.
        parameters: what the model says besides.
    """

    model: str
    version: str
    outputs: dict[str, Array]
    parameters: dict[str, Parameter] = field(default_factory=dict)


class Backend(Protocol):
    """A loaded model version that runs stacked arrays.

    It is called by one caller at a time, in the lane's thread or on the event loop.

    Attributes:
        device: its name is the lane's; models on one device take turns.
    """

    @property
    def device(self) -> object: ...

    def enter(self, inline: bool) -> None:
        """Called in each thread that is going to run the model, before it does: the event loop's if `inline`."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Uninitialised memory to stack a batch into: pinned where the device copies from it, else plain.

        Called in another thread too, while the model runs.
        """
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once on stacked arrays and return its outputs, in host memory that nothing else writes to.

        Arrays of `inputs` come from `empty`; the model may overwrite them.
        """
        ...

    def close(self) -> None:
        """Let go of the model and of its memory, on the device too. Nothing is called after it."""
        ...


class Call(Protocol):
    """One request to a model that is given requests instead of stacked arrays. Used from any thread.

    Attributes:
        request: checked; `outputs` names those wanted, all of the model's if the client named none.
        decoupled: whether the caller takes any number of responses.
    """

    request: InferRequest
    decoupled: bool

    def respond(self, response: InferResponse | Exception | None, final: bool) -> None:
        """Give the caller a response, or an error in its place; `final` says that it was the last.

        None with `final` ends the responses without another one.
        """
        ...

    def cancelled(self) -> bool:
        """Whether the caller left."""
        ...


class RequestBackend(Protocol):
    """One instance of a model version that is given the requests of a batch one by one, not stacked.

    Every method is called in one and the same thread, the instance's own, one at a time.

    Attributes:
        device: where the model is told to run.
    """

    @property
    def device(self) -> object: ...

    def initialize(self) -> None:
        """Load the model. Raises ModelError with what it said if it cannot be."""
        ...

    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        """Run a batch: for each call its answer or its error, or None where `respond` gives it, now or later.

        Raises ModelError if the batch failed as a whole.
        """
        ...

    @property
    def asks(self) -> bool:
        """Whether the model has a word in whether it is ready."""
        ...

    def is_ready(self) -> bool:
        """Whether the model says that it can answer now."""
        ...

    def finalize(self) -> None:
        """Let go of the model. Nothing is called after it."""
        ...


class Caller(Protocol):
    """Who is told what becomes of a request, once, on the event loop. It must not raise, nor ask the engine anything.

    An `asyncio.Future` is one.
    """

    def done(self) -> bool:
        """Whether nothing more is wanted: it was told, or it left."""
        ...

    def set_result(self, outputs: dict[str, Array], /) -> None: ...

    def set_exception(self, error: BaseException, /) -> None: ...


class Asked(Protocol):
    """Whoever has a request that came with `Engine.ask`.

    Attributes:
        version: the version that answers.
    """

    version: str

    def answered(self) -> None:
        """To be called by the caller when it was told."""
        ...

    def withdraw(self, caller: Caller) -> None:
        """To be called instead, if the caller leaves."""
        ...


class Engine(Protocol):
    """Models and who owns them: in this process (LocalEngine), or behind a socket.

    Wherever a version is asked for, "" means the highest that is served.

    Attributes:
        draining: set by whoever is about to stop the process: ready() turns false, requests are still served.
    """

    draining: bool

    @property
    def regions(self) -> "Regions":
        """The shared memory that clients registered."""
        ...

    async def start(self) -> None:
        """Load and warm every model. Raises ConfigError or ModelError, naming the model, if one cannot be served."""
        ...

    async def stop(self) -> None:
        """Answer everything that was accepted, then let go of models, threads and devices."""
        ...

    def live(self) -> bool:
        """Whether the lane's heartbeat beats: it is idle, or not stuck in a batch."""
        ...

    def ready(self) -> bool:
        """Whether every model is warm and new requests are welcome."""
        ...

    async def model_ready(self, model: str, version: str = "") -> bool:
        """Whether the model is loaded, and says of itself that it can answer. Raises NotFound, NotReady."""
        ...

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Raises NotFound, NotReady."""
        ...

    async def config(self, model: str, version: str = "") -> dict[str, Any]:
        """The effective config, as JSON (PROTOCOL.md section 1.6). Raises NotFound, NotReady."""
        ...

    async def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        """Of one version, of all of a model's, or of all models' (PROTOCOL.md section 8.2). Raises InvalidInput."""
        ...

    async def metrics(self) -> str:
        """Everything that is counted, in Prometheus' text format."""
        ...

    async def batching(self, model: str, version: str = "") -> dict[str, Any]:
        """What the model's queue does, and why: plain values, ready to be written as JSON. Raises NotFound."""
        ...

    async def trace(self, model: str = "", changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        """What is traced of a model, or of all, with `changes` made to it (PROTOCOL.md section 1.12).

        Raises:
            InvalidInput: there is no such model, or a change does not fit: then none is made.
            Unimplemented: a change cannot be made over the network.
        """
        ...

    async def log(self, changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        """What is logged, with `changes` made to it (PROTOCOL.md section 1.13). Raises as `trace` does."""
        ...

    def check_room(self, model: str, version: str) -> None:
        """Raises QueueFull if any request would be refused now, so that nobody decodes one. Raises NotFound."""
        ...

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request: a result, or an error of engine/errors.py or batching. Cancel it when the caller left.

        Raises Unimplemented if the model is decoupled.
        """
        ...

    def ask(self, model: str, version: str, like: object, inputs: dict[str, Array], caller: Caller) -> Asked | None:
        """`infer` without a coroutine, for a request that differs only in its tensors' elements from one before.

        Args:
            like: `InferRequest.like` of both, which says no more than that.

        Returns:
            None, and `caller` is not told anything, if there was none before, or `infer` has to look at it anyway.
        """
        ...

    def stream(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """The responses to one request, of any model, as they come. Close the iterator when the caller left."""
        ...

    async def index(self) -> list[dict[str, str]]:
        """Every model in the repositories, with the state of each of its versions (PROTOCOL.md section 1.8)."""
        ...

    async def load(self, model: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Load a model, or load it again if something changed; ends when that is done (PROTOCOL.md section 1.8).

        Args:
            config: a model config as JSON, instead of the file in the repository.
            files: path in the model's folder -> content, instead of what is there; needs `config`.

        Raises:
            LoadFailed: and everything is as it was before.
            NotReady: the repositories are not under the callers' control.
        """
        ...

    async def unload(self, model: str, dependents: bool = False) -> None:
        """Let requests under way finish, then let go of the model. One that is not loaded is fine."""
        ...


class Regions(Protocol):
    """The shared memory that clients registered, by name (PROTOCOL.md section 1.11)."""

    async def register(self, name: str, key: str, offset: int, byte_size: int) -> None: ...

    async def unregister(self, name: str = "") -> None:
        """One region, or, without a name, all."""
        ...

    async def status(self, name: str = "") -> list[dict[str, Any]]: ...

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        """A part of a region, to be read or written while nothing unmaps it."""
        ...
