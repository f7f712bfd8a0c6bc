"""The ONNX backend: what the graph gives, for every datatype, and a config that is not the graph's is refused."""

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from batching.errors import OutOfMemory
from engine.backends import onnx as backend_module
from engine.backends.onnx import OnnxBackend, complete
from engine.config import ModelConfig, parse_config
from engine.errors import ConfigError, DeviceLost, InvalidInput
from engine.types import DATATYPES, Array

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
helper, TensorProto = onnx.helper, onnx.TensorProto

FLOAT = TensorProto.FLOAT
CONFIG = """
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "a" data_type: TYPE_FP32 dims: [ 3 ] }, { name: "b" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "sum" data_type: TYPE_FP32 dims: [ 3 ] } ]
"""


def config(text: str = CONFIG) -> ModelConfig:
    return parse_config(text, "m", "config.pbtxt")


def save(folder: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], weights: Any = ()) -> Path:
    """A graph whose tensors are name -> (element type, shape)."""
    given, yielded = (
        [helper.make_tensor_value_info(name, *spec) for name, spec in tensors.items()] for tensors in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "graph", given, yielded, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def add(folder: Path, shape: tuple[Any, ...] = ("rows", 3)) -> Path:
    """sum = a + b, and the difference too."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    spec = (FLOAT, shape)
    return save(folder, nodes, {"b": spec, "a": spec}, {"sum": spec, "difference": spec})


def identity(folder: Path, element: int, shape: tuple[Any, ...] = ("rows", 2)) -> Path:
    node = helper.make_node("Identity", ["x"], ["y"])
    return save(folder, [node], {"x": (element, shape)}, {"y": (element, shape)})


def identity_config(kind: str, dims: str = "[ 2 ]", rows: int = 8) -> ModelConfig:
    return config(
        f'backend: "onnxruntime" max_batch_size: {rows} input {{ name: "x" data_type: {kind} dims: {dims} }} '
        f'output {{ name: "y" data_type: {kind} dims: {dims} }}'
    )


def accelerated(kind: str, name: str) -> str:
    return f'optimization {{ execution_accelerators {{ {kind}_execution_accelerator {{ name: "{name}" }} }} }} '


def message(text: str = "") -> Any:
    return text_format.Parse(f'name: "m" {text}', model_config_pb2.ModelConfig())


@pytest.mark.parametrize("use", [lambda file: OnnxBackend(config(), file), lambda file: complete(message(), file)])
def test_without_the_package_the_text_says_which_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Any) -> None:
    """It is an extra: the rest of the engine works without it."""
    file = add(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"needs the package onnxruntime: pip install onnxruntime"):
        use(file)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (('"a"', '"c"'), "^unexpected inference input 'c', allowed inputs are: a, b$"),
        (('"sum"', '"total"'), "^unexpected inference output 'total', allowed outputs are: difference, sum$"),
        ((', { name: "b" data_type: TYPE_FP32 dims: [ 3 ] }', ""),
         "^unable to load model 'm', configuration expects 1 inputs, model provides 2$"),
        (('"a" data_type: TYPE_FP32', '"a" data_type: TYPE_STRING'),
         "^unable to load model 'm', configuration expects datatype TYPE_STRING for input 'a', model provides "
         "TYPE_FP32$"),
        (('"a" data_type: TYPE_FP32 dims: [ 3 ]', '"a" data_type: TYPE_FP32 dims: [ 3, 1 ]'),
         r"^model 'm', tensor 'a': the model expects 2 dimensions \(shape \[-1,3\]\) but the model configuration "
         r"specifies 3 dimensions \(an initial batch dimension because max_batch_size > 0 followed by the explicit "
         r"tensor shape, making complete shape \[-1,3,1\]\)$"),
        (('"sum" data_type: TYPE_FP32 dims: [ 3 ]', '"sum" data_type: TYPE_FP32 dims: [ 4 ]'),
         r"^model 'm', tensor 'sum': the model expects dims \[3\] but the model configuration specifies dims \[4\]$"),
        (("max_batch_size: 8", "max_batch_size: 0"),
         r"^model 'm', tensor 'a': the model expects 2 dimensions \(shape \[-1,3\]\) but the model configuration "
         r"specifies 1 dimensions \(shape \[3\]\)$"),
        (("output", "instance_group { kind: KIND_GPU gpus: 0 } output"),
         "asks for cuda:0, but the installed ONNX Runtime has no CUDAExecutionProvider; it has .*CPUExecutionProvider"),
        (("output", accelerated("gpu", "tensorrt") + "output"),
         r"gpu_execution_accelerator: .* has no TensorrtExecutionProvider for 'tensorrt'; it has .*CPUExecution"),
        (("output", accelerated("cpu", "openvino") + "output"), "has no OpenVINOExecutionProvider for 'openvino'"),
        (("output", accelerated("cpu", "abacus") + "output"),
         "^model 'm': unknown Execution Accelerator 'abacus' is requested$"),
        (("output", "optimization { graph { level: 7 } } output"),
         r"optimization.graph.level: must be one of .*, got 7"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_the_graphs_is_refused(tmp_path: Path, change: tuple[str, str], text: str) -> None:
    """With Triton's texts, where Triton has one."""
    assert change[0] in CONFIG
    with pytest.raises(ConfigError, match=text):
        OnnxBackend(config(CONFIG.replace(change[0], change[1], 1)), add(tmp_path))


def test_dims_that_differ_without_a_batch_dimension(tmp_path: Path) -> None:
    """Both are told as they are: there is nothing to leave out."""
    text = CONFIG.replace("max_batch_size: 8", "max_batch_size: 0").replace("dims: [ 3 ]", "dims: [ 2, 4 ]")
    with pytest.raises(ConfigError, match=r"'a': the model expects dims \[-1,3\] but .* specifies dims \[2,4\]$"):
        OnnxBackend(config(text), add(tmp_path))


def test_a_graph_without_a_batch_dimension_is_refused_for_batches(tmp_path: Path) -> None:
    """Its first dimension must be free."""
    with pytest.raises(
        ConfigError,
        match=r"^model 'm', tensor 'a': for the model to support batching the shape should have at least 1 dimension "
        r"and the first dimension must be -1; but shape expected by the model is \[1,3\]$",
    ):
        OnnxBackend(config(), add(tmp_path, (1, 3)))


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """The file is named, and ONNX Runtime's reason is given."""
    file = tmp_path / "model.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.onnx: cannot be loaded: \S"):
        OnnxBackend(config(), file)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_it_answers_like_the_graph(tmp_path: Path, rows: int) -> None:
    """Inputs and outputs go by name; an output that the config does not list is not computed for anybody."""
    backend = OnnxBackend(config(), add(tmp_path))
    backend.enter(False)
    rng = np.random.default_rng(0)
    a, b = backend.empty((rows, 3), np.dtype("<f4")), backend.empty((rows, 3), np.dtype("<f4"))
    a[:], b[:] = rng.standard_normal((2, rows, 3), np.float32)
    outputs = backend.run({"a": a, "b": b})
    assert list(outputs) == ["sum"]
    np.testing.assert_array_equal(outputs["sum"], a + b)
    assert str(backend.device) == "cpu"
    backend.close()


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("rows", [0, 3])
def test_every_datatype(tmp_path: Path, datatype: str, rows: int) -> None:
    """In and out unchanged, BF16 and BYTES too, and a batch of no rows."""
    name = {"FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING", "BF16": "BFLOAT16"}
    file = identity(tmp_path, getattr(TensorProto, name.get(datatype, datatype)))
    backend = OnnxBackend(identity_config("TYPE_" + datatype.replace("BYTES", "STRING")), file)
    given = np.zeros((3, 2), DATATYPES[datatype])
    given[:] = [[b"a\0", "é".encode()]] if datatype == "BYTES" else [[1, 0]]
    yielded = backend.run({"x": given[:rows]})["y"]
    assert yielded.dtype == DATATYPES[datatype]
    assert yielded.shape == (rows, 2)
    np.testing.assert_array_equal(yielded, given[:rows])
    if datatype == "BYTES" and rows:
        assert type(yielded[0, 0]) is bytes


