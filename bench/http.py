"""How much of uvicorn's own speed is left: this service and uvicorn answering a constant, loaded in turn by wrk.

Both run with the same uvicorn options (uvloop, httptools, no access log), one process each, on loopback, and get the
same POST: one 8 x 8 digit as JSON. A third row sends that digit to the service as a binary tensor. What the constant
takes is the floor that HTTP sets; what the service takes more is parsing, batching, the model, and encoding.

All servers run all the time and are loaded in turn, round after round, so that whatever else the machine does, and its
drift, meets all alike. A cell is the median over the rounds, with the smallest and the largest round.

    requests/s       answered, as wrk counts them
    of the constant  the same, divided by the constant's of the same round
    p50, p99         as wrk measures them, from a closed loop: each connection has one request under way
    CPU              user and system time of the server and its children (/proc), divided by the answered requests

wrk uses one thread, which the note under the table shows to be enough. Each answer of the service is checked once
before the first round; any answer but 2xx or 3xx, and any socket error, ends the run with no table.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.settings import Settings

from .client import Client, encode
from .report import heading, progress, publish, spread, table
from .samples import INFER, LENGTH_HEADER, Post, binary_post, fault, json_post, read_binary, read_json, read_samples
from .servers import LAUNCHER, UVICORN, BenchError, Server, die_with_parent, free_port, running, unwind_on_signals

CONSTANT = "uvicorn, a constant"

SCRIPT = """\
wrk.method = "POST"
wrk.body = {body}
{headers}
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {{"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "not 2xx or 3xx": %d, ' ..
    '"connect errors": %d, "read errors": %d, "write errors": %d, "timeouts": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
    errors.connect, errors.read, errors.write, errors.timeout))
