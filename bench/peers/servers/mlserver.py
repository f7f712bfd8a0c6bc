"""The model behind MLServer: a runtime of its own, which model-settings.json names."""

import os

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.peers.models import Predictor


class Infer(MLModel):
    async def load(self) -> bool:
        self.predictor = Predictor(os.environ["PEER_MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        batch = NumpyCodec.decode_input(payload.inputs[0])
        answer = self.predictor.run(batch)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", answer)])
