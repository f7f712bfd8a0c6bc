"""What servers read from a folder: Triton's repository and ours, in one format, and MLServer's settings."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from ..servers import ROOT
from .models import MODELS, build

LARGE = 150_000  # FP32 numbers: 600 KB
LARGE_ROWS = 8

CONFIG = """\
backend: "{backend}"
max_batch_size: {rows}
input [ {{ name: "x" data_type: TYPE_{datatype} dims: {dims} {ragged} }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ {width} ] }} ]
dynamic_batching {{ }}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
{parameters}
"""
# Of a batch of mixed lengths on a CPU, which pays for every token, the padded ones included: see bench.ragged.
MIXED_LENGTHS = {"max_batch_tokens": "1024", "max_padding": "0.1"}

IDENTITY = """\
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", each)]) for each in inputs]
"""


def write_triton(folder: Path, name: str) -> None:
    """A repository with one model of the python backend."""
    _write_config(folder, name, "python", {"checkout": str(ROOT)})
    shutil.copy(Path(__file__).parent / "servers" / "triton.py", _version(folder, name) / "model.py")


def write_millrace(folder: Path, name: str) -> None:
    """A repository with the same model exported, weights and all."""
    model = MODELS[name]
    _write_config(folder, name, "pytorch", MIXED_LENGTHS if model.dims == (-1,) else {})
    dynamic = {0: torch.export.Dim("rows", min=1, max=model.max_rows)}
    if model.dims == (-1,):
        dynamic[1] = torch.export.Dim("length", min=1, max=128)
        example = torch.ones(3, 7, dtype=torch.int64)
    else:
        example = torch.zeros(3, *model.dims)
    program = torch.export.export(build(name), (example,), dynamic_shapes=(dynamic,))
    torch.export.save(program, _version(folder, name) / "model.pt2")


def write_identity(folder: Path) -> None:
    """A repository whose one model, `large`, answers with what it was asked: the same file for both servers."""
    path = folder / "large"
    (path / "1").mkdir(parents=True)
    (path / "1" / "model.py").write_text(IDENTITY)
    (path / "config.pbtxt").write_text(
        CONFIG.format(
            backend="python", rows=LARGE_ROWS, datatype="FP32", dims=[LARGE], ragged="", width=LARGE, parameters=""
        )
    )


def write_mlserver(folder: Path, name: str, port: int) -> None:
    """One model in the server's own process: with one more process it answers fewer, and not faster."""
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": port + 1, "parallel_workers": 0, "debug": False,
                "metrics_endpoint": None, "gzip_enabled": False}  # fmt: skip
    model = {"name": name, "implementation": "bench.peers.servers.mlserver.Infer"}
    batching = {} if MODELS[name].dims == (-1,) else {"max_batch_size": MODELS[name].max_rows, "max_batch_time": 0.001}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model | batching))


def _write_config(folder: Path, name: str, backend: str, parameters: Mapping[str, str]) -> None:
    model = MODELS[name]
    (folder / name / "1").mkdir(parents=True)
    entries = [f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}' for key, text in parameters.items()]
    ragged = "allow_ragged_batch: true" if model.dims == (-1,) else ""
    (folder / name / "config.pbtxt").write_text(
        CONFIG.format(
            backend=backend, rows=model.max_rows, datatype=model.datatype, dims=list(model.dims), ragged=ragged,
            width=model.width, parameters="\n".join(entries),
        )
    )  # fmt: skip


def _version(folder: Path, name: str) -> Path:
    return folder / name / "1"
