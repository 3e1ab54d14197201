"""What a method's loss amounts to for the chosen settings: pure functions of them, without torch."""

import math
from dataclasses import dataclass, field

from .recipe import TFKD, Recipe

UNEQUAL = 1.5  # a mixture's gradient scale outside 1/UNEQUAL … UNEQUAL is told as a change of the learning rate
INERT = 0.02  # a regulariser with less than this part of the gradient is told to do nothing


def alpha_at(epoch: int, num_epochs: int, alpha: float, schedule: str = "linear", warmup_epochs: int = 0) -> float:
    """PS-KD's α in epoch `epoch` (0-based) of E: 0 in the w warm-up epochs; then with t = (epoch + 1 − w)/(E − w)

    `linear` α·t, `cosine` α·(1 − cos πt)/2, `constant` α. The last epoch's is `alpha` with each of them.
    """
    done, length = epoch + 1 - warmup_epochs, num_epochs - warmup_epochs
    if done <= 0:
        return 0.0
    if schedule == "linear":
        return alpha * done / length
    return alpha if schedule == "constant" else alpha * (1.0 - math.cos(math.pi * done / length)) / 2.0


def tfkd_weight(
    num_classes: int, virtual: bool, alpha: float, temperature: float, multiplier: float | None, reduction: str
) -> float:
    """The factor of TF-KD's KL term, summed over classes and averaged over B: α·m·(T² with a trained teacher)/(K with `mean`).

    An m of None gives the term the weight α with the virtual teacher, α·T²/2 with a trained one.
    """
    default = 1.0 if virtual else 0.5
    of_mean = multiplier if multiplier is None or reduction == "batchmean" else multiplier / num_classes
    weight = alpha * (default if of_mean is None else of_mean)
    return weight if virtual else weight * temperature**2


@dataclass(frozen=True)
class EffectiveLoss:
    """What a loss amounts to: `cross_entropy`·CE(labels) + `kl`·KL, KL summed over classes and averaged over B.

    `temperature` divides the student's logits in the KL term. `smoothing` is the ε of the label smoothing (ε/K over all
    classes) whose gradient, times `gradient_scale`, is this loss's; None where there is none.
    """

    cross_entropy: float
    kl: float = 0.0
    target: str = ""
    temperature: float = 1.0
    smoothing: float | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def kl_pull(self) -> float:
        """The KL term's gradient on the logits in units of cross-entropy's where a prediction is wholly wrong: `kl`/T."""
        return self.kl / self.temperature

    @property
    def gradient_scale(self) -> float:
        """The gradient in units of plain cross-entropy's: at T = 1 always, else where a prediction is wholly wrong."""
        return self.cross_entropy + self.kl_pull

    @property
    def gradient_scale_of_small_logits(self) -> float:
        """The same where teacher and student are all but uniform: each logit then counts by 1/T, and so does its slope."""
        return self.cross_entropy + self.kl_pull / self.temperature

    def lines(self, lr: float | None = None) -> list[str]:
        """A formula, what it is equal to, and warnings; `lr` is the learning rate that a warning speaks of."""
        tempered = f" at T {self.temperature:g}" if self.temperature != 1 else ""
        kl = f" + {self.kl:.4g} × KL({self.target} ‖ prediction){tempered}" if self.kl else ""
        scale = f"gradient scale {self.gradient_scale:.3g}"
        if tempered:
            scale += f" where a prediction is wholly wrong, {self.gradient_scale_of_small_logits:.3g} for small logits"
        found = [f"effective loss: {self.cross_entropy:.4g} × cross-entropy{kl}", f"  {scale}"]
        if self.smoothing is not None:
            times = "" if abs(self.gradient_scale - 1) < 0.005 else f", its gradient times {self.gradient_scale:.3g}"
            found.append(f"  the same as label smoothing with ε = {self.smoothing:.4g} (ε/K){times}")
        return found + [f"  {line}" for line in self.remarks + self.warnings(lr)]

    def warnings(self, lr: float | None = None) -> list[str]:
        """Where the regulariser does nothing, or the scale is a learning rate in disguise, a line each."""
        found = []
        if self.target and self.kl_pull < INERT * self.gradient_scale:
            part = 100 * self.kl_pull / self.gradient_scale
            found.append(f"warning: the KL term is inert: {part:.2g} % of the gradient")
        # A term that is added to a whole cross-entropy leaves its learning rate alone; a mixture should weigh 1 in all.
        if self.cross_entropy != 1 and not 1 / UNEQUAL <= self.gradient_scale <= UNEQUAL:
            scales = sorted({self.gradient_scale_of_small_logits, self.gradient_scale})
            rates = " to ".join(f"{lr * scale:.3g}" for scale in scales) if lr else ""
            like = f": like optim.lr {rates} instead of {lr:g}" if lr else ""
            found.append(f"warning: the gradient scale is a hidden learning rate{like}")
        return found


