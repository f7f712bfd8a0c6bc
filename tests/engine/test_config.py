"""config.pbtxt: every refusal names file, field and value; nothing that is set is ignored."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.policy import Level, Policy
from engine.config import ATTRIBUTES, PARAMETERS, ModelConfig, parse_config
from engine.errors import ConfigError

IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ] label_filename: "l.txt" } ]
"""
GOOD = 'backend: "pytorch" max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 500 }' + IO
ALONE = 'backend: "pytorch" max_batch_size: 8' + IO
RAGGED = GOOD.replace("-1 ]", "-1 ] allow_ragged_batch: true")


def parse(text: str) -> ModelConfig:
    return parse_config(text, "m", "models/m/config.pbtxt")


def batched(text: str) -> str:
    """GOOD, with another dynamic batcher."""
    return GOOD.replace("max_queue_delay_microseconds: 500", text)


def with_parameters(text: str, **parameters: str) -> str:
    """`text` with our parameters, a dot of their names written as two underscores."""
    for key, value in parameters.items():
        text += f"parameters {{ key: '{key.replace('__', '.')}' value {{ string_value: '{value}' }} }}\n"
    return text


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
        (GOOD + "model_warmup { } model_warmup { }", r"model_warmup: this field is not served yet, got \{ \}$"),
        (GOOD + "optimization { }", r"optimization: this field is not served yet, got \{ \}$"),
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


@pytest.mark.parametrize(
    ("key", "value", "policy"),
    [
        ("latency_objective_ms", "12.5", {"objective": 0.0125}),
        ("patience_ms", "250", {"patience": 0.25}),
        ("max_batch_tokens", "4096", {"max_cost": 4096}),
        ("max_batch_tokens", "1", {"max_cost": 1}),
        ("max_batch_tokens", "9007199254740991", {"max_cost": 2**53 - 1}),
        ("padded_lengths", "2147483647", {"lengths": (2**31 - 1,)}),
        ("padded_lengths", " ".join(map(str, range(1, 513))), {"lengths": tuple(range(1, 513))}),
        ("padded_lengths", "16 32 64", {"lengths": (16, 32, 64)}),
        ("padded_lengths", "16, 32,64", {"lengths": (16, 32, 64)}),
        ("padded_rows", "1 4 8", {"row_grid": (1, 4, 8)}),
        ("max_padding", "0.25", {"max_padding": 0.25}),
    ],
)
def test_our_parameters(key: str, value: str, policy: dict[str, Any]) -> None:
    """Each sets one knob of the policy, and nothing else."""
    assert parse(with_parameters(RAGGED, **{key: value})).policy == Policy(8, max_delay=0.0005, **policy)


def test_every_parameter_sets_a_field_of_the_policy() -> None:
    """The table of parameters names attributes that exist, each once."""
    attributes = [attribute for attribute, _, _ in PARAMETERS.values()]
    assert len(set(attributes)) == len(attributes)
    assert set(attributes) <= set(ATTRIBUTES) <= {field.name for field in dataclasses.fields(Policy)}


def test_rows_are_padded_without_a_dynamic_batcher_too() -> None:
    """A request that is run alone is padded as well, so the grid is honoured."""
    assert parse(with_parameters(ALONE, padded_rows="4 8")).policy == Policy(8, row_grid=(4, 8))


@pytest.mark.parametrize(
    ("datatype", "value", "pad"),
    [
        ("FP32", "-0.5", -0.5),
        ("FP32", "-inf", -math.inf),
        ("FP16", "65504", 65504.0),
        ("INT64", "-100", -100.0),
        ("UINT8", "255", 255.0),
        ("BOOL", "1", 1.0),
    ],
)
def test_padding_values(datatype: str, value: str, pad: float) -> None:
    """A ragged input is padded with what its config says, which its datatype can hold."""
    assert parse(with_parameters(RAGGED.replace("FP32", datatype), pad__x=value)).pad == {"x": pad}


