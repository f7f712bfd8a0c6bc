"""Options and variables are twins, and mistakes are named, whichever program is started."""

import pytest

from engine.errors import ConfigError
from engine.options import NOTHING, Options, parse_arguments
from engine.settings import FIELDS

PROGRAM = "python -m test"


def parse(*arguments: str) -> Options:
    return parse_arguments(PROGRAM, "Tests.", arguments, {"take_it": "take it"})


def test_every_setting_is_an_option() -> None:
    """Each field's option sets the field's variable."""
    for name in FIELDS:
        options = parse(f"--{name.replace('_', '-')}", "7")
        assert options.variables == {f"MILLRACE_{name.upper()}": "7"}
        assert not options.flags
    assert parse("--access-log").variables == {"MILLRACE_ACCESS_LOG": "true"}


def test_a_programs_own_flags_are_no_settings() -> None:
    """They are told apart from the settings, and another program does not know them."""
    assert parse("--take-it", "--port", "1") == Options({"MILLRACE_PORT": "1"}, frozenset({"take_it"}))
    with pytest.raises(ConfigError, match="--take-it: no such option"):
        parse_arguments(PROGRAM, "Tests.", ["--take-it"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prot", "1"], r"--prot: no such option; did you mean --port\?"),
        (["--body-time=1"], r"--body-time=1: no such option; did you mean --body-timeout\?"),
        (["--model-repository=/m"], r"--model-repository=/m: no such option; here it is --models"),
        (["serve"], "serve: everything is said by options; `python -m test --help`"),
        (["--port"], "--port: expected one argument"),
        (["--help-me"], "--help-me: no such option; `python -m asgi_app --help`"),
    ],
)
def test_an_unknown_option_names_the_nearest(arguments: list[str], text: str) -> None:
    """No option is guessed from its beginning; a typo is an error with a suggestion."""
    with pytest.raises(ConfigError, match=text):
        parse(*arguments)


def test_the_option_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is given as neither is the default."""
    monkeypatch.setenv("MILLRACE_PORT", "9000")
    monkeypatch.setenv("MILLRACE_BACKLOG", "64")
    settings = parse("--port", "9001").settings()
    assert (settings.port, settings.backlog, settings.uds) == (9001, 64, "")
    assert NOTHING.settings().port == 9000


def test_a_complaint_is_in_the_words_of_whoever_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """An option is called by its name, a variable by its own."""
    assert parse("--port", "1").complain(ConfigError("MILLRACE_PORT and MILLRACE_HOST: no")) == 2
    assert capsys.readouterr().err == "millrace: --port and MILLRACE_HOST: no\n"
