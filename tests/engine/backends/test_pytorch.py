"""The PyTorch backend: exported and TorchScript forms give what the module itself gives, on the device asked for."""

import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batching.errors import OutOfMemory
from engine.backends import pytorch
from engine.backends.pytorch import PyTorchBackend
from engine.config import ModelConfig, parse_config
from engine.errors import ConfigError, InvalidInput

TWO_IN_TWO_OUT = """
backend: "pytorch"
max_batch_size: 8
input [ { name: "right" data_type: TYPE_FP32 dims: [ 3 ] }, { name: "left" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "difference" data_type: TYPE_FP32 dims: [ 3 ] }, { name: "sum" data_type: TYPE_FP32 dims: [ 3 ] } ]
"""


class Net(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left - right, left + right


class DictNet(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": left + right, "difference": left - right}


def config(text: str = TWO_IN_TWO_OUT) -> ModelConfig:
    return parse_config(text, "m", "config.pbtxt")


def export(folder: Path, net: torch.nn.Module, most: int = 64) -> Path:
    rows = torch.export.Dim("rows", min=1, max=most)
    program = torch.export.export(net, (torch.zeros(2, 3), torch.zeros(2, 3)), dynamic_shapes=({0: rows}, {0: rows}))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


def script(folder: Path, net: torch.nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(net), str(folder / "model.pt"))
    return folder / "model.pt"


def run(backend: PyTorchBackend, **arrays: Any) -> dict[str, Any]:
    inputs = {}
    for name, array in arrays.items():
        inputs[name] = backend.empty(array.shape, array.dtype)
        np.copyto(inputs[name], array)
    return backend.run(inputs)


@pytest.mark.parametrize("save", [export, script])
@pytest.mark.parametrize("net", [Net(), DictNet()])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_form_answers_like_the_module(tmp_path: Path, save: Any, net: torch.nn.Module, rows: int) -> None:
    """Inputs are matched by the names of forward's arguments, not by the config's order; outputs by name or order."""
    backend = PyTorchBackend(config(), save(tmp_path, net))
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((rows, 3), np.float32) for _ in range(2))
    outputs = run(backend, left=left, right=right)
    np.testing.assert_array_equal(outputs["difference"], left - right)
    np.testing.assert_array_equal(outputs["sum"], left + right)


def test_names_by_index(tmp_path: Path) -> None:
    """Triton's <anything>__<index> gives the position, whatever the order of the config."""
    text = TWO_IN_TWO_OUT
    for name, indexed in (("right", "B__1"), ("left", "A__0"), ("difference", "D__0"), ("sum", "S__1")):
        text = text.replace(f'"{name}"', f'"{indexed}"')
    backend = PyTorchBackend(config(text), export(tmp_path, Net()))
    ones = np.ones((1, 3), "<f4")
    outputs = run(backend, A__0=3 * ones, B__1=ones)
    assert (outputs["D__0"][0, 0], outputs["S__1"][0, 0]) == (2, 4)


class Reusing(torch.nn.Module):
    """Writes every answer into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.out: torch.Tensor
        self.register_buffer("out", torch.zeros(8, 3))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.out[: left.size(0)].copy_(left + right)
        return out, out


def test_answers_do_not_alias_the_model(tmp_path: Path) -> None:
    """A model that answers with a buffer of its own does not change what it answered before."""
    backend = PyTorchBackend(config(), script(tmp_path, Reusing()))
    ones = np.ones((1, 3), "<f4")
    first = run(backend, left=ones, right=ones)
    run(backend, left=9 * ones, right=9 * ones)
    assert first["sum"][0, 0] == 2


class Fussy(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if bool(left.sum() > 100):
            raise ValueError("too big: 100 is the most")
        return left, right


def test_a_script_that_raises_says_what_it_said(tmp_path: Path) -> None:
    """Of TorchScript's error the caller gets what the model said, not what the interpreter says of itself."""
    backend = PyTorchBackend(config(), script(tmp_path, Fussy()))
    ones = np.ones((1, 3), "<f4")
    with pytest.raises(RuntimeError, match=r"^ValueError: too big: 100 is the most$"):
        run(backend, left=99 * ones, right=ones)


class Picky(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.mm(left, right), right


def test_a_script_whose_operator_raises_says_what_that_said(tmp_path: Path) -> None:
    """The same for an error of torch's own."""
    backend = PyTorchBackend(config(), script(tmp_path, Picky()))
    ones = np.ones((2, 3), "<f4")
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied \(2x3 and 2x3\)$"):
        run(backend, left=ones, right=ones)


def test_a_size_beyond_what_was_exported_is_the_callers_error(tmp_path: Path) -> None:
    """A variable dimension outside the exported range is bad input, with the bound, and no failure of the model."""
    width = torch.export.Dim("width", min=2, max=6)
    shapes = ({0: torch.export.Dim("rows", min=1, max=64), 1: width},) * 2
    program = torch.export.export(Net(), (torch.zeros(2, 3), torch.zeros(2, 3)), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    backend = PyTorchBackend(config(TWO_IN_TWO_OUT.replace("[ 3 ]", "[ -1 ]")), tmp_path / "model.pt2")
    four, seven = np.ones((1, 4), "<f4"), np.ones((1, 7), "<f4")
    assert run(backend, left=four, right=four)["sum"].shape == (1, 4)
    with pytest.raises(InvalidInput, match=r"exported for inputs with left.size\(\)\[1\] <= 6"):
        run(backend, left=seven, right=seven)


def test_out_of_memory_holds_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is the queue's, in one line, and the tensors of the failed run are gone before the cache is emptied."""
    backend = PyTorchBackend(config(), export(tmp_path, Net()))
    used: list[weakref.ref[torch.Tensor]] = []
    left: list[torch.Tensor | None] = []

    def fail(inputs: object) -> dict[str, Any]:
        activations = torch.zeros(3)
        used.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nsecret second line")

    monkeypatch.setattr(backend, "_run", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(used[0]()))
    with pytest.raises(OutOfMemory, match=r"^CUDA out of memory. Tried to allocate 20.00 MiB$") as raised:
        run(backend, left=np.ones((1, 3), "<f4"), right=np.ones((1, 3), "<f4"))
    assert left == [None]
    assert raised.value.__context__ is None


def test_threads_are_set_for_each_calling_thread(tmp_path: Path) -> None:
    """On the event loop an operator uses one thread, in the lane's thread what `enter` gave that one."""
    backend = PyTorchBackend(config(), export(tmp_path, Net()))
    before = torch.get_num_threads()
    try:
        backend.enter(True)
        assert torch.get_num_threads() == 1
        backend.enter(False)
        assert torch.get_num_threads() == pytorch._THREADS
    finally:
        torch.set_num_threads(before)


def test_answers_do_not_alias_the_batch(tmp_path: Path) -> None:
    """What one run answered is not written over by the next."""
    backend = PyTorchBackend(config(), export(tmp_path, Net()))
    ones = np.ones((1, 3), "<f4")
    first = run(backend, left=ones, right=ones)
    run(backend, left=9 * ones, right=9 * ones)
    assert first["sum"][0, 0] == 2


def spoil(folder: Path, case: str) -> tuple[str, Path]:
    if case == "pickle":
        torch.save({"weights": torch.zeros(2)}, folder / "model.pt")
        return TWO_IN_TWO_OUT, folder / "model.pt"
    if case in ("model.pt", "model.pt2"):
        (folder / case).write_bytes(b"no model")
        return TWO_IN_TWO_OUT, folder / case
    file = export(folder, Net(), most=4 if case == "rows" else 64)
    if case == "rows":
        return TWO_IN_TWO_OUT, file
    if case == "arguments":
        return TWO_IN_TWO_OUT.replace(', { name: "left" data_type: TYPE_FP32 dims: [ 3 ] }', ""), file
    if case == "indices":
        return TWO_IN_TWO_OUT.replace('"right"', '"A__0"').replace('"left"', '"B__2"'), file
    if case == "suffix":
        return TWO_IN_TWO_OUT, file.rename(folder / "model.bin")
    return TWO_IN_TWO_OUT + "instance_group { kind: KIND_GPU gpus: 99 }", file


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("model.pt2", "model.pt2: cannot be loaded"),
        ("model.pt", "model.pt: cannot be loaded"),
        ("pickle", "model.pt: cannot be loaded"),
        ("arguments", r"takes \['left', 'right'\], but its config lists the inputs \['right'\]"),
        ("rows", r"does not take inputs of shape \[\[8, 3\].*max_batch_size 8.*dynamic_shapes"),
        ("indices", "must end in __0 to __1"),
        ("suffix", r"model.bin: a PyTorch model is a .pt2"),
        ("device", r"model 'm': instance_group asks for cuda:99, but \d+ CUDA devices"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, case: str, text: str) -> None:
    """A file that is no model, a config that does not match it, a device that is not there: refused at load."""
    given, file = spoil(tmp_path, case)
    with pytest.raises(ConfigError, match=text):
        PyTorchBackend(config(given), file)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_answers_like_the_cpu(tmp_path: Path) -> None:
    """On a GPU a batch goes through pinned memory and a stream of its own, and gives what the CPU gives."""
    file = export(tmp_path, Net())
    cpu = PyTorchBackend(config(TWO_IN_TWO_OUT + "instance_group { kind: KIND_CPU }"), file)
    gpu = PyTorchBackend(config(TWO_IN_TWO_OUT + "instance_group { kind: KIND_GPU }"), file)
    assert torch.from_numpy(gpu.empty((2, 3), np.dtype("<f4"))).is_pinned()
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = (rng.standard_normal((8, 3), np.float32) for _ in range(2))
        one, other = run(cpu, left=left, right=right), run(gpu, left=left, right=right)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6)
