"""Routes: every row is reached, and a path means what its bytes say."""

import pytest

from asgi_app.routes import ROUTES, Route, match
from engine.errors import InvalidInput, MethodNotAllowed, NotFound


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_row_is_reached(route: Route) -> None:
    """Each row's path leads to its handler, with its variable parts by name; HEAD to that of GET."""
    method, path, handler, summary = route
    concrete = path.replace("{model}", "resnet").replace("{version}", "3")
    found, variables = match(method, concrete.encode())
    assert found is handler
    assert variables == {key: value for key, value in (("model", "resnet"), ("version", "3")) if "{" + key in path}
    assert summary
    if method == "GET":
        assert match("HEAD", concrete.encode())[0] is handler


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"*",
        b"/" + b"x" * 2000,
        b"/v2/models/" + b"x" * 2000,
        b"/v2/",
        b"/v3",
        b"/v2/models",
        b"/v2/models/m/",
        b"/v2/models/m/x",
        b"//v2",
        b"v2",
    ],
)
def test_what_is_not_there(path: bytes) -> None:
    """No row, no trailing slash, no guessing."""
    with pytest.raises(NotFound):
        match("GET", path)


def test_a_wrong_method_says_which_are_right() -> None:
    """405 carries the methods that the path does have."""
    with pytest.raises(MethodNotAllowed) as refused:
        match("PUT", b"/v2/models/m/infer")
    assert refused.value.allow == "POST, OPTIONS"
    with pytest.raises(MethodNotAllowed) as refused:
        match("POST", b"/v2")
    assert refused.value.allow == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize(
    ("path", "name"),
    [(b"/v2/models/a%2Fb", "a/b"), (b"/v2/models/..", ".."), (b"/v2/models/%2e%2e", ".."), (b"/v2/models/%C3%A9", "é"),
     (b"/v2/models/100%", "100%"), (b"/v2/models/a%20b", "a b")],
)  # fmt: skip
def test_a_name_is_one_segment_decoded_once(path: bytes, name: str) -> None:
    """An encoded slash is part of the name; dots are a name like any other; nothing is decoded twice."""
    assert match("GET", path)[1] == {"model": name}


def test_a_name_that_is_not_utf8() -> None:
    """Bytes that are no text are refused, and the part of the path is named."""
    with pytest.raises(InvalidInput, match="the model's name in the path is not UTF-8"):
        match("GET", b"/v2/models/%ff")
