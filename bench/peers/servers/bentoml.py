"""The model behind BentoML: `PEER_MODEL=mlp bentoml serve bench.peers.servers.bentoml:Infer`."""

import os

import bentoml
import numpy as np

from bench.peers.models import MODELS, Predictor

NAME = os.environ["PEER_MODEL"]
# Rows of one length are an array; those of mixed lengths it can only join as lists.
Rows = list[list[int]] if MODELS[NAME].dims == (-1,) else np.ndarray


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Infer:
    def __init__(self) -> None:
        self.predict_batch = Predictor(NAME)

    # What it predicts to take longer than max_latency_ms it refuses, so that is as long as anybody waits.
    @bentoml.api(batchable=True, max_batch_size=MODELS[NAME].max_rows, max_latency_ms=60_000)
    def predict(self, x: Rows) -> list[list[float]]:  # type: ignore[valid-type]  # chosen above
        return self.predict_batch(x)
