"""Large tensors there and back as bytes: 600 KB, through the same python model in Millrace and in Triton."""

import itertools
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from ..client import Client, encode
from ..report import progress
from ..samples import LENGTH_HEADER
from ..servers import BenchError, free_port, running
from .peers import ENVIRONMENT, MILLRACE, OIP_READY, TRITON, millrace_command, triton_command
from .processes import Family, killed_at_the_end
from .repositories import LARGE, write_identity
from .results import Cell, Results
from .wrk import run_wrk, write_script

MODEL = "large"
PATH = f"/v2/models/{MODEL}/infer"
CONNECTIONS = (1, 4)
COMMANDS = {MILLRACE: millrace_command, TRITON: triton_command}


def survey(names: Sequence[str], rounds: int, seconds: int, results: Results) -> None:
    """Those of the two that are among the names, in turn."""
    tensor = np.arange(LARGE, dtype=np.float32).reshape(1, LARGE)
    body, headers = _post(tensor)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        write_identity(folder / "models")
        script = write_script(folder, [body], headers)
        servers = {}
        for name in (name for name in names if name in COMMANDS):
            progress(f"{MODEL}: starting {name}")
            try:
                port, members = stack.enter_context(_serving(name, folder / "models"))
                _check(port, body, headers, tensor.tobytes())
            except (BenchError, OSError) as error:
                results.drop(name, MODEL, f"does not serve: {error}")
            else:
                members.freeze()
                servers[name] = port, members
        for number, connections, name in itertools.product(range(rounds), CONNECTIONS, list(servers)):
            if name in servers:
                progress(f"{MODEL}, round {number + 1} of {rounds}, {connections} connections: {name}")
                port, members = servers[name]
                try:
                    with members.awake():
                        figures = run_wrk(members, f"http://127.0.0.1:{port}{PATH}", script, connections, seconds)
                except (BenchError, subprocess.SubprocessError) as error:
                    results.drop(name, MODEL, str(error))
                    del servers[name]
                else:
                    figures["gigabytes"] = 2 * tensor.nbytes * figures["rate"] / 1e9
                    results.cells.append(Cell("large", MODEL, name, connections, number, figures))


def _post(tensor: NDArray[np.float32]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with a tensor as bytes, which asks for bytes."""
    size = {"binary_data_size": tensor.nbytes}
    inputs = [{"name": "x", "datatype": "FP32", "shape": list(tensor.shape), "parameters": size}]
    head = orjson.dumps({"inputs": inputs, "outputs": [{"name": "y", "parameters": {"binary_data": True}}]})
    headers = {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(head))}
    return head + tensor.tobytes(), headers


def _check(port: int, body: bytes, headers: dict[str, str], expected: bytes) -> None:
    """Raises BenchError if a server does not give the same bytes back."""
    with Client(("127.0.0.1", port), timeout=60) as client:
        answer = client.ask(encode("POST", PATH, body, headers))
    if answer.status != 200 or not answer.body.endswith(expected):
        raise BenchError(f"it answered {answer.status} and other bytes: {answer.body[:200]!r}")


@contextmanager
def _serving(name: str, models: Path) -> Iterator[tuple[int, Family]]:
    port = free_port()
    command = COMMANDS[name](models, port)
    with (
        running(command, ("127.0.0.1", port), ready=OIP_READY, environment=ENVIRONMENT) as server,
        killed_at_the_end(server) as members,
    ):
        yield port, members
