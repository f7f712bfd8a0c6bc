"""The documents tell the truth: the tests they name exist, the links lead somewhere, no setting is missing."""

import re
import tomllib
from pathlib import Path
from typing import Any

import orjson
import pytest

from asgi_app.v2 import VERSION
from engine.functions import Function
from engine.local import LocalEngine
from engine.settings import FIELDS, Settings, read_settings
from tests.client import Client

PAGES = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *map(str, Path("docs").glob("*.md")))]
TESTS = {
    name
    for path in Path("tests").rglob("test_*.py")
    for name in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.M)
}


def test_every_promise_names_a_test_that_exists() -> None:
    """Each test named in docs/behaviour.md is there, and each list item or table row under a promise names one."""
    text = Path("docs/behaviour.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    assert len(set(named)) > 50
    assert set(named) <= TESTS, set(named) - TESTS
    promises = text.partition("## Answers")[2].partition("## Where it differs")[0]
    for promise in re.findall(r"^- .+?(?=^[-|#\n])", promises, re.M | re.S):
        assert "`test_" in promise, promise


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is to a file or folder of the checkout."""
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_names_only_settings_that_exist() -> None:
    """Every MILLRACE_ variable and every option of the launcher in the documents is one."""
    for page in PAGES:
        text = page.read_text()
        for variable in re.findall(r"MILLRACE_([A-Z_]+)", text):
            assert variable.lower() in FIELDS, variable
        for line in re.findall(r"-m asgi_app (.*)", text):
            for option in re.findall(r"--([a-z-]+)", line):
                assert option.replace("-", "_") in FIELDS or option in ("help", "print-config"), option


def test_the_version_is_the_same_everywhere() -> None:
    """What the server says of itself is what the distribution says."""
    assert tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"] == VERSION


CODE_FIRST = Path("docs/code-first.md").read_text()
SERVERS = re.findall(r"```python\n(.*?)```(.*?)(?=```python|\Z)", CODE_FIRST, re.S)
EXCHANGE = re.compile(r"curl -d '(.+?)' \\\n +http://127.0.0.1:8000(\S+)\n```\n\n```json\n(.+?)```", re.S)


def test_every_snippet_about_functions_is_tried() -> None:
    """No example of the page is left out below: each server has requests, each request its answer."""
    assert len(SERVERS) == CODE_FIRST.count("```python") > 2
    assert sum(len(EXCHANGE.findall(text)) for _, text in SERVERS) == CODE_FIRST.count("curl ") > 3


@pytest.mark.parametrize(("code", "text"), SERVERS, ids=lambda text: None)
async def test_the_snippets_about_functions_answer_what_they_say(code: str, text: str) -> None:
    """Each Python file of docs/code-first.md is served, and answers its requests with what the page shows."""
    names: dict[str, Any] = {}
    exec(code, names)
    functions = [value for value in names.values() if isinstance(value, Function)]
    assert callable(names["app"])
    settings = Settings(models="/nonexistent", cache_bytes=10**6)
    engine = LocalEngine(settings, functions)
    try:
        await engine.start()
        asked = EXCHANGE.findall(text)
        assert {path for _, path, _ in asked} == {f"/v2/models/{function.name}/infer" for function in functions}
        for body, path, expected in asked:
            answer = await Client(engine, settings)("POST", path, body.encode())
            assert (answer.status, answer.json) == (200, orjson.loads(expected))
    finally:
        await engine.stop()


def test_the_environment_shown_for_functions_is_one() -> None:
    """The settings that the page gives are read as it says."""
    for line in re.findall(r"^(MILLRACE_.*) uvicorn", CODE_FIRST, re.M):
        assert read_settings(dict(pair.split("=") for pair in line.split()))
