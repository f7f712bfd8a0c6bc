"""What a crafted torch.export archive could do, and that none of it happens: it is refused before torch reads it."""

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends import archive
from engine.backends.archive import check_archive, read_signature
from engine.errors import ConfigError

Members = dict[str, bytes]
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Net(torch.nn.Module):
    """Parameters, buffers, constants, control flow, arithmetic with sizes, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("lost", torch.ones(4), persistent=False)
        self.constant = torch.ones(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        z = self.layers(x) + self.kept + self.lost + self.constant
        z = z * (x.shape[0] % 7) + x.shape[0] / 3
        halves = torch.cat([z, z], 0)
        chosen = torch.cond(y.sum() > 2, lambda a: a + 1, lambda a: a - 1, (z,))
        with torch.no_grad():
            chosen = chosen * 2
        padded = torch.nn.functional.pad(chosen, (0, 1), mode="constant")
        return {"flat": z.reshape(-1), "halves": halves[::2], "padded": padded, "found": y.nonzero()}


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive that torch.export.save wrote, with dynamic sizes."""
    file = tmp_path_factory.mktemp("genuine") / "model.pt2"
    rows = torch.export.Dim("rows", min=6, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its way through cond
        program = torch.export.export(
            Net().eval().requires_grad_(False),
            (torch.zeros(7, 3), torch.zeros(7)),
            dynamic_shapes={"x": {0: rows}, "y": {0: rows}},
        )
    torch.export.save(program, file)
    return file


def test_a_genuine_archive_passes_and_loads(genuine: Path) -> None:
    """Dynamic sizes, control flow, constants and sample inputs are what torch.export.save writes: let through."""
    program = check_archive(genuine)
    assert {node.target for node in program.graph_module.graph.nodes} >= {
        "torch.ops.higher_order.cond",
        "_operator.mod",
    }
    assert program.guards_code == ["L['y'].size()[0] == L['x'].size()[0]"]
    x, y = torch.rand(8, 3), torch.rand(8)
    outputs = torch.export.load(genuine).module()(x, y)
    assert set(outputs) == {"flat", "halves", "padded", "found"}


def test_the_example_model_passes() -> None:
    """The model that the repository ships."""
    file = Path("models/digits/1/model.pt2")
    signature = read_signature(check_archive(file), file)
    assert [(spec.name, spec.datatype) for spec in signature.inputs] == [("pixels", "FP32")]


@pytest.mark.parametrize(
    ("dynamic", "most"),
    [
        (torch.export.Dim("rows", min=1, max=64), 4),
        (torch.export.Dim("rows", min=1, max=3), 3),
        (torch.export.Dim("rows", min=5, max=64), 0),
        (torch.export.Dim.DYNAMIC, 4),
        (None, 0),
    ],
)
def test_the_signature_of_a_program(tmp_path: Path, dynamic: Any, most: int) -> None:
    """Names, datatypes and shapes come from the program; a batch has rows if dimension 0 is free, and may be 1."""

    class Half(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (first + 1).to(torch.float16), second * 2

    free, rows = None if dynamic is None else {0: dynamic}, 3 if most else 5
    program = torch.export.export(
        Half(), (torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.int64)), dynamic_shapes=(free, free)
    )
    file = tmp_path / "model.pt2"
    torch.export.save(program, file)
    signature = read_signature(check_archive(file), file)
    if dynamic is torch.export.Dim.DYNAMIC:  # two inputs, two symbols: they need not have the same number of rows
        assert signature.most == 0
        return
    rows = -1 if free else 5
    assert signature.most == most
    assert [(spec.name, spec.datatype, spec.shape) for spec in (*signature.inputs, *signature.outputs)] == [
        ("first", "FP32", (rows, 3)),
        ("second", "INT64", (rows,)),
        ("OUTPUT__0", "FP16", (rows, 3)),
        ("OUTPUT__1", "INT64", (rows,)),
    ]


class Nested(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"a": (x, x + 1)}


class Complex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.complex64)


