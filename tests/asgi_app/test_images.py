"""POST /classify: a picture in, its class out, by the real model; and what is no picture, or no form, or no option."""

import asyncio
import threading
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest
import pytest_asyncio
from PIL import Image

from asgi_app import images
from engine.errors import ConfigError, NotReady
from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import Engine, InferRequest
from tests.client import Answer, Client
from tests.conftest import StartEngine, StartLocal
from tests.forms import in_form, owner
from tests.scripted import Gate, Scripted, add_model, double
from tests.timing import until

SAMPLES = sorted(Path("models/digits/samples").iterdir())
SEVEN = Path("models/digits/samples/7.png").read_bytes()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(form: str) -> AsyncIterator[Client]:
    """In front of the model in the repository."""
    settings = Settings(models="models", max_pixels=5_000_000)
    engine = LocalEngine(settings)
    await engine.start()
    async with in_form(form, engine, settings) as asked:
        yield Client(asked, settings)
    await engine.stop()


# Loading the model takes longer than a test: those that only ask it share one, and so one event loop.
shared = pytest.mark.asyncio(loop_scope="module")


def form(*parts: tuple[str, bytes], boundary: str = "xyz") -> bytes:
    return (
        b"".join(
            b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary.encode(), head.encode(), content)
            for head, content in parts
        )
        + b"--%b--\r\n" % boundary.encode()
    )


async def upload(client: Client, content: bytes, content_type: str = "multipart/form-data; boundary=xyz") -> Answer:
    return await client("POST", "/classify", content, {"Content-Type": content_type})


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
@shared
async def test_the_samples(sample: Path, client: Client) -> None:
    """Each picture shipped with the model gets the digit in its name, as a raw body and as a form's file."""
    for answer in (
        await client("POST", "/classify", sample.read_bytes()),
        await upload(
            client, form(("name=note", b"hello"), (f'name="file"; filename="{sample.name}"', sample.read_bytes()))
        ),
    ):
        assert answer.status == 200
        assert answer.json["class_name"] == sample.stem
        assert 0.5 < answer.json["confidence"] <= 1


@shared
async def test_it_is_listed_where_a_model_classifies(client: Client) -> None:
    """And nowhere else: what / lists answers."""
    assert b"/classify" in (await client("GET", "/")).body


@shared
async def test_many_at_once(client: Client) -> None:
    """All samples, several times at once, batched: each still gets its own digit."""
    answers = await asyncio.gather(*(client("POST", "/classify", s.read_bytes()) for s in SAMPLES * 5))
    assert [answer.json["class_name"] for answer in answers] == [sample.stem for sample in SAMPLES] * 5


@shared
async def test_top_k(client: Client) -> None:
    """`top` holds top_k classes, best first; 5 without being asked."""
    for query, count in (("", 5), ("?top_k=1", 1), ("?top_k=10", 10)):
        top = (await client("POST", "/classify" + query, SEVEN)).json["top"]
        assert len(top) == count
        assert top[0]["class_name"] == "7"
        confidences = [entry["confidence"] for entry in top]
        assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(1)


async def test_below_the_threshold_there_is_no_class(start_engine: StartEngine, tmp_path: Path) -> None:
    """An answer below the threshold has no class, says so, and still shows what came closest; at it, it has one."""
    folder = add_model(
        tmp_path, "c",
        """backend: "pytorch" max_batch_size: 4 dynamic_batching { }
        input { name: "p" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] }
        output { name: "q" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "l" }""",
    )  # fmt: skip
    (folder / "l").write_text("cat\ndog\n")
    engine = await start_engine(
        c=lambda inputs: {"q": np.tile(np.array([0.25, 0.5, 0.25], "<f4"), (len(inputs["p"]), 1))}
    )
    client = Client(engine, Settings(classifier="c"))
    assert (await client("POST", "/classify?threshold=0.5", SEVEN)).json == {
        "class_name": "dog",
        "confidence": 0.5,
        "top": [
            {"class_name": "dog", "confidence": 0.5},
            {"class_name": "cat", "confidence": 0.25},
            {"class_name": "2", "confidence": 0.25},
        ],
    }
    none = (await client("POST", "/classify?threshold=0.51&top_k=1", SEVEN)).json
    assert none == {
        "class_name": None,
        "confidence": 0.5,
        "top": [{"class_name": "dog", "confidence": 0.5}],
        "reason": "no class reaches the threshold of 0.51",
    }


