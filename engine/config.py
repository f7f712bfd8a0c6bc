"""config.pbtxt -> ModelConfig. Triton's file, read with protobuf's own text format and Triton's own message classes.

HONOURED lists the fields that this version honours, PARAMETERS the entries of `parameters`. What is set and not listed
is refused, with file, field and value: a model never runs under a config that says something else. Pure: text in,
values out.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from batching.policy import Level, Policy

from .errors import ConfigError
from .types import DATATYPES, TensorSpec

HONOURED = frozenset(
    "name platform backend max_batch_size default_model_filename "
    "version_policy version_policy.latest version_policy.latest.num_versions version_policy.all "
    "version_policy.specific version_policy.specific.versions "
    "input input.name input.data_type input.dims input.allow_ragged_batch "
    "output output.name output.data_type output.dims output.label_filename "
    "dynamic_batching dynamic_batching.preferred_batch_size dynamic_batching.max_queue_delay_microseconds "
    "dynamic_batching.preserve_ordering dynamic_batching.priority_levels dynamic_batching.default_priority_level "
    "dynamic_batching.default_queue_policy "
    "dynamic_batching.default_queue_policy.timeout_action "
    "dynamic_batching.default_queue_policy.default_timeout_microseconds "
    "dynamic_batching.default_queue_policy.allow_timeout_override "
    "dynamic_batching.default_queue_policy.max_queue_size "
    "dynamic_batching.priority_queue_policy "
    "dynamic_batching.priority_queue_policy.timeout_action "
    "dynamic_batching.priority_queue_policy.default_timeout_microseconds "
    "dynamic_batching.priority_queue_policy.allow_timeout_override "
    "dynamic_batching.priority_queue_policy.max_queue_size "
    "response_cache response_cache.enable parameters parameters.string_value "
    "instance_group instance_group.name instance_group.kind instance_group.count instance_group.gpus".split()
)

# platform -> (backend, default model file)
PLATFORMS = {"pytorch_libtorch": ("pytorch", "model.pt")}

# backend -> model files that it looks for, the first one that exists wins
MODEL_FILES = {"pytorch": ("model.pt2", "model.pt")}

# Levels of priority that one model may have; each is a queue of its own.
MOST_LEVELS = 100

# Whole numbers up to this one are exact as a float.
MOST_EXACT = 2**53 - 1

# Numbers that one grid may have, and the largest length in it.
MOST_SIZES = 512
MOST_LENGTH = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model as its config.pbtxt describes it.

    Attributes:
        platform: as the file gives it, "" if it does not.
        files: names of the model's file in a version folder; the first that exists is the model.
        latest: how many of the highest versions to serve; 0 when `versions` says which, or all of them.
        versions: the versions to serve; empty means by `latest`, or all if that is 0.
        max_batch_size: rows of a batch; 0 when the model's tensors have no batch dimension.
        inputs, outputs: shapes include the batch dimension (-1) where max_batch_size is not 0.
        batching: whether requests share batches; without it each is run alone, as in Triton.
        policy: how; its capacities and fair shares are defaults, for whoever has the settings to replace.
        cache: whether answers may be kept for requests that are equal.
        ragged: input whose size may differ within a batch -> index of the dimension that does, in the spec's shape.
        pad: ragged input -> what fills it up to the longest of a batch.
        device: "auto", "cpu" or "cuda:N".
        label_files: output name -> file in the model's folder.
    """

    name: str
    backend: str
    platform: str
    files: tuple[str, ...]
    latest: int
    versions: tuple[int, ...]
    max_batch_size: int
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    batching: bool
    policy: Policy
    cache: bool
    ragged: dict[str, int]
    pad: dict[str, float]
    device: str
    label_files: dict[str, str]

    @property
    def variable(self) -> bool:
        """Whether an input that is not ragged has a dimension of any size: only equal ones share a batch."""
        skip = 1 if self.max_batch_size else 0
        return any(-1 in spec.shape[skip:] for name, spec in self.inputs.items() if name not in self.ragged)


