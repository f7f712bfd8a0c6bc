"""Python models: real model.py files, run as the engine runs them, with an engine behind them that the test writes."""

import asyncio
import gc
import json
import logging
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching.errors import QueueFull
from engine import custom_metrics
from engine.backends.python import PythonBackend, complete
from engine.backends.triton_python_backend_utils import AHEAD
from engine.config import ModelConfig, parse_config, read_text
from engine.errors import (
    Cancelled,
    ConfigError,
    InvalidInput,
    LoadFailed,
    ModelError,
    NotFound,
    NotReady,
    Unimplemented,
)
from engine.types import InferRequest, InferResponse, ModelMetadata

CONFIG = """
backend: "python"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] }
output [ { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }, { name: "z" data_type: TYPE_FP32 dims: [ 2 ] } ]
parameters { key: "factor" value { string_value: "3" } }
"""
DECOUPLED = CONFIG + "model_transaction_policy { decoupled: true }"

HEAD = """
import asyncio, json, threading
import numpy as np
import triton_python_backend_utils as pb_utils
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

def x(request):
    return pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

def answer(array):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", array)])
"""


class FakeEngine:
    """Models as coroutines; `several` are those that give a list of responses."""

    def __init__(self) -> None:
        self.models: dict[str, Callable[[InferRequest], Awaitable[Any]]] = {}
        self.several: set[str] = set()
        self.asked: list[Any] = []
        self.broken: Exception | None = None
        self.streams_left = threading.Event()

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        if model not in self.models:
            raise NotFound(f"no model '{model}'")
        return ModelMetadata(model, ("1",), "python", 8, {}, {}, decoupled=model in self.several)

    async def infer(self, request: InferRequest) -> InferResponse:
        self.asked.append(request)
        answer: InferResponse = await self.models[request.model](request)
        return answer

    async def stream(self, request: InferRequest) -> AsyncIterator[InferResponse]:
        self.asked.append(request)
        try:
            answers = await self.models[request.model](request)
            for answer in answers if request.model in self.several else [answers]:
                if answer is None:  # never more
                    await asyncio.Event().wait()
                yield answer
        finally:
            self.streams_left.set()

    async def model_ready(self, model: str, version: str = "") -> bool:
        if model not in self.models:
            raise NotFound(model)
        return version != "2"

    async def load(self, model: str, config: str | None = None, files: Any = None) -> None:
        self.asked.append(("load", model, config, files))
        if self.broken is not None:
            raise self.broken

    async def unload(self, model: str, dependents: bool = False) -> None:
        self.asked.append(("unload", model, dependents))


class FakeCall:
    """A request, and what it was answered through the response sender."""

    def __init__(self, decoupled: bool = False, outputs: tuple[str, ...] | None = None, **request: Any) -> None:
        inputs = request.pop("inputs", {"x": np.ones((1, 2), "f4")})
        self.request = InferRequest("m", "", inputs, outputs or ("y", "z"), **request)
        self.decoupled = decoupled
        self.answers: list[tuple[Any, bool]] = []
        self.left = False
        self.ended = threading.Event()

    def respond(self, response: InferResponse | Exception | None, final: bool) -> None:
        self.answers.append((response, final))
        if final:
            self.ended.set()

    def cancelled(self) -> bool:
        return self.left

    @property
    def values(self) -> list[Any]:
        """First elements of y, texts of errors, None for an end without a response; after the last one."""
        assert self.ended.wait(30)
        return [
            outcome(answer)[1] if isinstance(answer, Exception) else None if answer is None else outcome(answer)
            for answer, _ in self.answers
        ]  # fmt: skip


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The engine's, in another thread."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def main() -> None:
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    loop, stop = started.result()
    yield loop
    loop.call_soon_threadsafe(stop.set)
    thread.join()


class Repository:
    """Writes models, and makes instances of them."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.folder, self.loop, self.engine = folder, loop, FakeEngine()
        self.made: list[PythonBackend] = []

    def write(self, source: str, name: str = "m", **siblings: str) -> Path:
        folder = self.folder / name / "1"
        folder.mkdir(parents=True, exist_ok=True)
        for sibling, text in siblings.items():
            (folder / f"{sibling}.py").write_text(text)
        (folder / "model.py").write_text(HEAD + source)
        return folder / "model.py"

    def config(self, text: str = CONFIG, name: str = "m") -> ModelConfig:
        return parse_config(text, name, "config.pbtxt")

    def make(self, source: str, config: str = CONFIG, name: str = "m", instance: int = 0) -> PythonBackend:
        file, parsed = self.write(source, name), self.config(config, name)
        backend = PythonBackend(parsed, file, parsed.instances[instance], "1", self.engine, self.loop)  # type: ignore[arg-type]
        self.made.append(backend)
        return backend

    def start(self, *arguments: Any, **options: Any) -> PythonBackend:
        backend = self.make(*arguments, **options)
        backend.initialize()
        return backend


@pytest.fixture
def repository(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Repository]:
    repository = Repository(tmp_path, loop)
    yield repository
    for backend in repository.made:
        backend.finalize()


def method(body: str, head: str = "def execute(self, requests):", indent: int = 8) -> str:
    """A model of one method."""
    lines = "\n".join(" " * indent + line for line in body.strip("\n").splitlines())
    return f"\nclass TritonPythonModel:\n    {head}\n{lines}\n"


def outcome(answer: Any) -> Any:
    """An answer's first element of y, or an error's class and text."""
    return (type(answer), str(answer)) if isinstance(answer, Exception) else float(answer.outputs["y"].flat[0])


# Loading


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import absent_one", "ModuleNotFoundError: No module named 'absent_one'\n\nAt:\n"
         "  m/1/model.py(12): <module>\n"),
        ("def (", "SyntaxError: invalid syntax"),
        ("", "AttributeError: module 'millrace_model_"),
        ("class TritonPythonModel:\n    pass", "Python model m/1/model.py does not implement `execute` method."),
        (method("raise ValueError('not today')", "def initialize(self, args):") + "    execute = None\n",
         "ValueError: not today\n\nAt:\n  m/1/model.py(15): initialize\n"),
        (method("open(args['model_repository'] + '/absent')", "def initialize(self, args):") + "    execute = None\n",
         "FileNotFoundError: [Errno 2] No such file or directory: 'm/absent'\n\nAt:\n  m/1/model.py(15): initialize\n"),
        (method("exit(3)", "def initialize(self, args):") + "    execute = None\n", "SystemExit: 3\n\nAt:\n"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: \n\nAt:\n"),
        ("raise asyncio.CancelledError", "CancelledError: \n\nAt:\n"),
        ("class Odd(Exception):\n    def __str__(self): return 1\nraise Odd",
         "Odd: <exception str() failed>\n\nAt:\n  m/1/model.py(14): <module>\n"),
        (method("pb_utils.InferenceRequest(model_name='a', inputs=[], requested_output_names=[]).exec()",
                "def initialize(self, args):") + "    execute = None\n",
         "TritonModelException: BLS is only supported during the 'execute' function."),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded(repository: Repository, source: str, text: str) -> None:
    """ModelError with what the model said, and where, without the path of the repository. Nothing of it stays."""
    before = {name for name in sys.modules if name.startswith("millrace_model_")}
    backend = repository.make(source)
    with pytest.raises(ModelError) as raised:
        backend.initialize()
    assert str(raised.value).startswith(text)
    assert str(repository.folder) not in str(raised.value)
    assert {name for name in sys.modules if name.startswith("millrace_model_")} == before
    backend.finalize()


def test_the_arguments_of_initialize(repository: Repository) -> None:
    """All are text; the config is the whole one, as JSON; the repository is the model's folder."""
    backend = repository.start(
        method("self.args = args", "def initialize(self, args):") + """
    def execute(self, requests):
        raise ValueError(json.dumps(self.args))
""", CONFIG + "instance_group { count: 2 kind: KIND_CPU }", instance=1)  # fmt: skip
    with pytest.raises(ModelError) as raised:
        backend.execute([FakeCall()])
    args = json.loads(str(raised.value).split("ValueError: ")[1].split("\n\nAt:")[0])
    config = json.loads(args.pop("model_config"))
    assert (config["max_batch_size"], config["parameters"]["factor"]["string_value"]) == (8, "3")
    assert config["input"][0]["dims"] == [2]
    assert args == {
        "model_instance_kind": "CPU", "model_instance_name": "m_0_1", "model_instance_device_id": "0",
        "model_repository": "m", "model_version": "1", "model_name": "m",
    }  # fmt: skip
    assert backend.device == "cpu"


