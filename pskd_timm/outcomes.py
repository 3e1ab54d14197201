"""What an evaluation keeps of each sample: computed on the device, gathered, scored, written to disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import metrics
from .metrics import Outcomes


def batch_outcomes(logits: Tensor, probabilities: Tensor, labels: Tensor) -> Outcomes:
    """The outcomes [B] of a batch as tensors on its device: `metrics.outcomes`, but for the NLL.

    That is of the `logits` [B, K], because a float32 probability reaches 0 where its logarithm is still finite.
    """
    true = probabilities.gather(1, labels[:, None])
    classes = torch.arange(probabilities.shape[1], device=labels.device)
    # How many classes stand before the label; among equals the lower class is first.
    rank = ((probabilities > true) | ((probabilities == true) & (classes < labels[:, None]))).sum(dim=1)
    nll = F.cross_entropy(logits, labels, reduction="none").double()
    return Outcomes(probabilities.amax(dim=1), rank == 0, rank < 5, nll)


@dataclass
class Predictions:
    """Every sample's outcome and label [N], and its probabilities [N, K], where they were kept.

    `index` [N] has the samples' rows in the source, `paths` their files where the source is a folder, and `group` [N] what
    samples belong together (tokens of a sentence, boxes of a photograph).
    """

    outcomes: Outcomes
    labels: Tensor
    probabilities: Tensor
    index: Tensor | None = None
    paths: list[str] | None = None
    group: Tensor | None = None

    @property
    def guesses(self) -> Tensor:
        """The most probable class of each sample [N]."""
        return self.probabilities.argmax(dim=1)

    def score(self) -> dict[str, float]:
        """The six metrics over the whole split."""
        return metrics.summarize(self.outcomes)

    @property
    def source(self) -> dict:
        """Columns that say where each sample comes from: `index`, and `path` where there is one."""
        index = np.arange(len(self.labels)) if self.index is None else np.asarray(self.index)
        return {"index": index} | ({} if self.paths is None else {"path": list(self.paths)})

    def write(self, path: Path):
        """A Parquet file, a row a sample: index (path, group), label, prediction, confidence, correct, top5_correct, nll,
        probabilities."""
        import pyarrow
        from pyarrow import parquet

        flat = pyarrow.array(self.probabilities.float().flatten().numpy())
        columns = {
            **self.source,
            **({} if self.group is None else {"group": np.asarray(self.group)}),
            "label": self.labels.numpy(),
            "prediction": self.guesses.numpy(),
            **{name: np.asarray(values) for name, values in self.outcomes._asdict().items()},
            "probabilities": pyarrow.FixedSizeListArray.from_arrays(flat, self.probabilities.shape[1]),
        }
        parquet.write_table(pyarrow.table(columns), path)