@pytest.mark.parametrize(
    ("text", "parameters", "error"),
    [
        (GOOD, {"latency_objectiv_ms": "5"},
         r"parameters.latency_objectiv_ms: no such parameter; did you mean latency_objective_ms\?"),
        (GOOD, {"INFERENCE_MODE": "true"}, "INFERENCE_MODE: no such parameter; there are latency_.*, pad.NAME$"),
        (RAGGED, {"INFERENCE_MODE": "true"}, "INFERENCE_MODE: no such parameter; there are latency_.*g, pad.x$"),
        (RAGGED, {"pad__y": "1"}, r"parameters.pad.y: no such parameter; did you mean pad.x\?"),
        (GOOD, {"latency_objective_ms": "fast"},
         "parameters.latency_objective_ms: must be a positive number of milliseconds, got 'fast'"),
        (GOOD, {"latency_objective_ms": "0"}, "parameters.latency_objective_ms: must be a positive .*, got '0'"),
        (GOOD, {"latency_objective_ms": "nan"}, "parameters.latency_objective_ms: must be a positive .*, got 'nan'"),
        (GOOD, {"patience_ms": "-1"}, "parameters.patience_ms: must be a positive number of milliseconds, got '-1'"),
        (GOOD, {"patience_ms": "inf"}, "parameters.patience_ms: must be a positive number of milliseconds, got 'inf'"),
        (GOOD, {"patience_ms": ""}, "parameters.patience_ms: must be a positive number of milliseconds, got ''"),
        (RAGGED, {"max_batch_tokens": "1e3"}, "parameters.max_batch_tokens: must be a whole number .*, got '1e3'"),
        (RAGGED, {"max_batch_tokens": "-1"}, "parameters.max_batch_tokens: must be a whole number .*, got '-1'"),
        (RAGGED, {"max_batch_tokens": "0"},
         "parameters.max_batch_tokens: must be a whole number from 1 to 9007199254740991, got '0'"),
        (RAGGED, {"max_batch_tokens": "9007199254740992"}, "must be .* 1 to 9007199254740991, got '9007199254740992'"),
        (RAGGED, {"padded_lengths": "16 32", "max_batch_tokens": "31"},
         "parameters.max_batch_tokens: must hold a row of the longest of padded_lengths, 32, got 31"),
        (RAGGED, {"padded_lengths": "16 32", "padded_rows": "4 8", "max_batch_tokens": "127"},
         "parameters.max_batch_tokens: must hold the fewest rows of padded_rows times the longest of padded_lengths, "
         "4 x 32, got 127"),
        (RAGGED, {"padded_lengths": "16 x"}, "parameters.padded_lengths: must be whole numbers, .*, got '16 x'"),
        (RAGGED, {"padded_lengths": " "}, "parameters.padded_lengths: must be whole numbers, .*, got ' '"),
        (RAGGED, {"padded_lengths": "1 2147483648"},
         "parameters.padded_lengths: must be whole numbers, at most 512, none above 2147483647, with spaces or commas "
         "between them, got '1 2147483648'"),
        (RAGGED, {"padded_lengths": " ".join(map(str, range(1, 514)))},
         r"parameters.padded_lengths: must be whole numbers, at most 512, .*, got '1 2 3 .*\.\.\.$"),
        (GOOD, {"padded_rows": " ".join(map(str, range(1, 514)))},
         r"parameters.padded_rows: must be whole numbers, at most 512, .*, got '1 2 3 .*\.\.\.$"),
        (RAGGED, {"padded_lengths": "32 16"},
         r"parameters.padded_lengths: must be positive and ascending, got \[32, 16\]"),
        (RAGGED, {"padded_lengths": "0 16"}, "parameters.padded_lengths: must be positive and ascending"),
        (GOOD, {"padded_rows": "2 4"}, r"parameters.padded_rows: must end with max_batch_size \(8\), got 4"),
        (ALONE, {"latency_objective_ms": "5"},
         r"parameters.latency_objective_ms: needs dynamic_batching \{ \}, got '5'"),
        (ALONE.replace("max_batch_size: 8", ""), {"padded_rows": "1"},
         "parameters.padded_rows: needs a max_batch_size of at least 1, got '1'"),
        (RAGGED, {"max_padding": "1.5"}, "parameters.max_padding: must be a share, 0 to 1, got 1.5"),
        (RAGGED, {"max_padding": "nan"}, "parameters.max_padding: must be a share"),
        (RAGGED, {"max_padding": "half"}, "parameters.max_padding: must be a number from 0 to 1, got 'half'"),
        (GOOD, {"max_batch_tokens": "9"},
         "parameters.max_batch_tokens: needs an input with allow_ragged_batch: true, got '9'"),
        (GOOD, {"padded_lengths": "9"}, "parameters.padded_lengths: needs an input with allow_ragged_batch: true"),
        (GOOD, {"max_padding": "0"}, "parameters.max_padding: needs an input with allow_ragged_batch: true"),
        (GOOD, {"pad__x": "0"}, "parameters.pad.x: needs an input with allow_ragged_batch: true"),
        (RAGGED, {"pad__x": "none"}, "parameters.pad.x: must be a number that FP32 holds, got 'none'"),
        (RAGGED, {"pad__x": "nan"}, "parameters.pad.x: must be a number that FP32 holds, got 'nan'"),
        (RAGGED, {"pad__x": "1e39"}, "parameters.pad.x: must be a number that FP32 holds, got '1e39'"),
        (RAGGED, {"pad__x": "1e400"}, "parameters.pad.x: must be a number that FP32 holds, got '1e400'"),
        (RAGGED.replace("FP32", "FP16"), {"pad__x": "65520"}, "parameters.pad.x: must be a number that FP16 holds"),
        (RAGGED.replace("FP32", "INT32"), {"pad__x": "0.5"}, "parameters.pad.x: must be a number that INT32 holds"),
        (RAGGED.replace("FP32", "UINT8"), {"pad__x": "-1"}, "parameters.pad.x: must be a number that UINT8 holds"),
        (RAGGED.replace("FP32", "BOOL"), {"pad__x": "2"}, "parameters.pad.x: must be a number that BOOL holds"),
        (RAGGED.replace("FP32", "INT64"), {"pad__x": "9007199254740993"}, "parameters.pad.x: must be .* INT64 holds"),
        (RAGGED.replace("FP32", "INT64"), {"pad__x": "-9007199254740993"}, "parameters.pad.x: must be .* INT64 holds"),
        (RAGGED.replace("FP32", "INT64"), {"pad__x": "inf"}, "parameters.pad.x: must be a number that INT64 holds"),
    ],
)  # fmt: skip
def test_parameters_that_are_refused(text: str, parameters: dict[str, str], error: str) -> None:
    """An unknown one names the nearest; a value that does not parse, or does not fit, is named with its key."""
    with pytest.raises(ConfigError, match=error) as refused:
        parse(with_parameters(text, **parameters))
    assert str(refused.value).startswith("models/m/config.pbtxt: parameters.")


VALUES = st.sampled_from(["-1", "0", "1", "2.5", "nan", "inf", "1e400", "9" * 30, "16 32", "32,16", "DELAY", "x", ""])


@given(st.dictionaries(st.sampled_from([*PARAMETERS, "pad__x", "pad__y"]), VALUES), st.booleans())
def test_any_parameters_are_a_config_or_a_refusal(parameters: dict[str, str], ragged: bool) -> None:
    """Whatever their values: a config, or ConfigError, nothing else."""
    try:
        parse(with_parameters(RAGGED if ragged else GOOD, **parameters))
    except ConfigError as error:
        assert str(error).startswith("models/m/config.pbtxt: parameters.")  # noqa: PT017


@given(st.text(max_size=200) | st.text(st.sampled_from(list(GOOD)), max_size=400))
def test_any_text_is_a_config_or_a_refusal(text: str) -> None:
    """Whatever is in the file: a config, or ConfigError, nothing else."""
    try:
        parse(text)
    except ConfigError as error:
        assert str(error).startswith("models/m/config.pbtxt: ")  # noqa: PT017
