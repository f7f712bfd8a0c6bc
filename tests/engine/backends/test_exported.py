"""Programs of torch.export made faster: each way answers as the module does, as far as its datatype can, or is refused.

What compiles needs a C++ compiler, and is skipped without one.
"""

import copy
import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.backends import exported
from engine.backends.pytorch import PyTorchBackend
from engine.config import ModelConfig, parse_config
from engine.errors import ConfigError, InvalidInput

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (apt install g++)")

# Largest difference of an answer, as a share of the largest answer: bfloat16 has 8 bits, and 2^-8 is 0.004.
EXACT, FLOAT32, BFLOAT16 = 0.0, 1e-5, 0.02


class Pictures(nn.Module):
    """What a classifier of pictures is made of; `view` needs the order of memory that it was written for."""

    def __init__(self) -> None:
        super().__init__()
        self.convolved = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.last = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.convolved(x).view(-1, 8 * 16))
        return result


class Sequences(nn.Module):
    """Two inputs, of which the second says what of the first counts; answers by name."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.linear, self.norm = nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        states = self.norm(self.linear(self.tokens(ids)))
        weight = mask.unsqueeze(2).float()
        return {"count": mask.sum(1, keepdim=True), "mean": (states * weight).sum(1) / weight.sum(1)}


class Elementwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Counting(nn.Module):
    """Has a buffer of its own that it writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.seen


PICTURES = (
    'input { name: "x" data_type: TYPE_FP32 dims: [ 3, 4, 4 ] } output { name: "y" data_type: TYPE_FP32 dims: 5 }'
)
VECTORS = 'input { name: "x" data_type: TYPE_FP32 dims: 3 } output { name: "y" data_type: TYPE_FP32 dims: 3 }'
SEQUENCES = """
input [ { name: "ids" data_type: TYPE_INT64 dims: -1 allow_ragged_batch: true },
        { name: "mask" data_type: TYPE_INT64 dims: -1 allow_ragged_batch: true } ]
output [ { name: "mean" data_type: TYPE_FP32 dims: 16 }, { name: "count" data_type: TYPE_INT64 dims: 1 } ]
"""


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def config(text: str, **parameters: str) -> ModelConfig:
    entries = [f"parameters {{ key: '{key}' value {{ string_value: '{parameters[key]}' }} }}" for key in parameters]
    return parse_config(
        'backend: "pytorch" max_batch_size: 8 dynamic_batching { }' + text + "\n".join(entries), "m", "c"
    )


def save(folder: Path, net: nn.Module, *example: Tensor, length: bool = False) -> Path:
    """Export with 1 to 8 rows and, if `length`, a second dimension of 1 to 32."""
    dims = {0: torch.export.Dim("rows", min=1, max=8)}
    if length:
        dims[1] = torch.export.Dim("length", min=1, max=32)
    program = torch.export.export(net, example, dynamic_shapes=tuple(dims for _ in example))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


def pictures(folder: Path) -> tuple[nn.Module, Path]:
    net = Pictures().eval().requires_grad_(False)
    net.convolved(torch.randn(4, 3, 4, 4))
    return net, save(folder, net, torch.zeros(2, 3, 4, 4))


def sequences(folder: Path) -> tuple[nn.Module, Path]:
    net = Sequences().eval().requires_grad_(False)
    ids = torch.ones(3, 7, dtype=torch.int64)
    return net, save(folder, net, ids, torch.ones_like(ids), length=True)


def apart(got: np.ndarray[Any, Any], expected: Tensor) -> float:
    return float(np.abs(got - expected.numpy()).max() / expected.abs().max())


FORCED = {"precision": "bf16-emulated"}  # bf16 on any machine that tests this


@pytest.mark.parametrize(
    ("parameters", "tolerance"),
    [
        ({}, EXACT),
        ({"INFERENCE_MODE": "false"}, EXACT),
        ({"channels_last": "true"}, FLOAT32),
        ({"channels_last": "false"}, EXACT),
        (FORCED, BFLOAT16),
        (FORCED | {"channels_last": "true"}, BFLOAT16),
        pytest.param({"compile": "true"}, FLOAT32, marks=needs_compiler),
        pytest.param(FORCED | {"compile": "true"}, BFLOAT16, marks=needs_compiler),
    ],
)
def test_each_option_answers_like_the_module(tmp_path: Path, parameters: dict[str, str], tolerance: float) -> None:
    """In its own datatype, for one row, a few and the most; with no option bit for bit."""
    net, file = pictures(tmp_path)
    backend = PyTorchBackend(config(PICTURES, **parameters), file)
    backend.enter(True)
    for rows in (1, 3, 8):
        x = torch.randn(rows, 3, 4, 4)
        answer = backend.run({"x": x.numpy()})["y"]
        assert answer.dtype == np.float32
        assert answer.flags.c_contiguous
        assert apart(answer, net(x)) <= tolerance
    backend.close()


