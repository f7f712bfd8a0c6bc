"""Metrics of several processes: the sum is right whoever is asked, and a counter in it never goes back."""

import asyncio
import errno
import logging
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.shared_metrics import (
    KEPT,
    Families,
    Folder,
    SharedMetrics,
    add,
    carry,
    lives,
    parse,
    render,
    started_at,
)
from tests.conftest import StartLocal

from .test_metrics import parse as values
from .test_metrics import request

OWN = 'model="m",version="1"'


def text(count: int = 0, waiting: int = 0, buckets: tuple[int, int] = (0, 0), total: float = 0.0) -> str:
    """One counter, one gauge, one histogram."""
    return (
        "# HELP done What is done\n# TYPE done counter\n"
        f"done{{{OWN}}} {count}\n"
        "# HELP waiting What waits\n# TYPE waiting gauge\n"
        f"waiting{{{OWN}}} {waiting}\n"
        "# HELP wait How long\n# TYPE wait histogram\n"
        f'wait_bucket{{{OWN},le="0.1"}} {buckets[0]}\nwait_bucket{{{OWN},le="+Inf"}} {buckets[1]}\n'
        f"wait_sum{{{OWN}}} {total}\nwait_count{{{OWN}}} {buckets[1]}\n"
    )


def done(families: Families) -> float:
    return families["done"].samples[f"done{{{OWN}}}"]


def summed(*texts: str, ended: bool = False) -> Families:
    total: Families = {}
    for each in texts:
        add(total, parse(each), ended)
    return total


Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def process() -> Iterator[Start]:
    """process(): starts one that does nothing, and whose files a Folder can write."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1]

    yield start
    for popen in started:
        end(popen)


def end(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    popen.wait()


def told(folder: Folder) -> Families:
    """What others count."""
    total: Families = {}
    folder.add_others(total)
    return total


# The text.


@pytest.mark.parametrize(
    "wrong",
    [
        "done 1\n",
        "# TYPE done counter\ndone\n",
        "# TYPE done counter\ndone one\n",
        '# TYPE done counter\ndone{model="m} 1\n',
        '# TYPE done counter\ndone{model="m"} 1 1700000000\n',
        "# TYPE done counter\n\0\0\0\0 1\n",
    ],
)
def test_what_is_no_metrics_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="sample|float"):
        parse(wrong)


def test_a_text_is_rendered_as_it_was_read() -> None:
    """HELP and TYPE once each, families without samples too, and texts that hold what others end a line with."""
    once = (
        "# HELP a A # HELP\n# TYPE a counter\n"
        'a{x="1 } 2",y="\\"\\\\\\n\x85\u2028"} 3\na{x="é"} 0.25\n'
        "# HELP b B\n# TYPE b gauge\n"
        "# TYPE c gauge\nc 1\n"
    )
    assert render(parse(once)) == once
    assert render(parse(text(3, 4, (1, 2), 0.5))).count("# HELP") == 3


@pytest.mark.parametrize("value", [0.0, 5.0, 0.1, -2.5, 1e300, 2.0**53, math.inf, -math.inf])
def test_a_number_is_read_as_it_was_written(value: float) -> None:
    samples = {"a": value}
    families = parse("# TYPE a gauge\na 1\n")
    families["a"].samples = samples
    assert parse(render(families))["a"].samples == samples


# The sum.


def test_samples_are_added_by_name_and_labels() -> None:
    """Counters, gauges and every part of a histogram; the order of labels is nothing."""
    total = values(render(summed(text(3, 4, (1, 2), 0.5), text(10, 20, (2, 5), 0.25))))
    assert total["done"] == {OWN: 13}
    assert total["waiting"] == {OWN: 24}
    assert total["wait_bucket"] == {f'le="0.1",{OWN}': 3, f'le="+Inf",{OWN}': 7}
    assert (total["wait_sum"], total["wait_count"]) == ({OWN: 0.75}, {OWN: 7})
    other = '# TYPE done counter\ndone{version="1",model="m"} 5\n'
    assert values(render(summed(text(3), other)))["done"] == {OWN: 8}


def test_what_one_alone_has_is_kept_after_what_all_have() -> None:
    """Versions and families that only another process knows; the order is one's own."""
    other = "# TYPE new gauge\nnew 1\n# HELP done Else\n# TYPE done counter\n" + 'done{model="m",version="2"} 9\n'
    total = summed(text(3), other)
    assert list(total) == ["done", "waiting", "wait", "new"]
    assert values(render(total))["done"] == {OWN: 3, 'model="m",version="2"': 9}
    assert total["done"].help == "# HELP done What is done"


