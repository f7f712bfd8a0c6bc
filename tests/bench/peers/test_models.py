"""The models that all peers serve, and the JSON in which each is asked."""

import numpy as np
import orjson
import pytest

from bench.peers.dialects import BENTOML, OPEN_INFERENCE, plain
from bench.peers.models import MODELS, Predictor, make_rows, spoil
from bench.shapes import MINILM


@pytest.fixture(scope="module", params=list(MODELS))
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return Predictor(request.param)


def name_of(predictor: Predictor) -> str:
    return next(name for name, model in MODELS.items() if model is predictor.model)


def test_a_row_alone_and_in_a_batch_have_the_same_answer(predictor: Predictor) -> None:
    """Padded or not, and the rows of a model differ enough for a mix-up to show."""
    rows = make_rows(name_of(predictor))[:4]
    together = np.array(predictor(rows))
    alone = np.array([predictor([row])[0] for row in rows])
    assert together.shape == (4, predictor.model.width)
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    assert not np.allclose(together[0], together[1], rtol=1e-2, atol=1e-2)


def test_the_weights_and_the_rows_are_always_the_same() -> None:
    (first, *_), (again, *_) = Predictor("mlp")(make_rows("mlp")), Predictor("mlp")(make_rows("mlp"))
    assert first == again


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_spoilt_row_cannot_be_stacked(name: str) -> None:
    with pytest.raises(ValueError, match="reshape"):
        Predictor(name).stack([spoil(name, make_rows(name)[0])])


def test_a_spoilt_sequence_has_no_embedding() -> None:
    (row,) = make_rows("encoder")[:1]
    assert spoil("encoder", row).min() == MINILM.vocabulary
    with pytest.raises(IndexError):
        Predictor("encoder")([spoil("encoder", row)])


def test_each_dialect_says_the_same_row() -> None:
    """The numbers are short, and are the row's again in float32."""
    row = make_rows("mlp")[0]
    said = [
        orjson.loads(OPEN_INFERENCE.encode("mlp", row))["inputs"][0]["data"],
        orjson.loads(plain("/").encode("mlp", row))["x"],
        orjson.loads(BENTOML.encode("mlp", row))["x"][0],
    ]
    for numbers in said:
        assert max(len(str(number)) for number in numbers) <= 4
        assert np.array_equal(np.array(numbers, np.float32), row)


def test_each_dialect_reads_its_answer() -> None:
    answers = [
        (OPEN_INFERENCE, b'{"model_name":"mlp","outputs":[{"name":"y","shape":[1,2],"data":[1,2]}]}'),
        (plain("/"), b'{"y":[1,2]}'),
        (BENTOML, b"[[1,2]]"),
    ]
    for dialect, body in answers:
        assert dialect.decode(body).tolist() == [1.0, 2.0]
