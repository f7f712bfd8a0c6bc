"""What all processes of a service count, told by each of them: /metrics behind a socket that several share.

Each process writes its counts to a file of its own, once a second, and tells the sum of all files. Prometheus takes a
counter that goes back for one that began again at 0, and adds all of it once more; so nothing here ever goes back:

- What is told is what was written, also of one's own. A process that is killed takes no count along that was told.
- Counters of processes that have ended are added to one more file, which names them. Whoever reads the files of
  processes first and that one last counts each process once, without a lock, wherever its file is by then.
- What a counter had when it began again, or vanished, with a model that was loaded anew, stays in the sum.

One engine in each process, on one machine (one pid namespace): whether a process lives is read in /proc.
Standard library only.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .errors import ConfigError

# Seconds between two writes.
INTERVAL = 1.0

# Families of these types go on when a process ends; what others say is over with it.
LASTING = frozenset({"counter", "histogram"})

# Gauges of which the sum says nothing: the greatest is told.
GREATEST = frozenset({"nv_model_load_duration_secs"})

logger = logging.getLogger("millrace")


# Counts as text and as numbers.


@dataclass(slots=True)
class Family:
    """The samples of one metric, by their names with labels. `help` is the whole line, empty if there is none."""

    kind: str
    help: str
    samples: dict[str, float]


Families = dict[str, Family]

_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*"'
_SERIES = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{((?:{_LABEL},?)*)\}})?")
_LABELS = re.compile(_LABEL)


@lru_cache(1 << 16)  # the same series come every second
def _in_order(series: str) -> str:
    """The series with its labels in order, in which it is the same for everybody.

    Raises:
        ValueError: it is none.
    """
    found = _SERIES.fullmatch(series)
    if found is None:
        raise ValueError(f"not a sample: {series[:80]!r}")
    labels = ",".join(sorted(_LABELS.findall(found[2] or "")))
    return f"{found[1]}{{{labels}}}" if labels else found[1]


def parse(text: str) -> Families:
    """Read Prometheus' text format, without timestamps, in which a family's TYPE comes before its samples.

    Raises:
        ValueError: it is not such a text.
    """
    families: Families = {}
    helps: dict[str, str] = {}
    samples: dict[str, float] | None = None
    for line in text.split("\n"):  # not splitlines: labels may hold what it takes for the end of a line
        if line.startswith("#"):
            match line.split(" ", 3):
                case ["#", "HELP", name, *_]:
                    helps[name] = line
                case ["#", "TYPE", name, kind]:
                    samples = families.setdefault(name, Family(kind, helps.get(name, ""), {})).samples
        elif line:
            series, _, value = line.rpartition(" ")
            if samples is None:
                raise ValueError(f"a sample without a type: {line[:80]!r}")
            samples[_in_order(series)] = float(value)
    return families


def add(total: Families, other: Families, ended: bool = False) -> None:
    """Add `other` to `total`, sample by sample; what is new there comes after what is known.

    Of a process that has `ended`, only what lasts. A family that has another type in `total` is left out: it can be
    told with one type alone.
    """
    for name, family in other.items():
        if ended and family.kind not in LASTING:
            continue
        if name not in total:
            total[name] = Family(family.kind, family.help, dict(family.samples))
        elif total[name].kind == family.kind:
            samples = total[name].samples
            for series, value in family.samples.items():
                known = samples.get(series)
                if known is not None:
                    value = max(known, value) if name in GREATEST else known + value
                samples[series] = value


def carry(lost: Families, before: Families, now: Families) -> None:
    """Add to `lost` what those counters and histograms of a process had that are less `now`, or gone."""
    for name, family in before.items():
        if family.kind not in LASTING:
            continue
        samples = now[name].samples if name in now and now[name].kind == family.kind else {}
        sums = f"{name}_sum" if family.kind == "histogram" else None  # may go back: what is observed may be negative
        again = {
            _whole(family.kind, series)
            for series, value in family.samples.items()
            if series not in samples or (samples[series] < value and series.partition("{")[0] != sums)
        }
        if again:
            had = {series: value for series, value in family.samples.items() if _whole(family.kind, series) in again}
            add(lost, {name: Family(family.kind, family.help, had)})


def _whole(kind: str, series: str) -> object:
    """What begins again at once: a counter by itself, a histogram with all its buckets."""
    return series if kind == "counter" else tuple(x for x in _LABELS.findall(series) if not x.startswith("le="))


def render(families: Families) -> str:
    """Prometheus' text; a family without samples has its TYPE all the same, as in a text of `engine.metrics`."""
    lines: list[str] = []
    for name, family in families.items():
        lines += [family.help] if family.help else []
        lines.append(f"# TYPE {name} {family.kind}")
        lines += [f"{series} {_number(value)}" for series, value in family.samples.items()]
    return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 2**53 else repr(value)


