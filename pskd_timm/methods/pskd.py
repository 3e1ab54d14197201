"""PS-KD (Kim et al., ICCV 2021, arXiv 2006.12000): the label is mixed with the network's own prediction of an epoch ago."""

from functools import partial

import torch
import torch.nn.functional as F

from .. import losses
from ..errors import InputError
from ..progress import readable
from ..ranks import rank_and_world_size
from ..store import PredictionStore, choose_device, row_format, store_bytes
from .base import Method
from .sections import alpha_at
from .snapshot import Snapshot


class PSKD(Method):
    """Target in epoch e of E: (1 − α_e)·label + α_e·last prediction, α_e = `alpha`·(e + 1)/E or as `alpha_schedule` says.

    With `teacher` store a sample's last prediction is that of its last training step, kept in `store_dtype` on
    `store_device` (`auto` or `cpu`), all its probabilities or the `store_topk` largest. With `teacher`
    snapshot the network as the last epoch left it sees the current images too, in eval mode, and nothing is stored.

    Example:
        >>> pskd = PSKD(alpha=0.8).setup(num_samples=50_000, num_classes=100, num_epochs=300, device="cuda")
        >>> pskd.begin_epoch(epoch, order)  # the sample ids that this rank will visit
        >>> loss, logits = pskd.loss(model, Batch(images, labels, index))
        >>> pskd.end_epoch()
    """

    term_names = ("cross_entropy", "last_cross_entropy")
    snapshot: Snapshot | None = None
    alpha_now = 0.0  # of the current epoch, on the host

    def __init__(
        self,
        alpha: float = 0.8,
        store_dtype: str = "float16",
        store_topk: int | None = None,
        store_device: str = "auto",
        teacher: str = "store",
        alpha_schedule: str = "linear",
        alpha_warmup_epochs: int = 0,
    ):
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha must lie in [0, 1], got {alpha}")
        if teacher not in ("store", "snapshot"):
            raise InputError(f"teacher must be store or snapshot, got {teacher!r}")
        if alpha_schedule not in ("linear", "constant", "cosine"):
            raise InputError(f"alpha_schedule must be linear, constant or cosine, got {alpha_schedule!r}")
        self.alpha, self.schedule, self.teacher = alpha, (alpha_schedule, alpha_warmup_epochs), teacher
        self.store_dtype, self.store_device = store_dtype, store_device
        self.topk = store_topk if teacher == "store" else None

    def setup(self, *, num_samples, num_classes, num_epochs, device, labels=None, model=None):
        super().setup(num_samples=num_samples, num_classes=num_classes, num_epochs=num_epochs, device=device)
        self._alpha = torch.zeros((), dtype=torch.float64, device=device)  # where a recorded step reads it
        if self.teacher == "snapshot":
            self.snapshot = Snapshot(model)
            self.description = "snapshot teacher: the network as the last epoch left it, one more forward a step"
            return self
        num_bytes = store_bytes(num_samples, num_classes, self.store_dtype, rank_and_world_size()[1], self.topk)
        where = choose_device(self.store_device, device, num_bytes)
        self.store = PredictionStore(num_samples, num_classes, where, self.store_dtype, labels, self.topk)
        self.description = (
            f"prediction store: {num_samples:,} × {num_classes:,} {self.store_dtype}"
            f"{f', the {self.topk} largest of each row' if self.topk else ''}, {readable(num_bytes)} a rank on {where.type}"
        )
        return self

    def check(self, model, num_classes):
        if self.teacher == "store":
            row_format(num_classes, self.store_dtype, self.topk)

    def describe(self):
        if self.topk and (error := self.store.topk_error()):
            return f"prediction store: {100 * error:.2g} % of a row's mass is misplaced on average"
        return self.description

    def begin_epoch(self, epoch, order):
        self.alpha_now = alpha_at(epoch, self.num_epochs, self.alpha, *self.schedule)
        self._alpha.fill_(self.alpha_now)
        if self.store:
            self.store.checkout(order)
        elif epoch > 0 and self.snapshot.frozen is None:
            self.snapshot.take()  # a run that starts in mid-way from a file: its weights are those of the last epoch

    def loss(self, model, batch):
        logits = model(batch.inputs)
        wide = losses.at_least_float32(logits)
        slots = self.store.find(batch.index) if self.store else None
        if self.topk and batch.permutation is None:
            return self._loss_of_top_rows(wide, batch, slots), logits
        last = self.last_prediction(model, batch, slots).to(wide.dtype)
        log_p = F.log_softmax(wide, dim=1)
        cross_entropy = batch.label_loss(partial(F.nll_loss, log_p))
        last_cross_entropy = (last * log_p).sum() / -len(wide)
        with torch.no_grad():
            self.terms = torch.stack([cross_entropy, last_cross_entropy])
            if self.store and batch.permutation is None:
                # What this very forward predicts (training mode, augmented view) is the next visit's target; of a mixed
                # image it is neither sample's.
                self.store.write(batch.index, wide.softmax(dim=1), slots)
        return torch.lerp(cross_entropy, last_cross_entropy, self._alpha.to(wide.dtype)), logits

    def _loss_of_top_rows(self, logits, batch, slots):
        """`loss` with a store of the k largest, whose rows are never spread out over all the classes."""
        values, classes, rest = self.store.read_top(batch.index, slots)
        values, rest = values.to(logits.dtype), rest.to(logits.dtype)
        labels = batch.labels[:, None]
        unseen = (values[:, :1] == 0).to(logits.dtype)  # the label stands in for it
        alpha = self._alpha.to(logits.dtype)
        weights = torch.cat([1.0 - alpha + alpha * unseen, alpha * (values - rest[:, None])], dim=1)
        loss, log_p = losses.sparse_cross_entropy(logits, torch.cat([labels, classes], dim=1), weights, alpha * rest)
        cross_entropy = -log_p.gather(1, labels)
        of_top = ((values - rest[:, None]) * log_p.gather(1, classes)).sum(dim=1)
        last = (unseen * cross_entropy)[:, 0] - of_top - rest * log_p.sum(dim=1)
        self.terms = torch.stack([cross_entropy.mean(), last.mean()])
        self.store.write_top(batch.index, log_p, slots)
        return loss.mean()

    def last_prediction(self, model, batch, slots=None):
        """The last predictions, probabilities [B, K]; one-hot labels where there is none yet, or a snapshot would not count.

        The store's is of the samples, mixed as a mixed batch's images are; the snapshot looks at the mixed images themselves.
        """
        if self.store:
            return batch.mixed(self.store.read(batch.index, batch.labels, slots))
        self.snapshot.watch(model)
        if not self.snapshot_teaches:
            return batch.mixed(losses.one_hot(batch.labels, self.num_classes))
        return losses.at_least_float32(self.snapshot.logits(batch.inputs)).softmax(dim=1)

    def end_epoch(self):
        if self.store:
            self.store.checkin()
        else:
            self.snapshot.take()

    @property
    def snapshot_teaches(self) -> bool:
        """Whether this epoch's loss has a snapshot to ask: without it, or with α = 0, its forward pass is left out."""
        return self.snapshot is not None and self.snapshot.frozen is not None and self.alpha_now > 0

    @property
    def variant(self):
        return self.snapshot_teaches

    def values(self):
        return {"alpha": self.alpha_now}

    def state_dict(self, include_store=False):
        return self.snapshot.state_dict() if self.snapshot else super().state_dict(include_store)

    def load_state_dict(self, state):
        if self.snapshot:
            self.snapshot.load_state_dict(state)
        else:
            super().load_state_dict(state)
