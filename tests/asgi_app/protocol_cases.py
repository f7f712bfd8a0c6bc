r"""What a connection may send, and what must come of it: one row for each thing that a client, or an attacker, may do.

A case is bytes; the requests that the application is to see, each answered with 200; and whether a refusal follows
them. How the bytes are cut into pieces never matters. The rules are those of RFC 9112 and 9110, and where these leave a
choice, of a server that never guesses: what two servers could read in two ways is refused, and the connection closed,
so that what was smuggled behind it is never read as a request.

`REFUSED` and its like are the statuses that will do. `BEFORE` is a request that is in order, `AFTER` another.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .wire import Headers, Seen

REFUSED = frozenset({400})
UNKNOWN_METHOD = frozenset({400, 501})
UNKNOWN_CODING = frozenset({400, 501})
UNKNOWN_VERSION = frozenset({400, 505})
NO_TUNNEL = frozenset({400, 405, 501})
TOO_LONG = frozenset({431})
TOO_LONG_TARGET = frozenset({414, 431})
TOO_MUCH_FRAMING = frozenset({400, 413, 431})

MAX_HEAD = 4096  # bytes, as the server of these cases is set up
MAX_FIELDS = 100

HOST: Headers = ((b"host", b"x"),)
TCHAR = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONTROLS = [*range(0x20), 0x7F]
# What str.strip, isspace or int of Python, or a C library in some locale, takes for blank, and HTTP does not.
NEARLY_BLANK = [0x00, 0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x1F, 0x85, 0xA0]


@dataclass(frozen=True, slots=True)
class Case:
    """One row.

    Attributes:
        name: FAMILY/WHAT.
        seen: the requests that the application sees and answers, with 200, in order.
        refusal: the statuses of which one is answered after them; empty for none.
        closed: whether the server then closes the connection.
        waits: something is not complete, and the server waits for the rest of it.
        other: what may come of the same bytes as well, where the standard leaves it open.
    """

    name: str
    sent: bytes
    seen: tuple[Seen, ...] = ()
    refusal: frozenset[int] = frozenset()
    closed: bool = False
    waits: bool = False
    other: "Case | None" = None


def served(name: str, sent: bytes, *seen: Seen, may_refuse: frozenset[int] = frozenset()) -> Case:
    """All of them are answered, and the connection is good for more; or the last is refused, as `may_refuse` says."""
    other = refused(name, sent, *seen[:-1], status=may_refuse) if may_refuse else None
    return Case(name, sent, seen, other=other)


def served_last(name: str, sent: bytes, *seen: Seen) -> Case:
    """All of them are answered, and the connection is closed."""
    return Case(name, sent, seen, closed=True)


def refused(name: str, sent: bytes, *seen: Seen, status: frozenset[int] = REFUSED) -> Case:
    """`seen` is answered; what follows is refused, and the connection closed."""
    return Case(name, sent, seen, status, closed=True)


def waits(name: str, sent: bytes, *seen: Seen) -> Case:
    """`seen` is answered; what follows is not complete."""
    return Case(name, sent, seen, waits=True)


def served_in_any_case(name: str, sent: bytes, *seen: Seen) -> Case:
    """All of them are answered, and the server may close the connection after them."""
    return Case(name, sent, seen, other=served_last(name, sent, *seen))


def request(*fields: bytes, line: bytes = b"POST / HTTP/1.1", body: bytes = b"") -> bytes:
    """A request with `Host: x` and these lines."""
    return b"".join(each + b"\r\n" for each in (line, b"Host: x", *fields)) + b"\r\n" + body


def get(line: bytes) -> bytes:
    return request(line=line)


def chunked(body: bytes, *fields: bytes) -> bytes:
    """A request whose body is in chunks, as it stands in `body`."""
    return request(b"Transfer-Encoding: chunked", *fields, body=body)


def post(body: bytes = b"", *fields: tuple[bytes, bytes], headers: Headers | None = None) -> Seen:
    """What is seen of `request`, with these fields besides Host, or with any if there are none."""
    return Seen("POST", b"/", b"", body, HOST + fields if fields else headers)


PLAIN = post(headers=HOST)
HELLO = post(b"hello")
BEFORE, SAW_BEFORE = get(b"GET /before HTTP/1.1"), Seen("GET", b"/before", headers=HOST)
AFTER, SAW_AFTER = get(b"GET /after HTTP/1.1"), Seen("GET", b"/after", headers=HOST)
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


# The request line.

METHODS = (
    "GET POST PUT DELETE PATCH OPTIONS HEAD TRACE QUERY COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK BIND "
    "REBIND UNBIND ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE PURGE MKCALENDAR LINK "
    "UNLINK SOURCE"
).split()
NO_METHODS = {
    "unknown": b"BREW",
    "lower-case": b"get",
    "capitalised": b"Get",
    "longer": b"GETX",
    "shorter": b"GE",
    "numbered": b"G3T",
    "none": b"",
    "one-letter": b"G",
    "underscore": b"G_T",
    "long": b"A" * 64,
    "in-brackets": b"(GET)",
    "quoted": b'"GET"',
    "colon": b"GET:",
    "slash": b"GET/",
    "nul": b"GET\0",
    "nul-before": b"\0GET",
    "control": b"GE\x01T",
    "high-bit": b"G\xc5T",
    "byte-order-mark": b"\xef\xbb\xbfGET",
    "rtsp-describe": b"DESCRIBE",
    "rtsp-setup": b"SETUP",
    "rtsp-play": b"PLAY",
    "http2-preface": b"PRI",
}
TUNNELS = {
    "authority": b"x:80",
    "ipv6": b"[::1]:443",
    "word": b"x",
    "path": b"/",
    "url": b"http://x/",
    "star": b"*",
}


def _methods() -> Iterator[Case]:
    for method in METHODS:
        yield served(f"method/{method}", get(method.encode() + b" / HTTP/1.1"), Seen(method, b"/", headers=HOST))
    for name, word in NO_METHODS.items():
        yield refused(f"no-method/{name}", get(word + b" / HTTP/1.1"), status=UNKNOWN_METHOD)
    for name, target in TUNNELS.items():
        yield refused(f"tunnel/{name}", get(b"CONNECT %b HTTP/1.1" % target) + SMUGGLED, status=NO_TUNNEL)


# Target -> (path, query).
TARGETS = {
    "root": (b"/", b"/", b""),
    "path": (b"/v2/models/m/infer", b"/v2/models/m/infer", b""),
    "query": (b"/a?b=c&d=%20", b"/a", b"b=c&d=%20"),
    "empty-query": (b"/a?", b"/a", b""),
    "query-in-query": (b"/a?b?c", b"/a", b"b?c"),
    "query-with-slashes": (b"/a?/b/../c", b"/a", b"/b/../c"),
    "query-with-scheme": (b"/a?u=http://y/b", b"/a", b"u=http://y/b"),
    "escaped": (b"/a%20b", b"/a%20b", b""),
    "escaped-slash": (b"/a%2Fb", b"/a%2Fb", b""),
    "escaped-nul": (b"/a%00b", b"/a%00b", b""),
    "escaped-no-utf-8": (b"/a%ff", b"/a%ff", b""),
    "escaped-crlf": (b"/a%0d%0aX:%20y", b"/a%0d%0aX:%20y", b""),
    "no-escape": (b"/a%zz", b"/a%zz", b""),
    "half-an-escape": (b"/a%2", b"/a%2", b""),
    "double-slash": (b"//a", b"//a", b""),
    "double-slash-with-port": (b"//y:80/a", b"//y:80/a", b""),
    "slashes-inside": (b"/a//b/", b"/a//b/", b""),
    "dots": (b"/a/../b/./c", b"/a/../b/./c", b""),
    "escaped-dots": (b"/%2e%2e/", b"/%2e%2e/", b""),
    "parameters": (b"/a;b=c,d", b"/a;b=c,d", b""),
    "sub-delimiters": (b"/!$&'()*+,;=:@-._~", b"/!$&'()*+,;=:@-._~", b""),
    "star-path": (b"/*", b"/*", b""),
    "url-in-path": (b"/http://y/", b"/http://y/", b""),
    "absolute": (b"http://x/a", b"/a", b""),
    "absolute-query": (b"http://x/a?b=c", b"/a", b"b=c"),
    "absolute-root": (b"http://x/", b"/", b""),
    "absolute-port": (b"http://x:8000/a", b"/a", b""),
    "absolute-upper-case": (b"HTTP://X/a", b"/a", b""),
    "absolute-https": (b"https://x/a", b"/a", b""),
    "absolute-ipv4": (b"http://127.0.0.1/a", b"/a", b""),
    "absolute-ipv6": (b"http://[::1]:8000/a", b"/a", b""),
    "absolute-other-host": (b"http://y/a", b"/a", b""),
    "long": (b"/" + b"a" * 3000, b"/" + b"a" * 3000, b""),
}
# An absolute form without a path is one to "/" (RFC 9112, 3.2.1), which a parser may not say by itself.
NO_PATH = {
    "absolute-no-path": b"http://x",
    "absolute-no-path-port": b"http://x:80",
    "absolute-no-path-query": b"http://x?b",
}
# Characters that no URI holds, printable all the same: they reach the application as they are, or are refused.
ODD_IN_TARGETS = b'"<>\\^`{|}[]'
NO_TARGETS = {
    "none": b"",
    "word": b"a",
    "relative": b"a/b",
    "dot": b"./a",
    "query-only": b"?a=b",
    "authority": b"x:80",
    "fragment": b"/a#b",
    "fragment-only": b"#b",
    "fragment-in-query": b"/a?b#c",
    "absolute-fragment": b"http://x/a#b",
    "star": b"*",
    "star-path": b"*/a",
    "star-star": b"**",
    "scheme-only": b"http:",
    "one-slash": b"http:/x/a",
    "no-slash": b"http:x",
    "no-host": b"http:///a",
    "no-host-port": b"http://:80/a",
    "bad-port": b"http://x:port/a",
    "user-information": b"http://user:secret@x/a",
    "no-scheme": b"://x/a",
    "backslash": b"\\a",
    "plus": b"+/a",
    "utf-8": "/é".encode(),
    "latin-1": b"/\xe9",
    "utf-8-query": "/a?é".encode(),
    "utf-8-overlong-slash": b"/\xc0\xaf",
}


def _targets() -> Iterator[Case]:
    for name, (target, path, query) in TARGETS.items():
        yield served(f"target/{name}", get(b"GET %b HTTP/1.1" % target), Seen("GET", path, query))
    for name, target in NO_PATH.items():
        yield served(f"target/{name}", get(b"GET %b HTTP/1.1" % target), Seen("GET", b"/", target.partition(b"?")[2]))
    yield served("target/star", get(b"OPTIONS * HTTP/1.1"), Seen("OPTIONS", b"*", headers=HOST))
    for byte in ODD_IN_TARGETS:
        target = b"/a%cb" % byte
        yield served(
            f"target/odd-{byte:02x}", get(b"GET %b HTTP/1.1" % target), Seen("GET", target), may_refuse=REFUSED
        )
    for name, target in NO_TARGETS.items():
        yield refused(f"no-target/{name}", get(b"GET %b HTTP/1.1" % target))
    for byte in (*CONTROLS, 0x80, 0x85, 0xA0, 0xFF):
        yield refused(f"no-target/byte-{byte:02x}", get(b"GET /a%cb HTTP/1.1" % byte))
    yield refused("no-target/star-query", get(b"OPTIONS *?a HTTP/1.1"))
    yield refused("no-target/options-word", get(b"OPTIONS a HTTP/1.1"))
    yield refused("no-target/too-long", get(b"GET /%b HTTP/1.1" % (b"a" * 5000)), status=TOO_LONG_TARGET)
    yield refused("no-target/query-too-long", get(b"GET /?%b HTTP/1.1" % (b"a" * 5000)), status=TOO_LONG_TARGET)


NO_VERSIONS = (
    "HTTP/2.0 HTTP/2 HTTP/3.0 HTTP/1.2 HTTP/1.9 HTTP/0.9 HTTP/0.0 HTTP/9.9 HTTP/1 HTTP/1. HTTP/.1 HTTP/ HTTP HTTP/11 "
    "HTTP/1.10 HTTP/1.01 HTTP/01.1 HTTP/1.1.1 HTTP/1,1 HTTP/1-1 HTTP/1.x HTTP/x.1 HTTP/-1.1 HTTP/+1.1 HTTP/1.1x "
    "http/1.1 Http/1.1 HTTp/1.1 HTTPS/1.1 HTP/1.1 XHTTP/1.1 ICE/1.0 RTSP/1.0 SIP/2.0 SHTTP/1.3 "
    "1.1 HTTP1.1 HTTP//1.1 HTTP\\1.1"
).split()
ODD_VERSIONS = {
    "space-before-slash": b"HTTP /1.1",
    "space-after-slash": b"HTTP/ 1.1",
    "space-before-dot": b"HTTP/1 .1",
    "space-after-dot": b"HTTP/1. 1",
    "nul": b"HTTP/1.1\0",
    "vertical-tab": b"HTTP/1.1\x0b",
    "full-width-digit": "HTTP/１.1".encode(),
    "twice": b"HTTP/1.1 HTTP/1.1",
    "word-behind": b"HTTP/1.1 x",
    "semicolon": b"HTTP/1.1;x",
}


def _versions() -> Iterator[Case]:
    for version in NO_VERSIONS:
        yield refused(f"version/{version}", get(b"GET / %b" % version.encode()), status=UNKNOWN_VERSION)
    for name, word in ODD_VERSIONS.items():
        yield refused(f"version/{name}", get(b"GET / %b" % word), status=UNKNOWN_VERSION)
    yield refused("version/none", b"GET /\r\nHost: x\r\n\r\n", status=UNKNOWN_VERSION)
    yield refused("version/none-space", b"GET / \r\nHost: x\r\n\r\n", status=UNKNOWN_VERSION)
    yield refused("version/http-0.9", b"GET /\r\n\r\n", status=UNKNOWN_VERSION)


LINES = {
    "two-spaces-after-method": b"GET  / HTTP/1.1",
    "two-spaces-after-target": b"GET /  HTTP/1.1",
    "space-before": b" GET / HTTP/1.1",
    "spaces-before": b"    GET / HTTP/1.1",
    "tab-before": b"\tGET / HTTP/1.1",
    "space-behind": b"GET / HTTP/1.1 ",
    "tab-behind": b"GET / HTTP/1.1\t",
    "tab-after-method": b"GET\t/ HTTP/1.1",
    "tab-after-target": b"GET /\tHTTP/1.1",
    "tabs": b"GET\t/\tHTTP/1.1",
    "space-and-tab": b"GET \t/ HTTP/1.1",
    "space-in-target": b"GET /a b HTTP/1.1",
    "space-and-version-in-target": b"GET /a HTTP/1.1 /b HTTP/1.1",
    "no-space-after-method": b"GET/ HTTP/1.1",
    "no-space-after-target": b"GET /HTTP/1.1",
    "no-spaces": b"GET/HTTP/1.1",
    "spaces-only": b"   ",
    "method-only": b"GET",
    "method-and-space": b"GET ",
    "field-first": b"Host: y",
    "colon-first": b": GET / HTTP/1.1",
}


def _lines() -> Iterator[Case]:
    for name, line in LINES.items():
        yield refused(f"line/{name}", get(line), status=UNKNOWN_VERSION | UNKNOWN_METHOD)
    for byte in NEARLY_BLANK:
        yield refused(f"line/byte-{byte:02x}-after-method", get(b"GET%c/ HTTP/1.1" % byte), status=UNKNOWN_METHOD)
        yield refused(f"line/byte-{byte:02x}-after-target", get(b"GET /%cHTTP/1.1" % byte), status=UNKNOWN_VERSION)


# What ends a line.

NO_LINE_ENDS = {
    "lf": b"\n",
    "cr": b"\r",
    "cr-cr-lf": b"\r\r\n",
    "lf-cr": b"\n\r",
    "cr-nul-lf": b"\r\0\n",
    "cr-space-lf": b"\r \n",
    "lf-lf": b"\n\n",
    "cr-cr": b"\r\r",
    "vertical-tab": b"\x0b",
    "form-feed": b"\x0c",
    "next-line": b"\xc2\x85",
    "line-separator": "\u2028".encode(),
}


def _line_ends() -> Iterator[Case]:
    lines = [b"GET / HTTP/1.1", b"Host: x", b"A: b", b""]
    places = ("the-line", "a-field", "the-last-field", "the-head")
    for name, end in NO_LINE_ENDS.items():
        for index, place in enumerate(places):
            if index and end[0] in b"\xc2\xe2":
                continue  # in a value they are bytes as any other
            ends = [end if at == index else b"\r\n" for at in range(4)]
            yield refused(
                f"line-end/{name}-after-{place}",
                b"".join(line + each for line, each in zip(lines, ends, strict=True)) + SMUGGLED,
                status=UNKNOWN_VERSION,
            )
        if end[0] not in b"\xc2\xe2":
            text = end.join(lines) + end
            yield refused(f"line-end/{name}-everywhere", text + SMUGGLED, status=UNKNOWN_VERSION)


EMPTY_LINES = {
    "lf": b"\n",
    "lf-lf": b"\n\n",
    "cr": b"\r",
    "cr-cr-lf": b"\r\r\n",
    "crlf-lf": b"\r\n\n",
    "crlf-space": b"\r\n ",
    "space-crlf": b" \r\n",
    "tab-crlf": b"\t\r\n",
    "nul": b"\0",
    "nul-crlf": b"\0\r\n",
    "hundred": b"\r\n" * 100,
    "five-thousand-bytes": b"\r\n" * 2500,
}


def _leading() -> Iterator[Case]:
    saw = Seen("GET", b"/after", headers=HOST)
    yield served("leading/crlf", b"\r\n" + AFTER, saw)
    yield served("leading/two", b"\r\n\r\n" + AFTER, saw, may_refuse=REFUSED)
    yield served("leading/between", BEFORE + b"\r\n" + AFTER, SAW_BEFORE, saw)
    yield served("leading/after-a-body", request(b"Content-Length: 5", body=b"hello\r\n") + AFTER, HELLO, saw)
    yield served("leading/after-chunks", chunked(b"5\r\nhello\r\n0\r\n\r\n\r\n") + AFTER, HELLO, saw)
    for name, text in EMPTY_LINES.items():
        yield refused(f"leading/{name}", text + AFTER, status=REFUSED | TOO_LONG | UNKNOWN_METHOD)
    yield waits("leading/nothing-else", b"\r\n")
    yield waits("leading/half", b"\r")


# Fields.


def _names() -> Iterator[Case]:
    for character in "!#$%&'*+-.^_`|~09":
        token = f"a{character}b".encode()
        yield served(f"name/token-{character}", request(token + b": v"), post(b"", (token, b"v")))
    yield served("name/upper-case", request(b"X-Request-ID: V"), post(b"", (b"x-request-id", b"V")))
    yield served("name/one-letter", request(b"A: v"), post(b"", (b"a", b"v")))
    yield served("name/long", request(b"A" * 1000 + b": v"), post(b"", (b"a" * 1000, b"v")))
    yield served("name/twice", request(b"A: v", b"a: w"), post(b"", (b"a", b"v"), (b"a", b"w")))
    for byte in (*CONTROLS, 0x20, *b'"(),/;<=>?@[\\]{}', 0x80, 0x85, 0xA0, 0xC3, 0xFF):
        yield refused(f"name/byte-{byte:02x}", request(b"a%cb: v" % byte))
    for byte in (*NEARLY_BLANK, 0x20, 0x09):
        yield refused(f"name/byte-{byte:02x}-behind", request(b"ab%c: v" % byte))
        yield refused(f"name/byte-{byte:02x}-before", request(b"%cab: v" % byte))
        yield refused(f"name/byte-{byte:02x}-before-the-first", b"GET / HTTP/1.1\r\n%cHost: x\r\n\r\n" % byte)
    for name, line in {
        "none": b": v",
        "colon-only": b":",
        "colons-only": b"::",
        "no-colon": b"name",
        "no-colon-value": b"name value",
        "equals": b"name=value",
        "request-line": b"GET /smuggled HTTP/1.1",
        "utf-8": "näme: v".encode(),
        "long-s": "hoſt: y".encode(),
        "kelvin-sign": "\u212aey: y".encode(),
        "encoded-word": b"=?utf-8?q?a?=: v",
        "quoted": b'"name": v',
    }.items():
        yield refused(f"name/{name}", request(line))
        yield refused(f"name/{name}-first", b"GET / HTTP/1.1\r\n%b\r\nHost: x\r\n\r\n" % line)


BLANKS = {
    "none": (b"a:v", b"v"),
    "one": (b"a: v", b"v"),
    "several": (b"a:   v", b"v"),
    "tab": (b"a:\tv", b"v"),
    "mixed": (b"a: \t v", b"v"),
    "behind": (b"a: v ", b"v"),
    "several-behind": (b"a: v   ", b"v"),
    "tab-behind": (b"a: v\t", b"v"),
    "around": (b"a:\t v \t", b"v"),
    "inside": (b"a: v  w", b"v  w"),
    "tab-inside": (b"a: v\tw", b"v\tw"),
    "empty": (b"a:", b""),
    "only": (b"a: ", b""),
    "several-only": (b"a:   ", b""),
    "tab-only": (b"a:\t", b""),
}
VALUES = {
    "colon": b"b: c",
    "colons": b"::",
    "comma": b"b, c",
    "quotes": b'"b',
    "backslash": b"\\",
    "brackets": b"<(b)>",
    "field-like": b"Content-Length: 5",
    "request-like": b"GET / HTTP/1.1",
    "utf-8": "é".encode(),
    "latin-1": b"\xe9",
    "high": bytes(range(0x80, 0x100)),
    "printable": bytes(range(0x21, 0x7F)),
    "long": b"v" * 3000,
    "format-string": b"%s%n{0}",
}


def _values() -> Iterator[Case]:
    for name, (line, value) in BLANKS.items():
        yield served(f"blank/{name}", request(line), post(b"", (b"a", value)))
    for name, value in VALUES.items():
        yield served(f"value/{name}", request(b"a: " + value), post(b"", (b"a", value)))
    for byte in CONTROLS:
        if byte != ord("\t"):
            yield refused(f"value/byte-{byte:02x}", request(b"a: b%cc" % byte))
    for byte in NEARLY_BLANK:
        line = b"a:%cb" % byte
        if byte < 0x80:
            yield refused(f"value/byte-{byte:02x}-before", request(line))
            yield refused(f"value/byte-{byte:02x}-behind", request(b"a: b%c" % byte))
            yield refused(f"value/byte-{byte:02x}-alone", request(b"a: %c" % byte))
        else:
            yield served(f"value/byte-{byte:02x}-before", request(line), post(b"", (b"a", line[2:])))
            yield served(f"value/byte-{byte:02x}-behind", request(b"a: b%c" % byte), post(b"", (b"a", b"b%c" % byte)))


FOLDS = {
    "space": (b"a: b", b" c"),
    "tab": (b"a: b", b"\tc"),
    "spaces": (b"a: b", b"    c"),
    "field": (b"a: b", b" c: d"),
    "colon": (b"a", b" : b"),
    "empty-value": (b"a:", b" b"),
    "blank": (b"a: b", b" "),
    "blank-tab": (b"a: b", b"\t"),
    "twice": (b"a: b", b" c", b" d"),
    "quoted": (b'a: "b', b' c"'),
    "content-length": (b"Content-Length:", b" 5"),
    "more-content-length": (b"Content-Length: 5", b" 5"),
    "comma-content-length": (b"Content-Length: 6", b" , 6"),
    "transfer-encoding": (b"Transfer-Encoding:", b" chunked"),
    "hidden-transfer-encoding": (b"a: b", b" Transfer-Encoding: chunked"),
    "hidden-content-length": (b"a: b", b"\tContent-Length: 5"),
    "connection": (b"Connection: keep-alive,", b" close"),
}


def _folds() -> Iterator[Case]:
    for name, lines in FOLDS.items():
        yield refused(f"fold/{name}", request(*lines, body=b"hello") + SMUGGLED)
    yield refused("fold/host", b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n")
    yield refused("fold/first", b"GET / HTTP/1.1\r\n a: b\r\nHost: x\r\n\r\n")
    yield refused("fold/first-tab", b"GET / HTTP/1.1\r\n\ta: b\r\nHost: x\r\n\r\n")
    yield refused("fold/first-blank", b"GET / HTTP/1.1\r\n \r\nHost: x\r\n\r\n")
    yield refused("fold/only", b"GET / HTTP/1.1\r\n \r\n\r\n")
    yield refused("fold/bare-lf", request(b"a: b\n c"))


HOSTS = {
    "name": b"example.com",
    "port": b"example.com:8000",
    "empty-port": b"example.com:",
    "upper-case": b"EXAMPLE.com",
    "ipv4": b"127.0.0.1:8000",
    "ipv6": b"[::1]",
    "ipv6-port": b"[2001:db8::1]:8000",
    "underscore": b"my_service",
    "dot-behind": b"example.com.",
    "escaped": b"ex%61mple",
    "punycode": b"xn--bcher-kva.example",
    "empty": b"",
    "long": b"a" * 1000,
}
NO_HOSTS = {
    "list": b"x, y",
    "space": b"x y",
    "tab": b"x\ty",
    "slash": b"x/y",
    "path": b"/",
    "url": b"http://x",
    "user-information": b"user@x",
    "bad-port": b"x:port",
    "signed-port": b"x:+80",
    "negative-port": b"x:-80",
    "two-ports": b"x:80:80",
    "open-bracket": b"[::1",
    "close-bracket": b"::1]",
    "no-brackets": b"::1",
    "behind-brackets": b"[::1]x",
    "query": b"x?y",
    "fragment": b"x#y",
    "backslash": b"x\\y",
    "quoted": b'"x"',
    "angle": b"<x>",
    "pipe": b"x|y",
    "caret": b"x^y",
    "utf-8": "é".encode(),
    "latin-1": b"\xe9",
    "nul": b"x\0y",
    "nul-behind": b"x\0",
    "control": b"x\x01",
    "colon-only": b":",
}


def _hosts() -> Iterator[Case]:
    def line(value: bytes, version: bytes = b"1.1") -> bytes:
        return b"GET / HTTP/%b\r\nHost: %b\r\n\r\n" % (version, value)

    for name, value in HOSTS.items():
        yield served(f"host/{name}", line(value), Seen("GET", b"/", headers=((b"host", value),)))
    for name, value in NO_HOSTS.items():
        yield refused(f"no-host/{name}", line(value))
    saw = Seen("GET", b"/", headers=())
    yield refused("no-host/missing", b"GET / HTTP/1.1\r\n\r\n")
    yield refused("no-host/missing-with-others", b"GET / HTTP/1.1\r\nA: b\r\n\r\n")
    yield refused("no-host/missing-absolute", b"GET http://x/ HTTP/1.1\r\n\r\n")
    yield refused("no-host/forwarded-only", b"GET / HTTP/1.1\r\nX-Forwarded-Host: x\r\n\r\n")
    yield refused("no-host/two", request(b"Host: y"))
    yield refused("no-host/two-equal", request(b"Host: x"))
    yield refused("no-host/two-cases", request(b"hOST: x"))
    yield refused("no-host/two-apart", request(b"A: b", b"C: d", b"Host: y"))
    yield refused("no-host/two-empty", b"GET / HTTP/1.1\r\nHost:\r\nHost: x\r\n\r\n")
    yield refused("no-host/two-absolute", request(b"Host: y", line=b"GET http://x/ HTTP/1.1"))
    yield refused("no-host/two-in-1.0", request(b"Host: y", line=b"GET / HTTP/1.0"))
    yield refused("no-host/list-in-1.0", line(b"x, y", b"1.0"))
    yield served_last("host/missing-in-1.0", b"GET / HTTP/1.0\r\n\r\n", saw)


# Where the body ends: Content-Length.

LENGTHS = {
    "five": b"5",
    "leading-zero": b"05",
    "leading-zeros": b"0000000005",
    "nineteen-digits": b"%019d" % 5,
}
NO_LENGTHS = {
    "plus": b"+5",
    "minus": b"-5",
    "minus-zero": b"-0",
    "hexadecimal": b"0x5",
    "octal": b"0o5",
    "underscore": b"0_5",
    "underscore-inside": b"5_0",
    "space-inside": b"5 5",
    "tab-inside": b"5\t5",
    "list": b"5,5",
    "list-space": b"5, 5",
    "list-other": b"5, 6",
    "list-empty-first": b",5",
    "list-empty-last": b"5,",
    "semicolon": b"5;q=1",
    "fraction": b"5.0",
    "exponent": b"5e0",
    "exponent-zero": b"0e5",
    "empty": b"",
    "blank": b" ",
    "comma": b",",
    "word": b"five",
    "letter-behind": b"5a",
    "letter-before": b"a5",
    "hexadecimal-digit": b"a",
    "infinity": b"inf",
    "not-a-number": b"nan",
    "none": b"None",
    "true": b"true",
    "quoted": b'"5"',
    "single-quoted": b"'5'",
    "brackets": b"(5)",
    "full-width": "５".encode(),
    "arabic": "٥".encode(),
    "superscript": "⁵".encode(),
    "latin-1-superscript": b"\xb3",
    "nul-behind": b"5\0",
    "nul-before": b"\x005",
    "nul-inside": b"5\x005",
    "vertical-tab-before": b"\x0b5",
    "vertical-tab-behind": b"5\x0b",
    "form-feed-behind": b"5\x0c",
    "separator-behind": b"5\x1c",
    "nbsp-behind": b"5\xa0",
    "nbsp-before": b"\xa05",
    "next-line-behind": b"5\x85",
    "twenty-digits": b"%020d" % 5,
    "two-to-the-64": b"18446744073709551616",
    "two-to-the-64-and-five": b"18446744073709551621",
    "all-nines": b"99999999999999999999",
    "hundred-digits": b"5" + b"0" * 99,
    "hundred-zeros": b"0" * 100,
    "thousand-digits": b"9" * 1000,
    "bytes": b"bytes=5",
    "cr": b"5\r",
    "lf-space": b"5\n ",
}
LENGTH_LINES = {
    "two-equal": (b"Content-Length: 5", b"Content-Length: 5"),
    "two-equal-zero": (b"Content-Length: 0", b"Content-Length: 0"),
    "two-longer-first": (b"Content-Length: 6", b"Content-Length: 5"),
    "two-longer-last": (b"Content-Length: 5", b"Content-Length: 6"),
    "two-zero-first": (b"Content-Length: 0", b"Content-Length: 5"),
    "two-zero-last": (b"Content-Length: 5", b"Content-Length: 0"),
    "two-cases": (b"Content-Length: 5", b"CONTENT-LENGTH: 5"),
    "two-apart": (b"Content-Length: 5", b"A: b", b"Content-Length: 5"),
    "two-written-otherwise": (b"Content-Length: 5", b"Content-Length: 05"),
    "two-empty-last": (b"Content-Length: 5", b"Content-Length:"),
    "two-empty-first": (b"Content-Length:", b"Content-Length: 5"),
    "three": (b"Content-Length: 5",) * 3,
    "two-hidden-behind-blank": (b"Content-Length: 5", b"Content-Length : 0"),
    "two-hidden-behind-tab": (b"Content-Length: 5", b"Content-Length\t: 0"),
    "two-hidden-behind-vertical-tab": (b"Content-Length: 5", b"Content-Length\x0b: 0"),
    "two-hidden-behind-nul": (b"Content-Length: 5", b"Content-Length\0: 0"),
    "blank-before": (b"A: b", b" Content-Length: 5"),
    "tab-before": (b"A: b", b"\tContent-Length: 5"),
    "blank-before-colon": (b"Content-Length : 5",),
    "tab-before-colon": (b"Content-Length\t: 5",),
    "nul-before-colon": (b"Content-Length\0: 5",),
    "nbsp-before-colon": (b"Content-Length\xa0: 5",),
    "control-before-name": (b"\x01Content-Length: 5",),
    "nul-before-name": (b"\0Content-Length: 5",),
    "blank-in-name": (b"Content Length: 5",),
    "lf-before": (b"A: b\nContent-Length: 5",),
    "cr-before": (b"A: b\rContent-Length: 5",),
    "lf-in-name": (b"Content-\nLength: 5",),
    "crlf-before-colon": (b"Content-Length\r\n: 5",),
    "equals": (b"Content-Length=5",),
    "no-colon": (b"Content-Length 5",),
    "two-colons": (b"Content-Length:: 5",),
}
# Names that are not the one they resemble: the body has no length, so these requests have none.
OTHER_NAMES = (
    "Content_Length",
    "Content-Lengt",
    "Content-Lengthx",
    "X-Content-Length",
    "ContentLength",
    "Length",
    "Content.Length",
)


def _lengths() -> Iterator[Case]:
    for name, value in LENGTHS.items():
        line = b"Content-Length: " + value
        yield served(f"length/{name}", request(line, body=b"hello"), post(b"hello", (b"content-length", value)))
    for name, value in NO_LENGTHS.items():
        yield refused(f"no-length/{name}", request(b"Content-Length: " + value, body=b"hello") + SMUGGLED)
    for name, lines in LENGTH_LINES.items():
        yield refused(f"no-length/{name}", request(*lines, body=b"hello") + SMUGGLED)
    hello = post(b"hello", (b"content-length", b"5"))
    for name, line in {
        "no-blank": b"Content-Length:5",
        "blanks": b"Content-Length:   5",
        "tab": b"Content-Length:\t5",
        "blank-behind": b"Content-Length: 5 ",
        "tab-behind": b"Content-Length: 5\t",
        "blanks-around": b"Content-Length: \t5\t ",
        "upper-case": b"CONTENT-LENGTH: 5",
        "lower-case": b"content-length: 5",
        "mixed-case": b"cOnTeNt-LeNgTh: 5",
    }.items():
        yield served(f"length/{name}", request(line, body=b"hello"), hello)
    yield served("length/zero", request(b"Content-Length: 0"), post(b"", (b"content-length", b"0")))
    yield served("length/zeros", request(b"Content-Length: 000"), post(b"", (b"content-length", b"000")))
    yield served("length/none", request(), PLAIN)
    for method in ("GET", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH", "TRACE", "QUERY"):
        sent = request(b"Content-Length: 5", line=method.encode() + b" / HTTP/1.1", body=b"hello")
        yield served(f"length/{method}", sent, Seen(method, b"/", b"", b"hello"))
    body = bytes(range(256)) * 16
    sent = request(b"Content-Length: %d" % len(body), body=body)
    yield served("length/every-byte", sent, post(body))
    yield served(
        "length/looks-like-a-request", request(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED), post(SMUGGLED)
    )
    yield served("length/looks-like-chunks", request(b"Content-Length: 5", body=b"0\r\n\r\n"), post(b"0\r\n\r\n"))
    yield served("length/line-ends", request(b"Content-Length: 4", body=b"\r\n\r\n"), post(b"\r\n\r\n"))
    for name in OTHER_NAMES:
        saw = post(b"", (name.lower().encode(), b"37"))
        yield served(f"length/{name}", request(name.encode() + b": 37") + AFTER, saw, SAW_AFTER)
    yield refused(
        "length/body-too-long", request(b"Content-Length: 5", body=b"hello!\r\n\r\n"), HELLO, status=UNKNOWN_METHOD
    )
    yield refused("length/body-not-announced", request(body=b"hello\r\n\r\n"), PLAIN, status=UNKNOWN_METHOD)
    yield refused(
        "length/body-on-get", get(b"GET / HTTP/1.1") + b"a=b\r\n\r\n", Seen("GET", b"/"), status=UNKNOWN_METHOD
    )


# Where the body ends: Transfer-Encoding.

CODINGS = {
    "lower-case": b"chunked",
    "capitalised": b"Chunked",
    "upper-case": b"CHUNKED",
    "mixed-case": b"cHuNkEd",
}
# Lines that one server takes for `Transfer-Encoding: chunked` and another does not, and other codings than that one.
NO_CODINGS = {
    "identity": b"Transfer-Encoding: identity",
    "gzip": b"Transfer-Encoding: gzip",
    "deflate": b"Transfer-Encoding: deflate",
    "unknown": b"Transfer-Encoding: cow",
    "x-before": b"Transfer-Encoding: xchunked",
    "x-behind": b"Transfer-Encoding: chunkedx",
    "cut": b"Transfer-Encoding: chunke",
    "dash-behind": b"Transfer-Encoding: chunked-",
    "digit-behind": b"Transfer-Encoding: chunked1",
    "gzip-first": b"Transfer-Encoding: gzip, chunked",
    "gzip-last": b"Transfer-Encoding: chunked, gzip",
    "identity-first": b"Transfer-Encoding: identity, chunked",
    "identity-last": b"Transfer-Encoding: chunked, identity",
    "twice": b"Transfer-Encoding: chunked, chunked",
    "twice-no-blank": b"Transfer-Encoding: chunked,chunked",
    "twice-blank": b"Transfer-Encoding: chunked chunked",
    "twice-tab": b"Transfer-Encoding: chunked\tchunked",
    "comma-behind": b"Transfer-Encoding: chunked,",
    "comma-before": b"Transfer-Encoding: ,chunked",
    "comma-blank-before": b"Transfer-Encoding: , chunked",
    "comma": b"Transfer-Encoding: ,",
    "empty": b"Transfer-Encoding:",
    "blank": b"Transfer-Encoding:   ",
    "word-behind": b"Transfer-Encoding: chunked x",
    "word-before": b"Transfer-Encoding: x chunked",
    "semicolon": b"Transfer-Encoding: chunked;",
    "parameter": b"Transfer-Encoding: chunked;x",
    "parameter-value": b"Transfer-Encoding: chunked; x=y",
    "quality": b"Transfer-Encoding: chunked;q=1",
    "quality-zero": b"Transfer-Encoding: chunked;q=0",
    "quoted": b'Transfer-Encoding: "chunked"',
    "single-quoted": b"Transfer-Encoding: 'chunked'",
    "brackets": b"Transfer-Encoding: (chunked)",
    "colon": b"Transfer-Encoding: :chunked",
    "two-colons": b"Transfer-Encoding:: chunked",
    "equals-value": b"Transfer-Encoding: =chunked",
    "kelvin-sign": "Transfer-Encoding: chun\u212aed".encode(),
    "encoded-word": b"Transfer-Encoding: =?utf-8?q?chunked?=",
    "backslash": b"Transfer-Encoding: chunked\\",
    "backspace": b"Transfer-Encoding: chunkedd\x08",
    "vertical-tab-before": b"Transfer-Encoding:\x0bchunked",
    "blank-vertical-tab-before": b"Transfer-Encoding: \x0bchunked",
    "form-feed-before": b"Transfer-Encoding:\x0cchunked",
    "separator-before": b"Transfer-Encoding:\x1cchunked",
    "nul-before": b"Transfer-Encoding:\0chunked",
    "control-before": b"Transfer-Encoding: \x01chunked",
    "nbsp-before": b"Transfer-Encoding:\xa0chunked",
    "next-line-before": b"Transfer-Encoding:\x85chunked",
    "high-bit-before": b"Transfer-Encoding: \xffchunked",
    "vertical-tab-behind": b"Transfer-Encoding: chunked\x0b",
    "form-feed-behind": b"Transfer-Encoding: chunked\x0c",
    "separator-behind": b"Transfer-Encoding: chunked\x1f",
    "nul-behind": b"Transfer-Encoding: chunked\0",
    "nbsp-behind": b"Transfer-Encoding: chunked\xa0",
    "delete-behind": b"Transfer-Encoding: chunked\x7f",
    "cr-before": b"Transfer-Encoding:\rchunked",
    "cr-behind": b"Transfer-Encoding: chunked\r",
    "cr-inside": b"Transfer-Encoding: chun\rked",
    "lf-before": b"Transfer-Encoding:\nchunked",
    "lf-blank-before": b"Transfer-Encoding:\n chunked",
    "lf-behind": b"Transfer-Encoding: chunked\n",
    "lf-inside": b"Transfer-Encoding: chun\nked",
    "blank-before-colon": b"Transfer-Encoding : chunked",
    "tab-before-colon": b"Transfer-Encoding\t: chunked",
    "vertical-tab-before-colon": b"Transfer-Encoding\x0b: chunked",
    "form-feed-before-colon": b"Transfer-Encoding\x0c: chunked",
    "nul-before-colon": b"Transfer-Encoding\0: chunked",
    "nbsp-before-colon": b"Transfer-Encoding\xa0: chunked",
    "cr-before-colon": b"Transfer-Encoding\r: chunked",
    "lf-before-colon": b"Transfer-Encoding\n: chunked",
    "crlf-before-colon": b"Transfer-Encoding\r\n: chunked",
    "fold-before-colon": b"Transfer-Encoding\r\n : chunked",
    "fold-before-value": b"Transfer-Encoding:\r\n chunked",
    "fold-before-value-tab": b"Transfer-Encoding:\r\n\tchunked",
    "fold-behind-value": b"Transfer-Encoding: chunked\r\n , identity",
    "fold-blank-behind": b"Transfer-Encoding: chunked\r\n ",
    "folded-into-another": b"Foo: bar\r\n Transfer-Encoding: chunked",
    "folded-into-another-tab": b"Foo: bar\r\n\tTransfer-Encoding: chunked",
    "blank-before-name": b" Transfer-Encoding: chunked",
    "tab-before-name": b"\tTransfer-Encoding: chunked",
    "control-before-name": b"\x01Transfer-Encoding: chunked",
    "nul-before-name": b"\0Transfer-Encoding: chunked",
    "high-bit-before-name": b"\xffTransfer-Encoding: chunked",
    "bracket-before-name": b"(Transfer-Encoding: chunked",
    "cr-before-name": b"\rTransfer-Encoding: chunked",
    "lf-before-name": b"\nTransfer-Encoding: chunked",
    "after-lf": b"X: X\nTransfer-Encoding: chunked",
    "after-cr": b"X: X\rTransfer-Encoding: chunked",
    "after-lf-cr": b"X: X\n\rTransfer-Encoding: chunked",
    "after-cr-cr-lf": b"X: X\r\r\nTransfer-Encoding: chunked",
    "after-nul": b"X: X\0Transfer-Encoding: chunked",
    "blank-in-name": b"Transfer Encoding: chunked",
    "nul-in-name": b"Transfer\0-Encoding: chunked",
    "lf-in-name": b"Transfer-\nEncoding: chunked",
    "crlf-in-name": b"Transfer-\r\nEncoding: chunked",
    "cr-in-name": b"Transfer-\rEncoding: chunked",
    "quoted-name": b'"Transfer-Encoding": chunked',
    "slash-in-name": b"Transfer/Encoding: chunked",
    "semicolon-behind-name": b"Transfer-Encoding;: chunked",
    "long-s-in-name": "Tranſfer-Encoding: chunked".encode(),
    "dash-in-name": "Transfer‐Encoding: chunked".encode(),
    "no-colon": b"Transfer-Encoding chunked",
    "equals": b"Transfer-Encoding=chunked",
    "two": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "two-cow-first": b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked",
    "two-cow-last": b"Transfer-Encoding: chunked\r\nTransfer-encoding: cow",
    "two-identity-first": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    "two-identity-last": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "two-gzip-first": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
    "two-empty-first": b"Transfer-Encoding:\r\nTransfer-Encoding: chunked",
    "two-empty-last": b"Transfer-Encoding: chunked\r\nTransfer-Encoding:",
    "two-apart": b"Transfer-Encoding: chunked\r\nFoo: bar\r\nTransfer-Encoding: chunked",
    "two-one-hidden": b"Transfer-Encoding: chunked\r\nTransfer-Encoding : identity",
}
# Names that mean nothing to HTTP: the length, where there is one, is what counts.
OTHER_CODING_NAMES = (
    "Transfer_Encoding", "TransferEncoding", "Transfer-Encodin", "Transfer-Encodings", "X-Transfer-Encoding",
    "Transfer", "Encoding", "Transfer.Encoding", "Transfer-Encoding-", "-Transfer-Encoding", "TE",
    "Content-Transfer-Encoding",
)  # fmt: skip


def _codings() -> Iterator[Case]:
    def chunks(line: bytes) -> bytes:
        return request(line, body=b"5\r\nhello\r\n0\r\n\r\n")

    def saw(value: bytes) -> Seen:
        return post(b"hello", (b"transfer-encoding", value))

    for name, value in CODINGS.items():
        yield served(f"coding/{name}", chunks(b"Transfer-Encoding: " + value), saw(value))
    for name, line in {
        "no-blank": b"Transfer-Encoding:chunked",
        "blanks": b"Transfer-Encoding:   chunked",
        "tab": b"Transfer-Encoding:\tchunked",
        "blank-behind": b"Transfer-Encoding: chunked ",
        "upper-case-name": b"TRANSFER-ENCODING: chunked",
        "lower-case-name": b"transfer-encoding: chunked",
    }.items():
        yield served(f"coding/{name}", chunks(line), saw(b"chunked"))
    tab = chunks(b"Transfer-Encoding: chunked\t")
    yield served("coding/tab-behind", tab, saw(b"chunked"), may_refuse=UNKNOWN_CODING)
    for method in ("GET", "OPTIONS", "HEAD", "DELETE"):
        sent = request(
            b"Transfer-Encoding: chunked", line=b"%b / HTTP/1.1" % method.encode(), body=b"5\r\nhello\r\n0\r\n\r\n"
        )
        yield served(f"coding/{method}", sent, Seen(method, b"/", b"", b"hello"))
    for name, line in NO_CODINGS.items():
        yield refused(f"no-coding/{name}", request(line, body=b"0\r\n\r\n") + SMUGGLED, status=UNKNOWN_CODING)
        # With a length besides, for the server that does not take it for a Transfer-Encoding.
        body = b"0\r\n\r\n" + SMUGGLED
        length = b"Content-Length: %d" % len(body)
        yield refused(f"cl-te/{name}", request(length, line, body=body), status=UNKNOWN_CODING)
    for name in OTHER_CODING_NAMES:
        sent = request(b"Content-Length: 5", name.encode() + b": chunked", body=b"0\r\n\r\n")
        fields = (b"content-length", b"5"), (name.lower().encode(), b"chunked")
        yield served(f"coding/{name}", sent, post(b"0\r\n\r\n", *fields))
    for version in ("chunked", "identity", "gzip, chunked"):
        sent = request(b"Transfer-Encoding: " + version.encode(), line=b"POST / HTTP/1.0", body=b"0\r\n\r\n" + SMUGGLED)
        yield refused(f"no-coding/1.0-{version}", sent, status=UNKNOWN_CODING)
    sent = request(b"Transfer-Encoding: chunked", b"Connection: keep-alive", line=b"POST / HTTP/1.0", body=b"0\r\n\r\n")
    yield refused("no-coding/1.0-keep-alive", sent + SMUGGLED, status=UNKNOWN_CODING)


# Both, and what is smuggled with them.


def _smuggling() -> Iterator[Case]:
    coding = b"Transfer-Encoding: chunked"
    inner = b"0\r\n\r\n" + SMUGGLED
    one = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    for name, (size, body) in {
        "cl-te": (len(inner), inner),
        "te-cl": (4, one),
        "equal": (5, b"0\r\n\r\n"),
        "zero": (0, inner),
        "zero-alone": (0, b"0\r\n\r\n"),
        "too-long": (99, b"0\r\n\r\n"),
        "te-cl-prefix": (3, b"8\r\nSMUGGLED\r\n0\r\n\r\n"),
        "cl-te-prefix": (6, b"0\r\n\r\nG"),
        "cl-te-timeout": (4, b"1\r\nA\r\nX\r\n\r\n"),
        "te-cl-timeout": (6, b"0\r\n\r\nX\r\n\r\n"),
    }.items():
        length = b"Content-Length: %d" % size
        yield refused(f"smuggling/{name}", request(length, coding, body=body) + SMUGGLED)
        yield refused(f"smuggling/{name}-reversed", request(coding, length, body=body) + SMUGGLED)
    yield refused("smuggling/apart", request(b"Content-Length: 5", b"A: b", b"C: d", coding, body=inner))
    yield refused("smuggling/two-cl-te", request(b"Content-Length: 5", b"Content-Length: 5", coding, body=inner))
    yield refused("smuggling/bad-cl-te", request(b"Content-Length: x", coding, body=inner))
    yield refused("smuggling/empty-cl-te", request(b"Content-Length:", coding, body=inner))
    yield refused("smuggling/te-bad-cl", request(coding, b"Content-Length: x", body=inner))
    yield refused("smuggling/on-get", request(b"Content-Length: 5", coding, line=b"GET / HTTP/1.1", body=inner))
    yield refused("smuggling/in-1.0", request(b"Content-Length: 5", coding, line=b"POST / HTTP/1.0", body=inner))
    # Forms without both of them. The body is a body, however much it looks like a request.
    prefix = b"GET /smuggled HTTP/1.1\r\nFoo: x"
    length = b"Content-Length: %d" % len(prefix)
    yield served("smuggling/cl-0", request(length, body=prefix) + AFTER, post(prefix), SAW_AFTER)
    yield served(
        "smuggling/cl-0-on-get", request(length, line=b"GET / HTTP/1.1", body=prefix) + AFTER,
        Seen("GET", b"/", b"", prefix), SAW_AFTER,
    )  # fmt: skip
    yield served(
        "smuggling/te-0", request(coding, line=b"OPTIONS / HTTP/1.1", body=one) + AFTER,
        Seen("OPTIONS", b"/", b"", SMUGGLED), SAW_AFTER,
    )  # fmt: skip
    yield served(
        "smuggling/connection-names-length",
        request(b"Connection: Content-Length", length, body=prefix) + AFTER,
        post(prefix),
        SAW_AFTER,
    )
    yield served(
        "smuggling/connection-names-coding",
        request(b"Connection: Transfer-Encoding", coding, body=one) + AFTER, post(SMUGGLED), SAW_AFTER,
    )  # fmt: skip
    for name, field in {
        "expect": b"Expect: 100-continue",
        "expect-upper-case": b"EXPECT: 100-CONTINUE",
        "expect-twice": b"Expect: 100-continue\r\nExpect: 100-continue",
    }.items():
        yield served(f"smuggling/{name}", request(field, length, body=prefix) + AFTER, post(prefix), SAW_AFTER)
    for name, field in {"expect-unknown": b"Expect: y 100-continue", "expect-other": b"Expect: 200-ok"}.items():
        sent = request(field, length, body=prefix)
        yield served(f"smuggling/{name}", sent, post(prefix), may_refuse=frozenset({400, 417}))
    # What follows a refusal is not read, even if it would be in order.
    yield refused("smuggling/behind-a-refusal", get(b"GET / HTTP/9.9") + SMUGGLED, status=UNKNOWN_VERSION)
    yield refused("smuggling/behind-a-bad-chunk", chunked(b"x\r\n\r\n") + SMUGGLED)
    yield refused("smuggling/behind-a-served-one", BEFORE + request(b"Content-Length: +5") + SMUGGLED, SAW_BEFORE)
    yield refused(
        "smuggling/response-queue",
        BEFORE + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
        SAW_BEFORE,
        status=UNKNOWN_VERSION | UNKNOWN_METHOD,
    )


# Chunks.

CHUNKS = {
    "none": (b"0\r\n\r\n", b""),
    "one": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "several": (b"1\r\nh\r\n3\r\nell\r\n1\r\no\r\n0\r\n\r\n", b"hello"),
    "lower-case": (b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    "upper-case": (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    "two-digits": (b"1F\r\n" + b"x" * 31 + b"\r\n0\r\n\r\n", b"x" * 31),
    "leading-zeros": (b"0005\r\nhello\r\n0\r\n\r\n", b"hello"),
    "sixteen-digits": (b"0000000000000005\r\nhello\r\n0\r\n\r\n", b"hello"),
    "zeros": (b"5\r\nhello\r\n0000\r\n\r\n", b"hello"),
    "line-ends": (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    "looks-like-the-end": (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    "every-byte": (b"100\r\n" + bytes(range(256)) + b"\r\n0\r\n\r\n", bytes(range(256))),
    "long": (b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n", b"x" * 2000),
    "extension": (b"5;a\r\nhello\r\n0\r\n\r\n", b"hello"),
    "extension-value": (b"5;a=b\r\nhello\r\n0\r\n\r\n", b"hello"),
    "extension-quoted": (b'5;a="b c"\r\nhello\r\n0\r\n\r\n', b"hello"),
    "extension-quoted-pair": (b'5;a="\\"b"\r\nhello\r\n0\r\n\r\n', b"hello"),
    "extension-quoted-semicolon": (b'5;a=";"\r\nhello\r\n0\r\n\r\n', b"hello"),
    "extensions": (b"5;a;b=c;d\r\nhello\r\n0\r\n\r\n", b"hello"),
    "extension-of-the-last": (b"5\r\nhello\r\n0;a=b\r\n\r\n", b"hello"),
}
# The grammar has blanks around what an extension consists of, for bad senders' sake; nobody sends them.
BLANK_EXTENSIONS = {"before-name": b"; a=b", "before-value": b";a= b", "before-equals": b";a =b"}
SIZES = {
    "empty": b"",
    "blank-before": b" 5",
    "blank-behind": b"5 ",
    "tab-before": b"\t5",
    "tab-behind": b"5\t",
    "blank-before-extension": b"5 ;a",
    "tab-before-extension": b"5\t;a",
    "plus": b"+5",
    "minus": b"-5",
    "hexadecimal-prefix": b"0x5",
    "hexadecimal-prefix-upper": b"0X5",
    "octal-prefix": b"0o5",
    "underscore": b"0_5",
    "underscore-inside": b"5_0",
    "letter": b"g",
    "letter-behind": b"5g",
    "h-behind": b"5h",
    "fraction": b"5.0",
    "comma": b"5,5",
    "colon": b"5:",
    "exponent": b"5p0",
    "quoted": b'"5"',
    "two": b"5 5",
    "word": b"five",
    "full-width": "５".encode(),
    "arabic": "٥".encode(),
    "nul-before": b"\x005",
    "nul-behind": b"5\0",
    "vertical-tab-before": b"\x0b5",
    "vertical-tab-behind": b"5\x0b",
    "form-feed-behind": b"5\x0c",
    "separator-behind": b"5\x1c",
    "nbsp-behind": b"5\xa0",
    "next-line-behind": b"5\x85",
    "seventeen-digits": b"00000000000000005",
    "hundred-digits": b"0" * 99 + b"5",
    "wraps-64-bits": b"10000000000000005",
    "wraps-64-bits-far": b"ffffffffffffffff5",
    "twenty-fs": b"f" * 20,
    "thousand-fs": b"f" * 1000,
    "semicolon-only": b";",
    "extension-only": b";a",
    "field": b"5: a",
    "request-line": b"GET / HTTP/1.1",
}
EXTENSIONS = {
    "empty": b";",
    "empty-value": b";a=",
    "empty-name": b";=b",
    "two-semicolons": b";;",
    "nul": b";a\0",
    "nul-in-value": b";a=b\0",
    "control": b";a\x01",
    "vertical-tab": b";a\x0b",
    "delete": b";a\x7f",
    "high-bit": b";a=\xff",
    "bare-cr": b";a\rb",
    "bare-lf": b";a\nb",
    "bare-cr-in-value": b";a=b\rc",
    "bare-lf-in-value": b";a=b\nc",
    "bare-lf-first": b";\n",
    "bare-cr-first": b";\r",
    "quoted-lf": b';a="b\nc"',
    "quoted-cr": b';a="b\rc"',
    "quoted-crlf": b';a="b\r\nc"',
    "quoted-nul": b';a="\0"',
    "quote-open": b';a="b',
    "behind-quotes": b';a="b"c',
    "blank-inside": b";a b",
    "brackets": b";(a)",
    "at-sign": b";a@b",
}
CHUNK_ENDS = {
    "size-lf": b"5\nhello\r\n0\r\n\r\n",
    "size-cr": b"5\rhello\r\n0\r\n\r\n",
    "size-cr-cr-lf": b"5\r\r\nhello\r\n0\r\n\r\n",
    "size-lf-cr": b"5\n\rhello\r\n0\r\n\r\n",
    "size-cr-x": b"5\rXhello\r\n0\r\n\r\n",
    "size-nothing": b"5hello\r\n0\r\n\r\n",
    "data-lf": b"5\r\nhello\n0\r\n\r\n",
    "data-cr": b"5\r\nhello\r0\r\n\r\n",
    "data-nothing": b"5\r\nhello0\r\n\r\n",
    "data-one-more": b"5\r\nhello!\r\n0\r\n\r\n",
    "data-two-more": b"5\r\nhelloXX\r\n0\r\n\r\n",
    "data-one-less": b"6\r\nhello\r\n0\r\n\r\n",
    "data-cr-cr-lf": b"5\r\nhello\r\r\n0\r\n\r\n",
    "data-lf-cr": b"5\r\nhello\n\r0\r\n\r\n",
    "data-crlf-crlf": b"5\r\nhello\r\n\r\n0\r\n\r\n",
    "data-blank": b"5\r\nhello \r\n0\r\n\r\n",
    "data-cr-x": b"5\r\nhello\rX0\r\n\r\n",
    "last-lf": b"5\r\nhello\r\n0\n\r\n",
    "last-lf-lf": b"5\r\nhello\r\n0\n\n",
    "last-cr": b"5\r\nhello\r\n0\r\r\n",
    "end-lf": b"5\r\nhello\r\n0\r\n\n",
    "end-cr-x": b"5\r\nhello\r\n0\r\n\rX",
    "end-missing": b"5\r\nhello\r\n0\r\n",
    "everywhere-lf": b"5\nhello\n0\n\n",
}
# Published as "funky chunks": where one server ends a line, or a chunk, and the next does not.
FUNKY = {
    "term-ext": b"2;\nxx\r\n%x\r\n%b\r\n0\r\n\r\n",
    "ext-term": b"2;\r\nxx\r\n2;\nyy\r\n%x\r\n%b\r\n0\r\n\r\n",
    "term-ext-value": b"2;a=\nxx\r\n%x\r\n%b\r\n0\r\n\r\n",
    "term-ext-cr": b"2;\rxx\r\n%x\r\n%b\r\n0\r\n\r\n",
    "term-spill": b"5\r\nAAAAA\n%x\r\n%b\r\n0\r\n\r\n",
    "spill-term": b"5\r\nAAAAAXX%x\r\n%b\r\n0\r\n\r\n",
    "spill-two": b"5\r\nAAAAAX\n%x\r\n%b\r\n0\r\n\r\n",
    "one-two": b"0\r\n\n%x\r\n%b\r\n0\r\n\r\n",
    "two-one": b"2\r\nAA\n\r%x\r\n%b\r\n0\r\n\r\n",
    "zero-ext": b"0;\n\r\n%x\r\n%b\r\n0\r\n\r\n",
    "wrapped": b"10000000000000000\r\n\r\n%x\r\n%b\r\n0\r\n\r\n",
    "prefixed": b"0x0\r\n\r\n%x\r\n%b\r\n0\r\n\r\n",
}
TRAILERS = {
    "one": b"a: b\r\n",
    "several": b"a: b\r\nc: d\r\ne: f\r\n",
    "empty-value": b"a:\r\n",
    "host": b"Host: y\r\n",
    "two-hosts": b"Host: y\r\nHost: z\r\n",
    "expect": b"Expect: 100-continue\r\n",
    "authorization": b"Authorization: x\r\n",
}
NO_TRAILERS = {
    "no-colon": b"a\r\n",
    "blank-before-colon": b"a : b\r\n",
    "no-name": b": b\r\n",
    "blank-before": b" a: b\r\n",
    "fold": b"a: b\r\n c\r\n",
    "bare-lf": b"a: b\n",
    "bare-cr": b"a: b\rc\r\n",
    "nul": b"a: b\0\r\n",
    "nul-in-name": b"a\0: b\r\n",
    "control": b"a: \x01\r\n",
    "high-bit-in-name": b"\xff: b\r\n",
    "request-line": b"GET /smuggled HTTP/1.1\r\n",
    "lf-first": b"\na: b\r\n",
}
TRAILERS_TOO_LONG = {
    "long": b"a: " + b"b" * 5000 + b"\r\n",
    "long-name": b"a" * 5000 + b": b\r\n",
    "many": b"a: b\r\n" * 200,
    "many-long": (b"a: " + b"b" * 500 + b"\r\n") * 20,
}


def _chunks() -> Iterator[Case]:
    coding = (b"transfer-encoding", b"chunked")
    for name, (chunks, body) in CHUNKS.items():
        yield served(f"chunks/{name}", chunked(chunks), post(body, coding))
    for name, extension in BLANK_EXTENSIONS.items():
        sent = chunked(b"5%b\r\nhello\r\n0\r\n\r\n" % extension)
        yield served(f"chunks/extension-blank-{name}", sent, HELLO, may_refuse=REFUSED)
    for name, size in SIZES.items():
        yield refused(f"no-size/{name}", chunked(b"%b\r\nhello\r\n0\r\n\r\n" % size) + SMUGGLED)
        yield refused(f"no-size/{name}-second", chunked(b"1\r\na\r\n%b\r\nhello\r\n0\r\n\r\n" % size) + SMUGGLED)
    for name, extension in EXTENSIONS.items():
        yield refused(f"no-extension/{name}", chunked(b"5%b\r\nhello\r\n0\r\n\r\n" % extension) + SMUGGLED)
        yield refused(f"no-extension/{name}-of-the-last", chunked(b"5\r\nhello\r\n0%b\r\n\r\n" % extension) + SMUGGLED)
    long = b"a" * 5000
    for name, extension in {
        "name": b";" + long,
        "value": b";a=" + long,
        "quoted": b';a="%b"' % long,
        "many": b";a" * 2500,
    }.items():
        sent = chunked(b"5%b\r\nhello\r\n0\r\n\r\n" % extension)
        yield refused(f"no-extension/long-{name}", sent + SMUGGLED, status=TOO_MUCH_FRAMING)
    for name, body in CHUNK_ENDS.items():
        yield refused(f"chunk-end/{name}", chunked(body) + SMUGGLED)
    for name, template in FUNKY.items():
        yield refused(f"funky/{name}", chunked(template % (len(SMUGGLED), SMUGGLED)) + SMUGGLED)
    for name, trailer in TRAILERS.items():
        sent = chunked(b"5\r\nhello\r\n0\r\n%b\r\n" % trailer)
        yield served(f"trailer/{name}", sent, post(b"hello", coding))
    # What may not be in a trailer means nothing there; a parser that takes it for framing may only refuse it.
    for name, trailer in {
        "content-length": b"Content-Length: 37",
        "transfer-encoding": b"Transfer-Encoding: chunked",
    }.items():
        sent = chunked(b"5\r\nhello\r\n0\r\n%b\r\n\r\n" % trailer)
        yield served(f"trailer/{name}", sent, post(b"hello", coding), may_refuse=REFUSED)
    sent = chunked(b"5\r\nhello\r\n0\r\nConnection: close\r\n\r\n")
    yield served_in_any_case("trailer/connection", sent, post(b"hello", coding))
    for name, trailer in NO_TRAILERS.items():
        yield refused(f"no-trailer/{name}", chunked(b"5\r\nhello\r\n0\r\n%b\r\n" % trailer) + SMUGGLED)
    for name, trailer in TRAILERS_TOO_LONG.items():
        sent = chunked(b"5\r\nhello\r\n0\r\n%b\r\n" % trailer)
        yield refused(f"no-trailer/too-{name}", sent + SMUGGLED, status=TOO_MUCH_FRAMING)


# Bounds.


def _bounds() -> Iterator[Case]:
    def fields(count: int, width: int = 1) -> list[bytes]:
        return [b"a%d: %b" % (index, b"b" * width) for index in range(count)]

    yield served("bound/head", request(*fields(7, 500)), post())
    yield served("bound/value", request(b"a: " + b"b" * 3900), post())
    yield served("bound/fields", request(*fields(MAX_FIELDS - 1)), post())
    kept = request(*fields(7, 500))
    yield served("bound/anew-with-each-request", kept * 3, post(), post(), post())
    body = b"x" * 5000
    yield served("bound/a-body-is-no-head", request(b"Content-Length: 5000", body=body), post(body))
    yield refused("bound/a-field-too-many", request(*fields(MAX_FIELDS)), status=TOO_LONG)
    yield refused("bound/many-fields-too-many", request(*fields(400)), status=TOO_LONG)
    yield refused("bound/head-too-long", request(*fields(10, 500)), status=TOO_LONG)
    yield refused("bound/value-too-long", request(b"a: " + b"b" * 5000), status=TOO_LONG)
    yield refused("bound/name-too-long", request(b"a" * 5000 + b": b"), status=TOO_LONG)
    yield refused("bound/blanks-too-many", request(b"a:" + b" " * 5000 + b"b"), status=TOO_LONG)
    yield refused("bound/without-end", request(*fields(10, 500))[:-2], status=TOO_LONG)
    yield refused("bound/value-without-end", request(b"a: " + b"b" * 5000)[:-4], status=TOO_LONG)
    yield refused("bound/line-without-end", b"GET /" + b"a" * 5000, status=TOO_LONG_TARGET)
    yield refused("bound/second-too-long", BEFORE + request(*fields(10, 500)), SAW_BEFORE, status=TOO_LONG)
    yield refused("bound/second-with-too-many", BEFORE + request(*fields(MAX_FIELDS)), SAW_BEFORE, status=TOO_LONG)


# The connection.

KEPT = {
    "default": (),
    "keep-alive": (b"Connection: keep-alive",),
    "keep-alive-upper-case": (b"CONNECTION: KEEP-ALIVE",),
    "empty": (b"Connection:",),
    "unknown": (b"Connection: x",),
    "nearly-close": (b"Connection: closed",),
    "nearly-close-before": (b"Connection: xclose",),
    "quoted-close": (b'Connection: "close"',),
    "keep-alive-field": (b"Keep-Alive: timeout=1, max=1",),
    "close-elsewhere": (b"A: close",),
}
NOT_KEPT = {
    "close": (b"Connection: close",),
    "upper-case": (b"Connection: CLOSE",),
    "mixed-case": (b"connection: Close",),
    "list-first": (b"Connection: close, x",),
    "list-last": (b"Connection: x, close",),
    "list-no-blank": (b"Connection: x,close",),
    "list-blanks": (b"Connection: x , \tclose",),
    "list-empty": (b"Connection: ,close,",),
    "with-keep-alive": (b"Connection: keep-alive, close",),
    "two-fields": (b"Connection: x", b"Connection: close"),
    "two-fields-first": (b"Connection: close", b"Connection: x"),
    "two-fields-keep-alive": (b"Connection: close", b"Connection: keep-alive"),
}


def _connections() -> Iterator[Case]:
    for name, fields in KEPT.items():
        yield served(f"kept/{name}", request(*fields), post())
    yield served_in_any_case("kept/proxy-connection", request(b"Proxy-Connection: close"), post())
    for name, fields in NOT_KEPT.items():
        yield served_last(f"not-kept/{name}", request(*fields), post())
        sent = request(*fields, b"Content-Length: 5", body=b"hello") + SMUGGLED
        yield served_last(f"not-kept/{name}-with-more-behind", sent, HELLO)
    yield served_last("not-kept/rubbish-behind", request(b"Connection: close") + b"\0\xff rubbish", post())
    yield served_last("not-kept/after-another", BEFORE + request(b"Connection: close") + SMUGGLED, SAW_BEFORE, post())
    chunks = chunked(b"5\r\nhello\r\n0\r\n\r\n", b"Connection: close")
    yield served_last("not-kept/after-chunks", chunks + SMUGGLED, HELLO)
    old = b"POST / HTTP/1.0"
    yield served_last("old/default", request(line=old) + SMUGGLED, PLAIN)
    yield served_last("old/close", request(b"Connection: close", line=old) + SMUGGLED, post())
    yield served_last("old/unknown", request(b"Connection: x", line=old) + SMUGGLED, post())
    yield served_last("old/with-body", request(b"Content-Length: 5", line=old, body=b"hello"), HELLO)
    yield served_last(
        "old/with-body-and-more", request(b"Content-Length: 5", line=old, body=b"hello") + SMUGGLED, HELLO
    )
    yield served_last("old/both", request(b"Connection: keep-alive, close", line=old) + SMUGGLED, post())
    yield served("old/keep-alive", request(b"Connection: keep-alive", line=old), post())
    yield served("old/keep-alive-upper-case", request(b"Connection: Keep-Alive", line=old), post())
    yield served("old/keep-alive-in-a-list", request(b"Connection: x, keep-alive", line=old), post())
    sent = request(b"Connection: keep-alive", b"Content-Length: 5", line=old, body=b"hello")
    yield served("old/keep-alive-with-body", sent, HELLO)
    yield served("old/expect", request(b"Connection: keep-alive", b"Expect: 100-continue", line=old), post())
    yield refused("old/bad-length", request(b"Content-Length: +5", line=old, body=b"hello") + SMUGGLED)


UPGRADES = {
    "h2c": (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
    "unknown": (b"Connection: upgrade", b"Upgrade: x"),
    "tls": (b"Connection: Upgrade", b"Upgrade: TLS/1.0"),
    "list": (b"Connection: Upgrade", b"Upgrade: h2c, x"),
    "empty": (b"Connection: Upgrade", b"Upgrade:"),
    "not-named": (b"Upgrade: x",),
    "named-only": (b"Connection: upgrade",),
    "websocket-not-named": (b"Upgrade: websocket",),
    # This server of the cases has no class for them.
    "websocket": (
        b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"Sec-WebSocket-Version: 13",
    ),
}  # fmt: skip


def _upgrades() -> Iterator[Case]:
    for name, fields in UPGRADES.items():
        yield served(f"upgrade/{name}", request(*fields, line=b"GET / HTTP/1.1"), Seen("GET", b"/"))
        yield served(f"upgrade/{name}-with-length", request(*fields, b"Content-Length: 5", body=b"hello"), HELLO)
        yield served(f"upgrade/{name}-with-chunks", chunked(b"5\r\nhello\r\n0\r\n\r\n", *fields), HELLO)
        sent = request(*fields, b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED)
        yield served(f"upgrade/{name}-smuggling", sent, post(SMUGGLED))


def _pipelines() -> Iterator[Case]:
    numbered = [Seen("GET", b"/%d" % index, headers=HOST) for index in range(30)]
    text = b"".join(get(b"GET %b HTTP/1.1" % each.raw_path) for each in numbered)
    yield served("pipeline/two", BEFORE + AFTER, SAW_BEFORE, SAW_AFTER)
    yield served("pipeline/thirty", text, *numbered)
    hello = request(b"Content-Length: 5", body=b"hello")
    chunks = chunked(b"5\r\nhello\r\n0\r\n\r\n")
    yield served("pipeline/bodies", hello + chunks + hello + chunks, HELLO, HELLO, HELLO, HELLO)
    yield served(
        "pipeline/head-among-others",
        BEFORE + get(b"HEAD /h HTTP/1.1") + AFTER,
        SAW_BEFORE,
        Seen("HEAD", b"/h"),
        SAW_AFTER,
    )
    between = post(b"", (b"transfer-encoding", b"chunked"))
    yield served("pipeline/trailers-between", chunked(b"0\r\na: b\r\n\r\n") + AFTER, between, SAW_AFTER)
    yield waits("pipeline/half-of-the-next", BEFORE + AFTER[:-10], SAW_BEFORE)
    yield waits("pipeline/one-byte-of-the-next", BEFORE + b"G", SAW_BEFORE)
    yield waits("pipeline/no-body-of-the-next", BEFORE + hello[:-5], SAW_BEFORE)
    for name, text in {
        "rubbish": b"rubbish\r\n\r\n",
        "nul": b"\0\r\n\r\n",
        "no-host": b"GET / HTTP/1.1\r\n\r\n",
        "bad-length": request(b"Content-Length: 5_0"),
        "bad-coding": request(b"Transfer-Encoding: cow"),
        "bad-chunk": chunked(b"x\r\n\r\n"),
        "bad-version": get(b"GET / HTTP/3.0"),
        "fold": request(b"a: b", b" c"),
    }.items():
        status = UNKNOWN_METHOD | UNKNOWN_VERSION | UNKNOWN_CODING
        yield refused(f"pipeline/{name}-behind", BEFORE + text + SMUGGLED, SAW_BEFORE, status=status)
        yield refused(f"pipeline/{name}-behind-a-body", hello + text + SMUGGLED, HELLO, status=status)


# What is not HTTP at all, or not a request, or not yet one.

OTHERS = {
    "tls-hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)) + b"\x00" * 60,
    "tls-alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "ssl-2-hello": b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10",
    "http2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "http2-frame": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "smtp": b"EHLO x\r\n",
    "redis": b"*1\r\n$4\r\nPING\r\n",
    "redis-inline": b"PING\r\n\r\n",
    "memcached": b"stats\r\n",
    "proxy-1": b"PROXY TCP4 10.0.0.1 10.0.0.2 50000 80\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "proxy-2": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x01\x7f\x00\x00\x01\xc3\x50\x00\x50",
    "sip": b"INVITE sip:a@x SIP/2.0\r\nHost: x\r\n\r\n",
    "rtsp": b"DESCRIBE rtsp://x/a RTSP/1.0\r\nCSeq: 1\r\nHost: x\r\n\r\n",
    "icecast": b"SOURCE /a ICE/1.0\r\nHost: x\r\n\r\n",
    "websocket-frame": b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58",
    "json": b'{"jsonrpc": "2.0"}\r\n\r\n',
    "xml": b"<?xml version='1.0'?>\r\n\r\n",
    "nuls": b"\0" * 50,
    "ones": b"\xff" * 50,
    "utf-16": "GET / HTTP/1.1\r\nHost: x\r\n\r\n".encode("utf-16"),
    "utf-16-be": "GET / HTTP/1.1\r\nHost: x\r\n\r\n".encode("utf-16-be"),
    "remote-desktop": b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x03\x00\x00\x00",
    "smb": b"\x00\x00\x00\x54\xffSMB\x72\x00\x00\x00\x00",
    "postgres": b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
}


def _others() -> Iterator[Case]:
    for name, text in OTHERS.items():
        yield refused(f"other/{name}", text, status=UNKNOWN_METHOD | UNKNOWN_VERSION)


def _incomplete() -> Iterator[Case]:
    whole = request(b"A: b", b"Content-Length: 5", body=b"hello")
    for name, end in {
        "letter": 1,
        "method": 4,
        "target": 6,
        "version": 14,
        "line": 17,
        "name": 20,
        "field": 26,
    }.items():
        yield waits(f"incomplete/{name}", whole[:end])
    yield waits("incomplete/head", whole[:-7])
    yield waits("incomplete/head-but-for-lf", whole[:-6])
    yield waits("incomplete/no-body", whole[:-5])
    yield waits("incomplete/body", whole[:-1])
    yield waits("incomplete/large-body", request(b"Content-Length: 1000000000000000000", body=b"hello"))
    chunks = chunked(b"5\r\nhello\r\n0\r\n\r\n")
    for name, missing in {
        "size": 14, "size-line": 13, "size-lf": 12, "data": 8, "data-end": 7, "data-lf": 6, "last": 5, "last-line": 4,
        "last-lf": 3, "end": 2, "end-lf": 1,
    }.items():  # fmt: skip
        yield waits(f"incomplete/chunk-{name}", chunks[:-missing])
    yield waits("incomplete/trailer", chunked(b"0\r\na: b\r\n"))
    yield waits("incomplete/trailer-name", chunked(b"0\r\na"))
    yield waits("incomplete/extension", chunked(b"5;a"))


def _all() -> Iterable[Case]:
    for family in (
        _methods, _targets, _versions, _lines, _line_ends, _leading, _names, _values, _folds, _hosts, _lengths,
        _codings, _smuggling, _chunks, _bounds, _connections, _upgrades, _pipelines, _others, _incomplete,
    ):  # fmt: skip
        yield from family()


CASES = tuple(_all())
