"""What the generator of load is told, and what it tells; pure."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

POISONED = -1
SHARES = (0.5, 0.99, 0.999)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    requests: whole HTTP requests, of which one after the other is sent; as latin-1.
    poisoned: the same, of those that must be refused.
    rate: requests a second; 0 for a closed loop.
    connections: all are made before the first request; one that is lost is made anew when it is missed.
    idle: seconds after which a connection is not used again, 0 for none: a server that stops may close it without a
        word while a request is on its way.
    warm: seconds before the measurement.
    poisoned_share, leaving_share: of all requests.
    """

    port: int
    requests: Sequence[str]
    rate: float
    connections: int
    seconds: float
    poisoned: Sequence[str] = ()
    warm: float = 0.5
    idle: float = 0.0
    poisoned_share: float = 0.0
    leaving_share: float = 0.0
    seed: int = 0


@dataclass
class Outcome:
    """Of the requests that were due in the measured time; of a closed loop, those that were answered in it.

    Attributes:
        sent: good requests whose client stayed.
        answers: [index of the request or POISONED, status, body as latin-1, how often] for each different answer.
        latencies: milliseconds of those with status 200, by the share of them that took no longer, one of SHARES.
        broken: good requests whose connection ended, or that had no answer at the end.
        late: milliseconds, p99, by which a request was sent after it was due, a free connection being there; 0 in a
            closed loop.
        busy: share of the time in which this process ran.
    """

    sent: int = 0
    seconds: float = 0.0
    answers: list[tuple[int, int, str, int]] = field(default_factory=list)
    latencies: dict[str, float] = field(default_factory=dict)
    broken: int = 0
    late: float = 0.0
    busy: float = 0.0


def schedule(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """When requests are due, in seconds from the start: a Poisson process."""
    draw = random.Random(seed)
    due = draw.expovariate(rate)
    while due < seconds:
        yield due
        due += draw.expovariate(rate)


def quantile(ranked: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that so many of them do not exceed; NaN of none."""
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan
