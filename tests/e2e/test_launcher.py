"""`python -m asgi_app` and plain uvicorn, on every kind of socket: serve, stop, and refuse to start."""

import asyncio
import contextlib
import errno
import shutil
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from .client import PATIENCE, Address, Connection, Failed, check_samples, load, request
from .processes import STARTED, Process, eventually, launcher, listens, on_port, run, started

pytestmark = pytest.mark.e2e

Start = Callable[[Path], contextlib.AbstractContextManager[tuple[Process, Address]]]


@contextlib.contextmanager
def on_unix_path(folder: Path) -> Iterator[tuple[Process, Address]]:
    path = folder / "run/own.sock"
    with started(folder, *launcher(folder), "--uds", str(path)) as server:
        server.wait_for_log(STARTED)
        yield server, path


@contextlib.contextmanager
def inherited(folder: Path, unix: bool, *command: str) -> Iterator[tuple[Process, Address]]:
    """The command with a listening socket that this process holds as its descriptor 0."""
    address: Address
    with contextlib.ExitStack() as stack:
        if unix:
            address = folder / "run/held.sock"
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(address))
            stack.callback(address.unlink)
        else:
            sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = ("127.0.0.1", sock.getsockname()[1])
        sock.listen(128)
        server = stack.enter_context(started(folder, *command, stdin=sock))
        server.wait_for_log(STARTED)
        yield server, address


def uvicorn(folder: Path) -> tuple[str, ...]:
    return str(folder / ".venv/bin/uvicorn"), "--fd", "0", "asgi_app:app"


