"""What batches of mixed lengths cost: sequences of 8 to 512 tokens through a small transformer, on the CPU.

    first come             batches of 32 in the order of arrival, padded to the longest of the batch
    first come, 1024       the same, but a batch ends before it has more than 1024 padded tokens
    one by one             no batches: no padding, and what every call of the model costs is paid for each sequence
    by length              the engine with ragged inputs: whoever waited longest leads, those of about its length join
    by length, fixed grid  the same, with lengths and rows padded up to a grid of shapes, as a compiled model needs it

The model is an encoder with random weights, exported once; all run that file through the engine's own backend. The
first three call the backend directly: no queue, no event loop, no futures, and the next batch is always there. The
other two are the whole engine in this process, asked in the same order by clients that each have one request under
way. They take turns, round after round, so that whatever else the machine does meets all alike. Every answer is
compared with the model's to that sequence alone.

    sequences/s    answered; the median over the rounds, with the smallest and the largest round
    tokens/s       of the sequences, without their padding
    of first come  the sequences/s divided by those of "first come" in the same round
    padding        share of the tokens that the model ran for nothing
    rows           of a batch, in the mean
    p50, p99       from a client's question to its answer, over all rounds
    oldest         the longest that a request waited until its batch began

The last three follow, for the first three, from when their batches began and ended: a client asks when it was answered.

The clients are as many as fill a batch and half of the next. With more of them the engine has more lengths to choose
from, and pads less; and everybody waits longer, in any order, since the model does no more in a second. The oldest wait
two or three times as long as the mean: a length that is rare goes when its turn to lead has come.
"""

import argparse
import asyncio
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.pytorch import PyTorchBackend
from engine.config import ModelConfig, parse_config
from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import InferRequest

from .report import heading, progress, publish, spread, table
from .servers import BenchError
from .shapes import SEED, Encoder, Size
from .shapes import encoder as make_encoder

MAX_ROWS = 32
FILE = "model.pt2"
TOLERANCE = 1e-4  # between answers of about 1, in float32, from batches of different shapes
MAX_TOKENS = 1024
BASELINE = "first come"
DIRECT = {BASELINE: 0, f"first come, {MAX_TOKENS}": MAX_TOKENS, "one by one": 1}  # most padded tokens of a batch

# A batch of 1024 tokens keeps what a layer computes near the core; in a larger one each token takes longer.
# The lengths have no grid: each is a kind of its own, and the engine joins those that cost the least padding. Grids of
# 8 to 64 tokens were no faster, and padded more from 16 on. At most a tenth of a batch is padding: on a CPU tokens are
# what takes time, so that costs nothing, and it holds when other work on the machine makes each batch look dearer.
BY_LENGTH = {"max_batch_tokens": str(MAX_TOKENS), "max_padding": "0.1"}
FIXED_GRID = {
    "max_batch_tokens": str(MAX_TOKENS),
    "padded_lengths": "16 32 48 64 80 96 128 160 192 256 320 384 448 512",
    "padded_rows": "1 2 4 8 16 32",
}
VARIANTS: dict[str, Mapping[str, str]] = {"by length": BY_LENGTH, "by length, fixed grid": FIXED_GRID}

CONFIG = """\
backend: "pytorch"
max_batch_size: %d
input [
  { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] allow_ragged_batch: true },
  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] allow_ragged_batch: true }
]
output { name: "embedding" data_type: TYPE_FP32 dims: [ %d ] }
dynamic_batching {}
"""

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


# -- the model ---------------------------------------------------------------------------------------------------------


