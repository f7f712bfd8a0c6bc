"""What is counted, in Prometheus' text format 0.0.4 (PROTOCOL.md section 8.1).

Triton's names with their units, and ours in base units. Triton's counters have no `_total` at the end, which is why the
text is written here and not by a client library.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from batching.journal import SECONDS

from .custom_metrics import render as render_custom
from .loading import Served
from .statistics import REASONS, Statistics

# name, help, what of a version's statistics it is. All are counters, durations in whole microseconds.
COUNTERS: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("nv_inference_request_success", "Number of successful inference requests, all batch sizes",
     lambda counts: counts.success.count),
    ("nv_inference_count", "Number of inferences performed (does not include cached requests)",
     lambda counts: counts.rows),
    ("nv_inference_exec_count", "Number of model executions performed (does not include cached requests)",
     lambda counts: counts.executions),
    ("nv_inference_request_duration_us",
     "Cumulative inference request duration in microseconds (includes cached requests)",
     lambda counts: 1e6 * (counts.success.seconds + counts.fail.seconds)),
    ("nv_inference_queue_duration_us",
     "Cumulative inference queuing duration in microseconds (includes cached requests)",
     lambda counts: 1e6 * counts.queue.seconds),
    ("nv_inference_compute_input_duration_us",
     "Cumulative compute input duration in microseconds (does not include cached requests)",
     lambda counts: 1e6 * counts.parts[0].seconds),
    ("nv_inference_compute_infer_duration_us",
     "Cumulative compute inference duration in microseconds (does not include cached requests)",
     lambda counts: 1e6 * counts.parts[1].seconds),
    ("nv_inference_compute_output_duration_us",
     "Cumulative inference compute output duration in microseconds (does not include cached requests)",
     lambda counts: 1e6 * counts.parts[2].seconds),
)  # fmt: skip

FAILURES = ("nv_inference_request_failure", "Number of failed inference requests, all batch sizes")

# Those of models with a response cache.
CACHE: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("nv_cache_num_hits_per_model", "Number of cache hits per model", lambda counts: counts.hits.count),
    ("nv_cache_num_misses_per_model", "Number of cache misses per model", lambda counts: counts.misses.count),
    ("nv_cache_hit_duration_per_model", "Total cache hit duration per model, in microseconds",
     lambda counts: 1e6 * counts.hits.seconds),
    ("nv_cache_miss_duration_per_model", "Total cache miss duration per model, in microseconds",
     lambda counts: 1e6 * counts.misses.seconds),
)  # fmt: skip

# name, type, help, (labels, value) of each sample of a version: from its journal and its queue, since it was loaded.
OURS: tuple[tuple[str, str, str, Callable[[Served], Iterable[tuple[Mapping[str, str], float]]]], ...] = (
    ("millrace_queue_items", "gauge", "Requests that wait", lambda served: [({}, len(served.batcher.pending))]),
    ("millrace_queue_rows", "gauge", "Rows that wait", lambda served: [({}, served.batcher.pending.rows)]),
    ("millrace_queue_bytes", "gauge", "Bytes that wait", lambda served: [({}, served.batcher.pending.nbytes)]),
    ("millrace_active_requests", "gauge", "Requests under way", lambda served: [({}, served.active)]),
    ("millrace_batches_total", "counter", "Batches, by why they left the queue",
     lambda served: [({"reason": reason}, count) for reason, count in sorted(served.batcher.journal.reasons.items())]),
    ("millrace_batch_rows_total", "counter", "Batches, by their rows",
     lambda served: [({"rows": str(rows)}, count) for rows, count in sorted(served.batcher.journal.sizes.items())]),
    ("millrace_work_units_total", "counter", "Units of work that were asked for: rows, or tokens",
     lambda served: [({}, served.batcher.journal.tokens)]),
    ("millrace_padded_work_units_total", "counter", "Units of work that were done, padding included",
     lambda served: [({}, served.batcher.journal.cost)]),
    ("millrace_dropped_total", "counter", "Requests without a result, by reason", lambda served: _dropped(served)),
)  # fmt: skip

HISTOGRAMS: tuple[tuple[str, str, Callable[[Served], Any]], ...] = (
    ("millrace_queue_wait_seconds", "Time from a request's arrival until its batch was sealed",
     lambda served: served.batcher.journal.waits),
    ("millrace_batch_seconds", "Time that a batch took on its lane", lambda served: served.batcher.journal.times),
)  # fmt: skip


class Metrics:
    """What was counted before the present versions of models were loaded: a reload sets back no counter of Triton's."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], dict[tuple[str, str], float]] = {}  # (model, version) -> (name, reason) ->
        self._retiring: dict[Served, tuple[str, str]] = {}  # that still answer what came to them

    def replaced(self, old: Iterable[Served], new: Iterable[Served]) -> None:
        """These versions took the place of those."""
        stays = {served.version for served in new}
        for served in old:
            key = served.stored.config.name, served.version
            if served.version in stays:
                self._retiring[served] = key
            else:
                self._forget(key)

    def removed(self, old: Iterable[Served]) -> None:
        """These versions are not served any more: their series vanish, and begin at 0 if they come back."""
        for served in old:
            self._forget((served.stored.config.name, served.version))

    def _forget(self, key: tuple[str, str]) -> None:
        self._before.pop(key, None)
        self._retiring = {served: its for served, its in self._retiring.items() if its != key}

    def retired(self, served: Served) -> None:
        """A version that was replaced has answered everything that came to it."""
        if (key := self._retiring.pop(served, None)) is not None:
            before = self._before.setdefault(key, {})
            for name, value in _counted(served).items():
                before[name] = before.get(name, 0.0) + value

    def _counts(self, served: Served) -> dict[tuple[str, str], float]:
        """Its own, and those of the copies that it took the place of."""
        key = served.stored.config.name, served.version
        values = _counted(served)
        others = [_counted(other) for other, its in self._retiring.items() if its == key]
        for more in (self._before.get(key, {}), *others):
            for name, value in more.items():
                values[name] += value
        return values

    def render(self, models: list[Served]) -> str:
        """The whole text; `models` are the versions that are served."""
        lines: list[str] = []
        counts = [self._counts(served) for served in models]
        labels = [_labels(served) for served in models]
        for name, text, _ in COUNTERS[:1]:
            _family(lines, name, "counter", text)
            lines += [f"{name}{{{_join(own)}}} {of[name, '']:.0f}" for own, of in zip(labels, counts, strict=True)]
        name, text = FAILURES
        _family(lines, name, "counter", text)
        for own, of in zip(labels, counts, strict=True):
            lines += [f"{name}{{{_join(own | {'reason': reason})}}} {of[name, reason]:.0f}" for reason in REASONS]
        for name, text, _ in COUNTERS[1:]:
            _family(lines, name, "counter", text)
            lines += [f"{name}{{{_join(own)}}} {of[name, '']:.0f}" for own, of in zip(labels, counts, strict=True)]
        _family(lines, "nv_inference_pending_request_count", "gauge",
                "Instantaneous number of pending requests awaiting execution per-model.")  # fmt: skip
        for own, served in zip(labels, models, strict=True):
            lines.append(f"nv_inference_pending_request_count{{{_join(own)}}} {len(served.batcher.pending)}")
        _family(lines, "nv_model_load_duration_secs", "gauge", "Model load time in seconds")
        for own, served in zip(labels, models, strict=True):
            lines.append(f"nv_model_load_duration_secs{{{_join(own)}}} {served.seconds:.6g}")
        cached = [at for at, served in enumerate(models) if served.stored.config.cache]
        for name, text, _ in CACHE if cached else ():
            _family(lines, name, "counter", text)
            lines += [f"{name}{{{_join(labels[at])}}} {counts[at][name, '']:.0f}" for at in cached]
        for name, kind, text, samples in OURS:
            _family(lines, name, kind, text)
            for own, served in zip(labels, models, strict=True):
                lines += [f"{name}{{{_join(own | dict(more))}}} {value:.0f}" for more, value in samples(served)]
        for name, text, histogram in HISTOGRAMS:
            _family(lines, name, "histogram", text)
            for own, served in zip(labels, models, strict=True):
                lines += _histogram(name, own, histogram(served))
        lines += render_custom()
        return "\n".join(lines) + "\n"


