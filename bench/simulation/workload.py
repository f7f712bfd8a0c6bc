"""The requests that a simulation meets, in the order of their arrival: as many as wanted, in bounded memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# When it arrives, and must be answered, in seconds; the number of its client.
Request = tuple[float, float, int]

# Seconds from arrival to the last useful answer, each with its share of the requests.
Deadlines = tuple[tuple[float, float], ...]

CHUNK = 1 << 16  # requests that are made at once

# Bursts: both states last for exponential times of these means, in seconds; in a burst the rate is so much higher.
BURST, CALM, BOOST = 0.05, 0.2, 10.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What arrives. Equal workloads are equal to the last bit, whoever serves them.

    Attributes:
        rate: requests a second, in the mean.
        count: of all requests.
        arrivals: a key of `ARRIVALS`, or the path of a recording (see `recorded`).
        clients: the share of each.
    """

    rate: float
    count: int
    seed: int = 1
    arrivals: str = "poisson"
    deadlines: Deadlines = ((math.inf, 1.0),)
    clients: tuple[float, ...] = (1.0,)

    def requests(self, made: Callable[[int], object] = lambda count: None) -> Iterator[Request]:
        """All of them; `made` is told how many were made, now and then."""
        times_rng, deadline_rng, client_rng = (np.random.default_rng([self.seed, stream]) for stream in range(3))
        limits, shares = np.array(self.deadlines).T
        left = self.count
        for times in ARRIVALS.get(self.arrivals, partial(recorded, Path(self.arrivals)))(times_rng, self.rate):
            chunk = times[:left]
            due = chunk + limits[_draw(deadline_rng, shares, len(chunk))]
            clients = _draw(client_rng, np.array(self.clients), len(chunk))
            yield from zip(chunk.tolist(), due.tolist(), clients.tolist(), strict=True)
            made(len(chunk))
            left -= len(chunk)
            if not left:
                return


def _draw(rng: np.random.Generator, shares: Floats, count: int) -> NDArray[np.intp]:
    """Indices, each as often as its share says."""
    edges = np.cumsum(shares)[:-1] / shares.sum()
    return np.searchsorted(edges, rng.random(count), side="right")


def poisson(rng: np.random.Generator, rate: float) -> Iterator[Floats]:
    """Arrivals that know nothing of each other."""
    last = 0.0
    while True:
        times = last + np.cumsum(rng.exponential(1 / rate, CHUNK))
        yield times
        last = float(times[-1])


def bursty(rng: np.random.Generator, rate: float) -> Iterator[Floats]:
    """A Markov-modulated Poisson process of two states."""
    calm_rate = rate * (CALM + BURST) / (CALM + BOOST * BURST)
    periods = max(1, round(CHUNK / (rate * (CALM + BURST))))  # of one calm and one burst each, in a chunk
    length_rng, rng = rng.spawn(2)  # so that equal seeds burst at the same times, whatever the rate
    start = 0.0
    while True:
        lengths = length_rng.exponential((CALM, BURST), (periods, 2)).ravel()
        counts = rng.poisson(lengths * np.tile((calm_rate, calm_rate * BOOST), periods))
        starts = start + np.concatenate(([0.0], np.cumsum(lengths)))
        # Given their number, the arrivals of a Poisson process are anywhere in its interval.
        times = np.repeat(starts[:-1], counts) + np.repeat(lengths, counts) * rng.random(counts.sum())
        times.sort()
        yield times
        start = float(starts[-1])


def recorded(path: Path, rng: np.random.Generator, rate: float) -> Iterator[Floats]:
    """What was recorded, over and over, stretched to the wanted rate."""
    steps = gaps(path)
    steps = steps / (steps.mean() * rate)
    last = 0.0
    while True:
        for at in range(0, len(steps), CHUNK):
            times = last + np.cumsum(steps[at : at + CHUNK])
            yield times
            last = float(times[-1])


def gaps(path: Path) -> Floats:
    """The seconds before each arrival of a recording.

    The file has one number of seconds in each line. If they rise, and never fall, they are the times of the arrivals,
    from whatever zero; if not, the gaps.

    Raises:
        OSError, ValueError: there is no such file, or no such numbers in it.
    """
    numbers = np.array(path.read_text().split(), np.float64)
    steps = np.diff(numbers)
    rise = len(steps) > 0 and steps.min() >= 0 and steps.max() > 0
    found = np.append(steps.mean(), steps) if rise else numbers  # the mean: before the first, each time it comes round
    if not found.sum() > 0 or found.min() < 0:
        raise ValueError("neither times of arrivals, which never fall, nor gaps, which are never negative")
    return found


ARRIVALS: dict[str, Callable[[np.random.Generator, float], Iterator[Floats]]] = {"poisson": poisson, "bursty": bursty}