def test_a_load_time_is_the_greatest() -> None:
    """A sum of load times would be nobody's."""
    name = "nv_model_load_duration_secs"
    total = summed(*(f"# TYPE {name} gauge\n{name} {seconds}\n" for seconds in (2, 5, 3)))
    assert total[name].samples == {name: 5}


def test_a_family_of_another_type_is_left_out() -> None:
    """It can be told with one type alone, which is one's own."""
    assert done(summed(text(3), f"# TYPE done gauge\ndone{{{OWN}}} 5\n")) == 3


def test_gauges_end_with_their_process() -> None:
    assert set(summed(text(3, 4), ended=True)) == {"done", "wait"}


def test_adding_changes_only_the_total() -> None:
    one = parse(text(1))
    total: Families = {}
    add(total, one)
    add(total, one)
    assert (done(total), done(one)) == (2, 1)


# What begins again.


def lost(*texts: str) -> Families:
    families: Families = {}
    for before, now in pairwise(texts):
        carry(families, parse(before), parse(now))
    return families


def test_what_grows_is_not_carried() -> None:
    """Nor a gauge that falls, nor a sum of negative values."""
    assert lost(text(1, 9, (1, 2), 1.0), text(1, 2, (1, 3), 0.5), text(2, 0, (2, 4), 0.25)) == {}


def test_a_counter_that_began_again_is_carried() -> None:
    """Each time, also when it vanished; the others are not."""
    assert done(lost(text(5), text(2), text(4), text(1))) == 9
    gone = lost(text(5), "# TYPE waiting gauge\n")
    assert done(gone) == 5
    assert "waiting" not in gone
    both = '# TYPE done counter\ndone{{version="1"}} {}\ndone{{version="2"}} {}\n'
    assert lost(both.format(5, 6), both.format(6, 1))["done"].samples == {'done{version="2"}': 6}


def test_a_histogram_begins_again_as_a_whole() -> None:
    """With the buckets and the sum that happen to be no less; of this series alone."""
    families = lost(text(buckets=(0, 5), total=0.5), text(buckets=(1, 4), total=0.75))
    carried = values(render({"wait": families["wait"]}))
    assert carried["wait_bucket"] == {f'le="0.1",{OWN}': 0, f'le="+Inf",{OWN}': 5}
    assert (carried["wait_sum"], carried["wait_count"]) == ({OWN: 0.5}, {OWN: 5})
    series = '# TYPE wait histogram\nwait_count{{model="a"}} {}\nwait_count{{model="b"}} {}\n'
    assert lost(series.format(5, 6), series.format(4, 6))["wait"].samples == {'wait_count{model="a"}': 5}


# The files.


def test_a_process_lives_until_it_ends_or_its_id_is_anothers(process: Start) -> None:
    """A zombie has ended."""
    popen = process()
    ticks = started_at(popen.pid)
    assert ticks is not None
    assert lives(f"{popen.pid}-{ticks}")
    assert not lives(f"{popen.pid}-{ticks - 1}")
    popen.kill()
    os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert not lives(f"{popen.pid}-{ticks}")
    popen.wait()
    assert started_at(popen.pid) is None


def test_the_folder_of_a_process_that_is_none_is_refused(tmp_path: Path, process: Start) -> None:
    popen = process()
    end(popen)
    with pytest.raises(OSError, match="does not tell when process"):
        Folder(tmp_path, popen.pid)


def test_each_of_two_live_processes_tells_the_other(tmp_path: Path, process: Start) -> None:
    """Gauges included; one's own file is not read."""
    one, two = Folder(tmp_path, process().pid), Folder(tmp_path, process().pid)
    one.write(text(1, 2))
    two.write(text(10, 20))
    assert done(told(one)) == 10
    assert done(told(two)) == 1
    assert values(render(told(Folder(tmp_path))))["waiting"] == {OWN: 22}


def test_only_the_user_reads_what_is_written(tmp_path: Path, process: Start) -> None:
    """Folder 0700, each file 0600, whatever the umask lets through."""
    before = os.umask(0)
    try:
        folder = Folder(tmp_path / "run/metrics")
        popen = process()
        Folder(tmp_path / "run/metrics", popen.pid).write(text(1))
        end(popen)
        folder.write(text(1))
        folder.fold()
    finally:
        os.umask(before)
    path = tmp_path / "run/metrics"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert modes == {f"{folder.own}.prom": 0o600, "ended.prom": 0o600, "lock": 0o600}