async def test_a_model_that_answers_nonsense_is_500(start_engine: StartEngine, tmp_path: Path) -> None:
    """NaN is no probability: the model's error, not a made-up class."""
    add_model(
        tmp_path, "c",
        """backend: "pytorch" max_batch_size: 4
        input { name: "p" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] }
        output { name: "q" data_type: TYPE_FP32 dims: [ 3 ] }""",
    )  # fmt: skip
    engine = await start_engine(c=lambda inputs: {"q": np.full((len(inputs["p"]), 3), np.nan, "<f4")})
    assert (await Client(engine, Settings(classifier="c"))("POST", "/classify", SEVEN)).status == 500


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("top_k=0", "top_k: must be a whole number from 1 to 10, got '0'"),
        ("top_k=11", "top_k: must be"),
        ("top_k=many", "top_k: must be"),
        ("top_k=", "top_k: must be"),
        ("top_k=%C2%B2", "top_k: must be"),
        ("threshold=2", "threshold: must be a number from 0 to 1, got '2'"),
        ("threshold=nan", "threshold: must be"),
        ("threshold=high", "threshold: must be"),
        ("topk=1", "topk: no such query parameter; there are top_k and threshold; did you mean top_k?"),
        ("%ff=1", "no such query parameter"),
    ],
)
@shared
async def test_options_that_do_not_fit(query: str, text: str, client: Client) -> None:
    """A wrong option is named, with what it may be; an unknown one with the nearest."""
    answer = await client("POST", "/classify?" + query, SEVEN)
    assert answer.status == 400
    assert text in answer.json["detail"]


def picture(kind: str, mode: str = "L", size: tuple[int, int] = (20, 20), **options: Any) -> bytes:
    stream = BytesIO()
    Image.new(mode, size, 255).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"no picture at all", 400),
        (SEVEN[: len(SEVEN) // 2], 400),
        (picture("PNG"), 400),
        (picture("GIF"), 415),
        (picture("PNG", "1", (3000, 3000)), 413),
    ],
    ids=["empty", "text", "truncated", "blank", "gif", "bomb"],
)
@shared
async def test_what_is_no_picture_of_a_digit(content: bytes, status: int, client: Client) -> None:
    """Each is an error that names the picture; the next one is served."""
    answer = await client("POST", "/classify", content)
    assert answer.status == status
    assert "picture" in answer.json["detail"]
    assert (await client("POST", "/classify", SEVEN)).status == 200


@pytest.mark.parametrize(
    ("content", "content_type", "text"),
    [
        (form(("name=picture", SEVEN)), None, "file: the form has no field of this name"),
        (form(("name=file", SEVEN), ("name=file", SEVEN)), None, "file: the form has more than one field"),
        (form(*[("name=a", b"")] * 40), None, "the form has more than 32 parts"),
        (form(("name=file", SEVEN))[:-9], None, "the multipart body is malformed"),
        (form(("name=file", SEVEN), boundary="other"), None, "the multipart body is malformed"),
        (form(("name=file", SEVEN)), "multipart/form-data", "the multipart body is malformed"),
        (form(("name=file", SEVEN)), "multipart/form-data; boundary=", "the multipart body is malformed"),
        (b"", None, "the multipart body is malformed"),
        (b"--xyz\r\n\r\n\r\n--xyz--\r\n", None, "the multipart body is malformed"),
        (form(("name=file", b"")), None, "picture"),
    ],
)
@shared
async def test_forms_that_are_broken(content: bytes, content_type: str | None, text: str, client: Client) -> None:
    """A form without the field, with two, cut short or with a broken boundary is a 400 that says which."""
    answer = await upload(client, content, content_type or "multipart/form-data; boundary=xyz")
    assert answer.status == 400
    assert text in answer.json["detail"]


