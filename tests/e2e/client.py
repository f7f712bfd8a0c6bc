"""A strict HTTP/1.1 client, and load made of many of them.

What a failed request is: a request that was written whole on a connection which the server had not announced to close,
and to which no complete answer came; or one whose answer was malformed, or was followed by bytes that nobody asked for.
A refused connection is counted apart: whether it is a failure depends on who holds the listening socket.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

Address = tuple[str, int] | Path

# Pictures by the digit that they show.
SAMPLES = {path.stem: path.read_bytes() for path in sorted((ROOT / "models/digits/samples").iterdir())}

# Longer than any server here needs to start: a request may wait in the socket's queue for one.
PATIENCE = 60.0


class Failed(Exception):
    """No complete answer, or one that is not HTTP/1.1; the text says which."""


class Refused(Exception):
    """Nobody listens, or the listener went away before it accepted and before anything was sent."""


@dataclass(frozen=True)
class Answer:
    """One complete answer.

    Attributes:
        headers: by lower-case name; a name that comes twice has its values joined by a comma.
        closes: the server announced that this is the connection's last answer.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    closes: bool

    def json(self) -> dict[str, object]:
        answer = json.loads(self.body)
        assert isinstance(answer, dict), answer
        return answer


class Connection:
    """One connection. `async with await Connection.open(address) as connection: await connection.request(...)`.

    Attributes:
        heard: called with what comes, when it comes.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard: Callable[[bytes], object] = len
        self._reader = reader
        self._writer = writer
        self._received = bytearray()

    @classmethod
    async def open(cls, address: Address, source: str | None = None) -> "Connection":
        """Connect, on TCP from the address `source`.

        Raises:
            Refused.
        """
        try:
            if isinstance(address, Path):
                return cls(*await asyncio.open_unix_connection(address))
            local = (source, 0) if source else None
            return cls(*await asyncio.open_connection(*address, local_addr=local))
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise Refused(repr(error)) from None

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def request(self, method: str, target: str, body: bytes = b"", headers: tuple[str, ...] = ()) -> Answer:
        """Send one request and read its answer.

        Raises:
            Failed.
        """
        lines = [f"{method} {target} HTTP/1.1", "Host: millrace", f"Content-Length: {len(body)}", *headers]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return await self.answer(method == "HEAD")

    async def send(self, data: bytes) -> None:
        """Write bytes; that the other end closed meanwhile is for `answer` to find out."""
        self._writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def answer(self, head: bool = False) -> Answer:
        """Read one answer, or the head that is all of it.

        Raises:
            Failed.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._answer(head)
        except TimeoutError:
            raise Failed(f"no answer within {PATIENCE:g} s; received {bytes(self._received)!r}") from None

    async def interim(self) -> None:
        """Read one `100 Continue`.

        Raises:
            Failed.
        """
        async with asyncio.timeout(PATIENCE):
            head = await self._until(b"\r\n\r\n")
        if head != b"HTTP/1.1 100 Continue\r\n\r\n":
            raise Failed(f"not 100 Continue: {head!r}")

    async def ended(self) -> bool:
        """Wait until the server sends something or closes the connection; whether it was the latter."""
        async with asyncio.timeout(PATIENCE):
            try:
                if not self._received:
                    await self._more()
            except Failed:
                return True
            return False

    async def _answer(self, head_only: bool) -> Answer:
        head = await self._until(b"\r\n\r\n")
        status_line, *lines = head[:-4].decode("latin-1").split("\r\n")
        version, _, rest = status_line.partition(" ")
        if version != "HTTP/1.1" or not rest[:3].isdecimal():
            raise Failed(f"not a status line: {status_line!r}")
        status = int(rest[:3])
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or name != name.strip():
                raise Failed(f"not a header: {line!r}")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        body = b"" if head_only else await self._body(status, headers)
        if self._received:
            raise Failed(f"bytes after the answer: {bytes(self._received[:80])!r}")
        return Answer(status, headers, body, "close" in headers.get("connection", "").lower())

    async def _body(self, status: int, headers: dict[str, str]) -> bytes:
        if status == 204:
            return b""
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int((await self._until(b"\r\n")).strip(), 16):
                body += await self._exactly(size)
                if await self._exactly(2) != b"\r\n":
                    raise Failed("a chunk that does not end")
            if await self._exactly(2) != b"\r\n":
                raise Failed("trailers that nobody announced")
            return body
        if "content-length" not in headers:
            raise Failed(f"neither content-length nor chunked: {headers}")
        return await self._exactly(int(headers["content-length"]))

    async def _until(self, mark: bytes) -> bytes:
        while (end := self._received.find(mark)) < 0:
            await self._more()
        return self._take(end + len(mark))

    async def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            await self._more()
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    async def _more(self) -> None:
        try:
            data = await self._reader.read(1 << 16)
        except ConnectionError as error:
            raise Failed(f"{error!r} after {bytes(self._received)!r}") from None
        if not data:
            raise Failed(f"closed after {bytes(self._received)!r}")
        self._received += data
        self.heard(data)


