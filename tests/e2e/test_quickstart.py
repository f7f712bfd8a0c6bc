"""The file of ten lines and the doctor, run as people run them."""

import asyncio
import signal
import subprocess
import sys

import orjson
import pytest

from .client import ROOT, request
from .processes import eventually, free_port, listens, tool

pytestmark = pytest.mark.e2e


def test_a_function_is_served_by_uvicorn() -> None:
    """`uvicorn quickstart:app`, and the answer to a request."""
    assert len([line for line in (ROOT / "examples" / "quickstart.py").read_text().splitlines() if line]) <= 10
    port = free_port()
    server = subprocess.Popen(
        [tool("uvicorn"), "quickstart:app", "--port", str(port)],
        cwd=ROOT / "examples", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        eventually(lambda: listens(("127.0.0.1", port)), "the port")
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
        asked = request(("127.0.0.1", port), "POST", "/v2/models/double/infer", orjson.dumps(body))
        answer = asyncio.run(asked)
        assert orjson.loads(answer.body)["outputs"][0]["data"] == [2, 4, 6, 8]
    finally:
        server.terminate()
        log, _ = server.communicate(timeout=30)
    assert server.returncode in (0, -signal.SIGTERM), log


def test_the_doctor_finds_nothing_wrong_with_the_checkout() -> None:
    """It ends with 0, and with 1 where something will not work."""
    command = [sys.executable, "-m", "asgi_app", "doctor", f"--port={free_port()}"]
    sound = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "ok       digits: pytorch, version 1, batches of 32" in sound.stdout
    sick = subprocess.run([*command, "--models=/none"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert sick.returncode == 1
    assert "error    /none: is no folder" in sick.stdout
