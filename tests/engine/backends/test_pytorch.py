"""The PyTorch backend: exported and TorchScript forms give what the module itself gives, on the device asked for."""

import gc
import linecache
import warnings
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from torch.fx.graph_module import _loader
from tritonclient.grpc import model_config_pb2

from batching.errors import OutOfMemory
from engine.backends import pytorch
from engine.backends.pytorch import PyTorchBackend, complete
from engine.config import ModelConfig, parse_config
from engine.errors import ConfigError, InvalidInput
from engine.types import DATATYPES

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


def test_a_crafted_archive_does_not_reach_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check_archive comes before torch.export.load, for a backend and for auto-complete."""
    loaded: list[object] = []
    monkeypatch.setattr(torch.export, "load", loaded.append)
    file = export(tmp_path, Net())
    with zipfile.ZipFile(file, "a") as made:
        made.writestr("model/data/aotinductor/model/model.so", b"")
    for use in (lambda: PyTorchBackend(config(), file), lambda: complete(message(), file)):
        with pytest.raises(ConfigError, match=r"model.pt2: archive: holds 'model/data/aotinductor/model/model.so'"):
            use()
    assert not loaded


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
        ("indices", "lack one that ends in __1"),
        ("suffix", r"model.bin: a PyTorch model is a .pt2"),
        ("device", r"model 'm': instance_group asks for cuda:99, but \d+ CUDA devices"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, case: str, text: str) -> None:
    """A file that is no model, a config that does not match it, a device that is not there: refused at load."""
    given, file = spoil(tmp_path, case)
    with pytest.raises(ConfigError, match=text):
        PyTorchBackend(config(given), file)


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def one_to_one(kind: str, dims: str = "[ 2 ]", extra: str = "", rows: int = 8) -> ModelConfig:
    return config(
        f'backend: "pytorch" max_batch_size: {rows} input {{ name: "x" data_type: {kind} dims: {dims} }} '
        f'output {{ name: "y" data_type: {kind} dims: {dims} }} {extra}'
    )


@pytest.mark.parametrize("form", ["model.pt2", "model.pt"])
@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_every_datatype(tmp_path: Path, form: str, datatype: str) -> None:
    """In and out unchanged: numpy's bfloat16 and torch's are the same bits."""
    dtype = DATATYPES[datatype]
    if form == "model.pt":
        file = script(tmp_path, Same())
    else:
        rows = torch.export.Dim("rows", min=1, max=8)
        example = pytorch._to_tensor(np.zeros((2, 2), dtype))
        torch.export.save(torch.export.export(Same(), (example,), dynamic_shapes=({0: rows},)), tmp_path / form)
        file = tmp_path / form
    backend = PyTorchBackend(one_to_one(f"TYPE_{datatype}"), file)
    given = np.array([[1, 0], [1, 1]]).astype(dtype)
    yielded = run(backend, x=given)["y"]
    assert yielded.dtype == dtype
    np.testing.assert_array_equal(yielded, given)


def test_bfloat16_is_computed_with(tmp_path: Path) -> None:
    """The bits are what torch takes them for."""

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    rows = torch.export.Dim("rows", min=1, max=8)
    example = (torch.zeros(2, 2, dtype=torch.bfloat16),)
    torch.export.save(torch.export.export(Twice(), example, dynamic_shapes=({0: rows},)), tmp_path / "model.pt2")
    backend = PyTorchBackend(one_to_one("TYPE_BF16"), tmp_path / "model.pt2")
    given = np.array([[1.5, -3]]).astype(DATATYPES["BF16"])
    np.testing.assert_array_equal(run(backend, x=given)["y"].astype(np.float32), [[3, -6]])


class FromDict(torch.nn.Module):
    def forward(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"difference": tensors["left"] - tensors["right"], "sum": tensors["left"] + tensors["right"]}


def test_a_script_may_take_one_dict(tmp_path: Path) -> None:
    """All inputs are in it, by the config's names."""
    backend = PyTorchBackend(config(), script(tmp_path, FromDict()))
    ones = np.ones((1, 3), "<f4")
    assert run(backend, left=3 * ones, right=ones)["difference"][0, 0] == 2


class Texts(torch.nn.Module):
    def forward(self, x: list[str]) -> list[str]:
        return [text + "!" for text in x]


