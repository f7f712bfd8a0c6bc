"""The report as Markdown: what was wanted, then a table for each experiment, then who could not be measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..report import table
from . import restart, wanted
from .peers import PEERS
from .results import Results
from .survey import FAULTY, LEAVING_SHARE, POISONED_SHARE
from .wanted import cell

INTRODUCTION = """\
# Millrace and its peers

Each server serves the same models with the same weights, gives the same numbers (checked before the loads, and in
each open loop), and is loaded by one driver, on one machine, in turn: `make bench-peers` makes this page. A shared
machine with two cores, on which the load takes its part, is no place for absolute figures: read the ratios, and the
spreads beside them.
"""
METHOD = """\
## How it was measured

- All servers of a model are up at once, and all but the one that is asked are frozen (SIGSTOP): idle polling disturbs
  nobody. They are asked in turn, cell by cell and round by round, so that drift hits all alike. A cell is the median
  over the rounds, with the smallest and the largest; a ratio is taken within a round.
- Every server is in an environment of its own, has one copy of the model, one thread for torch, and its own dynamic
  batching with the same largest batch (mlp 64, resnet 32, encoder 8), and gets one row per request as JSON.
- mlp: 64, 256, 10 numbers. resnet: ResNet-18's layers on 3 x 64 x 64 (at 224 x 224 a picture takes a core forty
  milliseconds: too few answers for a p99). encoder: MiniLM's layers on 8 to 128 token ids. Random weights, one seed.
- Closed loop: wrk, one thread. Open loop: Poisson arrivals from a process of its own, latency from when a request was
  due. What each is offered is a share of its own capacity, which that process measured just before, with as
  many connections kept busy as fill two of its largest batches.
- CPU is user and system time of all of a server's processes; memory is their proportional set size; p50, p99 and
  p99.9 are in ms.
