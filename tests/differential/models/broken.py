# mypy: ignore-errors
"""Cannot be initialised."""


class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("cannot start")

    def execute(self, requests):
        return []
