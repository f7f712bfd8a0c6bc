"""Whether models that come and go leave memory behind: `python -m bench.reload` loads and unloads one a thousand times.

The resident memory of the process is read after each cycle: load, one request, unload, and the copy is let go. It fails
if the second half of the cycles reaches 1 % higher than the first half did.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import DATATYPES, InferRequest

PAGE = 4096

PYTHON = """
import numpy as np
import triton_python_backend_utils as pb_utils

TABLE = np.ones((1024, 1024))  # 8 MiB that a leak would show


class TritonPythonModel:
    def initialize(self, args):
        self.me = self  # a cycle
        self.table = TABLE.copy()

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)]))
        return answers
"""

CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] } ]
dynamic_batching { }
"""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


async def cycle(engine: LocalEngine, model: str, cycles: int) -> list[int]:
    """Load and unload a model so often. Returns the resident memory after each."""
    seen = []
    for number in range(cycles):
        await engine.load(model)
        inputs = {
            name: np.zeros([1, *spec.shape[1:]], DATATYPES[spec.datatype])
            for name, spec in engine.metadata(model).inputs.items()
        }
        await engine.infer(InferRequest(model, "", inputs))
        await engine.unload(model)
        while engine._retiring:
            await asyncio.wait(engine._retiring)
        seen.append(resident())
        if sys.stderr.isatty():
            print(f"\r{model}: {number + 1} of {cycles}, {seen[-1] / 2**20:.0f} MiB", end="", file=sys.stderr)
    return seen


async def measure(cycles: int) -> dict[str, list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "scripted"
        (own / "1").mkdir(parents=True)
        (own / "config.pbtxt").write_text(CONFIG)
        (own / "1" / "model.py").write_text(PYTHON)
        engine = LocalEngine(Settings(models=f"models:{folder}", model_control="explicit"))
        await engine.start()
        try:
            return {
                "digits (torch.export)": await cycle(engine, "digits", cycles),
                "a Python model with 16 MiB": await cycle(engine, "scripted", cycles),
            }
        finally:
            await engine.stop()


def draw(seen: dict[str, list[int]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for name, sizes in seen.items():
        axes.plot(range(1, len(sizes) + 1), [size / 2**20 for size in sizes], label=name)
    axes.set(xlabel="loads and unloads", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.reload")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="draw the picture into this folder")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    seen = asyncio.run(measure(options.cycles))
    print(f"`python -m bench.reload --cycles {options.cycles}`: {time.monotonic() - started:.0f} s\n")
    print(
        "| model | after 10 | a quarter | half | three quarters | the end |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    failed = False
    for name, sizes in seen.items():
        at = [min(10, len(sizes)) - 1, *(len(sizes) * quarter // 4 - 1 for quarter in (1, 2, 3, 4))]
        print(f"| {name} | " + " | ".join(f"{sizes[place] / 2**20:.0f} MiB" for place in at) + " |")
        half = len(sizes) // 2
        failed |= max(sizes[half:]) > max(sizes[:half]) + 0.01 * max(sizes)
    if options.out is not None:
        draw(seen, options.out / "reload-memory.png")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
