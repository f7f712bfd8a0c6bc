"""What models count: kinds, labels that share a value, lives of series, and how they are written."""

import gc
import math
import threading

import pytest

from engine import custom_metrics
from engine.custom_metrics import MetricError, MetricFamily

COUNTER, GAUGE, HISTOGRAM = MetricFamily.COUNTER, MetricFamily.GAUGE, MetricFamily.HISTOGRAM


def rendered(prefix: str) -> list[str]:
    """Lines of `render` about families whose name begins so."""
    return [line for line in custom_metrics.render() if line.removeprefix("# HELP ").removeprefix("# TYPE ")
            .startswith(prefix)]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "call", "text"),
    [
        (COUNTER, lambda m: m.set(1), "Failed to set metric value: TRITONSERVER_METRIC_KIND_COUNTER does not support "
         "Set"),
        (COUNTER, lambda m: m.observe(1), "TRITONSERVER_METRIC_KIND_COUNTER does not support Observe"),
        (COUNTER, lambda m: m.increment(-1), "TRITONSERVER_METRIC_KIND_COUNTER can only be incremented monotonically "
         "by non-negative values."),
        (COUNTER, lambda m: m.increment(math.nan), "can only be incremented monotonically"),
        (GAUGE, lambda m: m.observe(1), "TRITONSERVER_METRIC_KIND_GAUGE does not support Observe"),
        (HISTOGRAM, lambda m: m.increment(1), "TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Increment"),
        (HISTOGRAM, lambda m: m.set(1), "TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Set"),
        (HISTOGRAM, lambda m: m.value(), "Failed to get metric value: TRITONSERVER_METRIC_KIND_HISTOGRAM does not "
         "support Value"),
    ],
)  # fmt: skip
def test_what_a_kind_does_not_do(kind, call, text) -> None:  # type: ignore[no-untyped-def]
    """It raises with Triton's text, and the value stays."""
    metric = MetricFamily(f"c_misuse_{kind.value}", "d", kind).Metric(buckets=[1.0] if kind is HISTOGRAM else None)
    with pytest.raises(MetricError) as raised:
        call(metric)
    assert text in str(raised.value)
    assert {"0"} == {line.split()[-1] for line in rendered(f"c_misuse_{kind.value}") if line[0] != "#"}


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        (GAUGE, {"labels": []}, "Failed to create metric. Labels must be a dictionary."),
        (GAUGE, {"labels": {"a-b": "1"}}, "'a-b' is not a label's name"),
        (GAUGE, {"buckets": [1]}, "Failed to create metric. Unexpected buckets found."),
        (HISTOGRAM, {"buckets": (1, 2)}, "Failed to create metric. Buckets must be a list."),
        (HISTOGRAM, {}, "Failed to create metric. Missing required buckets."),
        (HISTOGRAM, {"buckets": [2, 1]}, "buckets must be ascending"),
    ],
)
def test_metrics_that_cannot_be_made(kind, arguments, text) -> None:  # type: ignore[no-untyped-def]
    """Labels are a dictionary; bounds are a list, for histograms, and only for them."""
    with pytest.raises(MetricError, match=text):
        MetricFamily("c_unfit", "d", kind).Metric(**arguments)


def test_a_family_is_one_of_its_name() -> None:
    """Another kind, another description, or a name that Prometheus does not read is refused."""
    held = MetricFamily("c_family", "d", COUNTER)
    for kind, description in ((GAUGE, "d"), (COUNTER, "other")):
        with pytest.raises(MetricError, match="creating MetricFamily: metric family 'c_family' exists already"):
            MetricFamily("c_family", description, kind)
    with pytest.raises(MetricError, match="'c family' is not a metric's name"):
        MetricFamily("c family", "d", COUNTER)
    assert held.kind is COUNTER


def test_same_labels_share_a_value() -> None:
    """Whoever makes the metric, and in whatever family object; other labels have a value of their own."""
    first = MetricFamily("c_shared", "d", COUNTER).Metric({"a": "1"})
    second = MetricFamily("c_shared", "d", COUNTER).Metric({"a": "1"})
    other = MetricFamily("c_shared", "d", COUNTER).Metric({"a": "2"})
    first.increment(2)
    second.increment(0.5)
    assert (first.value(), second.value(), other.value()) == (2.5, 2.5, 0)
    assert rendered("c_shared") == [
        "# HELP c_shared d", "# TYPE c_shared counter", 'c_shared{a="1"} 2.5', 'c_shared{a="2"} 0',
    ]  # fmt: skip


def test_a_series_lives_as_long_as_somebody_holds_it() -> None:
    """Then it is gone, its family too; made again, it starts at 0, and may be of another kind."""
    metric = MetricFamily("c_life", "d", COUNTER).Metric()
    twin = MetricFamily("c_life", "d", COUNTER).Metric()
    metric.increment(3)
    del metric
    gc.collect()
    assert rendered("c_life")[-1] == "c_life 3"
    del twin
    gc.collect()
    assert rendered("c_life") == []
    again = MetricFamily("c_life", "other", GAUGE).Metric()
    assert again.value() == 0


def test_a_gauge_goes_both_ways() -> None:
    """And takes whatever number; what Prometheus calls infinite and no number is written as it does."""
    gauge = MetricFamily("c_gauge", "d", GAUGE).Metric()
    gauge.set(2)
    gauge.increment(-5)
    assert gauge.value() == -3
    for value, text in ((-3, "-3"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (0.1, "0.1")):
        gauge.set(value)
        assert rendered("c_gauge")[-1] == f"c_gauge {text}"


def test_a_histogram_counts_what_is_up_to_each_bound() -> None:
    """Buckets hold those below them too; what is on a bound is below it."""
    histogram = MetricFamily("c_histogram", "d", HISTOGRAM).Metric({"a": "1"}, [0.5, 2])
    for value in (0.1, 0.5, 1, 7):
        histogram.observe(value)
    assert rendered("c_histogram")[2:] == [
        'c_histogram_bucket{a="1",le="0.5"} 2',
        'c_histogram_bucket{a="1",le="2"} 3',
        'c_histogram_bucket{a="1",le="+Inf"} 4',
        'c_histogram_sum{a="1"} 8.6',
        'c_histogram_count{a="1"} 4',
    ]
    with pytest.raises(MetricError, match="exists already with the buckets"):
        MetricFamily("c_histogram", "d", HISTOGRAM).Metric({"a": "1"}, [1])


def test_texts_are_escaped() -> None:
    """What a model puts into labels and descriptions cannot end a line or a label."""
    held = MetricFamily("c_escaped", 'a\n"b"\\', GAUGE).Metric({"a": 'x"\n\\'})
    assert rendered("c_escaped") == [
        '# HELP c_escaped a\\n"b"\\\\', "# TYPE c_escaped gauge", 'c_escaped{a="x\\"\\n\\\\"} 0',
    ]  # fmt: skip
    assert held.value() == 0


def test_threads_lose_no_increment() -> None:
    """Two threads that count at once."""
    counter = MetricFamily("c_threads", "d", COUNTER).Metric()

    def count() -> None:
        for _ in range(20_000):
            counter.increment(1)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value() == 40_000
