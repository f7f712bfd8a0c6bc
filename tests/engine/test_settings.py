"""Settings: every refusal names the variable, a typo is never a default."""

import dataclasses

import pytest

from engine.errors import ConfigError
from engine.settings import FIELDS, Settings, read_settings


def test_defaults_without_any_variable() -> None:
    """An environment without variables of ours gives the defaults; other people's variables are not ours to judge."""
    assert read_settings({"PATH": "/bin", "MILLRACEX": "1"}) == Settings()


def test_every_field_is_a_variable() -> None:
    """Each field can be set by its own variable, in the field's type."""
    given = {"str": "debug", "int": "7", "float": "7.5", "bool": "yes"}
    special = {"model_control": "poll", "engine_mode": "660", "arena_bytes": "2000000"}
    for name, field in FIELDS.items():
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        text = special.get(name, given[kind])
        value = getattr(read_settings({f"MILLRACE_{name.upper()}": text}), name)
        assert value == {"str": text, "int": int(text) if kind == "int" else 0, "float": 7.5, "bool": True}[kind]


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("MILLRACE_PROT", "1", r"MILLRACE_PROT: no such setting; did you mean MILLRACE_PORT\?"),
        ("MILLRACE_ZZZZZZ", "1", r"MILLRACE_ZZZZZZ: no such setting; .*--help"),
        ("MILLRACE_PORT", "web", "MILLRACE_PORT: must be a whole number, got 'web'"),
        ("MILLRACE_PORT", "65536", "MILLRACE_PORT: must be at most 65535, got 65536"),
        ("MILLRACE_PORT", "", "MILLRACE_PORT: must be a whole number, got ''"),
        ("MILLRACE_MODEL_CONTROL", "all", "MILLRACE_MODEL_CONTROL: must be none, poll or explicit, got 'all'"),
        ("MILLRACE_FORWARD_HEADERS", "(", "MILLRACE_FORWARD_HEADERS: must be a regular expression: "),
        ("MILLRACE_QUEUE_ROWS", "0", "MILLRACE_QUEUE_ROWS: must be at least 1, got 0"),
        ("MILLRACE_QUEUE_BYTES", "0", "MILLRACE_QUEUE_BYTES: must be at least 1, got 0"),
        ("MILLRACE_ENGINE_MODE", "rw", "MILLRACE_ENGINE_MODE: must be an octal mode, 600 to 666, .*, got 'rw'"),
        ("MILLRACE_ENGINE_MODE", "777", "MILLRACE_ENGINE_MODE: must be an octal mode, .*, got '777'"),
        ("MILLRACE_ENGINE_MODE", "066", "MILLRACE_ENGINE_MODE: must be an octal mode, .*, got '066'"),
        ("MILLRACE_ENGINE_MODE", "670", "MILLRACE_ENGINE_MODE: must be an octal mode, .*, got '670'"),
        ("MILLRACE_ENGINE_MODE", "1666", "MILLRACE_ENGINE_MODE: must be an octal mode, .*, got '1666'"),
        ("MILLRACE_ENGINE_MODE", "0o600", "MILLRACE_ENGINE_MODE: must be an octal mode, .*, got '0o600'"),
        ("MILLRACE_ENGINE_MODE", "", "MILLRACE_ENGINE_MODE: must be an octal mode, .*, got ''"),
        ("MILLRACE_ENGINE_SOCKET", "/" + "a" * 103, "MILLRACE_ENGINE_SOCKET: must be a path of at most 103 bytes, got"),
        ("MILLRACE_ENGINE_SOCKET", "/" + "ä" * 52, "MILLRACE_ENGINE_SOCKET: must be a path of at most 103 bytes, got"),
        ("MILLRACE_ENGINE_WAIT", "-1", "MILLRACE_ENGINE_WAIT: must be at least 0, got -1.0"),
        ("MILLRACE_ARENA_BYTES", "1000", "MILLRACE_ARENA_BYTES: must be at least 1048576, got 1000"),
        ("MILLRACE_CACHE_BYTES", "-1", "MILLRACE_CACHE_BYTES: must be at least 0, got -1"),
        ("MILLRACE_CACHE_SECONDS", "0", "MILLRACE_CACHE_SECONDS: must be at least 0.001, got 0.0"),
        ("MILLRACE_CLIENT_HEADER", "X:", "MILLRACE_CLIENT_HEADER: must be the name of a header, got 'X:'"),
        ("MILLRACE_CLIENT_HEADER", "\udcff", "MILLRACE_CLIENT_HEADER: must be the name of a header"),
        ("MILLRACE_STUCK_AFTER", "nan", "MILLRACE_STUCK_AFTER: must be a number, got 'nan'"),
        ("MILLRACE_BODY_TIMEOUT", "-1", "MILLRACE_BODY_TIMEOUT: must be at least 0.001, got -1.0"),
        ("MILLRACE_ACCESS_LOG", "maybe", "MILLRACE_ACCESS_LOG: must be true or false, got 'maybe'"),
        ("MILLRACE_LOG_LEVEL", "loud", "MILLRACE_LOG_LEVEL: must be one of critical, error"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(variable: str, value: str, text: str) -> None:
    """An unknown variable names the nearest one; a wrong value names the variable, the rule and the value."""
    with pytest.raises(ConfigError, match=text):
        read_settings({variable: value})


def test_two_places_to_listen_are_refused() -> None:
    """A path and a descriptor cannot both be meant."""
    with pytest.raises(ConfigError, match="MILLRACE_UDS and MILLRACE_FD"):
        read_settings({"MILLRACE_UDS": "/x", "MILLRACE_FD": "0"})


def test_the_engines_socket_has_a_plain_name_too() -> None:
    """Either variable says it, both may say the same; two that differ are an error, and an empty one says nothing."""
    ours, plain = "MILLRACE_ENGINE_SOCKET", "ENGINE_SOCKET"
    for environment in ({ours: "/x"}, {plain: "/x"}, {ours: "/x", plain: "/x"}, {ours: "/x", plain: ""}):
        assert read_settings(environment).engine_socket == "/x"
    assert read_settings({plain: ""}) == Settings()
    for ours_too in ("/y", ""):
        with pytest.raises(ConfigError, match=f"{ours} and {plain}: mean the same, .* got '{ours_too}' and '/x'"):
            read_settings({ours: ours_too, plain: "/x"})
    with pytest.raises(ConfigError, match="MILLRACE_ENGINE_SOCKET: must be a path"):
        read_settings({plain: "/" + "a" * 103})


@pytest.mark.parametrize("mode", ["600", "0660", "666", "622"])
def test_modes_of_the_engines_socket(mode: str) -> None:
    """The owner may connect, and anybody who is given leave to write."""
    assert read_settings({"MILLRACE_ENGINE_MODE": mode}).engine_mode == mode


def test_settings_are_frozen_and_explained() -> None:
    """Nothing changes a Settings after it was read, and every field has its sentence of help."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]
    assert all(field.metadata["help"] for field in FIELDS.values())