def parse_config(text: str, folder: str, file: str) -> ModelConfig:
    """Read a config.pbtxt.

    Args:
        folder: name of the model's folder, which the model's name must equal.
        file: how errors name the file.

    Raises:
        ConfigError: it is malformed, contradicts itself or asks for what is not served; names file, field and value.
    """
    message = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ConfigError(f"{file}: {_with_hint(str(error))}") from None

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"{file}: {reason}")

    for path, field, value in _set_fields(message):
        if path not in HONOURED:
            raise refuse(f"{path}: this field is not served yet, got {_brief(value)}")
        if field.enum_type is not None and value not in field.enum_type.values_by_number:
            raise refuse(f"{path}: must be one of {', '.join(field.enum_type.values_by_name)}, got {value}")
    name = message.name or folder
    if name != folder:
        raise refuse(
            f"name: unexpected directory name '{folder}' for model '{name}', directory name must equal model name"
        )
    backend, files = _backend(message, name, refuse)
    if message.max_batch_size < 0:
        raise refuse(f"max_batch_size: must be non-negative, got {message.max_batch_size}")
    if message.HasField("dynamic_batching") and not message.max_batch_size:
        raise refuse("dynamic_batching: needs a max_batch_size of at least 1, got 0")
    policy = message.version_policy
    choice = policy.WhichOneof("policy_choice")
    versions = tuple(policy.specific.versions)
    if choice == "specific" and (not versions or min(versions) < 1):
        raise refuse(f"version_policy.specific.versions: must be positive numbers, at least one, got {list(versions)}")
    inputs = _tensors("input", message.input, message.max_batch_size, refuse)
    ragged = _ragged(message, inputs, refuse)
    parameters = _parameters(message, {name: inputs[name].datatype for name in ragged}, refuse)
    return ModelConfig(
        name=name,
        backend=backend,
        platform=message.platform,
        files=files,
        latest={"latest": max(policy.latest.num_versions, 1), None: 1}.get(choice, 0),
        versions=versions,
        max_batch_size=message.max_batch_size,
        inputs=inputs,
        outputs=_tensors("output", message.output, message.max_batch_size, refuse),
        batching=message.HasField("dynamic_batching"),
        policy=_policy(message, name, parameters, refuse),
        cache=message.response_cache.enable,
        ragged=ragged,
        pad={name: parameters.get(f"pad.{name}", 0.0) for name in ragged},
        device=_device(message.instance_group, refuse),
        label_files={
            o.name: _plain(f"output.label_filename of '{o.name}'", o.label_filename, refuse)
            for o in message.output
            if o.label_filename
        },
    )


def _with_hint(error: str) -> str:
    """An error of protobuf's, with the nearest field that there is if it is about one that there is not."""
    unknown = re.search(r'no field named "([^"]+)"', error)
    if unknown is None or unknown[1] in FIELDS:  # spelled right, in the wrong place
        return error
    close = difflib.get_close_matches(unknown[1], FIELDS, n=1)
    return f"{error.removesuffix('.')}; did you mean {close[0]}?" if close else error


def _field_names(root: Descriptor) -> Iterator[str]:
    """Of `root` and of every message that it may hold."""
    messages = [root]
    for message in messages:
        for field in message.fields:
            yield field.name
            if field.message_type is not None and field.message_type not in messages:
                messages.append(field.message_type)


FIELDS = frozenset(_field_names(model_config_pb2.ModelConfig.DESCRIPTOR))


def _set_fields(message: Message, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, descriptor, value) of every field that the file sets, outer ones first; without a map's keys."""
    for field, value in message.ListFields():
        path = prefix + field.name
        yield path, field, value
        if field.message_type is not None and path in HONOURED:
            is_map = field.message_type.GetOptions().map_entry
            for part in value.values() if is_map else value if field.is_repeated else [value]:
                yield from _set_fields(part, path + ".")


def _backend(message: Any, name: str, refuse: Any) -> tuple[str, tuple[str, ...]]:
    backend, default = PLATFORMS.get(message.platform, (message.backend, ""))
    if message.platform and message.platform not in PLATFORMS:
        raise refuse(f"platform: '{message.platform}' is not served; served are {', '.join(PLATFORMS)}")
    if message.backend and message.backend != backend:
        raise refuse(f"backend: unexpected 'platform' and 'backend' pair, got:{message.platform}, {message.backend}")
    if backend not in MODEL_FILES:
        served = ", ".join(MODEL_FILES)
        if not backend:
            raise refuse(
                f"backend: model '{name}' names neither a backend nor a platform; served backends are {served}"
            )
        raise refuse(f"backend: '{backend}' is not served; served are {served}")
    if message.default_model_filename:
        return backend, (_plain("default_model_filename", message.default_model_filename, refuse),)
    return backend, (default,) if default else MODEL_FILES[backend]