FORMS: dict[str, Start] = {
    "launcher on a port": on_port,
    "launcher on a unix path": on_unix_path,
    "launcher on an inherited TCP socket": lambda f: inherited(f, False, *launcher(f), "--fd", "0"),
    "launcher on an inherited unix socket": lambda f: inherited(f, True, *launcher(f), "--fd", "0"),
    "uvicorn on an inherited TCP socket": lambda f: inherited(f, False, *uvicorn(f)),
    "uvicorn on an inherited unix socket": lambda f: inherited(f, True, *uvicorn(f)),
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_picture_goes_in_and_its_digit_comes_out(folder: Path, form: str) -> None:
    """Each way of starting a server serves: every sample is classified as the digit in its file's name."""
    with FORMS[form](folder) as (server, address):
        assert (await request(address, "GET", "/v2/health/ready")).status == 200
        await check_samples(address)
    assert not server.alive()


async def test_an_inherited_descriptor_may_have_any_number(folder: Path) -> None:
    """`--fd N` takes the N of the option, as circus passes it, not only descriptor 0."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        fd = sock.fileno()
        with started(folder, *launcher(folder), "--fd", str(fd), inherit=[fd]) as server:
            server.wait_for_log(STARTED)
            await check_samples(("127.0.0.1", sock.getsockname()[1]))


@pytest.mark.parametrize("form", ["launcher on a port", "launcher on a unix path"])
async def test_a_stop_under_load_answers_what_was_accepted(folder: Path, form: str) -> None:
    """SIGTERM loses no request: each that was sent on an open connection is answered; then the exit code is 0."""
    with FORMS[form](folder) as (server, address):
        async with load(address, clients=8) as tally:
            await tally.more(50)
            server.signal()
            # The load goes on until the server is gone: a client gives up when it is refused, as all are in the end.
            assert await asyncio.to_thread(server.wait) == 0, server.log()
    assert not tally.failures, tally.failures
    assert tally.announced > 0, "no request came while the server drained: the load was too low to prove anything"
    assert set(tally.statuses) <= {200, 503}, tally
    assert not tally.wrong
    assert not listens(address)
    assert not isinstance(address, Path) or not address.exists()


async def test_a_draining_server_says_so_and_serves_on(folder: Path) -> None:
    """After SIGTERM it is not ready, but serves for MILLRACE_DRAIN_DELAY; a second SIGTERM ends the delay."""
    with on_port(folder, {"MILLRACE_DRAIN_DELAY": "600"}) as (server, address):
        server.signal()
        async with asyncio.timeout(PATIENCE):
            while (await request(address, "GET", "/v2/health/ready")).status != 503:
                pass
        await check_samples(address)
        server.signal()
        assert await asyncio.to_thread(server.wait) == 0, server.log()


async def test_a_dead_servers_socket_is_replaced(folder: Path) -> None:
    """What a killed server left at the path does not keep the next one from starting."""
    with on_unix_path(folder) as (server, address):
        server.signal(signal.SIGKILL)
        server.wait()
    assert isinstance(address, Path)
    assert address.is_socket()
    with on_unix_path(folder) as (_, address):
        await check_samples(address)


def test_a_live_servers_socket_is_not_taken(folder: Path) -> None:
    """A path on which somebody listens is refused, with exit code 2, and stays as it was."""
    path = folder / "run/taken.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        ended = run(folder, *launcher(folder), "--uds", str(path))
        assert ended.returncode == 2
        assert f"--uds: another process listens on {path}" in ended.stderr
        assert listens(path)
    path.unlink()


async def test_a_starting_servers_socket_is_not_taken(folder: Path) -> None:
    """A path whose server still loads its models counts as taken, and who connects meanwhile is served afterwards."""
    path = folder / "run/loading.sock"
    with started(folder, *launcher(folder), "--uds", str(path)) as server:
        eventually(lambda: listens(path), "the server listens")
        assert STARTED not in server.log()
        async with await Connection.open(path) as connection:
            ended = run(folder, *launcher(folder), "--uds", str(path))
            assert ended.returncode == 2, ended
            assert (await connection.request("GET", "/v2/health/ready")).status == 200
        server.wait_for_log(STARTED)
        await check_samples(path)


def test_a_full_sockets_path_is_not_taken(folder: Path) -> None:
    """A path whose server is too busy to accept counts as taken, and asking does not hang."""
    path = folder / "run/full.sock"
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as waiting:
        sock.bind(str(path))
        sock.listen(1)
        error = 0
        while not error:
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            error = client.connect_ex(str(path))
        assert error == errno.EAGAIN
        assert run(folder, *launcher(folder), "--uds", str(path)).returncode == 2
        assert path.is_socket()
    path.unlink()


def test_a_file_is_not_mistaken_for_a_socket(folder: Path) -> None:
    """A path at which something else lies is refused, with exit code 2, and stays as it was."""
    path = folder / "run/notes"
    path.write_text("mine")
    ended = run(folder, *launcher(folder), "--uds", str(path))
    assert ended.returncode == 2
    assert str(path) in ended.stderr
    assert path.read_text() == "mine"


def test_a_wrong_option_ends_with_2_and_names_the_nearest(folder: Path) -> None:
    """Exit code 2, and the message names the option that was meant."""
    ended = run(folder, *launcher(folder), "--modells", "models")
    assert ended.returncode == 2
    assert ended.stderr.startswith("millrace: --modells: no such option; did you mean --models?")
    assert "Traceback" not in ended.stderr


def test_a_wrong_variable_ends_with_2_and_names_the_nearest(folder: Path) -> None:
    """A misspelled variable is no default: exit code 2, and the message names the one that was meant."""
    with started(folder, *launcher(folder), environment={"MILLRACE_MAX_BODDY": "1"}) as server:
        assert server.wait() == 2
    assert "MILLRACE_MAX_BODDY: no such setting; did you mean MILLRACE_MAX_BODY?" in server.log()


def test_a_taken_port_ends_with_2(folder: Path) -> None:
    """Exit code 2, and the message names the settings and the address."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        ended = run(folder, *launcher(folder), "--port", str(port))
    assert ended.returncode == 2
    assert f"--port: cannot listen on 127.0.0.1:{port}" in ended.stderr


@pytest.mark.parametrize("where", ["port", "unix path"])
def test_a_missing_repository_ends_with_3(folder: Path, where: str) -> None:
    """The service cannot start: exit code 3, the message names the folder, and no socket file is left behind."""
    path = folder / "run/never.sock"
    option = ("--uds", str(path)) if where == "unix path" else ("--port", "0")
    ended = run(folder, *launcher(folder), "--models", "no/such/folder", *option)
    assert ended.returncode == 3, ended
    assert "no/such/folder" in ended.stderr
    assert not path.exists()


def test_every_setting_is_printed_with_its_origin(folder: Path) -> None:
    """--print-config shows what came from an option, from a variable, and from nowhere; and starts nothing."""
    with started(
        folder, *launcher(folder), "--port", "0", "--print-config", environment={"MILLRACE_KEEP_ALIVE": "80"}
    ) as printed:
        assert printed.wait() == 0
    origins = {line.split()[0]: line.split()[-1] for line in printed.log().splitlines()}
    assert origins["port"] == "--port"
    assert origins["keep_alive"] == "MILLRACE_KEEP_ALIVE"
    assert origins["models"] == "default"


async def test_a_client_on_tcp_cannot_forge_its_address(folder: Path) -> None:
    """Without a proxy on this very machine nobody is believed: the access log has the address that connected."""
    with on_port(folder, {"MILLRACE_ACCESS_LOG": "1"}) as (server, address):
        forged = ("X-Forwarded-For: 6.6.6.6",)
        assert (await request(address, "GET", "/v2/models/forged", headers=forged, source="127.0.0.2")).status == 404
        server.wait_for_log("/v2/models/forged")
        (line,) = (line for line in server.log().splitlines() if "/v2/models/forged" in line)
        assert "127.0.0.2:" in line
        assert "6.6.6.6" not in line


@pytest.fixture
def stuck_model(folder: Path) -> Iterator[Path]:
    """A repository whose model never returns when it is asked about a positive number."""
    repository = folder / "stuck"
    (repository / "stuck/1").mkdir(parents=True)
    (repository / "stuck/config.pbtxt").write_text(
        'backend: "pytorch" max_batch_size: 1 input { name: "x" data_type: TYPE_FP32 dims: 1 } '
        'output { name: "y" data_type: TYPE_FP32 dims: 1 }'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Stuck()), str(repository / "stuck/1/model.pt"))
    yield repository
    shutil.rmtree(repository)


