# mypy: ignore-errors
"""Counts in metrics of its own."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        kinds = pb_utils.MetricFamily
        self.counters = kinds(name="custom_requests", description="Requests met", kind=kinds.COUNTER)
        self.counter = self.counters.Metric(labels={"model": args["model_name"], "kind": "all"})
        self.gauges = kinds(name="custom_level", description="A level", kind=kinds.GAUGE)
        self.gauge = self.gauges.Metric(labels={"model": args["model_name"]})

    def execute(self, requests):
        responses = []
        for _ in requests:
            self.counter.increment(2)
            self.gauge.set(7)
            self.gauge.increment(-2.5)
            text = np.array([f"{self.counter.value()} {self.gauge.value()}"], dtype=object)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", text)]))
        return responses