def export(encoder: Encoder, longest: int, path: Path) -> None:
    """Save the encoder for batches of any size up to MAX_ROWS and any length up to `longest`.

    Raises:
        BenchError: the export fixed one of the two.
    """
    rows, length = torch.export.Dim("rows", min=1, max=MAX_ROWS), torch.export.Dim("length", min=1, max=longest)
    # A size of 1 would be taken for fixed, and one tensor given twice for one input.
    example = torch.ones(3, 7, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64)
    names = "input_ids", "attention_mask"
    program = torch.export.export(encoder, example, dynamic_shapes={name: {0: rows, 1: length} for name in names})
    for node in program.graph.nodes:
        if node.name in names:
            fixed = [size for size in node.meta["val"].shape if isinstance(size, int)]
            if fixed:
                raise BenchError(f"the exported model takes {node.name} of size {fixed} only")
    torch.export.save(program, path)
    saved = torch.export.load(path).module()
    for shape in ((1, 1), (1, longest), (MAX_ROWS, 1), (MAX_ROWS, longest), (5, 11)):
        ids = torch.randint(0, encoder.tokens.num_embeddings, shape)
        apart = float((saved(ids, torch.ones_like(ids)) - encoder(ids, torch.ones_like(ids))).abs().max())
        if not apart < TOLERANCE:
            raise BenchError(f"the exported model's answer to a batch of shape {list(shape)} is {apart} off")


def write_repository(
    folder: Path, size: Size, variants: Mapping[str, Mapping[str, str]]
) -> tuple[Encoder, dict[str, ModelConfig]]:
    """A repository with a model for each variant, all of them one file; returns the encoder in it, and their configs.

    Raises:
        BenchError: the exported model is not the encoder.
    """
    encoder = make_encoder(size)
    configs, file = {}, folder / FILE
    export(encoder, size.longest, file)
    for number, (variant, parameters) in enumerate(variants.items()):
        name = f"encoder{number}"
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / FILE).hardlink_to(file)
        entries = [f'parameters {{ key: "{key}" value {{ string_value: "{parameters[key]}" }} }}' for key in parameters]
        text = CONFIG % (MAX_ROWS, size.width) + "\n".join(entries)
        (folder / name / "config.pbtxt").write_text(text)
        configs[variant] = parse_config(text, name, "config.pbtxt")
    return encoder, configs


# -- the load ----------------------------------------------------------------------------------------------------------


def make_sequences(count: int, size: Size, median: float, sigma: float) -> list[Ids]:
    """Ids at random; their number is log-normal, cut off at 8 and the longest that the model takes."""
    random = np.random.default_rng(SEED)
    lengths = np.clip(np.rint(random.lognormal(math.log(median), sigma, count)), min(8, size.longest), size.longest)
    return [random.integers(0, size.vocabulary, int(length)) for length in lengths]


def alone(encoder: Encoder, sequences: Sequence[Ids]) -> Floats:
    """The encoder's answer to each sequence by itself."""
    with torch.inference_mode():
        rows = [torch.from_numpy(sequence)[None] for sequence in sequences]
        return torch.cat([encoder(row, torch.ones_like(row)) for row in rows]).numpy()


@dataclass
class Measured:
    """What one way of batching did. Times in seconds, over all rounds but for `rates`.

    Attributes:
        rates: sequences a second, by round.
        latencies: of each request.
        oldest: the longest wait of a request until its batch began.
        padding: share of the work that was padding.
        rows: of a batch, in the mean.
        apart: the largest difference of an answer from the encoder's to that sequence alone.
    """

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    oldest: float = 0.0
    padding: float = 0.0
    rows: float = 0.0
    apart: float = 0.0

    def check(self, name: str, answers: Floats, expected: Floats) -> None:
        """Raises BenchError if an answer is not what is expected."""
        apart = float(np.abs(answers - expected).max())
        if not apart < TOLERANCE:  # NaN is not
            raise BenchError(f"{name}: an answer is {apart} off the model's to that sequence alone")
        self.apart = max(self.apart, apart)


def in_order(sequences: Sequence[Ids], max_tokens: int) -> list[list[Ids]]:
    """Batches of MAX_ROWS, as they come; of at most `max_tokens` padded tokens if there are two rows, 0 for any."""
    batches: list[list[Ids]] = [[]]
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence))
        rows = len(batches[-1]) + 1
        if rows > MAX_ROWS or (rows > 1 and 0 < max_tokens < rows * longest):
            batches.append([])
            longest = len(sequence)
        batches[-1].append(sequence)
    return batches