ASK = "POST", "/v2/models/stuck/infer", b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}'


async def test_a_model_that_never_ends_does_not_keep_the_server(folder: Path, stuck_model: Path) -> None:
    """A request stuck in the model is answered 503 when the graceful time is over, and the process ends, with 4."""
    limits = {"MILLRACE_GRACEFUL_TIMEOUT": "1", "MILLRACE_INLINE_MS": "0", "MILLRACE_MODELS": str(stuck_model)}
    with on_port(folder, limits) as (server, address):
        stuck = [asyncio.ensure_future(request(address, *ASK)) for _ in range(2)]
        waiting = b'nv_inference_pending_request_count{model="stuck",version="1"} 1\n'  # so the other one runs
        async with asyncio.timeout(PATIENCE):
            while waiting not in (await request(address, "GET", "/metrics")).body:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        server.signal()
        assert [answer.status for answer in await asyncio.gather(*stuck)] == [503, 503]
        assert await asyncio.to_thread(server.wait) == 4, server.log()
        assert "stuck in a batch" in server.log()
        assert "Traceback" not in server.log()


async def test_a_model_that_never_ends_ends_the_process(folder: Path, stuck_model: Path) -> None:
    """When it has been running for `stuck_after`: exit code 71, and the log has every thread's trace."""
    limits = {"MILLRACE_STUCK_AFTER": "0.5", "MILLRACE_INLINE_MS": "0", "MILLRACE_MODELS": str(stuck_model)}
    with on_port(folder, limits) as (server, address):
        with pytest.raises(Failed):
            await request(address, *ASK)
        assert await asyncio.to_thread(server.wait) == 71, server.log()
        assert "exit code 71: a batch has been running for more than 0.5 s" in server.log()
        assert "engine/model.py" in server.log()


async def test_a_model_that_never_lets_the_event_loop_go_ends_the_process(folder: Path, stuck_model: Path) -> None:
    """It was measured to be quick, so it runs there; exit code 1, and the log has its trace."""
    limits = {"MILLRACE_STUCK_AFTER": "0.5", "MILLRACE_INLINE_MS": "1000", "MILLRACE_MODELS": str(stuck_model)}
    with on_port(folder, limits) as (server, address):
        with pytest.raises(Failed):
            await request(address, *ASK)
        assert await asyncio.to_thread(server.wait) == 1, server.log()
        assert "Timeout" in server.log()
        assert "engine/model.py" in server.log()


@pytest.mark.parametrize("program", ["asgi_app", "engine"])
async def test_a_lost_device_ends_the_process(folder: Path, program: str) -> None:
    """With 70: either program that has an engine of its own; nothing lingers that answers 503 for ever."""
    code = (
        "import os, sys; from engine.local import LocalEngine; "
        "LocalEngine.lost = lambda self: 'cuda:0 is lost' if os.path.exists('run/lost') else ''; "
        f"from {program}.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    options = ("--port", "0") if program == "asgi_app" else ("--engine-socket", "run/lost.sock")
    with started(folder, str(folder / ".venv/bin/python"), "-c", code, *options) as process:
        process.wait_for_log("ready")
        (folder / "run/lost").touch()
        try:
            assert await asyncio.to_thread(process.wait) == 70, process.log()
        finally:
            (folder / "run/lost").unlink()
        assert "exit code 70: cuda:0 is lost" in process.log()


class Stuck(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() > 0):
            x = x + 1
        return x
