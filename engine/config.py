"""config.pbtxt -> ModelConfig. Triton's file, read with protobuf's own text format and Triton's own message classes.

HONOURED lists the fields that are served, REPORTED those that only tune what this server does not have; the entries of
`parameters` are in parameters.py. What is set and not listed is refused, with file, field and value: a model never runs
under a config that says something else. Pure: text in, values out. `engine/repository.py` goes through the steps, and
gives them what is on disk: read_text or read_json, deduce, configure.
"""

import difflib
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from batching.policy import Level, Policy

from .errors import ConfigError
from .parameters import ATTRIBUTE, ATTRIBUTES, PARAMETERS, Refuse, boolean, brief, read_parameters
from .types import TensorSpec

HONOURED = frozenset(
    "name platform backend max_batch_size default_model_filename metric_tags "
    "version_policy version_policy.latest version_policy.latest.num_versions version_policy.all "
    "version_policy.specific version_policy.specific.versions "
    "input input.name input.data_type input.format input.dims input.reshape input.reshape.shape "
    "input.allow_ragged_batch input.optional "
    "output output.name output.data_type output.dims output.reshape output.reshape.shape output.label_filename "
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
    "instance_group instance_group.name instance_group.kind instance_group.count instance_group.gpus "
    "instance_group.passive "
    "model_transaction_policy model_transaction_policy.decoupled "
    "model_warmup model_warmup.name model_warmup.batch_size model_warmup.count model_warmup.inputs "
    "model_warmup.inputs.data_type model_warmup.inputs.dims model_warmup.inputs.zero_data "
    "model_warmup.inputs.random_data model_warmup.inputs.input_data_file".split()
)

# Fields, with all below them, that any value is fine for: they are reported, and a backend may read them there. They
# say how Triton should be fast, not what it answers, or need an option of Triton's own command line to mean anything.
REPORTED = ("runtime", "optimization", "instance_group.rate_limiter", "instance_group.host_policy")

# Why other fields are refused, where "not served yet" is not all there is to say.
NEVER = {
    "input.is_shape_tensor": "shape tensors are only supported for TensorRT platform",
    "output.is_shape_tensor": "shape tensors are only supported for TensorRT platform",
    "input.is_non_linear_format_io": "Non-linear IO format is only supported for the TensorRT platform",
    "output.is_non_linear_format_io": "Non-linear IO format is only supported for the TensorRT platform",
    "instance_group.profile": "optimization profiles are only supported for the TensorRT platform",
    "instance_group.secondary_devices": "secondary devices are only supported for the TensorRT platform",
}


class Form(NamedTuple):
    """A kind of model: who runs it, Triton's name for it, and the file that it is looked for in."""

    backend: str
    platform: str
    file: str


# In the order in which Triton looks for them (PROTOCOL.md section 5.4).
FORMS = (
    Form("tensorrt", "tensorrt_plan", "model.plan"),
    Form("onnxruntime", "onnxruntime_onnx", "model.onnx"),
    Form("openvino", "", "model.xml"),
    Form("pytorch", "pytorch_libtorch", "model.pt"),
    Form("pytorch", "torch_aoti", "model.pt2"),
    Form("pytorch", "libtorch", "model.pt"),
    Form("python", "", "model.py"),
)

# backend -> model files that it looks for where nothing says which, the first one that exists wins. One without any
# needs no more than the version's folder.
MODEL_FILES: dict[str, tuple[str, ...]] = {
    "pytorch": ("model.pt2", "model.pt"),
    "onnxruntime": ("model.onnx",),
    "python": ("model.py",),
    "identity": (),
    "function": (),  # of engine/functions.py
}

# The backends of repositories.
SERVED = tuple(backend for backend in MODEL_FILES if backend != "function")

PLATFORMS = tuple(form.platform for form in FORMS if form.platform and form.backend in MODEL_FILES)

# Triton's data types -> names of the protocol.
DATATYPE_NAMES = {
    number: name.removeprefix("TYPE_").replace("STRING", "BYTES")
    for name, number in model_config_pb2.DataType.items()
    if number
}

