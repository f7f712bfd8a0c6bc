"""How long requests wait for one lane, by the policy that makes the batches: a simulation under a virtual clock.

Ours is `batching.Pending` itself; the peers are models of their batching alone (bench/simulation/policies.py). All meet
the same requests, to the last bit. A batch of n rows takes 4 + 0.1 n ms and has at most 32 rows, unless said otherwise;
load is in multiples of what the lane can serve with full batches.

    latency    mean and p99 of all requests, how much of the time the lane runs, rows in a batch; unbounded queues
    goodput    requests answered by their deadlines, as a share of the lane's capacity; queues of 1024 requests
    fairness   ten clients, one of which sends nine tenths of all; queues of 1024 requests, no deadlines

Fairness is Jain's index, (sum of x)^2 / (n times the sum of x^2), over the n clients' x = answers / fair share. The
fair shares are the max-min ones: what the lane could have served in the time is shared equally, but nobody has more
than it asked for, and what that leaves over is shared by the others in the same way. 1 is fair to everybody.

`python -m bench.simulate --out docs/img` draws the pictures of the documentation: equal seeds give equal numbers.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .report import progress, table
from .simulation.lane import Lane, Outcome, Service, simulate
from .simulation.policies import POLICIES
from .simulation.workload import ARRIVALS, Deadlines, Workload, gaps

UNBOUNDED, BOUNDED = 1 << 60, 1024  # requests that may wait
DEADLINES: dict[str, Deadlines] = {
    "50 ms": ((0.05, 1.0),),
    "20, 50 or 200 ms": ((0.02, 0.25), (0.05, 0.5), (0.2, 0.25)),
}
CLIENTS = (0.9, *[0.1 / 9] * 9)

# What --check wants.
TOLERANCE = 0.01  # by how much ours may be above a peer: what chance leaves in a p99
GOODPUT = 0.95  # at every load above the capacity
JAIN = 0.95


class Experiment(NamedTuple):
    """What is simulated for a table.

    Attributes:
        loads: multiples of the lane's capacity.
        policies: keys of `POLICIES`.
    """

    loads: tuple[float, ...]
    policies: tuple[str, ...]


EXPERIMENTS = {
    "latency": Experiment(
        (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        ("ours", "enqueue", "dequeue", "poll", "ahead", "far-ahead"),
    ),
    "goodput": Experiment(
        (0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0),
        ("ours", "enqueue", "enqueue-tuned", "dequeue", "poll", "ahead", "far-ahead"),
    ),
    "fairness": Experiment((0.9, 1.0, 1.25, 1.5, 2.0), ("ours", "ours-fair")),
}


class Cell(NamedTuple):
    """One simulation.

    Attributes:
        variant: the arrivals, or the deadlines.
        load: of the lane's capacity.
        policy: a key of `POLICIES`.
        capacity: requests that may wait.
    """

    experiment: str
    variant: str
    load: float
    policy: str
    workload: Workload
    capacity: int


Results = dict[Cell, Outcome]


def plan(options: argparse.Namespace, service: Service) -> Iterator[Cell]:
    """All that is to be simulated."""
    variants: dict[str, dict[str, dict[str, Any]]] = {
        "latency": {name: {"arrivals": name} for name in options.arrivals},
        "goodput": {name: {"deadlines": deadlines} for name, deadlines in DEADLINES.items()},
        "fairness": {"ten clients": {"clients": CLIENTS}},
    }
    for experiment in options.experiment:
        loads, policies = EXPERIMENTS[experiment]
        capacity = UNBOUNDED if experiment == "latency" else BOUNDED
        for variant, more in variants[experiment].items():
            for load in options.load or loads:
                workload = Workload(load * service.capacity, options.requests, options.seed, **more)
                for policy in policies:
                    if policy in options.policy:
                        yield Cell(experiment, variant, load, policy, workload, capacity)


def run(service: Service, cell: Cell) -> Outcome:
    clients = len(cell.workload.clients)
    lane = Lane(service, clients, cell.workload.seed)
    policy = POLICIES[cell.policy].build(lane, cell.capacity)
    return simulate(policy, cell.workload.requests(_made), clients)


_total: Any = None  # in each process: how many requests all of them have simulated


def _set_total(total: Any) -> None:
    global _total
    _total = total


def _made(count: int) -> None:
    if _total is not None:
        with _total.get_lock():
            _total.value += count


def run_all(service: Service, cells: list[Cell], processes: int) -> Results:
    """Simulate the cells on all cores, with a bar on stderr if that is a terminal."""
    total = multiprocessing.Value("Q", 0)
    requests = sum(cell.workload.count for cell in cells)
    with multiprocessing.Pool(processes, _set_total, (total,)) as pool:
        outcomes = pool.map_async(partial(run, service), cells, chunksize=1)
        while not outcomes.ready():
            outcomes.wait(0.2)
            if sys.stderr.isatty():
                share = total.value / requests
                progress(f"[{'#' * round(40 * share):40}] {share:4.0%} of {requests:,} requests")
        if sys.stderr.isatty():
            progress("")
        return dict(zip(cells, outcomes.get(), strict=True))


def fair_shares(demand: Sequence[float], total: float) -> list[float]:
    """The max-min shares of `total`: equal ones, but for those who ask for less."""
    shares = [0.0] * len(demand)
    for rank, client in enumerate(sorted(range(len(demand)), key=demand.__getitem__)):
        shares[client] = min(demand[client], total / (len(demand) - rank))
        total -= shares[client]
    return shares


def jain(outcome: Outcome, service: Service) -> float:
    """Jain's index over what the clients got of their fair shares; those who asked for nothing do not count."""
    shares = fair_shares(outcome.demand, outcome.elapsed * service.capacity)
    got = [served / share for served, share in zip(outcome.served, shares, strict=True) if share]
    return sum(got) ** 2 / (len(got) * sum(each * each for each in got))


