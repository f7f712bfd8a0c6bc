"""LocalModel: one version of one model, and how a batch of it is stacked, padded, run, and split again."""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import numpy as np

from batching import Cost, OutOfMemory, Policy

from .config import ModelConfig
from .errors import DeviceLost, ModelError, RequestError, TooLarge
from .lane import CURRENT, Lane
from .statistics import Statistics
from .types import DATATYPES, Array, Backend, InferRequest, ModelMetadata
from .validate import fits

# The longer of two lengths at which a ragged model without a grid is warmed, to see which outputs follow them, and what
# they cost.
PROBED = 64

# A largest batch that takes longer than this in the lane's thread is not tried on the event loop at all.
_WORTH_MEASURING = 0.05

Tensors = dict[str, Array]

logger = logging.getLogger("millrace")


class LocalModel:
    """One version of one model: what it is, and how a batch of it is run. It is its batcher's `Runner`.

    Attributes:
        statistics: what it has done.
        inline: whether batches run on the event loop instead of in the lane's thread.
        policy: how requests are batched.
        preparation: what stacking takes, by the batch's cost.
        measured: (cost, seconds) of the batches that it was warmed with.
    """

    def __init__(
        self,
        metadata: ModelMetadata,
        version: str,
        config: ModelConfig,
        policy: Policy,
        instances: Sequence[tuple[Backend, Lane]],
    ) -> None:
        """`instances` are the loaded copies of the model, each with the lane that runs it."""
        self.metadata = metadata
        self.version = version
        self.policy = policy
        self.statistics = Statistics()
        self.inline = False
        self.preparation = Cost()
        self.measured: list[tuple[int, float]] = []
        self.instances = instances
        self._on = {lane: backend for backend, lane in instances}
        # The bucket of every request: None, they run alone. Where shapes vary, each has its own.
        self._bucket: Hashable = () if config.batching else None
        self._by_shape = config.batching and config.variable
        self._variable = config.variable or bool(config.ragged)
        self._batches = config.max_batch_size > 0
        self._pad = config.pad
        self._longest = min(PROBED, policy.max_cost or PROBED)
        # Output -> its axes of any size -> what size they have, -1 for the ragged inputs'; known when it is warm.
        self._sizes: dict[str, dict[int, int]] = {}

    async def prepare(self, batch: Sequence[Tensors], rows: int, length: int) -> object:
        return await asyncio.to_thread(self._stack, self.instances[0][0], batch, rows, length)

    async def run(
        self, batch: Sequence[Tensors], rows: int, length: int, prepared: object = None
    ) -> Sequence[Tensors | Exception]:
        lane = CURRENT.get(None) or self.lane
        backend = self._on[lane]
        spans = [0.0, 0.0, 0.0]
        try:
            if self.inline:
                return self.execute(backend, batch, rows, length, prepared, spans)
            return await lane.call(self.execute, backend, batch, rows, length, prepared, spans)
        except DeviceLost as error:
            lane.lose(str(error))
            return [DeviceLost(str(error)) for _ in batch]  # nothing to be gained by running its halves
        finally:
            self.statistics.spans = spans

    def execute(
        self,
        backend: Backend,
        batch: Sequence[Tensors],
        rows: int,
        length: int,
        prepared: object = None,
        spans: list[float] | None = None,
    ) -> list[Tensors]:
        """Stack the requests' inputs, run the model once, split its outputs into views, one dict for each request.

        Args:
            rows, length: what the batch is padded to: rows with copies of the last one, ragged inputs with their value.
            prepared: the stacked inputs, if that was done ahead of time.
            spans: takes the seconds that stacking, the model and splitting took.

        Raises:
            ModelError: the model raised, or its outputs do not have the batch's rows.
            OutOfMemory: fewer rows may fit.
            RequestError: the backend found that the inputs are not what the model takes.
            DeviceLost: the device is beyond repair.
        """
        outputs: Tensors | None = None
        spans = [0.0, 0.0, 0.0] if spans is None else spans
        began = stacked = ended = time.perf_counter()
        try:
            inputs = cast(Tensors, prepared) or self._stack(backend, batch, rows, length)
            stacked = time.perf_counter()
            outputs = backend.run(inputs)
        except (RequestError, DeviceLost):
            raise
        except (OutOfMemory, MemoryError):
            logger.warning("model %s version %s: out of memory with %d rows", self.metadata.name, self.version, rows)
        except BaseException as error:  # sys.exit() in a model too: it is the request that fails, not the server
            logger.exception("model %s version %s raised", self.metadata.name, self.version)
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(f"model '{self.metadata.name}' failed: {text}") from error
        finally:
            ended = time.perf_counter()
            spans[0], spans[1] = stacked - began, ended - stacked
        if outputs is None:
            inputs, prepared = {}, None
            # Not raised from the model's error, which holds the memory of whatever was on its way
            raise OutOfMemory(f"model '{self.metadata.name}' ran out of memory on this request")
        for name, array in outputs.items():
            outputs[name] = array = np.asarray(array, order="C")
            spec = self.metadata.outputs.get(name)
            if spec is not None and spec.reshape is not None:
                outputs[name] = array = array.reshape(reshaped(array.shape, spec.reshape, spec.shape))
            if self._batches and array.shape[:1] != (rows,):
                raise ModelError(
                    f"model '{self.metadata.name}' answered a batch of {rows} rows with shape "
                    f"{list(array.shape)} for output '{name}'"
                )
        if not self._batches:
            return [outputs]
        answers: list[Tensors] = []
        if len(outputs) == 1 and rows == len(batch):  # a row each, the usual case, in a third of the time
            ((name, array),) = outputs.items()
            answers += [{name: row} for row in array[:, np.newaxis]]
        else:
            start = 0
            for request in batch:
                stop = start + len(next(iter(request.values())))
                answers.append({name: array[start:stop] for name, array in outputs.items()})
                start = stop
        if self._sizes:
            self._cut_back(batch, answers, length)
        spans[2] = time.perf_counter() - ended
        return answers

    def _stack(self, backend: Backend, batch: Sequence[Tensors], rows: int, length: int) -> Tensors:
        started = time.perf_counter()
        inputs = {}
        for name, spec in self.metadata.inputs.items():
            arrays = [request[name] for request in batch]
            if not self._batches:
                stacked = backend.empty(arrays[0].shape, DATATYPES[spec.datatype])
                np.copyto(stacked, arrays[0])
                inputs[name] = stacked
                if spec.reshape is not None:
                    inputs[name] = stacked.reshape(reshaped(stacked.shape, spec.shape, spec.reshape))
                continue
            shape = [rows, *arrays[0].shape[1:]]
            axis = self.metadata.ragged.get(name)
            if axis is not None:
                shape[axis] = length
            inputs[name] = stacked = backend.empty(tuple(shape), DATATYPES[spec.datatype])
            filled = sum([len(array) for array in arrays])
            if axis is None:
                np.concatenate(arrays, out=stacked[:filled])
            else:
                _fill(stacked, arrays, axis, self._pad[name])
            if filled < rows:
                stacked[filled:] = stacked[filled - 1]
            if spec.reshape is not None:
                inputs[name] = stacked.reshape(reshaped(stacked.shape, spec.shape, spec.reshape))
        if not self.inline:
            self.preparation.learn(rows * length, time.perf_counter() - started)
        return inputs

    def zeros(self, rows: int, length: int = 1) -> Tensors:
        """A request of `rows` rows of zeros, ragged inputs of `length`; a dimension of any size is 1."""
        inputs = {}
        for name, spec in self.metadata.inputs.items():
            shape = [1 if size == -1 else size for size in spec.shape]
            if self._batches:
                shape[0] = rows
            if name in self.metadata.ragged:
                shape[self.metadata.ragged[name]] = length
            inputs[name] = np.full(shape, b"" if spec.datatype == "BYTES" else 0, DATATYPES[spec.datatype])
        return inputs

    def item(self, request: InferRequest, rows: int) -> tuple[Any, ...]:
        """The arguments of `Batcher.submit` for a request that was checked.

        Raises:
            TooLarge: it would not fit into an empty queue.
        """
        inputs, ragged, bucket = request.inputs, self.metadata.ragged, self._bucket
        nbytes, length = 0, 1
        for array in inputs.values():
            nbytes += array.nbytes
            if array.dtype == object:
                nbytes += sum(map(len, array.flat))
        if nbytes > self.policy.capacity_bytes:
            raise TooLarge(
                f"the tensors of {nbytes} bytes are over the limit of {self.policy.capacity_bytes} bytes "
                "(MILLRACE_QUEUE_BYTES)"
            )
        if self._by_shape:
            bucket = tuple([inputs[name].shape[1:] for name in self.metadata.inputs if name not in ragged])
            length = self._elements(inputs)
        for name, axis in ragged.items():
            length = inputs[name].shape[axis]
        return (
            inputs,
            rows,
            None if request.alone else bucket,
            request.deadline,
            length,
            nbytes,
            request.priority,
            request.timeout,
            request.client,
            request.boarding,
        )

    def _elements(self, inputs: Tensors) -> int:
        """Of a row of all inputs: the unit of work where shapes differ."""
        return max(1, sum([array.size // max(1, len(array)) for array in inputs.values()]))

    def shapes(self) -> list[tuple[int, int]]:
        """(rows, length) of every batch of the grid; where there is none, of the fewest and the most rows."""
        policy, shapes = self.policy, []
        for length in self._lengths():
            most = min(policy.max_rows, max(1, policy.max_cost // length)) if policy.max_cost else policy.max_rows
            grid = [rows for rows in policy.row_grid if rows <= policy.padded_rows(most)]
            shapes += [(rows, length) for rows in grid or sorted({1, most})]
        return shapes

    def _lengths(self) -> tuple[int, ...]:
        if not self.metadata.ragged:
            return (1,)
        return self.policy.lengths or tuple(sorted({max(1, self._longest // 9), self._longest}))

    async def warm(self, inline_seconds: float) -> float:
        """Run the model on zeros until it is warm, check what it answers, decide where it runs.

        A model with a grid of shapes sees all of them, so that none is new to it when it serves.

        Inline needs proof: fixed shapes, so that the largest batch can be measured, and the best of five of those
        below `inline_seconds`, on the event loop itself. The best, since the rest says how busy the machine is now.

        Returns:
            The seconds that the largest batch took.

        Raises:
            ModelError: it fails, or its outputs are not what its config promises.
        """
        for backend, lane in self.instances:
            await lane.call(backend.enter, False)
        backend = self.instances[0][0]
        if self.metadata.ragged and not self.policy.lengths:
            await self._probe()
        shapes = self.shapes()
        if len(shapes) > 2:
            logger.info("model %s: warming %d shapes", self.metadata.name, len(shapes))
        seen: list[tuple[int, Tensors]] = []
        for rows, length in shapes:
            seconds, answer = await self._best(rows, length, self._in_thread, 3)
            self.measured.append((rows * self._unit(length), seconds))
            seen.append((length, answer))
            for backend, lane in self.instances[1:]:
                await lane.call(self.execute, backend, [self.zeros(rows, length)], rows, self._unit(length))
        self._find_cuts(seen)
        alone = len(self.instances) == 1 and not self._variable
        if alone and self.measured[-1][1] <= max(_WORTH_MEASURING, inline_seconds):
            backend.enter(True)
            measured = [(rows, (await self._best(rows, length, self._on_the_loop, 7))[0]) for rows, length in shapes]
            self.inline = measured[-1][1] <= inline_seconds
            if self.inline:
                self.measured = measured
        return self.measured[-1][1]

    async def run_sample(self, batch: Sequence[Tensors], count: int) -> None:
        """Run a batch so often on every instance, as `model_warmup` asks for. It counts in the statistics.

        Raises:
            ModelError.
        """
        for backend, lane in self.instances:
            for _ in range(count):
                for group in [batch] if self._batches else [[request] for request in batch]:
                    spans = self.statistics.spans = [0.0, 0.0, 0.0]
                    try:
                        await lane.call(self.execute, backend, group, len(group), 1, None, spans)
                    except (RequestError, ModelError, OutOfMemory) as error:
                        raise ModelError(f"failed to run warmup sample: {error}") from None
                    self.statistics.warmed(len(group))

    async def _probe(self) -> None:
        """Find a length that the model takes: no grid says which it does."""
        rows = self.policy.padded_rows(1)
        while self._longest > 2:
            try:
                await self._in_thread([self.zeros(rows, self._longest)], rows, self._longest)
                return
            except (RequestError, ModelError):
                self._longest //= 2

    async def _in_thread(self, *batch: Any) -> list[Tensors]:
        backend, lane = self.instances[0]
        return await lane.call(self.execute, backend, *batch)

    async def _on_the_loop(self, *batch: Any) -> list[Tensors]:
        return self.execute(self.instances[0][0], *batch)

    @property
    def lane(self) -> Lane:
        """The first instance's."""
        return self.instances[0][1]

    def _unit(self, length: int) -> int:
        """What a row of zeros counts for, as `item` would say."""
        return self._elements(self.zeros(1)) if self._by_shape and not self.metadata.ragged else length

    async def _best(self, rows: int, length: int, run: Callable[..., Any], times: int) -> tuple[float, Tensors]:
        """The shortest of several runs on zeros, and the answer; the first third of them only warms."""
        size = f"{rows} rows" + (f" of length {length}" if self.metadata.ragged else "")
        took = []
        try:
            batch, unit = [self.zeros(rows, length)], self._unit(length)
        except (MemoryError, ValueError) as error:  # more than there is, or more than numpy can address
            raise ModelError(f"model '{self.metadata.name}': no memory for a batch of {size}: {error}") from None
        for _ in range(times):
            started = time.perf_counter()
            try:
                answers = await run(batch, rows, unit)
            except OutOfMemory:
                raise ModelError(f"model '{self.metadata.name}' ran out of memory on a batch of {size}") from None
            except (RequestError, ModelError) as error:
                raise ModelError(
                    f"model '{self.metadata.name}' does not take a batch of {size}, which its config allows "
                    f"(max_batch_size, and data_type and dims of its inputs): {error}"
                ) from None
            took.append(time.perf_counter() - started)
            self._check(answers[0])
        return min(took[times // 3 :]), answers[0]

    def _check(self, answer: Tensors) -> None:
        for name, spec in self.metadata.outputs.items():
            if name not in answer:
                raise ModelError(f"model '{self.metadata.name}' gives no output '{name}', its config promises one")
            array, dtype = answer[name], DATATYPES[spec.datatype]
            if array.dtype != dtype or not fits(array.shape, spec.shape):
                raise ModelError(
                    f"model '{self.metadata.name}', output '{name}': its config promises {spec.datatype} "
                    f"{list(spec.shape)}, the model gives {array.dtype} {list(array.shape)}"
                )

    def _find_cuts(self, seen: list[tuple[int, Tensors]]) -> None:
        """Which axes of the outputs follow the ragged inputs, by the answers to inputs of several lengths.

        Raises:
            ModelError: one changes with the length and is not as long: nobody could say what of it is padding. Or there
                is one length alone, and nobody could say what follows it.
        """
        for name, spec in self.metadata.outputs.items():
            axes = [axis for axis, size in enumerate(spec.shape) if size == -1 and axis]
            if not self.metadata.ragged or not axes:
                continue
            if len({length for length, _ in seen}) == 1:
                raise self._broken(
                    name, "has a dimension of any size; give parameters.padded_lengths two lengths at least, so that "
                    "it shows whether that dimension follows the length of the ragged inputs"
                )  # fmt: skip
            self._sizes[name] = {}
            for axis in axes:
                sizes = {answer[name].shape[axis] for _, answer in seen}
                if all(answer[name].shape[axis] == length for length, answer in seen):
                    self._sizes[name][axis] = -1
                elif len(sizes) == 1:
                    self._sizes[name][axis] = sizes.pop()
                else:
                    raise self._broken(
                        name, f"dimension {axis} changes with the ragged inputs' and is not as long, so what of it is "
                        "padding cannot be cut off"
                    )  # fmt: skip

    def _cut_back(self, batch: Sequence[Tensors], answers: list[Tensors], length: int) -> None:
        """Take the padding off the outputs' axes that follow the ragged inputs.

        Raises:
            ModelError: an axis is not what it was while the model was warmed.
        """
        ragged, along = next(iter(self.metadata.ragged.items()))
        for name, sizes in self._sizes.items():
            for axis, size in sizes.items():
                expected, got = length if size == -1 else size, answers[0][name].shape[axis]
                if got != expected:
                    raise self._broken(
                        name, f"dimension {axis} is {got} for ragged inputs of {length}, where it was expected to be "
                        f"{expected}: what of it is padding cannot be told"
                    )  # fmt: skip
            follows = {axis for axis, size in sizes.items() if size == -1}
            for request, answer in zip(batch, answers, strict=True):
                own, array = slice(request[ragged].shape[along]), answer[name]
                cut = tuple(own if axis in follows else slice(None) for axis in range(array.ndim))
                answer[name] = np.ascontiguousarray(array[cut])

    def _broken(self, output: str, how: str) -> ModelError:
        return ModelError(f"model '{self.metadata.name}', output '{output}': {how}")


def reshaped(shape: Sequence[int], pattern: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    """What `shape`, which fits `pattern`, is in `target`: the sizes that both leave open are taken over in order."""
    open_sizes = iter([size for size, fixed in zip(shape, pattern, strict=True) if fixed == -1])
    return tuple([next(open_sizes) if size == -1 else size for size in target])


def _fill(stacked: Array, arrays: Sequence[Array], axis: int, value: float) -> None:
    """Put arrays that differ along `axis` below each other, each filled up with `value`."""
    start = 0
    before = (slice(None),) * (axis - 1)
    for array in arrays:
        stop, size = start + len(array), array.shape[axis]
        stacked[(slice(start, stop), *before, slice(size))] = array
        stacked[(slice(start, stop), *before, slice(size, None))] = value
        start = stop
