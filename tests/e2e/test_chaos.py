"""One engine and its workers under load, while they are killed, stopped and stuck: what the service promises holds.

Every request carries a number of its own as its tensor's value, so that an answer to another request is seen. A client
has one request under way on a kept-alive connection; whose connection it is, the kernel says (/proc/net/tcp).
CHAOS_SEED in the environment throws the dice of an earlier run, which printed it.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.ipc.client import ask_status
from engine.ipc.frames import FrameError
from engine.options import Exit

from .client import PATIENCE, Answer, Connection, Failed, request
from .processes import MARK, Process, eventually

pytestmark = pytest.mark.e2e

SEED = int(os.environ.get("CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
SECONDS = 30.0  # of each load with kills
ENGINE = "engine"  # the engine's place; the workers' are worker-0, worker-1 and so on
ARENA = 8 << 20  # bytes
ESTABLISHED, CLOSE_WAIT = "01", "08"  # states in /proc/net/tcp

CONFIG = """
backend: "{backend}"
max_batch_size: 32
dynamic_batching {{ }}
input {{ name: "INPUT0" data_type: TYPE_INT64 dims: [ -1 ] }}
output {{ name: "OUTPUT0" data_type: TYPE_INT64 dims: [ -1 ] }}
"""

# What a model does with a batch's numbers: those of positive value are doubled in a few milliseconds.
MODEL = """
import os, signal, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        arrays = [pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy() for request in requests]
        numbers = {int(array.flat[0]) for array in arrays}
        with open(os.environ["CHAOS_LOG"], "a") as log:
            log.writelines(f"{number}\\n" for number in numbers if number < 0)
        if -1 in numbers:
            time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
        while -2 in numbers:
            time.sleep(1)
        time.sleep(0.002 + 1.5 * (-3 in numbers))
        outputs = [pb_utils.Tensor("OUTPUT0", 2 * array) for array in arrays]
        return [pb_utils.InferenceResponse([output]) for output in outputs]
"""
POISON, ENDLESS, LONG = -1, -2, -3  # kills its process; never returns; takes a second and a half
TWICE = "the engine ended twice while it ran this request"
MODELS = {"same": 1, "double": 2, "risky": 2}  # by what they multiply a number

# Elements of a request's tensor, and whether it is binary: in JSON, in the stream, and in shared memory.
SHAPES = ((4, False), (4, True), (6000, True))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """What was measured is told even when the test passes."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return say


@dataclass(frozen=True)
class End:
    """A process that ended, though nobody told it to; `code` is negative if a signal ended it."""

    place: str
    pid: int
    code: int