def directly(
    backend: PyTorchBackend, sequences: Sequence[Ids], max_tokens: int, clients: int, measured: Measured
) -> Floats:
    """Run the sequences as they come."""
    batches = in_order(sequences, max_tokens)
    answers, times = [], []
    cost = 0
    backend.enter(False)  # this thread gets as many threads for an operator as the lane's has
    started = time.perf_counter()
    for batch in batches:
        began = time.perf_counter()
        shape = len(batch), max(map(len, batch))
        ids, mask = (backend.empty(shape, np.dtype("<i8")) for _ in "im")
        for row, sequence in enumerate(batch):
            length = len(sequence)
            ids[row, :length], ids[row, length:] = sequence, 0
            mask[row, :length], mask[row, length:] = 1, 0
        answers.append(backend.run({"input_ids": ids, "attention_mask": mask})["embedding"])
        times += [(began - started, time.perf_counter() - started)] * len(batch)
        cost += shape[0] * shape[1]
    measured.rates.append(len(sequences) / times[-1][1])
    measured.padding = 1 - sum(map(len, sequences)) / cost
    measured.rows = len(sequences) / len(batches)
    for number, (began, ended) in enumerate(times):
        asked = times[number - clients][1] if number >= clients else 0.0
        measured.latencies.append(ended - asked)
        measured.oldest = max(measured.oldest, began - asked)
    return np.concatenate(answers)


async def through_engine(
    engine: LocalEngine, model: str, sequences: Sequence[Ids], clients: int, measured: Measured
) -> Floats:
    """Ask for the sequences, `clients` at a time."""
    requests = [
        InferRequest(model, "", {"input_ids": sequence[None], "attention_mask": np.ones_like(sequence)[None]})
        for sequence in sequences
    ]
    answers: list[Floats] = [np.empty(0, np.float32)] * len(requests)
    numbers = iter(range(len(requests)))
    answered = 0

    async def client() -> None:
        nonlocal answered
        for number in numbers:
            began = time.perf_counter()
            response = await engine.infer(requests[number])
            measured.latencies.append(time.perf_counter() - began)
            answers[number] = response.outputs["embedding"]
            answered += 1
            if answered % 64 == 0:  # the report holds the latest batches only, no fewer than these
                await look()

    async def look() -> dict[str, Any]:
        batches: dict[str, Any] = (await engine.batching(model))["batches"]
        measured.oldest = max([measured.oldest, *(batch["waited"] for batch in batches["latest"])])
        return batches

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    measured.rates.append(len(requests) / (time.perf_counter() - started))
    batches = await look()
    measured.padding = batches["padding"]
    sizes = {int(rows): count for rows, count in batches["by_rows"].items()}
    measured.rows = sum(rows * count for rows, count in sizes.items()) / sum(sizes.values())
    return np.concatenate(answers)


async def measure(
    folder: Path,
    encoder: Encoder,
    configs: Mapping[str, ModelConfig],
    sequences: Sequence[Ids],
    clients: int,
    rounds: int,
) -> dict[str, Measured]:
    """What runs directly, and each variant of the engine's, in turn.

    Raises:
        BenchError: an answer was wrong.
    """
    progress(f"asking the model for {len(sequences)} sequences alone")
    expected = alone(encoder, sequences)
    backend = PyTorchBackend(next(iter(configs.values())), folder / FILE)
    engine = LocalEngine(Settings(models=str(folder), queue_rows=max(1024, clients)))
    progress("starting the engine, which warms every shape of the grid")
    await engine.start()
    found = {name: Measured() for name in (*DIRECT, *configs)}
    try:
        for number in range(rounds):
            for name, measured in found.items():
                progress(f"round {number + 1} of {rounds}: {name}")
                if name in DIRECT:
                    answers = directly(backend, sequences, DIRECT[name], clients, measured)
                else:
                    answers = await through_engine(engine, configs[name].name, sequences, clients, measured)
                measured.check(name, answers, expected)
    finally:
        await engine.stop()
    return found


