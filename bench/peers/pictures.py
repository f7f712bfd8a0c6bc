"""The report's pictures, as PNG. The colours are Okabe and Ito's: the colour-blind can tell them."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .peers import CONSTANT, MILLRACE, PEERS, TRITON
from .results import Results

TEXT = 12  # points
DPI = 110


class Stroke(NamedTuple):
    color: str
    marker: str
    line: str = "-"


STROKES = {
    MILLRACE: Stroke("#D55E00", "o"),
    TRITON: Stroke("#0072B2", "s"),
    "mosec": Stroke("#009E73", "^"),
    "litserve": Stroke("#CC79A7", "v"),
    "mlserver": Stroke("#56B4E9", "P"),
    "bentoml": Stroke("#E69F00", "X"),
    "ray": Stroke("#000000", "D"),
    CONSTANT: Stroke("#999999", ".", "--"),
}


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """One picture for each model that was loaded: throughput and p99 against connections, p99 against load."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {model: folder / f"peers-{model}.png" for model in results.models("closed")}
    for model, path in paths.items():
        _draw_model(results, model, path)
    return paths


def _draw_model(results: Results, model: str, path: Path) -> None:
    panels = (
        ("closed", "rate", "good answers a second", "connections"),
        ("closed", "p99", "p99, ms", "connections"),
        ("open", "p99", "p99, ms", "load, of its own capacity"),
    )
    shown = [panel for panel in panels if results.loads(panel[0], model)]
    figure = Figure(figsize=(5 * len(shown), 5.6), dpi=DPI, layout="constrained")
    for axes, (experiment, value, title, loads) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        _lines(axes, results, experiment, model, value)
        axes.set_title(title, fontsize=TEXT + 1)
        axes.set_xlabel(loads, fontsize=TEXT)
        _scale(axes, results.loads(experiment, model), percent=experiment == "open")
    figure.suptitle(f"{model}: Millrace and its peers", fontsize=TEXT + 3, fontweight="bold")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=TEXT)
    figure.savefig(path, metadata={"Software": None})


def _lines(axes: Axes, results: Results, experiment: str, model: str, value: str) -> None:
    """The medians; the rounds between the smallest and the largest as a bar on each."""
    for peer in results.peers(experiment, model):
        cells = {
            load: results.values(experiment, model, peer, load, value) for load in results.loads(experiment, model)
        }
        loads, rounds = list(cells), list(cells.values())
        middles = [statistics.median(values) for values in rounds]
        below = [middle - min(values) for middle, values in zip(middles, rounds, strict=True)]
        above = [max(values) - middle for middle, values in zip(middles, rounds, strict=True)]
        stroke, ours = STROKES[peer], peer == MILLRACE
        axes.errorbar(
            loads, middles, [below, above], color=stroke.color, marker=stroke.marker, linestyle=stroke.line,
            linewidth=3 if ours else 1.6, elinewidth=1, capsize=3, zorder=3 if ours else 2, label=PEERS[peer].label,
        )  # fmt: skip


def _scale(axes: Axes, loads: Sequence[float], percent: bool) -> None:
    """Both logarithmic but for shares, with plain numbers."""
    axes.set_yscale("log")
    if not percent:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(loads), [f"{load:.0%}" if percent else f"{load:g}" for load in loads])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.tick_params(labelsize=TEXT)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