class Service:
    """An engine and workers on one listening socket. What ends is started again at once, as by a supervisor.

    Attributes:
        address: of the workers.
        ends: who ended, in that order.
        killed: process ids that `kill` was told of.
    """

    def __init__(self, folder: Path, workers: int, settings: dict[str, str]) -> None:
        self.path = folder / "run/engine.sock"
        self.ends: list[End] = []
        self.killed: list[int] = []
        self._folder = folder
        self._mark = uuid.uuid4().hex
        self._log = folder / f"run/{self._mark}.log"
        self._model_log = folder / f"run/{self._mark}.numbers"
        self._model_log.touch()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")},
            "MILLRACE_ENGINE_SOCKET": str(self.path),
            "MILLRACE_MODELS": "chaos",
            "MILLRACE_CLASSIFIER": "",
            "MILLRACE_ARENA_BYTES": str(ARENA),
            "CHAOS_LOG": str(self._model_log),
            MARK: self._mark,
            **settings,
        }
        fd = str(self._listener.fileno())
        self._commands: dict[str, tuple[str, ...]] = {ENGINE: ("engine",)}
        self._commands |= {f"worker-{number}": ("asgi_app", "--fd", fd) for number in range(workers)}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise)

    def start(self) -> None:
        for place in self._commands:
            self._start(place)
        self._thread.start()
        eventually(self.whole, "an engine and its workers")

    def _start(self, place: str) -> None:
        module, *arguments = self._commands[place]
        with self._log.open("ab") as log:
            self._running[place] = subprocess.Popen(
                (sys.executable, "-m", module, *arguments),
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._listener.fileno()] if arguments else [],
                start_new_session=True,
            )

    def _supervise(self) -> None:
        while not self._stopping.wait(0.02):
            for place, process in list(self._running.items()):
                if (code := process.poll()) is not None:
                    self.ends.append(End(place, process.pid, code))
                    self._start(place)

    def stop(self) -> None:
        """Stop everything, the workers first. Raises AssertionError: something ends badly, or outlives it."""
        self._stopping.set()
        self._thread.join()
        processes = [self._running[place] for place in reversed(self._commands)]
        codes = []
        try:
            for process in processes:
                process.terminate()
            codes = [process.wait(60) for process in processes]
        finally:
            left = [pid for process in processes for pid in Process(process, self._mark, self._log).alive()]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in processes:
                process.wait()
            self._listener.close()
        assert not left, f"processes outlived the service: {left}"
        assert set(codes) == {0}, f"exit codes {codes}"

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def ran(self, number: int, times: int) -> bool:
        """Whether models began as many batches with a request of this number, which is below 0."""
        return self._model_log.read_text().split().count(str(number)) >= times

    # Who runs.

    def pid(self, place: str) -> int:
        return self._running[place].pid

    def workers(self) -> list[str]:
        return [place for place in self._commands if place != ENGINE]

    def whole(self) -> bool:
        """Whether the engine that runs now is ready, and has the workers that run now."""
        try:
            status = ask_status(str(self.path))
        except (OSError, FrameError):
            return False
        there = {worker["pid"] for worker in status["workers"]}
        here = {self.pid(place) for place in self.workers()}
        return status["ready"] and there == here and not here & set(self.killed)

    def owner(self, port: int) -> int:
        """The process id of the worker that accepted the connection from a local port; 0 if none is known."""
        here, there = f"0100007F:{self.address[1]:04X}", f"0100007F:{port:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        sockets = {f"socket:[{line[9]}]" for line in lines if line[1:3] == [here, there] and line[9] != "0"}
        for place in self.workers():
            if sockets & set(descriptors(self.pid(place))):
                return self.pid(place)
        return 0

    # What is done to it.

    def signal(self, place: str, number: signal.Signals) -> None:
        os.kill(self.pid(place), number)

    def kill(self, *places: str) -> None:
        """SIGKILL. Nobody can be asked for more afterwards, so that nothing is left behind is looked at before."""
        for place in places:
            assert not named_memory(self.pid(place)), f"{place} has shared memory with a name, which would outlive it"
            self.killed.append(self.pid(place))
            self.signal(place, signal.SIGKILL)

    async def becomes_whole(self) -> None:
        await asyncio.to_thread(eventually, self.whole, "an engine and its workers")

    # What it has.

    def holdings(self) -> dict[str, tuple[int, int]]:
        """Place -> descriptors, and mappings of shared memory without a name."""
        pids = {place: self.pid(place) for place in self._commands}
        return {place: (len(descriptors(pid)), len(mapped(pid, "/memfd:millrace"))) for place, pid in pids.items()}


