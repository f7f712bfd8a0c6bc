"""Python models: Triton's model.py as it is, with everything that it imports as pb_utils (PROTOCOL.md section 7).

One PythonBackend is one instance, with modules of its own (python_module). Its hooks are called in the instance's
thread; a coroutine is run there too, on a loop that the instance keeps, so batches come one after another. A decoupled
model's coroutines run on a loop in a thread of their own instead: several `execute` at once, as in Triton.

What a model says when it fails goes to the client: type, text and the lines of its files, never a path outside the
model repository.
"""

import asyncio
import importlib
import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format

from ..config import Instance, ModelConfig, to_json
from ..errors import ConfigError, ModelError
from ..types import Call, Engine, InferResponse
from . import triton_python_backend_utils as pb_utils
from .python_module import PROVIDED, PythonModule

T = TypeVar("T")

# Seconds that a model may take to say that it is ready.
READY_LIMIT = 5.0

sys.modules.update(dict.fromkeys(PROVIDED, pb_utils))

# What a hook may raise. On the event loop the last two would end the lane, or the server.
_RAISED = (Exception, SystemExit, asyncio.CancelledError, KeyboardInterrupt)

_log = logging.getLogger("millrace.model")


class PythonBackend:
    """One instance of one version of a Python model."""

    def __init__(
        self,
        config: ModelConfig,
        file: Path,
        instance: Instance,
        version: str,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Nothing is loaded yet: `initialize` does.

        Args:
            file: model.py, in a version's folder.
            engine: what the model's own calls of other models go to.
            loop: the engine's event loop.
        """
        self.device = instance.device
        self._config, self._file, self._instance, self._version = config, file, instance, version
        self._host = pb_utils.ModelHost(
            engine, loop, config.name, version, instance.name, file.parent, tuple(config.outputs), config.decoupled
        )
        self._module = PythonModule(file, self._host)
        self._model: Any = None
        self._runner: asyncio.Runner | None = None
        self._background: _Background | None = None

    def initialize(self) -> None:
        """Import model.py and make the model. Raises ModelError with what it said."""
        model_folder = self._file.parent.parent
        arguments = {
            "model_config": json.dumps(self._config.document),
            "model_instance_kind": self._instance.kind,
            "model_instance_name": self._instance.name,
            "model_instance_device_id": str(self._instance.device_id),
            "model_repository": str(model_folder),
            "model_version": self._version,
            "model_name": self._config.name,
        }
        try:
            self._model = self._module.load().TritonPythonModel()
            if not hasattr(self._model, "execute"):
                file = self._file.relative_to(model_folder.parent)
                raise _Misuse(f"Python model {file} does not implement `execute` method.")
            if hasattr(self._model, "initialize"):
                self._model.initialize(arguments)
        except _RAISED as error:
            text = self._said(error)
        else:
            self._module.forget_aliases()
            self._host.running = True
            return
        # Not before the error is let go: its traceback holds the model.
        self._release()
        raise ModelError(text)

    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        """Run a batch: for each call its answer, its error, or None where its response sender gives it.

        Raises:
            ModelError: the model failed, and nothing of the batch was answered.
        """
        requests = [pb_utils.ReceivedRequest(call, self._host) for call in calls]
        try:
            returned = self._model.execute(requests)
            if asyncio.iscoroutine(returned):
                if self._config.decoupled:
                    self._in_background().submit(self._attend(returned, requests))
                    return [None] * len(calls)
                returned = self._await(returned)
            return self._answers(requests, returned)
        except _RAISED as error:
            failure = self._failure(error)
        finally:
            self._module.forget_aliases()
        open_requests = [request.end() for request in requests]
        if all(open_requests) and not self._config.decoupled:
            raise failure
        return [failure if is_open else None for is_open in open_requests]

    @property
    def asks(self) -> bool:
        """Whether the model has a word in whether it is ready."""
        return hasattr(self._model, "is_ready")

    def is_ready(self) -> bool:
        """Whether the model, if it has a hook for that, says True, within READY_LIMIT seconds."""
        hook = getattr(self._model, "is_ready", None)
        if hook is None:
            return self._model is not None
        started = time.monotonic()
        try:
            answer = hook()
            if asyncio.iscoroutine(answer):
                answer = self._await(asyncio.wait_for(answer, READY_LIMIT))
        except _RAISED as error:
            _log.error("is_ready of model '%s' failed: %r", self._instance.name, error)
            return False
        finally:
            self._module.forget_aliases()
        return answer is True and time.monotonic() - started <= READY_LIMIT

    def finalize(self) -> None:
        """Let the model clean up, and let go of it. What it raises is logged only."""
        self._host.running = False
        if hasattr(self._model, "finalize"):
            try:
                self._model.finalize()
            except _RAISED:
                _log.exception("finalize of model '%s' failed", self._instance.name)
        self._release()

    def _release(self) -> None:
        if self._background is not None:
            self._background.close()
        if self._runner is not None:
            self._runner.close()
        self._model = self._runner = self._background = None
        self._module.unload()

    def _answers(
        self, requests: Sequence[pb_utils.ReceivedRequest], returned: object
    ) -> Sequence[InferResponse | Exception | None]:
        """What `execute` returned, as what the callers get. Raises _Misuse if it is nothing that it may return."""
        if returned is None:
            return [self._pending(request) for request in requests]
        if self._config.decoupled:
            raise _Misuse(_NOT_NONE.format(self._instance.name))
        if not isinstance(returned, list):
            raise _Misuse(f"Expected a list in the execute return, found type '{type(returned)}'.")
        if len(returned) != len(requests):
            raise _Misuse(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, and InferenceResponse(s) size is:{len(returned)}\n"
            )
        for response in returned:
            if response is not None and not isinstance(response, pb_utils.InferenceResponse):
                raise _Misuse(
                    "Expected an 'InferenceResponse' object in the execute function return list, found type "
                    f"'{type(response)}'."
                )
        # All of them are converted before any request counts as answered: a conversion may raise.
        answers = [
            None if response is None else self._host.answer(response, request.wanted)
            for request, response in zip(requests, returned, strict=True)
        ]
        return [
            self._pending(request) if answer is None else self._answer(request, answer)
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _answer(
        self, request: pb_utils.ReceivedRequest, answer: InferResponse | Exception
    ) -> InferResponse | Exception | None:
        return answer if request.end() else None  # its response sender was faster, and one response is all there is

    def _pending(self, request: pb_utils.ReceivedRequest) -> Exception | None:
        """An error if nothing can answer the request any more."""
        if request.taken:
            return None
        return ModelError(f"model '{self._instance.name}' gave no response, and did not ask for the response sender")

    async def _attend(self, execute: Coroutine[Any, Any, object], requests: list[pb_utils.ReceivedRequest]) -> None:
        """A decoupled model's `execute`, in the background: whoever it leaves without a last response gets an error."""
        try:
            returned = await execute
            if returned is not None:
                raise _Misuse(_NOT_NONE.format(self._instance.name))
        except _RAISED as error:
            failure = self._failure(error)
            for request in requests:
                request.fail(failure)
            return
        for request in requests:
            unanswered = self._pending(request)
            if unanswered is not None:
                request.fail(unanswered)

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a hook's coroutine where the model's coroutines run."""
        if self._config.decoupled:
            return self._in_background().submit(coroutine).result()
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def _in_background(self) -> "_Background":
        if self._background is None:
            self._background = _Background(self._instance.name)
        return self._background

    def _failure(self, error: BaseException) -> ModelError:
        _log.error("execute of model '%s' failed", self._instance.name, exc_info=error)
        return ModelError(
            f"Failed to process the request(s) for model '{self._instance.name}', message: {self._said(error)}"
        )

    def _said(self, error: BaseException) -> str:
        return describe(error, self._file.parent.parent)


_NOT_NONE = "Python model '{}' is using the decoupled mode and the execute function must return None."


# What the model's lines go through, and Triton has no lines for: this folder, and the importer.
_NOT_THE_MODELS = (f"{Path(__file__).parent}/", importlib.__file__ or "", "<frozen importlib")


class _Misuse(Exception):
    """The model breaks a rule; the text is Triton's, which says no more."""


class _Background:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), name=f"{name} coroutines", daemon=True)
        self._thread.start()
        self._loop, self._stop = self._started.result()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs, and end."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        stop = asyncio.Event()
        self._started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()


