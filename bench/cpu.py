"""What makes a model faster on the CPU, and how much of that is left behind HTTP: `python -m bench.cpu`.

`--part options`: each option of docs/cpu.md, alone and with those that go with it, for models of three shapes
(bench/shapes.py), through the engine's own backend without a queue. All take turns, round after round, so that whatever
else the machine does meets all alike; the gain is the time of "as exported" over the option's in the same round, each
the best of its runs, the median over the rounds, with the smallest and the largest. With `--busy 1` another process
takes what it can get of a core meanwhile. `off` is the largest difference from what the plain model answers, as a share
of its largest answer.

`--part server`: rows a second through the whole server, as a share of what the model does alone: the same backend,
called in a loop in this process, with the batch size that is best for it (of lengths sorted before, for the encoder),
and the same number of threads. The two take turns, too; while one is measured the other is idle. The server is given
that batch size as max_batch_size, and clients that fill two batches and more (of the encoder 64, for lengths to choose
from); they share the second core with its event loop. `in the model` is the share of the time that the server's lane
spent in the model, by its own statistics: what is missing there is what the server adds to each batch; what is missing
in `share` beyond it are the cores.
"""

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from engine.backends.pytorch import PyTorchBackend
from engine.config import ModelConfig, parse_config

from . import shapes
from .client import Client, encode
from .report import heading, progress, publish, spread, table
from .servers import LAUNCHER, BenchError, die_with_parent, free_port, running

Tensors = dict[str, NDArray[Any]]

MAX_ROWS = 32
LENGTHS = (8, 128)
PLAIN = "as exported"

