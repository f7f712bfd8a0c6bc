"""One network in every form that is served: TorchScript, torch.export and ONNX answer as the module itself does."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.backends.onnx import OnnxBackend
from engine.backends.pytorch import PyTorchBackend
from engine.config import parse_config


class Classifier(torch.nn.Module):
    """Two inputs, two outputs of different types, weights that are shared by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(6, 16)
        self.output = torch.nn.Linear(16, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.softmax(self.output(torch.relu(self.hidden(torch.cat([left, right], 1)))), 1)
        return scores, scores.argmax(1)


CONFIG = """
max_batch_size: 8
input [ { name: "left" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "right" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [
  { name: "scores" data_type: TYPE_FP32 dims: [ 4 ] },
  { name: "best" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } }
]
"""


def script(net: torch.nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(net), str(folder / "model.pt"))
    return PyTorchBackend(parse_config(f'backend: "pytorch" {CONFIG}', "m", "config.pbtxt"), folder / "model.pt")


def export(net: torch.nn.Module, folder: Path) -> Any:
    rows = torch.export.Dim("rows", min=1, max=8)
    example = (torch.zeros(2, 4), torch.zeros(2, 2))
    torch.export.save(torch.export.export(net, example, dynamic_shapes=({0: rows}, {0: rows})), folder / "model.pt2")
    return PyTorchBackend(parse_config(f'backend: "pytorch" {CONFIG}', "m", "config.pbtxt"), folder / "model.pt2")


def to_onnx(net: torch.nn.Module, folder: Path) -> Any:
    """The graph by hand: torch.onnx needs packages that nothing else here does."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    make, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        make.make_node("Concat", ["left", "right"], ["both"], axis=1),
        make.make_node("Gemm", ["both", "hidden.weight", "hidden.bias"], ["linear"], transB=1),
        make.make_node("Relu", ["linear"], ["hidden"]),
        make.make_node("Gemm", ["hidden", "output.weight", "output.bias"], ["logits"], transB=1),
        make.make_node("Softmax", ["logits"], ["scores"], axis=1),
        make.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
    ]
    graph = make.make_graph(
        nodes,
        "classifier",
        [make.make_tensor_value_info(name, kinds.FLOAT, ("rows", size)) for name, size in (("left", 4), ("right", 2))],
        [
            make.make_tensor_value_info("scores", kinds.FLOAT, ("rows", 4)),
            make.make_tensor_value_info("best", kinds.INT64, ("rows",)),
        ],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in net.state_dict().items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return OnnxBackend(parse_config(f'backend: "onnxruntime" {CONFIG}', "m", "config.pbtxt"), folder / "model.onnx")


@pytest.mark.parametrize("load", [script, export, to_onnx])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_form_answers_like_the_module(
    tmp_path: Path, load: Callable[[torch.nn.Module, Path], Any], rows: int
) -> None:
    """Names, datatypes, shapes and, to the precision of FP32, numbers."""
    torch.manual_seed(0)
    net = Classifier().eval()
    backend = load(net, tmp_path)
    rng = np.random.default_rng(rows)
    inputs: dict[str, Any] = {}
    for name, size in (("right", 2), ("left", 4)):
        inputs[name] = backend.empty((rows, size), np.dtype("<f4"))
        inputs[name][:] = rng.standard_normal((rows, size), np.float32)
    with torch.no_grad():
        scores, best = net(torch.from_numpy(inputs["left"].copy()), torch.from_numpy(inputs["right"].copy()))
    backend.enter(False)
    outputs = backend.run(inputs)
    assert list(outputs) == ["scores", "best"]
    assert (outputs["scores"].dtype, outputs["best"].dtype) == (np.dtype("<f4"), np.dtype("<i8"))
    np.testing.assert_allclose(outputs["scores"], scores.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["best"], best.numpy())
    backend.close()
