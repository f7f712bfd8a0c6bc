"""The model behind Ray Serve: `PEER_MODEL=mlp PEER_FOLDER=run python -m bench.peers.servers.ray PORT`.

SIGHUP deploys it again, with a replica that is new.
"""

import os
import signal
import sys
import time
from pathlib import Path

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from bench.peers.models import MODELS, Predictor

NAME = os.environ["PEER_MODEL"]
MEMORY = 256 << 20  # bytes for its object store, which these requests do not use


# Fewer requests under way than this at a time would keep the batches from filling.
@serve.deployment(num_replicas=1, max_ongoing_requests=512, ray_actor_options={"num_cpus": 1})
class Infer:
    def __init__(self) -> None:
        self.predictor = Predictor(NAME)

    @serve.batch(max_batch_size=MODELS[NAME].max_rows, batch_wait_timeout_s=0.001)
    async def predict(self, rows: list[list[float]]) -> list[list[float]]:
        return self.predictor(rows)

    async def __call__(self, request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse({"y": await self.predict(body["x"])})  # with a length, where a dict comes in chunks


if __name__ == "__main__":
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=MEMORY, log_to_driver=False,
        _node_ip_address="127.0.0.1", _temp_dir=os.environ["PEER_FOLDER"],
    )  # fmt: skip
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config={"enable_access_log": False}
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    serve.run(Infer.bind())  # type: ignore[attr-defined]  # the decorator makes another class of it
    while signal.sigwait({signal.SIGHUP}):
        # It replaces a replica only if something about it is new: here a variable that nobody reads.
        new = {"env_vars": {"DEPLOYED": str(time.time())}}
        options = {"num_cpus": 1, "runtime_env": new}
        serve.run(Infer.options(ray_actor_options=options).bind())  # type: ignore[attr-defined]
        Path(os.environ["PEER_FOLDER"], "redeployed").touch()
