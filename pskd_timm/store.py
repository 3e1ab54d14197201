"""PredictionStore: each training sample's last prediction, row-sharded over the ranks.

Row i of the N×K table has a home rank (contiguous blocks). `checkout(ids)` brings the rows a rank will visit, `read` and
`write` are local tensor operations on the device, `checkin()` sends the rows home. With one process home and working copy
are the same tensor. Memory a rank: N/W·(2·K·bytes + 16), with one process N·(K·bytes + 1), and an exchange buffer of bounded
size; `topk` keeps k probabilities and their classes of each row instead of K.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import order, ranks
from .errors import InputError

DTYPES = ("float16", "float32", "float64")
NO_SAMPLE = torch.iinfo(torch.int64).min
UNSEEN = -1.0  # first number of a row that was never written: no probability is negative
SLOT_BYTES = 16  # of a checked-out row beside its numbers: its sample's id, and its place in its home rank's hands
LOOKED_AT = 64  # rows of each write whose `topk` error is computed, which takes all classes
EXCHANGE_BYTES = 16 * 2**20  # what a rank sends, and receives, in one round of an exchange


class FullRows:
    """Rows of K probabilities of `dtype`, as they are."""

    def __init__(self, num_classes: int, dtype: torch.dtype):
        self.num_classes, self.dtype, self.wide = num_classes, dtype, torch.promote_types(dtype, torch.float32)
        self.row_bytes = num_classes * dtype.itemsize

    def blank(self, num_rows: int, device) -> Tensor:
        """Rows that were never written."""
        rows = torch.zeros(num_rows, self.num_classes, dtype=self.dtype, device=device)
        rows[:, :1] = UNSEEN
        return rows

    def unseen(self, rows: Tensor) -> Tensor:
        """Which rows were never written, [B, 1]."""
        return rows[:, :1] < 0

    def encode(self, probabilities: Tensor) -> Tensor:
        """Probabilities [B, K] as rows of the table."""
        return probabilities.to(self.dtype)

    def decode(self, rows: Tensor) -> Tensor:
        """Rows of the table as probabilities [B, K], at least float32; those never written are all zero."""
        probabilities = rows.to(self.wide, copy=True)
        probabilities[:, :1].clamp_(min=0.0)
        return probabilities


class TopRows:
    """Rows of the k largest probabilities and their classes, packed into bytes; the rest is spread over the other classes.

    Class numbers take 16 bits where K is at most 32 768, else 32. Decoded rows are float32, or float64 with that `dtype`.
    """

    def __init__(self, num_classes: int, dtype: torch.dtype, k: int):
        if not 1 <= k < num_classes:
            raise InputError(
                f"pskd.store_topk {k} must be from 1 to {num_classes - 1}, below the {num_classes} classes"
            )
        self.num_classes, self.dtype, self.wide, self.k = (
            num_classes,
            dtype,
            torch.promote_types(dtype, torch.float32),
            k,
        )
        self.index_dtype = torch.int16 if num_classes <= 2**15 else torch.int32
        self.value_bytes = k * dtype.itemsize
        self.row_bytes = self.value_bytes + k * self.index_dtype.itemsize

    def blank(self, num_rows: int, device) -> Tensor:
        classes = torch.zeros(1, self.k, dtype=self.index_dtype, device=device)
        return self._pack(torch.full_like(classes, UNSEEN, dtype=self.dtype), classes).repeat(num_rows, 1)

    def unseen(self, rows: Tensor) -> Tensor:
        return self._values(rows)[:, :1] < 0

    def encode(self, probabilities: Tensor) -> Tensor:
        return self.pack(*probabilities.topk(self.k, dim=1))

    def pack(self, values: Tensor, classes: Tensor) -> Tensor:
        """The k largest probabilities [B, k] and their classes [B, k] as rows of the table."""
        return self._pack(values.to(self.dtype), classes.to(self.index_dtype))

    def decode(self, rows: Tensor) -> Tensor:
        values, classes, rest = self.parts(rows)
        return rest[:, None].repeat(1, self.num_classes).scatter_(1, classes, values)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The probabilities kept [B, k], their classes [B, k], and that of each other class [B]; zeros where never written."""
        values = self._values(rows).to(self.wide)
        classes = _aligned(rows[:, self.value_bytes :]).view(self.index_dtype).long()
        # Rounded values can add up to a little more than 1.
        rest = (1.0 - values.sum(dim=1)).clamp_min(0.0) / (self.num_classes - self.k)
        return values.clamp_min(0.0), classes, rest * (values[:, 0] >= 0)

    def _values(self, rows: Tensor) -> Tensor:
        return _aligned(rows[:, : self.value_bytes]).view(self.dtype)

    def _pack(self, values: Tensor, classes: Tensor) -> Tensor:
        return torch.cat([values.contiguous().view(torch.uint8), classes.contiguous().view(torch.uint8)], dim=1)


