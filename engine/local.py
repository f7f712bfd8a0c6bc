"""LocalEngine: the models of this process. For each model version a backend and a batcher; for each device a lane."""

import asyncio
import dataclasses
import gc
import hashlib
import importlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from batching import Batcher, Cache

from .config import ModelConfig
from .errors import ConfigError, NotFound
from .lane import Lane
from .model import LocalModel, Tensors
from .repository import read_repository
from .settings import Settings
from .types import DATATYPES, InferRequest, InferResponse, ModelMetadata
from .validate import check_request

# backend -> "module:class", imported only when a model needs it, since the modules import heavy libraries
BACKENDS = {"pytorch": "engine.backends.pytorch:PyTorchBackend"}

# Seconds for the batches on the devices to end, once their requests are answered or given up.
STOP_SECONDS = 5.0

logger = logging.getLogger("millrace")


class LocalEngine:
    """The engine in this process: an `engine.types.Engine`. To be made on a running event loop, which it stays with."""

    def __init__(self, settings: Settings) -> None:
        self.draining = False
        self._settings = settings
        self._started = False
        self._lanes: dict[str, Lane] = {}
        self._models: dict[tuple[str, str], tuple[LocalModel, Batcher[Tensors, Tensors], bool]] = {}
        self._cache: Cache[Tensors] = Cache(
            settings.cache_bytes,
            settings.cache_seconds,
            max_waiting=settings.queue_rows,
            max_waiting_bytes=settings.queue_bytes,
        )

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
        return self._find(model, version)[0].metadata

    def batching(self, model: str, version: str = "") -> dict[str, Any]:
        found, batcher, cached = self._find(model, version)
        report = batcher.report()
        report["model"] = {"name": model, "version": found.version, "inline": found.inline}
        if cached:
            report["cache"] = self._cache.report()
        return report

    def check_room(self, model: str, version: str) -> None:
        _, batcher, cached = self._models.get((model, version)) or self._find(model, version)
        pending = batcher.pending
        full = pending.rows >= pending.policy.capacity or pending.nbytes >= pending.policy.capacity_bytes
        if full and not cached:  # else its answer may be there already
            batcher.refuse()

    async def infer(self, request: InferRequest) -> InferResponse:
        key = request.model, request.version
        model, batcher, cached = self._models.get(key) or self._find(*key)
        item = model.item(request, check_request(model.metadata, request))
        if cached:
            outputs = await self._cached(model, batcher, request, item)
        else:
            outputs = await batcher.submit(*item)
        return InferResponse(request.model, model.version, outputs)

    async def _cached(
        self, model: LocalModel, batcher: Batcher[Tensors, Tensors], request: InferRequest, item: tuple[Any, ...]
    ) -> Tensors:
        """The answer to an equal request, or, if there is none, this one's: by model, version and all inputs."""

        async def compute() -> Tensors:
            outputs = await batcher.submit(*item)
            # They are views of the whole batch's arrays, which must not live as long as one answer does.
            return {name: array.copy() for name, array in outputs.items()}

        digest = hashlib.blake2b(digest_size=32)
        for name in model.metadata.inputs:
            array = request.inputs[name]
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        key = (model.metadata.name, model.version, digest.digest())
        _payload, _rows, _bucket, deadline, _length, nbytes, *_ = item
        return await self._cache.answer(key, compute, _nbytes, deadline, nbytes)

    def _find(self, model: str, version: str) -> tuple[LocalModel, Batcher[Tensors, Tensors], bool]:
        try:
            return self._models[model, version]
        except KeyError:
            which = f" version {version}" if (model, "") in self._models else ""
            raise NotFound(f"Request for unknown model: '{model}'{which} is not found") from None

    async def _load(self, config: ModelConfig, file: Path, version: str, versions: tuple[str, ...]) -> None:
        settings, rows = self._settings, config.policy.max_rows
        if settings.queue_rows < rows:
            raise ConfigError(
                f"MILLRACE_QUEUE_ROWS: must hold at least one batch of model '{config.name}', {rows} rows, "
                f"got {settings.queue_rows}"
            )
        policy = dataclasses.replace(
            config.policy,
            capacity=settings.queue_rows,
            capacity_bytes=settings.queue_bytes,
            fair=bool(settings.client_header),
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
            config.ragged,
            policy.lengths,
            policy.max_cost,
            policy.row_grid,
        )
        model = LocalModel(metadata, version, config, policy, backend, lane)
        row = row_bytes(config)
        if settings.queue_bytes < row:
            raise ConfigError(
                f"MILLRACE_QUEUE_BYTES: must hold at least one row of model '{config.name}', {row} bytes, "
                f"got {settings.queue_bytes}"
            )
        seconds = await model.warm(settings.inline_ms / 1000)
        batcher: Batcher[Tensors, Tensors] = Batcher(policy, model, lane.wake, lambda: lane.free_at)
        for cost, took in model.measured * 2:  # twice: what is learned first counts for little
            batcher.pending.cost.learn(cost, max(0.0, took - batcher.pending.stacking(cost)))
        lane.attach(batcher)
        self._models[config.name, version] = model, batcher, config.cache
        logger.info(
            "model %s version %s on %s: %.2f ms for %d rows, runs %s",
            config.name, version, backend.device, seconds * 1000, rows, "inline" if model.inline else "in a thread",
        )  # fmt: skip


def row_bytes(config: ModelConfig) -> int:
    """Of the smallest request there can be: one row, dimensions of any size being 1."""
    sizes = [math.prod(abs(size) for size in spec.shape) for spec in config.inputs.values()]
    return sum(
        size * DATATYPES[spec.datatype].itemsize for size, spec in zip(sizes, config.inputs.values(), strict=True)
    )


def _nbytes(outputs: Tensors) -> int:
    return sum(array.nbytes for array in outputs.values())
