"""config.pbtxt: every refusal names file, field and value; nothing that is set is ignored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ModelConfig, parse_config
from engine.errors import ConfigError

IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ] label_filename: "l.txt" } ]
"""
GOOD = 'backend: "pytorch" max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 500 }' + IO


def parse(text: str) -> ModelConfig:
    return parse_config(text, "m", "models/m/config.pbtxt")


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
    assert (config.batching, config.max_delay, config.max_batch_size) == (True, 0.0005, 8)
    assert (config.versions, config.latest, config.device) == ((3, 1), 0, "cpu")
    assert config.label_files == {"y": "l.txt"}


def test_defaults_are_tritons() -> None:
    """No version policy is the latest one version; no instance group is any device; no batching without being asked."""
    config = parse('platform: "pytorch_libtorch"' + IO)
    assert (config.backend, config.files, config.platform) == ("pytorch", ("model.pt",), "pytorch_libtorch")
    assert (config.latest, config.versions, config.device) == (1, (), "auto")
    assert (config.batching, config.max_batch_size) == (False, 0)
    assert config.inputs["x"].shape == (3, -1)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("name: ", "config.pbtxt: 1:"),
        ("nme: 'm'", 'no field named "nme"'),
        (GOOD + "name: 'other'", "name: unexpected directory name 'm' for model 'other'"),
        (IO, "backend: model 'm' names neither"),
        (GOOD.replace("pytorch", "tensorrt"), "backend: 'tensorrt' is not served; served are pytorch"),
        (GOOD + "platform: 'tensorrt_plan'", "platform: 'tensorrt_plan' is not served"),
        ("platform: 'pytorch_libtorch' backend: 'python'" + IO, "got:pytorch_libtorch, python"),
        (GOOD.replace("8", "-1"), "max_batch_size: must be non-negative, got -1"),
        (GOOD.replace("max_batch_size: 8", ""), "dynamic_batching: needs a max_batch_size"),
        (GOOD + "sequence_batching { }", "sequence_batching|oneof"),
        (GOOD + "ensemble_scheduling { }", "ensemble_scheduling|oneof"),
        (GOOD + "model_warmup { name: 'w' }", 'model_warmup: this field is not served yet, got .*"w"'),
        (GOOD + "parameters { key: 'k' value { string_value: 'v' } }", "parameters: this field is not served yet"),
        (GOOD + "response_cache { enable: true }", "response_cache: this field is not served yet"),
        (GOOD.replace("max_queue_delay_microseconds: 500", "preferred_batch_size: 4"),
         r"dynamic_batching.preferred_batch_size: this field is not served yet, got \[4\]"),
        (GOOD.replace("dims: [ 3, -1 ]", "dims: [ 3 ] optional: true"), "input.optional: .* not served yet, got True"),
        (GOOD.replace("[ 3, -1 ]", "[ ]"), "input.dims: model input 'x' must specify 'dims'"),
        (GOOD.replace("[ 3, -1 ]", "[ 3, 0 ]"), r"input.dims: .*got \[3, 0\]"),
        (GOOD.replace("TYPE_FP32", "TYPE_STRING"), "input.data_type: TYPE_STRING of 'x' is not served yet"),
        (GOOD.replace("data_type: TYPE_FP32", ""), "input.data_type: model input 'x' must specify 'data_type'"),
        (GOOD.replace('name: "x"', ""), "input.name: model input must specify 'name'"),
        (GOOD + 'input { name: "x" data_type: TYPE_FP32 dims: 1 }', "input.name: 'x' is given twice"),
        ('backend: "pytorch"' + IO.split("output")[0], "output: the model must have at least one output"),
        (GOOD + "version_policy { specific { } }", "version_policy.specific.versions: must be positive"),
        (GOOD + "instance_group { count: 2 }", "instance_group: more than one instance"),
        (GOOD + "instance_group { kind: KIND_CPU gpus: 0 }", "instance_group.gpus: kind KIND_CPU but"),
        (GOOD + "instance_group { kind: KIND_MODEL }", "instance_group.kind: KIND_MODEL is not served yet"),
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
    ("group", "device"), [("kind: KIND_GPU", "cuda:0"), ("kind: KIND_GPU gpus: 3", "cuda:3"), ("gpus: 1", "cuda:1")]
)
def test_devices(group: str, device: str) -> None:
    """An instance group names the device, as in Triton."""
    assert parse(GOOD + f"instance_group {{ {group} }}").device == device


@given(st.text(max_size=200) | st.text(st.sampled_from(list(GOOD)), max_size=400))
def test_any_text_is_a_config_or_a_refusal(text: str) -> None:
    """Whatever is in the file: a config, or ConfigError, nothing else."""
    try:
        parse(text)
    except ConfigError as error:
        assert str(error).startswith("models/m/config.pbtxt: ")  # noqa: PT017