def descriptors(pid: int) -> list[str]:
    """What a process has open; nothing if it ended."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(entry.readlink()))
    return found


def mapped(pid: int, path: str) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if f" {path}" in line]


def named_memory(pid: int) -> list[str]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return mapped(pid, "/dev/shm/")
    return []


@pytest.fixture(scope="module", autouse=True)
def models(folder: Path) -> None:
    for model in MODELS:
        version = folder / "chaos" / model / "1"
        version.mkdir(parents=True)
        backend = "identity" if model == "same" else "python"
        (version.parent / "config.pbtxt").write_text(CONFIG.format(backend=backend))
        if backend == "python":
            (version / "model.py").write_text(MODEL)


@contextlib.contextmanager
def running(folder: Path, workers: int = 2, **settings: str) -> Iterator[Service]:
    """A service, ready. At the end nothing of it is left: no process, no socket."""
    service = Service(folder, workers, settings)
    try:
        try:
            service.start()
            yield service
        finally:
            service.stop()
    except BaseException:
        print(service.log())
        raise
    left = [entry.name for entry in (folder / "run").iterdir() if entry.name.startswith("engine.sock")]
    assert left in ([], ["engine.sock.lock"]), f"left in the socket's folder: {left}"


# Requests


def encode(model: str, number: int, length: int, binary: bool, **parameters: object) -> tuple[str, bytes, list[str]]:
    """Target, body and headers of a request for `length` times the number."""
    tensor: dict[str, object] = {"name": "INPUT0", "datatype": "INT64", "shape": [1, length]}
    data = b""
    if binary:
        data = np.full(length, number).tobytes()
        tensor["parameters"] = {"binary_data_size": len(data)}
        parameters["binary_data_output"] = True
    else:
        tensor["data"] = [number] * length
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    headers = [f"Inference-Header-Content-Length: {len(head)}"] if binary else []
    return f"/v2/models/{model}/infer", head + data, headers


def decode(answer: Answer) -> np.ndarray:
    """The numbers of an answer."""
    cut = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    (output,) = json.loads(answer.body[:cut])["outputs"]
    if "data" in output:
        return np.array(output["data"], np.int64)
    return np.frombuffer(answer.body[cut:], np.int64)


def port(connection: Connection) -> int:
    found: int = connection._writer.get_extra_info("sockname")[1]
    return found


async def ask(service: Service, model: str, number: int, **parameters: object) -> Answer:
    """One small request on a connection of its own."""
    target, body, headers = encode(model, number, 4, False, **parameters)
    return await request(service.address, "POST", target, body, tuple(headers))


async def ready(service: Service) -> bool:
    return (await request(service.address, "GET", "/v2/health/ready")).status == 200


@dataclass
class Tally:
    """What became of a load's requests.

    Attributes:
        answered: right answers, by model and length.
        cut: requests whose connection broke since its worker was killed.
        failures: whatever else there is, by kind; no kind is expected.
        examples: the text of the first of each.
        waited: the longest time that a right answer took, seconds.
        since: when the request of each client that is under way was sent.
    """

    answered: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    waited: float = 0.0
    since: dict[int, float] = field(default_factory=dict)

    def fail(self, kind: str, text: str) -> None:
        self.failures[kind] += 1
        self.examples.setdefault(kind, text)

    async def turn(self) -> None:
        """Until every request that is under way now has been answered. Raises AssertionError: one is not."""
        now = time.monotonic()
        limit = now + PATIENCE
        while any(since < now for since in self.since.values()):
            assert time.monotonic() < limit, f"requests are not answered: {self}"
            await asyncio.sleep(0.02)

    def __str__(self) -> str:
        answered = ", ".join(f"{kind} {count}" for kind, count in sorted(self.answered.items()))
        failed = ", ".join(f"{kind} {count} ({self.examples[kind]})" for kind, count in sorted(self.failures.items()))
        return (
            f"{self.answered.total()} answered ({answered}), the longest in {self.waited:.2f} s; {self.cut} cut off "
            f"with their worker; failed: {failed or 'none'}"
        )


Question = Callable[[], tuple[int, str, int, bool]]  # number, model, length, binary


@contextlib.asynccontextmanager
async def load(
    service: Service, clients: int = 16, models: tuple[str, ...] = ("same", "double")
) -> AsyncIterator[Tally]:
    """Ask without an end, with numbers above 0; at the end what is under way is awaited.

    A quarter as many clients more send requests, and leave before they are answered.
    """
    tally, stop, numbers = Tally(), asyncio.Event(), itertools.count(1)
    kinds = list(itertools.product(models, SHAPES))

    def question() -> tuple[int, str, int, bool]:
        number = next(numbers)
        model, shape = kinds[number % len(kinds)]
        return number, model, *shape

    tasks = [asyncio.create_task(_client(service, client, question, tally, stop)) for client in range(clients)]
    tasks += [asyncio.create_task(_leaver(service, question, stop)) for _ in range(clients // 4)]
    try:
        yield tally
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def _client(service: Service, client: int, question: Question, tally: Tally, stop: asyncio.Event) -> None:
    while not stop.is_set():
        killed = len(service.killed)
        async with await Connection.open(service.address) as connection:
            owner = 0
            while not stop.is_set():
                number, model, length, binary = question()
                target, body, headers = encode(model, number, length, binary)
                started = tally.since[client] = time.monotonic()
                try:
                    answer = await connection.request("POST", target, body, tuple(headers))
                except Failed as error:
                    broke = re.match("closed after|ConnectionResetError|BrokenPipeError", str(error))
                    if broke and (owner in service.killed if owner else len(service.killed) > killed):
                        tally.cut += 1
                    else:
                        tally.fail("no answer", f"{error}, of worker {owner}")
                    break
                finally:
                    del tally.since[client]
                tally.waited = max(tally.waited, time.monotonic() - started)
                owner = owner or service.owner(port(connection))
                if answer.status != 200:
                    tally.fail(f"status {answer.status}", answer.body.decode(errors="replace")[:200])
                elif not np.array_equal(decode(answer), np.full(length, number * MODELS[model])):
                    tally.fail("wrong numbers", f"{model}, {number}: {decode(answer)[:4]}")
                else:
                    tally.answered[f"{model}/{length}{'b' * binary}"] += 1
                await asyncio.sleep(0.004)


async def _leaver(service: Service, question: Question, stop: asyncio.Event) -> None:
    while not stop.is_set():
        number, model, length, binary = question()
        target, body, headers = encode(model, number, length, binary)
        async with await Connection.open(service.address) as connection:
            lines = [f"POST {target} HTTP/1.1", "Host: millrace", f"Content-Length: {len(body)}", *headers]
            await connection.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            await asyncio.sleep(number % 5 * 0.002)
        await asyncio.sleep(0.02)


# Kills


async def kill_engine(service: Service, tally: Tally, dice: random.Random) -> None:
    service.kill(ENGINE)
    while dice.random() < 0.3:  # and its successor as soon as it is there: it cannot have run anything yet
        await asyncio.to_thread(eventually, lambda: service.pid(ENGINE) not in service.killed, "another engine starts")
        await asyncio.sleep(dice.uniform(0, 0.1))
        service.kill(ENGINE)
    await service.becomes_whole()
    await tally.turn()  # who was aboard is answered before the next kill: nobody is aboard two


async def kill_worker(service: Service, tally: Tally, dice: random.Random) -> None:
    service.kill(dice.choice(service.workers()))
    if dice.random() < 0.5:  # else the next one dies while this one is started
        await service.becomes_whole()


async def kill_either(service: Service, tally: Tally, dice: random.Random) -> None:
    victims = [ENGINE, *service.workers()]
    chosen = dice.choice([[ENGINE], *([ENGINE, worker] for worker in service.workers()), victims])
    service.kill(*chosen)
    await asyncio.sleep(dice.uniform(0, 1))
    if dice.random() < 0.5:  # while the engine is started
        service.kill(dice.choice(service.workers()))
    await service.becomes_whole()
    await tally.turn()


Say = Callable[[str], None]
Kill = Callable[[Service, Tally, random.Random], Awaitable[None]]


@pytest.mark.parametrize(("kill", "cut"), [(kill_engine, False), (kill_worker, True), (kill_either, True)])
async def test_kills_under_load_lose_nothing_but_what_the_killed_held(
    folder: Path, say: Say, kill: Kill, cut: bool
) -> None:
    """Half a minute of SIGKILLs: requests wait for the engine, and only connections to a killed worker break.

    All other requests are answered once, with their own numbers. What outlives the kills holds no more afterwards than
    before: no descriptor, no mapping, no queued request, no block of shared memory.
    """
    dice = random.Random(SEED)
    with running(folder) as service:
        async with load(service) as tally:
            await tally.turn()
        await closed(service)
        before = service.holdings()
        until = time.monotonic() + SECONDS
        async with load(service) as tally:
            while time.monotonic() < until:
                await asyncio.sleep(dice.uniform(0.1, 1.0))
                await kill(service, tally, dice)
            await service.becomes_whole()
            await tally.turn()
            await tally.turn()
        kills = Counter(end.place.partition("-")[0] for end in service.ends)
        say(f"{kill.__name__}, seed {SEED}: {dict(kills)} killed; {tally}")
        assert not tally.failures
        assert cut or not tally.cut
        assert {end.code for end in service.ends} == {-signal.SIGKILL}
        assert {end.pid for end in service.ends} == set(service.killed)
        assert len(tally.answered) == 2 * len(SHAPES)
        await nothing_is_held(service, before)


async def closed(service: Service) -> None:
    """Wait until no worker has a client's connection any more."""
    here = f":{service.address[1]:04X}"

    def all_closed() -> bool:
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return not any(line[1].endswith(here) and line[3] in (ESTABLISHED, CLOSE_WAIT) for line in lines)

    await asyncio.to_thread(eventually, all_closed, "every connection is closed")