def test_instances_do_not_share_globals(repository: Repository) -> None:
    """Each has model.py for itself, as if in a process of its own."""
    source = "count = 0\n" + method("global count\ncount += 1\nreturn [answer(np.full(2, count, 'f4'))]")
    config = CONFIG + "instance_group { count: 2 kind: KIND_CPU }"
    first, second = (repository.start(source, config, instance=instance) for instance in (0, 1))
    assert [outcome(first.execute([FakeCall()])[0]) for _ in range(3)] == [1, 2, 3]
    assert outcome(second.execute([FakeCall()])[0]) == 1


def test_a_new_instance_reads_the_file_again(repository: Repository) -> None:
    """What a reload is, as far as a backend knows; the old one goes on as it was."""
    old = repository.start(method("return [answer(np.full(2, 1, 'f4'))]"))
    new = repository.start(method("return [answer(np.full(2, 2, 'f4'))]"))
    assert [outcome(backend.execute([FakeCall()])[0]) for backend in (old, new, old)] == [1, 2, 1]


def test_finalize_frees_the_model(repository: Repository) -> None:
    """The model, its module and what it holds, the series that it counts in too."""
    source = (
        method("self.big = pb_utils.InferenceTrace()\nself.metric = pb_utils.MetricFamily('p_freed', 'd', "
               "pb_utils.MetricFamily.COUNTER).Metric()", "def initialize(self, args):")
        + "    def execute(self, requests):\n        return [answer(x(r)) for r in requests]\n"
    )  # fmt: skip
    backend = repository.start(source)
    backend.execute([FakeCall()])
    assert custom_metrics.render()[-1] == "p_freed 0"
    gone = weakref.ref(backend._model), weakref.ref(backend._model.big), weakref.ref(type(backend._model))
    backend.finalize()
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    assert not any("p_freed" in line for line in custom_metrics.render())
    assert not backend.is_ready()


