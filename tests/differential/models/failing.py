# mypy: ignore-errors
"""Fails in the way that MODE names."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        output = pb_utils.Tensor("OUTPUT0", np.array([1, 2], dtype=np.int32))
        mode = pb_utils.get_input_tensor_by_name(requests[0], "MODE").as_numpy()[0].decode()
        good = pb_utils.InferenceResponse([output])
        if mode.startswith("code:"):
            code = getattr(pb_utils.TritonError, mode[5:])
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"as {mode[5:]}", code))]
        if mode == "error":
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError("no code"))]
        if mode == "error with outputs":
            return [pb_utils.InferenceResponse([output], pb_utils.TritonError("in spite of outputs"))]
        if mode == "ValueError":
            raise ValueError("a text")
        if mode == "KeyError":
            return {}["absent"]
        if mode == "TritonModelException":
            raise pb_utils.TritonModelException("a model's text")
        returns = {
            "good": [good],
            "too few": [],
            "too many": [good, good],
            "not a list": "text",
            "a tuple": (good,),
            "wrong element": ["text"],
            "no outputs": [pb_utils.InferenceResponse([])],
            "another name": [pb_utils.InferenceResponse([pb_utils.Tensor("OTHER", np.array([1], dtype=np.int32))])],
            "an extra output": [
                pb_utils.InferenceResponse([output, pb_utils.Tensor("OTHER", np.array([1], dtype=np.int32))])
            ],
            "another datatype": [
                pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", np.array([1.5, 2], dtype=np.float32))])
            ],
            "another shape": [
                pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", np.zeros((1, 3), dtype=np.int32))])
            ],
            "nothing in it": [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", np.zeros((0,), dtype=np.int32))])],
            "strings": [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", np.array([b"a\xff", "é"], object))])],
        }  # fmt: skip
        return returns[mode]