async def nothing_is_held(service: Service, before: dict[str, tuple[int, int]]) -> None:
    """After a load: no process holds more than the one in its place did before, and nothing is queued or reserved."""
    await closed(service)
    for model in MODELS:
        answer = await request(service.address, "GET", f"/v2/models/{model}/batching")
        assert json.loads(answer.body)["queue"]["items"] == 0, answer
    assert [worker["busy"] for worker in ask_status(str(service.path))["workers"]] == [0] * len(service.workers())
    await every_arena_is_empty(service)
    await closed(service)

    def as_before() -> bool:
        return all(now <= then for pair in pairs() for now, then in zip(*pair, strict=True))

    def pairs() -> list[tuple[tuple[int, int], tuple[int, int]]]:
        return [(service.holdings()[place], before[place]) for place in before]

    try:
        await asyncio.to_thread(eventually, as_before, "descriptors and mappings as before")
    except AssertionError as error:
        raise AssertionError(f"{error}: {before} before, {service.holdings()} now") from None
    for place in before:
        assert not named_memory(service.pid(place)), place


async def every_arena_is_empty(service: Service) -> None:
    """A tensor as large as all memory that a worker shares with the engine has room there only while nothing else has.

    Raises:
        AssertionError: something else has, or not every worker has been met.
    """
    missing = {service.pid(place) for place in service.workers()}
    limit = time.monotonic() + PATIENCE
    target, body, headers = encode("same", 1, ARENA // 8, True)
    while missing:
        assert time.monotonic() < limit, f"no connection has come to {missing}"
        async with await Connection.open(service.address) as connection:
            answer = await connection.request("POST", target, body, tuple(headers))
            assert answer.status == 200, answer
            missing.discard(service.owner(port(connection)))


# One at a time


async def test_a_poison_request_gets_its_500_and_all_others_their_answers(folder: Path, say: Say) -> None:
    """A request that ends the engine is tried twice. What ran beside it is answered, also by another model.

    The second time it has nobody aboard with it who was there the first time, on any lane.
    """
    with running(folder) as service:
        async with load(service, models=("risky", "double", "same")) as tally:
            await tally.turn()
            for count in (1, 2):
                beside = asyncio.create_task(ask(service, "double", LONG))
                await asyncio.to_thread(eventually, partial(service.ran, LONG, 2 * count - 1), "it runs")
                answer = await ask(service, "risky", POISON)
                assert (answer.status, TWICE in str(answer.json())) == (500, True), answer
                assert service.ran(POISON, 2 * count)
                assert (await beside).status == 200
                await service.becomes_whole()
                await tally.turn()
        say(f"poison: {tally}")
        assert (dict(tally.failures), tally.cut) == ({}, 0)
        assert [(end.place, end.code) for end in service.ends] == [(ENGINE, -signal.SIGKILL)] * 4


async def test_a_sequence_that_was_aboard_is_not_sent_again(folder: Path) -> None:
    """The engine is killed while it runs two requests: a sequence's gets a 503 that says why, the other runs again."""
    with running(folder) as service:
        answer = await ask(service, "double", 4, sequence_id=7, sequence_start=True)
        assert decode(answer).tolist() == [8] * 4, "a sequence is served"
        sequence = asyncio.create_task(ask(service, "risky", LONG, sequence_id=7))
        alone = asyncio.create_task(ask(service, "double", LONG))
        await asyncio.to_thread(eventually, partial(service.ran, LONG, 2), "both run")
        service.kill(ENGINE)
        answer = await sequence
        assert (answer.status, "it belongs to a sequence" in str(answer.json())) == (503, True), answer
        assert decode(await alone).tolist() == [2 * LONG] * 4
        assert not service.ran(LONG, 4), "the sequence's request was sent again"


async def test_an_engine_that_stands_still_is_not_ready_until_it_goes_on(folder: Path) -> None:
    """SIGSTOP of the engine: readiness turns false, and requests wait. SIGCONT: they are answered, with no restart."""
    with running(folder) as service:
        assert await ready(service)
        service.signal(ENGINE, signal.SIGSTOP)
        try:
            waiting = [asyncio.create_task(ask(service, model, 7)) for model in MODELS]
            await becomes(lambda: ready(service), False)
            assert not any(task.done() for task in waiting)
        finally:
            service.signal(ENGINE, signal.SIGCONT)
        for (model, factor), answer in zip(MODELS.items(), await asyncio.gather(*waiting), strict=True):
            assert decode(answer).tolist() == [7 * factor] * 4, (model, answer)
        await becomes(lambda: ready(service), True)
        assert not service.ends


async def test_a_worker_that_stands_still_is_nobody_elses_matter(folder: Path, say: Say) -> None:
    """SIGSTOP of a worker: the clients of the others are answered, hundreds of times. SIGCONT: so are its own."""
    with running(folder) as service:
        async with load(service) as tally:
            await tally.turn()
            service.signal("worker-0", signal.SIGSTOP)
            try:
                enough = tally.answered.total() + 300
                await becomes(lambda: _true(tally.answered.total() >= enough), True)
                assert not tally.failures
            finally:
                service.signal("worker-0", signal.SIGCONT)
            await tally.turn()
        say(f"a worker stopped for a while: {tally}")
        assert (dict(tally.failures), tally.cut, service.ends) == ({}, 0, [])


async def test_a_batch_that_never_returns_ends_the_engine_with_71(folder: Path, say: Say) -> None:
    """The watchdog ends a stuck engine; its successor answers everybody else, and the third whoever was stuck twice."""
    with running(folder, MILLRACE_STUCK_AFTER="1.5") as service:
        async with load(service, clients=8, models=("risky", "same")) as tally:
            await tally.turn()
            answer = await ask(service, "risky", ENDLESS)
            assert (answer.status, TWICE in str(answer.json())) == (500, True), answer
            await service.becomes_whole()
            await tally.turn()
        say(f"stuck: {tally}")
        assert (dict(tally.failures), tally.cut) == ({}, 0)
        assert [(end.place, end.code) for end in service.ends] == [(ENGINE, Exit.STUCK)] * 2


async def becomes(condition: Callable[[], Awaitable[bool]], value: bool) -> None:
    limit = time.monotonic() + PATIENCE
    while await condition() is not value:
        assert time.monotonic() < limit, f"not {value} within {PATIENCE:g} s"
        await asyncio.sleep(0.05)


async def _true(value: bool) -> bool:
    return value