def test_what_finalize_raises_is_logged(
    repository: Repository, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes no further; it is called once; BLS is over by then."""
    source = (
        method("return []")
        + """
    def finalize(self):
        print("finalize")
        pb_utils.InferenceRequest(model_name="a", inputs=[], requested_output_names=["y"]).exec()
"""
    )
    backend = repository.start(source)
    backend.finalize()
    backend.finalize()
    assert capsys.readouterr().out == "finalize\n"
    assert "BLS is only supported during the 'execute' function." in caplog.text


def test_a_failed_load_frees_the_model(repository: Repository) -> None:
    """While its error is still held."""
    source = "import weakref\nlog = []\n" + method("pb_utils.dying = weakref.ref(self)\nraise ValueError",
                                                  "def initialize(self, args):") + "    execute = None\n"  # fmt: skip
    backend = repository.make(source)
    with pytest.raises(ModelError) as raised:
        backend.initialize()
    gc.collect()
    pb_utils = sys.modules["triton_python_backend_utils"]
    assert pb_utils.dying() is None
    assert raised.value.__context__ is None
    del pb_utils.dying


# Executing


def test_answers_come_in_order(repository: Repository) -> None:
    """Each request has its own arrays, in a writable copy; what the client did not ask for is dropped."""
    source = method("""
answers = []
for request in requests:
    data = x(request)
    data *= 3
    tensors = [pb_utils.Tensor("z", data + 1), pb_utils.Tensor("y", data), pb_utils.Tensor("more", data)]
    answers.append(pb_utils.InferenceResponse(output_tensors=tensors, parameters={"rows": len(data)}))
return answers
""")
    calls = [FakeCall(inputs={"x": np.full((rows, 2), rows, "f4")}) for rows in (1, 2)]
    calls.append(FakeCall(outputs=("y",)))
    for call in calls:
        call.request.inputs["x"].flags.writeable = False
    first, second, third = repository.start(source).execute(calls)
    assert isinstance(first, InferResponse)
    assert isinstance(second, InferResponse)
    assert isinstance(third, InferResponse)
    np.testing.assert_array_equal(second.outputs["y"], np.full((2, 2), 6, "f4"))
    assert (first.model, first.version, list(first.outputs), list(third.outputs)) == ("m", "1", ["z", "y"], ["y"])
    assert second.parameters == {"rows": 2}
    assert calls[1].request.inputs["x"][0, 0] == 2


def test_what_a_request_says(repository: Repository) -> None:
    """Everything that the protocol carries; parameters are a JSON text."""
    source = method("""
request, = requests
said = [request.request_id(), request.correlation_id(), request.flags(), request.timeout(), request.parameters(),
        sorted(request.requested_output_names()), request.is_cancelled(), [t.name() for t in request.inputs()],
        pb_utils.get_input_tensor_by_name(request, "absent"), request.trace().get_context(),
        int(request.preferred_memory().preferred_memory_type), pb_utils.get_model_dir()]
request.set_flags(0)
request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_ALL)
raise ValueError(json.dumps(said + [request.flags()]))
""")
    call = FakeCall(
        id="i", correlation_id="s", flags=3, timeout=0.25, parameters={"a": 1, "b": "é", "c": True}, outputs=("z",)
    )
    call.left = True
    with pytest.raises(ModelError) as raised:
        repository.start(source).execute([call])
    assert json.loads(str(raised.value).split("ValueError: ")[1].split("\n\nAt:")[0]) == [
        "i", "s", 3, 250_000, '{"a":1,"b":"é","c":true}', ["z"], True, ["x"], None, "", 1, "m/1", 0,
    ]  # fmt: skip


PREFIX = "Failed to process the request(s) for model 'm_0', message: "


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise ValueError('text')", "ValueError: text\n\nAt:\n  m/1/model.py(15): execute\n"),
        ("raise pb_utils.TritonModelException('x')", "TritonModelException: x\n\nAt:\n  m/1/model.py(15): execute\n"),
        ("x(None)", "AttributeError: 'NoneType' object has no attribute 'inputs'\n\nAt:\n"),
        ("np.zeros((2, 2)).reshape(3)", "ValueError: cannot reshape array of size 4 into shape (3,)\n\nAt:\n"),
        ("exit(1)", "SystemExit: 1\n"),
        ("return []", "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
         "InferenceRequest(s) size is:2, and InferenceResponse(s) size is:0\n"),
        ("return ['a', 'b']", "Expected an 'InferenceResponse' object in the execute function return list, found type "
         "'<class 'str'>'."),
        ("return 'ab'", "Expected a list in the execute return, found type '<class 'str'>'."),
        ("return (None, None)", "Expected a list in the execute return, found type '<class 'tuple'>'."),
        ("requests[0].set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)",
         "TritonModelException: TRITONSERVER_REQUEST_RELEASE_RESCHEDULE is not served"),
        ("requests[0].set_release_flags(7)", "TritonModelException: Unsupported release flags 7."),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: \n\nAt:\n"),
        ("raise asyncio.CancelledError", "CancelledError: \n\nAt:\n"),
    ],
)  # fmt: skip
def test_a_batch_that_fails(repository: Repository, body: str, text: str) -> None:
    """As a whole, with Triton's texts: type, text, lines innermost first. The next batch is none the worse."""
    backend = repository.start(
        "import numpy\nfail = True\n" + method(f"if fail: {body}\nreturn [answer(x(r)) for r in requests]")
    )
    with pytest.raises(ModelError) as raised:
        backend.execute([FakeCall(), FakeCall()])
    assert str(raised.value).startswith(PREFIX + text.replace("(15)", "(17)"))
    assert str(repository.folder) not in str(raised.value)
    backend._model.execute.__globals__["fail"] = False
    assert [outcome(answer) for answer in backend.execute([FakeCall(), FakeCall()])] == [1, 1]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNKNOWN", InvalidInput), ("INTERNAL", ModelError), ("NOT_FOUND", NotFound), ("INVALID_ARG", InvalidInput),
        ("UNAVAILABLE", NotReady), ("UNSUPPORTED", Unimplemented), ("ALREADY_EXISTS", InvalidInput),
        ("CANCELLED", Cancelled),
    ],
)  # fmt: skip
def test_one_request_that_fails(repository: Repository, code: str, kind: type[Exception]) -> None:
    """The error is its own, its text goes out as it is; its batch-mate has its answer."""
    source = method(f"""
error = pb_utils.TritonError("no\\nreason", pb_utils.TritonError.{code})
return [pb_utils.InferenceResponse(error=error), answer(x(requests[1]))]
""")
    answers = repository.start(source).execute([FakeCall(), FakeCall()])
    assert [outcome(answer) for answer in answers] == [(kind, "no\nreason"), 1]


def test_execute_may_be_a_coroutine(repository: Repository) -> None:
    """One loop for all of an instance's batches, so what it keeps stays usable; it fails like a function."""
    source = method(
        """
if not hasattr(self, "event"):
    self.event, self.loop = asyncio.Event(), asyncio.get_running_loop()
    asyncio.get_running_loop().call_soon(self.event.set)
assert asyncio.get_running_loop() is self.loop
await self.event.wait()
if x(requests[0])[0, 0] == 0:
    raise ValueError("zero")
return [answer(x(request)) for request in requests]
""",
        "async def execute(self, requests):",
    )
    backend = repository.start(source)
    assert [outcome(backend.execute([FakeCall()])[0]) for _ in range(2)] == [1, 1]
    with pytest.raises(ModelError, match=r"message: ValueError: zero\n\nAt:\n  m/1/model.py\(21\): execute\n$"):
        backend.execute([FakeCall(inputs={"x": np.zeros((1, 2), "f4")})])
    assert outcome(backend.execute([FakeCall()])[0]) == 1


# Response senders of models that are not decoupled


