"""What the README tells people to type works as it is written there."""

import re
import subprocess
from pathlib import Path

import numpy as np
import orjson
import pytest

from .client import ROOT, request
from .processes import STARTED, free_port, on_port, started, tool

pytestmark = pytest.mark.e2e

BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def block(word: str) -> str:
    """The one block of commands that contains `word`."""
    (found,) = [each for each in BLOCKS if word in each]
    return str(found)


def shell(folder: Path, script: str) -> str:
    """Run a block as people paste it, but stop at the first command that fails, a refused request included."""
    curl = 'curl() { command curl -sS --fail-with-body "$@" && echo; }\n'
    done = subprocess.run(
        [tool("bash"), "-euc", curl + script], cwd=folder, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_curl_commands(folder: Path) -> None:
    """Each request of "Ask it" is answered, the pictures with the digits in their names."""
    tool("curl")
    with on_port(folder) as (_, (host, port)):
        output = shell(folder, block("/v2/models/digits/infer").replace("127.0.0.1:8000", f"{host}:{port}"))
    assert re.findall(r'^{"class_name":"(.)"', output, re.M) == ["7", "3", "7"]
    (tensors,) = [orjson.loads(line) for line in output.splitlines() if '"outputs":[{"name":"probabilities","da' in line
                  and '"data"' in line]  # fmt: skip
    assert np.argmax(tensors["outputs"][0]["data"]) == 0
    assert "HTTP/1.1 200 OK" in output


def test_what_the_queue_did(folder: Path) -> None:
    """The command that asks a queue what it does is answered with the batch of the picture that went before."""
    tool("curl")
    with on_port(folder) as (_, (host, port)):
        ask = block("models/digits/batching")
        shell(folder, f"curl --data-binary @models/digits/samples/7.png http://{host}:{port}/classify")
        report = orjson.loads(shell(folder, ask.replace("127.0.0.1:8000", f"{host}:{port}")))
    assert report["batches"]["by_reason"] == {"free": 1}
    assert report["items"]["wait_seconds"]["count"] == 1


def test_tritons_client(folder: Path) -> None:
    """The snippet with Triton's own client prints a digit for each of its two rows."""
    with on_port(folder) as (_, (host, port)):
        output = shell(folder, block("tritonclient.http").replace("127.0.0.1:8000", f"{host}:{port}"))
    assert re.search(r"^\[\d \d\]$", output, re.M), output


async def test_a_model_of_ones_own(folder: Path) -> None:
    """The commands that make a repository of one's own make one that is served, and answers."""
    *make, serve = block("torch.export.save").replace("/tmp/mine", "mine").rstrip().splitlines()
    shell(folder, "\n".join(make))
    port = free_port()
    with started(folder, *serve.replace("8001", str(port)).split()) as server:
        server.wait_for_log(STARTED)
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3],"data":[1,2,3,4,5,6]}]}'
        answer = await request(("127.0.0.1", port), "POST", "/v2/models/double/infer", body)
    assert orjson.loads(answer.body)["outputs"][0]["data"] == [2, 4, 6, 8, 10, 12]


def test_the_launcher_explains_itself(folder: Path) -> None:
    """`--help` and `--print-config` end by themselves and say something."""
    commands = [line for line in block("--print-config").splitlines() if "--help" in line or "--print-config" in line]
    assert "MILLRACE_<OPTION>" in (output := shell(folder, "\n".join(commands)))
    assert re.search(r"^port +8000 +default$", output, re.M)
