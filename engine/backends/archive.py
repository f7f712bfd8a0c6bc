"""What a torch.export archive (model.pt2) may hold, checked before torch's own reader sees it.

`torch.export.load` says of itself that it is not for files one does not trust. In torch 2.13 an archive can make it run
code in these ways, found by reading torch/export/pt2_archive/_package.py, torch/_export/serde/serialize.py,
torch/export/_unlift.py and torch/fx/graph.py:

    pickles      `use_pickle` weights and constants, custom and opaque objects, the older formats' *.pt files, and
                 sample inputs that torch.load(weights_only=True) refuses (they are tried again without)
    expressions  `expr_str` goes to sympy.sympify, which evaluates it; `guards_code` is compiled as it is
    names        of tensors, arguments, parameters and submodules are pasted into generated Python source
    targets      a node may call whatever can be reached from the module torch by attributes: torch.os.system
    tree specs   may import a module of any name
    binaries     data/aotinductor/ holds shared libraries, which are loaded

`check_archive` lets through only what torch.export.save writes for a program of tensors and refuses the rest; what is
not known to be harmless is refused. It reads with torch's own zip reader and torch's own parser, so what it saw is what
will be loaded, as long as nobody replaces the file between the two.
"""

import ast
import dataclasses
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SYM_OPS, _bytes_to_dataclass, _dict_to_dataclass
from torch._export.serde.union import _Union

from ..errors import ConfigError
from ..types import TensorSpec
from .autofill import DEFAULT_MAX_BATCH_SIZE

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
# Description of the payloads -> where they are, and how their names begin.
PAYLOADS = {
    "data/weights/model_weights_config.json": ("data/weights/", "weight_"),
    "data/constants/model_constants_config.json": ("data/constants/", "tensor_"),
}
_MEMBER = re.compile(
    "|".join(re.escape(name) for name in (MODEL, SAMPLES, *PAYLOADS, "archive_format", "archive_version", "byteorder"))
    + r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment|extra/[\w./-]+"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)

# Most bytes of a JSON member: parsed, it takes some twenty times as many.
MOST_JSON = 256 * 2**20

# Namespaces of operators that compute and do nothing else; these two of them read and write files.
_NAMESPACES = frozenset({"aten", "prims", "quantized", "quantized_decomposed", "torchvision"})
_FILE_OPERATORS = frozenset({"from_file", "save"})
_CONTROL_FLOW = frozenset(
    "cond map_impl while_loop scan associative_scan out_dtype flex_attention hints_wrapper invoke_subgraph "
    "wrap_with_set_grad_enabled wrap_with_autocast".split()
)
_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z]\w*)\.(\w+)(?:\.(\w+))?", re.ASCII)

# What sympy.srepr writes for the sizes of tensors, and the guards of torch's own.
_FUNCTIONS = frozenset(
    "Symbol Integer Rational Float Add Mul Pow Max Min Abs floor ceiling Eq Equality Ne Unequality GreaterThan "
    "StrictGreaterThan LessThan StrictLessThan And Or Not FloorDiv ModularIndexing Where PythonMod Mod CleanDiv "
    "CeilToInt FloorToInt CeilDiv PowByNatural FloatPow FloatTrueDiv IntTrueDiv LShift RShift TruncToFloat TruncToInt "
    "RoundToInt RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator".split()
)
# Of these the result can be of any length: the second argument must be a small number, and none may hold another.
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
MOST_POWER = 64
MOST_NUMBER = 2.0**64

_DICTS = ("builtins.dict", "collections.OrderedDict")  # in a tree spec

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DOTTED = re.compile(r"(?:\w+(?:\.\w+)*)?", re.ASCII)
_CALL_PATH = re.compile(r"[\w.@]*", re.ASCII)  # of a submodule: layers.0@1
_KEY = re.compile(r"[\w .:/+-]*", re.ASCII)
_SYMBOL = re.compile(r"[a-z]{1,5}\d+|oo|int_oo|true|false")
# Neither a quote that ends another, nor an escape, a comment or a line's end.
_EXPRESSION = re.compile(r"[\w\s(),.'=!+\-*/%<>\[\]]*", re.ASCII)


