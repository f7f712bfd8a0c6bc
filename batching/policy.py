"""How one model's requests are batched: every knob there is, with its default. The defaults need no turning."""

import math
from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Level:
    """What holds for one level of priority: Triton's ModelQueuePolicy.

    Attributes:
        max_items: most items that may wait in it; 0 for any number.
        timeout: seconds an item may wait; math.inf for ever.
        delay: whether an item that has waited that long goes behind all others of its level, instead of being refused.
        override: whether an item may bring a timeout of its own that is shorter.
    """

    max_items: int = 0
    timeout: float = math.inf
    delay: bool = False
    override: bool = False

    def __post_init__(self) -> None:
        if self.max_items < 0:
            raise ValueError(f"max_items must be at least 0, got {self.max_items}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")


@dataclass(frozen=True, slots=True)
class Policy:
    """How a model's requests are batched. Sizes in rows, times in seconds.

    Attributes:
        max_rows: most rows of a batch, and of an item.
        preferred: sizes of batches that leave as soon as they are there, and are not added to, as in Triton; ascending.
        max_delay: how long a batch that is not full waits for company, from its oldest item's push. 0: never.
        objective: seconds from push to answer that batches are kept small enough for, where that is possible.
        patience: an item without a deadline is ordered as if it had one this long after its push.
        capacity: most rows that may wait.
        capacity_bytes: most bytes that may wait.
        levels: of priority, the highest first.
        default_level: index of the level of items that ask for none.
        fair: whether clients get equal shares of the model, whoever sends most.
        ordered: whether answers are given in the order of pushes.
        max_cost: most rows times padded length of a batch; 0 for any.
        lengths: grid that items' lengths are padded up to; ascending. Empty: only up to the longest of their batch.
        row_grid: numbers of rows that batches are padded up to; ascending, the last is max_rows. Empty: they are not.
        max_padding: share of a batch of several lengths that may be padding.
    """

    max_rows: int
    preferred: tuple[int, ...] = ()
    max_delay: float = 0.0
    objective: float = math.inf
    patience: float = 1.0
    capacity: int = 1024
    capacity_bytes: int = 1 << 30
    levels: tuple[Level, ...] = (Level(),)
    default_level: int = 0
    fair: bool = False
    ordered: bool = False
    max_cost: int = 0
    lengths: tuple[int, ...] = ()
    row_grid: tuple[int, ...] = ()
    max_padding: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("max_rows", 1), ("capacity_bytes", 1), ("max_cost", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.max_delay < math.inf:
            raise ValueError(f"max_delay must be a number of seconds, at least 0, got {self.max_delay}")
        if not self.objective > 0:
            raise ValueError(f"objective must be a positive number of seconds, got {self.objective}")
        if not 0 < self.patience < math.inf:
            raise ValueError(f"patience must be a positive number of seconds, got {self.patience}")
        if self.capacity < self.max_rows:
            raise ValueError(f"capacity ({self.capacity} rows) must hold at least one batch ({self.max_rows} rows)")
        if not 0 <= self.max_padding <= 1:
            raise ValueError(f"max_padding must be a share, 0 to 1, got {self.max_padding}")
        if not 0 <= self.default_level < len(self.levels):
            raise ValueError(f"default_level must be below {len(self.levels)}, got {self.default_level}")
        for name in ("preferred", "lengths", "row_grid"):
            values = getattr(self, name)
            if any(value < 1 for value in values) or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be positive and ascending, got {list(values)}")
        if self.preferred and self.preferred[-1] > self.max_rows:
            raise ValueError(f"preferred must be at most max_rows ({self.max_rows}), got {self.preferred[-1]}")
        if self.lengths and 0 < self.max_cost < self.lengths[-1]:
            raise ValueError(
                f"max_cost must hold a row of the longest of lengths, {self.lengths[-1]}, got {self.max_cost}"
            )
        if self.row_grid and self.row_grid[-1] != self.max_rows:
            raise ValueError(f"row_grid must end with max_rows ({self.max_rows}), got {self.row_grid[-1]}")
        if self.row_grid and self.lengths and 0 < self.max_cost < self.row_grid[0] * self.lengths[-1]:
            raise ValueError(
                f"max_cost must hold the fewest rows of row_grid times the longest of lengths, "
                f"{self.row_grid[0]} x {self.lengths[-1]}, got {self.max_cost}"
            )
        if self.ordered and (len(self.levels) > 1 or self.levels[0].delay):
            raise ValueError("ordered answers need a single level of priority that refuses what is late")

    def level(self, priority: int) -> int:
        """Index of the level that an item of this priority is in: 1 is the highest; 0 or one too many, the default."""
        return priority - 1 if 1 <= priority <= len(self.levels) else self.default_level

    def padded_length(self, length: int) -> int:
        """The least length of the grid that is not below `length`; `length` itself beyond its end."""
        at = bisect_left(self.lengths, length)
        return self.lengths[at] if at < len(self.lengths) else length

    def padded_rows(self, rows: int) -> int:
        """The least number of the grid that is not below `rows`, 1 to max_rows."""
        return self.row_grid[bisect_left(self.row_grid, rows)] if self.row_grid else rows
