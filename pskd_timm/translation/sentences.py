"""Token sequences of different lengths as flat tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Sentences:
    """N token sequences one after the other: `tokens` int64 [T], sequence i from `offsets` [N + 1] i to i + 1; on the CPU."""

    tokens: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Sentences":
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        flat = np.fromiter((token for sequence in sequences for token in sequence), np.int64, int(lengths.sum()))
        return cls(torch.from_numpy(flat), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence [N]."""
        return self.offsets.diff()

    def take(self, rows: Tensor) -> "Sentences":
        """The sequences `rows` [n], in that order."""
        lengths = self.lengths[rows]
        return Sentences(
            self.tokens[self.places(rows)], torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        )

    def places(self, rows: Tensor) -> Tensor:
        """Where the tokens of the sequences `rows` [n] lie in `tokens`, one sequence after the other."""
        lengths = self.lengths[rows]
        ends = lengths.cumsum(0)
        inside = torch.arange(int(ends[-1]) if len(ends) else 0) - (ends - lengths).repeat_interleave(lengths)
        return self.offsets[rows].repeat_interleave(lengths) + inside

    def padded(self, rows: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """The sequences `rows` [n] as [n, L], `fill` behind the shorter ones, and the flat positions of their tokens in it."""
        lengths = self.lengths[rows]
        grid = torch.arange(int(lengths.max())) < lengths[:, None]
        positions = grid.flatten().nonzero().squeeze(1)
        table = torch.full(grid.shape, fill, dtype=torch.int64)
        table.view(-1)[positions] = self.tokens[self.places(rows)]
        return table, positions
