"""The measurements: every peer with one model at a time, all up at once, loaded in turn, round after round."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..report import progress
from ..servers import BenchError
from .alone import Alone, alone
from .dialects import JSON
from .models import MODELS
from .peers import CONSTANT
from .results import Cell, Results
from .targets import Target, run_load, serving
from .wrk import run_wrk, write_script

ALONE = "the model alone"
IDLE = 5.0  # seconds for which all are up and nobody asks
BUSY = 2  # of the largest batches: as many requests under way fill a server, while its capacity is measured
POOL = 256  # connections of an open loop: four of mlp's largest batches
POISONED_SHARE = 0.01  # of the requests
LEAVING_SHARE = 0.1  # of the clients
FAULTY = 0.5  # of the capacity, offered meanwhile; and without them, to compare with


class Extent(NamedTuple):
    """How much is measured with a model.

    Attributes:
        seconds: of each load.
        connections: of the closed loops.
        shares: of its own capacity, that each peer is offered in the open loops.
        faults: whether also with poisoned requests, and with clients that leave; FAULTY is among the shares then.
    """

    rounds: int
    seconds: int
    connections: Sequence[int]
    shares: Sequence[float]
    faults: bool


Measure = Callable[[Target], dict[str, float]]


class Survey:
    """The peers with one model. Whoever fails is dropped, with the reason, and the others go on."""

    def __init__(self, model: str, extent: Extent, results: Results) -> None:
        self._model, self._extent, self._results = model, extent, results
        self._targets: list[Target] = []
        self._scripts: dict[str, Path] = {}

    def run(self, peers: Sequence[str]) -> None:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
            for name in peers:
                self._start(stack, folder / name, name)
            self._watch_idle()
            for target in self._targets:
                target.family.freeze()
            progress(f"{self._model}: looking for the best batch size of the model alone")
            ceiling = stack.enter_context(alone(self._model))
            for number in range(self._extent.rounds):
                self._round(number, ceiling)

    def _start(self, stack: ExitStack, folder: Path, name: str) -> None:
        progress(f"{self._model}: starting {name}")
        folder.mkdir()
        try:
            target = stack.enter_context(serving(name, self._model, folder))
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            self._results.drop(name, self._model, f"does not serve: {error}")
            return
        self._targets.append(target)
        (folder / "load").mkdir()
        bodies = target.bodies if self._model == "encoder" else target.bodies[:1]
        self._scripts[name] = write_script(folder / "load", bodies, JSON)

    def _watch_idle(self) -> None:
        """What each takes while nobody asks: percent of a core, MiB."""
        progress(f"{self._model}: {IDLE:g} s without a request")
        time.sleep(2)  # the checks of the start are over
        before = {target.name: target.family.cpu_seconds() for target in self._targets}
        time.sleep(IDLE)
        for target in self._targets:
            used = target.family.cpu_seconds() - before[target.name]
            self._add("idle", target.name, 0, 0, {"cpu": used / IDLE * 100, "memory": target.family.resident()})

    def _round(self, number: int, ceiling: Alone) -> None:
        extent = self._extent
        self._add("ceiling", ALONE, 0, number, {"rate": ceiling.run(extent.seconds), "rows": ceiling.size})
        for connections in extent.connections:
            self._turns("closed", connections, number, self._closed(connections))
        if extent.shares:
            self._turns("capacity", 0, number, self._capacity)
        for share in extent.shares:
            self._turns("open", share, number, self._open(number, share))
        if extent.faults:
            poisoned = self._open(number, FAULTY, poisoned_share=POISONED_SHARE)
            leaving = self._open(number, FAULTY, leaving_share=LEAVING_SHARE)
            self._turns("poisoned", POISONED_SHARE, number, poisoned)
            self._turns("leaving", LEAVING_SHARE, number, leaving)

    def _closed(self, connections: int) -> Measure:
        return lambda target: run_wrk(
            target.family, target.url, self._scripts[target.name], connections, self._extent.seconds
        )

    def _capacity(self, target: Target) -> dict[str, float]:
        """A closed loop by our generator, which takes its part of the machine as it does in the open loops."""
        return run_load(target, target.plan(0, BUSY * MODELS[self._model].max_rows, self._extent.seconds))

    def _open(self, number: int, share: float, **more: float) -> Measure:
        def measure(target: Target) -> dict[str, float]:
            capacity = self._results.rounds("capacity", self._model, target.name, 0, "rate")[number]
            plan = target.plan(capacity * share, POOL, self._extent.seconds, seed=number, **more)
            return run_load(target, plan)

        return measure

    def _turns(self, experiment: str, load: float, number: int, measure: Measure) -> None:
        """Each peer in turn; the constant has no model, and so no capacity worth a share."""
        for target in list(self._targets):
            if target.name == CONSTANT and experiment != "closed":
                continue
            progress(
                f"{self._model}, round {number + 1} of {self._extent.rounds}, {experiment} {load:g}: {target.name}"
            )
            try:
                with target.family.awake():
                    figures = measure(target)
            except (BenchError, OSError, subprocess.SubprocessError) as error:
                self._targets.remove(target)
                self._results.drop(target.name, self._model, f"{experiment} {load:g}: {error}")
            else:
                self._add(experiment, target.name, load, number, figures)

    def _add(self, experiment: str, peer: str, load: float, number: int, figures: dict[str, float]) -> None:
        self._results.cells.append(Cell(experiment, self._model, peer, load, number, figures))