def test_one_response_by_the_sender(repository: Repository) -> None:
    """For one request by the sender, for the other by the list; and for all of them, from another thread, later."""
    mixed = repository.start(
        method("""
sender = requests[0].get_response_sender()
assert sender is requests[0].get_response_sender() and not sender.is_cancelled()
sender.send(answer(x(requests[0]) * 5))
sender.send(flags=FINAL)
return [None, answer(x(requests[1]))]
""")
    )
    calls = [FakeCall(), FakeCall()]
    none, second = mixed.execute(calls)
    assert (none, calls[0].values, outcome(second), calls[1].answers) == (None, [5], 1, [])

    later = repository.start(
        method("""
senders = [request.get_response_sender() for request in requests]
def work():
    for sender in senders:
        sender.send(answer(np.full(2, 7, "f4")), FINAL)
threading.Thread(target=work).start()
"""),
        name="n",
    )
    calls = [FakeCall(), FakeCall()]
    assert later.execute(calls) == [None, None]
    assert [call.values for call in calls] == [[7], [7]]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("sender.send(answer(data), 2)", "Unable to send response. Unsupported flag provided."),
        ("sender.send()", "Inference Response object must be provided when the response flags is set to zero."),
        ("sender.send(flags=FINAL)",
         "Unable to send response. Non-decoupled model cannot send complete final before sending a response."),
        ("sender.send('a')", "response: expected InferenceResponse, found type '<class 'str'>'"),
        ("sender.send(answer(data), FINAL)\nsender.send(answer(data))",
         "Unable to send response. Non-decoupled model cannot send more than one response."),
        ("sender.send(answer(data))\nsender.send(answer(data))",
         "Unable to send response. Non-decoupled model cannot send more than one response."),
        ("sender.send(answer(data), FINAL)\nsender.send(flags=FINAL)",
         "Unable to send response. Response sender has been closed."),
    ],
)  # fmt: skip
def test_misuse_of_a_sender(repository: Repository, body: str, text: str) -> None:
    """It raises Triton's text; a request that was answered before keeps its answer, the others get the error."""
    backend = repository.start(method(f"data = x(requests[0])\nsender = requests[0].get_response_sender()\n{body}"))
    calls = [FakeCall(), FakeCall()]
    if "FINAL)\n" in body or "data))\n" in body:
        none, failed = backend.execute(calls)
        assert (none, calls[0].values, calls[1].answers) == (None, [1], [])
    else:
        with pytest.raises(ModelError) as raised:
            backend.execute(calls)
        failed = raised.value
        assert calls[0].answers == []
    assert text in str(failed)


def test_a_request_that_nobody_can_answer(repository: Repository) -> None:
    """None without the sender, or a sender that the model let go of, is an error: Triton never answers at all."""
    backend = repository.start(method("requests[1].get_response_sender()"))
    calls = [FakeCall(), FakeCall()]
    never, later = backend.execute(calls)
    assert (str(never), later) == ("model 'm_0' gave no response, and did not ask for the response sender", None)
    gc.collect()
    assert calls[1].values == ["model 'm_0' let go of a request without its last response"]


def test_a_list_after_the_sender(repository: Repository) -> None:
    """The first answer is the answer."""
    backend = repository.start(method("requests[0].get_response_sender().send(answer(x(requests[0])))\n"
                                      "return [answer(np.zeros(2, 'f4'))]"))  # fmt: skip
    call = FakeCall()
    assert (backend.execute([call]), call.values) == ([None], [1])


# Decoupled models


def test_any_number_of_responses(repository: Repository) -> None:
    """In order, from a thread; none at all; the last flag with a response, or alone. After it nothing goes out."""
    source = (
        method("""
for request in requests:
    threading.Thread(target=self.work, args=(request.get_response_sender(), int(x(request)[0, 0]))).start()
""")
        + """
    def work(self, sender, count):
        for i in range(count):
            sender.send(answer(np.full(2, i, "f4")), flags=FINAL if count == 2 and i == 1 else 0)
        if count != 2:
            sender.send(flags=FINAL)
        try:
            sender.send(answer(np.zeros(2, "f4")))
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_error(str(error))
"""
    )
    calls = [FakeCall(decoupled=True, inputs={"x": np.full((1, 2), count, "f4")}) for count in (3, 0, 2)]
    assert repository.start(source, DECOUPLED).execute(calls) == [None, None, None]
    assert [call.values for call in calls] == [[0, 1, 2, None], [None], [0, 1]]


def test_errors_among_the_responses(repository: Repository) -> None:
    """A response may be an error; it does not end the others."""
    source = method("""
sender = requests[0].get_response_sender()
sender.send(answer(x(requests[0])))
sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("one", pb_utils.TritonError.INVALID_ARG)))
sender.send(answer(x(requests[0])), FINAL)
""")
    call = FakeCall(decoupled=True)
    repository.start(source, DECOUPLED).execute([call])
    assert call.values == [1, "one", 1]
    assert isinstance(call.answers[1][0], InvalidInput)