def goodput(outcome: Outcome, service: Service) -> float:
    """What was answered in time, as a share of what the lane could have served."""
    return outcome.in_time / (outcome.elapsed * service.capacity)


def by_policy(results: Results, experiment: str) -> dict[str, dict[str, dict[float, Outcome]]]:
    """The outcomes of an experiment by variant, policy and load."""
    found: dict[str, dict[str, dict[float, Outcome]]] = {}
    for cell, outcome in results.items():
        if cell.experiment == experiment:
            found.setdefault(cell.variant, {}).setdefault(cell.policy, {})[cell.load] = outcome
    return found


def render(results: Results, service: Service) -> Iterator[str]:
    """The tables."""

    def loads(title: str, policies: dict[str, dict[float, Outcome]], text: Any) -> str:
        header = ["policy \\ load", *(f"{load:.0%}" for load in next(iter(policies.values())))]
        rows = [[POLICIES[name].label, *map(text, outcomes.values())] for name, outcomes in policies.items()]
        return f"{title}\n\n{table(header, rows, 1)}"

    for variant, policies in by_policy(results, "latency").items():
        yield loads(
            f"Latency, {variant} arrivals: mean / p99, ms",
            policies,
            lambda each: f"{each.mean * 1e3:.2f} / {each.p99 * 1e3:.2f}",
        )
        yield loads(
            f"The lane, {variant} arrivals: time that it runs / rows in a batch",
            policies,
            lambda each: f"{each.utilisation:.0%} / {each.rows:.1f}",
        )
    for variant, policies in by_policy(results, "goodput").items():
        yield loads(
            f"Goodput, deadlines of {variant}: answers in time, as a share of capacity",
            policies,
            lambda each: f"{goodput(each, service):.3f}",
        )
        yield loads(
            "The others: refused at once / dropped later / answered too late, of all requests",
            policies,
            lambda each: " / ".join(
                f"{count / each.offered:.0%}" for count in (each.refused, each.dropped, each.answered - each.in_time)
            ),
        )
    for policies in by_policy(results, "fairness").values():
        yield loads("Fairness, ten clients: Jain's index", policies, lambda each: f"{jain(each, service):.3f}")
        yield loads(
            "Answered of what each asked for: the nine small clients, the large one",
            policies,
            lambda each: f"{sum(each.served[1:]) / sum(each.demand[1:]):.0%}, {each.served[0] / each.demand[0]:.0%}",
        )