def _tensors(field: str, messages: Any, max_batch_size: int, refuse: Any) -> dict[str, TensorSpec]:
    if not messages:
        raise refuse(f"{field}: the model must have at least one {field}")
    tensors: dict[str, TensorSpec] = {}
    for message in messages:
        if not message.name:
            raise refuse(f"{field}.name: model {field} must specify 'name'")
        if message.name in tensors:
            raise refuse(f"{field}.name: '{message.name}' is given twice")
        datatype = model_config_pb2.DataType.Name(message.data_type).removeprefix("TYPE_")
        if datatype == "INVALID":
            raise refuse(f"{field}.data_type: model {field} '{message.name}' must specify 'data_type'")
        if datatype not in DATATYPES:
            raise refuse(f"{field}.data_type: TYPE_{datatype} of '{message.name}' is not served yet")
        if not message.dims:
            raise refuse(f"{field}.dims: model {field} '{message.name}' must specify 'dims'")
        if any(dim < 1 and dim != -1 for dim in message.dims):
            raise refuse(
                f"{field}.dims: model {field} '{message.name}' dimension must be integer >= 1, or -1 to indicate a "
                f"variable-size dimension, got {list(message.dims)}"
            )
        batch = (-1,) if max_batch_size else ()
        tensors[message.name] = TensorSpec(message.name, datatype, batch + tuple(message.dims))
    return tensors


def _ragged(message: Any, inputs: dict[str, TensorSpec], refuse: Any) -> dict[str, int]:
    """Ragged input -> index of its dimension of any size, counted with the batch dimension."""
    ragged = {}
    for tensor in message.input:
        if tensor.allow_ragged_batch:
            field, dims = f"input.allow_ragged_batch of '{tensor.name}'", inputs[tensor.name].shape[1:]
            if not message.HasField("dynamic_batching"):
                raise refuse(f"{field}: needs a max_batch_size of at least 1 and dynamic_batching")
            if dims.count(-1) != 1:
                raise refuse(f"{field}: served with exactly one dimension of any size (-1) in dims, got {list(dims)}")
            ragged[tensor.name] = 1 + dims.index(-1)
    return ragged


def _policy(message: Any, name: str, parameters: dict[str, Any], refuse: Any) -> Policy:
    """Triton's dynamic batcher, with Triton's refusals, and what our parameters add to it."""
    batching = message.dynamic_batching
    levels, default, ordered = batching.priority_levels, batching.default_priority_level, batching.preserve_ordering
    preferred, policies = sorted(set(batching.preferred_batch_size)), batching.priority_queue_policy
    delays = any(_level(policy).delay for policy in (batching.default_queue_policy, *policies.values()))
    given, within = sorted(policies), f"in range [1, {levels}]"
    for wrong, field, text, got in (
        (min(preferred, default=1) < 1, "preferred_batch_size",
         "dynamic batching preferred size must be positive", preferred),
        (max(preferred, default=0) > message.max_batch_size, "preferred_batch_size",
         "dynamic batching preferred size must be <= max batch size", preferred),
        (levels > MOST_LEVELS, "priority_levels", f"at most {MOST_LEVELS} priority levels are served", levels),
        (default and not levels, "default_priority_level", "needs priority_levels", default),
        (given and not levels, "priority_queue_policy", "needs priority_levels", given),
        (levels and not 1 <= default <= levels, "default_priority_level",
         f"default priority level must be {within}", default),
        (given and not 1 <= given[0] <= given[-1] <= levels, "priority_queue_policy",
         f"priority queue policy must have priority level {within}", given),
        (ordered and levels > 1, "priority_levels",
         "Only one priority level is allowed when 'preserve_ordering' is true", levels),
        (ordered and delays, "preserve_ordering",
         "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true", ordered),
    ):  # fmt: skip
        if wrong:
            raise refuse(f"dynamic_batching.{field}: {text} for {name}, got {got}")
    max_rows = max(message.max_batch_size, 1)
    of_levels = [policies.get(level, batching.default_queue_policy) for level in range(1, max(levels, 1) + 1)]
    try:
        return Policy(
            max_rows=max_rows,
            preferred=tuple(preferred),
            max_delay=batching.max_queue_delay_microseconds / 1e6,
            capacity=max(1024, max_rows),
            levels=tuple(map(_level, of_levels)),
            default_level=max(default, 1) - 1,
            ordered=ordered,
            **{PARAMETERS[key][0]: value for key, value in parameters.items() if key in PARAMETERS},
        )
    except ValueError as error:  # its text begins with the attribute that does not fit
        text = _ATTRIBUTE.sub(lambda found: ATTRIBUTES[found[0]], str(error))
        field, _, rest = text.partition(" ")
        raise refuse(f"parameters.{field}: {rest}" if field in PARAMETERS else f"dynamic_batching: {text}") from None


def _level(policy: Any) -> Level:
    microseconds = policy.default_timeout_microseconds
    return Level(
        max_items=policy.max_queue_size,
        timeout=microseconds / 1e6 if microseconds else math.inf,
        delay=policy.timeout_action == model_config_pb2.ModelQueuePolicy.DELAY,
        override=policy.allow_timeout_override,
    )


