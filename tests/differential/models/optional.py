# mypy: ignore-errors
"""A, plus B if it was given; and which inputs were given."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a = pb_utils.get_input_tensor_by_name(request, "A").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "B")
            given = np.array([[b",".join(sorted(t.name().encode() for t in request.inputs()))]], dtype=object)
            total = a if b is None else a + b.as_numpy()
            responses.append(
                pb_utils.InferenceResponse([pb_utils.Tensor("SUM", total), pb_utils.Tensor("GIVEN", given)])
            )
        return responses
