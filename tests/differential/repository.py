"""The model repository that both servers serve: python models in every shape that requests can meet."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).parent / "models"

# Every datatype that a python model knows, and the config's name for it.
DATATYPES = {
    name: f"TYPE_{'STRING' if name == 'BYTES' else name}"
    for name in "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 BYTES".split()
}


@dataclass(frozen=True)
class Tensor:
    """One input or output, as a config names it; dims without the batch dimension."""

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    more: str = ""  # of the config's text

    def text(self, output: bool) -> str:
        optional = "optional: true" if self.optional and not output else ""
        return (
            f'{{ name: "{self.name}" data_type: {DATATYPES[self.datatype]} dims: {list(self.dims)} '
            f"{optional} {self.more} }}"
        )


@dataclass(frozen=True)
class Model:
    """One folder of the repository.

    Attributes:
        source: file of models/ that each version is a copy of.
        rows: the config's max_batch_size.
        more: what else the config says, as its text.
        config: the whole text instead; None for no config.pbtxt at all.
        files: more files of the folder.
        loaded: whether the servers load it when they start.
    """

    source: str
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    rows: int = 0
    more: str = ""
    config: str | None = ""
    versions: tuple[str, ...] = ("1",)
    files: dict[str, str] = field(default_factory=dict)
    loaded: bool = True

    def text(self) -> str | None:
        if self.config != "":
            return self.config
        inputs = ", ".join(tensor.text(False) for tensor in self.inputs)
        outputs = ", ".join(tensor.text(True) for tensor in self.outputs)
        tensors = (f"input [ {inputs} ]\n" if inputs else "") + (f"output [ {outputs} ]\n" if outputs else "")
        return f'backend: "python"\nmax_batch_size: {self.rows}\n{tensors}{self.more}\n'


def identity(*inputs: Tensor, rows: int = 8, more: str = "", **options: object) -> Model:
    outputs = tuple(Tensor(t.name.replace("INPUT", "OUTPUT"), t.datatype, t.dims) for t in inputs)
    return Model("identity", inputs, outputs, rows, more, **options)  # type: ignore[arg-type]


def text(name: str) -> tuple[Tensor, ...]:
    """The one input or output of a model that takes or gives a string."""
    return (Tensor(name, "BYTES"),)


NUMBERS = (Tensor("INPUT0", "FP32", (4,)), Tensor("INPUT1", "FP32", (4,)))
RESULTS = (Tensor("OUTPUT0", "FP32", (4,)), Tensor("OUTPUT1", "FP32", (4,)))
VERSION = {"source": "version", "inputs": (Tensor("INPUT0", "FP32"),), "outputs": (Tensor("VERSION", "INT32"),)}
TOGETHER = (Tensor("TOGETHER", "INT32"),)
ARGS = {"source": "args", "inputs": (Tensor("INPUT0", "FP32"),), "outputs": text("ARGS")}

QUEUES = """dynamic_batching {
  preferred_batch_size: [ 2, 4 ]
  max_queue_delay_microseconds: 100
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5000000 allow_timeout_override: true }
  priority_queue_policy { key: 1 value { max_queue_size: 10 } }
}"""

WARMUP = """model_warmup [ {
  name: "zeros" batch_size: 3 count: 2
  inputs { key: "INPUT0" value { data_type: TYPE_FP32 dims: [ 4 ] zero_data: true } }
} ]"""

MODELS: dict[str, Model] = {
    **{f"identity_{name.lower()}": identity(Tensor("INPUT0", name, (-1,))) for name in DATATYPES},
    "identity_two": identity(Tensor("INPUT0", "INT32", (-1,)), Tensor("INPUT1", "BYTES", (-1,))),
    "identity_fixed": identity(Tensor("INPUT0", "INT64", (2, 3)), rows=4),
    "identity_single": identity(Tensor("INPUT0", "FP32", (3,)), rows=0),
    "identity_text": identity(Tensor("INPUT0", "BYTES", (1,)), rows=0),
    "variable": identity(Tensor("INPUT0", "FP32", (-1, 3)), rows=0),
    "variable_two": identity(Tensor("INPUT0", "FP32", (-1, -1)), rows=4),
    "add_sub": Model("add_sub", NUMBERS, RESULTS, rows=8),
    "add_sub_single": Model(
        "add_sub",
        (Tensor("INPUT0", "INT32", (2, 2)), Tensor("INPUT1", "INT32", (2, 2))),
        (Tensor("OUTPUT0", "INT32", (2, 2)), Tensor("OUTPUT1", "INT32", (2, 2))),
    ),
    "strings": Model(
        "strings",
        (Tensor("TEXT", "BYTES", (-1,)),),
        (Tensor("UPPER", "BYTES", (-1,)), Tensor("LENGTH", "INT32", (-1,)), Tensor("JOINED", "BYTES", (1,))),
        rows=4,
    ),
    "reshaped": Model(
        "shape",
        (Tensor("INPUT0", "FP32", (4,), more="reshape { shape: [ 2, 2 ] }"),),
        (Tensor("OUTPUT0", "FP32", (4,), more="reshape { shape: [ 2, 2 ] }"), Tensor("SHAPE", "INT64", (3,))),
        rows=2,
    ),
    "reshaped_scalar": Model(
        "shape",
        (Tensor("INPUT0", "FP32", (1,), more="reshape { shape: [ ] }"),),
        (Tensor("OUTPUT0", "FP32", (1,), more="reshape { shape: [ ] }"), Tensor("SHAPE", "INT64", (1,))),
        rows=4,
    ),
    "optional": Model(
        "optional",
        (Tensor("A", "FP32", (2,)), Tensor("B", "FP32", (2,), optional=True), Tensor("C", "INT32", optional=True)),
        (Tensor("SUM", "FP32", (2,)), Tensor("GIVEN", "BYTES")),
        rows=4,
    ),
    "classes": Model(
        "identity",
        (Tensor("INPUT0", "FP32", (4,)), Tensor("INPUT1", "INT32", (2, 2))),
        (
            Tensor("OUTPUT0", "FP32", (4,), more='label_filename: "fruit.txt"'),
            Tensor("OUTPUT1", "INT32", (2, 2)),
        ),
        rows=4,
        files={"fruit.txt": "apple\npear\n\nplum\n"},
    ),
    "classes_single": Model(
        "identity",
        (Tensor("INPUT0", "FP64", (-1,)),),
        (Tensor("OUTPUT0", "FP64", (-1,), more='label_filename: "two.txt"'),),
        files={"two.txt": "first\nsecond"},
    ),
    "classes_half": Model("identity", (Tensor("INPUT0", "FP16", (3,)),), (Tensor("OUTPUT0", "FP16", (3,)),)),
    "failing": Model("failing", text("MODE"), (Tensor("OUTPUT0", "INT32", (2,)),)),
    "failing_counted": Model("failing", text("MODE"), (Tensor("OUTPUT0", "INT32", (2,)),)),
    "repeat": Model(
        "repeat",
        (
            Tensor("COUNT", "INT32"),
            Tensor("FAIL_AT", "INT32", optional=True),
            Tensor("ALONE", "INT32", optional=True),
        ),
        (Tensor("INDEX", "INT32"),),
        more="model_transaction_policy { decoupled: true }",
    ),
    "repeat_counted": Model(
        "repeat",
        (
            Tensor("COUNT", "INT32"),
            Tensor("FAIL_AT", "INT32", optional=True),
            Tensor("ALONE", "INT32", optional=True),
        ),
        (Tensor("INDEX", "INT32"),),
        more="model_transaction_policy { decoupled: true }",
    ),
    "sender": Model("sender", text("MODE"), text("TEXT")),
    "bls": Model("bls", text("MODE"), text("TEXT")),
    "bls_async": Model("bls_async", text("MODEL"), text("TEXT")),
    "echo": Model("echo", (Tensor("INPUT0", "FP32"),), (*text("REQUEST"), *text("OTHER")), rows=2),
    "args": Model(**ARGS),  # type: ignore[arg-type]
    "args_named": Model(
        **ARGS,  # type: ignore[arg-type]
        more='instance_group [ { name: "own" count: 1 kind: KIND_CPU } ]\n'
        'parameters { key: "depth" value { string_value: "3" } }\nmetric_tags { key: "team" value: "blue" }',
    ),
    "args_queues": Model(**ARGS, rows=4, more=QUEUES + "\ninstance_group [ { count: 2 kind: KIND_CPU } ]"),  # type: ignore[arg-type]
    "auto": Model("auto", config=None),
    "auto_partial": Model("auto", config='backend: "python"\nmax_batch_size: 2\n'),
    "versions_latest": Model(
        **VERSION,  # type: ignore[arg-type]
        more="version_policy { latest { num_versions: 2 } }",
        versions=("1", "3", "10", "02", "x"),
    ),
    "versions_specific": Model(
        **VERSION,  # type: ignore[arg-type]
        more="version_policy { specific { versions: [ 1, 3 ] } }",
        versions=("1", "2", "3"),
    ),
    "versions_all": Model(**VERSION, more="version_policy { all { } }", versions=("1", "2")),  # type: ignore[arg-type]
    "batched": Model(
        "gate",
        (Tensor("FILE", "BYTES"),),
        TOGETHER,
        rows=8,
        more="dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 1000000 }",
    ),
    "queue_short": Model(
        "gate",
        (Tensor("FILE", "BYTES"),),
        TOGETHER,
        rows=1,
        more="dynamic_batching { default_queue_policy { max_queue_size: 1 } }",
    ),
    "queue_timeout": Model(
        "gate",
        (Tensor("FILE", "BYTES"),),
        TOGETHER,
        rows=1,
        more="dynamic_batching { default_queue_policy { default_timeout_microseconds: 100000 } }",
    ),
    "counted": Model("add_sub", NUMBERS, RESULTS, rows=8),
    "warm": identity(Tensor("INPUT0", "FP32", (4,)), more=WARMUP),
    "cached": identity(Tensor("INPUT0", "FP32", (-1,)), more="response_cache { enable: true }"),
    "metrics": Model("metrics", (Tensor("INPUT0", "FP32"),), text("TEXT")),
    # Loaded, unloaded and changed by the requests.
    "later": Model("add_sub", NUMBERS, RESULTS, rows=8, loaded=False),
    "later_auto": Model("auto", config=None, loaded=False),
    "later_versions": Model(
        **VERSION,  # type: ignore[arg-type]
        more="version_policy { all { } }",
        versions=("1", "2"),
        loaded=False,
    ),
    "broken": Model("broken", NUMBERS, RESULTS, loaded=False),
    "unfinished": Model("unfinished", NUMBERS, RESULTS, loaded=False),
    "bad_text": Model("identity", config="backend: python }", loaded=False),
    "bad_field": Model("identity", config='backend: "python"\nno_such_field: 1\n', loaded=False),
    "bad_dims": Model("identity", (Tensor("INPUT0", "FP32", (0,)),), RESULTS, loaded=False),
    "bad_name": Model("identity", config='name: "other"\nbackend: "python"\n', loaded=False),
    "no_tensors": Model("identity", loaded=False),
    "no_versions": Model("identity", NUMBERS, RESULTS, versions=(), loaded=False),
}  # fmt: skip


def loaded() -> Iterator[str]:
    """The models that are there when the servers have started."""
    return (name for name, model in MODELS.items() if model.loaded)


def build(root: Path, names: Iterable[str] | None = None) -> None:
    """Write the models of these names, or all, into the folder `root`."""
    for name in names or MODELS:
        write(root / name, MODELS[name])


def write(folder: Path, model: Model) -> None:
    folder.mkdir(parents=True)
    text = model.text()
    if text is not None:
        (folder / "config.pbtxt").write_text(text)
    for file, content in model.files.items():
        (folder / file).write_text(content)
    for version in model.versions:
        (folder / version).mkdir()
        shutil.copy(SOURCES / f"{model.source}.py", folder / version / "model.py")