"""


class Column(NamedTuple):
    title: str
    figure: str
    form: str


class Experiment(NamedTuple):
    """A table for each model.

    Attributes:
        loads, load: title and format of the column that says the load; empty where there is none.
    """

    title: str
    loads: str
    load: str
    columns: Sequence[Column]


LATENCIES = (Column("p50", "p50", ",.2f"), Column("p99", "p99", ",.2f"), Column("p99.9", "p99.9", ",.2f"))
RATE = Column("good answers/s", "rate", ",.0f")
EXPERIMENTS: Mapping[str, Experiment] = {
    "closed": Experiment(
        "Closed loop", "connections", "{:g}",
        (RATE, *LATENCIES, Column("CPU us/request", "cpu", ",.1f"), Column("refused", "refused", ",.0f")),
    ),
    "open": Experiment(
        "Open loop", "of its capacity", "{:.0%}",
        (Column("offered/s", "offered", ",.0f"), RATE, *LATENCIES, Column("lost", "lost", ",.0f")),
    ),
    "large": Experiment(
        "600 KB", "connections", "{:g}",
        (Column("GB/s", "gigabytes", ".2f"), RATE, *LATENCIES, Column("CPU us/request", "cpu", ",.0f")),
    ),
    "idle": Experiment(
        "Without a request", "", "", (Column("memory MiB", "memory", ",.0f"), Column("CPU %", "cpu", ".2f"))
    ),
}  # fmt: skip
LONGEST = 400  # characters of a reason

# What they have in common is told once, in METHOD.
FAULTS = """\
Half of its own capacity is offered; of each hundred requests one is poisoned (it has 63 numbers instead of 64), or of
each ten clients one leaves a millisecond after it asked. Lost are good requests that did not get their answer.
"""
RESTART = f"""\
{restart.RATE:g} requests a second to mlp, the same for all, before, meanwhile and after. Lost are those that were not
answered with 200.
"""


def render(results: Results, pictures: Mapping[str, str]) -> str:
    """The page.

    Args:
        pictures: by model, the path of each that was drawn, from where the page will be.
    """
    return "\n\n".join(part.strip() for part in _parts(results, pictures))


def _parts(results: Results, pictures: Mapping[str, str]) -> Iterator[str]:
    yield INTRODUCTION
    yield results.heading
    yield "## What was wanted, and what was measured"
    yield wanted.render(results)
    yield METHOD
    yield _settings(results)
    for model in results.models("idle"):
        yield f"## {model}"
        if model in pictures:
            yield f"![{model}: throughput and p99 of Millrace and its peers]({pictures[model]})"
        yield from _model(results, model)
    if results.models("poisoned"):
        yield "## Poisoned requests, and clients who leave"
        yield FAULTS
        yield _faults(results, "mlp")
    if results.models("restart"):
        yield "## A restart under load"
        yield RESTART
        yield _restarts(results)
    if results.models("large"):
        yield "## 600 KB there and back, as bytes"
        yield "The same python model in both answers with what it was asked; counted are the bytes of both directions."
        yield _cells(results, "large", "large", EXPERIMENTS["large"])
    if results.failures:
        yield "## Who could not be measured"
        rows = [[label(each.peer), each.model or "all", _one_line(each.reason)] for each in results.failures]
        yield table(["server", "with", "why"], rows, 3)


def _settings(results: Results) -> str:
    rows = [[label(name), version, PEERS[name].settings] for name, version in results.versions.items()]
    return table(["server", "version", "settings"], rows, 3)


def _model(results: Results, model: str) -> Iterator[str]:
    for name in results.peers("ceiling", model):
        rows, rates = (results.values("ceiling", model, name, 0, figure) for figure in ("rows", "rate"))
        yield f"The model alone, in batches of {rows[0]:g}: {cell(rates, ',.0f')} rows/s."
    for name, experiment in EXPERIMENTS.items():
        if results.peers(name, model):
            yield f"{experiment.title}:"
            yield _cells(results, model, name, experiment)


def _cells(results: Results, model: str, name: str, experiment: Experiment) -> str:
    rows = []
    for load in results.loads(name, model):
        for peer in results.peers(name, model):
            figures = [results.values(name, model, peer, load, column.figure) for column in experiment.columns]
            if figures[0]:
                shown = [cell(values, each.form) for values, each in zip(figures, experiment.columns, strict=True)]
                rows.append([*([experiment.load.format(load)] if experiment.load else []), label(peer), *shown])
    header = [*([experiment.loads] if experiment.load else []), "server", *(each.title for each in experiment.columns)]
    return table(header, rows, len(header) - len(experiment.columns))


def _faults(results: Results, model: str) -> str:
    rows = []
    for peer in results.peers("poisoned", model):
        lost, sent = (results.values("poisoned", model, peer, POISONED_SHARE, figure) for figure in ("lost", "sent"))
        well = results.rounds("open", model, peer, FAULTY, "p99")
        leaving = results.rounds("leaving", model, peer, LEAVING_SHARE, "p99")
        share = sum(lost) / sum(sent)
        tails = [cell(list(each.values()), ",.2f") for each in (well, leaving)]
        rows.append([label(peer), f"{sum(sent):,.0f}", f"{sum(lost):,.0f}", f"{share:.1%}", *tails])
    header = ["server", "good requests beside poisoned", "lost", "share", "p99, all well", "p99, clients leaving"]
    return table(header, rows, 1)


def _restarts(results: Results) -> str:
    figures = (("took", ".1f"), ("sent", ",.0f"), ("lost", ",.0f"), ("p50", ",.1f"), ("p99", ",.1f"), ("p99.9", ",.1f"))
    rows = []
    for peer in results.peers("restart", restart.MODEL):
        shown = [cell(results.values("restart", restart.MODEL, peer, 0, figure), form) for figure, form in figures]
        rows.append([label(peer), restart.WAYS[peer].how, *shown])
    return table(["server", "how", "seconds", "good requests", "lost", "p50", "p99", "p99.9"], rows, 2)


def label(peer: str) -> str:
    return PEERS[peer].label if peer in PEERS else peer


def _one_line(text: str) -> str:
    """For a cell of a table; what a server printed may be long."""
    return " ".join(text.replace("|", "/").split())[:LONGEST]
