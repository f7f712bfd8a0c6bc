"""Where the microseconds of a request go: `python -m bench.road`.

Requests of the tiny MLP (64, 256, 10 numbers; bench/shapes.py), JSON both ways, go through a protocol class in memory:
a transport that keeps nothing stands for the sockets, so what the kernel takes is not in it. A batch is fed to as many
connections as it has rows, in one turn of the event loop, until all are answered. There are three roads:

    short     `asgi_app.protocol.Protocol`, for requests that look like one before (`asgi_app/shortcut.py`)
    long      the same class, for all others: through the ASGI application
    uvicorn   uvicorn's own httptools class, in front of the same application

They take turns. A figure is CPU time of the process, in microseconds a request; of several rounds the median, and the
smallest and largest. The parts of the short road are timed alone; what is left of the whole is everything else.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from asgi_app import app, templates
from asgi_app.heads import read_head
from asgi_app.protocol import Protocol
from asgi_app.shortcut import Shortcut
from asgi_app.v2_codec import decode_request, encode_numbers
from engine.connect import connect
from engine.settings import Settings
from engine.types import Engine, InferRequest

from . import shapes
from .report import heading, progress, publish, spread, table

CONFIG = """
backend: "pytorch"
max_batch_size: 128
input [ { name: "x" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 10 ] } ]
dynamic_batching { }
"""
ROADS = {"short": Protocol, "long": Protocol, "uvicorn": HttpToolsProtocol}
REPEATS = 200  # of a part that is timed alone, in each of which it is done as often


class Transport:
    """What a protocol class writes to; it counts the answers that have ended."""

    def __init__(self) -> None:
        self.answered = 0

    def write(self, data: bytes) -> None:
        self.answered += data.endswith(b"}]}")

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def close(self) -> None:
        raise RuntimeError("the connection was closed: the request was refused")


def write_repository(folder: Path) -> None:
    (folder / "mlp" / "1").mkdir(parents=True)
    (folder / "mlp" / "config.pbtxt").write_text(CONFIG)
    rows = torch.export.Dim("rows", min=1, max=128)
    program = torch.export.export(shapes.mlp(), (torch.zeros(2, 64),), dynamic_shapes=({0: rows},))
    torch.export.save(program, folder / "mlp" / "1" / "model.pt2")


def make_request() -> tuple[bytes, bytes]:
    """A head as wrk sends it, and a body."""
    numbers = np.random.default_rng(1).random(64).round(4).tolist()
    body = orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": numbers}]})
    head = (
        "POST /v2/models/mlp/infer HTTP/1.1\r\nHost: 127.0.0.1:8000\r\ncontent-type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode(), body


def connections(road: str, count: int, state: dict[str, Any]) -> list[tuple[Any, Transport]]:
    """Open connections of a road."""
    config = uvicorn.Config(app, lifespan="off", proxy_headers=False, log_level="warning", access_log=False)
    config.load()
    server = ServerState()
    server.default_headers = [(b"date", b"Mon, 30 Nov 2026 12:00:00 GMT")]
    state = {**state} if road == "short" else {name: value for name, value in state.items() if name != "shortcut"}
    found = []
    for _ in range(count):
        transport: Any = Transport()
        protocol: Any = ROADS[road](config, server, state, asyncio.get_running_loop())
        protocol.connection_made(transport)
        found.append((protocol, transport))
    return found


async def serve(opened: Sequence[tuple[Any, Transport]], request: bytes, batches: int) -> float:
    """Microseconds of CPU a request."""
    loop = asyncio.get_running_loop()

    def feed() -> None:
        for protocol, _ in opened:
            protocol.data_received(request)

    began = time.process_time()
    for _ in range(batches):
        wanted = opened[-1][1].answered + 1
        loop.call_soon(feed)
        transports = [transport for _, transport in opened]
        while min(transport.answered for transport in transports) < wanted:  # noqa: ASYNC110 the turns are measured
            await asyncio.sleep(0)
    return (time.process_time() - began) / batches / len(opened) * 1e6


def alone(function: Callable[[], object]) -> float:
    """Microseconds of a part, the best of many."""
    return min(timeit.repeat(function, number=REPEATS, repeat=REPEATS)) / REPEATS * 1e6


async def parts(engine: Engine, head: bytes, body: bytes, rows: int) -> dict[str, float]:
    """Microseconds a request of what can be timed alone."""
    owner: Any = engine
    (served,) = owner.copies()
    model, batch = served.model, [{"x": np.zeros((1, 64), np.float32)}] * rows
    backend = model.instances[0][0]
    inputs = model._stack(backend, batch, rows, 1)
    outputs = (await engine.infer(InferRequest("mlp", "", batch[0]))).outputs

    def decode() -> object:
        templates._by_text.clear()
        return decode_request(engine, "mlp", "", body)

    found = {"the body, where none was like it": alone(decode)}
    decode_request(engine, "mlp", "", body)
    known = templates.read_json(body)
    assert known is not None
    template, _ = known
    return {
        "the head": alone(lambda: read_head(head[:-1] + b"\n")),  # a copy: its hash is not known yet
        "the body": alone(lambda: templates.read_like(template, body)),
        "the model's arithmetic": alone(lambda: backend.run(inputs)) / rows,
        "stacking and splitting": alone(lambda: model.execute(backend, batch, rows, 1)) / rows,
        "writing the answer": alone(lambda: encode_numbers("mlp", "1", outputs)),
        **found,
    }


async def measure(
    models: Path, rows: int, rounds: int, batches: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    settings = Settings(models=str(models), classifier="")
    engine = connect(settings, ())
    await engine.start()
    try:
        state = {"engine": engine, "settings": settings, "loop": asyncio.get_running_loop()}
        state["shortcut"] = Shortcut(engine, settings, app)
        opened = {road: connections(road, rows, state) for road in ROADS}
        head, body = make_request()
        found: dict[str, list[float]] = {road: [] for road in ROADS}
        for number in range(-1, rounds):  # the first does not count
            for road, connected in opened.items():
                cost = await serve(connected, head + body, batches)
                if number >= 0:
                    progress(f"round {number + 1} of {rounds}, {road}: {cost:.1f} us")
                    found[road].append(cost)
        return found, await parts(engine, head, body, rows)
    finally:
        await engine.stop()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.road", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64, help="of a batch (default: 64)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=50, help="of a round (default: 50)")
    parser.add_argument("--output", type=Path, help="write the result to this file too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_repository(Path(folder))
        run: Callable[[Awaitable[Any]], Any] = uvloop.run  # type: ignore[assignment]
        found, timed = run(measure(Path(folder), options.rows, options.rounds, options.batches))
    roads = table(["road", "us a request"], [[road, spread(costs, ".1f")] for road, costs in found.items()], 1)
    timed["stacking and splitting"] -= timed["the model's arithmetic"]
    on_the_way = {name: cost for name, cost in timed.items() if name != "the body, where none was like it"}
    rest = statistics.median(found["short"]) - sum(on_the_way.values())
    lines = [*on_the_way.items(), ("everything else", rest), *(timed.items() - on_the_way.items())]
    steps = table(["part of the short road", "us a request"], [[name, f"{cost:.2f}"] for name, cost in lines], 1)
    publish("\n\n".join([heading("bench.road", arguments), roads, steps]), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
