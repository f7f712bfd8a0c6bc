"""config.pbtxt: every refusal names file, field and value; nothing that is set is ignored."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.policy import Level, Policy
from engine.config import (
    FIELDS,
    HONOURED,
    NEVER,
    REPORTED,
    ModelConfig,
    WarmupInput,
    configure,
    deduce,
    parse_config,
    read_json,
    read_text,
    to_json,
)
from engine.errors import ConfigError
from engine.types import DATATYPES

IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ] label_filename: "l.txt" } ]
"""
GOOD = 'backend: "pytorch" max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 500 }' + IO
ALONE = 'backend: "pytorch" max_batch_size: 8' + IO
RAGGED = GOOD.replace("-1 ]", "-1 ] allow_ragged_batch: true")
PYTHON = GOOD.replace("pytorch", "python")
ONNX = GOOD.replace("pytorch", "onnxruntime")
IDENTITY = GOOD.replace("pytorch", "identity")


FILE = "models/m/config.pbtxt"


def parse(text: str, gpus: int | None = None) -> ModelConfig:
    return parse_config(text, "m", FILE, gpus)


def batched(text: str) -> str:
    """GOOD, with another dynamic batcher."""
    return GOOD.replace("max_queue_delay_microseconds: 500", text)


def test_a_config_as_people_write_them() -> None:
    """Comments, lists with and without commas, colons before braces or not: all of it is protobuf's text format."""
    config = parse(
        """
        # a comment
        name: 'm'  backend: "pytorch"
        max_batch_size: 8;
        input { name: "x", data_type: TYPE_FP32, dims: 3, dims: -1 }
        output: [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ], label_filename: "l.txt" } ]
        dynamic_batching: { max_queue_delay_microseconds: 500 }
        version_policy: { specific: { versions: [ 3, 1 ] } }
        instance_group [ { kind: KIND_CPU count: 1 } ]
        """
    )
    assert (config.name, config.backend, config.platform, config.files) == (
        "m",
        "pytorch",
        "",
        ("model.pt2", "model.pt"),
    )
    assert config.inputs["x"].shape == (-1, 3, -1)
    assert (config.outputs["y"].datatype, config.outputs["y"].shape) == ("INT64", (-1, 1))
    assert (config.batching, config.policy, config.max_batch_size) == (True, Policy(8, max_delay=0.0005), 8)
    assert (config.versions, config.latest, config.device) == ((3, 1), 0, "cpu")
    assert config.label_files == {"y": "l.txt"}