def test_a_script_may_take_and_give_texts(tmp_path: Path) -> None:
    """BYTES with one dimension are List[str]; what is no UTF-8 is the caller's error."""
    backend = PyTorchBackend(one_to_one("TYPE_STRING", "[ -1 ]", rows=0), script(tmp_path, Texts()))
    yielded = run(backend, x=np.array(["é".encode(), b""], object))["y"]
    assert yielded.dtype == object
    assert yielded.tolist() == ["é!".encode(), b"!"]
    with pytest.raises(InvalidInput, match="input 'x' .* must be UTF-8"):
        run(backend, x=np.array([b"\xff"], object))


def test_texts_of_more_than_one_dimension_are_refused(tmp_path: Path) -> None:
    """With Triton's text; the batch's counts. An exported program has no texts at all."""
    file = script(tmp_path, Texts())
    with pytest.raises(
        ConfigError, match="^Triton only supports 1 dimensional List of String as input for 'x' for model 'm'$"
    ):
        PyTorchBackend(one_to_one("TYPE_STRING", "[ 1 ]"), file)
    with pytest.raises(ConfigError, match="input 'x': torch.export knows no TYPE_STRING"):
        PyTorchBackend(one_to_one("TYPE_STRING", "[ -1 ]", rows=0), file.with_suffix(".pt2"))


