"""The model behind Triton's python backend: the model.py of its repository, which says where this checkout is.

The backend's interpreter is isolated from PYTHONPATH, so the path comes with the config.
"""

import json
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        sys.path.insert(0, json.loads(args["model_config"])["parameters"]["checkout"]["string_value"])
        from bench.peers.models import Predictor

        self.predictor = Predictor(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        if self.predictor.model.dims == (-1,):  # ragged: each as long as it is
            batch = self.predictor.stack([row for rows in inputs for row in rows])
        else:
            batch = np.concatenate(inputs)
        answers = np.split(self.predictor.run(batch), np.cumsum([len(rows) for rows in inputs])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", answer)]) for answer in answers]
