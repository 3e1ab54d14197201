"""What an evaluation keeps of each sample: computed on the device, gathered, scored, written to disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import metrics, ranks
from .errors import InputError
from .metrics import Outcomes

ROW_GROUP_BYTES = 16 * 2**20  # of probabilities that are read, and written as a row group of Parquet, at once


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


class ProbabilityRows:
    """The probabilities [N, K] of a part, on disk from the device on: each rank adds its rows, in order, to a file of its own.

    `dtype` is float32, or float16 for their logarithms: as they are, those below 6e-8 would be lost, which many classes
    together and temperature scaling need. `folder` is one that all ranks see; whoever made it removes it.
    """

    def __init__(self, folder: Path, num_classes: int, dtype: str):
        self.folder, self.num_classes, self.dtype = folder, num_classes, np.dtype(dtype)
        self.rank, self.world_size = ranks.rank_and_world_size()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = self._path(self.rank).open("wb")

    @property
    def column(self) -> str:
        """What the rows are called in a file of predictions."""
        return "probabilities" if self.dtype == np.float32 else "log_probabilities"

    def add(self, probabilities: Tensor):
        """Write this rank's next rows [B, K]. Raises InputError where the disk does not take them."""
        rows = probabilities.float() if self.dtype == np.float32 else probabilities.log().half()
        try:
            self.file.write(rows.contiguous().cpu().numpy().data)
        except OSError as error:
            raise InputError(f"{self.folder}: {error.strerror}; --keep_probabilities none needs no room") from None

    def close(self):
        """Say that this rank's rows are complete; the ranks meet after it and before `blocks`."""
        self.file.close()

    def blocks(self) -> Iterator[np.ndarray]:
        """All ranks' rows in order, some [n, K] at a time."""
        rows = max(1, ROW_GROUP_BYTES // (self.num_classes * self.dtype.itemsize))
        for rank in range(self.world_size):
            with self._path(rank).open("rb") as file:
                while len(block := np.fromfile(file, self.dtype, rows * self.num_classes)):
                    yield block.reshape(-1, self.num_classes)

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank:05d}"


@dataclass
class Predictions:
    """Every sample's outcome, label and most probable class [N] and, where they were kept, its probabilities as `rows`.

    `index` [N] has the samples' rows in the source, `paths` their files where the source is a folder, and `group` [N] what
    samples belong together (tokens of a sentence, boxes of a photograph).
    """

    outcomes: Outcomes
    labels: Tensor
    guesses: Tensor
    rows: ProbabilityRows | None = None
    index: Tensor | None = None
    paths: list[str] | None = None
    group: Tensor | None = None

    def score(self) -> dict[str, float]:
        """The six metrics over the whole split."""
        return metrics.summarize(self.outcomes)

    @property
    def source(self) -> dict:
        """Columns that say where each sample comes from: `index`, and `path` where there is one."""
        index = np.arange(len(self.labels)) if self.index is None else np.asarray(self.index)
        return {"index": index} | ({} if self.paths is None else {"path": list(self.paths)})

    def write(self, path: Path):
        """A Parquet file, a row a sample: index (path, group), label, prediction, confidence, correct, top5_correct, nll and,
        where they were kept, probabilities (or log_probabilities), in row groups."""
        import pyarrow
        from pyarrow import parquet

        columns = {
            **self.source,
            **({} if self.group is None else {"group": np.asarray(self.group)}),
            "label": self.labels.numpy(),
            "prediction": self.guesses.numpy(),
            **{name: np.asarray(values) for name, values in self.outcomes._asdict().items()},
        }
        table = pyarrow.table(columns)
        if self.rows is None:
            parquet.write_table(table, path, write_page_checksum=True)
            return
        of_rows = pyarrow.list_(pyarrow.from_numpy_dtype(self.rows.dtype), self.rows.num_classes)
        schema = table.schema.append(pyarrow.field(self.rows.column, of_rows))
        options = {"use_dictionary": table.column_names, "write_page_checksum": True}
        with parquet.ParquetWriter(path, schema, **options) as writer:
            start = 0
            for block in self.rows.blocks():
                rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.ravel()), block.shape[1])
                writer.write_table(table.slice(start, len(block)).append_column(schema.field(-1), rows))
                start += len(block)
