"""Metrics that models make themselves: the registry behind pb_utils.MetricFamily and Metric (PROTOCOL.md section 7.9).

A family is known by its name. Whoever makes one that exists shares it, and metrics of the same labels share one value,
whichever model or instance holds them. A series is in `render()` as long as anything holds a Metric of it, so what
models leave behind goes with them. Standard library only; any thread may call anything.
"""

import enum
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import ClassVar
from weakref import WeakValueDictionary

Labels = tuple[tuple[str, str], ...]

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


class MetricError(ValueError):
    """The metric does not do that; the text is Triton's."""


class MetricKind(enum.Enum):
    """What a family counts; the value is what Prometheus calls it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class _Series:
    """One value: of a counter or a gauge, or a histogram's."""

    def __init__(self, bounds: tuple[float, ...] = ()) -> None:
        self.value = 0.0  # of a histogram: the sum of what was observed
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # by bucket, each without those below it; the last has no bound


class _Family:
    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        self.name, self.description, self.kind = name, description, kind
        self.series: WeakValueDictionary[Labels, _Series] = WeakValueDictionary()


class Registry:
    """Every family that something holds, by name."""

    def __init__(self) -> None:
        # Reentrant: a collection that starts under it may end a model, and with it a Metric.
        self.lock = threading.RLock()
        self._families: WeakValueDictionary[str, _Family] = WeakValueDictionary()

    def family(self, name: str, description: str, kind: MetricKind) -> _Family:
        """The family of that name. Raises MetricError if it exists with another kind or description."""
        if not _NAME.fullmatch(name):
            raise MetricError(f"'{name}' is not a metric's name")
        with self.lock:
            family = self._families.get(name)
            if family is None:
                family = self._families[name] = _Family(name, description, kind)
            elif (family.description, family.kind) != (description, kind):
                raise MetricError(
                    f"metric family '{name}' exists already, as a {family.kind.value}: {family.description}"
                )
            return family

    def render(self) -> list[str]:
        """All series as lines of Prometheus' text format, in the order in which their families were made."""
        with self.lock:
            return [line for family in list(self._families.values()) for line in _lines(family)]


REGISTRY = Registry()


def render() -> list[str]:
    """What models count, as lines of Prometheus' text format, without their newlines; empty if they count nothing."""
    return REGISTRY.render()


class Metric:
    """One value that a model counts; made by `MetricFamily.Metric`.

    A kind that an operation is not for raises the `error` of the family.
    """

    def __init__(self, family: "MetricFamily", series: _Series) -> None:
        self._family, self._series = family, series

    def increment(self, value: float) -> None:
        """Add to a counter, never less than 0, or to a gauge."""
        self._check("Failed to increment metric value: ", "Increment", MetricKind.COUNTER, MetricKind.GAUGE)
        if self._family.kind is MetricKind.COUNTER and not value >= 0:
            raise self._family.error(
                "Failed to increment metric value: TRITONSERVER_METRIC_KIND_COUNTER can only be incremented "
                "monotonically by non-negative values."
            )
        with self._family.registry.lock:
            self._series.value += value

    def set(self, value: float) -> None:
        """Replace the value of a gauge."""
        self._check("Failed to set metric value: ", "Set", MetricKind.GAUGE)
        self._series.value = float(value)

    def observe(self, value: float) -> None:
        """Count a value in its bucket of a histogram."""
        self._check("Failed to observe metric value: ", "Observe", MetricKind.HISTOGRAM)
        with self._family.registry.lock:
            self._series.value += value
            self._series.counts[bisect_left(self._series.bounds, value)] += 1

    def value(self) -> float:
        """Of a counter or a gauge."""
        self._check("Failed to get metric value: ", "Value", MetricKind.COUNTER, MetricKind.GAUGE)
        return self._series.value

    def _check(self, failed: str, operation: str, *kinds: MetricKind) -> None:
        if self._family.kind not in kinds:
            raise self._family.error(
                f"{failed}TRITONSERVER_METRIC_KIND_{self._family.kind.name} does not support {operation}"
            )


class MetricFamily:
    """Metrics of one name, one for each set of labels.

    Attributes:
        error: what misuse raises.
    """

    COUNTER: ClassVar = MetricKind.COUNTER
    GAUGE: ClassVar = MetricKind.GAUGE
    HISTOGRAM: ClassVar = MetricKind.HISTOGRAM

    registry: ClassVar[Registry] = REGISTRY
    error: ClassVar[type[Exception]] = MetricError
    metric: ClassVar[type[Metric]] = Metric

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        """Make the family, or share the one of that name.

        Raises:
            error: it is there with another kind or description, or the name is not one that Prometheus reads.
        """
        self.kind = kind
        try:
            self._family = self.registry.family(name, description, kind)
        except MetricError as error:
            raise self.error(f"Error when creating MetricFamily: {error}") from None

    def Metric(  # noqa: N802 - Triton's name
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """The metric of these labels, 0 if it is new.

        Args:
            buckets: upper bounds, ascending, of a histogram, and of nothing else.

        Raises:
            error: the labels or the bounds are not such.
        """
        if labels is not None and not isinstance(labels, dict):
            raise self.error("Failed to create metric. Labels must be a dictionary.")
        if buckets is not None and not isinstance(buckets, list):
            raise self.error("Failed to create metric. Buckets must be a list.")
        if self.kind is not MetricKind.HISTOGRAM and buckets is not None:
            raise self.error("Failed to create metric. Unexpected buckets found.")
        if self.kind is MetricKind.HISTOGRAM and buckets is None:
            raise self.error("Failed to create metric. Missing required buckets.")
        bounds = tuple(map(float, buckets or ()))
        if any(not low < high for low, high in pairwise(bounds)):
            raise self.error(f"Error when creating Metric: buckets must be ascending, got {list(bounds)}")
        key = tuple((str(name), str(value)) for name, value in (labels or {}).items())
        for name, _ in key:
            if not _LABEL.fullmatch(name):
                raise self.error(f"Error when creating Metric: '{name}' is not a label's name")
        with self.registry.lock:
            series = self._family.series.get(key)
            if series is None:
                series = self._family.series[key] = _Series(bounds)
        if series.bounds != bounds:
            raise self.error(f"Error when creating Metric: it exists already with the buckets {list(series.bounds)}")
        return self.metric(self, series)


def _lines(family: _Family) -> Iterator[str]:
    series = list(family.series.items())
    if not series:
        return
    yield f"# HELP {family.name} {family.description.translate(_HELP_ESCAPES)}"
    yield f"# TYPE {family.name} {family.kind.value}"
    for labels, values in series:
        if family.kind is not MetricKind.HISTOGRAM:
            yield f"{family.name}{_braced(labels)} {_number(values.value)}"
            continue
        bounds = [*map(_number, values.bounds), "+Inf"]
        for bound, count in zip(bounds, accumulate(values.counts), strict=True):
            yield f"{family.name}_bucket{_braced((*labels, ('le', bound)))} {count}"
        yield f"{family.name}_sum{_braced(labels)} {_number(values.value)}"
        yield f"{family.name}_count{_braced(labels)} {sum(values.counts)}"


def _braced(labels: Labels) -> str:
    inner = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels)
    return f"{{{inner}}}" if inner else ""


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
