"""The model behind LitServe: `PEER_MODEL=mlp python -m bench.peers.servers.litserve PORT`."""

import os
import sys

import litserve
import numpy as np
from numpy.typing import NDArray

from bench.peers.models import MODELS, Predictor, Row

NAME = os.environ["PEER_MODEL"]


class Infer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.predictor = Predictor(NAME)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # an annotation would be a schema to check
        return request["x"]

    def batch(self, inputs: list[list[float]]) -> Row:
        return self.predictor.stack(inputs)

    def predict(self, batch: Row) -> NDArray[np.float32]:
        return self.predictor.run(batch)

    def unbatch(self, output: NDArray[np.float32]) -> list[list[float]]:
        answers: list[list[float]] = output.tolist()
        return answers

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        return {"y": output}


if __name__ == "__main__":
    # Its default of no wait polls without a pause, and takes a whole core from whatever else runs.
    api = Infer(max_batch_size=MODELS[NAME].max_rows, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False, log_level="warning"
    )
