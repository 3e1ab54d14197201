"""A training step as one CUDA graph: its kernels are launched together, without Python in between."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import InputError
from ..methods.base import Method

WARMUP = 3  # steps of one kind taken as they are before one is recorded: they allocate and choose algorithms


class StepGraph:
    """`step(batch, weight)`, recorded and replayed: one recording for each set of shapes, weight and `variant()` that recurs.

    What the step reads and changes must keep its place in memory: weights, gradients (zeroed, not set to None), the
    prediction store, running sums, α; what it returns is lost. `record(work)` returns what replays `work`.
    """

    def __init__(
        self,
        step: Callable[[Batch, float], None],
        variant: Callable[[], Hashable],
        record: Callable | None = None,
    ):
        self.step, self.variant, self.record = step, variant, record or Recorder()
        self.seen, self.recordings = Counter(), {}

    def __call__(self, batch: Batch, weight: float):
        tensors = _tensors(batch)
        key = weight, self.variant(), *((name, tensor.shape) for name, tensor in tensors.items())
        if key not in self.recordings and self.seen[key] == WARMUP:
            place = Batch(**{name: tensor.clone() for name, tensor in tensors.items()})
            self.recordings[key] = place, self.record(lambda: self.step(place, weight))
        if key in self.recordings:
            place, replay = self.recordings[key]
            for name, tensor in _tensors(place).items():
                tensor.copy_(tensors[name])
            replay()
            return
        self.seen[key] += 1
        if batch.labels.is_cuda:
            on_side_stream(lambda: self.step(batch, weight))
        else:
            self.step(batch, weight)


class Recorder:
    """Records work as CUDA graphs, which share their memory: none of them keeps anything in it between replays."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """What replays `work`, which recording does not run."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: else the thread that pins a streaming loader's batches may end the recording.
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:  # such as a network that asks the GPU for values, or keeps its random state
            first = error
            while first.__context__ is not None:  # ending a recording that has failed is an error of its own
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            why = str(first).splitlines()[0]
            raise InputError(
                f"model.compile graphs: a step of this network cannot be recorded ({why}): use model.compile default"
            ) from None
        return graph.replay


@cache
def _side_stream() -> torch.cuda.Stream:
    # One for all steps: what the allocator holds for a stream serves no other.
    return torch.cuda.Stream()


def on_side_stream(work: Callable[[], None]):
    """Run `work` on another stream than the default one, as torch's notes on CUDA graphs ask of steps before a recording."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    held = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def check_recordable(method: Method):
    """Raise InputError where a CUDA graph cannot hold a step of `method`: it cannot wait for copies from and to the CPU."""
    if not method.recordable:
        raise InputError(
            f"model.compile graphs does not go with {type(method).__name__}, which carries a batch from step to step: "
            "use model.compile default"
        )
    if method.store and method.store.device.type == "cpu":
        raise InputError(
            "model.compile graphs needs the prediction store on the GPU (pskd.store_device auto): "
            "where it does not fit, pskd.store_topk 10 or pskd.teacher snapshot do, or model.compile default"
        )
