"""The pictures of a simulation's results, as PNG. The colours are Okabe and Ito's: the colour-blind can tell them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from .lane import Outcome
from .policies import POLICIES

# The outcomes by policy and load.
Curves = Mapping[str, Mapping[float, Outcome]]


class Stroke(NamedTuple):
    color: str
    marker: str
    line: str = "-"


STROKES = {
    "ours": Stroke("#D55E00", "o"),
    "ours-fair": Stroke("#0072B2", "o"),
    "enqueue": Stroke("#0072B2", "s"),
    "enqueue-tuned": Stroke("#0072B2", "D", "--"),
    "dequeue": Stroke("#009E73", "^"),
    "poll": Stroke("#CC79A7", "v"),
    "ahead": Stroke("#56B4E9", "P"),
    "far-ahead": Stroke("#E69F00", "X"),
}
TEXT = 12  # points
DPI = 110


def latency(curves: Curves, arrivals: str, path: Path) -> None:
    """Mean, p99 and utilisation against load."""
    figure, (means, tails, busy) = _figure(15, 5.6, 3)
    _lines(means, curves, lambda each: each.mean * 1e3)
    _lines(tails, curves, lambda each: each.p99 * 1e3)
    _lines(busy, curves, lambda each: each.utilisation)
    for axes, title in ((means, "mean latency, ms"), (tails, "p99 latency, ms")):
        axes.set_title(title)
        _logarithmic(axes)
    busy.set_title("lane busy, share of the time")
    busy.yaxis.set_major_formatter(PercentFormatter(1))
    busy.set_ylim(0, 1.04)
    _finish(figure, f"{arrivals.capitalize()} arrivals: latency by load", path)


def goodput(panels: Mapping[str, Curves], share: Callable[[Outcome], float], path: Path) -> None:
    """The share of the capacity that went into answers in time, against load; one panel for each kind of deadlines."""
    figure, all_axes = _figure(13, 6, len(panels))
    for axes, (deadlines, curves) in zip(all_axes, panels.items(), strict=True):
        _lines(axes, curves, share)
        axes.set_title(f"deadlines of {deadlines}")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(0, 1.06)
    all_axes[0].set_ylabel("answers in time, of capacity", fontsize=TEXT)
    _finish(figure, "Goodput under overload", path)


def fairness(curves: Curves, jain: Callable[[Outcome], float], path: Path) -> None:
    """Jain's index, and what was answered of the small clients' requests, by load; bars."""
    figure, (index, small) = _figure(15, 5.2, 2)
    _bars(index, curves, jain, "{:.2f}")
    index.set_title("Jain's index of answers / fair share")
    _bars(small, curves, lambda each: sum(each.served[1:]) / sum(each.demand[1:]), "{:.0%}")
    small.set_title("answered, of what the nine small clients asked for")
    small.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(figure, "Ten clients, one of which sends 90 % of all requests", path)


def _figure(width: float, height: float, panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.tick_params(labelsize=TEXT)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("load, of capacity", fontsize=TEXT)
        axes.title.set_fontsize(TEXT + 1)
    return figure, list(all_axes)


def _lines(axes: Axes, curves: Curves, value: Callable[[Outcome], float]) -> None:
    for name, outcomes in curves.items():
        stroke = STROKES[name]
        axes.plot(
            list(outcomes),
            [value(each) for each in outcomes.values()],
            color=stroke.color,
            marker=stroke.marker,
            linestyle=stroke.line,
            linewidth=3 if name == "ours" else 1.6,
            markersize=6,
            zorder=3 if name == "ours" else 2,
            label=POLICIES[name].label,
        )
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _bars(axes: Axes, curves: Curves, value: Callable[[Outcome], float], form: str) -> None:
    width = 0.8 / len(curves)
    for number, (name, outcomes) in enumerate(curves.items()):
        places = [index + (number - (len(curves) - 1) / 2) * width for index in range(len(outcomes))]
        bars = axes.bar(
            places,
            [value(each) for each in outcomes.values()],
            width=width * 0.94,
            color=STROKES[name].color,
            label=POLICIES[name].label,
        )
        axes.bar_label(bars, fmt=form, fontsize=TEXT - 1, padding=2)
    loads = list(next(iter(curves.values())))
    axes.set_xticks(range(len(loads)), [f"{load:.0%}" for load in loads])
    axes.set_ylim(0, 1.1)


def _logarithmic(axes: Axes) -> None:
    """With plain numbers, the more of them the fewer decades there are."""
    low, high = axes.get_ylim()
    axes.set_yscale("log", subs=[1.5, 2, 3, 5, 7] if high < 20 * low else [2, 5])
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    axes.tick_params(which="minor", labelsize=TEXT)
    axes.grid(axis="y", which="minor", color="0.94")


def _finish(figure: Figure, title: str, path: Path) -> None:
    """Add title and legend, and write the file; its bytes depend on nothing but the results and the library."""
    figure.suptitle(title, fontsize=TEXT + 3, fontweight="bold")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=TEXT)
    figure.savefig(path, metadata={"Software": None})