class Size(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, x.shape[0]


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Nested(), "takes or gives more than tensors: input and output sections are required"),
        (Size(), "takes or gives more than tensors"),
        (Complex(), "takes or gives tensors of COMPLEXFLOAT, which has no datatype"),
    ],
)
def test_a_signature_that_a_config_cannot_say_is_refused(tmp_path: Path, net: torch.nn.Module, text: str) -> None:
    """Outputs in outputs, numbers, and types that the protocol has not."""
    file = tmp_path / "model.pt2"
    dynamic = ({0: torch.export.Dim("rows", min=1, max=8)},)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3),), dynamic_shapes=dynamic), file)
    with pytest.raises(ConfigError, match=text):
        read_signature(check_archive(file), file)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ({"x": torch.zeros(1)}, "is no pair of arguments and keyword arguments"),
        (((torch.zeros(1),), {"x') + print('": 1}), "is not a name of an argument"),
        ((({"a": "it's"},), {}), "is not a plain argument"),
        ((({1: 2},), {}), "1 is not a name of an argument"),
        (((torch.float32,), {}), "holds a dtype"),
    ],
)
def test_sample_inputs_are_plain_values(genuine: Path, tmp_path: Path, samples: Any, text: str) -> None:
    """Their keys end up in the source of guards."""
    members, buffer = members_of(genuine), io.BytesIO()
    torch.save(samples, buffer)
    members[SAMPLES] = buffer.getvalue()
    with pytest.raises(ConfigError, match=text):
        check_archive(write(tmp_path / "model.pt2", members))


def test_sample_inputs_may_be_nested(genuine: Path, tmp_path: Path) -> None:
    """Tensors, numbers and names, in tuples, lists and dicts."""
    members, buffer = members_of(genuine), io.BytesIO()
    torch.save((([torch.zeros(1), 2, None], {"key": "mean"}), {"flag": True}), buffer)
    members[SAMPLES] = buffer.getvalue()
    check_archive(write(tmp_path / "model.pt2", members))


def members_of(file: Path) -> Members:
    with zipfile.ZipFile(file) as found:
        return {info.filename.partition("/")[2]: found.read(info) for info in found.infolist()}


def write(file: Path, members: Members, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in members.items():
            made.writestr(f"model/{name}", content)
    return file


def touching(path: Path) -> str:
    """Source of an expression that makes a folder at `path`."""
    return f"__import__('os').mkdir('{path}')"


def pickled(path: Path) -> bytes:
    class Touch:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(path),)

    buffer = io.BytesIO()
    torch.save(({"weight": Touch()},), buffer)
    return buffer.getvalue()


def edit(members: Members, member: str, change: Callable[[Any], object]) -> None:
    document = json.loads(members[member])
    change(document)
    members[member] = json.dumps(document).encode()


def bad_samples(members: Members, path: Path) -> None:
    members[SAMPLES] = pickled(path)


def bad_weight(members: Members, path: Path) -> None:
    members["data/weights/weight_0"] = pickled(path)
    edit(members, WEIGHTS, lambda d: next(iter(d["config"].values())).update(use_pickle=True))


def bad_constant(members: Members, path: Path) -> None:
    members["data/constants/opaque_obj_0"] = pickle.dumps(None)
    edit(members, "data/constants/model_constants_config.json",
         lambda d: next(iter(d["config"].values())).update(path_name="opaque_obj_0"))  # fmt: skip


def other_path(members: Members, path: Path) -> None:
    edit(members, WEIGHTS, lambda d: next(iter(d["config"].values())).update(path_name="../../models/model.json"))


def old_weights(members: Members, path: Path) -> None:
    members["data/weights/model.pt"] = pickled(path)


def shared_library(members: Members, path: Path) -> None:
    members["data/aotinductor/model/model.so"] = b"\x7fELF"


def second_model(members: Members, path: Path) -> None:
    members["models/other.json"] = members[MODEL]


def expression(members: Members, path: Path) -> None:
    """The first size that is an expression."""

    def change(document: Any) -> None:
        metas = document["graph_module"]["graph"]["tensor_values"].values()
        sizes = [size["as_expr"] for meta in metas for size in meta["sizes"] if "as_expr" in size]
        sizes[0]["expr_str"] = touching(path)

    edit(members, MODEL, change)


def target(members: Members, path: Path) -> None:
    def change(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][0] = {
            "target": "torch.os.mkdir",
            "inputs": [{"name": "", "arg": {"as_string": str(path)}, "kind": 1}],
            "outputs": [],
            "metadata": {},
            "name": "made",
        }

    edit(members, MODEL, change)