end
"""
FAULTS = ("not 2xx or 3xx", "connect errors", "read errors", "write errors", "timeouts")


class Target(NamedTuple):
    """One row of the table: what wrk sends, and where.

    Attributes:
        script: what makes wrk send it.
    """

    name: str
    server: Server
    url: str
    script: Path


class Round(NamedTuple):
    """One load, in the table's units: milliseconds of latency, microseconds of CPU.

    Attributes:
        wrk: the share of the time in which wrk itself was running.
    """

    rate: float
    p50: float
    p99: float
    cpu: float
    wrk: float


def load(target: Target, connections: int, seconds: int) -> Round:
    """Run wrk once.

    Raises:
        BenchError: anything went wrong, be it a single request.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(target.script), target.url]
    before, wrk_before = target.server.cpu_seconds(), _children_seconds()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 30, check=False, preexec_fn=die_with_parent
    )
    cpu, wrk = target.server.cpu_seconds() - before, _children_seconds() - wrk_before
    line = re.search(r"^RESULT (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or line is None:
        raise BenchError(f"wrk failed with {done.returncode}: {done.stdout}{done.stderr}")
    result = json.loads(line[1])
    wrong = {name: result[name] for name in FAULTS if result[name]}
    if wrong or not result["requests"]:
        raise BenchError(f"{target.name} at {connections} connections: {result['requests']} requests, of which {wrong}")
    return Round(
        rate=result["requests"] / result["microseconds"] * 1e6,
        p50=result["p50"] / 1e3,
        p99=result["p99"] / 1e3,
        cpu=cpu / result["requests"] * 1e6,
        wrk=wrk / result["microseconds"] * 1e6,
    )


@contextmanager
def targets(json_body: Post, binary_body: Post) -> Iterator[list[Target]]:
    """Start the servers and write wrk's scripts."""
    settings = Settings()  # the options that the launcher sets, and uvicorn would not
    constant = (
        *UVICORN,
        *("--lifespan", "off", "--no-server-header", "--backlog", str(settings.backlog)),
        *("--limit-concurrency", str(settings.max_connections), "--timeout-keep-alive", f"{settings.keep_alive:.0f}"),
        "bench.constant:app",
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = []
        for command, ready in ((constant, "/"), (LAUNCHER, "/v2/health/ready")):
            port = free_port()
            progress(f"starting {' '.join(command[1:])}")
            address = ("127.0.0.1", port)
            servers.append(stack.enter_context(running((*command, "--port", str(port)), address, ready=ready)))
        rows = [
            (CONSTANT, servers[0], json_body),
            ("millrace, JSON", servers[1], json_body),
            ("millrace, binary", servers[1], binary_body),
        ]
        found = []
        for number, (name, server, post) in enumerate(rows):
            script = folder / f"{number}.lua"
            headers = "\n".join(f"wrk.headers[{_lua(key)}] = {_lua(value)}" for key, value in post.headers.items())
            script.write_text(SCRIPT.format(body=_lua(post.body), headers=headers))
            found.append(Target(name, server, f"http://127.0.0.1:{server.address[1]}{INFER}", script))
        yield found


def _lua(text: str | bytes) -> str:
    """As a string literal of Lua."""
    data = text.encode() if isinstance(text, str) else text
    return '"' + "".join(f"\\{byte:03d}" for byte in data) + '"'


def check(server: Server, json_body: Post, binary_body: Post) -> None:
    """Whether the service answers with the right digit.

    Raises:
        BenchError: it does not.
    """
    samples = read_samples()[7:8]
    for post in (json_body, binary_body):
        with Client(server.address) as client:
            answer = client.ask(encode("POST", INFER, post.body, post.headers))
        if answer.status != 200:
            raise BenchError(f"{INFER} answered {answer.status}: {answer.body!r}")
        length = answer.headers.get(LENGTH_HEADER)
        wrong = fault(read_binary(answer.body, length) if length else read_json(answer.body), samples)
        if wrong:
            raise BenchError(f"{INFER} answered with {wrong}")


def measure(
    rows: list[Target], connections: list[int], rounds: int, seconds: int
) -> dict[tuple[int, str], list[Round]]:
    """The rounds by connections and row, interleaved in time."""
    for target in rows:
        progress(f"warming up: {target.name}")
        load(target, max(connections), 1)
    results: dict[tuple[int, str], list[Round]] = {(count, row.name): [] for count in connections for row in rows}
    for number in range(rounds):
        for count in connections:
            for target in rows:
                result = load(target, count, seconds)
                results[count, target.name].append(result)
                progress(
                    f"round {number + 1} of {rounds}, {count} connections, {target.name}: {result.rate:,.0f} requests/s"
                )
    return results


def render(results: dict[tuple[int, str], list[Round]]) -> str:
    header = ["connections", "server", "requests/s", "of the constant", "p50 ms", "p99 ms", "server CPU us/request"]
    rows = []
    for (count, name), rounds in results.items():
        floor = results[count, CONSTANT]
        share = [ours.rate / constant.rate for ours, constant in zip(rounds, floor, strict=True)]
        rows.append(
            [
                str(count),
                name,
                spread([each.rate for each in rounds], ",.0f"),
                "1" if name == CONSTANT else spread(share, ".2f"),
                spread([each.p50 for each in rounds], ".2f"),
                spread([each.p99 for each in rounds], ".2f"),
                spread([each.cpu for each in rounds], ".1f"),
            ]
        )
    return table(header, rows, 2)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.http", description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each load (default: 3)")
    parser.add_argument("--output", type=Path, help="write the result to this file too")
    options = parser.parse_args(arguments)
    if shutil.which("wrk") is None:
        print("bench.http needs wrk: apt install wrk", file=sys.stderr)
        return 1
    unwind_on_signals()
    samples = read_samples()[7:8]
    json_body, binary_body = json_post(samples), binary_post(samples)
    try:
        with targets(json_body, binary_body) as rows:
            check(rows[1].server, json_body, binary_body)
            results = measure(rows, options.connections, options.rounds, options.seconds)
    except BenchError as error:
        print(f"\nbench.http: {error}", file=sys.stderr)
        return 1
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False).stdout.split(" [")[0]
    busy = max(each.wrk for rounds in results.values() for each in rounds)
    note = (
        f"Median of {options.rounds} interleaved rounds of {options.seconds} s each, with the smallest and the largest "
        f"round. Request bodies: {len(json_body.body)} bytes of JSON, {len(binary_body.body)} binary. wrk used "
        f"{busy:.0%} of its core at most, so it was {'not' if busy < 0.9 else 'now and then'} the limit."
    )
    text = "\n\n".join([heading("bench.http", arguments, wrk), render(results), note])
    publish(text, options.output)
    return 0


def _children_seconds() -> float:
    """CPU time of the children that have ended: wrk, while the servers run."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