@pytest.mark.parametrize(
    ("parameters", "tolerance"),
    [({}, EXACT), (FORCED, BFLOAT16), pytest.param({"compile": "true"}, FLOAT32, marks=needs_compiler)],
)
def test_sequences_and_outputs_by_name(tmp_path: Path, parameters: dict[str, str], tolerance: float) -> None:
    """Two inputs of a grid of lengths, a dict of outputs; an output of whole numbers is what it was."""
    net, file = sequences(tmp_path)
    backend = PyTorchBackend(config(SEQUENCES, padded_lengths="8 16", **parameters), file)
    for rows, length in ((1, 8), (8, 16)):
        ids, mask = torch.randint(0, 50, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
        answer = backend.run({"ids": ids.numpy(), "mask": mask.numpy()})
        assert apart(answer["mean"], net(ids, mask)["mean"]) <= tolerance
        assert answer["count"].tolist() == [[length]] * rows


def test_bfloat16_is_what_is_computed_with(tmp_path: Path) -> None:
    """An answer differs from the module's, and weights of products are kept in bfloat16 alone."""
    net, file = pictures(tmp_path)
    backend = PyTorchBackend(config(PICTURES, **FORCED), file)
    x = torch.randn(8, 3, 4, 4)
    assert apart(backend.run({"x": x.numpy()})["y"], net(x)) > FLOAT32
    shapes = {tuple(value.shape): value.dtype for value in backend._module.args}  # type: ignore[attr-defined]
    assert (shapes[8, 3, 3, 3], shapes[5, 128]) == (torch.bfloat16, torch.bfloat16)


def test_channels_last_lays_out_weights_and_inputs(tmp_path: Path) -> None:
    """Tensors of four dimensions, and no others."""
    _, file = pictures(tmp_path)
    backend = PyTorchBackend(config(PICTURES, channels_last="true"), file)
    weights = [value for value in backend._module.args if value.dim() == 4]  # type: ignore[attr-defined]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert "contiguous.default(x, memory_format = torch.channels_last)" in backend._module.func.__self__.code  # type: ignore[attr-defined]


@pytest.mark.parametrize("parameters", [{}, FORCED])
def test_lengths_without_a_grid_are_still_checked(tmp_path: Path, parameters: dict[str, str]) -> None:
    """What the program was not exported for is the caller's error, with the bound, in each way that it is run."""
    _, file = sequences(tmp_path)
    backend = PyTorchBackend(config(SEQUENCES, **parameters), file)
    long = np.ones((1, 33), np.int64)
    assert backend.run({"ids": long[:, :32], "mask": long[:, :32]})["count"].tolist() == [[32]]
    with pytest.raises(InvalidInput, match=r"exported for inputs with ids.size\(\)\[1\] <= 32"):
        backend.run({"ids": long, "mask": long})


def test_a_grid_beyond_what_was_exported_is_refused(tmp_path: Path) -> None:
    """At load, with the shape and the bound: nothing checks it later."""
    _, file = sequences(tmp_path)
    with pytest.raises(ConfigError, match=r"does not take inputs of shape \[\[1, 64\], \[1, 64\]\].* <= 32"):
        PyTorchBackend(config(SEQUENCES, padded_lengths="8 64"), file)


def test_a_model_keeps_what_it_writes(tmp_path: Path) -> None:
    """A buffer that changes with every call does so, alone and when its operators were rewritten."""
    net = Counting()
    file = save(tmp_path, copy.deepcopy(net), torch.zeros(2, 3))
    for parameters in ({}, {"channels_last": "true"}):
        backend = PyTorchBackend(config(VECTORS, **parameters), file)
        answers = [backend.run({"x": np.zeros((1, 3), np.float32)})["y"][0, 0] for _ in range(3)]
        assert answers == [1, 2, 3]


def test_weights_in_another_datatype_leave_nothing_of_the_old(tmp_path: Path) -> None:
    """The program, whose weights are not used any more, goes when it was converted."""
    _, file = pictures(tmp_path)
    program = torch.export.load(file)
    weights = [weakref.ref(weight) for weight in program.parameters() if weight.dim() > 1]
    backend = PyTorchBackend(config(PICTURES, **FORCED), file)
    function = exported.function(program, config(PICTURES, **FORCED), 1)
    del program
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)
    x = np.ones((2, 3, 4, 4), np.float32)
    np.testing.assert_array_equal(function(torch.from_numpy(x))[0].numpy(), backend.run({"x": x})["y"])