def test_bf16_is_computed_with(tmp_path: Path) -> None:
    """The bits are what ONNX Runtime takes them for, beside inputs of other types."""
    nodes = [helper.make_node("Cast", ["x"], ["wide"], to=FLOAT), helper.make_node("Mul", ["wide", "by"], ["y"])]
    spec = ("rows", 2)
    file = save(tmp_path, nodes, {"x": (TensorProto.BFLOAT16, spec), "by": (FLOAT, spec)}, {"y": (FLOAT, spec)})
    backend = OnnxBackend(
        config(
            'backend: "onnxruntime" max_batch_size: 8 input [ { name: "x" data_type: TYPE_BF16 dims: 2 }, '
            '{ name: "by" data_type: TYPE_FP32 dims: 2 } ] output { name: "y" data_type: TYPE_FP32 dims: 2 }'
        ),
        file,
    )
    x, by = np.array([[1.5, -2]], ml_dtypes.bfloat16), np.array([[2, 3]], "<f4")
    np.testing.assert_array_equal(backend.run({"x": x, "by": by})["y"], [[3, -6]])


def test_texts_that_are_no_utf8_are_the_callers_error(tmp_path: Path) -> None:
    """ONNX Runtime's strings are texts."""
    backend = OnnxBackend(identity_config("TYPE_STRING"), identity(tmp_path, TensorProto.STRING))
    with pytest.raises(InvalidInput, match="input 'x' .* must be UTF-8"):
        backend.run({"x": np.array([[b"\xff", b""]], object)})


