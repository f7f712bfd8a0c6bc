"""Cost: the line is found, followed when it moves, and not believed further than the batches say."""

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import Cost

A, B = 0.004, 0.0005
SIZES = (1, 8, 16, 32)
SEEDS = range(20)


def true(size: float) -> float:
    return A + B * size


def learn(
    seed: int, batches: int, seconds: Callable[[int, random.Random], float], sizes: tuple[int, int] = (1, 32)
) -> Iterator[Cost]:
    """What is known after each batch. Sizes are drawn; `seconds` says what one takes, in multiples of the truth."""
    source, known = random.Random(seed), Cost()
    for number in range(batches):
        size = source.randint(*sizes)
        known.learn(size, true(size) * seconds(number, source))
        yield known


def error(known: Cost, factor: float = 1.0) -> float:
    """How far off a prediction is, at worst, in shares of the truth."""
    return max(abs(known.seconds(size) / (factor * true(size)) - 1) for size in SIZES)


def last(states: Iterator[Cost]) -> Cost:
    *_, known = states
    return known


def test_before_the_first_batch_nothing_takes_time() -> None:
    """Nothing is known, and so nothing is predicted; the first batch says what one takes, whatever its size."""
    known = Cost()
    assert (known.a, known.b, known.samples) == (0, 0, 0)
    assert known.seconds(0) == known.seconds(1e9) == 0
    known.learn(4, 0.5)
    assert (known.a, known.b, known.samples) == (0.5, 0, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clean_line_is_found_exactly(seed: int) -> None:
    """Both a and b, to 1 in a million after 200 batches and to 5 % after 100, whichever sizes came first."""
    states = learn(seed, 200, lambda number, source: 1.0)
    for known in states:
        if known.samples >= 100:
            assert known.a == pytest.approx(A, rel=0.05)
            assert known.b == pytest.approx(B, rel=0.05)
    assert known.a == pytest.approx(A, rel=1e-4)
    assert known.b == pytest.approx(B, rel=1e-4)


def test_two_equal_batches_first_do_not_end_the_learning() -> None:
    """No deviation so far does not make an outlier of whatever deviates; not even if batches took no time at all."""
    known = Cost()
    for size, seconds in [(8, true(8)), (8, true(8)), *((size, true(size)) for _ in range(40) for size in SIZES)]:
        known.learn(size, seconds)
    assert error(known) < 1e-3
    known = Cost()
    for seconds in (0, 0, 1, 1, 1):
        known.learn(8, seconds)
    assert known.seconds(8) > 0.8


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_of_ten_percent_is_mostly_averaged_out(seed: int) -> None:
    """From the fortieth batch on: predictions are off by 4 % on average, and never by more than 20."""
    errors = [error(known) for known in learn(seed, 1000, lambda number, source: source.uniform(0.9, 1.1))][40:]
    assert max(errors) < 0.2
    assert sum(errors) / len(errors) < 0.04


@pytest.mark.parametrize("seed", SEEDS)
def test_one_outlier_in_a_hundred_says_little(seed: int) -> None:
    """1 % of the batches take a hundred times as long: no prediction is off by more than 15 %, and most by far less."""

    def seconds(number: int, source: random.Random) -> float:
        return source.uniform(0.98, 1.02) * (100 if number > 20 and source.random() < 0.01 else 1)

    errors = [error(known) for known in learn(seed, 2000, seconds) if known.samples > 40]
    assert max(errors) < 0.15
    assert sum(errors) / len(errors) < 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cold_first_batch_is_forgotten_with_the_second(seed: int) -> None:
    """A hundred times as long: with the second, its size is predicted right, and soon all others are."""
    for known in learn(seed, 40, lambda number, source: 1.0 if number else 100.0):
        if known.samples == 2:
            assert A < known.seconds(1) < 1.01 * true(32)
    assert error(known) < 0.1


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_change_of_speed_is_followed(seed: int, factor: float) -> None:
    """When batches take twice as long, or half: more than half the way after 40 batches, nine tenths of it after 90."""

    def seconds(number: int, source: random.Random) -> float:
        return source.uniform(0.98, 1.02) * (factor if number >= 200 else 1)

    for known in learn(seed, 400, seconds):
        if known.samples > 240:
            assert error(known, factor) < 0.5
        if known.samples > 290:
            assert error(known, factor) < 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_batches_of_one_size_leave_the_slope_alone(seed: int) -> None:
    """What other sizes cost is not forgotten while thousands of one size run."""
    known = last(learn(seed, 100, lambda number, source: 1.0))
    slope = known.b
    for _ in range(5000):
        known.learn(16, true(16))
    assert known.b == pytest.approx(slope, rel=1e-3)
    assert known.seconds(16) == pytest.approx(true(16))


@pytest.mark.parametrize("seed", SEEDS)
def test_sizes_that_hardly_differ_do_not_turn_noise_into_a_slope(seed: int) -> None:
    """999 to 1001 rows of noise say nothing about 2000 rows: the prediction for those is not even 60 % off."""
    source, known = random.Random(seed), Cost()
    for _ in range(2000):
        known.learn(source.randint(999, 1001), 0.01 * source.uniform(0.9, 1.1))
        assert known.samples < 20 or abs(known.seconds(2000) / 0.01 - 1) < 0.6


def test_what_cannot_be_is_put_into_the_other_part() -> None:
    """Larger batches that are faster have no slope, and times that shrink faster than sizes have no constant part."""
    faster, steeper = Cost(), Cost()
    for _ in range(100):
        for size in SIZES:
            faster.learn(size, 1 / size)
            steeper.learn(size, size * size)
    assert faster.b == 0
    assert faster.a > 0
    assert steeper.a == 0
    assert steeper.b > 0


# By hand.


def after(*batches: tuple[float, float]) -> Cost:
    """What is known after batches of (size, seconds)."""
    known = Cost()
    for size, seconds in batches:
        known.learn(size, seconds)
    return known


def test_a_time_is_pulled_in_to_four_deviations_that_count_as_one_percent_at_least() -> None:
    """The first three of these weigh 1/2, 1/2, 2/5 in the mean, and twice as much, but at most 1, in the deviation."""
    known = after((8, 1.0), (8, 1.0))
    for expected, deviation in (
        (1.0 + 0.5 * 0.04, 0.04),  # 3.0 counts as 1.0 + 4 x 1 %
        (1.02 + 0.5 * 0.16, 0.16),  # as 1.02 + 4 x 0.04
        (1.10 + 0.4 * 0.64, 0.16 + 0.8 * (0.64 - 0.16)),  # as 1.10 + 4 x 0.16
    ):
        known.learn(8, 3.0)
        assert known.seconds(8) == pytest.approx(expected)
        assert known.deviation == pytest.approx(deviation)


def test_once_there_are_many_the_newest_batch_weighs_a_twentieth() -> None:
    """And a tenth in the deviation."""
    known = after(*[(8, 1.0)] * 60, (8, 3.0))
    assert known.seconds(8) == pytest.approx(1.0 + 0.05 * 0.04)
    assert known.deviation == pytest.approx(0.1 * 0.04)


def test_the_slope_is_that_of_least_squares_with_a_trace_of_what_it_was() -> None:
    """The trace weighs as much as a variance of the sizes of 1 % of their mean's square."""
    first, second = (10, 1.0), (20, 1.02)  # the mean goes from 10 to 15, and from 1.0 to 1.01
    known = after(first, first, second)
    slope = (0.02 * 10 / 4) / (10 * 10 / 4 + 0.01 * 15 * 15)
    assert known.b == pytest.approx(slope)
    assert known.a == pytest.approx(1.01 - 15 * slope)
    known.learn(15, 1.01)  # the means, which leaves half of the squares
    slope = (0.02 * 10 / 8 + 0.01 * 15 * 15 * slope) / (10 * 10 / 8 + 0.01 * 15 * 15)
    assert known.b == pytest.approx(slope)
    assert known.a == pytest.approx(1.01 - 15 * slope)


def test_a_slope_takes_no_more_than_all_of_the_time() -> None:
    """Where the line would be below 0 at no size at all, it goes through there and through the means, 9 and 0.5."""
    known = after((10, 5.0), (10, 1.0), (8, 0.0))
    assert known.a == 0
    assert known.b == pytest.approx(0.5 / 9)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e4)), max_size=60))
def test_neither_part_is_ever_negative(batches: list[tuple[int, float]]) -> None:
    """Whatever times came: a prediction is a number, never below 0, and never falls with the size."""
    known = Cost()
    for size, seconds in batches:
        known.learn(size, seconds)
        assert 0 <= known.a < 1e9
        assert 0 <= known.b < 1e9