def test_counters_of_an_ended_process_stay_and_its_gauges_go(tmp_path: Path, process: Start) -> None:
    """Before its file is folded, after that, and when another one is folded later; files go."""
    folder = Folder(tmp_path)
    for count in (1, 3):
        popen = process()
        Folder(tmp_path, popen.pid).write(text(count, 5, (1, 1), 0.5))
        assert values(render(told(folder)))["waiting"] == {OWN: 5}
        end(popen)
        assert "waiting" not in told(folder)
        before = told(folder)
        folder.fold()
        assert told(folder) == before
    assert done(told(folder)) == 4
    assert values(render(told(folder)))["wait_bucket"] == {f'le="0.1",{OWN}': 2, f'le="+Inf",{OWN}': 2}
    assert {file.name for file in tmp_path.iterdir()} == {"ended.prom", "lock"}


def test_a_file_of_another_process_of_the_same_id_is_an_ended_ones(tmp_path: Path, process: Start) -> None:
    """A process id that was given again: the counts of both are told, the gauges of one."""
    folder, now = Folder(tmp_path), Folder(tmp_path, process().pid)
    now.write(text(10, 20))
    pid, _, ticks = now.own.partition("-")
    (tmp_path / f"{now.own}.prom").rename(tmp_path / f"{pid}-{int(ticks) - 1}.prom")
    now.write(text(1, 2))
    for _ in range(2):
        assert done(told(folder)) == 11
        assert values(render(told(folder)))["waiting"] == {OWN: 2}
        folder.fold()
    assert {file.name for file in tmp_path.iterdir()} == {f"{now.own}.prom", "ended.prom", "lock"}


def test_a_process_that_was_folded_counts_once_while_its_file_is_there(tmp_path: Path, process: Start) -> None:
    """Whoever folds may be killed between the two steps; a reader may have read the file before them."""
    folder, popen = Folder(tmp_path), process()
    other = Folder(tmp_path, popen.pid)
    other.write(text(7))
    end(popen)
    file = tmp_path / f"{other.own}.prom"
    content = file.read_bytes()
    folder.fold()
    file.write_bytes(content)
    for _ in range(2):
        assert done(told(folder)) == 7
        folder.fold()
    assert not file.exists()


def test_the_names_of_the_ended_do_not_pile_up(tmp_path: Path) -> None:
    """The last ones are known, the sum is of all."""
    folder = Folder(tmp_path)
    for ticks in range(KEPT + 1):
        (tmp_path / f"9999999-{ticks}.prom").write_text(text(1) + "# EOF\n")
        if ticks % KEPT == 0:
            folder.fold()
    folder.fold()
    assert done(told(folder)) == KEPT + 1
    assert (tmp_path / "ended.prom").read_text().count("# ENDED ") == KEPT


@pytest.mark.parametrize("content", [b"", text(5).encode(), b"\xff\xfe# EOF\n", b"nothing 1\n# EOF\n"])
def test_a_corrupt_file_is_left_out_with_one_warning(
    tmp_path: Path, process: Start, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """Empty, cut off, no text, no metrics: the others are told, and a folded one is gone."""
    folder, popen = Folder(tmp_path), process()
    Folder(tmp_path, process().pid).write(text(3))
    corrupt = tmp_path / f"{Folder(tmp_path, popen.pid).own}.prom"
    corrupt.write_bytes(content)
    with caplog.at_level(logging.WARNING, "millrace"):
        for _ in range(3):
            assert done(told(folder)) == 3
        assert [corrupt.name in record.message for record in caplog.records] == [True]
        end(popen)
        folder.fold()
    assert not corrupt.exists()
    assert done(told(folder)) == 3


def test_a_file_that_cannot_be_read_is_not_folded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, process: Start
) -> None:
    """It may be read later; here it is a folder. What a scrape can tell, it tells."""
    folder = Folder(tmp_path)
    Folder(tmp_path, process().pid).write(text(3))
    (tmp_path / "9999999-1.prom").mkdir()
    folder.fold()
    assert (tmp_path / "9999999-1.prom").exists()
    assert done(told(folder)) == 3
    assert len(caplog.records) == 1