def test_defaults_are_tritons() -> None:
    """No version policy is the latest one version; no instance group is any device; nothing without being asked."""
    config = parse('platform: "pytorch_libtorch"' + IO)
    assert (config.backend, config.files, config.platform) == ("pytorch", ("model.pt",), "pytorch_libtorch")
    assert (config.latest, config.versions, config.device) == (1, (), "auto")
    assert (config.batching, config.max_batch_size) == (False, 0)
    assert config.inputs["x"].shape == (3, -1)
    assert (config.policy, config.cache, config.ragged, config.pad) == (Policy(1), False, {}, {})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("name: ", "config.pbtxt: 1:"),
        ("nme: 'm'", 'no field named "nme"'),
        (batched("prefered_batch_size: 4"),
         r'no field named "prefered_batch_size"; did you mean preferred_batch_size\?$'),
        (GOOD + "version_polcy { }", r'named "version_polcy"; did you mean version_policy\?$'),
        ("preferred_batch_size: 4", r'ModelConfig" has no field named "preferred_batch_size"\.$'),
        ("qqq: 4", r'no field named "qqq"\.$'),
        (GOOD + "batch_input { } batch_input { }", r"batch_input: this field is not served yet, got \{ \}$"),
        (GOOD + "optimization { priority: 9 }", "optimization.priority: must be one of PRIORITY_DEFAULT, .*, got 9"),
        (GOOD + "batch_output { target_name: 'y' }", 'batch_output: this field is not served yet, got .*"y"'),
        (GOOD + "model_operations { }", "model_operations: this field is not served yet"),
        (GOOD + "model_repository_agents { }", "model_repository_agents: this field is not served yet"),
        (GOOD + "model_metrics { }", "model_metrics: this field is not served yet"),
        (GOOD + "cc_model_filenames { key: '7.5' value: 'm' }", "cc_model_filenames: this field is not served yet"),
        (ALONE + "sequence_batching { }", "sequence_batching: this field is not served yet"),
        (ALONE + "ensemble_scheduling { }", "ensemble_scheduling: this field is not served yet"),
        (GOOD.replace("dims: [ 3", "is_shape_tensor: true dims: [ 3"),
         "input.is_shape_tensor: shape tensors are only supported for TensorRT platform, got True"),
        (GOOD.replace("dims: [ 1", "is_shape_tensor: true dims: [ 1"),
         "output.is_shape_tensor: shape tensors are only supported for TensorRT platform"),
        (GOOD.replace("dims: [ 3", "is_non_linear_format_io: true dims: [ 3"),
         "input.is_non_linear_format_io: Non-linear IO format is only supported for the TensorRT platform"),
        (GOOD + "instance_group { profile: '1' }", "instance_group.profile: .* TensorRT platform, got .'1'."),
        (GOOD + "instance_group { secondary_devices { } }", "instance_group.secondary_devices: .* TensorRT"),
        (GOOD + "name: 'other'", "name: unexpected directory name 'm' for model 'other'"),
        (IO, r"backend: Invalid model name: Could not determine backend for model 'm' with no backend in model "
         r"configuration. Expected model name of the form 'model.<backend_name>'\.$"),
        (IO + "default_model_filename: 'net.bin'", "backend: unexpected platform type '' for m; served backends"),
        (GOOD.replace("pytorch", "tensorrt"), "backend: 'tensorrt' is not served; served are pytorch, onnxruntime, py"),
        ("platform: 'tensorrt_plan'" + IO, "backend: 'tensorrt' is not served"),
        (GOOD + "platform: 'tensorrt_plan'", "platform: 'tensorrt_plan' is not served; served are onnxruntime_onnx, "),
        ("platform: 'pytorch'" + IO, """platform: 'pytorch' is not served; write backend: "pytorch"$"""),
        ("platform: 'ensemble'" + IO, "platform: 'ensemble' is not served"),
        (GOOD + "platform: 'onnxruntime_onnx'", "pair, got:onnxruntime_onnx, pytorch"),
        ("platform: 'pytorch_libtorch' backend: 'python'" + IO, "got:pytorch_libtorch, python"),
        (GOOD.replace("8", "-1"), "max_batch_size: 'max_batch_size' must be non-negative value for m, got -1"),
        (GOOD + "sequence_batching { }", "sequence_batching|oneof"),
        (GOOD + "ensemble_scheduling { }", "ensemble_scheduling|oneof"),
        (batched("preferred_batch_size: [ 4, 0 ]"),
         r"dynamic_batching.preferred_batch_size: .* preferred size must be positive for m, got \[0, 4\]"),
        (batched("preferred_batch_size: -4"), r"preferred_batch_size: .* must be positive for m, got \[-4\]"),
        (batched("preferred_batch_size: [ 9, 4 ]"),
         r"preferred_batch_size: dynamic batching preferred size must be <= max batch size for m, got \[4, 9\]"),
        (batched("priority_levels: 2"),
         r"dynamic_batching.default_priority_level: default priority level must be in range \[1, 2\] for m, got 0"),
        (batched("priority_levels: 2 default_priority_level: 3"), r"default_priority_level: .* \[1, 2\] for m, got 3"),
        (batched("default_priority_level: 1"), "default_priority_level: needs priority_levels for m, got 1"),
        (batched("priority_levels: 101 default_priority_level: 1"), "priority_levels: at most 100 .* for m, got 101"),
        (batched("priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value { } }"),
         r"dynamic_batching.priority_queue_policy: priority queue policy must have priority level in range \[1, 2\] "
         r"for m, got \[3\]"),
        (batched("priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 0 value { } }"),
         r"priority_queue_policy: .* in range \[1, 2\] for m, got \[0\]"),
        (batched("priority_queue_policy { key: 1 value { } }"),
         r"priority_queue_policy: needs priority_levels for m, got \[1\]"),
        (batched("preserve_ordering: true priority_levels: 2 default_priority_level: 1"),
         "dynamic_batching.priority_levels: Only one priority level is allowed when 'preserve_ordering' is true for m, "
         "got 2"),
        (batched("preserve_ordering: true default_queue_policy { timeout_action: DELAY }"),
         "dynamic_batching.preserve_ordering: Queue policy can not have DELAY as timeout action when "
         "'preserve_ordering' is true for m"),
        (batched("preserve_ordering: true priority_levels: 1 default_priority_level: 1 "
                 "priority_queue_policy { key: 1 value { timeout_action: DELAY } }"),
         "preserve_ordering: Queue policy can not have DELAY"),
        (batched("default_queue_policy { timeout_action: 7 }"),
         "dynamic_batching.default_queue_policy.timeout_action: must be one of REJECT, DELAY, got 7"),
        (GOOD.replace("TYPE_FP32", "99"), "input.data_type: must be one of TYPE_INVALID, .*, got 99"),
        (GOOD + "instance_group { kind: 99 }", "instance_group.kind: must be one of KIND_AUTO, .*, got 99"),
        (RAGGED.replace("dynamic_batching { max_queue_delay_microseconds: 500 }", ""),
         "input.allow_ragged_batch of 'x': needs a max_batch_size of at least 1 and dynamic_batching"),
        ('backend: "pytorch"' + RAGGED[RAGGED.index("input"):], "input.allow_ragged_batch of 'x': needs"),
        (RAGGED.replace("[ 3, -1 ]", "[ 3, 4 ]"),
         r"input.allow_ragged_batch of 'x': served with exactly one dimension of any size .*, got \[3, 4\]"),
        (RAGGED.replace("[ 3, -1 ]", "[ -1, -1 ]"), r"exactly one dimension of any size .*, got \[-1, -1\]"),
        (RAGGED.replace("TYPE_FP32", "TYPE_STRING"), "allow_ragged_batch of 'x': strings cannot be padded"),
        (GOOD.replace("dims: [ 3, -1 ]", "dims: [ 3 ] optional: true"),
         "input.optional: only a Python model can do without an input, got 'x'"),
        (GOOD + "model_transaction_policy { decoupled: true }",
         "model_transaction_policy.decoupled: only a Python model can be decoupled, got True"),
        (PYTHON + "model_transaction_policy { decoupled: true } response_cache { enable: true }",
         "response_cache.enable: Response Cache does not currently support model m with 'decoupled' transaction "
         r"policy\. Please disable the response cache\.$"),
        (GOOD + "metric_tags { key: 'a-b' value: '1' }", "metric_tags: must be names of labels, .*, got 'a-b'"),
        (GOOD + "metric_tags { key: 'version' value: '1' }", "metric_tags: .* none of them model or version, got 'ver"),
        (GOOD.replace("[ 3, -1 ]", "[ ]"), "input.dims: model input 'x' must specify 'dims'"),
        (GOOD.replace("[ 3, -1 ]", "[ 3, 0 ]"),
         "input.dims: model input 'x' dimension must be integer >= 1, or -1 to indicate a variable-size dimension f"),
        (GOOD.replace("dims: [ 1 ]", "dims: [ -2 ]"), "output.dims: model output 'y' dimension must be integer >= 1"),
        (GOOD.replace("dims: [ 3", "format: FORMAT_NHWC dims: [ 3"), "input.format: model input NHWC/NCHW require 3 d"),
        (GOOD.replace("data_type: TYPE_FP32", ""), "input.data_type: model input 'x' must specify 'data_type'"),
        (GOOD.replace('name: "x"', ""), "input.name: model input must specify 'name'"),
        (GOOD + 'input { name: "x" data_type: TYPE_FP32 dims: 1 }', "input.name: 'x' is given twice"),
        ('backend: "pytorch"' + IO.split("output")[0], "output: the model must have at least one output"),
        (GOOD + "version_policy { specific { } }", "version_policy.specific.versions: must be positive"),
        (PYTHON.replace(IO, ""), "input: the model must have at least one input"),
        (GOOD + "instance_group { count: 257 }", "instance_group.count: at most 256 instances"),
        (GOOD + "instance_group { kind: KIND_CPU gpus: 0 }",
         "instance_group.gpus: instance group m_0 of model m has kind KIND_CPU but specifies one or more GPUs"),
        (PYTHON + "instance_group { name: 'g' kind: KIND_MODEL gpus: 0 }",
         "instance_group.gpus: instance group g of model m has kind KIND_MODEL but specifies one or more GPUs"),
        (GOOD + "instance_group { kind: KIND_MODEL }", "instance_group.kind: .* only a Python model can place itself"),
        (GOOD + "instance_group { kind: KIND_GPU gpus: -1 }", "instance_group.gpus: .* unsupported gpu id -1"),
        (GOOD + "instance_group { passive: true }", "instance_group.passive: one instance at least must not be pas"),
        (GOOD + 'default_model_filename: "../../etc/passwd"', "default_model_filename: must be a plain file name"),
        (GOOD.replace("l.txt", ".."), "output.label_filename of 'y': must be a plain file name, got '..'"),
    ],
)  # fmt: skip
def test_refusals_name_file_field_and_value(text: str, error: str) -> None:
    """What cannot be honoured is refused, never ignored."""
    with pytest.raises(ConfigError, match=error) as refused:
        parse(text)
    assert str(refused.value).startswith("models/m/config.pbtxt: ")