TINY_CLASSIFIER = """backend: "pytorch" max_batch_size: 4 dynamic_batching { }
input { name: "p" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] }
output { name: "q" data_type: TYPE_FP32 dims: [ 3 ] }"""


async def busy_classifier(start_engine: StartEngine, tmp_path: Path) -> tuple[Client, threading.Event, Engine]:
    """A classifier whose lane is busy until the event is set."""
    add_model(tmp_path, "c", TINY_CLASSIFIER)
    gate = Gate()

    def run(inputs: Any) -> dict[str, Any]:
        gate({"x": np.zeros(1)})
        return {"q": np.tile(np.array([0.25, 0.5, 0.25], "<f4"), (len(inputs["p"]), 1))}

    engine = await start_engine({"inline_ms": 0}, c=run)
    client = Client(engine, Settings(classifier="c"))
    gate.open.clear()
    return client, gate.open, engine


async def test_a_deadline_holds_here_too(start_engine: StartEngine, tmp_path: Path) -> None:
    """Behind a busy lane a picture with a time budget is answered 504 when it is over, and never classified."""
    client, gate, _ = await busy_classifier(start_engine, tmp_path)
    busy = asyncio.ensure_future(client("POST", "/classify", SEVEN))
    await until(lambda: bool(Scripted.calls))
    assert (await client("POST", "/classify", SEVEN, {"X-Request-Timeout-Ms": "15"})).status == 504
    gate.set()
    assert (await busy).status == 200
    assert len(Scripted.calls) == 1