def test_what_cannot_be_read_counts_as_it_was_read_last(tmp_path: Path, process: Start) -> None:
    """One file, here a folder for a while; it counts anew when it can be read. What was told never goes back."""
    folder, other = Folder(tmp_path), Folder(tmp_path, process().pid)
    other.write(text(3))
    Folder(tmp_path, process().pid).write(text(10))
    assert done(told(folder)) == 13
    path = tmp_path / f"{other.own}.prom"
    path.unlink()
    path.mkdir()
    for _ in range(2):
        assert done(told(folder)) == 13
    path.rmdir()
    other.write(text(4))
    assert done(told(folder)) == 14


def test_a_folder_that_cannot_be_read_counts_as_it_was_read_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Start
) -> None:
    """A process may run out of descriptors for a moment. Processes that live and those that have ended stay told."""
    folder, popen = Folder(tmp_path), process()
    Folder(tmp_path, popen.pid).write(text(100))
    end(popen)
    folder.fold()
    Folder(tmp_path, process().pid).write(text(1))
    assert done(told(folder)) == 101

    def fail(path: object) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        for _ in range(2):
            assert done(told(folder)) == 101
    assert done(told(folder)) == 101


def test_lost_counts_of_the_ended_are_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A corrupt ended.prom is said once, and begun anew."""
    folder = Folder(tmp_path)
    (tmp_path / "ended.prom").write_text("half")
    assert (told(folder), told(folder)) == ({}, {})
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/ended.prom: the counts of ended processes are lost: it is cut off"
    ]
    (tmp_path / "9999999-1.prom").write_text(text(2) + "# EOF\n")
    folder.fold()
    assert done(told(folder)) == 2


def test_a_folder_that_vanished_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody removed it to begin at 0: a scrape tells one's own counts meanwhile."""
    folder = Folder(tmp_path / "metrics")
    (tmp_path / "metrics").rmdir()
    assert told(folder) == {}
    assert "cannot be read: No such file" in caplog.records[0].message
    folder.write(text(1))
    assert folder.written()


def test_half_written_files_of_the_ended_are_removed(tmp_path: Path, process: Start) -> None:
    """And those of the living are left alone."""
    folder, writing = Folder(tmp_path), Folder(tmp_path, process().pid)
    (tmp_path / "9999999-1.abc.tmp").touch()
    (tmp_path / f"{writing.own}.abc.tmp").touch()
    folder.fold()
    assert {file.name for file in tmp_path.iterdir()} == {f"{writing.own}.abc.tmp", "lock"}


def test_half_a_file_of_the_ended_is_removed_with_the_next_that_ends(tmp_path: Path) -> None:
    """Whoever was killed while it folded left it."""
    folder = Folder(tmp_path)
    (tmp_path / "ended.abc.tmp").write_text("half")
    (tmp_path / "9999999-1.prom").write_text(text(2) + "# EOF\n")
    folder.fold()
    assert {file.name for file in tmp_path.iterdir()} == {"ended.prom", "lock"}
    assert done(told(folder)) == 2


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A lone surrogate cannot be written."""
    folder = Folder(tmp_path)
    folder.write(text(1))
    with pytest.raises(UnicodeError):
        folder.write("\ud800")
    assert [file.name for file in tmp_path.iterdir()] == [f"{folder.own}.prom"]


FOLD = """
import sys
from pathlib import Path
from engine.shared_metrics import Folder
folder = Folder(Path(sys.argv[1]))
print("ready", flush=True)
while not Path(sys.argv[1], "stop").exists():
    folder.fold()
