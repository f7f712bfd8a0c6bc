"""Routes: every row is reached, and a path means what its bytes say."""

import pytest

from asgi_app import control
from asgi_app.routes import ROUTES, Route, match
from engine.errors import InvalidInput, MethodNotAllowed, NotFound

# What stands for each variable part of a path.
PARTS = {"model": "resnet", "version": "3", "region": "r", "repository": "R"}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_row_is_reached(route: Route) -> None:
    """Each row's path leads to its handler, with its variable parts by name; HEAD to that of GET."""
    method, path, handler, summary, _ = route
    concrete = path.format(**PARTS)
    found, variables = match(method, concrete.encode())
    assert found is handler
    assert variables == {key: value for key, value in PARTS.items() if "{" + key in path}
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
        b"/v2/models/",
        b"/v2/models//ready",
        b"/v2/repository/models//load",
        b"/v2/systemsharedmemory",
        b"/v2/systemsharedmemory/region/status",
        b"/v2/models/m/versions/1/trace/setting",
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


@pytest.mark.parametrize("version", ["x", "1x", "-1", "+1", "1.0", "%20", "1%201", "\u0663", "%D9%A3", "latest", "0x1"])
@pytest.mark.parametrize("path", ["", "/ready", "/infer", "/config", "/stats", "/generate"])
def test_a_version_is_a_number(version: str, path: str) -> None:
    """What is no number in ASCII digits is no version, and there is nothing at such a path, whatever the method."""
    for method in ("GET", "POST"):
        with pytest.raises(NotFound, match="^Not Found$"):
            match(method, f"/v2/models/m/versions/{version}{path}".encode())


@pytest.mark.parametrize(
    ("text", "version"), [("3", "3"), ("003", "3"), ("0", "0"), ("%33", "3"), (str(2**63 - 1),) * 2]
)
def test_a_version_is_that_number_however_it_is_written(text: str, version: str) -> None:
    """Zeros in front do not make another version."""
    assert match("GET", f"/v2/models/m/versions/{text}".encode())[1] == {"model": "m", "version": version}


@pytest.mark.parametrize("version", [str(2**63), "9" * 900])
def test_a_version_that_no_integer_holds(version: str) -> None:
    """It is refused in Triton's words."""
    with pytest.raises(InvalidInput) as refused:
        match("GET", f"/v2/models/m/versions/{version}/ready".encode())
    assert str(refused.value) == (
        f"failed to get model version from specified version string '{version}' (details: stol), version should be an "
        "integral value > 0"
    )


@pytest.mark.parametrize("name", ["versions", "infer", "ready", "config", "trace", "repository", "models", "v2"])
@pytest.mark.parametrize("path", ["", "/ready", "/versions/1", "/versions/1/config", "/stats", "/trace/setting"])
def test_a_model_may_be_called_like_a_part_of_a_path(name: str, path: str) -> None:
    """Where a model's name stands, any word is one."""
    assert match("GET", f"/v2/models/{name}{path}".encode())[1]["model"] == name


def test_one_name_is_taken() -> None:
    """/v2/models/stats are the statistics of all models; below it, a model of that name is still reached."""
    assert match("GET", b"/v2/models/stats") == (control.statistics, {})
    with pytest.raises(MethodNotAllowed):
        match("POST", b"/v2/models/stats")
    assert match("GET", b"/v2/models/stats/stats") == (control.statistics, {"model": "stats"})


def test_a_repository_is_named_where_triton_lets_it() -> None:
    """The path with a repository in it is one of its own, even for a model or a repository called `models`."""
    assert match("POST", b"/v2/repository/models/models/load") == (control.load, {"model": "models"})
    assert match("POST", b"/v2/repository/models/models/m/load")[0] is control.in_repository
    assert match("POST", b"/v2/repository/models/index") == (control.index, {"repository": "models"})
