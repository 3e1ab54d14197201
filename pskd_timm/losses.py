"""Losses: tensors in, tensors out. Means over B unless said otherwise; at least float32 whatever the logits' precision."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` in float32 if they are of lower precision, unchanged otherwise."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


class _SparseCrossEntropy(torch.autograd.Function):
    """`sparse_cross_entropy` with one table of the logits' size kept and one made for the gradient, where torch's own
    operations would make one for each of the target's parts."""

    @staticmethod
    def forward(ctx, logits: Tensor, classes: Tensor, weights: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits, dim=1)
        ctx.save_for_backward(log_p, classes, weights, rest)
        ctx.mark_non_differentiable(log_p)
        return -(weights * log_p.gather(1, classes)).sum(dim=1) - rest * log_p.sum(dim=1), log_p

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        log_p, classes, weights, rest = ctx.saved_tensors
        total = weights.sum(dim=1) + rest * log_p.shape[1]
        found = log_p.exp().mul_((grad * total)[:, None]).sub_((grad * rest)[:, None])
        return found.scatter_add_(1, classes, -grad[:, None] * weights), None, None, None


def sparse_cross_entropy(logits: Tensor, classes: Tensor, weights: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [B] of `logits` [B, K] against rows of `rest` [B] each plus `weights` [B, k] at `classes` [B, k].

    A class may stand in a row twice. Also returns log-probabilities [B, K], without gradient.
    """
    return _SparseCrossEntropy.apply(logits, classes, weights, rest)


def tempered_kl(
    logits: Tensor, target_logits: Tensor, temperature: float, student_temperature: float | None = None
) -> Tensor:
    """KL(softmax(target_logits/T) ‖ softmax(logits/T)), both [B, K], summed over K; mean over B. No gradient to the target.

    `student_temperature` divides `logits` instead of T, where it is given.
    """
    log_p = F.log_softmax(at_least_float32(logits) / (student_temperature or temperature), dim=1)
    log_q = F.log_softmax(at_least_float32(target_logits.detach()) / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def one_hot(labels: Tensor, num_classes: int, dtype=torch.float32) -> Tensor:
    """`labels` [B] as rows [B, K]; unlike torch's own it never waits for the device to look at them."""
    rows = torch.zeros(len(labels), num_classes, dtype=dtype, device=labels.device)
    return rows.scatter_(1, labels[:, None], 1.0)


def virtual_teacher(labels: Tensor, num_classes: int, true_probability: float, dtype=torch.float32) -> Tensor:
    """Rows [B, K] with `true_probability` on the label and the rest spread evenly (Yuan et al., CVPR 2020, Eq. 9)."""
    rest = (1.0 - true_probability) / (num_classes - 1)
    rows = torch.full((len(labels), num_classes), rest, dtype=dtype, device=labels.device)
    return rows.scatter(1, labels[:, None], true_probability)


def virtual_teacher_kl(
    logits: Tensor, labels: Tensor, true_probability: float, temperature: float, student_temperature: float = 1.0
) -> Tensor:
    """KL(softmax(q/T) ‖ softmax(logits)) for the virtual teacher's q, summed over K; mean over B.

    As released by Yuan et al.: the probabilities q go through a softmax again, and the student is not divided by T, but
    by `student_temperature`.
    """
    log_p = F.log_softmax(at_least_float32(logits) / student_temperature, dim=1)
    q = virtual_teacher(labels, logits.shape[1], true_probability, log_p.dtype)
    return F.kl_div(log_p, F.softmax(q / temperature, dim=1), reduction="batchmean")
