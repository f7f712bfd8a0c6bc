"""Servers that load everything at the start, and nothing by request."""

import pytest

from .agreement import disagreements
from .cases import Case
from .exchange import get, post
from .servers import Pair

pytestmark = pytest.mark.e2e

PAIR = ("none", ["add_sub"])

CASES = (
    Case("load", (post("/v2/repository/models/add_sub/load"), get("/v2/models/add_sub/ready"))),
    Case("load of unknown", (post("/v2/repository/models/absent/load"),)),
    Case("load, not json", (post("/v2/repository/models/add_sub/load", b"nope"),)),
    Case("unload", (post("/v2/repository/models/add_sub/unload"), get("/v2/models/add_sub/ready"))),
    Case("index", (post("/v2/repository/index"), post("/v2/repository/index", {"ready": True}))),
    Case("ready", (get("/v2/health/ready"), get("/v2/models/later/ready"))),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_same_answers(case: Case, pair: Pair) -> None:
    """What may not be loaded by request is refused alike, and is served on."""
    reports, _ = disagreements(case, pair)
    if reports:
        pytest.fail("\n\n".join(reports), pytrace=False)
