"""Every case of tests/asgi_app/protocol_cases.py, in pieces of every kind, by our protocol class and by uvicorn's.

Ours does what the case says. uvicorn's does, too, or the difference is one of those below: it is one by which ours is
the stricter, or one that is explained.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from asgi_app.protocol import Protocol

from .protocol_cases import AFTER, CASES, MAX_HEAD, SAW_AFTER, Case
from .wire import Echo, Seen, connect, read_answers

BY_NAME = {case.name: case for case in CASES}
FAMILIES: dict[str, list[Case]] = defaultdict(list)
for each in CASES:
    FAMILIES[each.name.partition("/")[0]].append(each)


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
        statuses: of the answers, without the interim ones.
        closed: the server closed the connection.
        seen: the requests that the application answered.
    """

    statuses: tuple[int, ...]
    closed: bool
    seen: tuple[Seen, ...]


def _cut(data: bytes) -> list[bytes]:
    """In four: at a third, at two thirds, and inside the last line's end."""
    at = sorted({len(data) // 3, 2 * len(data) // 3, max(data.rfind(b"\n"), 0)})
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True) if start < end]


def _single(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def _between_lines(data: bytes) -> list[bytes]:
    """Cut between every CR and LF."""
    return re.split(rb"(?<=\r)(?=\n)", data)


# How a case is sent -> (its pieces, whether another request follows it).
WAYS: dict[str, tuple[Callable[[bytes], list[bytes]], bool]] = {
    "whole": (lambda data: [data], False),
    "byte by byte": (_single, False),
    "in four": (_cut, False),
    "between CR and LF": (_between_lines, False),
    "whole, with another": (lambda data: [data], True),
    "byte by byte, with another": (_single, True),
}


async def play(protocol: type[Any], case: Case, way: str) -> Outcome:
    """Send a case, and see what comes of it. What is answered must be HTTP, and whole."""
    pieces, more = WAYS[way]
    app = Echo()
    wire = connect(protocol, app, max_head=MAX_HEAD)
    wire.send(*pieces(case.sent + AFTER * more))
    await wire.quiet()
    answers = [
        answer
        for answer in read_answers(wire.written, [str(scope["method"]) for scope in app.scopes], wire.closing)
        if answer.status >= 200
    ]
    assert all(answer.whole for answer in answers)
    if answers and wire.closing:
        assert answers[-1].header(b"connection") == b"close"
    for scope in app.scopes:
        assert scope["path"] == unquote(scope["raw_path"].decode())
    outcome = Outcome(tuple(answer.status for answer in answers), wire.closing, tuple(app.seen))
    wire.vanish()
    await wire.quiet()
    return outcome


def _same(seen: tuple[Seen, ...], expected: tuple[Seen, ...]) -> bool:
    return len(seen) == len(expected) and all(
        (got if want.headers is not None else got._replace(headers=None)) == want
        for got, want in zip(seen, expected, strict=True)
    )


def kind(case: Case, outcome: Outcome, more: bool) -> str:
    """How the outcome differs from the case; empty if it does not.

    Args:
        more: another request followed.
    """
    if case.other and not kind(case.other, outcome, more):
        return ""
    seen = case.seen + (SAW_AFTER,) * (more and not case.closed)
    served = outcome.statuses.count(200)
    refusals = [status for status in outcome.statuses if status != 200]
    if served > len(seen):
        return "serves more"
    if len(refusals) > bool(case.refusal):
        return "refuses"
    if served < len(seen):
        return "loses answers" if outcome.closed else "waits"
    if case.refusal and not refusals:
        return "closes" if outcome.closed else "waits"
    if not set(refusals) <= case.refusal:
        return "another status"
    if outcome.closed != case.closed:
        return "closes" if outcome.closed else "stays open"
    return "" if _same(outcome.seen, seen) else "sees otherwise"


# What uvicorn's class lets pass, and ours, which is the stricter one, refuses: names of cases -> what that is.
STRICTER = {
    "tunnel/path tunnel/url tunnel/star": "CONNECT, where what it asks for happens to be a path",
    "no-target/fragment no-target/fragment-in-query no-target/absolute-fragment": "a fragment, which it drops",
    "no-target/star no-target/star-path no-target/star-star no-target/star-query": "targets that only begin with a *",
    "no-target/user-information": "a name and a password before the host",
    "version/HTTP/2.0 version/HTTP/0.9 version/none version/http-0.9": "versions that it does not speak",
    "line/no-space-after-target": "a target that ends in the version: to it, this is HTTP/0.9",
    "version/RTSP/1.0 other/rtsp other/icecast": "other protocols",
    "line/two-spaces-after-method line/two-spaces-after-target": "two blanks in the request line",
    "leading/lf leading/lf-lf leading/cr leading/cr-cr-lf leading/crlf-lf": "line ends of any kind before a request",
    "leading/hundred leading/five-thousand-bytes": "any number of empty lines before a request",
    "no-host/missing* no-host/forwarded-only no-host/two*": "no host, or two of them",
    "no-host/list* no-host/space no-host/tab no-host/slash no-host/path no-host/url no-host/user-information "
    "no-host/bad-port no-host/signed-port no-host/negative-port no-host/open-bracket no-host/close-bracket "
    "no-host/no-brackets no-host/behind-brackets no-host/query no-host/fragment no-host/backslash no-host/quoted "
    "no-host/angle no-host/pipe no-host/caret no-host/utf-8 no-host/latin-1 no-host/colon-only": "a host that is none",
    "pipeline/no-host-behind*": "no host, in the second request",
    "no-length/twenty-digits no-length/hundred-zeros": "any number of zeros before a length",
    "no-coding/gzip-first no-coding/identity-first no-coding/two-cow-first "
    "no-coding/two-identity-first no-coding/two-gzip-first": "a coding that it does not undo",
    "no-coding/comma-before no-coding/comma-blank-before": "a list with nothing in it before the coding",
    "no-coding/1.0-chunked no-coding/1.0-gzip* no-coding/1.0-keep-alive": "chunks in HTTP/1.0, which has none",
    "no-size/seventeen-digits* no-size/hundred-digits*": "any number of zeros before a size",
    "no-extension/empty-value* no-extension/empty-name*": "extensions without a name, or a value",
    "no-extension/long-*": "an extension of any length",
    "no-trailer/too-*": "trailers of any number and length",
    "bound/a-field-too-many bound/many-fields-too-many bound/second-with-too-many": "any number of fields",
    "bound/*-too-long bound/blanks-too-many bound/*without-end": "a head of any length",
    "no-target/too-long no-target/query-too-long": "a target of any length",
}  # fmt: skip

# What uvicorn's class does otherwise, neither being the stricter: names of cases -> (what it does, in the words of
# `kind`; how that comes, and why ours does not).
EXPLAINED = {
    "length/body-* smuggling/response-queue smuggling/behind-a-served-one pipeline/rubbish-* pipeline/nul-* "
    "pipeline/bad-* pipeline/fold-*": (
        {"loses answers"},
        "a refusal is written as soon as it is known: before the answers to requests that came in the same piece, "
        "which are then lost. Ours keep their order.",
    ),
    "old/keep-alive* old/expect": (
        {"closes", "loses answers"},
        "HTTP/1.0 is never kept alive. Ours is, for those who ask: that is what nginx and ab do.",
    ),
    "blank/behind blank/several-behind blank/tab-behind blank/around length/blank-behind length/tab-behind "
    "length/blanks-around coding/blank-behind": (
        {"sees otherwise"},
        "blanks behind a value are a part of it. They are none (RFC 9112, 5.1).",
    ),
    "trailer/one trailer/several trailer/empty-value trailer/host trailer/two-hosts trailer/expect "
    "trailer/authorization pipeline/trailers-between": (
        {"sees otherwise"},
        "trailers are added to the headers, while the application reads them: a host, an authorization. Ours are "
        "dropped (RFC 9110, 6.5.1).",
    ),
    "trailer/connection": (
        {"sees otherwise", "waits"},
        "`Connection: close` in a trailer is added to the headers as well, and ends the connection without closing it.",
    ),
    "target/absolute-no-path*": (
        {"refuses"},
        "a URL without a path is refused. It asks for `/` (RFC 9112, 3.2.1).",
    ),
    "upgrade/h2c upgrade/unknown upgrade/tls upgrade/list upgrade/websocket": (
        {"waits"},
        "what came in the same piece behind a request for an upgrade that is not granted is lost.",
    ),
    "upgrade/h2c-with-* upgrade/unknown-with-* upgrade/tls-with-* upgrade/list-with-* upgrade/websocket-with-*": (
        {"sees otherwise", "waits", "refuses"},
        "a request for an upgrade that is not granted has no body: that is lost, or read as the next request.",
    ),
    "upgrade/h2c-smuggling upgrade/unknown-smuggling upgrade/tls-smuggling upgrade/list-smuggling "
    "upgrade/websocket-smuggling": (
        {"sees otherwise", "waits", "refuses", "serves more"},
        "the body of a request for an upgrade that is not granted is read as the next request, which is smuggling.",
    ),
}  # fmt: skip

# What uvicorn's may do where ours refuses: serve it, wait for more of it, or refuse what follows it, which is too late.
LAXER = {"serves more", "waits", "another status", "sees otherwise"}


def listed(name: str, table: Iterable[str]) -> list[str]:
    """The keys of a table that are for this case."""
    return [key for key in table if any(fnmatchcase(name, pattern) for pattern in key.split())]


def test_names_are_unique() -> None:
    """Each case is found by its name, and there are as many as one would think."""
    assert not [name for name, count in Counter(case.name for case in CASES).items() if count > 1]
    assert len(CASES) > 1400


def test_no_difference_is_listed_twice_or_of_nothing() -> None:
    """Each pattern of both tables is that of a case or more, and no case has two reasons."""
    for key in (*STRICTER, *EXPLAINED):
        for pattern in key.split():
            assert any(fnmatchcase(name, pattern) for name in BY_NAME), pattern
    assert not [name for name in BY_NAME if len(listed(name, (*STRICTER, *EXPLAINED))) > 1]


def ways_of(case: Case) -> list[str]:
    """A case that is not complete is not followed by another: it would take it for its rest."""
    return [way for way, (_, more) in WAYS.items() if not (more and case.waits)]


async def differences(protocol: type[Any], case: Case) -> dict[str, str]:
    """In which ways of sending it the outcome is not that of the case, and how."""
    kinds = {way: kind(case, await play(protocol, case, way), WAYS[way][1]) for way in ways_of(case)}
    return {way: found for way, found in kinds.items() if found}


@pytest.mark.parametrize("name", BY_NAME)
async def test_ours(name: str) -> None:
    """What the case says comes of it, however it is cut, and what follows it is in step, or is not read."""
    assert await differences(Protocol, BY_NAME[name]) == {}, BY_NAME[name]


def complaint(case: Case, kinds: set[str]) -> str:
    """What is wrong with what is listed of the ways in which uvicorn's class differs; empty if nothing is."""
    stricter, explained = listed(case.name, STRICTER), listed(case.name, EXPLAINED)
    if not kinds:
        return "listed, and no longer a difference" if stricter or explained else ""
    if stricter:
        return "" if case.refusal and kinds <= LAXER else f"ours is not the stricter: {kinds}"
    if explained:
        does, _ = EXPLAINED[explained[0]]
        return "" if kinds <= does else f"not what is explained: {kinds}"
    return f"not listed: {kinds}"


@pytest.mark.parametrize("family", FAMILIES)
async def test_uvicorns(family: str) -> None:
    """It is as strict as ours, and no stricter, but for what is listed; and what is listed is still so."""
    kinds = {case: set((await differences(HttpToolsProtocol, case)).values()) for case in FAMILIES[family]}
    complaints = {case.name: complaint(case, found) for case, found in kinds.items()}
    assert {name: text for name, text in complaints.items() if text} == {}


@pytest.mark.parametrize("family", FAMILIES)
async def test_scopes_are_those_of_uvicorn(family: str) -> None:
    """An application is told the same of every request, to the last key, whichever of them serves it."""
    for case in FAMILIES[family]:
        if case.other or listed(case.name, EXPLAINED):
            continue
        scopes = []
        for protocol in (Protocol, HttpToolsProtocol):
            app = Echo()
            wire = connect(protocol, app, max_head=MAX_HEAD)
            wire.send(case.sent)
            await wire.quiet()
            scopes.append(app.scopes[: len(case.seen)])
            for scope in scopes[-1]:
                scope.pop("extensions", None)  # ours says that it is guarded
            wire.vanish()
            await wire.quiet()
        assert scopes[0] == scopes[1], case.name


@pytest.mark.parametrize("name", [case.name for case in CASES if case.waits])
async def test_what_ends_before_its_end(name: str) -> None:
    """A client who closes its side in the middle of a request is closed on, and the request is never served."""
    case = BY_NAME[name]
    app = Echo()
    wire = connect(Protocol, app, max_head=MAX_HEAD)
    wire.send(case.sent)
    await wire.quiet()
    assert not wire.closing
    wire.end()
    await wire.quiet()
    assert wire.closing
    assert wire.lost
    assert _same(tuple(app.seen), case.seen)
    statuses = [answer.status for answer in read_answers(wire.written, ["GET"] * len(app.scopes), closed=True)]
    assert statuses in ([200] * len(case.seen), [200] * len(case.seen) + [400])
