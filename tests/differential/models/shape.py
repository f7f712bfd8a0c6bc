# mypy: ignore-errors
"""Gives back its input, and the shape in which it came."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            array = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            shape = np.array(array.shape, dtype=np.int64).reshape((1, -1))
            responses.append(
                pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", array), pb_utils.Tensor("SHAPE", shape)])
            )
        return responses
