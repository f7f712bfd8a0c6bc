"""Which processes belong to a server."""

import os

from bench.peers.processes import Stat, family, parse_stat, read_stats


def test_a_family_is_the_session_and_all_descendants() -> None:
    """Grandchildren in sessions of their own belong to it, an orphan of its session too, and a stranger does not."""
    stats = {
        10: Stat(1, 10, 0),
        11: Stat(10, 10, 0),
        12: Stat(11, 12, 0),
        13: Stat(12, 13, 0),
        14: Stat(1, 10, 0),
        20: Stat(1, 20, 0),
        21: Stat(20, 20, 0),
    }
    assert family(10, stats) == {10, 11, 12, 13, 14}


def test_a_name_may_hold_spaces_and_brackets() -> None:
    fields = " ".join(["S", "7", "8", "9", *("0" for _ in range(7)), "1", "2", "3", "4", *("0" for _ in range(30))])
    assert parse_stat(f"42 (a) b) {fields}") == Stat(7, 9, 10)


def test_this_process_is_among_them() -> None:
    stats = read_stats()
    assert stats[os.getpid()].parent == os.getppid()
    assert os.getpid() in family(os.getppid(), stats)