@pytest.mark.parametrize(
    ("groups", "gpus", "instances"),
    [
        ("", None, [("m_0", "CPU", "auto", 0)]),
        ("", 0, [("m_0", "CPU", "auto", 0)]),
        ("", 1, [("m_0", "GPU", "auto", 0)]),
        ("", 2, [("m_0", "GPU", "cuda:0", 0), ("m_0", "GPU", "cuda:1", 1)]),
        ("{ kind: KIND_GPU }", None, [("m_0_0", "GPU", "cuda:0", 0)]),
        ("{ kind: KIND_GPU gpus: 3 }", None, [("m_0_0", "GPU", "cuda:3", 3)]),
        ("{ kind: KIND_GPU }", 2, [("m_0_0", "GPU", "cuda:0", 0), ("m_0_0", "GPU", "cuda:1", 1)]),
        ("{ gpus: 1 }", None, [("m_0_0", "GPU", "cuda:1", 1)]),
        ("{ gpus: 1 }", 2, [("m_0_0", "GPU", "cuda:1", 1)]),
        ("{ kind: KIND_CPU }", 2, [("m_0_0", "CPU", "cpu", 0)]),
        ("{ count: -3 }", None, [("m_0_0", "CPU", "auto", 0)]),
        ("{ kind: KIND_CPU count: 2 }", None, [("m_0_0", "CPU", "cpu", 0), ("m_0_1", "CPU", "cpu", 0)]),
        (
            "{ kind: KIND_CPU }, { name: 'g' kind: KIND_GPU gpus: [ 0, 2 ] count: 2 }, { kind: KIND_MODEL }",
            3,
            [
                ("m_0_0", "CPU", "cpu", 0),
                ("g_0", "GPU", "cuda:0", 0),
                ("g_0", "GPU", "cuda:2", 2),
                ("g_1", "GPU", "cuda:0", 0),
                ("g_1", "GPU", "cuda:2", 2),
                ("m_2_0", "MODEL", "auto", 0),
            ],
        ),
        ("{ kind: KIND_CPU passive: true }, { kind: KIND_CPU }", None, [("m_1_0", "CPU", "cpu", 0)]),
    ],
)
def test_instances(groups: str, gpus: int | None, instances: list[tuple[Any, ...]]) -> None:
    """Count is per GPU, no GPUs means all, AUTO is what there is, the passive get no work; names are Triton's."""
    config = parse(PYTHON + f"instance_group [ {groups} ]", gpus)
    assert [dataclasses.astuple(instance) for instance in config.instances] == instances
    assert config.device == instances[0][2]