def file_operator(members: Members, path: Path) -> None:
    edit(
        members,
        MODEL,
        lambda d: d["graph_module"]["graph"]["nodes"][1].update(target="torch.ops.aten.from_file.default"),
    )


def loader(members: Members, path: Path) -> None:
    edit(members, MODEL, lambda d: d["graph_module"]["graph"]["nodes"][1].update(target="torch.ops.load_library"))


def input_name(members: Members, path: Path) -> None:
    members[MODEL] = members[MODEL].replace(b'"y"', json.dumps(f"y={touching(path)}").encode())


def argument_name(members: Members, path: Path) -> None:
    def change(document: Any) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [
            "x",
            f"y={touching(path)}",
        ]

    edit(members, MODEL, change)


def parameter_name(members: Members, path: Path) -> None:
    bad = f'layers."), {touching(path)}, ("'
    members[MODEL] = members[MODEL].replace(b'"layers.0.weight"', json.dumps(bad).encode())
    members[WEIGHTS] = members[WEIGHTS].replace(b'"layers.0.weight"', json.dumps(bad).encode())


def guard(members: Members, path: Path) -> None:
    edit(members, MODEL, lambda d: d.update(guards_code=[touching(path)]))


def quoted_guard(members: Members, path: Path) -> None:
    """What the guard says of itself when it fails is pasted between double quotes."""
    code = touching(path).replace("'", '"')
    edit(members, MODEL, lambda d: d.update(guards_code=[f"L['x'] is not '\"+{code}+\"'"]))


def tree_spec(members: Members, path: Path) -> None:
    (path.parent / "evil_module.py").write_text(f"import os\nos.mkdir({str(path)!r})\n")
    context = json.dumps({"__enum__": True, "fqn": "evil_module:A", "name": "B"})
    spec = json.dumps([1, {"type": "builtins.list", "context": context, "children_spec": []}])

    def change(document: Any) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec

    edit(members, MODEL, change)


def text_input(members: Members, path: Path) -> None:
    """A constant that the graph takes is compared in a guard, between quotes that it may end."""
    edit(
        members,
        MODEL,
        lambda d: d["graph_module"]["graph"]["inputs"].append({"as_string": f"' + {touching(path)} + '"}),
    )


def custom_object(members: Members, path: Path) -> None:
    """A class that TorchScript knows, by its name."""
    argument = {"as_custom_obj": {"name": "thing", "class_fqn": "__torch__.Thing"}}
    edit(members, MODEL, lambda d: d["graph_module"]["graph"]["nodes"][0]["inputs"][0].update(arg=argument))


def absolute_sizes(members: Members, path: Path) -> None:
    edit(members, WEIGHTS, lambda d: next(iter(d["config"].values())).update(tensor_meta=None))


def signature(members: Members, change: Callable[[Any], object]) -> None:
    edit(members, MODEL, lambda d: change(d["graph_module"]["module_call_graph"][0]["signature"]))


def dict_key(members: Members, path: Path) -> None:
    spec = [1, {"type": "builtins.dict", "context": json.dumps(['a" + b']), "children_spec": []}]
    signature(members, lambda s: s.update(out_spec=json.dumps(spec)))


def protocol(members: Members, path: Path) -> None:
    signature(members, lambda s: s.update(out_spec=json.dumps([2, {}])))


# How the archive is spoilt, what the refusal says, and whether torch.export.load itself runs the code.
ATTACKS: list[tuple[Callable[[Members, Path], None], str, bool]] = [
    (bad_samples, r"data/sample_inputs/model.pt: holds more than tensors", True),
    (bad_weight, r"model_weights_config.json: 'layers.0.weight' is pickled \(use_pickle\)", True),
    (bad_constant, r"archive: holds 'model/data/constants/opaque_obj_0'", False),
    (other_path, r"'layers.0.weight' is kept in '../../models/model.json'", False),
    (old_weights, r"archive: holds 'model/data/weights/model.pt'", True),
    (shared_library, r"archive: holds 'model/data/aotinductor/model/model.so'.*without compiled code", False),
    (second_model, r"archive: holds 'model/models/other.json'", False),
    (expression, r"models/model.json: .*holds more than arithmetic", True),
    (target, r"models/model.json: a node calls 'torch.os.mkdir', which is not served", False),
    (file_operator, r"a node calls 'torch.ops.aten.from_file.default'", False),
    (loader, r"a node calls 'torch.ops.load_library'", False),
    (input_name, r"models/model.json: .*mkdir.* is not a name", True),
    (argument_name, r"models/model.json: .*mkdir.* is not a name", False),
    (parameter_name, r"is no name of a tensor", False),
    (guard, r"models/model.json: .*holds more than arithmetic", True),
    (quoted_guard, r"models/model.json: .*is not a condition on sizes", True),
    (tree_spec, r"models/model.json: .*takes or gives a 'builtins.list'", True),
    (text_input, r"models/model.json: a graph takes a text", False),
    (custom_object, r"models/model.json: holds a custom object", False),
    (absolute_sizes, r"model_weights_config.json: 'layers.0.weight' has no plain sizes", False),
    (dict_key, r"models/model.json: .*is not a key of a dict", False),
    (protocol, r"models/model.json: tree spec of protocol 2", False),
]