def effective_loss(recipe: Recipe, num_classes: int, epoch: int | None = None) -> EffectiveLoss:
    """What the loss of the recipe's method amounts to with `num_classes` classes, in `epoch` (0-based; by default the last)."""
    epoch = recipe.epochs - 1 if epoch is None else epoch
    section = getattr(recipe, recipe.method)
    if recipe.method == "label_smoothing":
        return _smoothed(section.epsilon, section.spread, num_classes)
    if recipe.method == "cskd":
        kl = section.weight * section.temperature**2
        return EffectiveLoss(1.0, kl, "a partner's prediction", section.temperature)
    if recipe.method == "tfkd":
        return _virtual(section, num_classes) if section.teacher == "virtual" else _trained(section, num_classes)
    if recipe.method == "pskd":
        return _last_prediction(section, recipe.epochs, epoch)
    return EffectiveLoss(1.0)


def effective_lines(recipe: Recipe, num_classes: int) -> list[str]:
    """What the loss of the recipe's method amounts to, in lines for people."""
    return effective_loss(recipe, num_classes).lines(recipe.optim.lr)


def _smoothed(epsilon: float, spread: str, num_classes: int) -> EffectiveLoss:
    of_all = epsilon if spread == "all" else epsilon * num_classes / (num_classes - 1)
    return EffectiveLoss(1.0 - of_all, of_all, "uniform", smoothing=of_all)


def _trained(section: TFKD, num_classes: int) -> EffectiveLoss:
    kl = _tfkd_kl(section, num_classes)
    temperature = section.temperature if section.temper_student else 1.0
    return EffectiveLoss(1.0 - section.alpha, kl, "the teacher's prediction", temperature)


def _virtual(section: TFKD, num_classes: int) -> EffectiveLoss:
    """As label smoothing where the student is not tempered: the target has two values, `true` and `other`."""
    kl, cross_entropy = _tfkd_kl(section, num_classes), 1.0 - section.alpha
    ratio = math.exp(
        (section.true_probability - (1 - section.true_probability) / (num_classes - 1)) / section.temperature
    )
    other = 1.0 / (ratio + num_classes - 1)
    remark = f"the teacher's target: {ratio * other:.4g} for the label, {other:.4g} for each other class"
    if section.temper_student:
        return EffectiveLoss(cross_entropy, kl, "virtual teacher", section.temperature, None, [remark])
    smoothing = num_classes * kl * other / (cross_entropy + kl)
    return EffectiveLoss(cross_entropy, kl, "virtual teacher", 1.0, smoothing, [remark])


def _tfkd_kl(section: TFKD, num_classes: int) -> float:
    virtual = section.teacher == "virtual"
    return tfkd_weight(num_classes, virtual, section.alpha, section.temperature, section.multiplier, section.reduction)


def _last_prediction(section, num_epochs: int, epoch: int) -> EffectiveLoss:
    alpha = alpha_at(epoch, num_epochs, section.alpha, section.alpha_schedule, section.alpha_warmup_epochs)
    warm = f" after {section.alpha_warmup_epochs} epochs of plain cross-entropy" if section.alpha_warmup_epochs else ""
    what = "its own last prediction" if section.teacher == "store" else "what the last epoch's weights say of it"
    remark = f"in epoch {epoch + 1} of {num_epochs}; α grows to {section.alpha:g} ({section.alpha_schedule}){warm}"
    return EffectiveLoss(1.0 - alpha, alpha, what, remarks=[remark])