# Counts in files.


# The last line of every file: without it something cut the file off.
_END = "# EOF\n"

# In the file of those that have ended, before the name of each. Those before the last KEPT are forgotten: a scrape that
# has read the file of a process reads this one milliseconds later.
_ENDED = "# ENDED "
KEPT = 256

_PROCESS = re.compile(r"(\d+)-(\d+)")


def started_at(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None if none of that id runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # the name before may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def lives(process: str) -> bool:
    """Whether the process of that name, `pid-ticks`, runs: not another one that was given its id."""
    pid, _, ticks = process.partition("-")
    return started_at(int(pid)) == int(ticks)


class Folder:
    """The files of a service's processes, as one of them sees them. Any thread may call anything; all of it blocks."""

    def __init__(self, path: Path, pid: int | None = None) -> None:
        """Make the folder if it is not there. `pid`: of the process, if it is not this one.

        Raises:
            OSError: it cannot be made, or there is no /proc.
        """
        self._path = path
        pid = pid or os.getpid()
        ticks = started_at(pid)
        if ticks is None:
            raise ProcessLookupError(f"/proc does not tell when process {pid} was started")
        self.own = f"{pid}-{ticks}"
        self._ended = path / "ended.prom"
        self._warned: set[str] = set()
        # Of other processes, as they were read last: each alone, and all that is told of them.
        self._seen: dict[str, Families] = {}
        self._others: Families = {}
        self._make()

    def write(self, text: str) -> None:
        """Replace this process' file.

        Raises:
            OSError, UnicodeError.
        """
        self._make()  # somebody may have removed it to begin at 0
        _replace(self._path / f"{self.own}.prom", text)

    def written(self) -> bool:
        return (self._path / f"{self.own}.prom").exists()

    def add_others(self, total: Families) -> None:
        """Add the counts of all other processes; a file that says nothing is left out, with one warning.

        What cannot be read now counts as it did when it was read last: nothing that is told may go back.
        """
        try:
            self._others = self._read_others()
        except OSError as error:
            self.warn(f"{self._path}: other processes' counts cannot be read: {error.strerror}")
        add(total, self._others)

    def _read_others(self) -> Families:
        found = [(process, self._read(process)) for process in self._processes() if process != self.own]
        ended, counted = self._read_ended()  # after the files: a process that was not there is here
        self._seen = {
            process: self._seen.get(process, {}) if families is None else families for process, families in found
        }
        others: Families = {}
        for process, families in self._seen.items():
            if process not in counted:
                add(others, families, ended=not lives(process))
        add(others, ended)
        return others

    def fold(self) -> None:
        """Move the counts of those that have ended to the file for them; leave it to another process that does so.

        Raises:
            OSError.
        """
        if all(map(lives, self._processes())) and not self._left_over():
            return
        with self._locked() as locked:
            if not locked:
                return
            ended, counted = self._read_ended()
            gone = [process for process in self._processes() if not lives(process)]
            found = {process: self._read(process) for process in gone if process not in counted}
            new = {process: families for process, families in found.items() if families is not None}
            for families in new.values():
                add(ended, families, ended=True)
            if new:
                names = "".join([f"{_ENDED}{process}\n" for process in [*counted, *new][-KEPT:]])
                _replace(self._ended, names + render(ended))
            done = [self._path / f"{process}.prom" for process in gone if process in new or process in counted]
            for path in (*done, *self._left_over(), *self._left_of_folding()):
                path.unlink(missing_ok=True)

    def warn(self, text: str) -> None:
        """Log a warning, once."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    def _make(self) -> None:
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _processes(self) -> list[str]:
        stems = [name.removesuffix(".prom") for name in os.listdir(self._path) if name.endswith(".prom")]
        return [stem for stem in sorted(stems) if _PROCESS.fullmatch(stem)]

    def _left_over(self) -> list[Path]:
        """Half-written files of those that ended while they wrote."""
        halves = [(path, path.name.partition(".")[0]) for path in self._path.glob("*.tmp")]
        return [path for path, process in halves if _PROCESS.fullmatch(process) and not lives(process)]

    def _left_of_folding(self) -> list[Path]:
        """By whoever ended while it folded. Only who holds the lock may ask: nobody else folds."""
        return list(self._path.glob(f"{self._ended.stem}.*.tmp"))

    def _read(self, process: str) -> Families | None:
        """What a process counts; nothing if its file says nothing, None if it may later."""
        try:
            return parse(_content(self._path / f"{process}.prom"))
        except FileNotFoundError:  # it has ended, and its counts were moved
            return {}
        except ValueError as error:
            self.warn(f"{self._path}/{process}.prom is left out of /metrics: {error}")
            return {}
        except OSError as error:
            self.warn(f"{self._path}/{process}.prom cannot be read: {error.strerror}")
            return None

    def _read_ended(self) -> tuple[Families, list[str]]:
        """The counts of those that have ended, and whose they are."""
        try:
            text = _content(self._ended)
            names = [line.removeprefix(_ENDED) for line in text.split("\n") if line.startswith(_ENDED)]
            return parse(text), names
        except FileNotFoundError:
            return {}, []
        except ValueError as error:
            self.warn(f"{self._ended}: the counts of ended processes are lost: {error}")
            return {}, []

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Whether the lock of those who fold was free, and is held now."""
        descriptor = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor, too
        finally:
            os.close(descriptor)


def _content(path: Path) -> str:
    text = path.read_bytes().decode()
    if not text.endswith(_END):
        raise ValueError("it is cut off")
    return text


def _replace(path: Path, text: str) -> None:
    """Write a file that only its owner may read; whoever reads it meanwhile finds the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write((text + _END).encode())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# A process' part in it.


class SharedMetrics:
    """Writes what `metrics()` says to the folder, while it runs, and tells what all processes have written there."""

    def __init__(self, path: Path, metrics: Callable[[], str]) -> None:
        """`metrics` is called on the event loop, once a second."""
        self._path, self._metrics = path, metrics
        self._folder: Folder | None = None
        self._text = ""  # what it said last, written
        self._now: Families = {}  # and parsed
        self._lost: Families = {}  # what it does not say any more
        self._told: Families = {}  # both, as written
        self._stopping = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Write for the first time, and from now on.

        Raises:
            ConfigError: the folder cannot be had, or not be written to.
        """
        try:
            self._folder = await asyncio.to_thread(Folder, self._path)
            await asyncio.to_thread(self._write, self._folder, self._metrics())
        except OSError as error:
            raise ConfigError(f"MILLRACE_METRICS_DIR: {self._path}: {error.strerror or error}") from None
        self._writing = asyncio.create_task(self._write_on(self._folder))

    async def stop(self, seconds: float) -> None:
        """Write for the last time; give that up after `seconds`."""
        self._stopping.set()
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=seconds)
            self._writing.cancel()

    def text(self) -> str:
        """The sum of what all processes have written, in Prometheus' text format: families in the order of this one's.

        Reads the files of the others: a millisecond for a few models and processes.
        """
        total: Families = {}
        add(total, self._told)
        if self._folder is not None:
            self._folder.add_others(total)
        return render(total)

    async def _write_on(self, folder: Folder) -> None:
        last = False
        while not last:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), INTERVAL)
            last = self._stopping.is_set()
            try:
                await asyncio.to_thread(self._write, folder, self._metrics())
            except Exception as error:  # whatever it is, the next time it may not be
                folder.warn(f"{self._path}: this process' counts cannot be written: {error!r}")

    def _write(self, folder: Folder, text: str) -> None:
        if text != self._text or not folder.written():
            now, told = parse(text), Families()
            carry(self._lost, self._now, now)
            add(told, now)
            add(told, self._lost)
            self._now = now
            try:
                folder.write(render(told))
                self._text = text
            finally:
                self._told = told  # on a full disk, too, it says what it knows
        folder.fold()