@pytest.mark.parametrize(
    ("group", "gpus", "error"),
    [
        ("kind: KIND_GPU", 0, "instance group m_0 of model m has kind KIND_GPU but no GPUs are available"),
        ("gpus: 0", 0, "instance group m_0 of model m has kind KIND_CPU but specifies one or more GPUs"),
        ("gpus: [ 0, 2 ]", 2, "instance group m_0 of model m has kind KIND_CPU but specifies one or more GPUs"),
        (
            "kind: KIND_GPU gpus: [ 1, 7 ]",
            2,
            "instance group m_0 of model m specifies invalid or unsupported gpu id 7. GPUs with at least the minimum "
            "required CUDA compute compatibility of 6.000000 are: 0, 1",
        ),
    ],
)
def test_gpus_that_are_not_there(group: str, gpus: int, error: str) -> None:
    """Where the GPUs were counted, a group that asks for more is refused in Triton's words."""
    with pytest.raises(ConfigError) as refused:
        parse(GOOD + f"instance_group {{ {group} }}", gpus)
    assert str(refused.value).partition(": instance_group.")[2].partition(": ")[2] == error


def shaped(dims: str, reshape: str, batch: int = 8) -> str:
    io = IO.replace("[ 3, -1 ]", f"{dims} reshape {{ shape: {reshape} }}")
    return f'backend: "pytorch" max_batch_size: {batch}' + io


@pytest.mark.parametrize(
    ("dims", "reshape", "batch", "shape", "inside"),
    [
        ("[ 1, 4 ]", "[ 4 ]", 8, (-1, 1, 4), (-1, 4)),
        ("[ 1 ]", "[ ]", 8, (-1, 1), (-1,)),
        ("[ 1, 1 ]", "[ ]", 1, (-1, 1, 1), (-1,)),
        ("[ 2, 4, -1, 6 ]", "[ 8, -1, 1, 6 ]", 8, (-1, 2, 4, -1, 6), (-1, 8, -1, 1, 6)),
        ("[ 4 ]", "[ 2, 2 ]", 0, (4,), (2, 2)),
    ],
)
def test_reshape(dims: str, reshape: str, batch: int, shape: tuple[int, ...], inside: tuple[int, ...]) -> None:
    """What clients send and what the model takes, both with the batch dimension; without a reshape there is one."""
    spec = parse(shaped(dims, reshape, batch)).inputs["x"]
    assert (spec.shape, spec.reshape) == (shape, inside)
    assert parse(GOOD).inputs["x"].reshape is None
    output = parse(GOOD.replace("dims: [ 1 ]", "dims: [ 1 ] reshape { shape: [ ] }")).outputs["y"]
    assert (output.shape, output.reshape) == ((-1, 1), (-1,))


@pytest.mark.parametrize(
    ("dims", "reshape", "batch", "error"),
    [
        ("[ 1 ]", "[ ]", 0,
         "cannot have empty reshape for non-batching model as scalar tensors are not supported for m"),
        ("[ 1 ]", "[ 0 ]", 8,
         "reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension for m"),
        ("[ 4 ]", "[ 5 ]", 8, "has different size for dims and reshape for m"),
        ("[ 4 ]", "[ ]", 8, "has different size for dims and reshape for m"),
        ("[ -1 ]", "[ 4 ]", 8, "has different size for dims and reshape for m"),
        ("[ 4 ]", "[ -1 ]", 8, "has different size for dims and reshape for m"),
        ("[ -1, -1 ]", "[ -1 ]", 8, "has different number of variable-size dimensions for dims and reshape for m"),
        ("[ 2, -1, 3 ]", "[ 3, -1, 2 ]", 8, "has different size for dims and reshape for m"),
    ],
)  # fmt: skip
def test_reshapes_that_do_not_fit(dims: str, reshape: str, batch: int, error: str) -> None:
    """Both sides have the same elements, between dimensions of any size too; the words are Triton's."""
    with pytest.raises(ConfigError) as refused:
        parse(shaped(dims, reshape, batch))
    assert str(refused.value) == f"{FILE}: input.reshape: model input 'x' {error}"


def test_every_datatype() -> None:
    """TYPE_STRING is the protocol's BYTES, the others are called the same."""
    for name in DATATYPES:
        config = parse(GOOD.replace("FP32", "STRING" if name == "BYTES" else name))
        assert config.inputs["x"].datatype == name


