"""A request, how it is sent, and what comes back: the same for both servers."""

import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE = 20.0
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Request:
    """One HTTP request.

    Attributes:
        metrics: whether it goes to the port of the metrics.
        memory: shared memory whose bytes afterwards are part of the answer; both servers find the same before.
        until: pattern of "STATUS BODY" to repeat it for; "" for once.
        only: of an answer that is a list of models, or their metrics, the one to compare.
    """

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    metrics: bool = False
    memory: str = ""
    until: str = ""
    only: str = ""

    def __str__(self) -> str:
        return f"{self.method} {self.path} {dict(self.headers) or ''} {self.body[:300]!r}"


@dataclass(frozen=True)
class Answer:
    """What came back; `status` 0 if nothing did, `body` then says why."""

    status: int
    headers: dict[str, str]
    body: bytes
    memory: bytes = b""

    def says(self, pattern: str) -> bool:
        return bool(re.match(pattern, f"{self.status} {self.body.decode(errors='replace')}", re.S))


@dataclass(frozen=True)
class Server:
    """Where one of the two listens."""

    port: int
    metrics_port: int

    def ask(self, request: Request) -> Answer:
        limit = time.monotonic() + PATIENCE
        with _memory(request.memory) as memory:
            answer = self._once(request)
            while not answer.says(request.until) and time.monotonic() < limit:
                time.sleep(0.02)
                answer = self._once(request)
            return Answer(answer.status, answer.headers, answer.body, memory.read_bytes() if memory else b"")

    def _once(self, request: Request) -> Answer:
        port = self.metrics_port if request.metrics else self.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            connection.putrequest(request.method, request.path, skip_accept_encoding=True)
            for name, value in request.headers:
                connection.putheader(name, value)
            if request.body or request.method == "POST":
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, {}, f"{type(error).__name__}: {error}".encode())
        finally:
            connection.close()


@contextlib.contextmanager
def _memory(name: str) -> Iterator[Path | None]:
    """The shared memory as the request finds it, put back afterwards for the other server."""
    if not name:
        yield None
        return
    path = SHARED / name
    before = path.read_bytes()
    yield path
    with path.open("r+b") as file:
        file.write(before)


@dataclass(frozen=True)
class Tensor:
    """One input of a request.

    Attributes:
        data: what goes into the JSON, nested or flat; None for nothing.
        raw: what goes behind the JSON instead; None for nothing.
        parameters: besides `binary_data_size`, which follows from `raw` and is overridden by one of these.
    """

    name: str
    datatype: str
    shape: list[Any]
    data: Any = None
    raw: bytes | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        size = {} if self.raw is None else {"binary_data_size": len(self.raw)}
        parameters = {**size, **self.parameters}
        data = {} if self.data is None else {"data": self.data}
        said = {"parameters": parameters} if parameters else {}
        return {"name": self.name, "datatype": self.datatype, "shape": self.shape, **said, **data}


NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip


def raw(datatype: str, values: Any) -> bytes:
    """Elements as they travel in binary; those of BYTES may be str or bytes."""
    if datatype != "BYTES":
        return np.array(values, dtype=NUMPY[datatype]).tobytes()
    encoded = [value.encode() if isinstance(value, str) else bytes(value) for value in values]
    return b"".join(len(value).to_bytes(4, "little") + value for value in encoded)


def binary(name: str, datatype: str, shape: list[Any], values: Any, **parameters: Any) -> Tensor:
    return Tensor(name, datatype, shape, raw=raw(datatype, values), parameters=parameters)


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def post(path: str, value: Any = None, *headers: tuple[str, str], **options: Any) -> Request:
    """POST `value`: bytes as they are, nothing for None, all else as JSON."""
    body = value if isinstance(value, bytes) else b"" if value is None else compact(value)
    return Request("POST", path, body, headers, **options)


def get(path: str, **options: Any) -> Request:
    return Request("GET", path, **options)


def infer(
    model: str,
    *inputs: Tensor,
    outputs: list[Any] | None = None,
    headers: tuple[tuple[str, str], ...] = (),
    memory: str = "",
    tail: bytes = b"",
    header_length: str | None = "",
    **more: Any,
) -> Request:
    """An inference request; `more` are other members of the JSON, "" for `header_length` the right one."""
    said: dict[str, Any] = {**more, "inputs": [tensor.json() for tensor in inputs]}
    if outputs is not None:
        said["outputs"] = [{"name": output} if isinstance(output, str) else output for output in outputs]
    header = compact(said)
    data = b"".join(tensor.raw for tensor in inputs if tensor.raw is not None) + tail
    if header_length == "":
        header_length = str(len(header)) if data else None
    length = () if header_length is None else (("Inference-Header-Content-Length", header_length),)
    return Request("POST", f"/v2/models/{model}/infer", header + data, (*length, *headers), memory=memory)
