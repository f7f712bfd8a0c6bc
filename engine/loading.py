"""One version of a model from the disk into service, and out of it again."""

import asyncio
import dataclasses
import gc
import importlib
import inspect
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batching import Batcher, Policy

from . import garbage
from .calls import CallModel
from .config import Instance, ModelConfig
from .errors import ConfigError
from .functions import Function, FunctionBackend
from .lane import Lane
from .model import LocalModel
from .repository import StoredModel
from .settings import Settings
from .types import DATATYPES, ModelMetadata
from .warmup import sample_requests

if TYPE_CHECKING:
    from .types import Engine

# backend -> "module:class", imported only when a model needs it, since the modules import heavy libraries
BACKENDS = {
    "pytorch": "engine.backends.pytorch:PyTorchBackend",
    "onnxruntime": "engine.backends.onnx:OnnxBackend",
    "python": "engine.backends.python:PythonBackend",
    "identity": "engine.backends.identity:IdentityBackend",
}

# Kinds of requests whose check is remembered, of each version.
MOST_ALIKE = 1024

logger = logging.getLogger("millrace")


@dataclass(slots=True, eq=False)
class Served:
    """One version of a model that is being served.

    Attributes:
        stored: what it was loaded from.
        lanes: of its instances.
        own: those of them that no other model has.
        folder: that its files came in with the request to load it; None if they are the repository's.
        freezes: how often the garbage collector had been told to look away, see `Loader.freeze`, before it was loaded.
        active: requests under way; whoever counts one out calls `left`, if somebody waits.
        wake: set while somebody waits for that.
        seconds: that loading took.
        alike: `InferRequest.like` -> the arguments after the first of `Batcher.submit`, of requests that were checked.
        number: of which no other copy has had the same.
    """

    stored: StoredModel
    version: str
    model: LocalModel | CallModel
    batcher: Batcher[Any, Any]
    lanes: list[Lane]
    own: list[Lane]
    seconds: float
    folder: Path | None = None
    freezes: int = 0
    active: int = 0
    wake: asyncio.Future[None] | None = field(default=None, init=False)
    alike: dict[object, tuple[Any, ...]] = field(default_factory=dict, init=False)
    number: int = field(default_factory=itertools.count(1).__next__, init=False)

    @property
    def metadata(self) -> ModelMetadata:
        return self.model.metadata

    @property
    def stacked(self) -> bool:
        """Whether its requests are stacked, and not looked up in the cache."""
        return isinstance(self.model, LocalModel) and not self.stored.config.cache

    def answered(self) -> None:
        """A request under way has ended."""
        self.active -= 1
        if self.wake is not None:
            self.left()

    def withdraw(self, caller: Any) -> None:
        """Who asked with `LocalEngine.ask` has left."""
        self.batcher.withdraw(caller)
        self.answered()

    def remember(self, like: object, item: tuple[Any, ...]) -> None:
        """A request like this fits, and is queued with these arguments, after the first."""
        if len(self.alike) >= MOST_ALIKE:
            self.alike.clear()
        self.alike[like] = item

    async def idle(self) -> None:
        """Wait until no request is under way; new ones must not come any more."""
        while self.active:
            self.wake = asyncio.get_running_loop().create_future()
            await self.wake

    def left(self) -> None:
        """A request under way has ended."""
        if not self.active and self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


