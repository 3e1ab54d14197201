"""DLB (Shen et al., CVPR 2022, arXiv 2203.16172): predict like a step ago of the last batch, in another view of it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses, order, ranks
from .base import Method


class Seen(NamedTuple):
    """A forward pass of the last step: the samples in another view, their labels [B], and what was said of them [B, K]."""

    views: Tensor
    labels: Tensor
    logits: Tensor


class DLB(Method):
    """Cross-entropy over this batch and the last one in a new view + `weight`·T²·KL(a step ago ‖ now) of the last one, at T.

    As in the authors' code the two batches are two forward passes with batch statistics of their own, the last batch is seen
    again across epochs too, and the run's first step has none. The paper instead fills half of each batch with it.

    A rank sees its own share of the last batch again; where `grad_accum_steps` splits a step, each part that of the same
    number, so that what was said of it is always one update old. A part's rows all count alike, and parts by their new rows:
    with shares in other proportions than a step before (a short last batch) the whole is their mean only nearly.
    """

    needs_partners = "view"
    recordable = False
    term_names = ("cross_entropy", "kl")

    def __init__(self, weight: float = 1.0, temperature: float = 3.0):
        self.weight, self.temperature = weight, temperature

    def setup(self, *, device, **known):
        super().setup(device=device, **known)
        self.device = device
        self.last: dict[int, Seen] = {}  # of the step before, by the number of the part
        self.now: dict[int, Seen] = {}  # of this step
        return self

    def loss(self, model, batch):
        if batch.micro_batch == 0:
            self.last, self.now = self.now, {}
        logits = model(batch.inputs)
        wide = losses.at_least_float32(logits)
        # A copy: with model.compile max-autotune the next step writes over this one's outputs.
        self.now[batch.micro_batch] = Seen(batch.partner_inputs, batch.labels, wide.detach().clone())
        last = self.last.pop(batch.micro_batch, None)
        if last is None:
            cross_entropy = F.cross_entropy(wide, batch.labels)
            self.terms = torch.stack([cross_entropy, torch.zeros_like(cross_entropy)]).detach()
            return cross_entropy, logits
        again = losses.at_least_float32(model(last.views))
        cross_entropy = F.cross_entropy(torch.cat([again, wide]), torch.cat([last.labels, batch.labels]))
        kl = losses.tempered_kl(again, last.logits, self.temperature)
        self.terms = torch.stack([cross_entropy, kl]).detach()
        return cross_entropy + self.weight * self.temperature**2 * kl, logits

    def state_dict(self, include_store=False):
        """The last step's rows of all ranks, in rank order, and how many each of them had in each part of the step."""
        sizes = ranks.all_gather_objects([len(seen.labels) for seen in self.now.values()])
        bounds = torch.tensor([0, *map(sum, sizes)]).cumsum(0).tolist()
        if not bounds[-1]:
            return {}
        parts = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        mine = Seen(*map(torch.cat, zip(*self.now.values(), strict=True)))
        rows = {
            f"last_{name}": ranks.gather_rows(column.contiguous(), parts) for name, column in mine._asdict().items()
        }
        width = max(map(len, sizes))
        return rows | {"last_sizes": torch.tensor([row + [0] * (width - len(row)) for row in sizes])}

    def load_state_dict(self, state):
        if not state:
            return
        rank, world_size = ranks.rank_and_world_size()
        sizes = state["last_sizes"].tolist()
        if len(sizes) == world_size:
            start, mine = sum(map(sum, sizes[:rank])), sizes[rank]
        else:
            share = order.even_slice_of_pairs(len(state["last_labels"]), rank, world_size)
            start, width = share.start, len(sizes[0])
            parts = [order.even_slice_of_pairs(share.stop - share.start, part, width) for part in range(width)]
            mine = [part.stop - part.start for part in parts]
        columns = [state[f"last_{name}"][start : start + sum(mine)].to(self.device) for name in Seen._fields]
        found = zip(*(column.split(mine) for column in columns), strict=True)
        self.now = {part: Seen(*rows) for part, rows in enumerate(found) if len(rows[1])}
