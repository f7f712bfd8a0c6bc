"""The simulation: its models against schedules worked out by hand, its queue against theory, and what it counts."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.simulate import DEADLINES, Cell, fair_shares, faults, goodput, jain, parse, plan
from bench.simulation.lane import Histogram, Lane, Outcome, Service, simulate
from bench.simulation.policies import POLICIES
from bench.simulation.workload import ARRIVALS, Request, Workload

TEN_MS = Service(fixed=0.010, per_row=0.0, max_rows=3)


class Watched(Lane):
    """A lane that writes down what ran, and when: requests by letter, in the order of arrival."""

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        super().__init__(service)
        self.schedule: list[str] = []
        self._letters = {request: chr(ord("a") + index) for index, request in enumerate(requests)}

    def run(self, batch: Sequence[Request], now: float) -> float:
        self.schedule.append(f"{now * 1e3:g}:{''.join(self._letters[request] for request in batch)}")
        return super().run(batch, now)


def schedule(policy: str, requests: Sequence[Request], service: Service = TEN_MS) -> str:
    """Start in ms and members of each batch."""
    lane = Watched(service, requests)
    simulate(POLICIES[policy].build(lane, 1000), requests)
    return " ".join(lane.schedule)


def at(*milliseconds: float) -> list[Request]:
    return [(each / 1e3, math.inf, 0) for each in milliseconds]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("ours", "1:a 11:b 21:cde 31:f"),  # whatever waits, whenever the lane is free
        ("enqueue", "6:ab 16:cde 26:f"),  # 5 ms after a; full when free; f has waited for 6 ms by then
        ("dequeue", "6:ab 16:cde 31:f"),  # the same, but f waits 5 ms more once it was taken
        ("poll", "5:ab 15:cde 30:f"),  # looks at 5, finds a full batch at 15, sleeps from 25 on
        ("ahead", "1:a 11:b 21:c 31:def"),  # b is sealed at 3, c at 12, and all others at 21
        ("far-ahead", "1:a 11:b 21:c 31:d 41:e 51:f"),  # there always is room for one more batch of one
    ],
)
def test_six_arrivals_by_hand(policy: str, expected: str) -> None:
    """A batch takes 10 ms and holds 3: each policy makes the batches that its description says."""
    assert schedule(policy, at(1, 3, 12, 14, 14.5, 20)) == expected


@pytest.mark.parametrize("policy", ["ours", "enqueue", "dequeue", "ahead", "far-ahead"])
def test_arrivals_at_the_same_moment_share_a_batch(policy: str) -> None:
    """Nothing starts before everything of that moment has arrived."""
    assert schedule(policy, [(0.0, deadline, 0) for deadline in (1.0, 2.0, 3.0)]) == "0:abc"


def test_a_sleeper_commits_full_batches_and_nothing_joins_them() -> None:
    """Seven wait at 15: six make two batches; the seventh waits, with whoever came since, for the next look."""
    assert schedule("poll", at(1, 6, 7, 8, 9, 10, 11, 12, 16)) == "5:a 15:bcd 25:efg 40:hi"


def test_a_sleeper_looks_every_5_ms_from_when_it_was_last_busy() -> None:
    """The lane is free at 15: it looks at 20, 25, ..., 45, and not before."""
    assert schedule("poll", at(1, 41)) == "5:a 45:b"


def test_five_batches_ahead_are_the_most() -> None:
    """a runs, b to f are sealed one by one; then there is no room until a look 5 ms later: g and h share one."""
    assert schedule("far-ahead", at(1, 2, 3, 4, 5, 6.5, 7, 8)) == "1:a 11:b 21:c 31:d 41:e 51:f 61:gh"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("enqueue", "2:ab 12:de"),  # c is met, dropped, and its place filled
        ("enqueue-tuned", "2:ab 12:e"),  # and so is d: 10 ms are not enough
        ("dequeue", "2:ab 12:d 27:e"),  # c is dropped from the batch that was taken
        ("ahead", "1:a 11:b 21:cd 31:e"),  # runs all, however late
    ],
)
def test_what_is_over_its_deadline_by_hand(policy: str, expected: str) -> None:
    """c has until 10 ms, d until 21: who looks at deadlines, when, and what becomes of the batch."""
    requests = [(0.001, 1.0, 0), (0.002, 1.0, 0), (0.003, 0.010, 0), (0.004, 0.021, 0), (0.005, 1.0, 0)]
    assert schedule(policy, requests, Service(0.010, 0.0, 2)) == expected


def test_ours_refuses_at_the_door_once_it_knows_what_a_batch_takes() -> None:
    """After one batch of 10 ms: what cannot be answered in time is refused, and what can be stands by deadline."""
    early, late = [(0.0, 1.0, 0)], [(0.02, 1.0, 0), (0.021, 0.035, 0), (0.022, 1.0, 0), (0.023, 0.045, 0)]
    service = Service(0.010, 0.0, 1)
    lane = Watched(service, early + late)
    outcome = simulate(POLICIES["ours"].build(lane, 1000), early + late)
    assert " ".join(lane.schedule) == "0:a 20:b 30:e 40:d"
    assert (outcome.refused, outcome.answered, outcome.in_time) == (1, 4, 4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("load", [0.5, 1.5])
def test_every_request_is_counted_once(policy: str, load: float) -> None:
    """Answered, refused or dropped, whatever the policy does with 3000 requests that have deadlines and little room."""
    service = Service(noise=0.3)
    deadlines = DEADLINES["20, 50 or 200 ms"]
    workload = Workload(load * service.capacity, 3000, arrivals="bursty", deadlines=deadlines, clients=(0.7, 0.3))
    outcome = simulate(POLICIES[policy].build(Lane(service, 2), 64), workload.requests(), 2)
    assert outcome.offered == sum(outcome.demand) == 3000
    assert outcome.answered + outcome.refused + outcome.dropped == 3000
    assert outcome.answered == sum(outcome.served)
    assert 0 < outcome.in_time <= outcome.answered
    assert outcome.busy <= outcome.elapsed
    assert outcome.batches <= outcome.answered <= 32 * outcome.batches


def test_a_bounded_queue_refuses_what_is_too_much() -> None:
    """One runs, two may wait: two of five that come together are refused."""
    lane = Lane(Service(0.010, 0.0, 1))
    outcome = simulate(POLICIES["enqueue"].build(lane, 2), at(0, 1, 2, 3, 4))
    assert (outcome.refused, outcome.answered) == (2, 3)
    assert outcome.utilisation == 1


@pytest.mark.parametrize("policy", ["ours", "enqueue"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_one_row_at_a_time_waits_as_long_as_theory_says(policy: str, noise: float) -> None:
    """M/G/1: the mean wait is that of Pollaczek and Khinchine, rate E[S^2] / (2 (1 - load))."""
    seconds, load = 0.01, 0.6
    service = Service(seconds, 0.0, 1, noise)
    outcome = simulate(POLICIES[policy].build(Lane(service), 1 << 60), Workload(load / seconds, 100_000).requests())
    wait = load * seconds * math.exp(noise**2) / (2 * (1 - load))
    assert outcome.mean - seconds == pytest.approx(wait, rel=0.04)
    assert outcome.utilisation == pytest.approx(load, rel=0.02)


def test_histogram_agrees_with_numpy() -> None:
    """Mean and quantiles, over six decades and in several pieces."""
    values = np.random.default_rng(1).lognormal(-5, 2.5, 20_000)
    histogram = Histogram()
    for piece in np.split(values, 4):
        histogram.add(piece)
    assert histogram.count == len(values)
    assert histogram.mean() == pytest.approx(values.mean())
    for share in (0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share, method="inverted_cdf"), rel=6e-4)


def test_an_empty_histogram_knows_nothing() -> None:
    """No answer is no latency, not a latency of zero."""
    assert math.isnan(Histogram().mean())
    assert math.isnan(Histogram().quantile(0.99))


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_equal_seeds_give_equal_requests_and_outcomes(arrivals: str) -> None:
    """To the last bit; another seed gives others."""
    workload = Workload(2000.0, 5000, 7, arrivals, DEADLINES["20, 50 or 200 ms"], (0.5, 0.5))
    requests = list(workload.requests())
    assert requests == list(workload.requests())
    assert requests != list(replace(workload, seed=8).requests())
    first, second = (simulate(POLICIES["ours"].build(Lane(Service(), 2), 64), requests, 2) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("arrivals", "variation"), [("poisson", (0.98, 1.02)), ("bursty", (1.3, 3.0))])
def test_arrivals_have_their_rate_and_their_spread(arrivals: str, variation: tuple[float, float]) -> None:
    """Over several chunks: in order, at the wanted rate; the gaps vary by their mean, those of bursts by more."""
    times = np.array([time for time, _, _ in Workload(5000.0, 200_000, arrivals=arrivals).requests()])
    gaps = np.diff(times)
    assert len(times) == 200_000
    assert gaps.min() >= 0
    assert len(times) / times[-1] == pytest.approx(5000, rel=0.01 if arrivals == "poisson" else 0.15)
    assert variation[0] < gaps.std() / gaps.mean() < variation[1]


def test_deadlines_and_clients_have_their_shares() -> None:
    """Each request has one of the deadlines, counted from its arrival, and one of the clients."""
    workload = Workload(1000.0, 20_000, deadlines=DEADLINES["20, 50 or 200 ms"], clients=(0.9, 0.1))
    limits = [round(deadline - time, 6) for time, deadline, _ in workload.requests()]
    assert {limit: limits.count(limit) / 20_000 for limit in set(limits)} == {
        0.02: pytest.approx(0.25, abs=0.02),
        0.05: pytest.approx(0.5, abs=0.02),
        0.2: pytest.approx(0.25, abs=0.02),
    }
    assert sum(client for _, _, client in workload.requests()) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100\n101\n103\n", [1.5, 2.5, 4.5, 6, 7, 9]),  # times; before the first comes the mean gap, each time round
        ("1\n3\n2\n", [1, 4, 6, 7, 10, 12]),  # gaps, since they fall
        ("2\n2\n", [2, 4, 6, 8, 10, 12]),  # gaps, since times would stand still
    ],
)
def test_a_recording_is_repeated_and_stretched(tmp_path: Path, text: str, expected: list[float]) -> None:
    """Times or gaps, one in a line, at twice the recorded rate and then some."""
    path = tmp_path / "arrivals.txt"
    path.write_text(text)
    mean = expected[-1] / len(expected)
    times = [time for time, _, _ in Workload(2 / mean, 6, arrivals=str(path)).requests()]
    assert times == pytest.approx([each / 2 for each in expected])


@pytest.mark.parametrize("text", ["", "0\n0\n", "-1\n-2\n", "one\n"])
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is simulated, with the name of the file."""
    path = tmp_path / "arrivals.txt"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse(["--arrivals", str(path)])
    assert f"--arrivals {path}: " in capsys.readouterr().err