def test_what_only_python_models_can() -> None:
    """Inputs that may be left out, any number of responses, neither inputs nor outputs, ragged inputs of any kind."""
    config = parse(PYTHON.replace("-1 ]", "-1 ] optional: true") + "model_transaction_policy { decoupled: true }")
    assert (config.inputs["x"].optional, config.decoupled) == (True, True)
    assert not parse(GOOD).decoupled
    bare = parse('backend: "python"')
    assert (bare.inputs, bare.outputs, bare.files, bare.platform) == ({}, {}, ("model.py",), "")
    ragged = parse(
        PYTHON.replace("[ 3, -1 ]", "[ -1, 3, -1 ] allow_ragged_batch: true").replace("TYPE_FP32", "TYPE_STRING")
        + 'input { name: "z" data_type: TYPE_INT8 dims: [ 2 ] allow_ragged_batch: true }'
    )
    assert (ragged.ragged, ragged.pad, ragged.variable) == ({"x": 1}, {}, False)
    assert parse('backend: "python"' + IO.replace("-1 ]", "-1 ] allow_ragged_batch: true")).ragged == {"x": 1}


def test_dynamic_batching_without_a_batch_dimension() -> None:
    """As in Triton: requests run alone, and wait in the queue that is asked for."""
    text = GOOD.replace("max_batch_size: 8", "").replace(
        "max_queue_delay", "default_queue_policy { max_queue_size: 3 }"
    )
    config = parse(text.replace("_microseconds: 500", ""))
    assert (config.batching, config.policy) == (False, Policy(1, levels=(Level(max_items=3),)))


def test_metric_tags() -> None:
    """Labels for all of the model's metrics."""
    assert parse(GOOD + "metric_tags { key: 'team' value: 'b' }").metric_tags == {"team": "b"}


def warmed(inputs: str, sample: str = "batch_size: 2 count: 3") -> str:
    return (
        PYTHON.replace("-1 ]", "-1 ] optional: true") + f"model_warmup {{ name: 'w' {sample} inputs {{ {inputs} }} }}"
    )


X = "key: 'x' value { data_type: TYPE_FP32 dims: [ 3, 5 ] "


def test_warmup() -> None:
    """Samples as they are to be run: each once at least; those of no rows, which is the default, are left out."""
    (sample,) = parse(
        warmed(X + "zero_data: true }") + f"model_warmup {{ name: 'none' inputs {{ {X} random_data: true }} }} }}"
    ).warmup
    assert (sample.name, sample.batch_size, sample.count) == ("w", 2, 3)
    assert sample.inputs == {"x": WarmupInput("FP32", (3, 5), "zero", "")}
    for text, source in (("random_data: true", "random"), ("zero_data: false", "zero")):
        (sample,) = parse(warmed(X + text + " }", "batch_size: 1")).warmup
        assert (sample.count, sample.inputs["x"].source) == (1, source)
    (sample,) = parse(warmed(X + "input_data_file: 'a/b' }")).warmup
    assert (sample.inputs["x"].source, sample.inputs["x"].file) == ("file", "a/b")
    assert parse(GOOD).warmup == ()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (warmed(X + "zero_data: true }", "batch_size: 9"), "batch_size of 'w': batch size 9, max allowed is 8"),
        (warmed(X + "zero_data: true }", "batch_size: 2").replace("max_batch_size: 8", ""),
         "batch_size of 'w': batch size 2, max allowed is 0"),
        (warmed(X + "zero_data: true }").replace("optional: true", "").replace("key: 'x'", "key: 'q'"),
         "inputs of 'w': gives no input 'x'"),
        (warmed(X.replace("'x'", "'q'") + "zero_data: true }"), "inputs of 'w': the model has no input 'q'"),
        (warmed(X.replace("5", "-1") + "zero_data: true }"),
         "inputs.dims of 'w': warmup setting expects all variable-size dimensions are specified for input 'x'"),
        (warmed(X.replace("5", "0") + "zero_data: true }"),
         r"inputs.dims of 'w': unexpected shape for input 'x'. Expected \[3, -1\], got \[3, 0\]"),
        (warmed(X.replace("3, 5", "4, 5") + "zero_data: true }"), r"Expected \[3, -1\], got \[4, 5\]"),
        (warmed(X.replace("3, 5", "3") + "zero_data: true }"), r"Expected \[3, -1\], got \[3\]"),
        (warmed(X.replace("FP32", "INT8") + "zero_data: true }"), "data_type of 'w': input 'x' is FP32, got INT8"),
        (warmed(X + "}"), "input_data_type of 'w': warmup setting expects input 'x' to have input_data_type set"),
        *((warmed(X + f"input_data_file: '{file}' }}"), "inputs.input_data_file of 'w': must be the path of a file")
          for file in ("", "/etc/passwd", "a/../../b", "..", r"a\000b")),
    ],
)  # fmt: skip
def test_warmup_that_cannot_be_run(text: str, error: str) -> None:
    """Each with the sample's name, in Triton's words where it has some."""
    with pytest.raises(ConfigError, match=error) as refused:
        parse(text)
    assert str(refused.value).startswith("models/m/config.pbtxt: model_warmup.")


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", {}),
        ("max_queue_delay_microseconds: 1500", {"max_delay": 0.0015}),
        ("preferred_batch_size: [ 8, 2, 4, 2 ]", {"preferred": (2, 4, 8)}),
        ("preserve_ordering: true", {"ordered": True}),
        ("preserve_ordering: true priority_levels: 1 default_priority_level: 1", {"ordered": True}),
        (
            "default_queue_policy { max_queue_size: 7 default_timeout_microseconds: 2500 allow_timeout_override: true}",
            {"levels": (Level(max_items=7, timeout=0.0025, override=True),)},
        ),
        (
            "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1000 }",
            {"levels": (Level(timeout=0.001, delay=True),)},
        ),
        (
            """priority_levels: 3 default_priority_level: 2 default_queue_policy { max_queue_size: 9 }
            priority_queue_policy { key: 3 value { timeout_action: DELAY default_timeout_microseconds: 1000000 } }
            priority_queue_policy { key: 1 value { } }""",
            {"levels": (Level(), Level(max_items=9), Level(timeout=1.0, delay=True)), "default_level": 1},
        ),
    ],
)
def test_tritons_dynamic_batcher(text: str, policy: dict[str, Any]) -> None:
    """Every field of it: levels count from 0 here, 0 of Triton's is no bound, and preferred sizes come in any order."""
    assert parse(batched(text)).policy == Policy(8, **policy)


