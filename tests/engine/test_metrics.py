"""Metrics: Triton's names and units, ours in base units, in a form that Prometheus reads."""

import asyncio
import re

import numpy as np
import pytest

from engine.types import InferRequest
from tests.conftest import StartLocal
from tests.scripted import CONFIG, add_model

SAMPLE = re.compile(r'^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)$')


def parse(text: str) -> dict[str, dict[str, float]]:
    """Name -> labels -> value; checks the form of every line."""
    assert text.endswith("\n")
    families: dict[str, dict[str, float]] = {}
    typed: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in typed, f"{name} has two types"
            typed.add(name)
        elif not line.startswith("# HELP "):
            found = SAMPLE.match(line)
            assert found, line
            name, labels, value = found.groups()
            assert re.sub(r"_(bucket|sum|count)$", "", name) in typed or name in typed, f"{name} has no type"
            assert labels not in families.setdefault(name, {}), f"{line} is there twice"
            families[name][labels or ""] = float(value)
    return families


def request(value: float = 1.0, rows: int = 1) -> InferRequest:
    return InferRequest("m", "", {"x": np.full((rows, 4), value, "<f4")})


async def test_everything_is_there_from_the_start(local_engine: StartLocal) -> None:
    """With 0, so that a rate can be taken of the first request."""
    engine = await local_engine(m=lambda inputs: {"y": inputs["x"]})
    metrics = parse(await engine.metrics())
    own = 'model="m",version="1"'
    for name in (
        "nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count",
        "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us", "nv_inference_compute_output_duration_us",
        "nv_inference_pending_request_count",
    ):  # fmt: skip
        assert metrics[name] == {own: 0.0}, name
    assert metrics["nv_inference_request_failure"] == {
        f'{own},reason="{reason}"': 0.0 for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER")
    }
    assert "nv_cache_num_hits_per_model" not in metrics
    assert metrics["nv_model_load_duration_secs"][own] > 0


async def test_what_happened_is_counted(local_engine: StartLocal) -> None:
    """Rows, batches, failures by reason, why batches left, and how long requests waited."""

    def picky(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if (inputs["x"] == 7).any():
            raise ValueError("no")
        return {"y": inputs["x"]}

    engine = await local_engine(m=picky)
    await asyncio.gather(*(engine.infer(request(rows=2)) for _ in range(3)))
    with pytest.raises(Exception, match="no"):
        await engine.infer(request(7))
    metrics = parse(await engine.metrics())
    own = 'model="m",version="1"'
    assert metrics["nv_inference_request_success"][own] == 3
    assert metrics["nv_inference_count"][own] == 6
    assert metrics["nv_inference_exec_count"][own] == 2
    assert metrics["nv_inference_request_failure"][f'{own},reason="BACKEND"'] == 1
    assert metrics["millrace_batches_total"] == {f'{own},reason="free"': 2.0}
    assert metrics["millrace_batch_rows_total"] == {f'{own},rows="1"': 1.0, f'{own},rows="6"': 1.0}
    assert metrics["millrace_work_units_total"][own] == 7
    assert metrics["millrace_queue_wait_seconds_count"][own] == 4
    assert metrics["millrace_batch_seconds_count"][own] == 2
    assert metrics["millrace_batch_seconds_sum"][own] > 0
    buckets = [value for labels, value in metrics["millrace_batch_seconds_bucket"].items()]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 2


async def test_labels_are_escaped_and_tags_are_on_every_series(local_engine: StartLocal, tmp_path: object) -> None:
    add_model(tmp_path, "m", CONFIG + r'metric_tags { key: "team" value: "a\"b\\c" }')  # type: ignore[arg-type]
    metrics = parse(await (await local_engine(m=lambda i: {"y": i["x"]})).metrics())
    assert metrics["nv_inference_count"] == {r'model="m",version="1",_team="a\"b\\c"': 0.0}


async def test_models_with_a_cache_say_what_it_did(local_engine: StartLocal, tmp_path: object) -> None:
    add_model(tmp_path, "m", CONFIG + "response_cache { enable: true }")  # type: ignore[arg-type]
    engine = await local_engine(m=lambda i: {"y": i["x"]})
    for _ in range(3):
        await engine.infer(request())
    metrics = parse(await engine.metrics())
    own = 'model="m",version="1"'
    assert (metrics["nv_cache_num_hits_per_model"][own], metrics["nv_cache_num_misses_per_model"][own]) == (2, 1)
    assert metrics["nv_inference_request_success"][own] == 3
    assert metrics["nv_inference_count"][own] == 1