def draw(results: Results, service: Service, folder: Path) -> None:
    """The pictures, into `folder`."""
    from .simulation import pictures  # matplotlib is needed, and imported, only for this

    folder.mkdir(parents=True, exist_ok=True)
    for variant, policies in by_policy(results, "latency").items():
        pictures.latency(policies, variant, folder / f"latency-{Path(variant).stem}.png")
    if variants := by_policy(results, "goodput"):
        pictures.goodput(variants, lambda each: goodput(each, service), folder / "goodput.png")
    for policies in by_policy(results, "fairness").values():
        pictures.fairness(policies, lambda each: jain(each, service), folder / "fairness.png")


def faults(results: Results, service: Service) -> Iterator[str]:
    """What `--check` finds wrong."""
    for variant, policies in by_policy(results, "latency").items():
        for peer, outcomes in policies.items():
            for load, theirs in outcomes.items():
                ours = policies["ours"][load]
                for name, our, their in (("mean", ours.mean, theirs.mean), ("p99", ours.p99, theirs.p99)):
                    if our > their * (1 + TOLERANCE):
                        yield (
                            f"{variant}, {load:.0%}: our {name} is {our * 1e3:.3f} ms, {our / their - 1:.1%} above "
                            f"{their * 1e3:.3f} ms of {POLICIES[peer].label}"
                        )
    for variant, policies in by_policy(results, "goodput").items():
        for load, outcome in policies["ours"].items():
            share = goodput(outcome, service)
            if load > 1 and share < GOODPUT:
                yield f"deadlines of {variant}: goodput at {load:.0%} is {share:.3f}, less than {GOODPUT}"
    for policies in by_policy(results, "fairness").values():
        for load, outcome in policies["ours-fair"].items():
            if jain(outcome, service) <= JAIN:
                yield f"fair shares, {load:.0%}: Jain's index is {jain(outcome, service):.3f}, not above {JAIN}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200_000, help="in each simulation (default: 200000)")
    parser.add_argument("--quick", action="store_const", dest="requests", const=10_000, help="--requests 10000")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--experiment", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--load", type=float, nargs="+", help="multiples of the lane's capacity, instead of the usual")
    parser.add_argument(
        "--arrivals", nargs="+", default=list(ARRIVALS), help="for the latency: poisson, bursty, a file of seconds"
    )
    parser.add_argument("--fixed-ms", type=float, default=4.0, help="that every batch takes (default: 4)")
    parser.add_argument("--row-ms", type=float, default=0.1, help="that each row adds (default: 0.1)")
    parser.add_argument("--max-rows", type=int, default=32, help="of a batch (default: 32)")
    parser.add_argument("--noise", type=float, default=0.0, help="lognormal sigma of a batch's time (default: 0)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="draw pictures into this folder")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless ours is nowhere worse")
    options = parser.parse_args(arguments)
    if options.requests < 1 or not all(load > 0 for load in options.load or ()):
        parser.error("--requests and --load must be positive")
    if options.check and (missing := {"ours", "ours-fair"} - {*options.policy}):
        parser.error(f"--check needs --policy {' '.join(sorted(missing))}")
    for name in options.arrivals:
        if name not in ARRIVALS:
            try:
                gaps(Path(name))
            except (OSError, ValueError) as error:
                parser.error(f"--arrivals {name}: {error}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    service = Service(options.fixed_ms / 1e3, options.row_ms / 1e3, options.max_rows, options.noise)
    results = run_all(service, list(plan(options, service)), options.processes)
    command = shlex.join(["python", "-m", "bench.simulate", *arguments])
    print(f"`{command}`: {options.requests:,} requests in each simulation, capacity {service.capacity:,.0f} requests/s")
    for text in render(results, service):
        print(f"\n{text}")
    if options.out is not None:
        draw(results, service, options.out)
    if not options.check:
        return 0
    wrong = list(faults(results, service))
    print(f"\n--check, tolerance {TOLERANCE:.0%}:", *(wrong or ["all holds"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