@pytest.mark.parametrize("prefix", ["", "async "])
@pytest.mark.parametrize(
    ("end", "text"),
    [
        ("raise ValueError('late')", "ValueError: late\n\nAt:\n  m/1/model.py"),
        ("raise asyncio.CancelledError", "CancelledError: \n\nAt:\n  m/1/model.py"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: \n\nAt:\n  m/1/model.py"),
        ("return []", "Python model 'm_0' is using the decoupled mode and the execute function must return None."),
    ],
)
def test_a_decoupled_batch_that_fails(repository: Repository, prefix: str, end: str, text: str) -> None:
    """Whoever had no last response gets the error, and nothing after it."""
    source = method(
        f"""
self.senders = [request.get_response_sender() for request in requests]
self.senders[0].send(answer(x(requests[0])), FINAL)
self.senders[1].send(answer(x(requests[0])))
{end}
""",
        prefix + "def execute(self, requests):",
    )
    backend = repository.start(source, DECOUPLED)
    calls = [FakeCall(decoupled=True) for _ in range(3)]
    returned = backend.execute(calls)
    if prefix:
        assert returned == [None, None, None]
        assert all(call.values[-1].startswith(PREFIX + text) for call in calls[1:])
    else:
        assert returned[0] is None
        assert all(str(error).startswith(PREFIX + text) for error in returned[1:])
    assert calls[0].values == [1]
    with pytest.raises(Exception, match="Unable to send response. Response sender has been closed."):
        backend._model.senders[1].send(flags=1)


def test_a_decoupled_model_that_forgets(repository: Repository) -> None:
    """Its caller does not wait for ever: neither without the sender, nor after the model let go of it."""
    for name, prefix in (("a", ""), ("b", "async ")):
        source = method(
            "requests[1].get_response_sender().send(answer(x(requests[1])))", prefix + "def execute(self, requests):"
        )
        calls = [FakeCall(decoupled=True) for _ in range(2)]
        first, second = repository.start(source, DECOUPLED, name).execute(calls)
        assert second is None
        gc.collect()
        assert calls[1].values == [1, f"model '{name}_0' let go of a request without its last response"]
        never = calls[0].values[0] if prefix else str(first)
        assert never == f"model '{name}_0' gave no response, and did not ask for the response sender"


def test_decoupled_coroutines_run_at_once(repository: Repository) -> None:
    """A batch that waits does not keep the next from starting, which lets it go on."""
    source = "event = asyncio.Event()\n" + method(
        """
sender = requests[0].get_response_sender()
if x(requests[0])[0, 0] == 1:
    await event.wait()
else:
    event.set()
sender.send(answer(x(requests[0])), FINAL)
""",
        "async def execute(self, requests):",
    )
    backend = repository.start(source, DECOUPLED)
    first, second = (FakeCall(decoupled=True, inputs={"x": np.full((1, 2), value, "f4")}) for value in (1, 2))
    assert backend.execute([first]) == [None]
    assert backend.execute([second]) == [None]
    assert (first.values, second.values) == ([1], [2])


def test_finalize_ends_what_runs_in_the_background(repository: Repository) -> None:
    """Its thread too; whoever still waited gets an error."""
    source = method(
        "sender = requests[0].get_response_sender()\nawait asyncio.Event().wait()", "async def execute(self, requests):"
    )
    backend, call = repository.start(source, DECOUPLED), FakeCall(decoupled=True)
    backend.execute([call])
    assert any(thread.name == "m_0 coroutines" for thread in threading.enumerate())
    backend.finalize()
    assert call.values[0].startswith(PREFIX + "CancelledError")
    assert not any(thread.name == "m_0 coroutines" for thread in threading.enumerate())


# Readiness


@pytest.mark.parametrize(
    ("hook", "ready"),
    [
        ("", True),
        ("def is_ready(self): return True", True),
        ("async def is_ready(self): return True", True),
        ("def is_ready(self): return False", False),
        ("def is_ready(self): return 1", False),
        ("def is_ready(self): raise ValueError", False),
        ("def is_ready(self): raise KeyboardInterrupt", False),
        ("def is_ready(self): raise asyncio.CancelledError", False),
        ("async def is_ready(self): raise asyncio.CancelledError", False),
        ("async def is_ready(self): await asyncio.Event().wait()", False),
    ],
)
@pytest.mark.parametrize("config", [CONFIG, DECOUPLED])
def test_readiness(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, hook: str, ready: bool, config: str
) -> None:
    """Only True is ready, and only in time."""
    monkeypatch.setattr("engine.backends.python.READY_LIMIT", 0.05 if "wait" in hook else 5)
    backend = repository.make(method("return []") + f"    {hook}\n", config)
    assert not backend.is_ready()
    backend.initialize()
    assert backend.is_ready() is ready


# Calls of other models


ASK = """
def ask(request, name, **more):
    return pb_utils.InferenceRequest(
        model_name=name, inputs=request.inputs(), requested_output_names=['y'], **more)
"""


def bls(body: str, head: str = "def execute(self, requests):") -> str:
    """A model that calls `ask(name, ...)`: a request to a model with its own input."""
    return ASK + method(body, head)


async def doubled(request: InferRequest) -> InferResponse:
    return InferResponse(request.model, "1", {"y": request.inputs["x"] * 2}, {"by": "me"})


async def thrice(request: InferRequest) -> list[InferResponse]:
    return [InferResponse(request.model, "1", {"y": request.inputs["x"] * i}) for i in range(3)]


def raising(error: Exception) -> Callable[[InferRequest], Awaitable[Any]]:
    async def model(request: InferRequest) -> Any:
        raise error

    return model


REPORT = """
def report(response):
    if response.has_error():
        return [response.error().message(), response.error().code().name]
    return [float(t.as_numpy().flat[0]) for t in response.output_tensors()] + [response.parameters()]
"""


def reported(backend: PythonBackend) -> Any:
    """What a model says that raises Exception(json)."""
    with pytest.raises(ModelError) as raised:
        backend.execute([FakeCall()])
    return json.loads(str(raised.value).split("Exception: ")[1].split("\n\nAt:")[0])


NOT_READY = (
    "Model other - Error when running inference: Failed for execute the inference request. Model 'other' is not ready."
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, [NOT_READY, "INTERNAL"]),
        (InvalidInput("bad"), ["Model other - Error when running inference: bad", "INTERNAL"]),
        (ModelError("failed"), ["failed", "INTERNAL"]),
        (NotReady("draining"), ["draining", "UNAVAILABLE"]),
        (QueueFull("full", 1.0), ["full", "UNAVAILABLE"]),
        (OSError("disk"), ["disk", "INTERNAL"]),
    ],
)
@pytest.mark.parametrize("decoupled", ["False", "True"])
def test_errors_of_a_call_do_not_raise(
    repository: Repository, error: Exception | None, expected: Any, decoupled: str
) -> None:
    """The response has them, whichever way the call is made."""
    if error is not None:
        repository.engine.models["other"] = raising(error)
    backend = repository.start(
        REPORT
        + bls(f"""
responses = ask(requests[0], "other").exec(decoupled={decoupled})
raise Exception(json.dumps([report(r) for r in (responses if {decoupled} else [responses])]))
""")
    )
    assert reported(backend) == [expected]


def test_a_models_error_keeps_its_code(repository: Repository) -> None:
    """Through a call: what the called model says is what the calling one reads, codes that share an error too."""
    other = repository.start(
        method("""
return [pb_utils.InferenceResponse(error=pb_utils.TritonError("there", pb_utils.TritonError.ALREADY_EXISTS))]
"""),
        name="other",
    )

    async def model(request: InferRequest) -> Any:
        (answer,) = await asyncio.to_thread(other.execute, [FakeCall()])
        raise answer  # type: ignore[misc]

    repository.engine.models["other"] = model
    backend = repository.start(REPORT + bls("raise Exception(json.dumps(report(ask(requests[0], 'other').exec())))"))
    assert reported(backend) == ["there", "ALREADY_EXISTS"]