def test_fair_shares_by_hand() -> None:
    """Who asks for little gets it; the others share what is left."""
    assert fair_shares([8, 1, 3], 9) == [5, 1, 3]
    assert fair_shares([8, 1, 6], 9) == [4, 1, 4]
    assert fair_shares([1, 1], 9) == [1, 1]


def outcome(**values: float | tuple[int, ...]) -> Outcome:
    """Of a lane that could have served ten requests, and answered all of them."""
    made = Outcome(10, 0, 0, 10, 10, 10, 1.0, 1.0, 0.01, 0.02, (10,), (10,))
    return replace(made, **values)  # type: ignore[arg-type]


def test_jain_by_hand() -> None:
    """Fair shares of 8, 1 and 1: the index is 1 if they are served, (5/4)^2 / (3 (5/4)^2) if the first takes all."""
    service = Service(0.1, 0.0, 1)
    demand = (20, 1, 1, 0)
    assert jain(outcome(demand=demand, served=(8, 1, 1, 0)), service) == 1
    assert jain(outcome(demand=demand, served=(10, 0, 0, 0)), service) == pytest.approx(1 / 3)


def test_goodput_is_a_share_of_capacity() -> None:
    """Six in time of the ten that could have been."""
    assert goodput(outcome(in_time=6), Service(0.1, 0.0, 1)) == pytest.approx(0.6)


