"""TF-KD (Yuan et al., CVPR 2020, arXiv 1909.11723): a virtual teacher, or the same architecture trained before."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import losses
from ..models.build import load_model
from ..recipe import InputError
from .base import Method


class TFKD(Method):
    """(1 − α)·cross-entropy + α·m·KL/K with the virtual teacher, (1 − α)·cross-entropy + α·m·T²·KL/K with a trained one.

    KL is summed over the K classes and averaged over B; KL/K is what the released code calls `KLDivLoss()`.
    `teacher` is None for the virtual one. A `multiplier` m of None stands for K, with a trained teacher for K/2.
    """

    part_names = ("cross_entropy", "kl")

    def __init__(
        self,
        teacher: nn.Module | None = None,
        alpha: float = 0.1,
        temperature: float = 20.0,
        multiplier: float | None = None,
        true_probability: float = 0.99,
    ):
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature
        self.multiplier, self.true_probability = multiplier, true_probability

    @classmethod
    def from_section(cls, section):
        teacher = None if section["teacher"] == "virtual" else load_model(section["teacher"])
        return cls(**{**section, "teacher": teacher})

    def setup(self, *, num_samples, num_classes, num_epochs, device, labels=None):
        super().setup(num_samples=num_samples, num_classes=num_classes, num_epochs=num_epochs, device=device)
        # In units of K: the released settings are for K = 100, and KL/K shrinks as 1/K.
        default = 1.0 if self.teacher is None else 0.5
        self.kl_weight = self.alpha * (default if self.multiplier is None else self.multiplier / num_classes)
        if self.teacher is not None:
            if self.teacher.num_classes != num_classes:
                raise InputError(f"tfkd.teacher has {self.teacher.num_classes} classes, the data {num_classes}")
            self.teacher.to(device).eval().requires_grad_(False)
            self.kl_weight *= self.temperature**2
        return self

    def loss(self, model, batch):
        logits = model(batch.images)
        if self.teacher is None:
            kl = losses.virtual_teacher_kl(logits, batch.labels, self.true_probability, self.temperature)
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(batch.images)
            kl = losses.tempered_kl(logits, teacher_logits, self.temperature)
        cross_entropy = F.cross_entropy(losses.at_least_float32(logits), batch.labels)
        self.parts = torch.stack([cross_entropy, kl]).detach()
        return (1.0 - self.alpha) * cross_entropy + self.kl_weight * kl, logits
