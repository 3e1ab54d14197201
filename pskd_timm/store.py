"""PredictionStore: each training sample's last prediction, row-sharded over the ranks.

Row i of the N×K table has a home rank (contiguous blocks). `checkout(ids)` brings the rows a rank will visit, `read` and
`write` are local tensor operations on the device, `checkin()` sends the rows home. With one process home and working copy
are the same tensor. Memory a rank: 2·N·K·bytes/W, N·K·bytes with one process, and an exchange buffer of bounded size.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import order, ranks
from .recipe import InputError

DTYPES = ("float16", "float32", "float64")
NO_SAMPLE = torch.iinfo(torch.int64).min
UNSEEN = -1.0  # in the first column of a row that was never written: no probability is negative
EXCHANGE_BYTES = 64 * 2**20  # what a rank sends, and receives, in one round of an exchange


def home_rows(num_samples: int, rank: int, world_size: int) -> slice:
    """The rows whose home is `rank`."""
    return order.share(num_samples, rank, world_size)


def store_bytes(num_samples: int, num_classes: int, dtype: str, world_size: int = 1) -> int:
    """Bytes of the store on the rank that holds most, the working copy included."""
    rows = -(-num_samples // world_size)
    return rows * num_classes * getattr(torch, dtype).itemsize * (1 if world_size == 1 else 2)


class PredictionStore:
    """An N×K table of probabilities in `dtype` on `device`, its rows spread over the ranks of the default process group.

    `labels` [N], where they are known, fill the one-hot rows of samples never seen in `gather()`; `read` is given them.
    """

    def __init__(
        self, num_samples: int, num_classes: int, device="cpu", dtype: str = "float16", labels: Tensor | None = None
    ):
        if dtype not in DTYPES:
            raise InputError(f"store dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.rank, self.world_size = ranks.rank_and_world_size()
        self.num_samples, self.num_classes, self.labels = num_samples, num_classes, labels
        self.own = home_rows(num_samples, self.rank, self.world_size)
        self.home = torch.zeros(self.own.stop - self.own.start, num_classes, dtype=getattr(torch, dtype), device=device)
        self.home[:, :1] = UNSEEN
        self._release()

    @property
    def device(self) -> torch.device:
        return self.home.device

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank now."""
        return self.home.nbytes + (self.rows.nbytes if self.rows is not self.home else 0)

    def _release(self):
        self.ids = torch.empty(0, dtype=torch.int64)  # sorted, so that rows of one home lie together
        self.rows = self.home if self.world_size == 1 else self.home[:0]
        self._slot = torch.full((self.num_samples,), -1, device=self.device)
        self._stray = torch.tensor(NO_SAMPLE, device=self.device)
        self._borrowed = self._lent = None  # per rank: my slots of its home rows, my home rows in its hands

    def checkout(self, ids: Tensor):
        """Bring the rows of the sample ids [n] that this rank will visit (all ranks call it together)."""
        ids = torch.unique(ids.detach().cpu().long())
        if len(ids) and (ids[0] < 0 or ids[-1] >= self.num_samples):
            raise InputError(f"sample ids must lie in 0 … {self.num_samples - 1}, got {ids[0]} … {ids[-1]}")
        self.checkin()
        self.ids = ids
        if self.world_size == 1:
            self._slot[ids.to(self.device)] = ids.to(self.device)
            return
        self.rows = torch.empty(len(ids), self.num_classes, dtype=self.home.dtype, device=self.device)
        self._slot[ids.to(self.device)] = torch.arange(len(ids), device=self.device)
        self._agree_on_rows()
        self._exchange(self.home, self._lent, self.rows, self._borrowed)

    def checkin(self):
        """Send the checked-out rows home (all ranks call it together); without a checkout it does nothing."""
        self._return_rows()
        self._release()

    def _return_rows(self):
        self._raise_stray()
        if self._borrowed is not None:
            self._exchange(self.rows, self._borrowed, self.home, self._lent)

    def _slots(self, index: Tensor) -> Tensor:
        inside = index.clamp(0, self.num_samples - 1)
        slot = torch.where(inside == index, self._slot[inside], -1)
        self._stray = torch.maximum(self._stray, torch.where(slot < 0, index, NO_SAMPLE).max())
        if not self._stray.is_cuda:
            self._raise_stray()  # free on the CPU; on a GPU it would wait for the device, so `checkin` looks
        return slot

    def _raise_stray(self):
        if (sample := self._stray.item()) != NO_SAMPLE:
            self._stray.fill_(NO_SAMPLE)
            raise InputError(
                f"sample {sample} was not checked out: begin_epoch(epoch, order) must name every id of the epoch"
            )

    def read(self, index: Tensor, labels: Tensor) -> Tensor:
        """The last predictions [B, K] of the samples `index` [B]; one-hot `labels` [B] for those never seen."""
        rows = self.rows[self._slots(index)]
        return torch.where(rows[:, :1] < 0, F.one_hot(labels, self.num_classes).to(rows.dtype), rows)

    def write(self, index: Tensor, probabilities: Tensor):
        """Overwrite the rows of the samples `index` [B] with `probabilities` [B, K]."""
        self.rows[self._slots(index)] = probabilities.detach().to(self.rows.dtype)

    def gather(self) -> Tensor:
        """The full table [N, K] on every rank (all ranks call it together), for tests and notebooks.

        Samples never seen are one-hot where the store knows their labels, NaN where it does not.
        """
        self._return_rows()
        table = ranks.gather_rows(self.home, self.num_samples).clone()
        unseen = (table[:, 0] < 0).nonzero().squeeze(1)
        table[unseen] = float("nan")
        if self.labels is not None:
            labels = self.labels.to(unseen.device)[unseen]
            table[unseen] = F.one_hot(labels, self.num_classes).to(table.dtype)
        return table

    def shard(self) -> Tensor:
        """This rank's home rows, up to date (all ranks call it together): what a checkpoint keeps."""
        self._return_rows()
        return self.home

    def _agree_on_rows(self):
        """Tell every home rank which of its rows this rank borrows, and learn which of its own it lends."""
        starts = torch.tensor(
            [home_rows(self.num_samples, rank, self.world_size).start for rank in range(self.world_size)]
        )
        bounds = torch.cat([torch.searchsorted(self.ids, starts), torch.tensor([len(self.ids)])])
        borrowed = bounds.diff().to(self.device)
        lent = torch.empty_like(borrowed)
        dist.all_to_all_single(lent, borrowed)
        borrowed, lent = borrowed.tolist(), lent.tolist()
        lent_ids = torch.empty(sum(lent), dtype=torch.int64, device=self.device)
        dist.all_to_all_single(lent_ids, self.ids.to(self.device), lent, borrowed)
        self._lent = (lent_ids - self.own.start).split(lent)
        self._borrowed = torch.arange(len(self.ids), device=self.device).split(borrowed)
        longest = torch.tensor(max(lent + borrowed), device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        self._longest = longest.item()

    def _exchange(self, source: Tensor, source_rows, target: Tensor, target_rows):
        """Move rows between ranks: `source_rows[r]` of mine become `target_rows` of rank r's, in rounds of bounded size."""
        chunk = max(1, EXCHANGE_BYTES // (self.num_classes * source.element_size() * self.world_size))
        for begin in range(0, self._longest, chunk):
            out = [rows[begin : begin + chunk] for rows in source_rows]
            into = [rows[begin : begin + chunk] for rows in target_rows]
            arrived = source.new_empty(sum(map(len, into)), self.num_classes)
            dist.all_to_all_single(arrived, source[torch.cat(out)], [len(r) for r in into], [len(r) for r in out])
            target[torch.cat(into)] = arrived
