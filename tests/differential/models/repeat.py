# mypy: ignore-errors
"""Decoupled: COUNT responses with their index; the one at FAIL_AT is an error; the final flag comes alone if ALONE."""

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            values = {t.name(): int(t.as_numpy().ravel()[0]) for t in request.inputs()}
            count, fail_at, alone = values["COUNT"], values.get("FAIL_AT", -1), values.get("ALONE", 1)
            sender = request.get_response_sender()
            for index in range(count):
                last = index == count - 1 and not alone
                if index == fail_at:
                    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"failed at {index}"))
                else:
                    response = pb_utils.InferenceResponse([pb_utils.Tensor("INDEX", np.array([index], dtype=np.int32))])
                sender.send(response, flags=FINAL if last else 0)
            if alone or not count:
                sender.send(flags=FINAL)
