"""config.pbtxt -> ModelConfig. Triton's file, read with protobuf's own text format and Triton's own message classes.

HONOURED lists what this version honours. A field that is set and not listed is refused, with file, field and value: a
model never runs under a config that says something else. Pure: text in, values out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from .errors import ConfigError
from .types import DATATYPES, TensorSpec

HONOURED = frozenset(
    "name platform backend max_batch_size default_model_filename "
    "version_policy version_policy.latest version_policy.latest.num_versions version_policy.all "
    "version_policy.specific version_policy.specific.versions "
    "input input.name input.data_type input.dims "
    "output output.name output.data_type output.dims output.label_filename "
    "dynamic_batching dynamic_batching.max_queue_delay_microseconds "
    "instance_group instance_group.name instance_group.kind instance_group.count instance_group.gpus".split()
)

# platform -> (backend, default model file)
PLATFORMS = {"pytorch_libtorch": ("pytorch", "model.pt")}

# backend -> model files that it looks for, the first one that exists wins
MODEL_FILES = {"pytorch": ("model.pt2", "model.pt")}


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
        max_delay: seconds a batch that is not full waits for company.
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
    max_delay: float
    device: str
    label_files: dict[str, str]

    @property
    def variable(self) -> bool:
        """Whether requests of one model may differ in more than their rows."""
        skip = 1 if self.max_batch_size else 0
        return any(-1 in spec.shape[skip:] for spec in self.inputs.values())


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
        raise ConfigError(f"{file}: {error}") from None

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"{file}: {reason}")

    for path, value in _set_fields(message):
        if path not in HONOURED:
            raise refuse(f"{path}: this field is not served yet, got {_brief(value)}")
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
    return ModelConfig(
        name=name,
        backend=backend,
        platform=message.platform,
        files=files,
        latest={"latest": max(policy.latest.num_versions, 1), None: 1}.get(choice, 0),
        versions=versions,
        max_batch_size=message.max_batch_size,
        inputs=_tensors("input", message.input, message.max_batch_size, refuse),
        outputs=_tensors("output", message.output, message.max_batch_size, refuse),
        batching=message.HasField("dynamic_batching"),
        max_delay=message.dynamic_batching.max_queue_delay_microseconds / 1e6,
        device=_device(message.instance_group, refuse),
        label_files={
            o.name: _plain(f"output.label_filename of '{o.name}'", o.label_filename, refuse)
            for o in message.output
            if o.label_filename
        },
    )


def _set_fields(message: Message, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field that the file sets, outer ones first."""
    for field, value in message.ListFields():
        path = prefix + field.name
        yield path, value
        if field.message_type is not None and path in HONOURED:
            for part in value if field.is_repeated else [value]:
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
    return text if len(text) <= 60 else text[:57] + "..."