# Where a warm-up sample's data comes from.
SOURCES = {"zero_data": "zero", "random_data": "random", "input_data_file": "file"}

# Levels of priority that one model may have; each is a queue of its own.
MOST_LEVELS = 100

# Instances that one model may have; each is a copy of it.
MOST_INSTANCES = 256


@dataclass(frozen=True, slots=True)
class Instance:
    """One copy of a model.

    Attributes:
        name: as Triton calls it: `M_0` where the config lists no groups, `<group>_<i>` where it does.
        kind: "CPU", "GPU" or "MODEL" (it places itself).
        device: "auto" (what the backend finds), "cpu" or "cuda:N".
        device_id: the N, 0 where there is none.
    """

    name: str
    kind: str
    device: str
    device_id: int


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """What one input is given while the model is warmed.

    Attributes:
        dims: without the batch dimension.
        source: "zero", "random" or "file".
        file: below the folder `warmup` of the model; "" unless `source` is "file".
    """

    datatype: str
    dims: tuple[int, ...]
    source: str
    file: str


@dataclass(frozen=True, slots=True)
class WarmupSample:
    """A batch that the model is warmed with: `batch_size` requests of one row, `count` times."""

    name: str
    batch_size: int
    count: int
    inputs: dict[str, WarmupInput]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model as its config.pbtxt describes it.

    Attributes:
        platform: as the file gives it or as it follows from the file, "" if neither does.
        files: names of the model's file in a version folder; the first that exists is the model. Empty: the folder is.
        latest: how many of the highest versions to serve; 0 when `versions` says which, or all of them.
        versions: the versions to serve; empty means by `latest`, or all if that is 0.
        max_batch_size: rows of a batch; 0 when the model's tensors have no batch dimension.
        inputs, outputs: shapes include the batch dimension (-1) where max_batch_size is not 0.
        batching: whether requests share batches; without it each is run alone, as in Triton.
        policy: how; its capacities and fair shares are defaults, for whoever has the settings to replace.
        cache: whether answers may be kept for requests that are equal.
        ragged: input whose size may differ within a batch -> index of the dimension that does, in the spec's shape. Of
            a Python model, which is given requests unstacked, every dimension of any size may: the index is the first.
        pad: ragged input -> what fills it up to the longest of a batch.
        label_files: output name -> file in the model's folder.
        decoupled: whether a request gets any number of responses.
        resend: whether the model may be given a request again that it had when its process ended.
        instances: at least one.
        parameters: every entry of `parameters`, ours too.
        metric_tags: labels of all of the model's metrics.
        warmup: the samples to run, those of no rows left out.
        document: the config that is in effect, defaults and deductions included, as JSON (PROTOCOL.md section 1.6).
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
    label_files: dict[str, str]
    decoupled: bool
    resend: bool
    instances: tuple[Instance, ...]
    parameters: dict[str, str]
    metric_tags: dict[str, str]
    warmup: tuple[WarmupSample, ...]
    document: dict[str, Any]

    @property
    def device(self) -> str:
        """Of the first instance."""
        return self.instances[0].device

    @property
    def variable(self) -> bool:
        """Whether an input that is not ragged has a dimension of any size: only equal ones share a batch."""
        skip = 1 if self.max_batch_size else 0
        return any(-1 in spec.shape[skip:] for name, spec in self.inputs.items() if name not in self.ragged)

    def flag(self, key: str, default: str = "false") -> bool:
        """The value of a parameter that is true or false."""
        return boolean(self.parameters.get(key, default))


def parse_config(text: str, folder: str, file: str, gpus: int | None = None) -> ModelConfig:
    """Read a config.pbtxt, and nothing else: what follows from a model's file is left out.

    Args:
        folder: name of the model's folder, which the model's name must equal.
        file: how errors name the file.
        gpus: CUDA devices of this machine; None if nobody counted them.

    Raises:
        ConfigError: it is malformed, contradicts itself or asks for what is not served; names file, field and value.
    """
    message = read_text(text, file)
    files = deduce(message, folder, (), file)
    return configure(message, files, file, gpus)


def read_text(text: str, file: str) -> Any:
    """Protobuf's text format -> Triton's message, of which only fields that are served are set. Raises ConfigError."""
    return _read(_parse_text, text, file)


