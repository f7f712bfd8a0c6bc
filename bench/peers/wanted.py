"""What was wanted of Millrace, one row each, and whether a run shows it."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..report import spread, table
from .peers import CONSTANT, MILLRACE, PEERS, TRITON
from .results import Results, ratios

FULL = 128  # connections: every server has as much to do as it can
FEW = 8
LOADED = 0.8  # of the capacity


class Wanted(NamedTuple):
    """Attributes:
    measured: the figure, round by round; empty if the run does not have it.
    bound: that its median must reach, from above or from below.
    """

    what: str
    measured: Callable[[Results], list[float]]
    bound: float
    at_least: bool
    form: str

    def render(self, results: Results) -> list[str]:
        values = self.measured(results)
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:g}"
        if not values:
            return [self.what, bound, "", "not measured"]
        return [self.what, bound, cell(values, self.form), "reached" if self.reached(values) else "**not reached**"]

    def reached(self, values: Sequence[float]) -> bool:
        median = statistics.median(values)
        return median >= self.bound if self.at_least else median <= self.bound


def _throughput(peer: str, connections: int, bound: float) -> Wanted:
    def measured(results: Results) -> list[float]:
        return _against(results, "closed", "mlp", connections, "rate", peer)

    return Wanted(f"mlp, {connections} connections: answers/s, of {PEERS[peer].label}'s", measured, bound, True, ".2f")


def _tail(peer: str) -> Wanted:
    def measured(results: Results) -> list[float]:
        return _against(results, "open", "mlp", LOADED, "p99", peer)

    what = f"mlp, each at {LOADED:.0%} of its own capacity: p99, of {PEERS[peer].label}'s"
    return Wanted(what, measured, 1, False, ".2f")


def _against(results: Results, experiment: str, model: str, load: float, figure: str, peer: str) -> list[float]:
    ours, theirs = (results.rounds(experiment, model, name, load, figure) for name in (MILLRACE, peer))
    return ratios(ours, theirs)


def _ceiling(model: str) -> Wanted:
    def measured(results: Results) -> list[float]:
        best: dict[int, float] = {}
        for load in results.loads("closed", model):
            for number, rate in results.rounds("closed", model, MILLRACE, load, "rate").items():
                best[number] = max(rate, best.get(number, 0))
        (name,) = results.peers("ceiling", model) or [""]
        return ratios(best, results.rounds("ceiling", model, name, 0, "rate"))

    return Wanted(f"{model}, at its best: answers/s, of the model alone", measured, 0.97, True, ".2f")


def _slowest(results: Results) -> list[float]:
    p99, p50 = (results.rounds("closed", "mlp", MILLRACE, FULL, figure) for figure in ("p99", "p50"))
    return ratios(p99, p50)


def _large(results: Results) -> list[float]:
    return [
        ratio
        for load in results.loads("large", "large")
        for ratio in _against(results, "large", "large", load, "gigabytes", TRITON)
    ]


def _idle(results: Results) -> list[float]:
    models = results.models("idle")
    return [value for model in models for value in results.values("idle", model, MILLRACE, 0, "cpu")]


WANTED = (
    _throughput(TRITON, FULL, 2.5),
    _throughput("mosec", FULL, 1.3),
    _throughput("litserve", FULL, 20),
    _throughput(TRITON, FEW, 1.5),
    _throughput("mosec", FEW, 5),
    _throughput(CONSTANT, FULL, 1),
    Wanted(
        f"mlp, {FULL} connections: server CPU for a request, us",
        lambda results: results.values("closed", "mlp", MILLRACE, FULL, "cpu"), 20, False, ".1f",
    ),
    Wanted(f"mlp, {FULL} connections: p99, of p50", _slowest, 2.5, False, ".2f"),
    _tail("mosec"),
    _tail(TRITON),
    _ceiling("resnet"),
    _ceiling("encoder"),
    Wanted("600 KB there and back: bytes/s, of Triton's", _large, 1, True, ".2f"),
    Wanted("idle: CPU, percent of a core", _idle, 0.5, False, ".2f"),
)  # fmt: skip


def cell(values: Sequence[float], form: str) -> str:
    """The median, and of several rounds the smallest and the largest too; nothing of none."""
    return spread(values, form) if len(values) > 1 else "".join(format(value, form) for value in values)


def render(results: Results) -> str:
    rows = [each.render(results) for each in WANTED]
    return table(["Millrace", "wanted", "measured", ""], rows, 4)