def _aligned(columns: Tensor) -> Tensor:
    # `contiguous` would return a single row as it lies, at an offset that a wider type cannot be read from.
    return columns.clone(memory_format=torch.contiguous_format)


def _numbers(rows: Tensor | range, device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, range) else rows


def row_format(num_classes: int, dtype: str, topk: int | None = None) -> FullRows | TopRows:
    """How rows of K probabilities are kept: in full, or with `topk` the k largest of each."""
    if dtype not in DTYPES:
        raise InputError(f"store dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    of = getattr(torch, dtype)
    return FullRows(num_classes, of) if topk is None else TopRows(num_classes, of, topk)


def home_rows(num_samples: int, rank: int, world_size: int) -> slice:
    """The rows whose home is `rank`."""
    return order.even_slice(num_samples, rank, world_size)


def store_bytes(num_samples: int, num_classes: int, dtype: str, world_size: int = 1, topk: int | None = None) -> int:
    """Bytes of the store on the rank that holds most, the working copy and what finds its rows included."""
    rows, row_bytes = -(-num_samples // world_size), row_format(num_classes, dtype, topk).row_bytes
    return rows * (row_bytes + 1 if world_size == 1 else 2 * row_bytes + SLOT_BYTES)


def choose_device(wanted: str, run_device, num_bytes: int) -> torch.device:
    """Where a store of `num_bytes` goes: `auto` is the run's device if half of what is free there holds it, else the CPU."""
    run_device = torch.device(run_device)
    if wanted == "cpu":
        return torch.device("cpu")
    fits = run_device.type != "cuda" or 2 * num_bytes <= torch.cuda.mem_get_info(run_device)[0]
    return run_device if fits else torch.device("cpu")


class PredictionStore:
    """An N×K table of probabilities in `dtype` on `device`, its rows spread over the ranks of the default process group.

    `labels` [N], where they are known, fill the one-hot rows of samples never seen in `gather()`; `read` is given them.
    `topk`, where it is set, keeps only so many probabilities of each row. Tensors given and returned lie on their own
    device; with the store on the CPU and the run on a GPU each step therefore waits for the device.

    Example:
        >>> store = PredictionStore(num_samples=50_000, num_classes=100, device="cuda")
        >>> store.checkout(order)  # once an epoch, the sample ids [n] of this rank
        >>> last = store.read(index, labels)  # [B, K], one-hot where a sample was never seen
        >>> store.write(index, logits.softmax(1))
        >>> store.checkin()
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        device="cpu",
        dtype: str = "float16",
        labels: Tensor | None = None,
        topk: int | None = None,
    ):
        self.format = row_format(num_classes, dtype, topk)
        self.rank, self.world_size = ranks.rank_and_world_size()
        self.num_samples, self.num_classes, self.labels = num_samples, num_classes, labels
        self.parts = [home_rows(num_samples, rank, self.world_size) for rank in range(self.world_size)]
        self.own = self.parts[self.rank]
        self.home = self.format.blank(self.own.stop - self.own.start, device)
        self.rows = self.home if self.world_size == 1 else self.format.blank(1, device)
        self._off = torch.zeros(2, dtype=torch.float64, device=self.device)  # mass misplaced by topk; rows written
        # A recorded step (CUDA graph), of one process, goes on using these two: they are changed in place only.
        self._known = torch.zeros(num_samples if self.world_size == 1 else 0, dtype=torch.bool, device=self.device)
        self._stray = torch.tensor(NO_SAMPLE, device=self.device)
        self._release()

    @property
    def device(self) -> torch.device:
        return self.home.device

    @property
    def nbytes(self) -> int:
        """Bytes on this rank with a whole epoch's rows checked out: with several processes as many again as its own.

        Not those of now: a run resumed in mid-epoch visits fewer rows, and logs the same figures all the same.
        """
        if self.world_size == 1:
            return self.home.nbytes + self._known.nbytes
        return 2 * self.home.nbytes + SLOT_BYTES * len(self.home)

    def _release(self):
        self._known.fill_(False)  # with one process: which samples are checked out
        # With several: the ids of the working rows, sorted, so that rows of one home lie together; one row for strays.
        self._ids = torch.full((1,), NO_SAMPLE, device=self.device)
        self._borrowed: list[range] | None = None  # per rank: my slots of its home rows
        self._lent: list[Tensor] | None = None  # per rank: my home rows in its hands

    def checkout(self, ids: Tensor):
        """Bring the rows of the sample ids [n] that this rank will visit (all ranks call it together)."""
        ids = torch.unique(ids.detach().cpu().long())
        if len(ids) and (ids[0] < 0 or ids[-1] >= self.num_samples):
            raise InputError(f"sample ids must lie in 0 … {self.num_samples - 1}, got {ids[0]} … {ids[-1]}")
        self.checkin()
        if self.world_size == 1:
            self._known[ids.to(self.device)] = True
            return
        if len(ids):
            self._ids = ids.to(self.device)
        if len(self.rows) != len(self._ids):  # else the last epoch's memory serves again
            self.rows = self.format.blank(len(self._ids), self.device)
        self._agree_on_rows(ids)
        self._exchange(self.home, self._lent, self.rows, self._borrowed)

    def checkin(self):
        """Send the checked-out rows home (all ranks call it together); without a checkout it does nothing."""
        self._return_rows()
        self._release()

    def _return_rows(self):
        self._raise_stray()
        if self._borrowed is not None:
            self._exchange(self.rows, self._borrowed, self.home, self._lent)

    def find(self, index: Tensor) -> Tensor:
        """The slots [B] of the samples `index` [B], for both `read` and `write`; `checkin` raises where one has none."""
        index = index.to(self.device)
        if self.world_size == 1:
            slots = index.clamp(0, self.num_samples - 1)
            known = (slots == index).logical_and_(self._known.index_select(0, slots))
        else:
            slots = torch.searchsorted(self._ids, index).clamp_max_(len(self._ids) - 1)
            known = self._ids.index_select(0, slots) == index
        # A stray sample is only noted here, since to look would wait for the device.
        torch.maximum(self._stray, index.masked_fill(known, NO_SAMPLE).max(), out=self._stray)
        return slots

    def _raise_stray(self):
        sample = int(ranks.largest([self._stray.item()])[0])
        if sample != NO_SAMPLE:
            self._stray.fill_(NO_SAMPLE)
            raise InputError(
                f"sample {sample} was not checked out: begin_epoch(epoch, order) must name every id of the epoch"
            )

    def read(self, index: Tensor, labels: Tensor, slots: Tensor | None = None) -> Tensor:
        """The last predictions [B, K] of the samples `index` [B]; one-hot `labels` [B] for those never seen.

        `slots` is what `find(index)` gave, where the same step also writes.
        """
        rows = self.rows.index_select(0, self.find(index) if slots is None else slots)
        last = self.format.decode(rows)
        # What was never written is decoded to zeros; a one at the label, where torch.where would go over whole rows.
        unseen = self.format.unseen(rows).to(last.dtype)
        return last.scatter_add_(1, labels.to(self.device)[:, None], unseen).to(index.device)

    def read_top(self, index: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What a store with `topk` keeps of the samples `index` [B]: probabilities [B, k], classes [B, k], each other's [B].

        All three are zero for samples never seen.
        """
        parts = self.format.parts(self.rows.index_select(0, self.find(index) if slots is None else slots))
        return tuple(part.to(index.device) for part in parts)

    @torch.no_grad()
    def write(self, index: Tensor, probabilities: Tensor, slots: Tensor | None = None):
        """Overwrite the rows of the samples `index` [B] with `probabilities` [B, K]."""
        probabilities = probabilities.to(self.device)
        rows = self.format.encode(probabilities)
        self.rows.index_copy_(0, self.find(index) if slots is None else slots, rows)
        if isinstance(self.format, TopRows):
            self._note_error(probabilities[:LOOKED_AT], rows[:LOOKED_AT])

    @torch.no_grad()
    def write_top(self, index: Tensor, log_probabilities: Tensor, slots: Tensor | None = None):
        """`write`, in a store with `topk`, from `log_probabilities` [B, K]: the other probabilities are never computed."""
        log_probabilities = log_probabilities.to(self.device)
        values, classes = log_probabilities.topk(self.format.k, dim=1)
        rows = self.format.pack(values.exp(), classes)
        self.rows.index_copy_(0, self.find(index) if slots is None else slots, rows)
        self._note_error(log_probabilities[:LOOKED_AT].exp(), rows[:LOOKED_AT])

    def _note_error(self, probabilities: Tensor, rows: Tensor):
        self._off[0] += 0.5 * (probabilities - self.format.decode(rows)).abs().sum()
        self._off[1] += len(rows)

    def topk_error(self) -> float:
        """Mean probability mass, from 0 to 1, that `topk` put on the wrong classes, of the first 64 rows of each write so far.

        It is half the sum of absolute differences of a row; all ranks call it together.
        """
        off, written = (sum(values) for values in zip(*ranks.all_gather_objects(self._off.tolist()), strict=True))
        return off / max(written, 1.0)

    def gather(self) -> Tensor:
        """The full table [N, K] on every rank (all ranks call it together), for tests and notebooks.

        Samples never seen are one-hot where the store knows their labels, NaN where it does not.
        """
        rows = ranks.gather_rows(self.shard(), self.parts)
        table = self.format.decode(rows)
        unseen = self.format.unseen(rows).squeeze(1).nonzero().squeeze(1)
        table[unseen] = float("nan")
        if self.labels is not None:
            labels = self.labels.to(unseen.device)[unseen]
            table[unseen] = F.one_hot(labels, self.num_classes).to(table.dtype)
        return table

    def shard(self) -> Tensor:
        """This rank's home rows, up to date (all ranks call it together): what a checkpoint keeps."""
        self._return_rows()
        return self.home

    def _agree_on_rows(self, ids: Tensor):
        """Tell every home rank which of its rows this rank borrows (`ids`, sorted), and learn which of its own it lends."""
        wire = ranks.exchange_device()
        bounds = torch.searchsorted(ids, torch.tensor([part.start for part in self.parts] + [self.num_samples]))
        borrowed = bounds.diff().to(wire)
        lent = torch.empty_like(borrowed)
        dist.all_to_all_single(lent, borrowed)
        borrowed, lent = borrowed.tolist(), lent.tolist()
        lent_ids = torch.empty(sum(lent), dtype=torch.int64, device=wire)
        dist.all_to_all_single(lent_ids, ids.to(wire), lent, borrowed)
        self._lent = list((lent_ids.to(self.device) - self.own.start).split(lent))
        bounds = bounds.tolist()
        self._borrowed = [range(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        self._longest = int(ranks.largest([max(lent + borrowed)])[0])

    def _exchange(self, source: Tensor, source_rows, target: Tensor, target_rows):
        """Move rows between ranks: `source_rows[r]` of mine become `target_rows` of rank r's, in rounds of bounded size."""
        wire = ranks.exchange_device()
        chunk = max(1, EXCHANGE_BYTES // (self.format.row_bytes * self.world_size))
        for begin in range(0, self._longest, chunk):
            out = [_numbers(rows[begin : begin + chunk], self.device) for rows in source_rows]
            into = [_numbers(rows[begin : begin + chunk], self.device) for rows in target_rows]
            # A rank's own rows need no wire.
            target.index_copy_(0, into[self.rank], source.index_select(0, out[self.rank]))
            out[self.rank] = into[self.rank] = out[self.rank][:0]
            sent = source.index_select(0, torch.cat(out)).to(wire)
            arrived = sent.new_empty(sum(map(len, into)), source.shape[1])
            dist.all_to_all_single(arrived, sent, [len(r) for r in into], [len(r) for r in out])
            target.index_copy_(0, torch.cat(into), arrived.to(target.device))
