"""Programs of torch.export as functions of flat tensors, made faster in the ways that a config may ask for.

`flatten` is the plain way, and gives bit for bit what the program's own module gives. That module takes its arguments
apart, checks them, and looks each weight up by name at every call, which costs more than the operators of a tiny model.
Here weights are arguments that are bound once, and nothing is checked. `in_bfloat16` and the layout change what is
computed with, `compile_program` what computes it.

None of these functions looks at the shapes that it is given: `guards` does, where a model's shapes are not all known
when it is loaded.
"""

import json
import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..config import ModelConfig
from ..errors import ConfigError

# Takes the program's inputs in the order of its signature.
Function = Callable[..., Any]

# The parameters that ask for something here.
OPTIONS = ("precision", "channels_last", "compile", "TORCH_COMPILE_OPTIONAL_PARAMETERS")

# torch.cpu.get_capabilities() -> the instructions that multiply bfloat16: each is enough.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

_aten = torch.ops.aten
_compiling = threading.Lock()  # inductor's settings are the process's

logger = logging.getLogger("millrace")


def check_options(config: ModelConfig, file: Path, device: torch.device) -> None:
    """What a config asks for, where it cannot be had.

    Raises:
        ConfigError: names parameter, value, and what is missing.
    """
    for key in (key for key in OPTIONS if key in config.parameters):
        if file.suffix != ".pt2":
            raise _refused(config, key, f"{file.name} is not of torch.export; save the model as model.pt2")
        if device.type != "cpu":
            raise _refused(
                config, key, f"is for models on the CPU, and this one is on {device}; "
                "instance_group [ { kind: KIND_CPU } ] puts it there"
            )  # fmt: skip
    if config.parameters.get("precision") == "bf16":
        able = torch.cpu.get_capabilities()
        if not any(able.get(name) for name in BFLOAT16):
            raise _refused(
                config, "precision", f"this CPU ({able.get('cpu_name', able.get('architecture'))}) has none of "
                f"{', '.join(BFLOAT16)}, and so is slower with bfloat16 than with float32; leave the parameter out, or "
                "ask for bf16-emulated, for the answers of a CPU that has one"
            )  # fmt: skip
    compiles = config.flag("compile")
    if compiles and config.flag("channels_last"):
        raise _refused(config, "channels_last", "the compiler chooses the layout of what it compiles; leave it out")
    if compiles and (config.variable or (config.ragged and not config.policy.lengths)):
        raise _refused(
            config, "compile", "compiled code checks no shapes of its inputs, so they must be known when it is "
            "loaded: give inputs dims without -1, or allow_ragged_batch: true and parameters.padded_lengths"
        )  # fmt: skip
    for key in json.loads(config.parameters.get("TORCH_COMPILE_OPTIONAL_PARAMETERS", "{}")):
        if not compiles or key != "options":
            raise _refused(
                config, "TORCH_COMPILE_OPTIONAL_PARAMETERS", "may have 'options', with parameters.compile true, and "
                "nothing else"
            )  # fmt: skip


def function(program: ExportedProgram, config: ModelConfig, threads: int) -> Function:
    """The program as the config asks for it.

    Args:
        threads: the most that one of its operators will have.

    Raises:
        ConfigError: this program cannot be had in that way.
    """
    channels_last, given = config.flag("channels_last"), config.parameters
    with _quiet():
        if "precision" in given:
            with _refusing(config, "precision", "the model cannot be computed with bfloat16"):
                program = in_bfloat16(program)
        elif channels_last:
            program = functional(program)
        if not config.flag("compile"):
            return flatten(program, channels_last)
        settings = json.loads(given.get("TORCH_COMPILE_OPTIONAL_PARAMETERS", "{}")).get("options", {})
        for name in sorted(set(settings) - set(torch._inductor.list_options())):
            raise _refused(config, "TORCH_COMPILE_OPTIONAL_PARAMETERS", f"torch._inductor.config has no '{name}'")
        started = time.monotonic()
        logger.info("model %s: compiling, which may take minutes", config.name)
        with _refusing(config, "compile", "the model does not compile"):
            compiled = compile_program(program, threads, settings)
        logger.info("model %s: compiled in %.0f s", config.name, time.monotonic() - started)
    return compiled


def guards(program: ExportedProgram) -> Function | None:
    """What raises AssertionError, "Guard failed: ...", for inputs of shapes that the program was not exported for."""
    found: Function | None = getattr(program.module(), "_guards_fn", None)
    return found


def flatten(program: ExportedProgram, channels_last: bool = False) -> Function:
    """The program's module without what surrounds its operators.

    Args:
        channels_last: lay out tensors of four dimensions, weights and inputs, with the channels innermost.
    """
    module = program.module(check_guards=False)
    graph = module.graph
    constants = _constants(module, graph)
    if channels_last:
        constants = {node: _nhwc(value) for node, value in constants.items()}
        _lay_out(graph)
    _bind(graph, constants)
    graph.set_codegen(torch.fx.graph.CodeGen())  # flat arguments, and a flat tuple of outputs
    graph.lint()
    function = partial(GraphModule(module, graph).forward, *constants.values())
    return _structured(function, program)