@pytest.mark.parametrize(("spoil", "text", "runs"), ATTACKS, ids=[attack.__name__ for attack, _, _ in ATTACKS])
def test_an_archive_that_could_run_code_is_refused(
    genuine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, text: str, runs: bool
) -> None:
    """Each way is refused with the member's name, and the code did not run. Where `runs`, torch alone does run it."""
    monkeypatch.syspath_prepend(tmp_path)
    proof, members = tmp_path / "proof", members_of(genuine)
    spoil(members, proof)
    file = write(tmp_path / "model.pt2", members)
    with pytest.raises(ConfigError, match=text):
        check_archive(file)
    assert not proof.exists()
    if runs:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            torch.export.load(file).module()(torch.zeros(7, 3), torch.zeros(7))
        assert proof.exists()


def test_what_is_compressed_is_refused(genuine: Path, tmp_path: Path) -> None:
    """torch stores members as they are; one that grows when it is read may grow without end."""
    file = write(tmp_path / "model.pt2", members_of(genuine), zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match="is compressed"):
        check_archive(file)


def test_sample_inputs_that_are_compressed_are_refused(genuine: Path, tmp_path: Path) -> None:
    """They are a zip file in the zip file."""
    members, buffer = members_of(genuine), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as inner:
        inner.writestr("archive/data/0", bytes(2**20))
    members[SAMPLES] = buffer.getvalue()
    with pytest.raises(ConfigError, match=rf"{SAMPLES}: is compressed"):
        check_archive(write(tmp_path / "model.pt2", members))


def test_members_that_overlap_are_refused(genuine: Path, tmp_path: Path) -> None:
    """Many entries of a directory may point at the same bytes: they may not add up to more than the file has."""
    members = members_of(genuine) | {"extra/big": bytes(2**16)}
    file = write(tmp_path / "model.pt2", members)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as found:
        start, big = found.start_dir, found.getinfo("model/extra/big")
    entry = content.index(b"model/extra/big", start) - 46
    record = bytes(content[entry : entry + 46 + len("model/extra/big")])
    copies = b"".join(record.replace(b"extra/big", b"extra/bi%c" % (65 + i)) for i in range(4))
    end = content.rindex(b"PK\x05\x06")
    content[end:end] = copies
    end += len(copies)
    count = int.from_bytes(content[end + 8 : end + 10], "little") + 4
    content[end + 8 : end + 12] = count.to_bytes(2, "little") * 2
    content[end + 12 : end + 16] = (end - start).to_bytes(4, "little")
    file.write_bytes(content)
    assert big.file_size * 5 > len(content)
    with pytest.raises(ConfigError, match="overlap|more bytes than the file has"):
        check_archive(file)


def test_a_member_given_twice_is_refused(genuine: Path, tmp_path: Path) -> None:
    """One reader of zip files takes the first, another the last."""
    file = write(tmp_path / "model.pt2", members_of(genuine))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(file, "a") as made:
            made.writestr("model/models/model.json", b"{}")
    with pytest.raises(ConfigError, match="holds 'models/model.json' twice"):
        check_archive(file)