def read_json(text: str, file: str) -> Any:
    """The same for protobuf's JSON, whose numbers may be strings."""
    return _read(_parse_json, text, file)


def _parse_json(text: str, message: Any) -> None:
    if not text.lstrip().startswith("{"):  # protobuf takes an empty list for an empty message
        raise json_format.ParseError("must be a JSON object")
    json_format.Parse(text, message)


def _parse_text(text: str, message: Any) -> None:
    # An escape that no string has is only warned of. Recorded, not made errors: the filters are the whole process's.
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        text_format.Parse(text, message)
    for warning in seen:
        if "escape sequence" in str(warning.message):
            raise text_format.ParseError(str(warning.message))


def _read(parse: Callable[[str, Any], Any], text: str, file: str) -> Any:
    message = model_config_pb2.ModelConfig()
    try:
        parse(text, message)
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except (text_format.ParseError, json_format.ParseError, ValueError) as error:
        first = str(error).partition("\n")[0]  # the others list every field that there is
        raise ConfigError(f"{file}: {_with_hint(first)}") from None
    for path, field, value in _set_fields(message):
        if not _served(path):
            raise ConfigError(f"{file}: {path}: {NEVER.get(path, 'this field is not served yet')}, got {brief(value)}")
        if field.enum_type is not None and value not in field.enum_type.values_by_number:
            names = ", ".join(field.enum_type.values_by_name)
            raise ConfigError(f"{file}: {path}: must be one of {names}, got {value}")
    return message


def deduce(message: Any, folder: str, found: Collection[str], file: str) -> tuple[str, ...]:
    """Fill in name, backend, platform and file, as Triton finds them (PROTOCOL.md section 5.4).

    Args:
        found: names of the files in the model's first version folder.

    Returns:
        The names that the model's file may have, best first; none if the version's folder is all it needs.

    Raises:
        ConfigError: they contradict each other, or nothing that is served can run the model.
    """
    refuse = _refuse(file)
    message.name = name = message.name or folder
    if name != folder:
        raise refuse(
            f"name: unexpected directory name '{folder}' for model '{name}', directory name must equal model name"
        )
    _plain("default_model_filename", message.default_model_filename, refuse)
    if not message.backend:
        _find_backend(message, found, refuse)
    backend, platform = message.backend, message.platform
    if backend and backend not in MODEL_FILES:
        raise refuse(f"backend: '{backend}' is not served; served are {', '.join(SERVED)}")
    if platform and platform not in PLATFORMS:
        hint = 'write backend: "pytorch"' if platform == "pytorch" else f"served are {', '.join(PLATFORMS)}"
        raise refuse(f"platform: '{platform}' is not served; {hint}")
    if not backend:
        raise refuse(f"backend: unexpected platform type '' for {name}; served backends are {', '.join(MODEL_FILES)}")
    if platform and all(form[:2] != (backend, platform) for form in FORMS):
        raise refuse(f"backend: unexpected 'platform' and 'backend' pair, got:{platform}, {backend}")
    files = MODEL_FILES[backend]
    if message.default_model_filename and files:
        files = (message.default_model_filename,)
    elif platform:
        files = tuple(form.file for form in FORMS if form.platform == platform)
    chosen = next((candidate for candidate in files if candidate in found), files[0] if len(files) == 1 else "")
    message.default_model_filename = message.default_model_filename or chosen
    message.platform = platform or _platform(backend, chosen)
    return files


def _find_backend(message: Any, found: Collection[str], refuse: Refuse) -> None:
    """By platform, by file name, by what is in the version's folder, or by the model's name, in that order."""
    platform, file = message.platform, message.default_model_filename
    for form in FORMS:
        if platform == form.platform != "" or file == form.file or (not platform and not file and form.file in found):
            message.backend = form.backend
            message.platform = platform or _platform(form.backend, form.file)
            return
    if platform or file:
        return
    _, dot, backend = message.name.partition(".")
    if not dot:
        raise refuse(
            f"backend: Invalid model name: Could not determine backend for model '{message.name}' with no backend in "
            "model configuration. Expected model name of the form 'model.<backend_name>'."
        )
    message.backend, message.default_model_filename = backend, f"model.{backend}"


