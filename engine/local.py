"""LocalEngine: the models of this process, which of them are served, and how that changes.

A version of a model is loaded beside what is served, and takes its place in one step; what it replaces answers the
requests that are under way, and then goes. If one version of a model cannot be loaded, none is: all stays as it was.
"""

import asyncio
import hashlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from batching import Answer, Cache, Item, QueueFull

from .calls import CallModel, LocalCall, size_of
from .diagnostics import LogSettings, TraceSettings
from .errors import (
    NOT_DECOUPLED,
    ConfigError,
    EngineError,
    InvalidInput,
    LoadFailed,
    ModelError,
    NotFound,
    NotReady,
    Unimplemented,
)
from .functions import Function, as_stored
from .lane import Lane
from .loading import Loader, Served
from .metrics import Metrics
from .model import Tensors
from .regions import SystemRegions
from .repository import StoredModel, fingerprint, overlay, read_model, scan, versions
from .settings import Settings
from .shared_metrics import SharedMetrics
from .types import Caller, InferRequest, InferResponse, ModelMetadata
from .validate import check_request, not_served

# Seconds for the batches on the devices to end, once their requests are answered or given up.
STOP_SECONDS = 5.0

# State and reason of a version that was served, and is not any more.
UNLOADED = ("UNAVAILABLE", "unloaded")

logger = logging.getLogger("millrace")