def test_a_payload_without_data_is_refused(genuine: Path, tmp_path: Path) -> None:
    """torch makes zeros for it, of whatever size it says."""
    members = members_of(genuine)
    members["data/weights/weight_0"] = b""
    with pytest.raises(ConfigError, match="'layers.0.weight' has no data"):
        check_archive(write(tmp_path / "model.pt2", members))


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file at all"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    """With a text that says which program writes one."""
    file = tmp_path / "model.pt2"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be loaded.*torch.export.save"):
        check_archive(file)


@pytest.mark.parametrize("member", ["models/model.json", "data/weights/model_weights_config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"graph_module": 1}', b"null"])
def test_nonsense_is_refused(genuine: Path, tmp_path: Path, member: str, content: bytes) -> None:
    """Whatever its parser says of it: a ConfigError that names the member."""
    members = members_of(genuine) | {member: content}
    with pytest.raises(ConfigError, match=member):
        check_archive(write(tmp_path / "model.pt2", members))


def test_two_readers_must_see_the_same(genuine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has a reader of zip files of its own; what the other one checked must be what it will load."""
    members = members_of(genuine)
    monkeypatch.setattr(archive, "_sizes", lambda file: {name: len(members[name]) for name in members if name != MODEL})
    with pytest.raises(ConfigError, match="two readers of zip files find different members in it"):
        check_archive(genuine)


def test_a_program_that_is_too_long_is_refused(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed, it takes many times its bytes."""
    monkeypatch.setattr(archive, "MOST_JSON", 100)
    with pytest.raises(ConfigError, match="is longer than 100 bytes"):
        check_archive(genuine)


def test_a_missing_member_is_refused(genuine: Path, tmp_path: Path) -> None:
    """Without it torch falls back to readers of older formats."""
    members = members_of(genuine)
    del members[SAMPLES]
    with pytest.raises(ConfigError, match=f"holds no {SAMPLES}"):
        check_archive(write(tmp_path / "model.pt2", members))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0', positive=True, integer=True)",
        "Add(Mul(Integer(-1), Symbol('s0')), FloorDiv(Symbol('u1'), Integer(2)))",
        "Max(Integer(1), Mod(Symbol('s0'), Integer(7)))",
        "Pow(Symbol('s0', integer=True), Integer(2))",
        "IntTrueDiv(Symbol('s0'), Float('3.0', precision=53))",
        "2*s0 + 1",
        "LessThan(Symbol('u0', integer=True), oo)",
    ],
)
def test_expressions_that_torch_writes_pass(text: str) -> None:
    """Arithmetic with sizes."""
    archive._check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "exec('1')",
        "Symbol('s0').__class__",
        "Symbol(__import__('os'))",
        "(lambda: 1)()",
        "[s0 for s0 in s1]",
        "Add(*s0)",
        "Symbol('s0', **s1)",
        "Symbol('a\\n')",
        "Add(s0,\n s1)",
        "s0 # s1",
        "Pow(Integer(9), Integer(99999999))",
        "Pow(Pow(Integer(9), Integer(64)), Integer(64))",
        "Integer(9)**Integer(9)",
        "LShift(Integer(1), Symbol('s0'))",
        "Integer('7')",
        "Float('1e400')",
        "Float('1', precision=99999999999)",
        "Float('__import__')",
        "99999999999999999999999999",
        "f'{s0}'",
        "solve(s0)",
        "s0.a",
        "",
        "(" * 1000,
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    """Whatever else sympy would evaluate, or take for ever to."""
    with pytest.raises((archive._Refused, SyntaxError, ValueError, MemoryError)):
        archive._check_expression(text)


@pytest.mark.parametrize(
    "text",
    ["L['x'].size()[0] <= 64", "L['a']['b'].stride()[1] == 1", "L['args'][0].size()[0] % 2 == 0",
     "Mod(L['x'].size()[0], 2) == 0", "2 <= L['x'].size()[1] and L['x'].size()[1] != max(3, 4)"],
)  # fmt: skip
def test_guards_that_torch_writes_pass(text: str) -> None:
    """Conditions on the sizes of inputs."""
    archive._check_guard(text)


@pytest.mark.parametrize(
    "text",
    ["L['x'].save('f')", "L['x'].size(print())", "torch.load('f')", "M['x']", "L[x]", "math.__loader__",
     "L['x'].size().__class__", "open('f')", "L['a b']", "(s0 := 1)"],
)  # fmt: skip
def test_other_guards_are_refused(text: str) -> None:
    """They are compiled as Python."""
    with pytest.raises((archive._Refused, SyntaxError)):
        archive._check_guard(text)