def _platform(backend: str, file: str) -> str:
    """What Triton reports where no platform is given, but for a model.pt2, which it takes for an AOTInductor package.

    Here that is what torch.export writes, and Triton has no name for it: then the backend's stands for it.
    """
    if backend == "pytorch":
        return "pytorch_libtorch" if file.endswith(".pt") else ""
    return "onnxruntime_onnx" if backend == "onnxruntime" else ""


def configure(message: Any, files: tuple[str, ...], file: str, gpus: int | None) -> ModelConfig:
    """A message with all that is going to be filled in -> what it means.

    Args:
        files: what `deduce` returned.
        file: how errors name the file.
        gpus: CUDA devices of this machine; None if nobody counted them.

    Raises:
        ConfigError: as parse_config does.
    """
    refuse = _refuse(file)
    name, python = message.name, message.backend == "python"
    if message.max_batch_size < 0:
        raise refuse(
            f"max_batch_size: 'max_batch_size' must be non-negative value for {name}, got {message.max_batch_size}"
        )
    decoupled = message.model_transaction_policy.decoupled
    if decoupled and not python:
        raise refuse("model_transaction_policy.decoupled: only a Python model can be decoupled, got True")
    if decoupled and message.response_cache.enable:
        raise refuse(
            f"response_cache.enable: Response Cache does not currently support model {name} with 'decoupled' "
            "transaction policy. Please disable the response cache."
        )
    latest, versions = choose_versions(message, file)
    inputs, outputs = _tensors("input", message, refuse), _tensors("output", message, refuse)
    ragged = _ragged(message, inputs, refuse)
    padded = {} if python else ragged
    parameters = read_parameters(
        {key: value.string_value for key, value in message.parameters.items()},
        message.backend,
        {name: inputs[name].datatype for name in padded},
        _batches(message),
        message.max_batch_size,
        refuse,
    )
    groups, instances = _instances(message, gpus, refuse)
    return ModelConfig(
        name=name,
        backend=message.backend,
        platform=message.platform,
        files=files,
        latest=latest,
        versions=versions,
        max_batch_size=message.max_batch_size,
        inputs=inputs,
        outputs=outputs,
        batching=_batches(message),
        policy=_policy(message, parameters, refuse),
        cache=message.response_cache.enable,
        ragged=ragged,
        pad={name: parameters.get(f"pad.{name}", 0.0) for name in padded},
        label_files={
            o.name: _plain(f"output.label_filename of '{o.name}'", o.label_filename, refuse)
            for o in message.output
            if o.label_filename
        },
        decoupled=decoupled,
        resend=parameters.get("resend", True),
        instances=instances,
        parameters={key: value.string_value for key, value in message.parameters.items()},
        metric_tags=_metric_tags(message, refuse),
        warmup=tuple(_sample(sample, message, inputs, refuse) for sample in message.model_warmup if sample.batch_size),
        document=to_json(_effective(message, groups)),
    )


def choose_versions(message: Any, file: str) -> tuple[int, tuple[int, ...]]:
    """`latest` and `versions` of ModelConfig. Raises ConfigError."""
    policy = message.version_policy
    choice = policy.WhichOneof("policy_choice")
    versions = tuple(policy.specific.versions)
    if choice == "specific" and (not versions or min(versions) < 1):
        raise _refuse(file)(
            f"version_policy.specific.versions: must be positive numbers, at least one, got {list(versions)}"
        )
    return {"latest": max(policy.latest.num_versions, 1), None: 1}.get(choice, 0), versions


