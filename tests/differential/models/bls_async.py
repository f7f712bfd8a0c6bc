# mypy: ignore-errors
"""Asks another model several times at once, in an execute that is a coroutine."""

import asyncio

import numpy as np
import triton_python_backend_utils as pb_utils


async def ask(name, step):
    inputs = [pb_utils.Tensor(n, np.full((1, 4), step, dtype=np.float32)) for n in ("INPUT0", "INPUT1")]
    request = pb_utils.InferenceRequest(model_name=name, requested_output_names=["OUTPUT0"], inputs=inputs)
    response = await request.async_exec()
    if response.has_error():
        return f"error: {response.error().message()}"
    return str(response.output_tensors()[0].as_numpy().tolist())


class TritonPythonModel:
    async def execute(self, requests):
        responses = []
        for request in requests:
            name = pb_utils.get_input_tensor_by_name(request, "MODEL").as_numpy()[0].decode()
            texts = await asyncio.gather(*(ask(name, step) for step in range(3)))
            text = np.array([" | ".join(texts)], dtype=object)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", text)]))
        return responses