def test_a_call_and_its_answer(repository: Repository) -> None:
    """Everything that the request says arrives; the answer has tensors and parameters; both are copies."""
    repository.engine.models["other"] = doubled
    backend = repository.start(
        REPORT
        + bls("""
data = x(requests[0])
request = ask(requests[0], "other", model_version=3, request_id="i", correlation_id=9, flags=1, timeout=2_000_000,
              parameters={"a": 1}, preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 0),
              trace=requests[0].trace())
response = request.exec()
pb_utils.get_output_tensor_by_name(response, "y").as_numpy()[:] += 1
assert pb_utils.get_output_tensor_by_name(response, "absent") is None
data[:] = 100
raise Exception(json.dumps(report(response) + [request.parameters()]))
""")
    )
    assert reported(backend) == [3, '{"by":"me"}', '{"a":1}']
    (request,) = repository.engine.asked
    assert (request.model, request.version, request.id, request.correlation_id) == ("other", "3", "i", 9)
    assert (request.flags, request.timeout, request.parameters, request.outputs) == (1, 2, {"a": 1}, ("y",))
    np.testing.assert_array_equal(request.inputs["x"], np.ones((1, 2)))


def test_calls_at_once(repository: Repository) -> None:
    """Awaited together they run together; each is on its way before it is awaited."""
    there, both = [], asyncio.Event()

    async def model(request: InferRequest) -> InferResponse:
        there.append(request)
        if len(there) == 2:
            both.set()
        await both.wait()
        return await doubled(request)

    repository.engine.models["other"] = model
    backend = repository.start(REPORT + bls("""
first = ask(requests[0], "other").async_exec()
second = asyncio.create_task(self.second(requests[0]))
raise Exception(json.dumps([report(r) for r in await asyncio.gather(first, second)]))
""", "async def execute(self, requests):") + """
    async def second(self, request):
        return await ask(request, "other").async_exec()
""")  # fmt: skip
    assert reported(backend) == [[2, '{"by":"me"}']] * 2


def test_calls_from_any_thread(repository: Repository) -> None:
    """Of a request that the model made, in a pool that knows nothing of it, while another model is loaded as well."""
    repository.engine.models["other"] = doubled
    repository.start(method("return []"), name="unrelated")
    backend = repository.start(
        REPORT
        + "from concurrent.futures import ThreadPoolExecutor\n"
        + bls("""
with ThreadPoolExecutor(2) as pool:
    responses = list(pool.map(pb_utils.InferenceRequest.exec, [ask(requests[0], "other") for _ in range(3)]))
raise Exception(json.dumps([report(r)[0] for r in responses]))
""")
    )
    assert reported(backend) == [2, 2, 2]


DECOUPLED_TEXT = (
    "Model other - Error when running inference: Model other is using the decoupled. The current BLS request call "
    "doesn't support models using the decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' "
    "or 'async_exec' calls for decoupled models.'"
)


@pytest.mark.parametrize("prefix", ["", "a"])
def test_calls_of_a_decoupled_model(repository: Repository, prefix: str) -> None:
    """All responses, as often as one likes; refused where one alone was asked for; one of an ordinary model."""
    repository.engine.models |= {"other": thrice, "plain": doubled}
    repository.engine.several.add("other")
    call = "await ask(requests[0], {}).async_exec({})" if prefix else "ask(requests[0], {}).exec({})"
    backend = repository.start(
        REPORT
        + bls(
            f"""
responses = {call.format("'other'", "decoupled=True")}
found = [[report(r)[0] for r in responses], [report(r)[0] for r in responses]]
try:
    next(responses)
except StopIteration as end:
    found.append(str(end))
found.append(report({call.format("'other'", "")}))
found.append([report(r)[0] for r in {call.format("'plain'", "True")}])
raise Exception(json.dumps(found))
""",
            f"{'async ' if prefix else ''}def execute(self, requests):",
        )
    )
    assert reported(backend) == [
        [0, 1, 2], [0, 1, 2], "Iteration is done for the responses.", [DECOUPLED_TEXT, "INTERNAL"], [2],
    ]  # fmt: skip


def test_taking_a_call_back(repository: Repository) -> None:
    """The stream is left, and the last response says so; one that is over stays as it was."""

    async def endless(request: InferRequest) -> list[Any]:
        return [*await thrice(request), None]

    repository.engine.models |= {"other": endless, "plain": doubled}
    repository.engine.several.add("other")
    backend = repository.start(
        REPORT
        + bls("""
responses = ask(requests[0], "other").exec(decoupled=True)
found = [report(next(responses))[0], report(next(responses))[0], report(next(responses))[0]]
responses.cancel()
found += [report(r) for r in responses]
over = ask(requests[0], "plain").exec(decoupled=True)
assert len(list(over)) == 1
over.cancel()
early = ask(requests[0], "other").exec(decoupled=True)
early.cancel()
raise Exception(json.dumps(found + [len(list(over)), report(list(early)[-1])[1]]))
""")
    )
    cancelled = ["the request to model 'other' was cancelled", "CANCELLED"]
    assert reported(backend) == [0, 1, 2, cancelled, 1, "CANCELLED"]
    assert repository.engine.streams_left.wait(30)


def test_responses_that_nobody_wants_any_more(repository: Repository) -> None:
    """Letting go of the iterator leaves the stream."""

    async def endless(request: InferRequest) -> list[Any]:
        return [*await thrice(request), None]

    repository.engine.models["other"] = endless
    repository.engine.several.add("other")
    backend = repository.start(
        bls("next(ask(requests[0], 'other').exec(decoupled=True))\nreturn [answer(x(requests[0]))]")
    )
    assert outcome(backend.execute([FakeCall()])[0]) == 1
    gc.collect()
    assert repository.engine.streams_left.wait(30)