class LocalEngine:
    """The engine in this process: an `engine.types.Engine`. To be made on a running event loop, which it stays with.

    Attributes:
        changed: called after each change of what is served and of the models' states, of regions and of log settings.
    """

    def __init__(self, settings: Settings, functions: Sequence[Function] = ()) -> None:
        """`functions` are served instead of a repository, if there are any."""
        self.draining = False
        self.changed: Callable[[], None] = lambda: None
        self.regions = SystemRegions(settings.shared_memory, lambda: self.changed())
        self._settings = settings
        self._roots = [Path(root) for root in settings.models.split(":")]
        self._started = False
        self._functions = functions
        self._loader = Loader(settings, self, functions)
        self._models: dict[tuple[str, str], Served] = {}  # and (name, "") for the highest version
        self._states: dict[str, dict[str, tuple[str, str]]] = {}  # name -> version -> state, reason
        self._stamps: dict[str, Hashable] = {}  # of the folder of what is served
        self._folders: dict[Path, int] = {}  # that came with a request to load -> copies that were loaded from it
        # One change of a model at a time: the locks of those that somebody changes, or waits for.
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._retiring: set[asyncio.Task[None]] = set()
        self._polling: asyncio.Task[None] | None = None
        self._trace = TraceSettings()
        self._log = LogSettings()
        self._metrics = Metrics()
        self._shared = SharedMetrics(Path(settings.metrics_dir), self._own_metrics) if settings.metrics_dir else None
        self._cache: Cache[Tensors] = Cache(
            settings.cache_bytes,
            settings.cache_seconds,
            max_waiting=settings.queue_rows,
            max_waiting_bytes=settings.queue_bytes,
        )

    # The process.

    async def start(self) -> None:
        failures: list[EngineError] = []
        for found in await asyncio.to_thread(self._at_start):
            try:
                if isinstance(found, EngineError):
                    raise found
                await self._replace(*found)
            except (EngineError, _VersionFailed) as error:
                failures.append(error.error if isinstance(error, _VersionFailed) else error)
                logger.error("%s", failures[-1])
        if failures and self._settings.exit_on_error:
            raise failures[0]
        self._loader.freeze()
        if self._shared is not None:
            await self._shared.start()
        self._started = True
        if self._settings.model_control == "poll" and not self._functions:
            self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        self.draining = True
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling], timeout=STOP_SECONDS)  # what it loads needs the lanes to let go of it
        served = set(self._models.values())
        await asyncio.gather(
            *(lane.stop(STOP_SECONDS) for lane in self._loader.lanes.values()),
            *(each.model.stop(STOP_SECONDS) for each in served if isinstance(each.model, CallModel)),
            *(lane.stop(STOP_SECONDS) for each in served if not isinstance(each.model, CallModel) for lane in each.own),
        )
        if self._retiring:
            await asyncio.wait(self._retiring, timeout=STOP_SECONDS)
        if self._shared is not None:
            await self._shared.stop(STOP_SECONDS)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._log.restore()

    def live(self) -> bool:
        return all(lane.alive(self._settings.stuck_after) for lane in self._lanes())

    def lost(self) -> str:
        """Why some of what is served will never be answered again by this process; empty while that is not so."""
        return next((lane.lost for lane in self._lanes() if lane.lost), "")

    def _lanes(self) -> set[Lane]:
        return {lane for served in self._models.values() for lane in served.lanes}

    def ready(self) -> bool:
        return self._started and not self.draining and self.live()

    # What is known of a model.

    async def model_ready(self, model: str, version: str = "") -> bool:
        served = self._find(model, version)
        if not self.ready():
            return False
        return await served.model.is_ready() if isinstance(served.model, CallModel) else True

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return self._find(model, version).model.metadata

    async def config(self, model: str, version: str = "") -> dict[str, Any]:
        return self._find(model, version).stored.config.document

    async def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        found = [served for served in self._all() if model in ("", served.stored.config.name)]
        if model and not found:
            raise InvalidInput(f"requested model '{model}' is not available")
        found = [served for served in found if version in ("", served.version)]
        if version and not found:
            raise InvalidInput(f"requested model version is not available for model '{model}'")
        return [
            {"name": served.stored.config.name, "version": served.version, **served.model.statistics.json()}
            for served in found
        ]

    async def metrics(self) -> str:
        return self._own_metrics() if self._shared is None else self._shared.text()

    def _own_metrics(self) -> str:
        return self._metrics.render(self._all())

    def _all(self) -> list[Served]:
        """By name, then by version."""
        found = [(name, int(version), served) for (name, version), served in self._models.items() if version]
        return [served for _, _, served in sorted(found, key=lambda each: each[:2])]

    async def batching(self, model: str, version: str = "") -> dict[str, Any]:
        served = self._find(model, version)
        report = served.batcher.report()
        report["model"] = {"name": model, "version": served.version, "inline": served.model.inline}
        if served.stored.config.cache:
            report["cache"] = self._cache.report()
        return report

    async def trace(self, model: str = "", changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        try:
            if model:
                self._find(model, "")
        except NotFound:
            raise InvalidInput(f"Request for unknown model : {model}") from None
        if changes is not None:
            self._trace.update(model, changes)
        return self._trace.of(model)

    async def log(self, changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        if changes is not None:
            self._log.update(changes)
            self.changed()
        return dict(self._log.values)

    # Inference.

    def check_room(self, model: str, version: str) -> None:
        served = self._models.get((model, version)) or self._find(model, version)
        if served.batcher.full and not served.stored.config.cache:  # else its answer may be there already
            served.batcher.refuse()

    async def infer(self, request: InferRequest) -> InferResponse:
        key = request.model, request.version
        served = self._models.get(key) or self._find(*key)
        model = served.model
        if model.metadata.decoupled:
            raise Unimplemented(NOT_DECOUPLED)
        item = model.item(request, check_request(model.metadata, request))
        like = request.like
        if like is not None and like not in served.alike and served.stacked and _says_nothing_else(request):
            served.remember(like, item[1:])
        served.active += 1
        outputs: Any
        try:
            if served.stored.config.cache and not request.alone:
                outputs = await self._cached(served, request, item)
            else:
                outputs = await served.batcher.submit(*item)
            if type(outputs) is dict:
                return InferResponse(request.model, served.version, outputs)
            response: InferResponse = outputs if outputs is not None else await item[0].answer()
            return response
        except asyncio.CancelledError:
            if type(item[0]) is LocalCall:
                item[0].leave()
            raise
        finally:
            served.active -= 1
            if served.wake is not None:
                served.left()

    def ask(self, model: str, version: str, like: object, inputs: Tensors, caller: Caller) -> Served | None:
        served = self._models.get((model, version))
        alike = served.alike.get(like) if served is not None else None
        if served is None or alike is None or served.batcher.full:
            return None
        served.active += 1
        served.batcher.enqueue_alike(caller, inputs, alike)
        return served

    async def stream(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        served = self._find(request.model, request.version)
        if not served.model.metadata.decoupled:
            yield await self.infer(request)
            return
        item = served.model.item(request, check_request(served.model.metadata, request))
        call = item[0]
        served.active += 1
        running = asyncio.create_task(_submit(served, item))
        try:
            async for response in call.responses():
                yield response
        finally:
            call.leave()
            running.cancel()
            try:
                await asyncio.wait([running])
            finally:  # its caller may leave just as it ends
                served.active -= 1
                served.left()

    async def _cached(self, served: Served, request: InferRequest, item: tuple[Any, ...]) -> Tensors:
        """The answer to an equal request, or, if there is none, this one's: by model, version and all inputs."""
        began = time.monotonic()
        computed = False

        async def compute() -> Tensors:
            nonlocal computed
            computed = True
            served.model.statistics.misses.add(time.monotonic() - began)
            outputs = await served.batcher.submit(*item)
            if type(outputs) is not dict:  # of a model that is given requests
                outputs = (outputs if outputs is not None else await item[0].answer()).outputs
            # They are views of the whole batch's arrays, which must not live as long as one answer does.
            return {name: array.copy() for name, array in outputs.items()}

        digest = hashlib.blake2b(digest_size=32)
        if isinstance(served.model, CallModel):  # it may look at these, too
            digest.update(repr((sorted(request.outputs or ()), sorted(request.parameters.items()))).encode())
        for name in served.model.metadata.inputs:
            array = request.inputs.get(name)
            if array is None:  # an optional one
                digest.update(b"none")
                continue
            digest.update(repr(array.shape).encode())
            if array.dtype == object:
                digest.update(repr(array.tolist()).encode())
            else:
                digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
        key = (served.number, digest.digest())
        _payload, _rows, _bucket, deadline, _length, nbytes, *_ = item
        looked = time.monotonic() - began
        outputs = await self._cache.answer(key, compute, _nbytes, deadline, nbytes)
        if not computed:
            served.model.statistics.hit(time.monotonic() - began, looked)
        return outputs

    def _find(self, model: str, version: str) -> Served:
        try:
            return self._models[model, version]
        except KeyError:
            raise not_served(self._states.get(model), (model, "") in self._models, model, version) from None

    # For workers in other processes: see `engine.ipc.server.Owner`.

    def copies(self) -> list[Served]:
        return self._all()

    def catalogue(self) -> dict[str, Any]:
        copies = [
            {
                "number": served.number,
                "version": served.version,
                "latest": self._models.get((served.metadata.name, "")) is served,
                "metadata": served.metadata,
            }
            for served in self._all()
        ]
        log = self._log.values if self._log.set else None
        return {"copies": copies, "states": self._states, "regions": self.regions.registered(), "log": log}

    def post(
        self,
        served: Served,
        request: InferRequest,
        rows: int,
        inputs: Sequence[Tensors],
        answers: Sequence[Answer[Tensors]],
    ) -> list[Item[Any, Any] | Exception]:
        try:
            _inputs, *alike = served.model.item(request, rows)
        except Exception as error:
            return [error] * len(answers)
        items = served.batcher.enqueue_all(answers, inputs, *alike)
        served.active += sum([not isinstance(item, Exception) for item in items])
        return items

    def take_back(self, served: Served, item: Item[Any, Any]) -> bool:
        return served.batcher.forget(item)

    def full(self, served: Served) -> bool:
        return served.batcher.full

    def refused(self, served: Served, count: int) -> None:
        served.batcher.journal.was_refused(QueueFull("", 0), count)

    def ended(self, served: Served, count: int = 1) -> None:
        served.active -= count
        if served.wake is not None:
            served.left()

    # What is served.

    async def index(self) -> list[dict[str, str]]:
        found = await asyncio.to_thread(self._in_repositories)
        index = []
        for name in sorted({*found, *self._states}):
            folders = found.get(name, [])
            if len(folders) > 1 and (name, "") not in self._models:
                index.append(
                    {"name": name, "state": "UNAVAILABLE", "reason": "model appears in two or more repositories"}
                )
                continue
            # Of what was unloaded only what could be loaded again: not the files of a request to load, which are gone.
            states = {
                version: state
                for version, state in self._states.get(name, {}).items()
                if state != UNLOADED or any(version in folder for folder in folders)
            }
            if folders and not states:
                index.append({"name": name})
            for version, (state, reason) in sorted(states.items(), key=lambda entry: int(entry[0])):
                index.append(
                    {"name": name, "version": version, "state": state, **({"reason": reason} if reason else {})}
                )
        return index

    def _in_repositories(self) -> dict[str, list[set[str]]]:
        """Every model there, with the versions in each folder of its name."""
        return {
            name: [set(map(str, _versions(folder))) for folder in folders]
            for name, folders in scan(self._roots).items()
        }

    async def load(self, model: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        self._check_control()
        try:
            await self._load(model, config, files)
        except LoadFailed as error:
            logger.error("%s", error)
            raise

    async def unload(self, model: str, dependents: bool = False) -> None:
        self._check_control()
        async with self._change(model):
            self._take_out(model)

    @asynccontextmanager
    async def _change(self, model: str) -> AsyncGenerator[None, None]:
        """Nobody else changes this model meanwhile.

        Raises:
            LoadFailed: somebody does, for too long. A model whose `initialize` loads itself would wait for ever.
        """
        lock = self._changing.setdefault(model, asyncio.Lock())
        try:
            await asyncio.wait_for(lock.acquire(), self._settings.stuck_after)
        except TimeoutError:
            raise LoadFailed(f"failed to load '{model}': it is being loaded or unloaded already") from None
        try:
            yield
        finally:
            lock.release()

    def _check_control(self) -> None:
        if self._settings.model_control != "explicit":
            raise NotReady("explicit model load / unload is not allowed if polling is enabled")

    def _at_start(self) -> list[tuple[StoredModel, Hashable] | EngineError]:
        """What is to be served with its folder's stamp, or why it cannot be."""
        settings = self._settings
        if self._functions:
            return [(stored, None) for stored in as_stored(self._functions)]
        folders = scan(self._roots)
        names = [name.strip() for name in settings.load_models.split(",") if name.strip()]
        if settings.model_control != "explicit" or names == ["*"]:
            if not folders:
                raise ConfigError(f"{settings.models}: the model repository holds no model: no folder in it")
            names = sorted(folders)
        found: list[tuple[StoredModel, Hashable] | EngineError] = []
        for name in names:
            places = folders.get(name, [])
            if len(places) != 1:
                where = " and ".join(map(str, places)) or "no repository (MILLRACE_LOAD_MODELS)"
                found.append(ConfigError(f"model '{name}' is in {where}"))
                continue
            try:
                stamp = fingerprint(places[0])  # before it is read: what changes from now on is a change
                found.append((read_model(places[0], auto_complete=settings.auto_complete), stamp))
            except EngineError as error:
                found.append(error)
        return found

    async def _load(self, model: str, config: str | None, files: Mapping[str, bytes] | None) -> None:
        async with self._change(model):
            given = Path(tempfile.mkdtemp(prefix="millrace-")) if files else None
            try:
                await self._load_from(given, model, config, files)
            finally:
                if given is not None and given not in self._folders:
                    await asyncio.to_thread(shutil.rmtree, given, True)

    async def _load_from(
        self, given: Path | None, model: str, config: str | None, files: Mapping[str, bytes] | None
    ) -> None:
        """Load a model from its folder, or from `files`, which are written below `given`."""
        folders: list[Path] = []
        try:
            folders = (await asyncio.to_thread(scan, self._roots)).get(model, [])
            if files and given is not None:
                if config is None:
                    raise ConfigError("files need a config that goes with them")
                folder = await asyncio.to_thread(overlay, model, files, given)
            elif len(folders) == 1:
                folder = folders[0]
            else:
                raise ConfigError("it is in two repositories" if folders else "no repository has it")
            stamp = await asyncio.to_thread(fingerprint, folder)
            if config is None and (model, "") in self._models and self._stamps.get(model) == stamp:
                return
            stored = await asyncio.to_thread(read_model, folder, config, self._settings.auto_complete)
        except (EngineError, OSError) as error:
            if (model, "") not in self._models and len(folders) == 1:
                self._states[model] = {
                    str(version): ("UNAVAILABLE", f"Invalid argument: {self._without_paths(error, None)}")
                    for version in versions(folders[0])
                }
                self.changed()
            reason = self._without_paths(error, given)
            raise LoadFailed(f"failed to load '{model}', failed to poll from model repository: {reason}") from None
        try:
            await self._replace(stored, stamp, given)
        except _VersionFailed as failed:
            reason = self._without_paths(failed.error, given)
            raise LoadFailed(
                f"load failed for model '{model}': version {failed.version} is at UNAVAILABLE state: Internal: "
                f"{reason};\n"
            ) from None

    def _without_paths(self, error: Exception, given: Path | None) -> str:
        """What went wrong, with files named within their repository: where that is concerns no client."""
        text = str(error)
        for root in (*self._roots, *([given] if given is not None else [])):
            text = text.replace(f"{root}/", "")
        return _as_text(text)

    async def _replace(self, stored: StoredModel, stamp: Hashable, given: Path | None = None) -> None:
        """Load every version of a model, and let them take the place of what is served of it, all at once.

        Raises:
            _VersionFailed: one cannot be loaded; nothing has changed.
        """
        name = stored.config.name
        before = self._states.get(name, {})
        states = self._states[name] = dict(before)
        loaded: list[Served] = []
        for number in stored.files:
            version = str(number)
            if (name, version) not in self._models:
                states[version] = ("LOADING", "")
                self.changed()
            try:
                loaded.append(await self._loader.load(stored, number))
            except BaseException as error:
                for served in loaded:
                    await self._loader.retire(served)
                self._states[name] = before if (name, "") in self._models else _failed(stored, version, error)
                self.changed()
                if isinstance(error, EngineError):
                    raise _VersionFailed(version, error) from None
                if isinstance(error, Exception):  # of a library, say: this model's matter, not the server's
                    logger.exception("model %s version %s cannot be loaded", name, version)
                    text = f"{type(error).__name__}: {error}".splitlines()[0]
                    raise _VersionFailed(version, ModelError(f"model '{name}' cannot be loaded: {text}")) from None
                raise
        old = [served for (model, number), served in self._models.items() if model == name and number]
        for served in old:
            del self._models[name, served.version]
            states[served.version] = UNLOADED
        if given is not None:
            self._folders[given] = len(loaded)
        for served in loaded:
            served.folder = given
            self._models[name, served.version] = served
            states[served.version] = ("READY", "")
        self._models[name, ""] = loaded[-1]
        self._stamps[name] = stamp
        self._metrics.replaced(old, loaded)
        self.changed()
        for served in old:
            self._retire(served, None)

    def _take_out(self, name: str) -> None:
        old = [served for (model, number), served in self._models.items() if model == name and number]
        self._models.pop((name, ""), None)
        self._stamps.pop(name, None)
        for served in old:
            del self._models[name, served.version]
            self._states[name][served.version] = ("UNLOADING", "")
            self._retire(served, UNLOADED)
        self._metrics.removed(old)
        if old:
            self.changed()
            logger.info("model %s is being unloaded", name)

    def _retire(self, served: Served, state: tuple[str, str] | None) -> None:
        """Let a version finish, in the background, and say `state` of it then."""

        async def retire() -> None:
            await self._loader.retire(served)
            self._metrics.retired(served)
            states = self._states[served.stored.config.name]
            if state is not None and states.get(served.version, ("", ""))[0] == "UNLOADING":
                states[served.version] = state
                self.changed()
            if served.folder is not None:
                self._folders[served.folder] -= 1
                if not self._folders[served.folder]:
                    del self._folders[served.folder]
                    await asyncio.to_thread(shutil.rmtree, served.folder, True)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _poll(self) -> None:
        """Follow the repositories: load what came or changed, take out what is gone. What fails stays as it was."""
        failed: dict[str, Hashable] = {}
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            try:
                await self._poll_once(failed)
            except Exception:
                logger.exception("the repository cannot be read: what is served stays as it is")

    async def _poll_once(self, failed: dict[str, Hashable]) -> None:
        """`failed` holds the folders' stamps of what could not be loaded: it is not tried again until it changes."""
        folders = await asyncio.to_thread(scan, self._roots)
        for name in [name for name in self._stamps if name not in folders]:
            async with self._change(name):
                self._take_out(name)
        for name in [name for name in failed if name not in folders]:
            del failed[name]
        for name, places in folders.items():
            stamp = await asyncio.to_thread(fingerprint, places[0])
            if len(places) > 1 or stamp in (self._stamps.get(name), failed.get(name)):
                continue
            try:
                await self._load(name, None, None)
                failed.pop(name, None)
            except Exception as error:  # whatever it is, the other models are looked at
                failed[name] = stamp
                logger.error("%s", error, exc_info=None if isinstance(error, LoadFailed) else error)


class _VersionFailed(Exception):
    """A version of a model cannot be loaded."""

    def __init__(self, version: str, error: EngineError) -> None:
        super().__init__(version, error)
        self.version = version
        self.error = error


def _failed(stored: StoredModel, version: str, error: BaseException) -> dict[str, tuple[str, str]]:
    text = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}".splitlines()[0]
    reason = _as_text(f"Internal: {text}")
    return {str(number): ("UNAVAILABLE", reason if str(number) == version else "unloaded") for number in stored.files}


def _as_text(text: str) -> str:
    """A file's name may have what no encoding has, and JSON refuses that."""
    return text.encode(errors="replace").decode()


def _versions(folder: Path) -> list[int]:
    """Those in a model's folder; none if it has just been taken away, or cannot be read."""
    try:
        return versions(folder)
    except ConfigError:
        return []


async def _submit(served: Served, item: tuple[Any, ...]) -> None:
    """Queue a decoupled call; an error of the queue's or of the batch's ends its responses."""
    try:
        await served.batcher.submit(*item)
    except Exception as error:
        item[0].arrive(error, True)


def _nbytes(outputs: Tensors) -> int:
    return sum(map(size_of, outputs.values()))


def _says_nothing_else(request: InferRequest) -> bool:
    """Whether, but for its tensors, it is as every other request is."""
    return (
        request.deadline == math.inf
        and not (request.priority or request.timeout or request.client or request.alone)
        and request.boarding is None
    )
