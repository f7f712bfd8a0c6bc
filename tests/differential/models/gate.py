# mypy: ignore-errors
"""Waits until the file that it is given the name of exists; an empty name is no wait."""

import os
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            path = pb_utils.get_input_tensor_by_name(request, "FILE").as_numpy()[0, 0].decode()
            limit = time.monotonic() + 20
            while path and not os.path.exists(path) and time.monotonic() < limit:
                time.sleep(0.01)
            rows = np.array([[len(requests)]], dtype=np.int32)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("TOGETHER", rows)]))
        return responses