@pytest.mark.parametrize(("setting", "client"), [("", ""), ("X-Client", "a")])
async def test_the_client_header_counts_here_too(
    setting: str, client: str, start_engine: StartEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `client_header` set, a picture counts against its value."""
    _, gate, engine = await busy_classifier(start_engine, tmp_path)
    gate.set()
    asked, infer = [], engine.infer

    def record(request: InferRequest) -> Any:
        asked.append(request.client)
        return infer(request)

    monkeypatch.setattr(engine, "infer", record)
    front = Client(engine, Settings(classifier="c", client_header=setting))
    assert (await front("POST", "/classify", SEVEN, {"X-Client": "a"})).status == 200
    assert asked == [client]


async def test_who_leaves_is_never_classified(start_engine: StartEngine, tmp_path: Path) -> None:
    """Clients that disconnect while their pictures wait cost the model nothing."""
    client, gate, engine = await busy_classifier(start_engine, tmp_path)
    busy = asyncio.ensure_future(client("POST", "/classify", SEVEN))
    await until(lambda: bool(Scripted.calls))
    leave, pending = asyncio.Event(), owner(engine)._models["c", ""].batcher.pending
    gone = [asyncio.ensure_future(client("POST", "/classify", SEVEN, leave=leave)) for _ in range(10)]
    await until(lambda: pending.rows == 10)
    leave.set()
    await asyncio.wait_for(asyncio.gather(*gone), 10)
    await until(lambda: pending.rows == 0)
    gate.set()
    assert (await busy).status == 200
    assert len(Scripted.calls) == 1


async def test_a_full_queue_reads_no_picture(local_engine: StartLocal, tmp_path: Path) -> None:
    """While the model's queue is full, a body that is no picture at all is told so: 429. Where the engine is here."""
    add_model(tmp_path, "c", TINY_CLASSIFIER)
    engine = await local_engine(c=lambda inputs: {"q": np.full((len(inputs["p"]), 3), 0.5, "<f4")})
    client = Client(engine, Settings(classifier="c"))
    pending = engine._models["c", ""].batcher.pending
    pending.nbytes = pending.policy.capacity_bytes
    assert (await client("POST", "/classify", b"no picture")).status == 429
    pending.nbytes = 0
    assert (await client("POST", "/classify", b"no picture")).status == 400


async def test_too_many_large_pictures_are_refused(
    start_engine: StartEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that is being read cannot be stopped, so only so many may be: one more is 429."""
    add_model(tmp_path, "c", TINY_CLASSIFIER)
    engine = await start_engine(c=lambda inputs: {"q": np.full((len(inputs["p"]), 3), 0.5, "<f4")})
    client = Client(engine, Settings(classifier="c"))
    monkeypatch.setattr(images, "MOST_PICTURES", 0)
    large = BytesIO()
    Image.open(BytesIO(SEVEN)).convert("L").resize((300, 300)).save(large, "PNG")
    answer = await client("POST", "/classify", large.getvalue())
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    small = BytesIO()
    Image.open(BytesIO(SEVEN)).convert("L").resize((100, 100)).save(small, "PNG")
    assert (await client("POST", "/classify", small.getvalue())).status == 200
    monkeypatch.setattr(images, "MOST_PICTURES", 1)
    assert (await client("POST", "/classify", large.getvalue())).status == 200
    assert images._reading == 0


@shared
async def test_a_picture_of_too_many_bytes_is_413(client: Client) -> None:
    """The bound on a picture's bytes is below that on a body's."""
    small = Client(client.engine, Settings(max_picture=1000))
    answer = await small("POST", "/classify", SEVEN)
    assert (answer.status, "MILLRACE_MAX_PICTURE" in answer.error) == (413, True)


@pytest.mark.parametrize(
    ("classifier", "config", "text"),
    [
        ("cats", TINY_CLASSIFIER, "MILLRACE_CLASSIFIER: Request for unknown model: 'cats' is not found"),
        ("c", TINY_CLASSIFIER.replace("[ 1, 8, 8 ]", "[ 8 ]"), "MILLRACE_CLASSIFIER: model 'c' does not classify"),
        ("c", TINY_CLASSIFIER.replace("[ 1, 8, 8 ]", "[ 3, 8, 8 ]"), "does not classify"),
        ("c", TINY_CLASSIFIER.replace("[ 1, 8, 8 ]", "[ 1, -1, 8 ]"), "does not classify"),
        ("c", TINY_CLASSIFIER.replace("[ 3 ]", "[ 3, 1 ]"), "does not classify"),
    ],
)
async def test_a_classifier_that_does_not_classify_ends_the_start(
    classifier: str, config: str, text: str, start_engine: StartEngine, tmp_path: Path
) -> None:
    """A model that was named and is not there, or does something else, is found out before a picture comes."""
    add_model(tmp_path, "c", config)

    def run(inputs: Any) -> dict[str, Any]:
        return {"q": np.zeros((len(inputs["p"]), *((3, 1) if "[ 3, 1 ]" in config else (3,))), "<f4")}

    engine = await start_engine(c=run)
    with pytest.raises(ConfigError, match=text):
        images.check_classifier(engine, Settings(classifier=classifier))


async def test_a_repository_without_a_classifier_is_fine(start_engine: StartEngine, tmp_path: Path) -> None:
    """The default model need not be there, and none may be wanted: /classify is then 404."""
    engine = await start_engine(m=double)
    for settings in (Settings(), Settings(classifier="")):
        images.check_classifier(engine, settings)
        assert (await Client(engine, settings)("POST", "/classify", SEVEN)).status == 404


def test_of_an_engine_that_is_not_there_yet_nothing_is_known() -> None:
    """A server may start before its engine does: what cannot be looked at is no mistake of the operator's."""

    class Away:
        def metadata(self, model: str, version: str = "") -> None:
            raise NotReady("the engine is not there yet")

    for classifier in ("digits", "mine"):
        images.check_classifier(cast("Engine", Away()), Settings(classifier=classifier))


@shared
async def test_a_large_picture_is_decoded_off_the_event_loop(client: Client) -> None:
    """While a picture of some megapixels is decoded the loop goes on turning."""
    stream = BytesIO()
    Image.open(BytesIO(SEVEN)).convert("L").resize((2200, 2200)).save(stream, "PNG")
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.ensure_future(count())
    await asyncio.sleep(0)
    answer = await client("POST", "/classify", stream.getvalue())
    counter.cancel()
    assert answer.json["class_name"] == "7"
    assert turns > 100


@shared
async def test_a_classifier_that_is_not_there_is_404(client: Client) -> None:
    """The setting names a model that the repository does not hold: the answer says which."""
    answer = await Client(client.engine, Settings(classifier="cats"))("POST", "/classify", SEVEN)
    assert (answer.status, "'cats'" in orjson.loads(answer.body)["detail"]) == (404, True)