def test_bfloat16_is_refused_where_the_cpu_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be slower: the error names the CPU, what it lacks, and how to have it all the same."""
    _, file = pictures(tmp_path)
    able = {"cpu_name": "Old CPU", "architecture": "x86_64", "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(able))
    with pytest.raises(
        ConfigError, match=r"model 'm': parameters.precision: this CPU \(Old CPU\) has none of avx512_bf16, amx_bf16,"
        " .*bf16-emulated.* got 'bf16'"
    ):  # fmt: skip
        PyTorchBackend(config(PICTURES, precision="bf16"), file)
    PyTorchBackend(config(PICTURES, **FORCED), file)
    able["avx512_bf16"] = True
    PyTorchBackend(config(PICTURES, precision="bf16"), file)


def test_bfloat16_is_refused_where_it_would_change_nothing(tmp_path: Path) -> None:
    """A model without a product of float32 is as it was, and its owner is told."""
    file = save(tmp_path, Elementwise(), torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"parameters.precision: .* no matrix product and no convolution of float32"):
        PyTorchBackend(config(VECTORS, **FORCED), file)


@pytest.mark.parametrize(
    ("text", "parameters", "error"),
    [
        (PICTURES, {"compile": "true", "channels_last": "on"}, r"channels_last: the compiler chooses .* got 'on'"),
        (SEQUENCES, {"compile": "true"}, r"compile: .* parameters.padded_lengths, got 'true'"),
        (PICTURES.replace("4, 4", "-1, 4"), {"compile": "true"}, r"compile: .* dims without -1"),
        (PICTURES, {"TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"options": {}}'}, "with parameters.compile true, .* got"),
        (
            PICTURES, {"compile": "true", "TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"mode": "max-autotune"}'},
            "TORCH_COMPILE_OPTIONAL_PARAMETERS: may have 'options', .* nothing else, got '{\"mode\"",
        ),
        (
            PICTURES, {"compile": "true", "TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"options": {"frezing": true}}'},
            "torch._inductor.config has no 'frezing', got",
        ),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(tmp_path: Path, text: str, parameters: dict[str, str], error: str) -> None:
    """Refused before anything is compiled, with parameter and value."""
    _, file = sequences(tmp_path) if text is SEQUENCES else pictures(tmp_path)
    with pytest.raises(ConfigError, match=f"model 'm': parameters.*{error}"):
        PyTorchBackend(config(text, **parameters), file)


@pytest.mark.parametrize("key", ["precision", "channels_last", "compile"])
def test_what_a_model_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Not a script, and not on a GPU."""
    given = config(PICTURES, **{key: "bf16-emulated" if key == "precision" else "true"})
    with pytest.raises(ConfigError, match=f"parameters.{key}: model.pt is not of torch.export; save the model as"):
        PyTorchBackend(given, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=f"parameters.{key}: is for models on the CPU, and this one is on cuda:0; .*"):
        exported.check_options(given, tmp_path / "model.pt2", torch.device("cuda:0"))


def test_without_a_compiler(tmp_path: Path) -> None:
    """The error says what to install."""
    _, file = pictures(tmp_path)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"parameters.compile: .* needs a C\+\+ compiler: apt install g\+\+"),
    ):
        PyTorchBackend(config(PICTURES, compile="true"), file)


def test_what_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's first line is in the error."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no lowering for aten.strange\nat length")

    _, file = pictures(tmp_path)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    with pytest.raises(ConfigError, match="compile: the model does not compile: no lowering for aten.strange, got"):
        PyTorchBackend(config(PICTURES, compile="true"), file)


@needs_compiler
def test_settings_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_COMPILE_OPTIONAL_PARAMETERS reaches it, over what is set here; threads are those of who calls."""
    seen: dict[str, Any] = {}

    def look(*_: object, inductor_configs: dict[str, Any], **__: object) -> None:
        seen.update(inductor_configs)
        raise RuntimeError("seen")

    _, file = pictures(tmp_path)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", look)
    extra = {"TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"options": {"freezing": false}}', "INTRA_OP_THREAD_COUNT": "3"}
    with pytest.raises(ConfigError, match="seen"):
        PyTorchBackend(config(PICTURES, compile="true", **extra), file)
    assert seen == {"freezing": False, "cpp.threads": 3, "cpp.dynamic_threads": True, "compile_threads": 1}