def test_responses_wait_for_the_model_that_asked(repository: Repository) -> None:
    """Of a hundred so many come before it asks for them; then all do, in order."""
    taken = 0

    async def hundred(request: InferRequest) -> Any:
        def give() -> Iterator[InferResponse]:
            nonlocal taken
            for taken in range(1, 101):
                yield InferResponse(request.model, "1", {"y": request.inputs["x"] * taken})

        return give()

    async def count(request: InferRequest) -> InferResponse:
        return InferResponse(request.model, "1", {"y": np.array([[taken]], "f4")})

    repository.engine.models |= {"other": hundred, "count": count}
    repository.engine.several.add("other")
    backend = repository.start(
        REPORT
        + bls("""
responses = ask(requests[0], "other").exec(decoupled=True)
found = [report(ask(requests[0], "count").exec())[0]]
found += [report(next(responses))[0] for _ in range(3)]
found += [report(ask(requests[0], "count").exec())[0], report(ask(requests[0], "count").exec())[0]]
found += [[report(response)[0] for response in responses]]
raise Exception(json.dumps(found))
""")
    )
    before, *first, _, after, rest = reported(backend)
    assert (before, first, after) == (AHEAD + 1, [1, 2, 3], AHEAD + 4)
    assert rest == list(range(4, 101))


def test_a_call_on_the_event_loop_itself(repository: Repository) -> None:
    """It would wait for itself: it raises instead."""
    repository.engine.models["other"] = doubled
    backend = repository.start(bls("return [pb_utils.is_model_ready('other') and ask(requests[0], 'other').exec()]"))

    async def execute() -> Any:
        return backend.execute([FakeCall()])

    with pytest.raises(ModelError, match="this call waits for the server's event loop, and was made on it"):
        asyncio.run_coroutine_threadsafe(execute(), repository.loop).result()


# The server, from a model


def test_models_from_a_model(repository: Repository) -> None:
    """Loading waits and says what failed, with texts of Triton's; unloading does not wait."""
    repository.engine.models["other"] = doubled
    backend = repository.start(
        method("""
found = [pb_utils.is_model_ready("other"), pb_utils.is_model_ready("other", "2"), pb_utils.is_model_ready("absent")]
pb_utils.load_model("other")
pb_utils.load_model(model_name="other", config='{"a": 1}', files={"file:1/model.py": b"x"})
pb_utils.unload_model("other", unload_dependents=True)
try:
    pb_utils.load_model("other", files=["a"])
except pb_utils.TritonModelException as error:
    found.append(str(error))
raise Exception(json.dumps(found))
""")
    )
    assert reported(backend) == [
        True, False, False,
        "failed to load model 'other', files should be a dictionary of file paths and file contents",
    ]  # fmt: skip
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), repository.loop).result()
    assert repository.engine.asked == [
        ("load", "other", None, None), ("load", "other", '{"a": 1}', {"1/model.py": b"x"}), ("unload", "other", True),
    ]  # fmt: skip
    repository.engine.broken = LoadFailed("no such model")
    broken = repository.start(method("pb_utils.load_model('other')"), name="n")
    with pytest.raises(
        ModelError,
        match="TritonModelException: Failed to load model: Failed to process the request for "
        "model 'n_0', message: no such model",
    ):
        broken.execute([FakeCall()])


