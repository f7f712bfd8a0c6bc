"""Millrace and its peers, each serving the same models, through one driver: `python -m bench.peers`.

What is measured, and how, docs/benchmarks.md says, which this writes.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..report import heading, publish
from ..servers import BenchError, unwind_on_signals
from . import large, restart
from .models import MODELS
from .peers import CONSTANT, PEERS
from .pictures import draw
from .report import render
from .results import Results, read_results
from .survey import Extent, Survey

FULL = {
    "mlp": Extent(3, 2, (1, 8, 32, 128), (0.5, 0.8, 0.95), faults=True),
    "resnet": Extent(2, 3, (1, 8, 32, 128), (0.5, 0.8, 0.95), faults=False),
    "encoder": Extent(2, 3, (1, 8, 32, 128), (0.5, 0.8, 0.95), faults=False),
}
QUICK = {
    "mlp": Extent(1, 2, (8, 128), (0.5, 0.8), faults=True),
    "resnet": Extent(1, 2, (32,), (), faults=False),
    "encoder": Extent(1, 2, (32,), (), faults=False),
}
EXPERIMENTS = ("load", "large", "restart")


def install(names: Sequence[str], results: Results) -> list[str]:
    """Make every peer's environment; those that can be had, with their versions."""
    found = []
    for name in names:
        try:
            PEERS[name].install()
            results.versions[name] = PEERS[name].version()
            found.append(name)
        except BenchError as error:
            results.drop(name, "", f"cannot be installed: {error}")
    return found


def report(results: Results, output: Path | None, pictures: Path | None) -> None:
    """Print it, and write and draw what is asked for."""
    drawn = draw(results, pictures) if pictures else {}
    page = output.parent if output else Path()
    publish(render(results, {model: os.path.relpath(path, page) for model, path in drawn.items()}), output)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, metavar="EXPERIMENT",
                        help=", ".join(EXPERIMENTS))  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one round of short loads: eight minutes, not forty")
    parser.add_argument("--rounds", type=int, help="of all loads")
    parser.add_argument("--seconds", type=int, help="of each load")
    parser.add_argument("--raw", type=Path, help="write every figure to this file, as JSON")
    parser.add_argument("--render", type=Path, help="measure nothing: render such a file again")
    parser.add_argument("--output", type=Path, help="write the report to this file")
    parser.add_argument("--pictures", type=Path, help="draw pictures into this folder")
    options = parser.parse_args(arguments)
    if options.render:
        report(read_results(options.render), options.output, options.pictures)
        return 0
    if shutil.which("wrk") is None:
        print("bench.peers needs wrk: apt install wrk", file=sys.stderr)
        return 1
    unwind_on_signals()
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False).stdout.split(" [")[0]
    results = Results(heading=heading("bench.peers", arguments, wrk))
    peers = install(options.peers, results)
    changed = {name: value for name in ("rounds", "seconds") if (value := getattr(options, name))}
    extents = {name: extent._replace(**changed) for name, extent in (QUICK if options.quick else FULL).items()}
    if "load" in options.experiments:
        for model in options.models:
            Survey(model, extents[model], results).run([name for name in peers if name != CONSTANT or model == "mlp"])
    if "large" in options.experiments:
        large.survey(peers, extents["mlp"].rounds, extents["mlp"].seconds, results)
    if "restart" in options.experiments and not options.quick:
        restart.survey(peers, results)
    if options.raw:
        results.write(options.raw)
    report(results, options.output, options.pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