def to_json(message: Message) -> dict[str, Any]:
    """A message as Triton's own JSON: fields in the order of the .proto, defaults too, 64-bit numbers as numbers."""
    return {
        field.name: _field_as_json(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _field_as_json(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        values = field.message_type.fields_by_name["value"]
        return {str(key): _as_json(values, value[key]) for key in sorted(value)}
    return [_as_json(field, part) for part in value] if field.is_repeated else _as_json(field, value)


def _as_json(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    return value if field.enum_type is None else field.enum_type.values_by_number[value].name


def _effective(message: Any, groups: list[Any]) -> Any:
    """A copy with Triton's defaults."""
    effective = model_config_pb2.ModelConfig()
    effective.CopyFrom(message)
    if effective.version_policy.WhichOneof("policy_choice") in ("latest", None):
        effective.version_policy.latest.num_versions = max(effective.version_policy.latest.num_versions, 1)
    if message.HasField("dynamic_batching") and message.max_batch_size:
        preferred = message.dynamic_batching.preferred_batch_size or [message.max_batch_size]
        effective.dynamic_batching.preferred_batch_size[:] = preferred
    for memory in ("input_pinned_memory", "output_pinned_memory"):
        if not effective.optimization.HasField(memory):
            getattr(effective.optimization, memory).enable = True
    del effective.instance_group[:]
    effective.instance_group.extend(groups)
    return effective


def _refuse(file: str) -> Refuse:
    return lambda reason: ConfigError(f"{file}: {reason}")


def _batches(message: Any) -> bool:
    return bool(message.HasField("dynamic_batching") and message.max_batch_size)


def _served(path: str) -> bool:
    return path in HONOURED or any(f"{path}.".startswith(f"{whole}.") for whole in REPORTED)


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
        if field.message_type is not None and _served(path):
            is_map = field.message_type.GetOptions().map_entry
            for part in value.values() if is_map else value if field.is_repeated else [value]:
                if isinstance(part, Message):  # the map's values may be plain text
                    yield from _set_fields(part, path + ".")


def _tensors(kind: str, message: Any, refuse: Refuse) -> dict[str, TensorSpec]:
    """The model's inputs or outputs, by `kind`."""
    tensors: dict[str, TensorSpec] = {}
    batch, python = (-1,) if message.max_batch_size else (), message.backend == "python"
    for tensor in getattr(message, kind):
        for field, wrong in _wrong(f"model {kind}", tensor, message.max_batch_size):
            raise refuse(f"{kind}.{field}: {wrong} for {message.name}")
        if tensor.name in tensors:
            raise refuse(f"{kind}.name: '{tensor.name}' is given twice")
        optional = kind == "input" and tensor.optional
        if optional and not python:
            raise refuse(f"input.optional: only a Python model can do without an input, got '{tensor.name}'")
        tensors[tensor.name] = TensorSpec(
            tensor.name,
            DATATYPE_NAMES[tensor.data_type],
            batch + tuple(tensor.dims),
            optional=optional,
            reshape=batch + tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None,
        )
    # A Python model may need none, but the rows of a batch are counted in the inputs.
    if not tensors and not (python and (kind == "output" or not message.max_batch_size)):
        raise refuse(f"{kind}: the model must have at least one {kind}")
    return tensors


def _wrong(what: str, tensor: Any, max_batch_size: int) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of an input or an output, in Triton's words and order."""
    named, dims, reshape = f"{what} '{tensor.name}'", list(tensor.dims), list(tensor.reshape.shape)
    what_fits = "must be integer >= 1, or -1 to indicate a variable-size dimension"
    if not tensor.name:
        yield "name", f"{what} must specify 'name'"
    if not tensor.data_type:
        yield "data_type", f"{named} must specify 'data_type'"
    if not dims:
        yield "dims", f"{named} must specify 'dims'"
    if tensor.HasField("reshape") and not reshape and not max_batch_size:
        scalar = "cannot have empty reshape for non-batching model as scalar tensors are not supported"
        yield "reshape", f"{named} {scalar}"
    if any(dim < 1 and dim != -1 for dim in dims):
        yield "dims", f"{named} dimension {what_fits}"
    if tensor.HasField("reshape"):
        if any(dim < 1 and dim != -1 for dim in reshape):
            yield "reshape", f"{named} reshape dimensions {what_fits}"
        fixed, wanted = _elements(dims), _elements(reshape)
        if len(fixed) != len(wanted) and len(fixed) > 1 and len(wanted) > 1:
            yield "reshape", f"{named} has different number of variable-size dimensions for dims and reshape"
        if fixed != wanted:
            yield "reshape", f"{named} has different size for dims and reshape"
    if getattr(tensor, "format", 0) and len(dims) != 3:
        yield "format", f"{what} NHWC/NCHW require 3 dims"


def _elements(dims: list[int]) -> list[int]:
    """The number of elements before, between and after the dimensions of any size."""
    counts = [1]
    for dim in dims:
        if dim == -1:
            counts.append(1)
        else:
            counts[-1] *= dim
    return counts


def _ragged(message: Any, inputs: dict[str, TensorSpec], refuse: Refuse) -> dict[str, int]:
    """Ragged input -> index of its dimension of any size, counted with the batch dimension."""
    if message.backend == "python":
        skip = 1 if message.max_batch_size else 0
        given = {tensor.name: inputs[tensor.name].shape for tensor in message.input if tensor.allow_ragged_batch}
        return {name: shape.index(-1, skip) for name, shape in given.items() if -1 in shape[skip:]}
    ragged = {}
    for tensor in message.input:
        if tensor.allow_ragged_batch:
            field, dims = f"input.allow_ragged_batch of '{tensor.name}'", inputs[tensor.name].shape[1:]
            if not _batches(message):
                raise refuse(f"{field}: needs a max_batch_size of at least 1 and dynamic_batching")
            if inputs[tensor.name].datatype == "BYTES":
                raise refuse(f"{field}: strings cannot be padded to one length")
            if dims.count(-1) != 1:
                raise refuse(f"{field}: served with exactly one dimension of any size (-1) in dims, got {list(dims)}")
            ragged[tensor.name] = 1 + dims.index(-1)
    return ragged


def _policy(message: Any, parameters: dict[str, Any], refuse: Refuse) -> Policy:
    """Triton's dynamic batcher, with Triton's refusals, and what our parameters add to it."""
    batching, name = message.dynamic_batching, message.name
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
        text = ATTRIBUTE.sub(lambda found: ATTRIBUTES[found[0]], str(error))
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


def _instances(message: Any, gpus: int | None, refuse: Refuse) -> tuple[list[Any], tuple[Instance, ...]]:
    """The instance groups with all that follows, and an Instance for each that gets work."""
    given = list(message.instance_group) or [model_config_pb2.ModelInstanceGroup(name=message.name)]
    groups = [_group(group, f"{message.name}_{index}", message, gpus, refuse) for index, group in enumerate(given)]
    if sum(group.count * max(len(group.gpus), 1) for group in groups) > MOST_INSTANCES:
        raise refuse(f"instance_group.count: at most {MOST_INSTANCES} instances of a model are served")
    instances = []
    for group, was in zip(groups, given, strict=True):
        kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind).removeprefix("KIND_")
        places = [(f"cuda:{gpu}", gpu) for gpu in group.gpus] or [("cpu" if kind == "CPU" else "auto", 0)]
        if was.kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO and not was.gpus and len(places) == 1:
            places = [("auto", 0)]  # the backend may have been built for other devices than this machine has
        instances += [
            Instance(f"{group.name}_{copy}", kind, device, gpu)
            for copy in range(0 if group.passive else group.count)
            for device, gpu in places
        ]
    if not instances:
        raise refuse("instance_group.passive: one instance at least must not be passive, since those get no work")
    return groups, tuple(instances)


def _group(group: Any, name: str, message: Any, gpus: int | None, refuse: Refuse) -> Any:
    """A copy with name, count, kind and GPUs filled in by Triton's rules (PROTOCOL.md section 5.6)."""
    kinds = model_config_pb2.ModelInstanceGroup
    resolved = kinds()
    resolved.CopyFrom(group)
    resolved.name, resolved.count = group.name or name, max(group.count, 1)
    if group.kind == kinds.KIND_AUTO:
        there = bool(group.gpus) if gpus is None else gpus > 0 and all(0 <= gpu < gpus for gpu in group.gpus)
        resolved.kind = kinds.KIND_GPU if there else kinds.KIND_CPU
    if resolved.kind == kinds.KIND_GPU and not group.gpus:
        resolved.gpus[:] = range(1 if gpus is None else gpus)
    for field, wrong in _wrong_group(resolved, message.backend, gpus):
        raise refuse(f"instance_group.{field}: instance group {resolved.name} of model {message.name} {wrong}")
    return resolved


def _wrong_group(group: Any, backend: str, gpus: int | None) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it), in Triton's words."""
    kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
    if kind == "KIND_GPU" and gpus == 0:
        yield "kind", "has kind KIND_GPU but no GPUs are available"
    if kind == "KIND_MODEL" and backend in ("pytorch", "onnxruntime"):
        yield "kind", "has kind KIND_MODEL but only a Python model can place itself"
    if kind != "KIND_GPU" and group.gpus:
        yield "gpus", f"has kind {kind} but specifies one or more GPUs"
    there = (
        "GPUs with at least the minimum required CUDA compute compatibility of 6.000000 are: "
        f"{', '.join(map(str, range(gpus or 0)))}"
    )
    for gpu in group.gpus:
        if gpu < 0 or (gpus is not None and gpu >= gpus):
            yield "gpus", f"specifies invalid or unsupported gpu id {gpu}. {there}"


def _sample(sample: Any, message: Any, inputs: Mapping[str, TensorSpec], refuse: Refuse) -> WarmupSample:
    of = f"of '{sample.name}'"
    if sample.batch_size > max(message.max_batch_size, 1):
        raise refuse(
            f"model_warmup.batch_size {of}: batch size {sample.batch_size}, max allowed is {message.max_batch_size}"
        )
    missing = [name for name, spec in inputs.items() if not spec.optional and name not in sample.inputs]
    if missing:
        raise refuse(f"model_warmup.inputs {of}: gives no input '{missing[0]}'")
    given = {}
    for name in sorted(sample.inputs):
        if name not in inputs:
            raise refuse(f"model_warmup.inputs {of}: the model has no input '{name}'")
        tensor = sample.inputs[name]
        for field, wrong in _wrong_sample(name, tensor, inputs[name], 1 if message.max_batch_size else 0):
            raise refuse(f"model_warmup.inputs.{field} {of}: {wrong}")
        source = tensor.WhichOneof("input_data_type")
        given[name] = WarmupInput(inputs[name].datatype, tuple(tensor.dims), SOURCES[source], tensor.input_data_file)
    return WarmupSample(sample.name, sample.batch_size, max(sample.count, 1), given)


def _wrong_sample(name: str, tensor: Any, spec: TensorSpec, skip: int) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of what a warm-up sample gives for one input."""
    dims, expected, file = list(tensor.dims), list(spec.shape[skip:]), tensor.input_data_file
    datatype = DATATYPE_NAMES.get(tensor.data_type, "INVALID")
    if -1 in dims:
        yield "dims", f"warmup setting expects all variable-size dimensions are specified for input '{name}'"
    fits = [dim >= 1 and want in (-1, dim) for dim, want in zip(dims, expected, strict=False)]
    if len(dims) != len(expected) or not all(fits):
        yield "dims", f"unexpected shape for input '{name}'. Expected {expected}, got {dims}"
    if datatype != spec.datatype:
        yield "data_type", f"input '{name}' is {spec.datatype}, got {datatype}"
    if tensor.WhichOneof("input_data_type") is None:
        yield "input_data_type", f"warmup setting expects input '{name}' to have input_data_type set"
    if tensor.HasField("input_data_file") and (
        "\0" in file or any(part in ("", ".", "..") for part in file.split("/"))
    ):
        yield "input_data_file", f"must be the path of a file below the folder warmup, got {file!r}"


def _metric_tags(message: Any, refuse: Refuse) -> dict[str, str]:
    for name in message.metric_tags:
        if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) or name in ("model", "version"):
            raise refuse(f"metric_tags: must be names of labels, none of them model or version, got {name!r}")
    return dict(message.metric_tags)


def _plain(field: str, value: str, refuse: Refuse) -> str:
    """A file's name, which must not lead out of its folder."""
    if value in (".", "..") or "/" in value or "\0" in value:
        raise refuse(f"{field}: must be a plain file name, got {value!r}")
    return value
