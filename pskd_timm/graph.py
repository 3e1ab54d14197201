"""A training step as one CUDA graph: its kernels are launched together, without Python in between."""

from collections.abc import Callable, Hashable
from dataclasses import fields

import torch
from torch import Tensor

from .batch import Batch

WARMUP = 3  # steps of one shape taken as they are before one is recorded: they allocate and choose algorithms


class StepGraph:
    """`step(batch, weight)`, recorded once and replayed for all batches of the same shapes, weight and `variant()`.

    Others, such as an epoch's tail, take the step itself. What the step reads and changes must keep its place in memory:
    weights, gradients (zeroed, not set to None), the prediction store, running sums, α; what it returns is lost.
    `record(work)` returns what replays `work`.
    """

    def __init__(
        self,
        step: Callable[[Batch, float], None],
        variant: Callable[[], Hashable],
        record: Callable | None = None,
    ):
        self.step, self.variant, self.record = step, variant, record or cuda_graph
        self.recorded = self.last = None  # shapes, weight and variant: of the recording, and of the last batch
        self.in_a_row = 0

    def __call__(self, batch: Batch, weight: float):
        tensors = _tensors(batch)
        key = weight, self.variant(), {name: tensor.shape for name, tensor in tensors.items()}
        self.in_a_row = self.in_a_row + 1 if key == self.last else 1
        self.last = key
        if key != self.recorded and self.in_a_row > WARMUP:
            self.place = Batch(**{name: tensor.clone() for name, tensor in tensors.items()})
            self.replay = self.record(lambda: self.step(self.place, weight))
            self.recorded = key
        if key == self.recorded:
            for name, tensor in _tensors(self.place).items():
                tensor.copy_(tensors[name])
            self.replay()
        elif tensors["images"].is_cuda:
            _aside(lambda: self.step(batch, weight))
        else:
            self.step(batch, weight)


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record `work` as a CUDA graph; returns what replays it. Recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _aside(work: Callable[[], None]):
    # Steps before a recording run on another stream than the default one, as torch's notes on CUDA graphs ask.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    held = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in held.items() if value is not None}
