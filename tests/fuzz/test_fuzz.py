"""Whatever bytes come in: they are accepted, or refused with an error of engine/errors.py. Nothing else happens.

FUZZ_SECONDS says how long each target is fuzzed under the guidance of its coverage.
"""

import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .guided import fuzz
from .seeds import SEEDS, numbered
from .strategies import LIKELY
from .targets import TARGETS, attempt, planted

SECONDS = int(os.environ.get("FUZZ_SECONDS", "5"))
EXAMPLES = 300

# What was wrong -> (target, an input that showed it). Each was found by the tests below.
FINDINGS: dict[str, tuple[str, bytes]] = {
    # json.loads lets through half of a surrogate pair, which no UTF-8 can say: in an input, in UTF-16 as in UTF-8 ...
    "half a pair in an input": ("generate", b'\x04{"x":"\xed\xa0\x80"}'),
    "half a pair in UTF-16": ("generate", numbered(4, '{"x":"\\ud800"}'.encode("utf-16"))),
    # ... in what is sent back, and in the text of an error, where even the answer that says so could not be written.
    "half a pair in the id": ("generate", b'\x00{"id":"\xed\xa0\x80"}'),
    "half a pair in a refused parameter": ("generate", b'\x00{"\xed\xa0\x80":null}'),
    # protobuf for Python leaves escapes to Python, which warns of what is none, and reads on: here an error.
    "an escape that there is not": ("config", b'\x00backend: "i\\entity"'),
    "an escape that is no byte": ("config", b'\x00name: "\\777"'),
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_what_was_found(finding: str) -> None:
    """What once went wrong is accepted, or refused."""
    target, data = FINDINGS[finding]
    attempt(TARGETS[target], data)


@pytest.mark.parametrize(("target", "seed"), [(name, seed) for name, seeds in SEEDS.items() for seed in seeds])
def test_seeds_are_accepted(target: str, seed: bytes) -> None:
    """So that what is made of them is often accepted as well."""
    assert attempt(TARGETS[target], seed) is None


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_are_almost_right(target: str) -> None:
    """They are accepted or refused; and there are enough of both."""
    outcomes: Counter[str] = Counter()

    @settings(derandomize=True, deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(LIKELY[target])
    def run(data: bytes) -> None:
        outcomes["accepted" if attempt(TARGETS[target], data) is None else "refused"] += 1

    run()
    assert min(outcomes["accepted"], outcomes["refused"]) >= EXAMPLES / 20, outcomes


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes(target: str) -> None:
    """Those without any sense too."""

    @settings(derandomize=True, deadline=None, max_examples=EXAMPLES)
    @given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
    def run(data: bytes) -> None:
        attempt(TARGETS[target], data)

    run()


def _need_atheris() -> None:
    if importlib.util.find_spec("atheris") is None:
        if "CI" in os.environ:
            pytest.fail("atheris is not installed, and CI must not go without it")
        pytest.skip("atheris is not installed: no fuzzing guided by coverage")


def test_without_atheris(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guided runs are skipped, and say why; but where CI is set they fail."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="CI must not go without it"):
        _need_atheris()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="atheris is not installed"):
        _need_atheris()


def test_a_bug_is_found(tmp_path: Path) -> None:
    """By guidance: the input that shows it is reported, and what to do with it."""
    _need_atheris()
    report = fuzz(planted.__name__, 60, tmp_path)
    assert report.finding is not None
    with pytest.raises(KeyError):
        attempt(planted, report.finding)
    assert repr(report.finding) in str(report)
    assert "KeyError" in report.log


def test_a_run_that_fails_is_no_success(tmp_path: Path) -> None:
    """Without such a target, nothing was fuzzed."""
    _need_atheris()
    with pytest.raises(RuntimeError, match="fuzzing nothing ended with status 1"):
        fuzz("nothing", 1, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_what_coverage_leads_to(target: str, tmp_path: Path) -> None:
    """Inputs that reach ever more of the code are accepted or refused."""
    _need_atheris()
    report = fuzz(target, SECONDS, tmp_path)
    assert report.finding is None, str(report)
    assert report.executed > len(SEEDS[target])
