"""The documents tell the truth: the tests they name exist, the links lead somewhere, no setting is missing."""

import re
import tomllib
from pathlib import Path

import pytest

from asgi_app.v2 import VERSION
from engine.settings import FIELDS

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
