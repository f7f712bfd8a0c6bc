"""What was measured, as a flat list of cells: written once, looked up by every table and picture."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple


class Cell(NamedTuple):
    """One load of one server.

    Attributes:
        load: connections in a closed loop, a share of the capacity in an open one; 0 where there is none.
        figures: by name, in the units that whoever measured them says.
    """

    experiment: str
    model: str
    peer: str
    load: float
    round: int
    figures: dict[str, float]


class Failure(NamedTuple):
    """A peer that could not be measured with a model, and why."""

    peer: str
    model: str
    reason: str


@dataclass
class Results:
    """Attributes:
    heading: command, date, machine and versions, as the report shows them.
    versions: by peer.
    """

    heading: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def drop(self, peer: str, model: str, reason: str) -> None:
        """Forget the cells of a peer that failed, since half of them would compare with nothing."""
        self.failures.append(Failure(peer, model, reason))
        self.cells = [cell for cell in self.cells if (cell.peer, cell.model) != (peer, model)]

    def rounds(self, experiment: str, model: str, peer: str, load: float, figure: str) -> dict[int, float]:
        """A figure by round; empty if it was not measured."""
        key = (experiment, model, peer, load)
        return {cell.round: cell.figures[figure] for cell in self.cells if cell[:4] == key and figure in cell.figures}

    def values(self, experiment: str, model: str, peer: str, load: float, figure: str) -> list[float]:
        return list(self.rounds(experiment, model, peer, load, figure).values())

    def peers(self, experiment: str, model: str) -> list[str]:
        """Those measured, in the order in which they were."""
        return _unique(cell.peer for cell in self.cells if (cell.experiment, cell.model) == (experiment, model))

    def loads(self, experiment: str, model: str) -> list[float]:
        return sorted({cell.load for cell in self.cells if (cell.experiment, cell.model) == (experiment, model)})

    def models(self, experiment: str) -> list[str]:
        return _unique(cell.model for cell in self.cells if cell.experiment == experiment)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=None, separators=(",", ":")) + "\n")


def read_results(path: Path) -> Results:
    raw = json.loads(path.read_text())
    raw["cells"] = [Cell(*cell) for cell in raw["cells"]]
    raw["failures"] = [Failure(*failure) for failure in raw["failures"]]
    return Results(**raw)


def ratios(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Ours divided by theirs, for each round that has both: what drifts from round to round drops out."""
    return [ours[number] / theirs[number] for number in ours if theirs.get(number)]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