def test_a_policy_holds_its_largest_batch() -> None:
    """A batch that is larger than the default capacity makes room for itself."""
    assert parse(GOOD.replace("8", "5000", 1)).policy.capacity == 5000


@pytest.mark.parametrize(("text", "cache"), [("{ enable: true }", True), ("{ enable: false }", False), ("{ }", False)])
def test_a_response_cache_is_asked_for(text: str, cache: bool) -> None:
    """Answers are kept for models whose config says so."""
    assert parse(GOOD + f"response_cache {text}").cache is cache


def test_ragged_inputs() -> None:
    """A ragged input names the dimension that may differ; only one that is not makes a model variable."""
    assert parse(GOOD).variable
    config = parse(RAGGED)
    assert (config.ragged, config.pad, config.variable) == ({"x": 2}, {"x": 0.0}, False)
    config = parse(RAGGED + 'input { name: "z" data_type: TYPE_INT64 dims: [ -1, 2 ] }')
    assert (config.ragged, config.variable) == ({"x": 2}, True)
    config = parse(RAGGED + 'input { name: "z" data_type: TYPE_INT64 dims: [ -1, 2 ] allow_ragged_batch: true }')
    assert (config.ragged, config.pad, config.variable) == ({"x": 2, "z": 1}, {"x": 0.0, "z": 0.0}, False)


@given(st.text(max_size=200) | st.text(st.sampled_from(list(GOOD)), max_size=400))
def test_any_text_is_a_config_or_a_refusal(text: str) -> None:
    """Whatever is in the file: a config, or ConfigError, nothing else."""
    try:
        parse(text)
    except ConfigError as error:
        assert str(error).startswith("models/m/config.pbtxt: ")  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("", ["model.onnx"], ("onnxruntime", "onnxruntime_onnx", "model.onnx", ["model.onnx"])),
        ("", ["model.pt"], ("pytorch", "pytorch_libtorch", "model.pt", ["model.pt"])),
        ("", ["model.pt2"], ("pytorch", "", "model.pt2", ["model.pt2", "model.pt"])),
        ("default_model_filename: 'model.pt2'", [], ("pytorch", "", "model.pt2", ["model.pt2"])),
        ("", ["model.pt2", "model.pt"], ("pytorch", "pytorch_libtorch", "model.pt", ["model.pt"])),
        ("", ["model.py"], ("python", "", "model.py", ["model.py"])),
        ("", ["model.py", "model.onnx"], ("onnxruntime", "onnxruntime_onnx", "model.onnx", ["model.onnx"])),
        ("platform: 'onnxruntime_onnx'", [], ("onnxruntime", "onnxruntime_onnx", "model.onnx", ["model.onnx"])),
        ("platform: 'libtorch'", [], ("pytorch", "libtorch", "model.pt", ["model.pt"])),
        ("platform: 'torch_aoti'", ["model.pt"], ("pytorch", "torch_aoti", "model.pt2", ["model.pt2"])),
        ("default_model_filename: 'model.pt'", [], ("pytorch", "pytorch_libtorch", "model.pt", ["model.pt"])),
        ("default_model_filename: 'model.py'", ["model.onnx"], ("python", "", "model.py", ["model.py"])),
        ("backend: 'onnxruntime'", [], ("onnxruntime", "onnxruntime_onnx", "model.onnx", ["model.onnx"])),
        ("backend: 'onnxruntime' default_model_filename: 'a.onnx'", [],
         ("onnxruntime", "onnxruntime_onnx", "a.onnx", ["a.onnx"])),
        ("backend: 'pytorch'", [], ("pytorch", "", "", ["model.pt2", "model.pt"])),
        ("backend: 'pytorch'", ["model.pt"], ("pytorch", "pytorch_libtorch", "model.pt", ["model.pt2", "model.pt"])),
        ("backend: 'pytorch'", ["model.pt", "model.pt2"], ("pytorch", "", "model.pt2", ["model.pt2", "model.pt"])),
        ("backend: 'pytorch' default_model_filename: 'net.pt'", [],
         ("pytorch", "pytorch_libtorch", "net.pt", ["net.pt"])),
        ("backend: 'python'", [], ("python", "", "model.py", ["model.py"])),
        ("backend: 'identity'", ["model.onnx"], ("identity", "", "", [])),
    ],
)  # fmt: skip
def test_backend_platform_and_file(text: str, found: list[str], expected: tuple[Any, ...]) -> None:
    """What is not said follows from what is, and from the files only where nothing is said, in Triton's order."""
    message = read_text(text, FILE)
    files = deduce(message, "m", found, FILE)
    assert (message.backend, message.platform, message.default_model_filename, [*files]) == expected
    assert message.name == "m"