def test_logs_and_prints(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """In the server's log, by level."""
    caplog.set_level(logging.DEBUG, "millrace.model")
    repository.start(
        method("""
pb_utils.Logger.log("a %s")
pb_utils.Logger.log("b", pb_utils.Logger.ERROR)
pb_utils.logger.log_info("c")
pb_utils.logger.log_warn("d")
pb_utils.logger.log_error("e")
pb_utils.logger.log_verbose("f")
return [answer(x(requests[0]))]
""")
    ).execute([FakeCall()])
    records = [record for record in caplog.records if record.name == "millrace.model"]
    assert [(record.levelname, record.getMessage()) for record in records] == [
        ("INFO", "a %s"), ("ERROR", "b"), ("INFO", "c"), ("WARNING", "d"), ("ERROR", "e"), ("DEBUG", "f"),
    ]  # fmt: skip


# Auto-complete


def completed(repository: Repository, body: str, config: str = "", name: str = "m") -> Any:
    """The config after `auto_complete_config` of this body; its argument is `config`."""
    head = "@staticmethod\n    def auto_complete_config(config):"
    message = read_text(config, "config.pbtxt")
    complete(message, repository.write(method(body, head), name))
    return message


X = '{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}'
IN_CONFIG = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
FUNCTION = "in auto-complete-config function for model 'm'"


@pytest.mark.parametrize(
    ("config", "body", "text"),
    [
        ("max_batch_size: 8", "config.set_max_batch_size(4)",
         f"ValueError: configuration specified max_batch_size 8, but {FUNCTION} specified max_batch_size 4"),
        ("sequence_batching { direct { } }", "config.set_dynamic_batching()",
         "ValueError: Configuration specified scheduling_choice as 'sequence_batching', but auto-complete-config "
         "function for model 'm' tries to set scheduling_choice as 'dynamic_batching'"),
        ("", f"config.add_input({X[:-1]}, 'extra': 1}})",
         f"ValueError: input 'x' {FUNCTION} contains property other than 'name', 'data_type', 'dims' and 'optional'."),
        ("", f"config.add_output({X[:-1]}, 'optional': True}})",
         f"ValueError: output 'x' {FUNCTION} contains property other than 'name', 'data_type' and 'dims'."),
        ("", "config.add_input({'data_type': 'TYPE_FP32', 'dims': [4]})",
         f"ValueError: input {FUNCTION} is missing 'name' property."),
        ("", "config.add_input({'name': 'x', 'data_type': 'TYPE_FP32'})",
         f"ValueError: input 'x' {FUNCTION} is missing 'dims' property."),
        ("", "config.add_output({'name': 'y', 'dims': [1]})",
         f"ValueError: output 'y' {FUNCTION} is missing 'data_type' property."),
        (IN_CONFIG, "config.add_input({'name': 'x', 'data_type': 'TYPE_INT32', 'dims': [4]})",
         "ValueError: unable to load model 'm', configuration expects datatype TYPE_FP32 for input 'x', model provides "
         "TYPE_INT32"),
        (IN_CONFIG, "config.add_output({'name': 'y', 'data_type': 'TYPE_FP32', 'dims': [8]})",
         "ValueError: model 'm', tensor 'y': the model expects dims [8] but the model configuration specifies dims "
         "[4]"),
        (IN_CONFIG, f"config.add_input({X[:-1]}, 'optional': True}})",
         "ValueError: model 'm', tensor 'x': the model expects optional True but the model configuration specifies "
         "optional False"),
        ("", "config.set_model_transaction_policy({'decoupled': True, 'other': 1})",
         f"ValueError: model transaction property {FUNCTION} contains property other than 'decoupled'."),
        ("model_transaction_policy { decoupled: true }", "config.set_model_transaction_policy({'decoupled': False})",
         "ValueError: trying to change decoupled property in auto-complete-config for model 'm', which is already set "
         "to 'True'."),
        ("", "return {}", "auto_complete_config function in model 'm' must return a valid pb.ModelConfig object."),
        ("", "config.add_input({'name': 'x', 'data_type': 'FP32', 'dims': [4]})\nreturn config", "ParseError: "),
        ("", "pb_utils.InferenceRequest(model_name='a', inputs=[], requested_output_names=['y']).exec()",
         "TritonModelException: BLS is only supported during the 'execute' function."),
        ("", "pb_utils.get_model_dir()", "TritonModelException: get_model_dir was not called by a loaded model"),
        ("", "exit()", "SystemExit: None"),
        ("", "raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("", "raise asyncio.CancelledError", "CancelledError: "),
    ],
)  # fmt: skip
def test_what_auto_complete_may_not(repository: Repository, config: str, body: str, text: str) -> None:
    """Triton's texts, as ConfigError; what the file says stays."""
    served = config.startswith("sequence")  # the reader of configs may refuse it before
    message = read_text("" if served else config, "config.pbtxt")
    if served:
        message.sequence_batching.SetInParent()
    before = message.SerializeToString()
    head = "@staticmethod\n    def auto_complete_config(config):"
    with pytest.raises(ConfigError) as raised:
        complete(message, repository.write(method(body, head)))
    assert str(raised.value).startswith(text)
    assert message.SerializeToString() == before or text.startswith("ParseError")
    assert not [name for name in sys.modules if name.startswith("millrace_model_")]


def test_auto_complete(repository: Repository) -> None:
    """Fills in what is missing, and completes what is there in part; the rest of the config stays."""
    message = completed(repository, f"""
assert config.as_dict()["name"] == "m" and config.as_dict()["input"][0]["dims"] == []
assert config.as_dict()["parameters"]["k"]["string_value"] == "v"
config.set_max_batch_size(16)
config.set_dynamic_batching()
config.add_input({X})
config.add_input({{"name": "more", "data_type": "TYPE_STRING", "dims": [-1, 2], "optional": True}})
config.add_output({{"name": "y", "data_type": "TYPE_BOOL", "dims": [1]}})
config.set_model_transaction_policy({{"decoupled": True}})
return config
""", 'max_batch_size: 4 input { name: "x" } parameters { key: "k" value { string_value: "v" } }')  # fmt: skip
    expected = (
        'max_batch_size: 16 dynamic_batching { } model_transaction_policy { decoupled: true }'
        'input [ { name: "x" data_type: TYPE_FP32 dims: 4 },'
        '        { name: "more" data_type: TYPE_STRING dims: [ -1, 2 ] optional: true } ]'
        'output { name: "y" data_type: TYPE_BOOL dims: 1 } parameters { key: "k" value { string_value: "v" } }'
    )  # fmt: skip
    assert message == read_text(expected, "")


def test_nothing_to_complete(repository: Repository) -> None:
    """A scheduler that is there is kept as it is; so is a config whose model has no such hook."""
    text = "max_batch_size: 4 dynamic_batching { max_queue_delay_microseconds: 7 }" + IN_CONFIG
    assert completed(repository, "config.set_dynamic_batching()\nreturn config", text) == read_text(text, "")
    message = read_text(text, "")
    complete(message, repository.write(method("return []")))
    assert message == read_text(text, "")
    with pytest.raises(ConfigError, match="^ModuleNotFoundError: No module named 'absent_one'\n\nAt:\n  m/1/model.py"):
        complete(message, repository.write("import absent_one"))


# Many


def test_a_thousand_loads_leave_nothing(repository: Repository) -> None:
    """Neither modules, nor threads, nor models."""
    source = "import sibling\n" + method(
        "return [answer(x(r)) for r in requests]", "async def execute(self, requests):"
    )
    file, config = repository.write(source, sibling="X = 1"), repository.config()
    gone: list[weakref.ref[Any]] = []

    def cycle() -> None:
        backend = PythonBackend(config, file, config.instances[0], "1", repository.engine, repository.loop)  # type: ignore[arg-type]
        backend.initialize()
        assert outcome(backend.execute([FakeCall()])[0]) == 1
        gone.append(weakref.ref(backend._model))
        backend.finalize()

    cycle()
    gc.collect()
    sizes = len(sys.modules), len(sys.path_importer_cache), len(sys.meta_path), threading.active_count()
    for _ in range(1000):
        cycle()
    gc.collect()
    assert [reference() for reference in gone if reference() is not None] == []
    assert (len(sys.modules), len(sys.path_importer_cache), len(sys.meta_path), threading.active_count()) == sizes


def test_the_backends_calls_are_the_engines(repository: Repository) -> None:
    """Anything with a request, respond and cancelled is a call; any sequence of them is a batch."""
    backend = repository.start(method("return [answer(x(r)) for r in requests]"))
    calls: Sequence[FakeCall] = (FakeCall(), FakeCall())
    assert [outcome(answer) for answer in backend.execute(calls)] == [1, 1]


def test_an_answer_that_cannot_be_converted_leaves_nobody_without_one(repository: Repository) -> None:
    """The sender was asked for, and the list has an output that is no tensor's: everybody gets the error."""
    backend = repository.start(
        method(
            "for request in requests:\n"
            "    request.get_response_sender()\n"
            "return [pb_utils.InferenceResponse([pb_utils.Tensor('y', np.array(['\\ud800'], dtype=object))])\n"
            "        for request in requests]"
        )
    )
    with pytest.raises(ModelError, match="Failed to process the request"):
        backend.execute([FakeCall(), FakeCall()])