def describe(error: BaseException, model_folder: Path) -> str:
    """What Triton says of an exception: type, text and, innermost first, the lines since the model's own code.

    Paths begin with the model's folder, or are a file's name alone.
    """
    repository = f"{model_folder.parent}/"
    if isinstance(error, _Misuse):
        return str(error)
    text = f"{type(error).__name__}: {_text(error)}".replace(repository, "")
    lines = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_NOT_THE_MODELS)
    ]
    while lines and not lines[0][0].co_filename.startswith(f"{model_folder}/"):
        del lines[0]
    if not lines:
        return text
    shown = [f"  {_shown(code.co_filename, repository)}({line}): {code.co_name}\n" for code, line in reversed(lines)]
    return f"{text}\n\nAt:\n{''.join(shown)}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of the model's own class
        return "<exception str() failed>"  # as Python's tracebacks have it


def _shown(path: str, repository: str) -> str:
    return path.removeprefix(repository) if path.startswith(repository) else Path(path).name


def complete(message: Any, file: Path) -> None:
    """Let model.py complete a model's config, if it has an `auto_complete_config`.

    Args:
        message: a protobuf ModelConfig, changed in place: max_batch_size, inputs, outputs, dynamic_batching and the
            transaction policy.

    Raises:
        ConfigError: with what the model said: it cannot be imported, or contradicts what the config says already.
    """
    module = PythonModule(file)
    name = message.name or file.parent.parent.name
    try:
        hook = getattr(module.load().TritonPythonModel, "auto_complete_config", None)
        if hook is None:
            return
        completed = hook(pb_utils.ModelConfig(json.dumps(to_json(message) | {"name": name})))
        if not isinstance(completed, pb_utils.ModelConfig):
            raise _Misuse(f"auto_complete_config function in model '{name}' must return a valid pb.ModelConfig object.")
        _copy(completed.as_dict(), message)
    except _RAISED as error:
        text = describe(error, file.parent.parent)
    else:
        return
    finally:
        module.unload()
    raise ConfigError(text)


def _copy(document: dict[str, Any], message: Any) -> None:
    """Put what `auto_complete_config` may set into the message."""
    message.max_batch_size = document["max_batch_size"]
    for field in ("input", "output"):
        message.ClearField(field)
        for tensor in document[field]:
            json_format.ParseDict(tensor, getattr(message, field).add())
    if "dynamic_batching" in document:
        message.dynamic_batching.SetInParent()
    if "model_transaction_policy" in document:
        json_format.ParseDict(document["model_transaction_policy"], message.model_transaction_policy)