@pytest.mark.parametrize(("file", "backend"), [("model.plan", "tensorrt"), ("model.xml", "openvino")])
def test_files_of_what_is_not_served(file: str, backend: str) -> None:
    """They are recognised, so that the error says what they are."""
    with pytest.raises(ConfigError, match=f"config.pbtxt: backend: '{backend}' is not served; served are pytorch"):
        deduce(read_text("", FILE), "m", [file], FILE)


def test_a_model_named_after_its_backend() -> None:
    """The last resort, as in Triton: model.<backend>, which looks for a file of that name."""
    message = read_text("", FILE)
    assert deduce(message, "a.identity", ["x"], FILE) == ()
    assert (message.backend, message.default_model_filename) == ("identity", "model.identity")
    with pytest.raises(ConfigError, match="backend: 'b.identity' is not served"):
        deduce(read_text("", FILE), "a.b.identity", [], FILE)


def parse_json(text: str) -> ModelConfig:
    message = read_json(text, FILE)
    return configure(message, deduce(message, "m", (), FILE), FILE, None)


def test_json() -> None:
    """The same config as JSON, in either spelling of the names, numbers as strings or not: all of it is protobuf's."""
    config = parse_json(
        """{"backend": "pytorch", "maxBatchSize": "8", "dynamic_batching": {"max_queue_delay_microseconds": 500},
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3", -1]}],
        "output": [{"name": "y", "data_type": 9, "dims": [1], "label_filename": "l.txt"}]}"""
    )
    assert config == parse(GOOD)
    assert parse_json(json.dumps(config.document)).document == config.document


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "config.pbtxt: must be a JSON object"),
        ("[]", "config.pbtxt: must be a JSON object"),
        ("{", "config.pbtxt: "),
        ('{"max_batch_siz": 1}', r'no field named "max_batch_siz".*; did you mean max_batch_size\?'),
        ('{"max_batch_size": "many"}', "max_batch_size"),
        ('{"batch_input": [{}]}', "batch_input: this field is not served yet"),
        ('{"input": [{"name": "\\ud800"}]}', "config.pbtxt: "),
        ('{"a":' * 5000 + "1" + "}" * 5000, "config.pbtxt: "),
    ],
)
def test_json_that_is_refused(text: str, error: str) -> None:
    """As for text: what does not parse, is unknown or is not served."""
    with pytest.raises(ConfigError, match=error):
        read_json(text, FILE)


EVERYTHING = """
backend: "python" max_batch_size: 4 runtime: "r"
input [
  { name: "x" data_type: TYPE_FP32 dims: [ 1, 4 ] reshape { shape: [ 4 ] } },
  { name: "z" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 1, 2, -1 ] allow_ragged_batch: true optional: true }
]
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] reshape { shape: [ ] } label_filename: "l.txt" }
dynamic_batching {
  preferred_batch_size: [ 2, 4 ] max_queue_delay_microseconds: 100 priority_levels: 2 default_priority_level: 1
  default_queue_policy { max_queue_size: 3 }
  priority_queue_policy { key: 2 value { timeout_action: DELAY default_timeout_microseconds: 5 } }
}
metric_tags { key: "a" value: "b" }
parameters { key: "k" value { string_value: "v" } }
model_warmup {
  name: "w" batch_size: 2 inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 1, 4 ] zero_data: true } }
}
optimization {
  graph { level: 1 } eager_batching: true input_pinned_memory { enable: false }
  execution_accelerators { gpu_execution_accelerator { name: "tensorrt" parameters { key: "a" value: "b" } } }
}
instance_group [
  { kind: KIND_CPU count: 2 },
  { name: "g" rate_limiter { resources { name: "r" count: 1 } } host_policy: "hp" },
  { kind: KIND_MODEL passive: true }
]
response_cache { enable: false }
model_transaction_policy { decoupled: true }
version_policy { specific { versions: [ 1, 3 ] } }
"""