def test_scalars_are_tensors_of_one(tmp_path: Path) -> None:
    """A graph's tensor without dimensions is [ 1 ] in a config, and nothing else."""
    file = identity(tmp_path, FLOAT, ())
    with pytest.raises(ConfigError, match=r"scalar tensor 'x', should only provide 1.*provided: \[2\]\."):
        OnnxBackend(identity_config("TYPE_FP32", "[ 2 ]", rows=0), file)
    outputs = OnnxBackend(identity_config("TYPE_FP32", "[ 1 ]", rows=0), file).run({"x": np.array([7], "<f4")})
    assert outputs["y"].shape == (1,)
    assert outputs["y"][0] == 7


def test_reshape_is_what_the_graph_is_compared_with(tmp_path: Path) -> None:
    """dims are the client's."""
    text = (
        'backend: "onnxruntime" max_batch_size: 8 '
        'input { name: "x" data_type: TYPE_FP32 dims: 1 reshape { shape: [ ] } } '
        'output { name: "y" data_type: TYPE_FP32 dims: 1 reshape { shape: [ ] } }'
    )
    backend = OnnxBackend(config(text), identity(tmp_path, FLOAT, ("rows",)))
    np.testing.assert_array_equal(backend.run({"x": np.arange(3, dtype="<f4")})["y"], [0, 1, 2])


