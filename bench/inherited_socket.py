"""What one kept-alive client waits for an answer, by how the server came by its listening socket.

    bound        the launcher, on a TCP port that it binds itself
    inherited    the launcher with --fd, on a TCP socket that a process manager would have opened
    uvicorn --fd the same socket for uvicorn's own --fd, which takes it for a unix one: nobody sets TCP_NODELAY, the
                 body waits (Nagle) until the head is acknowledged, and the client delays that for 40 ms
    unix         the launcher, on a unix socket

The client is a raw socket that sends one digit as JSON, reads the answer and sends the next, in Python: its own share
is in every figure, some 20 us. The four servers run all the time and each has one connection; they are asked in turn,
a batch of requests each, round after round, so that what else the machine does meets all alike.
"""

import argparse
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from .client import Address, Client, encode
from .report import heading, progress, publish, table
from .samples import INFER, fault, json_post, read_json, read_samples
from .servers import LAUNCHER, UVICORN, BenchError, free_port, running, unwind_on_signals

READY = "/v2/health/ready"


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        share: of the requests of a round; 1 except where each takes long.
    """

    name: str
    client: Client
    share: float


@contextmanager
def cases() -> Iterator[list[Case]]:
    """Start the servers and connect to each."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        unix = f"{folder}/socket"
        inherited, broken = (stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128)) for _ in "ab")
        port = free_port()
        rows: list[tuple[str, Sequence[str], Address, int | None, float]] = [
            ("launcher, bound port", (*LAUNCHER, "--port", str(port)), ("127.0.0.1", port), None, 1),
            (
                "launcher, inherited TCP socket (`--fd`)",
                (*LAUNCHER, "--fd", str(inherited.fileno())),
                inherited.getsockname(),
                inherited.fileno(),
                1,
            ),
            (
                "plain `uvicorn --fd`, inherited TCP socket",
                (*UVICORN, "--fd", str(broken.fileno()), "asgi_app:app"),
                broken.getsockname(),
                broken.fileno(),
                0.1,
            ),
            ("launcher, unix socket", (*LAUNCHER, "--uds", unix), unix, None, 1),
        ]
        found = []
        for name, command, address, fd, share in rows:
            progress(f"starting {' '.join(command[1:])}")
            server = stack.enter_context(running(command, address, ready=READY, fd=fd))
            found.append(Case(name, stack.enter_context(Client(server.address)), share))
        yield found


def measure(rows: list[Case], rounds: int, requests: int) -> dict[str, list[float]]:
    """Milliseconds of each request, by row.

    Raises:
        BenchError: an answer was wrong.
    """
    samples = read_samples()[7:8]
    post = json_post(samples)
    request = encode("POST", INFER, post.body, post.headers)
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(-1, rounds):  # the first does not count
        for row in rows:
            progress(f"round {number + 1} of {rounds}: {row.name}" if number >= 0 else f"warming up: {row.name}")
            for _ in range(max(1, round(requests * row.share))):
                began = time.perf_counter()
                answer = row.client.ask(request)
                took = time.perf_counter() - began
                if answer.status != 200 or fault(read_json(answer.body), samples):
                    raise BenchError(f"{row.name}: {answer.status} {answer.body!r}")
                if number >= 0:
                    times[row.name].append(took * 1e3)
    return times


def render(times: dict[str, list[float]]) -> str:
    rows = []
    for name, values in times.items():
        ranked = sorted(values)
        p50, p99 = (ranked[min(len(ranked) - 1, int(len(ranked) * share))] for share in (0.5, 0.99))
        rows.append([name, str(len(ranked)), f"{p50:.2f}", f"{p99:.2f}"])
    return table(["server", "requests", "p50 ms", "p99 ms"], rows, 1)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.inherited_socket", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="in a round; the slow case gets a tenth")
    parser.add_argument("--output", type=Path, help="write the result to this file too")
    options = parser.parse_args(arguments)
    unwind_on_signals()
    try:
        with cases() as rows:
            times = measure(rows, options.rounds, options.requests)
    except (BenchError, OSError) as error:
        print(f"\nbench.inherited_socket: {error}", file=sys.stderr)
        return 1
    publish(f"{heading('bench.inherited_socket', arguments)}\n\n{render(times)}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