# dtype of torch's schema -> datatype
DATATYPES = {
    schema.ScalarType.BOOL: "BOOL", schema.ScalarType.BYTE: "UINT8", schema.ScalarType.UINT16: "UINT16",
    schema.ScalarType.UINT32: "UINT32", schema.ScalarType.UINT64: "UINT64", schema.ScalarType.CHAR: "INT8",
    schema.ScalarType.SHORT: "INT16", schema.ScalarType.INT: "INT32", schema.ScalarType.LONG: "INT64",
    schema.ScalarType.HALF: "FP16", schema.ScalarType.FLOAT: "FP32", schema.ScalarType.DOUBLE: "FP64",
    schema.ScalarType.BFLOAT16: "BF16",
}  # fmt: skip


class Signature(NamedTuple):
    """What a program takes and gives.

    Attributes:
        inputs, outputs: in the program's order; shapes with -1 for what was exported as dynamic.
        most: rows of a batch, at most DEFAULT_MAX_BATCH_SIZE; 0 if dimension 0 of all of them is not one and the same
            dynamic dimension that may be 1.
    """

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    most: int


class _Refused(Exception):
    """What is wrong with a member."""


def check_archive(file: Path) -> schema.ExportedProgram:
    """The program in `file`, as torch's parser reads it, if loading the archive runs no code but torch's own.

    Raises:
        ConfigError: it holds something else than a program of tensors; names the member and what is wrong with it.
    """
    member = "archive"
    try:
        sizes = _sizes(file)
        reader = torch._C.PyTorchFileReader(str(file))
        if sorted(reader.get_all_records()) != sorted(sizes):
            raise _Refused("two readers of zip files find different members in it")
        for member, (folder, prefix) in PAYLOADS.items():
            _check_payloads(_json(reader, sizes, member), folder, prefix, sizes)
        member = SAMPLES
        _check_samples(reader.get_record(SAMPLES))
        member = MODEL
        program = _bytes_to_dataclass(schema.ExportedProgram, _json(reader, sizes, MODEL))
        assert isinstance(program, schema.ExportedProgram)
        _check(program, "", "")
    except _Refused as error:
        raise ConfigError(f"{file}: {member}: {error}") from None
    except Exception as error:  # of a reader or a parser that met nonsense
        text = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
        raise ConfigError(
            f"{file}: cannot be loaded: {member}: {text}; a .pt2 file is written by torch.export.save"
        ) from error
    return program


def read_signature(program: schema.ExportedProgram, file: Path) -> Signature:
    """Names, datatypes and shapes of what the program in `file` takes and gives.

    Raises:
        ConfigError: they are more than tensors, or nested.
    """
    graph = program.graph_module.graph
    signature = program.graph_module.signature
    given = [spec.user_input.arg for spec in signature.input_specs if str(spec.type) == "user_input"]
    yielded = [spec.user_output.arg for spec in signature.output_specs if str(spec.type) == "user_output"]
    names = _output_names(program, len(yielded))
    if names is None or any(str(argument.type) != "as_tensor" for argument in (*given, *yielded)):
        raise ConfigError(f"{file}: takes or gives more than tensors: input and output sections are required")
    metas = [graph.tensor_values[argument.as_tensor.name] for argument in (*given, *yielded)]
    names = [argument.as_tensor.name for argument in given] + names
    specs = [TensorSpec(name, _datatype(meta, file), _shape(meta)) for name, meta in zip(names, metas, strict=True)]
    return Signature(specs[: len(given)], specs[len(given) :], _most_rows(program, metas))


def _output_names(program: schema.ExportedProgram, count: int) -> list[str] | None:
    """The keys of a dict, or OUTPUT__0 and so on; None if the outputs are nested."""
    call = program.graph_module.module_call_graph[0].signature
    tree = json.loads(call.out_spec)[1] if call else {"type": None, "children_spec": []}
    if any(child["type"] is not None for child in tree["children_spec"]):
        return None
    if tree["type"] in _DICTS:
        return [str(key) for key in json.loads(tree["context"])]
    return [f"OUTPUT__{index}" for index in range(count)]