def test_weights_in_another_file_are_found(tmp_path: Path) -> None:
    """As models above 2 GB have them; the model may be a folder that holds both files."""
    folder = tmp_path / "model.onnx"
    folder.mkdir()
    weights: Array = np.arange(6, dtype="<f4").reshape(3, 2)
    tensor = onnx.numpy_helper.from_array(weights, "w")
    given, yielded = (helper.make_tensor_value_info(name, FLOAT, ("rows", size)) for name, size in (("x", 3), ("y", 2)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "graph", [given], [yielded], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (folder / "weights.bin").stat().st_size == weights.nbytes
    text = (
        'backend: "onnxruntime" max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: 3 } '
        'output { name: "y" data_type: TYPE_FP32 dims: 2 }'
    )
    for file in (folder, folder / "model.onnx"):
        outputs = OnnxBackend(config(text), file).run({"x": np.ones((2, 3), "<f4")})
        np.testing.assert_array_equal(outputs["y"], np.ones((2, 3), "<f4") @ weights)


def test_parameters_reach_the_session(tmp_path: Path) -> None:
    """Triton's names of them, and session.* as they are."""
    given = {
        "intra_op_thread_count": "3", "inter_op_thread_count": "2", "execution_mode": "1", "enable_mem_arena": "0",
        "enable_mem_pattern": "0", "session.set_denormal_as_zero": "1",
    }  # fmt: skip
    text = "".join(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in given.items())
    backend = OnnxBackend(config(f"{CONFIG} {text} optimization {{ graph {{ level: -1 }} }}"), add(tmp_path))
    options = backend._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (False, False)
    assert (options.execution_mode.name, options.graph_optimization_level.name) == ("ORT_PARALLEL", "ORT_ENABLE_BASIC")
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_memory_is_given_back_after_a_run(tmp_path: Path) -> None:
    """If the config says where; ONNX Runtime refuses a device that it has no arena for."""
    key, ones = "memory.enable_memory_arena_shrinkage", np.ones((1, 3), "<f4")
    for device, arena in (("cpu:0", "1"), ("cpu:0", "0")):
        values = {key: device, "enable_mem_arena": arena}
        text = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}' for k, v in values.items())
        backend = OnnxBackend(config(CONFIG + text), add(tmp_path))
        if arena == "1":
            np.testing.assert_array_equal(backend.run({"a": ones, "b": ones})["sum"], 2 * ones)
        else:
            with pytest.raises(InvalidInput, match="arena shrink list: cpu:0"):
                backend.run({"a": ones, "b": ones})


def test_without_parameters_one_core_is_left_to_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is optimized, in as many threads as there are cores but one."""
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    options = OnnxBackend(config(), add(tmp_path))._session.get_session_options()
    assert (options.intra_op_num_threads, options.graph_optimization_level.name) == (6, "ORT_ENABLE_ALL")


GPUS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("group", "accelerators", "expected"),
    [
        ("", "", [("CUDAExecutionProvider", {"device_id": "0"}), ("CPUExecutionProvider", {})]),
        ("instance_group { kind: KIND_GPU gpus: 3 }", "",
         [("CUDAExecutionProvider", {"device_id": "3"}), ("CPUExecutionProvider", {})]),
        ("instance_group { kind: KIND_CPU }", 'gpu_execution_accelerator { name: "tensorrt" }',
         [("CPUExecutionProvider", {})]),
        ("instance_group { kind: KIND_CPU }", 'cpu_execution_accelerator { name: "openvino" }',
         [("OpenVINOExecutionProvider", {}), ("CPUExecutionProvider", {})]),
        ("instance_group { kind: KIND_GPU gpus: 1 }",
         'gpu_execution_accelerator { name: "tensorrt" parameters { key: "precision_mode" value: "FP16" } '
         'parameters { key: "max_workspace_size_bytes" value: "1024" } }',
         [("TensorrtExecutionProvider", {"trt_fp16_enable": "1", "trt_max_workspace_size": "1024", "device_id": "1"}),
          ("CUDAExecutionProvider", {"device_id": "1"}), ("CPUExecutionProvider", {})]),
        ("instance_group { kind: KIND_GPU gpus: 0 }",
         'gpu_execution_accelerator { name: "cuda" parameters { key: "gpu_mem_limit" value: "9" } }',
         [("CUDAExecutionProvider", {"gpu_mem_limit": "9", "device_id": "0"}), ("CPUExecutionProvider", {})]),
    ],
)  # fmt: skip
def test_providers(group: str, accelerators: str, expected: list[Any]) -> None:
    """The accelerator that the config names, then the device's own, then the CPU; options in the providers' words."""
    text = f"{CONFIG} {group} optimization {{ execution_accelerators {{ {accelerators} }} }}"
    parsed = parse_config(text, "m", "config.pbtxt", gpus=4)
    device = backend_module.choose_device(parsed, GPUS)
    assert backend_module._providers(parsed, device, GPUS) == expected


def test_a_batch_that_the_graph_does_not_take_is_the_callers_error(tmp_path: Path) -> None:
    """Where the config leaves a size open and the graph does not."""
    file = identity(tmp_path, FLOAT, ("rows", 2))
    backend = OnnxBackend(identity_config("TYPE_FP32", "[ 2 ]"), file)
    with pytest.raises(InvalidInput, match="input: x .* Got: 3 Expected: 2"):
        backend.run({"x": np.ones((1, 3), "<f4")})


def test_an_operator_that_fails_says_why(tmp_path: Path) -> None:
    """As a plain error in one line, without ONNX Runtime's codes."""
    node = helper.make_node("MatMul", ["a", "b"], ["sum"])
    spec = (FLOAT, ("rows", "columns"))
    file = save(tmp_path, [node], {"a": spec, "b": spec}, {"sum": spec})
    backend = OnnxBackend(config(CONFIG.replace("[ 3 ]", "[ -1 ]")), file)
    ones = np.ones((1, 3), "<f4")
    with pytest.raises(RuntimeError, match=r"^Non-zero status code .*MatMul dimension mismatch$"):
        backend.run({"a": ones, "b": ones})


def test_out_of_memory_is_the_queues_error(tmp_path: Path) -> None:
    """A smaller batch may fit."""
    node = helper.make_node("ConstantOfShape", ["x"], ["y"])
    file = save(tmp_path, [node], {"x": (TensorProto.INT64, (1,))}, {"y": (FLOAT, ("size",))})
    text = (
        'backend: "onnxruntime" input { name: "x" data_type: TYPE_INT64 dims: 1 } '
        'output { name: "y" data_type: TYPE_FP32 dims: -1 }'
    )
    backend = OnnxBackend(config(text), file)
    with pytest.raises(OutOfMemory, match=r"^Failed to allocate memory for requested buffer of size \d+$"):
        backend.run({"x": np.array([10**15])})
    assert backend.run({"x": np.array([2])})["y"].shape == (2,)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0", OutOfMemory),
        ("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access ; GPU=0", DeviceLost),
        ("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 1: invalid argument ; GPU=0", RuntimeError),
        ("anything else", type(None)),
    ],
)
def test_errors_of_a_gpu(text: str, kind: type) -> None:
    """What a smaller batch may cure, what nothing cures, and the rest."""
    assert type(backend_module._explained(text, "cuda:0")) is kind