# -- the result --------------------------------------------------------------------------------------------------------


def render(found: Mapping[str, Measured], sequences: Sequence[Ids]) -> str:
    baseline, tokens = found[BASELINE].rates, sum(map(len, sequences)) / len(sequences)
    rows = []
    for name, measured in found.items():
        ranked = sorted(measured.latencies)
        p50, p99 = (ranked[min(len(ranked) - 1, int(len(ranked) * share))] for share in (0.5, 0.99))
        ratios = [rate / base for rate, base in zip(measured.rates, baseline, strict=True)]
        rows.append(
            [
                name,
                spread(measured.rates, ",.0f"),
                f"{statistics.median(measured.rates) * tokens:,.0f}",
                "1" if name == BASELINE else spread(ratios, ".2f"),
                f"{measured.padding:.1%}",
                f"{measured.rows:.1f}",
                *(f"{seconds * 1e3:,.0f}" for seconds in (p50, p99, measured.oldest)),
            ]
        )
    header = ["batches", "sequences/s", "tokens/s", "of first come", "padding", "rows", "p50 ms", "p99 ms", "oldest ms"]
    return table(header, rows, 1)


def notes(
    found: Mapping[str, Measured],
    configs: Mapping[str, ModelConfig],
    variants: Mapping[str, Mapping[str, str]],
    sequences: Sequence[Ids],
    clients: int,
) -> str:
    lengths, rounds = sorted(map(len, sequences)), len(found[BASELINE].rates)
    apart = max(measured.apart for measured in found.values())
    lines = [
        f"{rounds} interleaved rounds of {len(lengths)} sequences, {clients} clients. Lengths: {lengths[0]} to "
        f"{lengths[-1]} tokens, mean {statistics.mean(lengths):.0f}, median {statistics.median(lengths):.0f}, one in "
        f"ten at least {lengths[len(lengths) * 9 // 10]}. No answer is more than {apart:.0e} off that to its sequence "
        "alone. torch uses "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} for an operator.",
        "",
    ]
    for name, config in configs.items():
        bound, oldest = config.policy.patience * 1e3, found[name].oldest * 1e3
        lines.append(
            f"- {name}: {', '.join(f'`{key}` {value}' for key, value in variants[name].items())}. Ageing bound "
            f"(`patience_ms`): {bound:,.0f} ms, {'kept' if oldest < bound else 'NOT KEPT'}: the oldest waited "
            f"{oldest:,.0f} ms."
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.ragged", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved (3)")
    parser.add_argument("--sequences", type=int, default=512, help="in a round (512)")
    parser.add_argument("--clients", type=int, default=48, help="requests under way (48)")
    parser.add_argument("--median", type=float, default=64, help="of the lengths (64)")
    parser.add_argument("--sigma", type=float, default=0.8, help="standard deviation of their logarithm (0.8)")
    parser.add_argument("--output", type=Path, help="write the result to this file too")
    options = parser.parse_args(arguments)
    if options.clients < MAX_ROWS:
        parser.error(f"--clients: must fill a batch, {MAX_ROWS}, got {options.clients}")
    size = Size()
    sequences = make_sequences(options.sequences, size, options.median, options.sigma)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            progress("exporting the model")
            encoder, configs = write_repository(folder, size, VARIANTS)
            found = asyncio.run(measure(folder, encoder, configs, sequences, options.clients, options.rounds))
    except BenchError as error:
        print(f"\nbench.ragged: {error}", file=sys.stderr)
        return 1
    text = [heading("bench.ragged", arguments), render(found, sequences)]
    publish("\n\n".join([*text, notes(found, configs, VARIANTS, sequences, options.clients)]), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
