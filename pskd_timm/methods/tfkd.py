"""TF-KD (Yuan et al., CVPR 2020, arXiv 1909.11723): a virtual teacher, or the same architecture trained before."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import losses
from ..errors import InputError
from .base import Method, frozen
from .sections import tfkd_weight


class TFKD(Method):
    """(1 − α)·cross-entropy + α·m·KL/K with the virtual teacher, (1 − α)·cross-entropy + α·m·T²·KL/K with a trained one.

    KL is summed over the K classes and averaged over B; KL/K is what the released code calls `KLDivLoss()`, and
    `reduction` batchmean leaves the K out. `teacher` is None for the virtual one. A `multiplier` m of None stands for K,
    with a trained teacher for K/2 (1 and 1/2 with batchmean). With `temper_student` None the student's logits are divided
    by T where the teacher is a trained one.
    """

    term_names = ("cross_entropy", "kl")

    def __init__(
        self,
        teacher: nn.Module | None = None,
        alpha: float = 0.1,
        temperature: float = 20.0,
        multiplier: float | None = None,
        true_probability: float = 0.99,
        reduction: str = "mean",
        temper_student: bool | None = None,
    ):
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature
        self.multiplier, self.reduction, self.true_probability = multiplier, reduction, true_probability
        tempered = teacher is not None if temper_student is None else temper_student
        self.student_temperature = temperature if tempered else 1.0

    @classmethod
    def from_section(cls, section):
        return cls(**{**section, "teacher": None if section["teacher"] == "virtual" else section["teacher"]})

    def check(self, model, num_classes):
        if self.teacher is None:
            return
        if self.teacher.num_classes != num_classes:
            raise InputError(f"tfkd.teacher has {self.teacher.num_classes} classes, the data {num_classes}")
        if model is None:
            return
        theirs, ours = _shapes(self.teacher), _shapes(model)
        if different := [name for name in ours | theirs if theirs.get(name) != ours.get(name)]:
            name = different[0]
            raise InputError(
                f"tfkd.teacher is {_name(self.teacher)} with {name} {theirs.get(name)}, the student {_name(model)} "
                f"with {ours.get(name)}:\nTF-KD's teacher has the student's architecture"
            )

    def setup(self, *, num_classes, device, model=None, **known):
        super().setup(num_classes=num_classes, device=device, **known)
        self.check(model, num_classes)
        virtual = self.teacher is None
        constants = self.alpha, self.temperature, self.multiplier, self.reduction
        self.kl_weight = tfkd_weight(num_classes, virtual, *constants)
        if not virtual:
            frozen(self.teacher.to(device), like=model)
        return self

    def loss(self, model, batch):
        logits = model(batch.inputs)
        temperatures = self.temperature, self.student_temperature
        if self.teacher is None:
            kl = batch.label_loss(
                lambda labels: losses.virtual_teacher_kl(logits, labels, self.true_probability, *temperatures)
            )
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(batch.inputs)
            kl = losses.tempered_kl(logits, teacher_logits, *temperatures)
        cross_entropy = batch.label_loss(partial(F.cross_entropy, losses.at_least_float32(logits)))
        self.terms = torch.stack([cross_entropy, kl]).detach()
        return (1.0 - self.alpha) * cross_entropy + self.kl_weight * kl, logits


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _name(model: nn.Module) -> str:
    return model.pretrained_cfg["architecture"]