# What Triton 2.51 answers for it, in its order.
EFFECTIVE = """{"name":"m","platform":"","backend":"python","runtime":"r",
"version_policy":{"specific":{"versions":[1,3]}},"max_batch_size":4,
"input":[{"name":"x","data_type":"TYPE_FP32","format":"FORMAT_NONE","dims":[1,4],"reshape":{"shape":[4]},
"is_shape_tensor":false,"allow_ragged_batch":false,"optional":false,"is_non_linear_format_io":false},
{"name":"z","data_type":"TYPE_FP32","format":"FORMAT_NCHW","dims":[1,2,-1],
"is_shape_tensor":false,"allow_ragged_batch":true,"optional":true,"is_non_linear_format_io":false}],
"output":[{"name":"y","data_type":"TYPE_STRING","dims":[1],"reshape":{"shape":[]},"label_filename":"l.txt",
"is_shape_tensor":false,"is_non_linear_format_io":false}],"batch_input":[],"batch_output":[],
"optimization":{"graph":{"level":1},"priority":"PRIORITY_DEFAULT","execution_accelerators":
{"gpu_execution_accelerator":[{"name":"tensorrt","parameters":{"a":"b"}}],"cpu_execution_accelerator":[]},
"input_pinned_memory":{"enable":false},"output_pinned_memory":{"enable":true},"gather_kernel_buffer_threshold":0,
"eager_batching":true},
"dynamic_batching":{"preferred_batch_size":[2,4],"max_queue_delay_microseconds":100,"preserve_ordering":false,
"priority_levels":2,"default_priority_level":1,"default_queue_policy":{"timeout_action":"REJECT",
"default_timeout_microseconds":0,"allow_timeout_override":false,"max_queue_size":3},
"priority_queue_policy":{"2":{"timeout_action":"DELAY","default_timeout_microseconds":5,
"allow_timeout_override":false,"max_queue_size":0}}},
"instance_group":[{"name":"m_0","kind":"KIND_CPU","count":2,"gpus":[],"secondary_devices":[],"profile":[],
"passive":false,"host_policy":""},{"name":"g","kind":"KIND_CPU","count":1,"rate_limiter":{"resources":[{"name":"r",
"global":false,"count":1}],"priority":0},"gpus":[],"secondary_devices":[],"profile":[],"passive":false,
"host_policy":"hp"},{"name":"m_2","kind":"KIND_MODEL","count":1,"gpus":[],"secondary_devices":[],"profile":[],
"passive":true,"host_policy":""}],"default_model_filename":"model.py","cc_model_filenames":{},
"metric_tags":{"a":"b"},"parameters":{"k":{"string_value":"v"}},"model_warmup":[{"name":"w","batch_size":2,
"inputs":{"x":{"data_type":"TYPE_FP32","dims":[1,4],"zero_data":true}},"count":0}],
"model_transaction_policy":{"decoupled":true},"response_cache":{"enable":false}}"""


def test_the_effective_config_is_tritons() -> None:
    """Every field in Triton's order, defaults too, 64-bit numbers as numbers, enums as names."""
    document = parse(EVERYTHING).document
    assert json.dumps(document) == json.dumps(json.loads(EFFECTIVE))


def test_the_effective_config_has_defaults() -> None:
    """One version, one instance named after the model, the largest batch preferred, pinned memory."""
    document = parse(GOOD, 1).document
    assert document["version_policy"] == {"latest": {"num_versions": 1}}
    assert document["dynamic_batching"]["preferred_batch_size"] == [8]
    assert document["optimization"]["input_pinned_memory"] == {"enable": True}
    (group,) = document["instance_group"]
    assert (group["name"], group["kind"], group["count"], group["gpus"]) == ("m", "KIND_GPU", 1, [0])
    assert "response_cache" not in document
    assert parse(GOOD + "version_policy { latest { } }").document["version_policy"] == {"latest": {"num_versions": 1}}
    assert parse(GOOD + "version_policy { all { } }").document["version_policy"] == {"all": {}}
    assert parse(GOOD.replace("8", "0", 1)).document["dynamic_batching"]["preferred_batch_size"] == []


def test_a_message_as_json_holds_what_is_unset_too() -> None:
    """Before anything is filled in: what a model's own code sees when it is asked to complete a config."""
    document = to_json(read_text('input { name: "x" }', FILE))
    assert document["input"][0]["data_type"] == "TYPE_INVALID"
    assert (document["input"][0]["dims"], document["output"], document["max_batch_size"]) == ([], [], 0)
    assert "dynamic_batching" not in document


def test_every_field_is_honoured_reported_or_refused_by_name() -> None:
    """No field is in two of the tables, and all that they name exists in Triton's config."""
    names = {path.rpartition(".")[2] for path in (*HONOURED, *REPORTED, *NEVER)}
    assert not (HONOURED & set(REPORTED)) | (HONOURED & set(NEVER)) | (set(REPORTED) & set(NEVER))
    assert names <= FIELDS


@given(st.text(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(FIELDS)), inner, max_size=4),
).map(json.dumps))  # fmt: skip
def test_any_json_is_a_config_or_a_refusal(text: str) -> None:
    """Whatever is sent: a config, or ConfigError, nothing else."""
    try:
        parse_json(text)
    except ConfigError as error:
        assert str(error).startswith("models/m/config.pbtxt: ")  # noqa: PT017