def _counted(served: Served) -> dict[tuple[str, str], float]:
    counts = served.model.statistics
    values = {(name, ""): value(counts) for name, _, value in (*COUNTERS, *CACHE)}
    return values | {(FAILURES[0], reason): counts.failed[reason] for reason in REASONS}


def _dropped(served: Served) -> Iterator[tuple[Mapping[str, str], float]]:
    journal = served.batcher.journal
    for error, count in sorted(journal.refused.items()):
        yield {"reason": error}, count
    yield {"reason": "expired"}, journal.expired
    for stage, count in journal.left.items():
        yield {"reason": f"left_{stage}"}, count


def _family(lines: list[str], name: str, kind: str, text: str) -> None:
    lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _labels(served: Served) -> dict[str, str]:
    tags = {f"_{name}": value for name, value in served.stored.config.metric_tags.items()}  # as Triton has them
    return {"model": served.stored.config.name, "version": served.version, **tags}


def _join(labels: Mapping[str, str]) -> str:
    return ",".join([f'{name}="{_escape(value)}"' for name, value in labels.items()])


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _histogram(name: str, labels: Mapping[str, str], histogram: Any) -> list[str]:
    lines, total = [], 0
    for bound, count in zip((*map(str, SECONDS), "+Inf"), histogram.counts, strict=True):
        total += count
        lines.append(f"{name}_bucket{{{_join({**labels, 'le': bound})}}} {total}")
    return [*lines, f"{name}_sum{{{_join(labels)}}} {histogram.total:.9g}", f"{name}_count{{{_join(labels)}}} {total}"]
