"""The closed loop: wrk keeps so many connections busy, each asking again when it is answered."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..http import _lua
from ..servers import BenchError, die_with_parent
from .processes import Family

TIMEOUT = 60  # seconds after which wrk takes an answer for lost

SCRIPT = """\
wrk.method = "POST"
{headers}
local bodies = {{ {paths} }}
for index, path in ipairs(bodies) do
  local file = assert(io.open(path, "rb"))
  bodies[index] = file:read("*a")
  file:close()
end
wrk.body = bodies[1]
if #bodies > 1 then
  local requests, index = {{}}, 0
  function init(args)
    for number, body in ipairs(bodies) do requests[number] = wrk.format(nil, nil, nil, body) end
  end
  function request()
    index = index % #requests + 1
    return requests[index]
  end
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "p99.9": %f, "status": %d, "socket": %d}}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency:percentile(99.9) / 1e3, errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
"""


def write_script(folder: Path, bodies: Sequence[bytes], headers: Mapping[str, str]) -> Path:
    """What makes wrk send the bodies in turn."""
    paths = []
    for number, body in enumerate(bodies):
        paths.append(folder / f"{number}.body")
        paths[-1].write_bytes(body)
    script = folder / "load.lua"
    lines = "\n".join(f"wrk.headers[{_lua(key)}] = {_lua(value)}" for key, value in headers.items())
    script.write_text(SCRIPT.format(headers=lines, paths=", ".join(_lua(str(path)) for path in paths)))
    return script


def run_wrk(members: Family, url: str, script: Path, connections: int, seconds: int) -> dict[str, float]:
    """Load a server once.

    Returns:
        `rate` of good answers a second, `p50`, `p99` and `p99.9` in milliseconds, `cpu` microseconds of all the
        server's processes for each good answer, and how many were `refused`: another status than 200, or a connection
        that failed.

    Raises:
        BenchError: there was no good answer.
    """
    options = ("-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={TIMEOUT}s", "-s", str(script))
    before = members.cpu_seconds()
    done = subprocess.run(
        ["wrk", *options, url], capture_output=True, text=True, timeout=seconds + TIMEOUT + 30, check=False,
        preexec_fn=die_with_parent,
    )  # fmt: skip
    cpu = members.cpu_seconds() - before
    line = re.search(r"^RESULT (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or line is None:
        raise BenchError(f"wrk failed with {done.returncode}: {done.stdout}{done.stderr}")
    result = json.loads(line[1])
    good = result["requests"] - result["status"]
    refused = result["status"] + result["socket"]
    if good <= 0:
        raise BenchError(f"no good answer at {connections} connections in {seconds} s, {refused} refused")
    latencies = {name: result[name] for name in ("p50", "p99", "p99.9")}
    return {"rate": good / result["seconds"], **latencies, "cpu": cpu / good * 1e6, "refused": refused}