def _datatype(meta: schema.TensorMeta, file: Path) -> str:
    if meta.dtype not in DATATYPES:
        raise ConfigError(
            f"{file}: takes or gives tensors of {schema.ScalarType(meta.dtype).name}, which has no datatype"
        )
    return DATATYPES[schema.ScalarType(meta.dtype)]


def _shape(meta: schema.TensorMeta) -> tuple[int, ...]:
    return tuple(size.as_int if str(size.type) == "as_int" else -1 for size in meta.sizes)


def _most_rows(program: schema.ExportedProgram, metas: list[schema.TensorMeta]) -> int:
    first = {
        meta.sizes[0].as_expr.expr_str if meta.sizes and str(meta.sizes[0].type) == "as_expr" else "" for meta in metas
    }
    symbol = re.match(r"Symbol\('(\w+)'[^()]*\)$", first.pop()) if len(first) == 1 else None
    limits = program.range_constraints.get(symbol[1]) if symbol else None
    # torch writes 0 or 2 where nobody said how few there may be, and then 1 passes too.
    if limits is None or (limits.min_val or 0) > 2:
        return 0
    return min(DEFAULT_MAX_BATCH_SIZE, limits.max_val or DEFAULT_MAX_BATCH_SIZE)


def _sizes(file: Path) -> dict[str, int]:
    """Member, without the root folder -> its bytes. What is compressed, or claims more than there is, is refused."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    root = members[0].filename.partition("/")[0] + "/" if members else ""
    sizes: dict[str, int] = {}
    for info in members:
        name = info.filename.removeprefix(root)
        if info.filename == name or not _MEMBER.fullmatch(name) or ".." in name.split("/"):
            raise _Refused(
                f"holds {info.filename!r}; served are archives that torch.export.save of torch 2.8 or later writes, "
                "without compiled code and pickled objects"
            )
        if name in sizes:
            raise _Refused(f"holds {name!r} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _Refused(f"{name!r} is compressed, which torch.export.save never does")
        sizes[name] = info.file_size
    if sum(sizes.values()) > file.stat().st_size:
        raise _Refused("its members overlap: they claim more bytes than the file has")
    for name in (MODEL, SAMPLES, *PAYLOADS):
        if name not in sizes:
            raise _Refused(f"holds no {name}")
    return sizes


def _json(reader: Any, sizes: dict[str, int], member: str) -> bytes:
    if sizes[member] > MOST_JSON:
        raise _Refused(f"is longer than {MOST_JSON} bytes")
    content = reader.get_record(member)
    assert isinstance(content, bytes)
    return content


def _check_payloads(content: bytes, folder: str, prefix: str, sizes: dict[str, int]) -> None:
    payloads = _dict_to_dataclass(schema.PayloadConfig, json.loads(content.decode())).config
    for name, payload in payloads.items():
        path = folder + str(payload.path_name)
        if payload.use_pickle is not False:
            raise _Refused(f"{name!r} is pickled (use_pickle), and a pickle can run code")
        if not re.fullmatch(re.escape(folder + prefix) + r"\d+", path) or path not in sizes:
            raise _Refused(f"{name!r} is kept in {payload.path_name!r}, which is no tensor")
        if not _DOTTED.fullmatch(name):
            raise _Refused(f"{name!r} is no name of a tensor")
        meta = payload.tensor_meta
        if meta is None or any(
            str(size.type) != "as_int" or type(size.value) is not int
            for size in (*meta.sizes, *meta.strides, meta.storage_offset)
        ):
            raise _Refused(f"{name!r} has no plain sizes")
        if not sizes[path] and all(size.value for size in meta.sizes):
            raise _Refused(f"{name!r} has no data")  # zeros of any size would be made for it


def _check_samples(content: bytes) -> None:
    """They are a pickle: it must load as plain values, and hold nothing that ends up in generated source."""
    if not content:
        return
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        if any(info.file_size > len(content) for info in inner.infolist()):
            raise _Refused("is compressed, which torch.save never does")
    try:
        samples = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        raise _Refused(f"holds more than tensors, and a pickle can run code: {str(error).splitlines()[0]}") from None
    if not (isinstance(samples, tuple) and len(samples) == 2):
        raise _Refused("is no pair of arguments and keyword arguments")
    _check_sample(samples)


def _check_sample(value: Any) -> None:
    match value:
        case tuple() | list():
            for part in value:
                _check_sample(part)
        case dict():
            for key, part in value.items():
                _require(_NAME, key, "a name of an argument")
                _check_sample(part)
        case str():
            _require(_NAME, value, "a plain argument")
        case None | bool() | int() | float() | torch.Tensor():
            pass
        case _:
            raise _Refused(f"holds a {type(value).__name__}")


def _check(value: Any, owner: str, field: str) -> None:
    """Walk a parsed program: every text in it must be what its field is for, a name if RULES says nothing else."""
    rule = RULES.get((owner, field), _check_name)
    match value:
        case str():
            rule(value)
        case _Union():
            _check(value.value, type(value).__name__, str(value.type))
        case list():
            for part in value:
                _check(part, owner, field)
        case dict():
            for key, part in value.items():
                rule(key)
                _check(part, owner, field)
        case schema.CustomObjArgument():
            raise _Refused("holds a custom object")
        case _ if dataclasses.is_dataclass(value):
            if isinstance(value, schema.Graph) and any(str(i.type) == "as_string" for i in value.inputs):
                raise _Refused("a graph takes a text")  # its value would be pasted into the guards
            for part in dataclasses.fields(value):
                _check(getattr(value, part.name), type(value).__name__, part.name)


def _require(pattern: re.Pattern[str], text: Any, what: str) -> None:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise _Refused(f"{_brief(text)} is not {what}")


def _check_name(text: str) -> None:
    _require(_NAME, text, "a name")


def _check_dotted(text: str) -> None:
    _require(_DOTTED, text, "a name of a parameter or buffer")


def _check_target(text: str) -> None:
    """It must be an operator that only computes. Attributes are looked up no further than that."""
    target = False
    if found := _OPERATOR.fullmatch(text):
        namespace, name, overload = found.groups()
        if namespace == "higher_order":
            target = overload is None and name in _CONTROL_FLOW
        elif namespace in _NAMESPACES and name not in _FILE_OPERATORS and overload:
            packet = getattr(getattr(torch.ops, namespace), name, None)
            target = isinstance(getattr(packet, overload, None), torch._ops.OpOverload)
    if not target and text not in _SYMBOLIC_TARGETS:
        raise _Refused(f"a node calls {_brief(text)}, which is not served: it must be an operator of torch's")


def _symbolic_targets() -> Iterator[str]:
    """As torch writes the functions that compute with sizes: _operator.mul, math.trunc, torch.sym_max."""
    for function in _SYM_OPS:
        yield f"{function.__module__}.{function.__name__}"


_SYMBOLIC_TARGETS = frozenset(_symbolic_targets())


def _parse(text: str, what: str) -> ast.expr:
    if not _EXPRESSION.fullmatch(text) or "\n" in text or "\r" in text:
        raise _Refused(f"{_brief(text)} is not {what}")
    return ast.parse(text, mode="eval").body


def _check_expression(text: str) -> None:
    """A size as sympy.srepr writes it: numbers, symbols and functions from _FUNCTIONS."""
    _check_node(_parse(text, "an expression of sizes"), text, guard=False)


def _check_guard(text: str) -> None:
    """A condition on the sizes of inputs: L['x'].size()[0] <= 64."""
    _check_node(_parse(text, "a condition on sizes"), text, guard=True)


def _check_node(node: ast.AST, text: str, guard: bool, power: bool = False) -> None:
    """Refuse what is not arithmetic. `power`: inside a power, where there must not be another."""
    inner: list[ast.AST] = []
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number) if abs(number) < MOST_NUMBER:
            pass
        case ast.Name(id=name) if _SYMBOL.fullmatch(name):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            inner = [operand]
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()):
            inner = [node.left, node.right]
        case ast.Compare(ops=ops) if not any(isinstance(op, ast.In | ast.NotIn) for op in ops):
            inner = [node.left, *node.comparators]
        case ast.BoolOp():
            inner = list(node.values)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=flags) if (
            _SYMBOL.fullmatch(name) and all(flag.arg and isinstance(flag.value, ast.Constant) for flag in flags)
        ):
            inner = [flag.value for flag in flags]
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(number))]) if all(
            _is_small(keyword.value) for keyword in node.keywords
        ):
            inner = [ast.Constant(float(number))]
        case ast.Call(func=ast.Name(id=function), keywords=[]) if function in _POWERS:
            if power or len(node.args) != 2 or not _is_small(node.args[1]):
                raise _Refused(f"{_brief(text)}: a power that may be of any size")
            power, inner = True, [node.args[0]]
        case ast.Call(func=ast.Name(id=function), keywords=[]) if function in _FUNCTIONS or (
            guard and function in ("max", "min")
        ):
            inner = list(node.args)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"), attr="ceil" | "floor" | "trunc"), keywords=[]) if (
            guard
        ):
            inner = list(node.args)
        case ast.Call(
            func=ast.Attribute(value=value, attr="size" | "stride" | "storage_offset"), args=[], keywords=[]
        ) if guard:
            inner = [value]
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))) if guard and _NAME.fullmatch(
            name
        ):
            pass
        case ast.Subscript(value=value, slice=ast.Constant(value=str(name))) if guard and _NAME.fullmatch(name):
            inner = [value]
        case ast.Subscript(value=value, slice=ast.Constant(value=int())) if guard:
            inner = [value]
        case _:
            raise _Refused(f"{_brief(text)} holds more than arithmetic with sizes: {_brief(ast.unparse(node))}")
    for part in inner:
        _check_node(part, text, guard, power)


def _is_small(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer" and node.args:
        node = node.args[0]
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) <= MOST_POWER


def _check_spec(keys: re.Pattern[str]) -> Callable[[str], None]:
    """Of a tree of tuples, lists and dicts whose keys match; torch.utils._pytree writes it as JSON."""

    def check_tree(node: Any) -> None:
        kind, context = node["type"], node["context"]
        if kind in _DICTS:
            found = json.loads(context)
            if not isinstance(found, list):
                raise _Refused(f"{_brief(context)} is not a list of keys")
            for key in found:
                _require(keys, key, "a key of a dict")
        elif not (
            (kind is None and context is None) or (kind in ("builtins.tuple", "builtins.list") and context == "null")
        ):
            raise _Refused(f"takes or gives a {_brief(kind)}; served are tensors in tuples, lists and dicts")
        for child in node["children_spec"]:
            check_tree(child)

    def check(text: str) -> None:
        protocol, tree = json.loads(text)
        if protocol != 1:
            raise _Refused(f"tree spec of protocol {protocol}")
        check_tree(tree)

    return check


def _anything(text: str) -> None:
    """It is only ever shown, or written into source as a literal."""


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# (class, field) of torch's schema -> what its texts must be. Where nothing is listed: a plain identifier.
RULES: dict[tuple[str, str], Callable[[str], None]] = {
    ("SymExpr", "expr_str"): _check_expression,
    ("ExportedProgram", "guards_code"): _check_guard,
    ("Node", "target"): _check_target,
    ("Argument", "as_operator"): _check_target,
    ("ModuleCallSignature", "in_spec"): _check_spec(_NAME),
    ("ModuleCallSignature", "out_spec"): _check_spec(_KEY),
    ("ModuleCallEntry", "fqn"): lambda text: _require(_CALL_PATH, text, "a name of a module"),
    ("InputToParameterSpec", "parameter_name"): _check_dotted,
    ("InputToBufferSpec", "buffer_name"): _check_dotted,
    ("InputToTensorConstantSpec", "tensor_constant_name"): _check_dotted,
    ("BufferMutationSpec", "buffer_name"): _check_dotted,
    ("ParameterMutationSpec", "parameter_name"): _check_dotted,
    ("NamedArgument", "name"): lambda text: _require(_NAME, text or "positional", "a name"),
    ("Argument", "as_string"): _anything,
    ("Argument", "as_strings"): _anything,
    ("Node", "metadata"): _anything,
    ("GraphModule", "metadata"): _anything,
    ("GraphModule", "treespec_namedtuple_fields"): _anything,
    ("ExportedProgram", "torch_version"): _anything,
    ("ExportedProgram", "verifiers"): _anything,
}