def in_bfloat16(program: ExportedProgram) -> ExportedProgram:
    """The program as torch.autocast runs it: matrix products and convolutions in bfloat16, sums and norms as they were.

    Inputs and outputs keep their datatypes.

    Raises:
        ValueError: there is nothing in it that autocast would change.
    """
    dtypes = [_dtype(node) for node in _outputs(program)]
    with torch.autocast("cpu", torch.bfloat16):
        program = program.run_decompositions({})
    if not any(
        node.target is _aten._to_copy.default and node.kwargs.get("dtype") is torch.bfloat16
        for node in program.graph.nodes
    ):
        raise ValueError("it has no matrix product and no convolution of float32")
    graph = program.graph
    for node, dtype in zip(_outputs(program), dtypes, strict=True):
        if dtype is None or _dtype(node) is dtype:
            continue
        end = graph.output_node()
        with graph.inserting_before(end):
            back = graph.call_function(_aten._to_copy.default, (node,), {"dtype": dtype})
        back.meta["val"] = node.meta["val"].to(dtype)
        end.replace_input_with(node, back)
        program.graph_signature.replace_all_uses(node.name, back.name)
    program.graph_module.recompile()
    return program


def functional(program: ExportedProgram) -> ExportedProgram:
    """The same program without operators that write into their arguments."""
    made: ExportedProgram = program.run_decompositions({})
    return made


def compile_program(program: ExportedProgram, threads: int, settings: Mapping[str, Any]) -> Function:
    """Machine code for the program, once for all shapes that it was exported for.

    It is compiled ahead of time, by AOTInductor: nothing is left that could compile when a request comes.

    Args:
        settings: of torch._inductor.config, by name.

    Raises:
        ValueError: there is no C++ compiler.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ValueError(f"it needs a C++ compiler: apt install g++, or name one in CXX; {error}") from None
    # Frozen, so that weights are laid out for the operators that take them. With as many threads as the calling one has
    # then, not now. In this process: workers would stay for life, each with torch in it.
    ours = {"freezing": True, "cpp.threads": threads, "cpp.dynamic_threads": threads > 1, "compile_threads": 1}
    with _compiling, torch.no_grad(), tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs={**ours, **settings}
        )
        loader = torch._inductor.aoti_load_package(package).loader
    return _structured(lambda *tensors: loader.boxed_run(list(tensors)), program)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of itself: it copies what it will deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _refusing(config: ModelConfig, key: str, why: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _refused(config, key, f"{why}: {str(error).strip().partition(chr(10))[0]}") from error


def _refused(config: ModelConfig, key: str, why: str) -> ConfigError:
    return ConfigError(f"model '{config.name}': parameters.{key}: {why}, got {config.parameters[key]!r}")


def _structured(function: Function, program: ExportedProgram) -> Function:
    """Gives what the program gives, for a function that gives flat tensors; one tensor comes in a sequence."""
    spec = program.call_spec.out_spec
    assert spec is not None
    if spec.is_leaf() or (spec.type in (tuple, list) and all(child.is_leaf() for child in spec.children())):
        return function
    return lambda *tensors: pytree.tree_unflatten(function(*tensors), spec)


def _constants(module: torch.nn.Module, graph: Graph) -> dict[Node, Any]:
    """Nodes whose value is known: weights, submodules, and weights in another datatype."""
    known: dict[Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "get_attr":
                known[node] = attrgetter(node.target)(module)
            elif node.target is _aten._to_copy.default and isinstance(known.get(node.args[0]), torch.nn.Parameter):
                known[node] = node.target(known[node.args[0]], **node.kwargs)
    return {node: value.detach() if isinstance(value, torch.Tensor) else value for node, value in known.items()}


def _bind(graph: Graph, constants: dict[Node, Any]) -> None:
    """Make the constants the first arguments, in their order."""
    first = next(iter(graph.nodes))
    for number, node in enumerate(constants):
        with graph.inserting_before(first):
            argument = graph.placeholder(f"constant_{number}")
        node.replace_all_uses_with(argument)
    for node in reversed(constants):
        graph.erase_node(node)


def _nhwc(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _lay_out(graph: Graph) -> None:
    """Inputs of four dimensions too, and views may copy, since what they look at is not where it was."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dim() == 4:
            with graph.inserting_after(node):
                moved = graph.call_function(_aten.contiguous.default, (node,))
            node.replace_all_uses_with(moved)
            moved.args, moved.kwargs = (node,), {"memory_format": torch.channels_last}
        elif node.target is _aten.view.default:
            node.target = _aten.reshape.default


def _outputs(program: ExportedProgram) -> Sequence[Any]:
    """What the program gives its caller: nodes, or plain values."""
    count = len(program.graph_signature.user_outputs)
    given = program.graph.output_node().args[0]
    assert isinstance(given, (tuple, list))
    return given[len(given) - count :]


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
