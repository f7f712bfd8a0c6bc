# mypy: ignore-errors
"""Answers through the response sender, though it is not decoupled; misuses it in the way that MODE names."""

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def attempt(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return str(error)
    return "no error"


def answer(text):
    return pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", np.array([text], dtype=object))])


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            mode = pb_utils.get_input_tensor_by_name(request, "MODE").as_numpy()[0].decode()
            sender = request.get_response_sender()
            if mode == "nothing":
                text = attempt(sender.send)
            elif mode == "unknown flag":
                text = attempt(sender.send, answer("x"), flags=8)
            elif mode == "final first":
                text = attempt(sender.send, flags=FINAL)
            else:
                text = f"cancelled: {request.is_cancelled()} {sender.is_cancelled()}"
            sender.send(answer(text), flags=FINAL)
        return
