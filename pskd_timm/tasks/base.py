"""The seam between the training page and what is trained: data, network, batches, evaluation, saving."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..batch import Batch
from ..metrics import Metric
from ..outcomes import Predictions


class Batches(Protocol):
    """A rank's training batches of each epoch: a function of (seed, epoch) and the number of ranks."""

    steps: int  # global batches an epoch

    def rank_batches(self, epoch: int) -> list[Tensor]:
        """The sample ids (images, sentences; int64, CPU) of each of this rank's batches of the epoch, one a step."""

    def rows(self, batches: list[Tensor]) -> Tensor:
        """The rows of the prediction store that `batches` visit, int64 [n] on the CPU, in their order."""

    def batches(self, batches: list[Tensor], epoch: int, grad_accum_steps: int) -> Iterator[list[Batch]]:
        """For each of `batches`, the last ones of `epoch`, at most `grad_accum_steps` micro-batches."""

    def global_size(self, epoch: int, step: int) -> int:
        """Targets (images, tokens) of a step's global batch over all ranks, known without communication."""

    def rows_renewed(self, epoch: int) -> int:
        """How many rows of the prediction store the epoch renews, over all ranks."""

    def close(self):
        """End what reads ahead of the run: it has no more batches to take."""


class Task(Protocol):
    """What a recipe's `task` stands for, opened by `tasks.open_task`. Its targets are what the store has rows for."""

    counts: str  # what a target is called in the plural: `images`, `tokens`
    metrics: tuple[Metric, ...]  # the first one chooses the best epoch
    splits: tuple[str, ...]  # evaluated splits; the first one is reported, the last one chooses the best epoch
    num_rows: int  # training targets
    num_classes: int
    labels: Tensor  # int64 [num_rows] on the CPU
    fingerprint: dict[str, str]  # digests that tell the data from any other

    def network(self) -> nn.Module:
        """The network with initial weights that depend on the seed alone: inputs of a Batch in, logits [B, K] out."""

    def check(self, network: nn.Module, world_size: int):
        """Raise InputError where the recipe's batches cannot be shared out over `world_size` ranks for `network`."""

    def loader(self, network: nn.Module, device, rank: int, world_size: int, partners: str) -> Batches:
        """The training batches on `device`; with `partners` (`class`, `view`) each has `partner_inputs` too."""

    def evaluate(
        self,
        network: nn.Module,
        split: str,
        final: bool = False,
        progress: Callable | None = None,
        rows_in: Path | None = None,
    ) -> Predictions:
        """The outcome of each target of `split`, in eval mode (all ranks call it together; the result is on each).

        With `final` also what is computed only once a run has ended (`Metric.only_at_end`). Where probabilities are to be kept
        they go into the new folder `rows_in`, for `Predictions.write`.
        """

    def save(self, network: nn.Module, folder: Path):
        """Write the network so that `load` and other people's tools read it back."""

    def load(self, folder: Path) -> nn.Module:
        """The network that `save` wrote, on the CPU. Raises InputError where there is none."""

    def describe(self) -> dict[str, Any]:
        """What result.json says of the data: num_train, num_test, num_holdout, num_classes, class_names, …"""

    def examples(self, split: str, rows: Tensor) -> list:
        """What the targets `rows` [n] of `split` look like: images as uint8 arrays [H, W, C], or texts."""
