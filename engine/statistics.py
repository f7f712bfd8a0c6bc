"""What the versions of models have done, counted in Triton's terms (PROTOCOL.md section 8.2).

It is counted where a batch ends and where a request leaves without one, and nowhere else: `Statistics` is what a
`Batcher` tells of each.
"""

import time
from collections.abc import Sequence
from typing import Any

from batching import Item

# Why a request failed, in the words of Triton's metrics. Those that no queue had room for are counted nowhere there.
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")

# What an execution is made of: stacking its inputs, running the model, splitting its outputs.
PARTS = ("compute_input", "compute_infer", "compute_output")

# What a decoupled model's response may be, in Triton's words, and which parts of it are counted then. One that carries
# nothing, and only says that no other comes, has no output; one that nobody waited for any more counts as that alone.
OUTCOMES = {
    "success": ("compute_infer", "compute_output"),
    "fail": ("compute_infer", "compute_output"),
    "empty_response": ("compute_infer",),
    "cancel": (),
}

# Responses of one request that are told apart: those that come after so many are counted nowhere.
MOST_RESPONSES = 1024


class Span:
    """How often something happened, and how long it took in all."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds

    def json(self) -> dict[str, int]:
        return {"count": self.count, "ns": round(self.seconds * 1e9)}


class Statistics:
    """Of one version of a model, since it was loaded.

    Attributes:
        rows: of successful requests that were computed.
        executions: batches that ran, failed ones too.
        last: milliseconds since the epoch at the end of the latest.
        success, fail: requests, from their arrival to their answer.
        failed: those that failed, by reason.
        queue: of successful requests that were computed, from arrival to the start of their batch.
        parts: of the same, by part; each has all of its batch's time.
        hits, misses: looks into the response cache, and the time that they took.
        sizes: rows of a batch -> its parts.
        responses: of a decoupled model, by their index in their request: each of their parts and of OUTCOMES.
        spans: seconds of each part of the batch that ran last, told by whoever ran it before `ran` is called.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.executions = 0
        self.last = 0
        self.success, self.fail = Span(), Span()
        self.failed = dict.fromkeys(REASONS, 0)
        self.queue = Span()
        self.parts = [Span() for _ in PARTS]
        self.hits, self.misses = Span(), Span()
        self.sizes: dict[int, list[Span]] = {}
        self.responses: list[dict[str, Span]] = []
        self.spans: Sequence[float] = (0.0,) * len(PARTS)

    def ran(self, items: Sequence[Item[Any, Any]], results: Sequence[object] | None, started: float) -> None:
        """A batch ran; see `batching.batcher.Counts`."""
        ended, good, rows = time.monotonic(), items, sum([item.rows for item in items])
        self.executed(rows)
        if results is None:
            return
        # An error that a Python model itself gave as its response is a response, in Triton's book a successful one.
        failed = [
            item
            for item, result in zip(items, results, strict=False)
            if isinstance(result, Exception) and not hasattr(result, "triton_error")
        ]
        if failed:
            good = [item for item in items if item not in failed]
            rows = sum([item.rows for item in good])
            for item in failed:
                self.lost("BACKEND", ended - item.enqueued)
        count, arrived = len(good), sum([item.enqueued for item in good])
        self.rows += rows
        parts = zip(self.parts, [count * seconds for seconds in self.spans], strict=True)
        for span, total in ((self.success, count * ended - arrived), (self.queue, count * started - arrived), *parts):
            span.count += count
            span.seconds += total

    def executed(self, rows: int) -> None:
        """The model ran once on so many rows, and took `spans`."""
        self.executions += 1
        self.last = int(time.time() * 1000)
        sizes = self.sizes.get(rows)
        if sizes is None:
            sizes = self.sizes[rows] = [Span() for _ in PARTS]
        for part, seconds in zip(sizes, self.spans, strict=True):
            part.count += 1
            part.seconds += seconds

    def warmed(self, requests: int) -> None:
        """A warm-up sample of so many requests of one row ran, and took `spans`. It counts, as in Triton."""
        self.executed(requests)
        self.rows += requests
        for span in (self.success, self.queue):
            span.add(0.0, requests)
        self.success.seconds += sum(self.spans)
        for part, seconds in zip(self.parts, self.spans, strict=True):
            part.add(requests * seconds, requests)

    def lost(self, reason: str, seconds: float) -> None:
        """A request failed, one of REASONS, so long after its arrival."""
        self.failed[reason] += 1
        self.fail.add(seconds)

    def hit(self, seconds: float, looked: float) -> None:
        """A request was answered from the cache after so long, `looked` of it looking there."""
        self.success.add(seconds)
        self.queue.add(0.0)
        self.hits.add(looked)

    def responded(self, index: int, outcome: str, infer: float, output: float) -> None:
        """A decoupled model gave a response, one of OUTCOMES, the `index`-th to its request, from 0.

        Args:
            infer: seconds since the response before it, or since its batch began.
            output: seconds from the model to whoever reads it.
        """
        if index >= MOST_RESPONSES:
            return
        while len(self.responses) <= index:
            self.responses.append({name: Span() for name in (*PARTS[1:], *OUTCOMES)})
        spans, parts = self.responses[index], {"compute_infer": infer, "compute_output": output}
        for part in OUTCOMES[outcome]:
            spans[part].add(parts[part])
        spans[outcome].add(infer + output)

    def json(self) -> dict[str, Any]:
        """As the statistics extension has it, all but the model's name and version."""
        spans = {
            "success": self.success, "fail": self.fail, "queue": self.queue,
            **dict(zip(PARTS, self.parts, strict=True)),
            "cache_hit": self.hits, "cache_miss": self.misses,
        }  # fmt: skip
        return {
            "last_inference": self.last,
            "inference_count": self.rows,
            "execution_count": self.executions,
            "inference_stats": {name: span.json() for name, span in spans.items()},
            "response_stats": {
                str(index): {name: span.json() for name, span in spans.items()}
                for index, spans in enumerate(self.responses)
            },
            "batch_stats": [
                {"batch_size": rows, **{name: part.json() for name, part in zip(PARTS, parts, strict=True)}}
                for rows, parts in sorted(self.sizes.items())
            ],
            "memory_usage": [],
        }
