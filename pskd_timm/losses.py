"""Losses: tensors in, tensor out. Means over B; at least float32 whatever the logits' precision."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` in float32 if they are of lower precision, unchanged otherwise."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


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
