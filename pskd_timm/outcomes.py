"""What an evaluation leaves of each sample, on every rank and on disk."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from . import metrics
from .metrics import Outcomes


@dataclass
class Predictions:
    """Every sample's outcome and label [N], and its probabilities [N, K], where they were kept."""

    outcomes: Outcomes
    labels: Tensor
    probabilities: Tensor

    def score(self) -> dict[str, float]:
        """The six metrics over the whole split."""
        return metrics.summarize(self.outcomes)

    def write(self, path: Path):
        """A Parquet file with a row a sample: index, label, prediction, confidence, correct, top5_correct, nll, probabilities."""
        import pyarrow
        from pyarrow import parquet

        flat = pyarrow.array(self.probabilities.float().flatten().numpy())
        columns = {
            "index": pyarrow.array(range(len(self.labels))),
            "label": self.labels.numpy(),
            "prediction": self.probabilities.argmax(dim=1).numpy(),
            **{name: values.numpy() for name, values in self.outcomes._asdict().items()},
            "probabilities": pyarrow.FixedSizeListArray.from_arrays(flat, self.probabilities.shape[1]),
        }
        parquet.write_table(pyarrow.table(columns), path)