async def request(
    address: Address,
    method: str,
    target: str,
    body: bytes = b"",
    headers: tuple[str, ...] = (),
    source: str | None = None,
) -> Answer:
    """One request on a connection of its own.

    Raises:
        Failed, Refused.
    """
    async with await Connection.open(address, source) as connection:
        return await connection.request(method, target, body, headers)


async def check_samples(address: Address) -> None:
    """Every sample is classified as the digit that it shows, each on a connection of its own.

    Raises:
        AssertionError, Failed, Refused.
    """
    for digit, picture in SAMPLES.items():
        answer = await request(address, "POST", "/classify", picture)
        assert answer.status == 200, answer
        assert set(answer.json()) == {"class_name", "confidence", "top"}, answer
        assert answer.json()["class_name"] == digit, answer


@dataclass
class Tally:
    """What became of the requests of a load.

    Attributes:
        kept, single: answers on connections that were kept alive, and on those for one request.
        statuses: how often each status was answered.
        wrong: answers of status 200 with another class than "7".
        failures: what is not a complete answer.
        refused: how many connections were refused; whoever is refused gives up.
        announced: answers that said that the connection closes.
    """

    kept: int = 0
    single: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    refused: int = 0
    announced: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def more(self, count: int) -> None:
        """Wait until each kind of client got `count` more answers.

        Raises:
            AssertionError: the time is over, or nobody asks any more.
        """
        kept, single = self.kept + count, self.single + count
        try:
            async with asyncio.timeout(PATIENCE):
                while self.kept < kept or self.single < single:
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise AssertionError(f"the load stands still: {self}") from None


@contextlib.asynccontextmanager
async def load(address: Address, clients: int = 4) -> AsyncIterator[Tally]:
    """Classify a 7 again and again: `clients` on kept-alive connections, as many on one for each request.

    Each has one request under way; at the end those are awaited.
    """
    tally, stop = Tally(), asyncio.Event()
    tasks = [asyncio.create_task(_client(address, keep, tally, stop)) for keep in (True, False) * clients]
    try:
        yield tally
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def _client(address: Address, keep: bool, tally: Tally, stop: asyncio.Event) -> None:
    connection = None
    while not stop.is_set():
        try:
            connection = connection or await Connection.open(address)
            answer = await connection.request("POST", "/classify", SAMPLES["7"])
        except Refused:
            tally.refused += 1
            break
        except (Failed, OSError) as error:
            tally.failures.append(f"{'kept' if keep else 'single'}: {error}")
            if connection is not None:
                await connection.close()
            connection = None
            continue
        tally.statuses[answer.status] += 1
        tally.wrong += answer.status == 200 and answer.json()["class_name"] != "7"
        tally.announced += answer.closes
        if keep:
            tally.kept += 1
        else:
            tally.single += 1
        tally.news.set()
        if answer.closes or not keep:
            await connection.close()
            connection = None
        # Some time for the servers, which share the processors with these clients.
        await asyncio.sleep(0.002)
    if connection is not None:
        await connection.close()