def test_reshape_is_what_the_model_takes(tmp_path: Path) -> None:
    """The batches that a program is tried with at load have the model's shape, not the client's."""
    rows = torch.export.Dim("rows", min=1, max=8)
    program = torch.export.export(Same(), (torch.zeros(2, 2),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "model.pt2")
    dims = "[ 1, 2 ] reshape { shape: [ 2 ] }"
    backend = PyTorchBackend(one_to_one("TYPE_FP32", dims), tmp_path / "model.pt2")
    assert run(backend, x=np.ones((3, 2), "<f4"))["y"].shape == (3, 2)


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


class Modes(torch.nn.Module):
    """Tells in which modes it runs; for the tests, in place of a loaded module."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.backends.cudnn.enabled)
        return torch.tensor([[float(mode) for mode in modes]])


@pytest.mark.parametrize(
    ("extra", "modes"),
    [
        ("", [1, 0, 1]),
        (parameter("INFERENCE_MODE", "false"), [0, 0, 1]),
        (parameter("INFERENCE_MODE", "true") + parameter("DISABLE_CUDNN", "true"), [1, 0, 0]),
        (parameter("DISABLE_OPTIMIZED_EXECUTION", "true"), [1, 0, 1]),
        (parameter("ENABLE_WEIGHT_SHARING", "true") + parameter("ENABLE_CACHE_CLEANING", "true"), [1, 0, 1]),
    ],
)
def test_modes_that_a_batch_runs_in(tmp_path: Path, extra: str, modes: list[int]) -> None:
    """Inference mode unless the config says otherwise, gradients never; cuDNN is off for this model alone."""
    backend = PyTorchBackend(one_to_one("TYPE_FP32", extra=extra), script(tmp_path, Same()))
    backend._module = Modes()
    assert run(backend, x=np.ones((1, 2), "<f4"))["y"].tolist() == [modes]
    assert torch.backends.cudnn.enabled


def test_optimized_execution_is_off_if_the_config_says_so(tmp_path: Path) -> None:
    """Of a script, while it runs."""
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._get_graph_executor_optimize())
        return x

    for extra in ("", parameter("DISABLE_OPTIMIZED_EXECUTION", "true")):
        backend = PyTorchBackend(one_to_one("TYPE_FP32", extra=extra), script(tmp_path, Same()))
        backend._module = look
        run(backend, x=np.ones((1, 2), "<f4"))
    assert seen == [True, False]


def test_threads_that_the_config_asks_for(tmp_path: Path) -> None:
    """INTRA_OP_THREAD_COUNT holds for every thread that runs the model."""
    extra = parameter("INTRA_OP_THREAD_COUNT", "3")
    backend, before = (
        PyTorchBackend(one_to_one("TYPE_FP32", extra=extra), script(tmp_path, Same())),
        torch.get_num_threads(),
    )
    try:
        for inline in (True, False):
            torch.set_num_threads(before)
            backend.enter(inline)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_interop_threads_are_the_processs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be set once; a model that wants another number later is refused."""
    file = script(tmp_path, Same())
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_interop_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_interop_threads", asked.append)
    for count in ("0", "2", "5"):
        PyTorchBackend(one_to_one("TYPE_FP32", extra=parameter("INTER_OP_THREAD_COUNT", count)), file)
    assert asked == [5]

    def too_late(count: int) -> None:
        raise RuntimeError("cannot set number of interop threads after parallel work has started")

    monkeypatch.setattr(torch, "set_num_interop_threads", too_late)
    with pytest.raises(ConfigError, match="INTER_OP_THREAD_COUNT: this process runs with 2, .* got 5"):
        PyTorchBackend(one_to_one("TYPE_FP32", extra=parameter("INTER_OP_THREAD_COUNT", "5")), file)


@pytest.mark.parametrize("save", [export, script])
def test_close_lets_go_of_the_weights(tmp_path: Path, save: Any) -> None:
    """Nothing of the module is left once the garbage is collected: it is full of references to itself."""
    backend = PyTorchBackend(config(), save(tmp_path, Weighty()))
    ones = np.ones((1, 3), "<f4")
    run(backend, left=ones, right=ones)
    left = weakref.ref(backend._module)
    assert left() is not None
    backend.close()
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("most", [64, 4])
def test_a_load_leaves_nothing_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """What torch knew of the program's sizes and its source go with the model, and with one that was refused (4)."""
    sizes = []

    def load(file: Path, load: Any = torch.export.load) -> Any:
        program = load(file)
        sizes.append(weakref.ref(next(iter(program.graph.nodes)).meta["val"].fake_mode.shape_env))
        return program

    monkeypatch.setattr(torch.export, "load", load)
    file = export(tmp_path, Net(), most)
    if most == 64:
        backend = PyTorchBackend(config(), file)
        assert sizes[0]() is not None
        assert sources()
        backend.close()
        del backend
    else:
        with pytest.raises(ConfigError, match="does not take inputs"):
            PyTorchBackend(config(), file)
    gc.collect()
    gc.collect()  # what the tensors that were freed held
    assert len(sizes) == 1
    assert sizes[0]() is None
    assert not sources()


def sources() -> list[str]:
    """Of graphs that torch.fx compiled."""
    return [file for file in (*_loader.eval_cache, *linecache.cache) if file.startswith("<eval_with_key>")]


class Weighty(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(left), self.linear(right)


def message(text: str = "") -> Any:
    return text_format.Parse(f'name: "m" {text}', model_config_pb2.ModelConfig())


def test_complete_reads_an_archive(tmp_path: Path) -> None:
    """Inputs under the names of forward's arguments; what it fills in can be loaded."""
    given = message()
    complete(given, export(tmp_path, DictNet()))
    assert given == message(
        'max_batch_size: 4 dynamic_batching { } input [ { name: "left" data_type: TYPE_FP32 dims: 3 }, '
        '{ name: "right" data_type: TYPE_FP32 dims: 3 } ] output [ { name: "sum" data_type: TYPE_FP32 dims: 3 }, '
        '{ name: "difference" data_type: TYPE_FP32 dims: 3 } ]'
    )
    given.backend = "pytorch"
    backend = PyTorchBackend(config(text_format.MessageToString(given)), tmp_path / "model.pt2")
    ones = np.ones((4, 3), "<f4")
    assert run(backend, left=3 * ones, right=ones)["difference"][3, 0] == 2


@pytest.mark.parametrize("dynamic", [torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO, torch.export.Dim("rows")])
def test_complete_where_nobody_said_how_few_rows(tmp_path: Path, dynamic: Any) -> None:
    """However torch writes that, one row is among them."""
    program = torch.export.export(Same(), (torch.zeros(2, 3),), dynamic_shapes=({0: dynamic},))
    torch.export.save(program, tmp_path / "model.pt2")
    given = message('backend: "pytorch"')
    complete(given, tmp_path / "model.pt2")
    assert [output.name for output in given.output] == ["OUTPUT__0"]
    assert given.max_batch_size == 4
    backend = PyTorchBackend(config(text_format.MessageToString(given)), tmp_path / "model.pt2")
    assert run(backend, x=np.ones((1, 3), "<f4"))["OUTPUT__0"].shape == (1, 3)


def test_complete_cannot_read_a_script(tmp_path: Path) -> None:
    """It says nothing of datatypes and dims; a config that does is left alone."""
    file = script(tmp_path, Net())
    with pytest.raises(ConfigError, match="^model 'm': input and output sections are required: model.pt does not say"):
        complete(message(), file)
    text = 'input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }'
    given = message(text)
    complete(given, tmp_path / "nothing.pt")
    assert given == message(text)


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
