"""What a measurement prints: where it was made, a Markdown table, and progress on stderr."""

import datetime as dt
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("uvicorn", "uvloop", "httptools", "torch", "numpy", "orjson")


def heading(module: str, arguments: Sequence[str], *versions: str) -> str:
    """Command, date, machine and versions as a Markdown list."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return "\n".join(
        [
            f"- Command: `{shlex.join(['python', '-m', module, *arguments])}`",
            f"- Date: {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC",
            f"- Machine: {model[1] if model else platform.machine()}, {cores} cores, {memory:.0f} GiB, "
            f"{platform.system()} {platform.release()}, loopback",
            f"- Versions: {', '.join([f'Python {platform.python_version()}', *packages, *versions])}",
        ]
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """A Markdown table; columns after the first `text_columns` are numbers."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def spread(values: Sequence[float], form: str) -> str:
    """The median and, in brackets, the smallest and the largest."""
    low, middle, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def progress(text: str) -> None:
    """Say on stderr what is going on: on a terminal in one line that is written over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def publish(text: str, output: Path | None) -> None:
    """Print the result, and write it to `output` too."""
    if sys.stderr.isatty():
        progress("")
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