def _parameters(message: Any, ragged: dict[str, str], refuse: Any) -> dict[str, Any]:
    """Value of each parameter that the file sets; `ragged` is the datatype of each ragged input."""
    parameters, batching = message.parameters, message.HasField("dynamic_batching")
    known = PARAMETERS | {
        f"pad.{name}": ("", partial(_padding, datatype), f"a number that {datatype} holds")
        for name, datatype in ragged.items()
    }
    values = {}
    for key in sorted(parameters):
        text = parameters[key].string_value
        for there, needs, what in (
            (ragged, key in NEED_RAGGED or key.startswith("pad."), "an input with allow_ragged_batch: true"),
            (batching, key in NEED_BATCHING, "dynamic_batching { }"),
            (message.max_batch_size, key in NEED_ROWS, "a max_batch_size of at least 1"),
        ):
            if needs and not there:
                raise refuse(f"parameters.{key}: needs {what}, got {text!r}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            names = [*known] if ragged else [*known, "pad.NAME"]
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise refuse(f"parameters.{key}: no such parameter; {hint}")
        _, read, expected = known[key]
        try:
            values[key] = read(text)
        except ValueError:
            raise refuse(f"parameters.{key}: must be {expected}, got {_brief(repr(text))}") from None
    return values


def _seconds(milliseconds: str) -> float:
    value = float(milliseconds) / 1000
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _tokens(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST_EXACT:
        raise ValueError
    return value


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.replace(",", " ").split()))
    if not 1 <= len(sizes) <= MOST_SIZES or max(sizes) > MOST_LENGTH:
        raise ValueError
    return sizes


def _padding(datatype: str, text: str) -> float:
    value, dtype = float(text), DATATYPES[datatype]
    if dtype.kind == "f":
        fits = "inf" in text.lower() or abs(value) <= float(np.finfo(dtype).max)  # infinite only if it says so
    else:
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        fits = value.is_integer() and max(low, -MOST_EXACT) <= value <= min(high, MOST_EXACT)
    if not fits:
        raise ValueError
    return value


_SIZES = f"whole numbers, at most {MOST_SIZES}, none above {MOST_LENGTH}, with spaces or commas between them"

# Our parameters: key -> (attribute of Policy, how its text is read, what the text must be). There is also pad.NAME, the
# padding value of the ragged input NAME.
PARAMETERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "latency_objective_ms": ("objective", _seconds, "a positive number of milliseconds"),
    "patience_ms": ("patience", _seconds, "a positive number of milliseconds"),
    "max_batch_tokens": ("max_cost", _tokens, f"a whole number from 1 to {MOST_EXACT}"),
    "padded_lengths": ("lengths", _sizes, _SIZES),
    "padded_rows": ("row_grid", _sizes, _SIZES),
    "max_padding": ("max_padding", float, "a number from 0 to 1"),
}
NEED_RAGGED = frozenset({"max_batch_tokens", "padded_lengths", "max_padding"})
NEED_BATCHING = frozenset({"latency_objective_ms"})
NEED_ROWS = frozenset({"padded_rows"})  # a request that is run alone is padded too

# Attribute of Policy -> what a config calls it.
ATTRIBUTES = {attribute: key for key, (attribute, _, _) in PARAMETERS.items()} | {
    "max_rows": "max_batch_size",
    "preferred": "preferred_batch_size",
    "max_delay": "max_queue_delay_microseconds",
    "default_level": "default_priority_level",
}
_ATTRIBUTE = re.compile(rf"\b({'|'.join(ATTRIBUTES)})\b")


def _device(groups: Any, refuse: Any) -> str:
    if not groups:
        return "auto"
    group = groups[0]
    if len(groups) > 1 or group.count > 1 or len(group.gpus) > 1:
        raise refuse("instance_group: more than one instance of a model is not served yet")
    if group.gpus and group.gpus[0] < 0:
        raise refuse(f"instance_group.gpus: must not be negative, got {group.gpus[0]}")
    kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
    if kind == "KIND_CPU" and group.gpus:
        raise refuse(f"instance_group.gpus: kind KIND_CPU but specifies GPUs {list(group.gpus)}")
    devices = {"KIND_AUTO": "auto", "KIND_CPU": "cpu", "KIND_GPU": "cuda:0"}
    if kind not in devices:
        raise refuse(f"instance_group.kind: {kind} is not served yet; served are {', '.join(devices)}")
    return f"cuda:{group.gpus[0]}" if group.gpus else devices[kind]


def _plain(field: str, value: str, refuse: Any) -> str:
    """A file's name, which must not lead out of its folder."""
    if value in (".", "..") or "/" in value or "\0" in value:
        raise refuse(f"{field}: must be a plain file name, got {value!r}")
    return value


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    if not text.strip("[], "):  # messages that are set, and empty
        return "{ }"
    return text if len(text) <= 60 else text[:57] + "..."
