"""The watchdog: ends a process that is of no use any more, with the code that says why; and no other."""

import asyncio
import faulthandler
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import numpy as np
import pytest

from engine import watchdog
from engine.errors import DeviceLost
from engine.options import Exit
from engine.types import Array, InferRequest
from engine.watchdog import Watchdog, leave_stuck_models
from tests.conftest import StartLocal
from tests.scripted import Gate, Scripted, double


class Ended(BaseException):
    """In the place of the process's end; the argument is the exit code."""


class Patient:
    """An engine as the watchdog sees it."""

    def __init__(self, live: bool = True, lost: str = "") -> None:
        self.looks = 0
        self._live = live
        self._lost = lost

    def live(self) -> bool:
        return self._live

    def lost(self) -> str:
        self.looks += 1
        return self._lost


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """`end` raises Ended, looks follow each other at once, and faulthandler is left alone."""

    def end(code: int) -> NoReturn:
        raise Ended(code)

    monkeypatch.setattr(watchdog, "end", end)
    monkeypatch.setattr(watchdog, "INTERVAL", 0.0)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda *_, **__: None)


async def test_a_stuck_batch_ends_the_process(ended: None, caplog: pytest.LogCaptureFixture) -> None:
    """With 71, and the log says how long it is too long."""
    with pytest.raises(Ended, match="^71$"):
        Watchdog(Patient(live=False), 60)
    assert "more than 60 s" in caplog.text


async def test_a_lost_device_ends_the_process_at_the_second_look(ended: None, caplog: pytest.LogCaptureFixture) -> None:
    """With 70, although it is not live either; what waited had an interval to be told, and the reason is in the log."""
    dog = Watchdog(Patient(live=False, lost="cuda:0 fell off the bus"), 60)
    assert "exit code 70: cuda:0 fell off the bus" in caplog.text
    with pytest.raises(Ended, match="^70$"):
        dog._look()
    dog.stop()


async def test_a_healthy_engine_is_looked_at_again_and_again(ended: None) -> None:
    """Until the watch is stopped."""
    patient = Patient()
    dog = Watchdog(patient, 60)
    async with asyncio.timeout(10):
        while patient.looks < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
    dog.stop()
    seen = patient.looks
    for _ in range(10):
        await asyncio.sleep(0)
    assert patient.looks == seen


LOOP_THAT_NEVER_RETURNS = """
import asyncio, re
from engine import watchdog
watchdog.INTERVAL = 0.05

class Healthy:
    def live(self): return True
    def lost(self): return ""

async def main():
    dog = watchdog.Watchdog(Healthy(), 0.2)
    await asyncio.sleep(0.5)  # longer than both: it is armed anew in time
    print("it has had its time", flush=True)
    {then}

asyncio.run(main())
"""


def run_loop(then: str) -> subprocess.CompletedProcess[str]:
    code = LOOP_THAT_NEVER_RETURNS.format(then=then)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_a_loop_that_never_returns_ends_the_process() -> None:
    """Although it holds the interpreter lock; the trace says where it was."""
    ended = run_loop("re.match('(a+)+$', 'a' * 60 + 'b')")
    assert ended.returncode == 1
    assert ended.stdout == "it has had its time\n"
    assert "Timeout" in ended.stderr
    assert "in main" in ended.stderr


def test_a_stopped_watchdog_ends_nothing() -> None:
    """Not even a process whose loop is blocked for longer than it would have allowed."""
    ended = run_loop("dog.stop(); import time; time.sleep(1)")
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def lane_thread() -> Iterator[Callable[[], None]]:
    """start(): a lane's thread whose model does not return before the test ends."""
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="lane-test", daemon=True)
    yield thread.start
    release.set()
    thread.join()


def test_a_model_that_never_returns_is_left_behind(ended: None, lane_thread: Callable[[], None]) -> None:
    """The process ends there and then, with 4; without such a model it goes on to its end."""
    leave_stuck_models()
    lane_thread()
    with pytest.raises(Ended, match="^4$"):
        leave_stuck_models()


def test_exit_codes_are_those_of_the_documentation() -> None:
    """They are in people's supervisor configurations."""
    assert {code.name: int(code) for code in Exit} == {
        "STOPPED": 0, "USAGE": 2, "CANNOT_START": 3, "STUCK_AT_STOP": 4, "DEVICE_LOST": 70, "STUCK": 71,
    }  # fmt: skip


async def test_it_tells_a_lost_engine_from_a_stuck_one(
    ended: None, local_engine: StartLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose device is lost is neither live nor stuck: 70 and not 71; one whose batch never ends is 71."""
    monkeypatch.setattr(watchdog, "INTERVAL", 3600.0)  # the test looks itself

    def lose(inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise DeviceLost("cuda:0 is lost")

    engine = await local_engine({"stuck_after": 0.01, "inline_ms": 0}, m=double)
    dog = Watchdog(engine, 60)
    gate = Scripted.behaviours["m"] = Gate()
    gate.open.clear()
    asking = asyncio.create_task(engine.infer(InferRequest("m", "", {"x": np.ones((1, 4), "<f4")})))
    async with asyncio.timeout(10):
        while engine.live():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert engine.lost() == ""
    with pytest.raises(Ended, match="^71$"):
        dog._look()
    gate.open.set()
    await asking
    dog._look()
    Scripted.behaviours["m"] = lose
    with pytest.raises(DeviceLost):
        await engine.infer(InferRequest("m", "", {"x": np.ones((1, 4), "<f4")}))
    assert engine.lost() == "cuda:0 is lost"
    dog._look()
    with pytest.raises(Ended, match="^70$"):
        dog._look()
    dog.stop()
