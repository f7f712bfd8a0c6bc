# mypy: ignore-errors
"""What a request says besides its tensors, as JSON text."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            said = {
                "parameters": json.loads(request.parameters()),
                "id": request.request_id(),
                "correlation_id": request.correlation_id(),
                "flags": request.flags(),
                "timeout": request.timeout(),
                "outputs": sorted(request.requested_output_names()),
                "inputs": sorted(t.name() for t in request.inputs()),
                "cancelled": request.is_cancelled(),
            }
            text = np.array([[json.dumps(said, sort_keys=True)]], dtype=object)
            outputs = [pb_utils.Tensor("REQUEST", text), pb_utils.Tensor("OTHER", text)]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
