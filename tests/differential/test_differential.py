"""Every case is one test: both servers give the same answer to its requests, or one that differs as is allowed."""

import pytest

from . import cases, generated
from .agreement import disagreements
from .allowed import ALLOWED, Allowed
from .cases import Case
from .servers import Pair

pytestmark = pytest.mark.e2e

CASES = [*cases.all_cases(), *generated.all_cases()]
MET: set[Allowed] = set()
RUN: set[str] = set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_same_answers(case: Case, pair: Pair) -> None:
    """Status, headers, JSON and tensors of every request are equal, or differ as `allowed` says."""
    RUN.add(case.id)
    reports, met = disagreements(case, pair)
    MET.update(met)
    if reports:
        pytest.fail("\n\n".join(reports), pytrace=False)


def test_every_allowed_difference_is_met() -> None:
    """An entry that no request needs any more is taken out."""
    if {case.id for case in CASES} != RUN:
        pytest.skip("only some of the cases were run")
    assert not [entry.reason for entry in ALLOWED if entry not in MET]