def test_check_says_what_is_wrong() -> None:
    """A latency above a peer's by more than the tolerance, a low goodput, and unfair fair shares; nothing else."""
    service = Service(0.1, 0.0, 1)
    workload = Workload(1.0, 10)

    def cell(experiment: str, policy: str, load: float) -> Cell:
        return Cell(experiment, "any", load, policy, workload, 1)

    good = {
        cell("latency", "ours", 0.5): outcome(),
        cell("latency", "enqueue", 0.5): outcome(mean=0.00995, p99=0.0199),
        cell("goodput", "ours", 2.0): outcome(),
        cell("goodput", "enqueue", 2.0): outcome(in_time=0),
        cell("fairness", "ours", 2.0): outcome(demand=(9, 9), served=(10, 0)),
        cell("fairness", "ours-fair", 2.0): outcome(demand=(9, 9), served=(5, 5)),
    }
    assert list(faults(good, service)) == []
    bad = {
        cell("latency", "enqueue", 0.5): outcome(mean=0.0098),
        cell("goodput", "ours", 2.0): outcome(in_time=9),
        cell("fairness", "ours-fair", 2.0): outcome(demand=(9, 9), served=(9, 1)),
    }
    assert [fault.partition(":")[0] for fault in faults(good | bad, service)] == [
        "any, 50%",
        "deadlines of any",
        "fair shares, 200%",
    ]


def test_all_policies_meet_the_same_requests() -> None:
    """In each experiment, at each load; every policy of the table is in one of them."""
    cells = list(plan(parse([]), Service()))
    assert {cell.policy for cell in cells} == set(POLICIES)
    by_place: dict[tuple[str, str, float], set[Workload]] = {}
    for cell in cells:
        by_place.setdefault((cell.experiment, cell.variant, cell.load), set()).add(cell.workload)
    assert all(len(workloads) == 1 for workloads in by_place.values())


def test_the_command_prints_tables_and_draws_pictures(tmp_path: Path) -> None:
    """`python -m bench.simulate`, with a recording among its arrivals."""
    recording = tmp_path / "recording.txt"
    recording.write_text("1\n3\n2\n")
    command = [sys.executable, "-m", "bench.simulate", "--requests", "300", "--load", "0.5", "2"]
    command += ["--arrivals", "poisson", str(recording), "--out", str(tmp_path / "img")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for title in ("Latency, poisson", f"Latency, {recording}", "Goodput, deadlines of 50 ms", "Fairness, ten clients"):
        assert f"\n{title}" in done.stdout
    assert sorted(path.name for path in (tmp_path / "img").iterdir()) == [
        "fairness.png",
        "goodput.png",
        "latency-poisson.png",
        "latency-recording.png",
    ]
