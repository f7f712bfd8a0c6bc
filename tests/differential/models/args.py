# mypy: ignore-errors
"""What a model is told when it is initialised, and what the utility functions make of it, as JSON text."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        told = {key: value for key, value in args.items() if key != "model_config"}
        told["types"] = sorted({type(value).__name__ for value in args.values()})
        told["config"] = config
        told["input"] = pb_utils.get_input_config_by_name(config, "INPUT0")
        told["output"] = pb_utils.get_output_config_by_name(config, "ARGS")
        told["absent"] = pb_utils.get_output_config_by_name(config, "ABSENT")
        told["decoupled"] = pb_utils.using_decoupled_model_transaction_policy(config)
        told["numpy"] = np.dtype(pb_utils.triton_string_to_numpy("TYPE_FP32")).name
        told["folder"] = pb_utils.get_model_dir()
        self.text = np.array([json.dumps(told, sort_keys=True)], dtype=object)

    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("ARGS", self.text)]) for _ in requests]
