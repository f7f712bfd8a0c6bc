"""CallModel: one version of a model that is given the requests of a batch one by one, as a Python model is.

Each of its instances has a thread, and a lane, of its own. A request may be answered by what `execute` returns, or
later, from any thread, through its call; a decoupled model gives any number of responses that way.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from batching import Cost, Policy

from .config import ModelConfig
from .errors import ModelError, TooLarge, TooSlow
from .lane import CURRENT, Lane
from .model import reshaped
from .statistics import Statistics
from .types import Array, InferRequest, InferResponse, ModelMetadata, RequestBackend
from .validate import fits

R = TypeVar("R")

# Seconds that a model may take to say whether it is ready, as in Triton.
READY_WITHIN = 5.0


class LocalCall:
    """One request under way; see `engine.types.Call`, which is all that a model sees of it.

    Attributes:
        since: when the model began with the next response, by `time.perf_counter`.
    """

    def __init__(self, request: InferRequest, model: "CallModel") -> None:
        self.request = request
        self.decoupled = model.metadata.decoupled
        self.since = 0.0
        self._model = model
        self._loop = model.loop
        self._left = False
        self._held = 0  # bytes of the responses that nobody has read yet
        self._ended = False
        self._responses = 0  # that the model gave
        self._arrived: deque[InferResponse | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def respond(self, response: InferResponse | Exception | None, final: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self.given, response, final, time.perf_counter())

    def cancelled(self) -> bool:
        return self._left

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self._left = True
        self._arrived.clear()

    def given(self, response: InferResponse | Exception | None, final: bool, at: float) -> None:
        """What `respond` says, on the event loop; `at` is when it did, by `time.perf_counter`."""
        self.arrive(response, final)
        self.count(response, at)

    def count(self, response: InferResponse | Exception | None, at: float) -> None:
        """The model gave a response at `at`. Only those of decoupled models are told apart, as in Triton."""
        if self.decoupled:
            outcome = "cancel" if self._left else _outcome(response)
            self._model.statistics.responded(self._responses, outcome, at - self.since, time.perf_counter() - at)
            self._responses += 1
            self.since = at

    def arrive(self, response: InferResponse | Exception | None, final: bool) -> None:
        """What the caller is told, on the event loop."""
        if self._left:
            return
        if isinstance(response, InferResponse):
            self._held += sum(map(size_of, response.outputs.values()))
            if self._arrived and self._held > self._model.policy.capacity_bytes:  # one alone always fits
                self.leave()  # which the model can see
                text = "the responses were not read as fast as they came (MILLRACE_QUEUE_BYTES)"
                response, final = TooSlow(text), True
        if response is not None:
            self._arrived.append(self._model.outward(response))
        self._ended = self._ended or final
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def responses(self) -> AsyncIterator[InferResponse]:
        """As they come; an error ends them."""
        while True:
            while self._arrived:
                response = self._arrived.popleft()
                if isinstance(response, Exception):
                    try:
                        raise response
                    finally:  # its traceback holds this frame
                        del response
                self._held -= sum(map(size_of, response.outputs.values()))
                yield response
            if self._ended:
                return
            self._waiter = self._loop.create_future()
            await self._waiter

    async def answer(self) -> InferResponse:
        """The only response."""
        async for response in self.responses():
            return response
        raise ModelError(f"model '{self.request.model}' gave no response")


class CallModel:
    """One version of one model. It is its batcher's `Runner`: an item's payload is a LocalCall.

    A result is an InferResponse, or None where the call itself has it, or will.

    Attributes:
        statistics: what it has done.
        preparation: nothing is stacked.
        inline, measured: as for a LocalModel: it never runs on the event loop, and was not measured.
    """

    inline = False

    def __init__(
        self,
        metadata: ModelMetadata,
        version: str,
        config: ModelConfig,
        policy: Policy,
        instances: Sequence[tuple[RequestBackend, Lane]],
    ) -> None:
        self.metadata = metadata
        self.version = version
        self.policy = policy
        self.statistics = Statistics()
        self.preparation = Cost()
        self.measured: list[tuple[int, float]] = []
        self.loop = asyncio.get_running_loop()
        self.instances = instances
        self._on = {lane: backend for backend, lane in instances}
        self._said = True  # that it is ready
        self._question: asyncio.Task[None] | None = None
        self._bucket: Hashable = () if config.batching else None
        optional = any(spec.optional for spec in config.inputs.values())
        self._by_shape = config.batching and (config.variable or optional)
        # Whether inputs, or outputs, have other shapes for the model than for its clients.
        self._reshaped = any(spec.reshape is not None for spec in config.inputs.values())
        self._reshapes = any(spec.reshape is not None for spec in config.outputs.values())
        self._shaped = [name for name in config.inputs if name not in config.ragged]

    def item(self, request: InferRequest, rows: int) -> tuple[Any, ...]:
        """The arguments of `Batcher.submit` for a request that was checked.

        Raises:
            TooLarge: it would not fit into an empty queue.
        """
        nbytes = sum([size_of(array) for array in request.inputs.values()])
        if nbytes > self.policy.capacity_bytes:
            raise TooLarge(
                f"the tensors of {nbytes} bytes are over the limit of {self.policy.capacity_bytes} bytes "
                "(MILLRACE_QUEUE_BYTES)"
            )
        if self._reshaped:
            request.inputs = {name: self._reshape(name, array) for name, array in request.inputs.items()}
        bucket = self._bucket
        if self._by_shape:  # only requests with the same inputs share a batch
            inputs = request.inputs
            bucket = tuple([inputs[name].shape[1:] if name in inputs else None for name in self._shaped])
        if request.outputs is None:
            request.outputs = tuple(self.metadata.outputs)
        return (
            LocalCall(request, self),
            rows,
            None if request.alone else bucket,
            request.deadline,
            1,
            nbytes,
            request.priority,
            request.timeout,
            request.client,
            request.boarding,
        )

    def _reshape(self, name: str, array: Array) -> Array:
        spec = self.metadata.inputs[name]
        return array if spec.reshape is None else array.reshape(reshaped(array.shape, spec.shape, spec.reshape))

    def outward(self, result: R) -> R:
        """A result in the shapes that clients see, where its outputs have those of the model."""
        if self._reshapes and isinstance(result, InferResponse):
            for name, spec in self.metadata.outputs.items():
                array = result.outputs.get(name)
                if array is not None and spec.reshape is not None and fits(array.shape, spec.reshape):
                    result.outputs[name] = array.reshape(reshaped(array.shape, spec.reshape, spec.shape))
        return result

    async def prepare(self, calls: Sequence[LocalCall], rows: int, length: int) -> object:
        return None

    async def run(
        self, calls: Sequence[LocalCall], rows: int, length: int, prepared: object = None
    ) -> Sequence[InferResponse | Exception | None]:
        lane = CURRENT.get(None) or self.instances[0][1]
        backend = self._on[lane]
        started = time.perf_counter()
        for call in calls:
            call.since = started
        try:
            results = await lane.call(backend.execute, calls)
        except ModelError as error:
            if not self.metadata.decoupled:
                raise
            results = [error] * len(calls)  # some of its responses may be out: it is not run again
        finally:
            self.statistics.spans = (0.0, time.perf_counter() - started, 0.0)
        if self.metadata.decoupled:  # what is None is given by its call, and counted there
            for call, result in zip(calls, results, strict=True):
                if result is not None:
                    call.count(result, time.perf_counter())
        return [self.outward(result) for result in results] if self._reshapes else results

    async def warm(self, inline_seconds: float) -> float:
        """Load the model in each instance's thread. Raises ModelError."""
        started = time.perf_counter()
        for backend, lane in self.instances:
            await lane.call(backend.initialize)
        return time.perf_counter() - started

    async def run_sample(self, batch: Sequence[dict[str, Array]], count: int) -> None:
        """Run a batch so often on every instance, as `model_warmup` asks for. It counts in the statistics.

        Raises:
            ModelError.
        """
        for backend, lane in self.instances:
            for _ in range(count):
                name, outputs = self.metadata.name, tuple(self.metadata.outputs)
                calls = [LocalCall(InferRequest(name, self.version, inputs, outputs), self) for inputs in batch]
                started = time.perf_counter()
                for call in calls:
                    call.since = started
                for result in await lane.call(backend.execute, calls):
                    if isinstance(result, Exception):
                        raise ModelError(f"failed to run warmup sample: {result}")
                self.statistics.spans = (0.0, time.perf_counter() - started, 0.0)
                self.statistics.warmed(len(calls))

    async def is_ready(self) -> bool:
        """Whether the model says of itself that it can answer; while it runs a batch, what it said last.

        One question is under way at a time, whoever asks.
        """
        backend, lane = self.instances[0]
        if not backend.asks:
            return True
        if self._question is None:
            self._question = self.loop.create_task(self._ask(backend, lane))
        done, _ = await asyncio.wait([self._question], timeout=READY_WITHIN)
        return self._said if done or lane.busy else False

    async def _ask(self, backend: RequestBackend, lane: Lane) -> None:
        try:
            self._said = await lane.call(backend.is_ready)
        finally:
            self._question = None

    async def stop(self, seconds: float) -> None:
        """The process ends: answer what is queued, and let the model finish."""
        await asyncio.gather(*(lane.stop(seconds, backend.finalize) for backend, lane in self.instances))


def _outcome(response: InferResponse | Exception | None) -> str:
    """One of statistics.OUTCOMES; an error that the model gives is a response that failed."""
    if response is None:
        return "empty_response"
    return "fail" if isinstance(response, Exception) else "success"


def size_of(array: Array) -> int:
    """The bytes that a tensor holds, its strings included."""
    return array.nbytes + (sum(map(len, array.flat)) if array.dtype == np.dtype(object) else 0)
