# mypy: ignore-errors
"""Asks other models, as its input MODE says, and gives back what they answer, as text."""

import numpy as np
import triton_python_backend_utils as pb_utils


def addends():
    return [
        pb_utils.Tensor("INPUT0", np.arange(4, dtype=np.float32).reshape((1, 4))),
        pb_utils.Tensor("INPUT1", np.ones((1, 4), dtype=np.float32)),
    ]


def ask(name, outputs=("OUTPUT0", "OUTPUT1"), inputs=None, **options):
    inputs = addends() if inputs is None else inputs
    return pb_utils.InferenceRequest(
        model_name=name, requested_output_names=list(outputs), inputs=list(inputs), **options
    )


def told(response):
    if response.has_error():
        return f"error: {response.error().message()}"
    return "; ".join(f"{t.name()} {t.as_numpy().tolist()}" for t in response.output_tensors())


def attempt(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def count(n):
    return [pb_utils.Tensor("COUNT", np.array([n], dtype=np.int32))]


MODES = {
    "one": lambda: told(ask("add_sub").exec()),
    "one output": lambda: told(ask("add_sub", ["OUTPUT1"]).exec()),
    "a version": lambda: told(ask("add_sub", model_version=1).exec()),
    "an unknown version": lambda: told(ask("add_sub", model_version=9).exec()),
    "an unknown model": lambda: told(ask("absent").exec()),
    "a wrong input": lambda: told(ask("add_sub", inputs=addends()[:1]).exec()),
    "an unknown output": lambda: told(ask("add_sub", ["OTHER"]).exec()),
    "failing": lambda: told(
        ask("failing", ["OUTPUT0"], [pb_utils.Tensor("MODE", np.array([b"error"], dtype=object))]).exec()
    ),
    "no outputs": lambda: attempt(lambda: told(ask("add_sub", []).exec())),
    "no model": lambda: attempt(lambda: told(ask("", ["OUTPUT0"]).exec())),
    "decoupled": lambda: " | ".join(told(r) for r in ask("repeat", ["INDEX"], count(3)).exec(decoupled=True)),
    "decoupled none": lambda: " | ".join(told(r) for r in ask("repeat", ["INDEX"], count(0)).exec(decoupled=True)),
    "decoupled as one": lambda: told(ask("repeat", ["INDEX"], count(1)).exec()),
    "one as decoupled": lambda: " | ".join(told(r) for r in ask("add_sub").exec(decoupled=True)),
    "echo": lambda: told(
        ask(
            "echo",
            ["REQUEST"],
            [pb_utils.Tensor("INPUT0", np.zeros((1, 1), dtype=np.float32))],
            request_id="inner",
            correlation_id=7,
            flags=1,
            parameters={"a": 1, "b": "two", "c": True},
        ).exec()
    ),
    "ready": lambda: " ".join(
        str(pb_utils.is_model_ready(*name)) for name in [("add_sub",), ("add_sub", "9"), ("no",)]
    ),
}  # fmt: skip


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            mode = pb_utils.get_input_tensor_by_name(request, "MODE").as_numpy()[0].decode()
            text = np.array([MODES[mode]()], dtype=object)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", text)]))
        return responses