COMPILED = {"compile": "true"}
BF16 = {"precision": "bf16"}
UNFROZEN = {"TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"options": {"freezing": false}}'}

# What a config's parameters say, by the name of the row.
OPTIONS: dict[str, Mapping[str, str]] = {
    PLAIN: {},
    "INFERENCE_MODE false": {"INFERENCE_MODE": "false"},
    "INTRA_OP_THREAD_COUNT 2": {"INTRA_OP_THREAD_COUNT": "2"},
    "channels_last": {"channels_last": "true"},
    "precision bf16": BF16,
    "precision bf16, channels_last": BF16 | {"channels_last": "true"},
    "compile": COMPILED,
    "compile, freezing off": COMPILED | UNFROZEN,
    "compile, precision bf16": COMPILED | BF16,
}


class Shape(NamedTuple):
    """A model, and what is asked of it.

    Attributes:
        io: the tensors in config.pbtxt.
        example: what it is exported with.
        sizes: (rows, length) that the options are measured at.
        batches: rows that the loop is tried with.
    """

    make: Callable[[], torch.nn.Module]
    io: str
    example: tuple[torch.Tensor, ...]
    sizes: Sequence[tuple[int, int]]
    batches: Sequence[int]

    @property
    def ragged(self) -> bool:
        return "ragged" in self.io


_IDS = torch.ones(3, 7, dtype=torch.int64)
SHAPES = {
    "mlp": Shape(
        shapes.mlp,
        'input { name: "input" data_type: TYPE_FP32 dims: 64 } output { name: "y" data_type: TYPE_FP32 dims: 10 }',
        (torch.zeros(2, 64),), ((1, 1), (32, 1), (128, 1)), (),
    ),
    "resnet18": Shape(
        shapes.resnet18,
        'input { name: "input" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } '
        'output { name: "y" data_type: TYPE_FP32 dims: 1000 }',
        (torch.zeros(2, 3, 224, 224),), ((1, 1), (8, 1)), (1, 2, 4, 8),
    ),
    "encoder": Shape(
        shapes.encoder,
        'input [ { name: "input_ids" data_type: TYPE_INT64 dims: -1 allow_ragged_batch: true }, '
        '{ name: "attention_mask" data_type: TYPE_INT64 dims: -1 allow_ragged_batch: true } ] '
        'output { name: "y" data_type: TYPE_FP32 dims: 384 }',
        (_IDS, _IDS.clone()), ((1, 32), (8, 64)), (1, 2, 4, 8),
    ),
}  # fmt: skip


def export(shape: Shape, file: Path) -> None:
    """Save the model, for 1 to 128 rows, and 1 to 512 tokens of a sequence."""
    dims = {0: torch.export.Dim("rows", min=1, max=128)}
    if shape.ragged:
        dims[1] = torch.export.Dim("length", min=1, max=512)
    file.parent.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(shape.make(), shape.example, dynamic_shapes=tuple(dims for _ in shape.example))
    torch.export.save(program, file)


def config_text(shape: Shape, rows: int, parameters: Mapping[str, str]) -> str:
    entries = [f"parameters {{ key: '{key}' value {{ string_value: '{parameters[key]}' }} }}" for key in parameters]
    return "\n".join([f'backend: "pytorch" max_batch_size: {rows} dynamic_batching {{ }}', shape.io, *entries])


def config_of(shape: Shape, rows: int, parameters: Mapping[str, str]) -> ModelConfig:
    return parse_config(config_text(shape, rows, parameters), "model", "config.pbtxt")


def batch_of(shape: Shape, rows: int, length: int, seed: int = 0) -> Tensors:
    """Random inputs."""
    random = np.random.default_rng(seed)
    if shape.ragged:
        ids = random.integers(0, shapes.MINILM.vocabulary, (rows, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {"input": random.standard_normal((rows, *shape.example[0].shape[1:]), np.float32)}


# -- options -----------------------------------------------------------------------------------------------------------


def compare(shape: Shape, file: Path, names: Sequence[str], rounds: int, seconds: float) -> list[list[str]]:
    """A row for each option and size; the plain model is always among them."""
    backends: dict[str, PyTorchBackend] = {}
    for name, parameters in OPTIONS.items():
        if name not in (PLAIN, *names) or ("channels_last" in name and shape.example[0].dim() != 4):
            continue
        progress(f"loading {name}")
        if shape.ragged and "compile" in parameters:
            parameters = {**parameters, "padded_lengths": " ".join(str(length) for _, length in shape.sizes)}
        backends[name] = PyTorchBackend(config_of(shape, 128, parameters), file)
    rows = []
    for size in shape.sizes:
        batch, times = batch_of(shape, *size), {name: [math.inf] * rounds for name in backends}
        answers = {name: backend.run(batch)["y"] for name, backend in backends.items()}
        for number in range(rounds):
            progress(f"{size}: round {number + 1} of {rounds}")
            for name, backend in backends.items():
                backend.enter(False)
                times[name][number] = _best(backend, batch, seconds)
        for name in backends:
            gains = [plain / own for plain, own in zip(times[PLAIN], times[name], strict=True)]
            plain = answers[PLAIN]
            off = float(np.abs(answers[name] - plain).max() / np.abs(plain).max())
            what = f"{size[0]} rows" + (f" of {size[1]} tokens" if shape.ragged else "")
            form = "1" if name == PLAIN else spread(gains, ".2f")
            rows.append([name, what, f"{statistics.median(times[name]) * 1e3:,.3f}", form, f"{off:.0e}"])
    return rows


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that compute, and nothing else."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=die_with_parent)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def _best(backend: PyTorchBackend, batch: Tensors, seconds: float) -> float:
    """The shortest of the runs that there is time for, two at least: the others say how busy the machine was."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        backend.run(batch)
        took.append(time.perf_counter() - started)
    return min(took)


# -- server ------------------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """Requests of one row each: their tensors, and their bytes for HTTP."""

    inputs: list[Tensors]
    posts: list[bytes]


def load_of(shape: Shape, count: int) -> Load:
    lengths = np.random.default_rng(1).integers(LENGTHS[0], LENGTHS[1] + 1, count)
    inputs = [batch_of(shape, 1, int(length), seed) for seed, length in enumerate(lengths)]
    return Load(inputs, [_post(tensors) for tensors in inputs])


def _post(tensors: Tensors) -> bytes:
    names = {"int64": "INT64", "float32": "FP32"}
    head = orjson.dumps(
        {
            "inputs": [
                {
                    "name": name, "datatype": names[str(array.dtype)], "shape": array.shape,
                    "parameters": {"binary_data_size": array.nbytes},
                }
                for name, array in tensors.items()
            ],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        }
    )  # fmt: skip
    body = head + b"".join(array.tobytes() for array in tensors.values())
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return encode("POST", "/v2/models/model/infer", body, headers)


def batches_of(load: Load, rows: int) -> list[Tensors]:
    """Those that the loop runs: sorted by length, padded to the longest of each."""
    ordered = sorted(load.inputs, key=lambda tensors: next(iter(tensors.values())).shape[1])
    batches = []
    for start in range(0, len(ordered) - rows + 1, rows):
        group = ordered[start : start + rows]
        batches.append({name: _stack([tensors[name] for tensors in group]) for name in group[0]})
    return batches


def _stack(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    longest = max(array.shape[1] for array in arrays)
    if all(array.shape[1] == longest for array in arrays):
        return np.concatenate(arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays])


def loop(backend: PyTorchBackend, batches: Sequence[Tensors], rows: int, seconds: float) -> float:
    """Rows a second of whole turns through the batches, which all are of the same number of rows."""
    turns, started = 0, time.perf_counter()
    while not turns or time.perf_counter() - started < seconds:
        for batch in batches:
            backend.run(batch)
        turns += 1
    return turns * len(batches) * rows / (time.perf_counter() - started)


def through_http(address: tuple[str, int], load: Load, clients: int, seconds: float) -> tuple[float, float]:
    """Rows a second, from one end of a batch to another; and the share of the time that the lane was in the model.

    Raises:
        BenchError: an answer was not 200.
    """
    ended: list[float] = []
    wrong: list[str] = []
    stop = time.perf_counter() + seconds

    def client(number: int) -> None:
        with Client(address, timeout=60) as connection:
            turn = number
            while time.perf_counter() < stop and not wrong:
                answer = connection.ask(load.posts[turn % len(load.posts)])
                turn += clients
                if answer.status != 200:
                    wrong.append(f"{answer.status}: {answer.body[:200]!r}")
                ended.append(time.perf_counter())

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 8)
    began, spent = time.perf_counter(), _in_the_model(address)
    time.sleep(max(0.0, stop - time.perf_counter()))
    inside = (_in_the_model(address) - spent) / (time.perf_counter() - began)
    for thread in threads:
        thread.join()
    if wrong:
        raise BenchError(wrong[0])
    return _rate(sorted(ended), stop), inside


def _in_the_model(address: tuple[str, int]) -> float:
    """Seconds so far, all batches together."""
    with Client(address, timeout=60) as connection:
        (stats,) = orjson.loads(connection.ask(encode("GET", "/v2/models/model/stats")).body)["model_stats"]
    return float(sum(batch["compute_infer"]["ns"] for batch in stats["batch_stats"])) / 1e9


def _rate(ended: Sequence[float], stop: float) -> float:
    """Between two ends of batches, whose answers come in a bunch: one in the first quarter, and one before `stop`."""
    ended = [moment for moment in ended if moment < stop]
    gaps = [after - before for before, after in itertools.pairwise(ended)]
    quarter = len(gaps) // 4
    if not quarter:
        raise BenchError(f"only {len(ended)} answers came in time; give --seconds more")
    first = max(range(quarter), key=gaps.__getitem__)
    last = max(range(len(gaps) - quarter, len(gaps)), key=gaps.__getitem__)
    return (last - first) / (ended[last] - ended[first])


def share(
    shape: Shape, file: Path, threads: Sequence[int], parameters: Mapping[str, str], rounds: int, seconds: float
) -> list[list[str]]:
    """A row for each number of threads."""
    load = load_of(shape, 64 if shape.ragged else 16)
    rows = []
    alone: dict[int, list[float]] = {count: [] for count in threads}
    http: dict[int, list[float]] = {count: [] for count in threads}
    busy: dict[int, list[float]] = {count: [] for count in threads}
    with ExitStack() as stack:
        measured = []
        for count in threads:
            given = {**parameters, "INTRA_OP_THREAD_COUNT": str(count)}
            backend = PyTorchBackend(config_of(shape, MAX_ROWS, given), file)
            backend.enter(False)
            progress(f"{count} threads: looking for the best batch")
            tried = {each: loop(backend, batches_of(load, each), each, seconds / 4) for each in shape.batches}
            best = max(tried, key=tried.__getitem__)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "model" / "1").mkdir(parents=True)
            (folder / "model" / "1" / "model.pt2").write_bytes(file.read_bytes())
            (folder / "model" / "config.pbtxt").write_text(config_text(shape, best, given))
            address = "127.0.0.1", free_port()
            command = [*LAUNCHER[:-1], str(folder), "--port", str(address[1])]
            stack.enter_context(running(command, address, ready="/v2/health/ready"))
            measured.append((count, backend, best, address))
        for number in range(rounds):
            for count, backend, best, address in measured:
                progress(f"round {number + 1} of {rounds}, {count} threads")
                clients = len(load.posts) if shape.ragged else 2 * best + 2
                backend.enter(False)
                batches = batches_of(load, best)
                before = loop(backend, batches, best, seconds / 2)
                served, inside = through_http(address, load, clients, seconds)
                after = loop(backend, batches, best, seconds / 2)
                alone[count].append(statistics.mean((before, after)))
                http[count].append(served)
                busy[count].append(inside)
    for count, _, best, _ in measured:
        shares = [one / other for one, other in zip(http[count], alone[count], strict=True)]
        gains = [one / other for one, other in zip(http[count], http[threads[0]], strict=True)]
        figures = [spread(alone[count], ".1f"), spread(http[count], ".1f"), spread(shares, ".3f")]
        rows.append([str(count), str(best), *figures, spread(busy[count], ".3f"), spread(gains, ".2f")])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("options", "server"), nargs="+", default=("options", "server"))
    parser.add_argument("--shape", choices=tuple(SHAPES), nargs="+", default=tuple(SHAPES))
    parser.add_argument("--option", choices=tuple(OPTIONS), nargs="+", default=tuple(OPTIONS), metavar="NAME")
    parser.add_argument("--busy", type=int, default=0, help="processes that take cores from the options (0)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved (5)")
    parser.add_argument("--seconds", type=float, default=8, help="of the server in a round; an option has 1/20 (8)")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), help="of an operator, in the server (1 2)")
    parser.add_argument("--precision", choices=("bf16",), help="that the server computes with")
    parser.add_argument("--output", type=Path, help="write the result to this file too")
    options = parser.parse_args(arguments)
    text = [heading("bench.cpu", arguments)]
    parameters = {"precision": options.precision} if options.precision else {}
    try:
        with tempfile.TemporaryDirectory() as name:
            for each in options.shape:
                shape, file = SHAPES[each], Path(name) / each / "model.pt2"
                progress(f"exporting {each}")
                export(shape, file)
                if "options" in options.part:
                    header = ["parameters", "batch", "ms a batch", "gain", "off"]
                    with busy(options.busy):
                        found = compare(shape, file, options.option, options.rounds, options.seconds / 20)
                    text += [f"## {each}: options", table(header, found, 2)]
                if "server" in options.part and shape.batches:
                    header = [
                        "threads",
                        "best batch",
                        "rows/s alone",
                        "rows/s through HTTP",
                        "share",
                        "of the first row",
                    ]
                    found = share(shape, file, options.threads, parameters, options.rounds, options.seconds)
                    text += [f"## {each}: through the server", table(header, found, 0)]
    except BenchError as error:
        print(f"\nbench.cpu: {error}", file=sys.stderr)
        return 1
    publish("\n\n".join(text), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