"""


def test_processes_that_fold_at_once_count_everything_once(tmp_path: Path) -> None:
    """Three of them, while processes end and somebody looks, who never sees less than before."""
    folder = Folder(tmp_path)
    folders = [subprocess.Popen([sys.executable, "-c", FOLD, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for popen in folders:
            assert popen.stdout is not None
            assert popen.stdout.readline() == b"ready\n"
        for ticks in range(300):
            part = tmp_path / "part"
            part.write_text(text(1) + "# EOF\n")
            part.rename(tmp_path / f"9999999-{ticks}.prom")
            assert done(told(folder)) == ticks + 1
    finally:
        (tmp_path / "stop").touch()
        codes = [popen.wait(60) for popen in folders]
        for popen in folders:
            popen.communicate()
    assert codes == [0, 0, 0]
    folder.fold()
    assert done(told(folder)) == 300
    assert {file.name for file in tmp_path.iterdir()} == {"ended.prom", "lock", "stop"}


def test_who_finds_the_lock_taken_leaves_it_to_the_other(tmp_path: Path) -> None:
    """A process that is stopped while it folds keeps nobody waiting, and nothing goes untold."""
    folder, other = Folder(tmp_path), Folder(tmp_path)
    (tmp_path / "9999999-1.prom").write_text(text(2) + "# EOF\n")
    with other._locked() as locked:
        assert locked
        folder.fold()
        assert (tmp_path / "9999999-1.prom").exists()
        assert done(told(folder)) == 2
    folder.fold()
    assert not (tmp_path / "9999999-1.prom").exists()


# A process' part.


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - files have no event
            await asyncio.sleep(0.01)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.shared_metrics.INTERVAL", 0.01)


async def test_a_folder_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"MILLRACE_METRICS_DIR: .*/file/metrics: Not a directory"):
        await SharedMetrics(tmp_path / "file/metrics", text).start()


async def test_what_is_told_is_what_was_written(tmp_path: Path) -> None:
    """From the start, for the last time at the stop, and nothing in between that others could not know."""
    said = text(1)
    shared = SharedMetrics(tmp_path, lambda: said)
    await shared.stop(1)  # what never started stops as well
    shared = SharedMetrics(tmp_path, lambda: said)
    await shared.start()
    reader = Folder(tmp_path, 1)
    assert done(told(reader)) == 1
    said = text(2)
    assert done(parse(shared.text())) == done(told(reader))
    said = text(3)
    await shared.stop(30)
    assert done(told(reader)) == done(parse(shared.text())) == 3


async def test_counts_are_written_while_it_runs(tmp_path: Path, fast: None) -> None:
    """Again and again, also after the folder was removed, and with what was lost when a counter began again."""
    said = text(5)
    shared = SharedMetrics(tmp_path / "metrics", lambda: said)
    await shared.start()
    reader = Folder(tmp_path / "metrics", 1)
    said = text(2)
    await eventually(lambda: done(told(reader)) == 7)
    for file in (tmp_path / "metrics").iterdir():
        file.unlink()
    await eventually(lambda: "done" in told(reader))
    assert done(told(reader)) == done(parse(shared.text())) == 7
    await shared.stop(30)


async def test_a_write_that_fails_is_tried_again(
    tmp_path: Path, fast: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scraper is told what is known, with one warning; nothing is counted twice."""
    said = text(1)
    shared = SharedMetrics(tmp_path, lambda: said)
    await shared.start()
    calls = 0

    def full(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engine.shared_metrics._replace", full)
        said = text(2)
        await eventually(lambda: calls > 2)
        assert done(parse(shared.text())) == 2
    await eventually(lambda: done(told(Folder(tmp_path, 1))) == 2)
    await shared.stop(30)
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == [
        "OSError(28, 'No space left on device')"
    ]


async def test_an_engine_tells_the_counts_of_all(
    local_engine: StartLocal, tmp_path_factory: pytest.TempPathFactory, process: Start, fast: None
) -> None:
    """Its own and another process', in the order and the form of its own; its last counts are left in the folder."""
    folder = tmp_path_factory.mktemp("metrics")
    other = Folder(folder, process().pid)
    engine = await local_engine({"metrics_dir": str(folder)}, m=lambda inputs: {"y": inputs["x"]})
    alone = await engine.metrics()
    other.write("# TYPE nv_inference_count counter\n" + f"nv_inference_count{{{OWN}}} 10\n")
    assert values(await engine.metrics())["nv_inference_count"] == {OWN: 10}
    await engine.infer(request())
    async with asyncio.timeout(30):
        while values(await engine.metrics())["nv_inference_count"] != {OWN: 11}:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
    names = [line.split()[2] for line in (await engine.metrics()).splitlines() if line.startswith("# TYPE")]
    assert names == [line.split()[2] for line in alone.splitlines() if line.startswith("# TYPE")]
    await engine.infer(request())
    await engine.stop()
    assert told(other)["nv_inference_count"].samples == {f"nv_inference_count{{{OWN}}}": 2}
    assert values(await engine.metrics())["nv_inference_count"] == {OWN: 12}


async def test_without_a_folder_an_engine_tells_its_own(local_engine: StartLocal, tmp_path: Path) -> None:
    """At once, and nothing is written anywhere."""
    engine = await local_engine(m=lambda inputs: {"y": inputs["x"]})
    before = set(tmp_path.rglob("*"))
    await engine.infer(request())
    assert values(await engine.metrics())["nv_inference_count"] == {OWN: 1}
    assert set(tmp_path.rglob("*")) == before
