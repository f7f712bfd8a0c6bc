"""What a server leaves the garbage collector to do."""

import gc
import os
import subprocess
import sys

import pytest

from engine import garbage


def test_what_is_there_is_not_looked_at_again() -> None:
    """It is out of the collector's sight, what comes later is not; nothing that was garbage already is kept."""
    gc.unfreeze()
    loop: list[object] = []
    loop.append(loop)
    kept, identity = [loop], id(loop)
    del loop
    kept.clear()
    garbage.freeze()
    assert gc.get_freeze_count() > 1000
    later: list[object] = []
    seen = set(map(id, gc.get_objects()))
    assert id(later) in seen
    assert id(kept) not in seen
    assert identity not in seen


def test_the_youngest_are_looked_at_less_often() -> None:
    """The older ones as often as before, in terms of the youngest."""
    gc.set_threshold(700, 7, 9)
    garbage.freeze()
    assert gc.get_threshold() == (garbage.YOUNG, 7, 9)


def test_who_turned_the_collector_off_or_down_knows_why() -> None:
    """A threshold of 0, or above ours, stays."""
    for young in (0, 2 * garbage.YOUNG):
        gc.set_threshold(young, 7, 9)
        garbage.freeze()
        assert gc.get_threshold() == (young, 7, 9)


SCRIPT = """
import resource
from engine.garbage import keep_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        bodies = [bytearray(600_000) for _ in range(4)]
        del bodies
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{call}
faults()
print(faults())
"""


@pytest.mark.parametrize(
    ("call", "tunable", "kept"), [("keep_heap()", "", True), ("", "", False), ("keep_heap()", "131072", False)]
)
def test_memory_that_is_freed_is_not_asked_for_again(call: str, tunable: str, kept: bool) -> None:
    """Large bodies that come and go get the pages of those before them; unless somebody wants it otherwise."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")}
    if tunable:
        environment["MALLOC_TRIM_THRESHOLD_"] = environment["MALLOC_MMAP_THRESHOLD_"] = tunable
    command = [sys.executable, "-c", SCRIPT.format(call=call)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert (int(printed) < 1000) == kept, printed
