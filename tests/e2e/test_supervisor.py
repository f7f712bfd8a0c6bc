"""supervisord.conf, and deploy/nginx.conf in front of it: they serve, and replace servers without a lost request.

What holds under circus as well is in test_service.py. Both are the shipped files; only nginx's port is replaced, in a
copy: a developer's own nginx may be using it.
"""

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.settings import Settings

from .client import ROOT, Address, Connection, check_samples, load, request
from .processes import STARTED, Process, by_supervisor, copy, eventually, free_port, listens, run, started, tool

pytestmark = pytest.mark.e2e

SOCKET = Path("run/millrace.sock")


@pytest.fixture(scope="module")
def supervisor(folder: Path) -> Iterator[Process]:
    """supervisord with the shipped file, its servers up."""
    # Not the default, to see in the servers' log that a variable set here reaches them.
    with by_supervisor(folder, environment={"MILLRACE_ACCESS_LOG": "1"}) as (manager, _):
        yield manager
    assert not listens(folder / SOCKET)


@pytest.fixture(scope="module")
def nginx(folder: Path, supervisor: Process) -> Iterator[Address]:
    """nginx with the shipped file, in front of supervisor's servers."""
    program, port = tool("nginx"), free_port()
    copy(folder, "deploy/nginx.conf", "listen 127.0.0.1:8080 ", f"listen 127.0.0.1:{port} ")
    with started(folder, program, "-p", str(folder), "-c", "deploy/nginx.conf") as server:
        address = ("127.0.0.1", port)
        eventually(lambda: listens(address) or not server.alive(), "nginx listens")
        assert server.alive(), server.log()
        yield address
    assert not listens(address)


def _supervisorctl(folder: Path, *arguments: str) -> str:
    ended = run(folder, str(folder / ".venv/bin/supervisorctl"), "-c", "supervisord.conf", *arguments)
    assert ended.returncode == 0, ended
    return ended.stdout


def _pid(folder: Path, slot: int) -> int:
    return int(_supervisorctl(folder, "pid", f"millrace:millrace-{slot}"))


async def test_nginx_serves(nginx: Address) -> None:
    """deploy/nginx.conf: every sample sent to nginx comes back as its digit."""
    await check_samples(nginx)


async def test_a_clients_address_cannot_be_forged_through_nginx(supervisor: Process, nginx: Address) -> None:
    """The access log has the address that nginx saw, whatever X-Forwarded-For the client sent."""
    forged = ("X-Forwarded-For: 6.6.6.6", "X-Forwarded-For: 7.7.7.7", "Forwarded: for=6.6.6.6")
    answer = await request(nginx, "GET", "/v2/models/forged", headers=forged, source="127.0.0.2")
    assert answer.status == 404
    eventually(lambda: "/v2/models/forged" in supervisor.log(), "the request is in the access log")
    (line,) = (line for line in supervisor.log().splitlines() if "/v2/models/forged" in line)
    assert "127.0.0.2:" in line
    assert "6.6.6.6" not in line
    assert "7.7.7.7" not in line


def test_nginx_gives_up_an_idle_connection_before_the_servers_do() -> None:
    """What deploy/nginx.conf promises to be below, above or as a setting of ours is."""
    text = (ROOT / "deploy/nginx.conf").read_text()
    (idle,) = re.findall(r"keepalive_timeout (\d+)s;", text)
    assert int(idle) < Settings().keep_alive
    assert re.findall(r"client_max_body_size (\d+)m;", text) == [str(Settings().max_body >> 20)]
    assert re.findall(r"client_body_timeout (\d+)s;", text) == [f"{Settings().body_timeout:g}"]
    for forged in ("Forwarded", "X-Forwarded-Host", "X-Forwarded-Port", "X-Real-IP", "X-Forwarded-For"):
        assert f"proxy_set_header {forged} " in text


async def test_nginx_and_the_servers_agree_on_the_largest_body(nginx: Address) -> None:
    """A body of MILLRACE_MAX_BODY reaches the servers, which see that it is no JSON; nginx refuses one byte more."""
    limit = Settings().max_body
    answer = await request(nginx, "POST", "/v2/models/digits/infer", bytes(limit))
    assert answer.status == 400
    assert "error" in answer.json()
    async with await Connection.open(nginx) as connection:
        await connection.send(b"POST /classify HTTP/1.1\r\nHost: millrace\r\nContent-Length: %d\r\n\r\n" % (limit + 1))
        assert (await connection.answer()).status == 413


async def test_supervisor_replaces_its_servers_under_load(folder: Path, supervisor: Process, nginx: Address) -> None:
    """deploy/roll.py, the engine too: nothing is lost or refused, directly or through nginx."""
    async with load(folder / SOCKET, clients=2) as direct, load(nginx, clients=2) as proxied:
        await direct.more(20)
        await proxied.more(20)
        command = str(folder / ".venv/bin/python"), "deploy/roll.py", "--engine"
        ended = await asyncio.to_thread(run, folder, *command)
        assert ended.returncode == 0, ended
        await direct.more(20)
        await proxied.more(20)
    for tally in (direct, proxied):
        assert not tally.failures, tally.failures
        assert (tally.refused, tally.wrong, set(tally.statuses)) == (0, 0, {200}), tally


async def test_killed_servers_cost_the_next_request_nothing(folder: Path, supervisor: Process) -> None:
    """SIGKILL of one server, then of the other while the first starts again: whoever asks next is answered."""
    begun, killed = supervisor.log().count(STARTED), [_pid(folder, 1), _pid(folder, 2)]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
        await check_samples(folder / SOCKET)
    supervisor.wait_for_log(STARTED, begun + 2)
    assert not set(killed) & {_pid(folder, 1), _pid(folder, 2)}
