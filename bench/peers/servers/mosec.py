"""The model behind mosec: `PEER_MODEL=mlp python -m bench.peers.servers.mosec --address 127.0.0.1 --port 8000`."""

import os

from mosec import Server, Worker

from bench.peers.models import MODELS, Predictor

NAME = os.environ["PEER_MODEL"]


class Infer(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.predict = Predictor(NAME)

    def forward(self, data: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
        return [{"y": answer} for answer in self.predict([each["x"] for each in data])]


if __name__ == "__main__":
    server = Server()
    # A wait of 1 ms is the least that it takes.
    server.append_worker(Infer, num=1, max_batch_size=MODELS[NAME].max_rows, max_wait_time=1, timeout=60)
    server.run()