def test_answers_do_not_alias_the_batch(tmp_path: Path) -> None:
    """What one run answered is not written over by the next, nor by who owns the input."""
    backend, given = OnnxBackend(identity_config("TYPE_FP32"), identity(tmp_path, FLOAT)), np.ones((1, 2), "<f4")
    first = backend.run({"x": given})["y"]
    given[:] = 5
    backend.run({"x": given})
    np.testing.assert_array_equal(first, [[1, 1]])


def test_complete_reads_the_graph(tmp_path: Path) -> None:
    """Names in the graph's order, symbols as -1, without the batch dimension."""
    given = message()
    complete(given, add(tmp_path, ("rows", "length")))
    assert given == message(
        'max_batch_size: 4 dynamic_batching { } input [ { name: "b" data_type: TYPE_FP32 dims: -1 }, '
        '{ name: "a" data_type: TYPE_FP32 dims: -1 } ] output [ { name: "sum" data_type: TYPE_FP32 dims: -1 }, '
        '{ name: "difference" data_type: TYPE_FP32 dims: -1 } ]'
    )


def test_complete_without_a_batch_dimension(tmp_path: Path) -> None:
    """Then there is no batching, and a max_batch_size is refused."""
    file = add(tmp_path, (2, 3))
    given = message('output { name: "sum" data_type: TYPE_FP32 dims: [ 2, 3 ] }')
    complete(given, file)
    assert (given.max_batch_size, list(given.input[0].dims), len(given.output)) == (0, [2, 3], 1)
    with pytest.raises(ConfigError, match="^autofill failed for model 'm': model does not support batching"):
        complete(message("max_batch_size: 2"), file)


def test_complete_leaves_a_complete_config_alone(tmp_path: Path) -> None:
    """It does not even read the file."""
    text = 'input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }'
    given = message(text)
    complete(given, tmp_path / "nothing.onnx")
    assert given == message(text)


def test_complete_refuses_what_has_no_datatype(tmp_path: Path) -> None:
    """A sequence is no tensor."""
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    given = helper.make_tensor_value_info("x", FLOAT, ("rows", 2))
    yielded = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    graph = helper.make_graph([node], "graph", [given], [yielded])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "model.onnx"
    )
    with pytest.raises(ConfigError, match=r"Unsupported ONNX Type 'seq\(tensor\(float\)\)' for I/O 'y'"):
        complete(message(), tmp_path / "model.onnx")
