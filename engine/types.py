"""What the fronts and the engine say to each other: tensors by name, and what a model expects and gives.

A datatype travels under its Open Inference Protocol name ("FP32"). In this process a tensor is a C-contiguous
numpy array of the dtype that DATATYPES gives for that name. A shape may hold -1: any size, decided per request.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Open Inference Protocol name -> numpy dtype, little-endian as on the wire (PROTOCOL.md section 4).
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: as in the model's config.
        datatype: a key of DATATYPES.
        shape: what a request sends or receives, the batch dimension included (-1) where the model batches.
        labels: class names of an output, by index along its last dimension; empty if the model ships none.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a client may know of a model version.

    Attributes:
        versions: the versions that are served, ascending, as strings.
        platform: the config's platform, or its backend where it names none, as Triton reports it.
        max_batch_size: rows one request may hold; 0 when the model has no batch dimension.
        inputs, outputs: by name, in the model's order.
        ragged: input whose size may differ within a batch -> index in its shape of the dimension that does. Within a
            request, all of them have the same size there: the request's length.
        lengths: what a request's length is padded up to, ascending; none is longer than the last. Empty: any, as it is.
        max_cost: most padded rows times padded length of a request; 0 for any.
        row_grid: what a request's rows are padded up to, ascending. Empty: they are not.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    max_batch_size: int
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    ragged: Mapping[str, int] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    max_cost: int = 0
    row_grid: tuple[int, ...] = ()


@dataclass(slots=True)
class InferRequest:
    """One inference request, decoded, not yet checked against the model.

    Attributes:
        version: a version's number as text; "" means the highest that is served.
        inputs: arrays by input name.
        outputs: names of the outputs wanted; None means all.
        id: echoed in the answer; "" if the client gave none.
        deadline: `time.monotonic()` seconds after which the model must not be started for this request.
        priority: 1 is the highest; 0, or one that the model does not have, is the model's default.
        timeout: seconds that it may wait in the queue, where the model lets it say so; 0 for the model's own.
        client: whose fair share of the model it counts against; all that say "" share one.
    """

    model: str
    version: str
    inputs: dict[str, Array]
    outputs: tuple[str, ...] | None = None
    id: str = ""
    deadline: float = math.inf
    priority: int = 0
    timeout: float = 0.0
    client: str = ""


@dataclass(slots=True)
class InferResponse:
    """The answer: every output of the model, in the model's order.

    Attributes:
        version: the version that ran.
    """

    model: str
    version: str
    outputs: dict[str, Array]


class Backend(Protocol):
    """A loaded model version. It is called by one caller at a time, in the lane's thread or on the event loop.

    Attributes:
        device: its name is the lane's; models on one device take turns.
    """

    device: object

    def enter(self, inline: bool) -> None:
        """Called in each thread that is going to run the model, before it does: the event loop's if `inline`."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Uninitialised memory to stack a batch into: pinned where the device copies from it, else plain.

        Called in another thread too, while the model runs.
        """
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once on stacked arrays and return its outputs, in host memory that nothing else writes to.

        Arrays of `inputs` come from `empty`; the model may overwrite them.
        """
        ...


class Engine(Protocol):
    """Models and who owns them: in this process (LocalEngine), or, later, behind a socket.

    Attributes:
        draining: set by whoever is about to stop the process: ready() turns false, requests are still served.
    """

    draining: bool

    async def start(self) -> None:
        """Load and warm every model. Raises ConfigError or ModelError, naming the model, if one cannot be served."""
        ...

    async def stop(self) -> None:
        """Answer everything that was accepted, then let go of models, threads and devices."""
        ...

    def live(self) -> bool:
        """Whether the lane's heartbeat beats: it is idle, or not stuck in a batch."""
        ...

    def ready(self) -> bool:
        """Whether every model is warm and new requests are welcome."""
        ...

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Raises NotFound."""
        ...

    def batching(self, model: str, version: str = "") -> dict[str, Any]:
        """What the model's queue does, and why: plain values, ready to be written as JSON. Raises NotFound."""
        ...

    def check_room(self, model: str, version: str) -> None:
        """Raises QueueFull if any request would be refused now, so that nobody decodes one. Raises NotFound."""
        ...

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request: a result, or an error of engine/errors.py or batching. Cancel it when the caller left."""
        ...