class Loader:
    """Loads versions of models onto the lanes of this process.

    Attributes:
        lanes: those that models share, by their device's name.
    """

    def __init__(self, settings: Settings, engine: "Engine", functions: Sequence[Function] = ()) -> None:
        self.lanes: dict[str, Lane] = {}
        self._functions = {function.name: function for function in functions}
        self._settings = settings
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._freezes = 0

    async def load(self, stored: StoredModel, number: int) -> Served:
        """Load a version, warm it, put it on its lanes. What fails leaves nothing behind.

        Raises:
            ConfigError, ModelError: it cannot be served; the text says why.
        """
        started, freezes = self._loop.time(), self._freezes
        config, settings, version = stored.config, self._settings, str(number)
        policy = self._policy(config)
        check_memory(stored.files[number], config)
        lanes: list[Lane] = []
        own: list[Lane] = []
        instances: list[tuple[Any, Lane]] = []
        try:
            for instance in config.instances:
                backend = await asyncio.to_thread(self._make, config, stored.files[number], instance, version)
                lane = self._lane(backend, instance, lanes, own)
                instances.append((backend, lane))
            metadata = _metadata(stored, policy)
            kind = CallModel if hasattr(instances[0][0], "execute") else LocalModel
            model: LocalModel | CallModel = kind(metadata, version, config, policy, instances)
            seconds = await model.warm(settings.inline_ms / 1000)
            if config.warmup:
                for sample in config.warmup:
                    batch = await asyncio.to_thread(sample_requests, sample, config.max_batch_size > 0, stored.folder)
                    await model.run_sample(batch, sample.count)
        except BaseException:
            await _close(config.name, instances)
            for lane in own:
                await lane.stop(settings.stuck_after)
            raise
        batcher: Batcher[Any, Any] = Batcher(policy, model, _wake(lanes), _free_at(lanes), counts=model.statistics)
        for cost, took in model.measured * 2:  # twice: what is learned first counts for little
            batcher.pending.cost.learn(cost, max(0.0, took - batcher.pending.stacking(cost)))
        for lane in lanes:
            lane.attach(batcher)
        logger.info(
            "model %s version %s on %s: %.2f ms %s, runs %s",
            config.name, version, " and ".join(lane.name for lane in lanes), seconds * 1000,
            f"for {config.policy.max_rows} rows" if model.measured else "to load",
            "inline" if model.inline else "in a thread",
        )  # fmt: skip
        return Served(stored, version, model, batcher, lanes, own, self._loop.time() - started, freezes=freezes)

    async def retire(self, served: Served) -> None:
        """Let the requests under way finish, then let go of the version and its memory."""
        await served.idle()
        for lane in served.lanes:
            lane.detach(served.batcher)
        self._unfreeze(served)
        await _close(served.stored.config.name, served.model.instances)
        for lane in served.own:
            await lane.stop(self._settings.stuck_after)
        if self._unfreeze(served):  # once more: whatever was let go of meanwhile has frozen all
            self.freeze()
        else:
            gc.collect()

    def freeze(self) -> None:
        """Take all that is there out of the garbage collector's sight."""
        garbage.freeze()
        self._freezes += 1

    def _unfreeze(self, served: Served) -> bool:
        """Let the collector see a version again; whether it did not.

        It has cycles that nothing else frees: a module's functions and its globals. The next collection looks at all
        objects of the process, which takes a tenth of a second or more.
        """
        hidden = self._freezes > served.freezes
        if hidden:
            gc.unfreeze()
        return hidden

    def _policy(self, config: ModelConfig) -> Policy:
        settings, rows, row = self._settings, config.policy.max_rows, row_bytes(config)
        if settings.queue_rows < rows:
            raise ConfigError(
                f"MILLRACE_QUEUE_ROWS: must hold at least one batch of model '{config.name}', {rows} rows, "
                f"got {settings.queue_rows}"
            )
        if settings.queue_bytes < row:
            raise ConfigError(
                f"MILLRACE_QUEUE_BYTES: must hold at least one row of model '{config.name}', {row} bytes, "
                f"got {settings.queue_bytes}"
            )
        return dataclasses.replace(
            config.policy,
            capacity=settings.queue_rows,
            capacity_bytes=settings.queue_bytes,
            fair=bool(settings.client_header),
        )

    def _make(self, config: ModelConfig, file: Path, instance: Instance, version: str) -> Any:
        """An instance of the model, not yet on a lane."""
        if config.backend == "function":
            if config.name not in self._functions:
                raise ConfigError(f"model '{config.name}': backend: 'function' is that of @model, not of a repository")
            return FunctionBackend(self._functions[config.name])
        module, _, name = BACKENDS[config.backend].partition(":")
        backend = getattr(importlib.import_module(module), name)
        if "instance" in inspect.signature(backend).parameters:
            return backend(config, file, instance, version, self._engine, self._loop)
        return backend(dataclasses.replace(config, instances=(instance,)), file)

    def _lane(self, backend: Any, instance: Instance, lanes: list[Lane], own: list[Lane]) -> Lane:
        """The lane of the device, shared with other models; its own, where the model has more than one there."""
        shared = self.lanes.get(str(backend.device))
        if hasattr(backend, "execute") or shared in lanes:
            lane = Lane(instance.name)
            own.append(lane)
            lane.start()
        elif shared is None:
            lane = self.lanes[str(backend.device)] = Lane(str(backend.device))
            lane.start()
        else:
            lane = shared
        lanes.append(lane)
        return lane


async def _close(name: str, instances: Sequence[tuple[Any, Lane]]) -> None:
    """Let go of the loaded copies, each in its lane's thread."""
    for backend, lane in instances:
        try:
            await lane.call(backend.finalize if hasattr(backend, "execute") else backend.close)
        except Exception:
            logger.exception("model %s: closing failed", name)


def _metadata(stored: StoredModel, policy: Policy) -> ModelMetadata:
    config = stored.config
    stacked = config.backend != "python"
    return ModelMetadata(
        config.name,
        tuple(map(str, stored.files)),
        config.platform or config.backend,
        config.max_batch_size,
        config.inputs,
        config.outputs,
        config.ragged if stacked else {},
        policy.lengths if stacked else (),
        policy.max_cost,
        policy.row_grid,
        config.decoupled,
        config.resend,
    )


def _wake(lanes: Sequence[Lane]) -> Any:
    if len(lanes) == 1:
        return lanes[0].wake

    def wake() -> None:
        for lane in lanes:
            lane.wake()

    return wake


def _free_at(lanes: Sequence[Lane]) -> Any:
    if len(lanes) == 1:
        lane = lanes[0]
        return lambda: lane.free_at
    return lambda: min([lane.free_at for lane in lanes])


def row_bytes(config: ModelConfig) -> int:
    """Of the smallest request there can be: one row, dimensions of any size being 1."""
    return sum(
        math.prod(abs(size) for size in spec.shape) * DATATYPES[spec.datatype].itemsize
        for spec in config.inputs.values()
        if not spec.optional
    )


def check_memory(file: Path, config: ModelConfig) -> None:
    """Refuse to load what cannot fit beside what is there: its weights take at least its file's size.

    Raises:
        ConfigError: with both figures.
    """
    need = file.stat().st_size if file.is_file() else 0
    free = available_memory()
    if need > free:
        raise ConfigError(
            f"model '{config.name}': {file.name} is {need} bytes, and {free} bytes of memory are available; unload a "
            "model first"
        )


def available_memory() -> int:
    """Bytes that the kernel can give without swapping; without end where it does not say (not Linux)."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62
