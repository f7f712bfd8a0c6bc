"""LocalEngine: the models of this process. For each model version a backend and a batcher; for each device a lane."""

import asyncio
import gc
import importlib
import logging
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batching import Batcher, Policy

from .config import ModelConfig
from .errors import ConfigError, DeviceLost, ModelError, NotFound, RequestError
from .lane import Lane
from .repository import read_repository
from .settings import Settings
from .types import DATATYPES, Array, Backend, InferRequest, InferResponse, ModelMetadata
from .validate import check_request, fits

# backend -> "module:class", imported only when a model needs it, since the modules import heavy libraries
BACKENDS = {"pytorch": "engine.backends.pytorch:PyTorchBackend"}

# Seconds for the batches on the devices to end, once their requests are answered or given up.
STOP_SECONDS = 5.0

# A largest batch that takes longer than this in the lane's thread is not tried on the event loop at all.
_WORTH_MEASURING = 0.05

logger = logging.getLogger("millrace")


class LocalModel:
    """One version of one model: what it is, and how a batch of it is run.

    Attributes:
        inline: whether batches run on the event loop instead of in the lane's thread.
        bucket: the bucket of every request, unless `buckets`: then each shape has its own. None: requests run alone.
    """

    def __init__(
        self, metadata: ModelMetadata, version: str, config: ModelConfig, backend: Backend, lane: Lane
    ) -> None:
        self.metadata = metadata
        self.version = version
        self.lane = lane
        self.inline = False
        self.bucket = () if config.batching else None
        self.buckets = config.batching and config.variable
        self._backend = backend
        self._variable = config.variable
        self._batches = config.max_batch_size > 0

    async def run(self, batch: Sequence[dict[str, Array]]) -> Sequence[dict[str, Array]]:
        try:
            return self.execute(batch) if self.inline else await self.lane.call(self.execute, batch)
        except DeviceLost as error:
            self.lane.lose(str(error))
            raise

    def execute(self, batch: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
        """Stack the requests' inputs, run the model once, split its outputs into views, one dict for each request.

        Raises:
            ModelError: the model raised, or its outputs do not have the batch's rows.
        RequestError: the backend found that the inputs are not what the model takes.
        DeviceLost: the device is beyond repair.
        """
        inputs = {}
        for name, spec in self.metadata.inputs.items():
            arrays = [request[name] for request in batch]
            rows = sum(len(array) for array in arrays) if self._batches else 0
            shape = (rows, *arrays[0].shape[1:]) if self._batches else arrays[0].shape
            stacked = self._backend.empty(shape, DATATYPES[spec.datatype])
            if self._batches:
                np.concatenate(arrays, out=stacked)
            else:
                np.copyto(stacked, arrays[0])
            inputs[name] = stacked
        try:
            outputs = self._backend.run(inputs)
        except (RequestError, DeviceLost):
            raise
        except BaseException as error:  # sys.exit() in a model too: it is the request that fails, not the server
            logger.exception("model %s version %s raised", self.metadata.name, self.version)
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(f"model '{self.metadata.name}' failed: {text}") from error
        for name, array in outputs.items():
            outputs[name] = array = np.asarray(array, order="C")
            if self._batches and array.shape[:1] != (rows,):
                raise ModelError(
                    f"model '{self.metadata.name}' answered a batch of {rows} rows with shape "
                    f"{list(array.shape)} for output '{name}'"
                )
        if len(batch) == 1:
            return [outputs]
        answers, start = [], 0
        for request in batch:
            stop = start + len(next(iter(request.values())))
            answers.append({name: array[start:stop] for name, array in outputs.items()})
            start = stop
        return answers

    def zeros(self, rows: int) -> dict[str, Array]:
        """A request of `rows` rows of zeros; a dimension of any size is 1."""
        inputs = {}
        for name, spec in self.metadata.inputs.items():
            shape = [1 if size == -1 else size for size in spec.shape]
            if self._batches:
                shape[0] = rows
            inputs[name] = np.zeros(shape, DATATYPES[spec.datatype])
        return inputs

    async def warm(self, inline_seconds: float) -> float:
        """Run the model on zeros until it is warm, check what it answers, decide where it runs.

        Inline needs proof: fixed shapes, so that the largest batch can be measured, and the best of five of those
        below `inline_seconds`, on the event loop itself. The best, since the rest says how busy the machine is now.

        Returns:
            The seconds that the largest batch took.

        Raises:
            ModelError: it fails, or its outputs are not what its config promises.
        """
        one, largest = [self.zeros(1)], [self.zeros(max(self.metadata.max_batch_size, 1))]
        await self.lane.call(self._backend.enter, False)
        times = []
        for batch in (one, largest, largest, largest):
            started = time.perf_counter()
            answer = (await self.lane.call(self.execute, batch))[0]
            times.append(time.perf_counter() - started)
            self._check(answer)
        seconds = min(times[2:])
        if not self._variable and seconds <= _WORTH_MEASURING:
            self._backend.enter(True)
            times = []
            for _ in range(7):  # the first two warm what a library keeps for each thread
                started = time.perf_counter()
                self.execute(largest)
                times.append(time.perf_counter() - started)
            alone = min(times[2:])
            self.inline = alone <= inline_seconds
            seconds = alone if self.inline else seconds
        return seconds

    def _check(self, answer: dict[str, Array]) -> None:
        for name, spec in self.metadata.outputs.items():
            if name not in answer:
                raise ModelError(f"model '{self.metadata.name}' gives no output '{name}', its config promises one")
            array, dtype = answer[name], DATATYPES[spec.datatype]
            if array.dtype != dtype or not fits(array.shape, spec.shape):
                raise ModelError(
                    f"model '{self.metadata.name}', output '{name}': its config promises {spec.datatype} "
                    f"{list(spec.shape)}, the model gives {array.dtype} {list(array.shape)}"
                )


class LocalEngine:
    """The engine in this process: an `engine.types.Engine`."""

    def __init__(self, settings: Settings) -> None:
        self.draining = False
        self._settings = settings
        self._started = False
        self._lanes: dict[str, Lane] = {}
        self._models: dict[tuple[str, str], tuple[LocalModel, Batcher[dict[str, Array], dict[str, Array]]]] = {}

    async def start(self) -> None:
        for stored in read_repository(Path(self._settings.models)):
            config = stored.config
            versions = tuple(str(version) for version in stored.files)
            for number, file in stored.files.items():
                await self._load(config, file, str(number), versions)
            self._models[config.name, ""] = self._models[config.name, versions[-1]]
        # What loading left behind lives as long as the process does: out of the collector's sight, a full collection
        # no longer stops the world for a tenth of a second.
        gc.collect()
        gc.freeze()
        self._started = True

    async def stop(self) -> None:
        self.draining = True
        await asyncio.gather(*(lane.stop(STOP_SECONDS) for lane in self._lanes.values()))

    def live(self) -> bool:
        return all(lane.alive(self._settings.stuck_after) for lane in self._lanes.values())

    def ready(self) -> bool:
        return self._started and not self.draining and self.live()

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        if (model, version) not in self._models:
            raise self._unknown(model, version)
        return self._models[model, version][0].metadata

    def batch_sizes(self, model: str) -> dict[int, int]:
        """How many batches of the model's highest version were run, by their rows."""
        return self._models[model, ""][1].sizes

    async def infer(self, request: InferRequest) -> InferResponse:
        try:
            model, batcher = self._models[request.model, request.version]
        except KeyError:
            raise self._unknown(request.model, request.version) from None
        rows = check_request(model.metadata, request)
        bucket: Hashable = model.bucket
        if model.buckets:
            bucket = tuple(request.inputs[name].shape[1:] for name in model.metadata.inputs)
        outputs = await batcher.submit(request.inputs, rows, bucket, request.deadline)
        return InferResponse(request.model, model.version, outputs)

    def _unknown(self, model: str, version: str) -> NotFound:
        which = f" version {version}" if (model, "") in self._models else ""
        return NotFound(f"Request for unknown model: '{model}'{which} is not found")

    async def _load(self, config: ModelConfig, file: Path, version: str, versions: tuple[str, ...]) -> None:
        rows = max(config.max_batch_size, 1)
        if self._settings.queue_rows < rows:
            raise ConfigError(
                f"MILLRACE_QUEUE_ROWS: must hold at least one batch of model '{config.name}', {rows} rows, "
                f"got {self._settings.queue_rows}"
            )
        module, _, name = BACKENDS[config.backend].partition(":")
        backend: Any = getattr(importlib.import_module(module), name)(config, file)
        lane = self._lanes.get(str(backend.device))
        if lane is None:
            lane = self._lanes[str(backend.device)] = Lane(str(backend.device))
            lane.start()
        metadata = ModelMetadata(
            config.name,
            versions,
            config.platform or config.backend,
            config.max_batch_size,
            config.inputs,
            config.outputs,
        )
        model = LocalModel(metadata, version, config, backend, lane)
        seconds = await model.warm(self._settings.inline_ms / 1000)
        batcher = Batcher(Policy(rows, config.max_delay, self._settings.queue_rows), model.run, lane.wake)
        lane.attach(batcher)
        self._models[config.name, version] = model, batcher
        logger.info(
            "model %s version %s on %s: %.2f ms for %d rows, runs %s",
            config.name, version, backend.device, seconds * 1000, rows, "inline" if model.inline else "in a thread",
        )  # fmt: skip
