"""What a batch costs: t(n) = a + b n, learned from the batches that ran.

n is a batch's size in units of work: its rows, or its padded tokens. The line is an exponentially weighted
least-squares fit, five numbers in all, updated once for each batch:

- A time far from what was expected is pulled in to four mean deviations before it counts, so that one pause of the
  machine says little. If it was no pause, the deviation grows, and a few dozen batches later the line has followed.
- Batches of one size only say nothing about the slope: it keeps what it last knew. A trace of that memory always
  counts, so that sizes that hardly differ do not turn noise into a slope.
- Before the first batch t(n) is 0: nothing is known, and nothing is refused on account of it. The second batch replaces
  the first, which is often a cold one.
"""

import math

RATE = 0.05  # weight of the newest batch, once there are many: a memory of some 20
CLIP = 4.0  # mean deviations beyond which a time is pulled in
SCATTER = 0.01  # of the mean time: the least that the mean deviation counts as
RIDGE = 0.01  # variance of the sizes, in squared means, below which the slope mostly stays what it was


class Cost:
    """Seconds of a batch by its size.

    Attributes:
        a: seconds that every batch takes.
        b: seconds for each unit of work.
        deviation: mean seconds by which a batch missed what was expected of it.
        samples: batches learned from.
    """

    __slots__ = ("_covariance", "_size", "_time", "_variance", "a", "b", "deviation", "samples")

    def __init__(self) -> None:
        self.a = 0.0
        self.b = 0.0
        self.deviation = 0.0
        self.samples = 0
        self._size = self._time = 0.0  # means
        self._variance = self._covariance = 0.0

    def seconds(self, size: float) -> float:
        """What a batch of `size` units is expected to take."""
        return self.a + self.b * size

    def learn(self, size: float, seconds: float) -> None:
        """A batch of `size` units took `seconds`."""
        self.samples += 1
        if self.samples <= 2:  # the first is often a cold one
            self._size, self._time = size, seconds
            self.a, self.deviation = seconds, abs(seconds - self.a) if self.samples == 2 else 0.0
            return
        rate = RATE if self.samples > 2 / RATE else min(0.5, 2 / self.samples)
        expected = self.a + self.b * size
        limit = CLIP * max(self.deviation, SCATTER * self._time) or math.inf
        error = min(max(seconds - expected, -limit), limit)
        self.deviation += min(1.0, 2 * rate) * (abs(error) - self.deviation)
        off_size = size - self._size
        off_time = expected + error - self._time
        self._size = mean = self._size + rate * off_size
        self._time = time = max(0.0, self._time + rate * off_time)
        self._variance = variance = (1 - rate) * (self._variance + rate * off_size * off_size)
        self._covariance = covariance = (1 - rate) * (self._covariance + rate * off_size * off_time)
        memory = RIDGE * mean * mean
        slope = (covariance + memory * self.b) / (variance + memory)
        # Neither part of a time is negative: all of it is in one, if the line says otherwise.
        self.b = slope = min(max(slope, 0.0), time / mean)
        self.a = max(0.0, time - slope * mean)
