# mypy: ignore-errors
"""Its strings in capitals, their lengths, and all of them joined."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            upper = np.array([t.upper() for t in texts.ravel()], dtype=object).reshape(texts.shape)
            length = np.array([len(t) for t in texts.ravel()], dtype=np.int32).reshape(texts.shape)
            joined = np.array([[b" ".join(row.ravel())] for row in texts], dtype=object)
            outputs = [pb_utils.Tensor("UPPER", upper), pb_utils.Tensor("LENGTH", length)]
            responses.append(pb_utils.InferenceResponse([*outputs, pb_utils.Tensor("JOINED", joined)]))
        return responses
