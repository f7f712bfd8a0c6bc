# mypy: ignore-errors
"""Has no execute."""


class TritonPythonModel:
    pass
