"""Policy: what cannot be is refused, naming the field, and the grids round up."""

import math
from typing import Any

import pytest

from batching import Level, Policy


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"capacity_bytes": 0}, "capacity_bytes must be at least 1, got 0"),
        ({"max_cost": -1}, "max_cost must be at least 0, got -1"),
        ({"max_delay": -0.1}, "max_delay must be a number of seconds, at least 0, got -0.1"),
        ({"max_delay": math.inf}, "max_delay must be a number of seconds, at least 0, got inf"),
        ({"max_delay": math.nan}, "max_delay must be a number of seconds, at least 0, got nan"),
        ({"objective": 0.0}, "objective must be a positive number of seconds, got 0.0"),
        ({"objective": math.nan}, "objective must be a positive number of seconds, got nan"),
        ({"patience": 0.0}, "patience must be a positive number of seconds, got 0.0"),
        ({"patience": math.inf}, "patience must be a positive number of seconds, got inf"),
        ({"patience": math.nan}, "patience must be a positive number of seconds, got nan"),
        ({"patience": -1.0}, "patience must be a positive number of seconds, got -1.0"),
        ({"capacity": 7}, "capacity (7 rows) must hold at least one batch (8 rows)"),
        ({"max_padding": -0.1}, "max_padding must be a share, 0 to 1, got -0.1"),
        ({"max_padding": 1.1}, "max_padding must be a share, 0 to 1, got 1.1"),
        ({"max_padding": math.nan}, "max_padding must be a share, 0 to 1, got nan"),
        ({"default_level": 1}, "default_level must be below 1, got 1"),
        ({"default_level": -1}, "default_level must be below 1, got -1"),
        ({"levels": ()}, "default_level must be below 0, got 0"),
        ({"preferred": (0, 2)}, "preferred must be positive and ascending, got [0, 2]"),
        ({"preferred": (4, 2)}, "preferred must be positive and ascending, got [4, 2]"),
        ({"lengths": (2, 2)}, "lengths must be positive and ascending, got [2, 2]"),
        ({"row_grid": (0, 8)}, "row_grid must be positive and ascending, got [0, 8]"),
        ({"preferred": (4, 9)}, "preferred must be at most max_rows (8), got 9"),
        ({"max_cost": 15, "lengths": (4, 16)}, "max_cost must hold a row of the longest of lengths, 16, got 15"),
        ({"row_grid": (4,)}, "row_grid must end with max_rows (8), got 4"),
        ({"row_grid": (4, 9)}, "row_grid must end with max_rows (8), got 9"),
        ({"max_cost": 63, "lengths": (4, 16), "row_grid": (4, 8)},
         "max_cost must hold the fewest rows of row_grid times the longest of lengths, 4 x 16, got 63"),
        ({"ordered": True, "levels": (Level(), Level())}, "ordered answers need a single level of priority"),
        ({"ordered": True, "levels": (Level(timeout=1.0, delay=True),)}, "ordered answers need a single level"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(knobs: dict[str, Any], text: str) -> None:
    """A policy under which something could never be batched is refused, and the text names field and value."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - its text is compared below
        Policy(**{"max_rows": 8, **knobs})
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"max_items": -1}, "max_items must be at least 0, got -1"),
        ({"timeout": 0.0}, "timeout must be a positive number of seconds, got 0.0"),
        ({"timeout": math.nan}, "timeout must be a positive number of seconds, got nan"),
    ],
    ids=str,
)
def test_a_level_that_cannot_be_is_refused(knobs: dict[str, Any], text: str) -> None:
    """So is a level in which nothing could ever wait."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - its text is compared below
        Level(**knobs)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_rows": 1, "capacity": 1, "capacity_bytes": 1},
        {"max_cost": 0},
        {"max_delay": 0.0, "objective": math.inf, "patience": 1e9},
        {"max_padding": 0.0},
        {"max_padding": 1.0},
        {"preferred": (1, 8), "row_grid": (1, 8), "lengths": (1, 2)},
        {"row_grid": (8,)},
        {"max_cost": 16, "lengths": (4, 16)},
        {"max_cost": 0, "lengths": (4, 16)},
        {"max_cost": 64, "lengths": (4, 16), "row_grid": (4, 8)},
        {"max_cost": 0, "lengths": (4, 16), "row_grid": (8,)},
        {"max_cost": 1, "row_grid": (8,)},
        {"max_cost": 1},
        {"levels": (Level(), Level()), "default_level": 1},
        {"ordered": True, "levels": (Level(timeout=1.0),)},
    ],
    ids=str,
)
def test_the_extremes_are_allowed(knobs: dict[str, Any]) -> None:
    """Every bound that a field's text names is itself fine."""
    policy = Policy(**{"max_rows": 8, **knobs})
    assert all(getattr(policy, name) == value for name, value in knobs.items())


def test_the_defaults_wait_for_nobody_and_refuse_only_what_is_too_much() -> None:
    """Without a knob: no timer, one level, no grid, no objective; but every bound of the queue is there."""
    policy = Policy(8)
    assert policy.max_delay == policy.max_cost == policy.default_level == 0
    assert policy.objective == math.inf
    assert (policy.preferred, policy.lengths, policy.row_grid) == ((), (), ())
    assert policy.levels == (Level(max_items=0, timeout=math.inf, delay=False, override=False),)
    assert (policy.capacity, policy.capacity_bytes) == (1024, 1 << 30)


@pytest.mark.parametrize(
    ("priority", "index"), [(-1, 1), (0, 1), (1, 0), (2, 1), (3, 2), (4, 1), (2**31, 1)],
)  # fmt: skip
def test_priority_1_is_the_highest_and_one_that_is_not_there_is_the_default(priority: int, index: int) -> None:
    """As in Triton: 1 to n are levels; 0, and whatever is beyond, mean the default."""
    assert Policy(8, levels=(Level(), Level(), Level()), default_level=1).level(priority) == index


@pytest.mark.parametrize(("length", "padded"), [(1, 4), (3, 4), (4, 4), (5, 16), (16, 16), (17, 17), (99, 99)])
def test_a_length_is_padded_up_to_the_grid(length: int, padded: int) -> None:
    """The least that is not below; beyond the grid's end a length is its own."""
    assert Policy(8, lengths=(4, 16)).padded_length(length) == padded
    assert Policy(8).padded_length(length) == length


@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_rows_are_padded_up_to_the_grid(rows: int, padded: int) -> None:
    """The least number that is not below; without a grid, rows are what they are."""
    assert Policy(8, row_grid=(1, 4, 8)).padded_rows(rows) == padded
    assert Policy(8).padded_rows(rows) == rows
