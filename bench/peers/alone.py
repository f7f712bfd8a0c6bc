"""The ceiling: the model in a loop, with no server around it, at the size of batch that does most.

    python -m bench.peers.alone MODEL      then, for each line with a number of seconds, a line with rows a second

The rows are those that the servers are asked. Of mixed lengths the likest go together, so that little is padding: a
queue can hardly do better.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..servers import ROOT, BenchError, die_with_parent
from .models import MODELS, Predictor, Row, make_rows
from .peers import ENVIRONMENT

TRIAL = 0.4  # seconds for each size


def batches(name: str, predictor: Predictor, size: int) -> list[Row]:
    """All rows in batches of a size; of mixed lengths from the shortest to the longest."""
    rows = make_rows(name)
    rows = rows * (-(-size // len(rows)))
    if predictor.model.dims == (-1,):
        rows.sort(key=len)
    return [predictor.stack(rows[start : start + size]) for start in range(0, len(rows), size)]


def rate(predictor: Predictor, work: list[Row], seconds: float) -> float:
    """Rows a second; it always ends with the last batch."""
    rows, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for batch in work:
            predictor.run(batch)
            rows += len(batch)
    return rows / (time.perf_counter() - began)


class Alone:
    """The process that runs the loop, and else waits. `size` is that of its batches."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.size = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("the model alone does not run")
        return line

    def run(self, seconds: float) -> float:
        """Rows a second."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        return float(self._line())


@contextmanager
def alone(name: str) -> Iterator[Alone]:
    """Start the process."""
    command = [sys.executable, "-m", "bench.peers.alone", name]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=die_with_parent,
    )  # fmt: skip
    try:
        yield Alone(process)
    finally:
        process.kill()
        process.communicate()


def main(name: str) -> int:
    predictor = Predictor(name)
    sizes = [1 << power for power in range(MODELS[name].max_rows.bit_length())]
    work = {size: batches(name, predictor, size) for size in sizes}
    for size in sizes:
        rate(predictor, work[size], TRIAL / 4)
    best = max(sizes, key=lambda size: rate(predictor, work[size], TRIAL))
    print(best, flush=True)
    for line in sys.stdin:
        print(rate(predictor, work[best], float(line)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
