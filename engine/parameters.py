"""The entries of `parameters` in a config: PARAMETERS, OF_THE_MODEL, pad.NAME; BACKEND_PARAMETERS of a backend's own.

Each is text, which has a reader here. Entries that are nobody's are let through, as in Triton, unless they are nearly
one of these, or another backend's: then somebody meant something, and is told. Pure, as config.py is.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from .errors import ConfigError
from .types import DATATYPES

# Whole numbers up to this one are exact as a float.
MOST_EXACT = 2**53 - 1

# Numbers that one grid may have, and the largest length in it.
MOST_SIZES = 512
MOST_LENGTH = 2**31 - 1

Refuse = Callable[[str], ConfigError]  # what is wrong, from the field on -> the error, which names the file

# How a parameter's text is read, with ValueError if it does not fit, and what it must be.
Reader = tuple[Callable[[str], Any], str]


def _seconds(milliseconds: str) -> float:
    value = float(milliseconds) / 1000
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _tokens(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST_EXACT:
        raise ValueError
    return value


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.replace(",", " ").split()))
    if not 1 <= len(sizes) <= MOST_SIZES or max(sizes) > MOST_LENGTH:
        raise ValueError
    return sizes


def _padding(datatype: str, text: str) -> float:
    value, dtype = float(text), DATATYPES[datatype]
    if dtype.kind in "fV":  # numpy does not know what kind bfloat16 is
        most = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        fits = "inf" in text.lower() or abs(value) <= most  # infinite only if it says so
    else:
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        fits = value.is_integer() and max(low, -MOST_EXACT) <= value <= min(high, MOST_EXACT)
    if not fits:
        raise ValueError
    return value


def boolean(text: str) -> bool:
    """Whether a parameter is true. Raises ValueError if it is neither true nor false."""
    if text.lower() not in ("true", "false", "1", "0", "on", "off"):
        raise ValueError
    return text.lower() in ("true", "1", "on")


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MOST_LENGTH:
        raise ValueError
    return value


def _bit(text: str) -> int:
    if text not in ("0", "1"):
        raise ValueError
    return int(text)


def _precision(text: str) -> str:
    if text not in ("bf16", "bf16-emulated"):
        raise ValueError
    return text


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict) or not isinstance(value.get("options", {}), dict):
        raise ValueError
    return value


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


_SIZES = f"whole numbers, at most {MOST_SIZES}, none above {MOST_LENGTH}, with spaces or commas between them"

# Our parameters: key -> (attribute of Policy, how its text is read, what the text must be). There is also pad.NAME, the
# padding value of the ragged input NAME.
PARAMETERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "latency_objective_ms": ("objective", _seconds, "a positive number of milliseconds"),
    "patience_ms": ("patience", _seconds, "a positive number of milliseconds"),
    "max_batch_tokens": ("max_cost", _tokens, f"a whole number from 1 to {MOST_EXACT}"),
    "padded_lengths": ("lengths", _sizes, _SIZES),
    "padded_rows": ("row_grid", _sizes, _SIZES),
    "max_padding": ("max_padding", float, "a number from 0 to 1"),
}
NEED_RAGGED = frozenset({"max_batch_tokens", "padded_lengths", "max_padding"})
NEED_BATCHING = frozenset({"latency_objective_ms"})
NEED_ROWS = frozenset({"padded_rows"})  # a request that is run alone is padded too

# Those that a Python model does not have for itself; nothing of it is stacked or padded.
OF_THE_QUEUE = ("latency_objective_ms", "patience_ms")

_BOOLEAN: Reader = (boolean, "true or false")
_COUNT: Reader = (_count, "a whole number, 0 or more")
_BIT: Reader = (_bit, "0 or 1")
_PRECISION: Reader = (_precision, "bf16, or bf16-emulated on a CPU that has no bf16")
_JSON: Reader = (_json_object, "a JSON object, of torch.compile's arguments by name")

# Ours that every model may have, and that are not the queue's: `resend` is ModelMetadata's.
OF_THE_MODEL: dict[str, Reader] = {"resend": _BOOLEAN}

# backend -> its own parameters (PROTOCOL.md section 5.11). ONNX Runtime is given session.* as it is.
BACKEND_PARAMETERS: dict[str, dict[str, Reader]] = {
    "pytorch": {
        "INFERENCE_MODE": _BOOLEAN,
        "DISABLE_OPTIMIZED_EXECUTION": _BOOLEAN,
        "DISABLE_CUDNN": _BOOLEAN,
        "ENABLE_WEIGHT_SHARING": _BOOLEAN,
        "ENABLE_CACHE_CLEANING": _BOOLEAN,
        "ENABLE_JIT_EXECUTOR": _BOOLEAN,
        "ENABLE_JIT_PROFILING": _BOOLEAN,
        "ENABLE_TENSOR_FUSER": _BOOLEAN,
        "INTER_OP_THREAD_COUNT": _COUNT,
        "INTRA_OP_THREAD_COUNT": _COUNT,
        "TORCH_COMPILE_OPTIONAL_PARAMETERS": _JSON,
        "precision": _PRECISION,  # this one and those below are ours: Triton has none
        "channels_last": _BOOLEAN,
        "compile": _BOOLEAN,
    },
    "onnxruntime": {
        "intra_op_thread_count": _COUNT,
        "inter_op_thread_count": _COUNT,
        "execution_mode": _BIT,
        "enable_mem_arena": _BIT,
        "enable_mem_pattern": _BIT,
        "memory.enable_memory_arena_shrinkage": (str, "devices, as in cpu:0;gpu:0"),
    },
    "identity": {"execute_delay_ms": (_milliseconds, "a number of milliseconds, 0 or more")},
}

# Attribute of Policy -> what a config calls it.
ATTRIBUTES = {attribute: key for key, (attribute, _, _) in PARAMETERS.items()} | {
    "max_rows": "max_batch_size",
    "preferred": "preferred_batch_size",
    "max_delay": "max_queue_delay_microseconds",
    "default_level": "default_priority_level",
}
ATTRIBUTE = re.compile(rf"\b({'|'.join(ATTRIBUTES)})\b")


def read_parameters(
    texts: Mapping[str, str], backend: str, ragged: Mapping[str, str], batching: bool, max_rows: int, refuse: Refuse
) -> dict[str, Any]:
    """The value of each parameter of ours that the config sets; those of the backend are only checked.

    A Python model reads what it likes, so all but what rules its queue is its own.

    Args:
        texts: `parameters`, by key.
        ragged: ragged input -> its datatype.
        batching: whether requests share batches.
        max_rows: the config's max_batch_size.

    Raises:
        ConfigError: one does not fit, is not for this model, or is nearly one that there is.
    """
    ours = _ours(backend, ragged)
    known = ours | BACKEND_PARAMETERS.get(backend, {})
    values = {}
    for key, text in sorted(texts.items()):
        if backend == "python":
            if key == "EXECUTION_ENV_PATH":  # Triton reads this one, not the model
                raise refuse(
                    f"parameters.{key}: a Python model runs in this server's own environment; install what it needs "
                    f"there, got {brief(repr(text))}"
                )
            if key not in known:
                continue
        for what in _missing(key, bool(ragged), batching, max_rows):
            raise refuse(f"parameters.{key}: needs {what}, got {text!r}")
        if backend == "onnxruntime" and key.startswith("session."):
            continue
        if key not in known:
            if hint := _meant(key, known):
                raise refuse(f"parameters.{key}: no such parameter; {hint}")
            continue  # its owner's: Triton lets people have them. It is in the effective config, and rules nothing.
        read, expected = known[key]
        try:
            value = read(text)
        except ValueError:
            raise refuse(f"parameters.{key}: must be {expected}, got {brief(repr(text))}") from None
        if key in ours:
            values[key] = value
    return values


def _ours(backend: str, ragged: Mapping[str, str]) -> dict[str, Reader]:
    """Those of ours that a model of this backend may have."""
    keys = OF_THE_QUEUE if backend == "python" else PARAMETERS
    readers: dict[str, Reader] = OF_THE_MODEL | {key: PARAMETERS[key][1:] for key in keys}
    for name, datatype in ragged.items():
        readers[f"pad.{name}"] = (partial(_padding, datatype), f"a number that {datatype} holds")
    return readers


def _missing(key: str, ragged: bool, batching: bool, max_rows: int) -> Iterator[str]:
    """What a parameter needs, and this config does not have."""
    if not ragged and (key in NEED_RAGGED or key.startswith("pad.")):
        yield "an input with allow_ragged_batch: true"
    if not batching and key in NEED_BATCHING:
        yield "dynamic_batching { } and a max_batch_size of at least 1"
    if not max_rows and key in NEED_ROWS:
        yield "a max_batch_size of at least 1"


def _meant(key: str, known: Mapping[str, Reader]) -> str:
    """What a key that is not known was probably meant to be; "" if it is simply its owner's."""
    for backend, theirs in BACKEND_PARAMETERS.items():
        if key in theirs:
            return f"it is one of {backend}'s"
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"did you mean {close[0]}?"
    return "it names no input with allow_ragged_batch: true" if key.startswith("pad.") else ""


def brief(value: Any) -> str:
    """A value of a config in an error's text: on one line, and not too long."""
    text = " ".join(str(value).split())
    if not text.strip("[], "):  # messages that are set, and empty
        return "{ }"
    return text if len(text) <= 60 else text[:57] + "..."
