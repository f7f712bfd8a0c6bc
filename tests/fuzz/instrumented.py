"""Fuzz one target in this process: python -m tests.fuzz.instrumented TARGET FILE LIBFUZZER-ARGUMENTS.

A finding is written to FILE, and ends the process. Use tests/fuzz/guided.py, which starts it, and reads what it leaves
behind.
"""

import os
import sys
import traceback
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["asgi_app", "batching", "engine", "google.protobuf.json_format", "google.protobuf.text_format"]
):
    from tests.fuzz import targets


def main(name: str, file: str, *arguments: str) -> None:
    target = getattr(targets, name)

    def one(data: bytes) -> None:
        try:
            targets.attempt(target, data)
        except Exception:
            # Not left to libFuzzer: its alarm clock may end the process while Python is still taking it down.
            traceback.print_exc()
            Path(file).write_bytes(data)
            os._exit(1)

    warnings.simplefilter("error")
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
