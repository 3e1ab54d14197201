"""Online label smoothing (Zhang et al., TIP 2021, arXiv 2011.12562): a class's label is what was said of it an epoch ago."""

from functools import partial

import torch
import torch.nn.functional as F

from .. import losses, ranks
from ..errors import InputError
from ..progress import readable
from .base import Method
from .sections import class_table_bytes

UNIT = 2**32  # probabilities are summed as whole numbers of 1/UNIT: the same sum in any order, on any number of ranks


class OLS(Method):
    """(1 − `weight`)·cross-entropy + `weight`·cross-entropy against the soft label of the sample's class.

    A class's soft label is the mean over the last epoch of what the training forward said of those of its samples that it
    got right; uniform where it got none. In the first epoch it is zero, as in the authors' code, and the loss is
    (1 − `weight`)·cross-entropy. What is said of a mixed image counts for no class.
    """

    term_names = ("cross_entropy", "soft_cross_entropy")
    without_hit: int | None = None  # classes of which the last epoch got no sample right

    def __init__(self, weight: float = 0.5):
        self.weight = weight

    def setup(self, *, num_classes, device, **known):
        super().setup(num_classes=num_classes, device=device, **known)
        self.soft_labels = torch.zeros(num_classes, num_classes, device=device)
        # Changed in place only: a recorded step (CUDA graph) goes on using them.
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.hits = torch.zeros(num_classes, dtype=torch.int64, device=device)
        return self

    def describe(self):
        table = f"soft labels: {self.num_classes:,} classes, {readable(class_table_bytes(self.num_classes))} a rank"
        if not self.without_hit:
            return table
        return f"{table}; uniform for {self.without_hit:,} of which no sample was classified correctly"

    def loss(self, model, batch):
        logits = model(batch.inputs)
        log_p = F.log_softmax(losses.at_least_float32(logits), dim=1)
        cross_entropy = batch.label_loss(partial(F.nll_loss, log_p))
        soft = batch.label_loss(lambda labels: -(self.soft_labels[labels] * log_p).sum(dim=1).mean())
        self.terms = torch.stack([cross_entropy, soft]).detach()
        if batch.permutation is None:
            self._count(log_p.detach(), batch.labels)
        return (1.0 - self.weight) * cross_entropy + self.weight * soft, logits

    def _count(self, log_p, labels):
        """Add the predictions of correctly classified samples to their classes' sums."""
        hit = log_p.argmax(dim=1) == labels
        counted = (log_p.exp() * hit[:, None] * UNIT).round().long()
        self.sums.index_add_(0, labels, counted)
        self.hits.index_add_(0, labels, hit.long())

    def end_epoch(self):
        sums, hits = ranks.total(self.sums), ranks.total(self.hits)[:, None]
        means = sums.double() / (hits.clamp_min(1) * UNIT)
        self.soft_labels.copy_(torch.where(hits > 0, means, 1.0 / self.num_classes))
        self.without_hit = int((hits == 0).sum())
        self.sums.zero_()
        self.hits.zero_()

    def state_dict(self, include_store=False):
        return {"soft_labels": self.soft_labels, "sums": ranks.total(self.sums), "hits": ranks.total(self.hits)}

    def load_state_dict(self, state):
        if state["soft_labels"].shape != self.soft_labels.shape:
            raise InputError(
                f"the saved soft labels are of {len(state['soft_labels'])} classes, not {self.num_classes}"
            )
        self.soft_labels.copy_(state["soft_labels"])
        mine = int(ranks.rank_and_world_size()[0] == 0)  # the sums are those of all ranks
        self.sums.copy_(state["sums"] * mine)
        self.hits.copy_(state["hits"] * mine)
