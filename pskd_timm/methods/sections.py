"""What a method is without torch: its settings and their defaults, title, colour, what its loss amounts to and costs.

A new method is a file beside this one with one `loss(model, batch)`, its section here, and its line in METHOD_SECTIONS
(`methods/__init__.py`).
"""

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from ..effective import EffectiveLoss
from ..section import Count, Fraction, NonNegative, Positive, Section

ONE_MORE_PASS = "one more forward pass a step, without gradient"
SHORT_RUN = 20  # epochs over images, up to which PS-KD did not lower the NLL in recipes/results/when_pskd_pays


class Scale(NamedTuple):
    """How large a run is: what a method's cost depends on."""

    num_rows: int  # training targets
    num_classes: int
    num_epochs: int
    unmixed: float  # part of the batches that mixup and cutmix leave alone
    network_size: Callable[[], str]  # of the weights once more, for people
    counts: str = "images"  # what the training targets are of


class MethodSection(Section):
    """Base of the methods' sections. `implementation` is the method's class, `module:name`, imported when a run begins."""

    title: ClassVar[str]
    colour: ClassVar[str]  # of Okabe and Ito's palette, or distinct from it with any colour vision
    implementation: ClassVar[str]
    takes_mixed_inputs: ClassVar[bool] = True  # mixup and cutmix
    why_unmixed: ClassVar[str] = ""  # for people, where it does not
    needs_partners: ClassVar[str] = (
        ""  # a second input for each, which only images have: of its `class`, or another `view`
    )

    @property
    def trained_teacher(self) -> str | None:
        """The run whose network teaches, or `baseline` for that of the same recipe; None where no trained one does."""
        return None

    @property
    def variant(self) -> str:
        """Which of a method's published settings these are of, where it has several kinds."""
        return ""

    def conflict(self, epochs: int) -> str | None:
        """What does not go with a run of so many epochs, as an error says it."""
        return None

    def effective_loss(self, num_classes: int, num_epochs: int, epoch: int) -> EffectiveLoss:
        """What the loss amounts to in `epoch` (0-based)."""
        return EffectiveLoss(1.0)

    @property
    def store_settings(self) -> tuple[str, int | None] | None:
        """`dtype` and `topk` of the method's prediction store; None where it has none."""
        return None

    @property
    def learns_unmixed(self) -> bool:
        """Whether only batches that are not mixed renew what the method remembers."""
        return self.store_settings is not None

    def cost_lines(self, scale: Scale) -> list[str]:
        """What the method costs beside the store, and whether such a run is long enough for it, at most a line each."""
        return []


def class_table_bytes(num_classes: int) -> int:
    """Bytes of OLS's soft labels (float32), of the sums they are made from (int64), and of the hits of each class."""
    return num_classes * num_classes * (4 + 8) + 8 * num_classes


def focal_slope(p: float, gamma: float) -> float:
    """The focal loss's gradient on the logits in units of cross-entropy's, where the label's probability is p < 1."""
    return (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * math.log(p)


def maxsup_weight(epoch: int, num_epochs: int, weight: float, final_weight: float) -> float:
    """MaxSup's λ in epoch `epoch` (0-based) of E: `weight` in the first, `final_weight` in the last, evenly between."""
    return weight + (final_weight - weight) * epoch / max(1, num_epochs - 1)


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


class Baseline(MethodSection):
    title = "Baseline"
    colour = "#000000"
    implementation = "pskd_timm.methods.baseline:Baseline"


class LabelSmoothing(MethodSection):
    title = "Label smoothing"
    colour = "#E69F00"
    implementation = "pskd_timm.methods.label_smoothing:LabelSmoothing"

    epsilon: Fraction = 0.1
    """ε: the target is (1 − ε)·label + ε/K. Default: PS-KD's authors (their repository, issue 6)."""
    spread: Literal["all", "others"] = "all"
    """ε goes to `all` K classes, ε/K each, or, as in TF-KD's repository, to the `others`, ε/(K − 1) each."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        of_all = self.epsilon if self.spread == "all" else self.epsilon * num_classes / (num_classes - 1)
        return EffectiveLoss(1.0 - of_all, of_all, "uniform", smoothing=of_all)


class CSKD(MethodSection):
    title = "CS-KD"
    colour = "#56B4E9"
    implementation = "pskd_timm.methods.cskd:CSKD"
    takes_mixed_inputs = False
    why_unmixed = "it compares two images of one class, and a mixed image has two"
    needs_partners = "class"

    weight: NonNegative = 1.0
    """λ, the weight of the KL term. Default: CS-KD's authors for CIFAR-100 (3 for fine-grained data)."""
    temperature: Positive = 4.0
    """T of both softmaxes. Default: CS-KD's authors."""
    partner_mode: Literal["train", "eval"] = "train"
    """Mode of the partners' forward: `train` moves running statistics twice a step, as CS-KD's code does; `eval` uses them."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        return EffectiveLoss(1.0, self.weight * self.temperature**2, "a partner's prediction", self.temperature)

    def cost_lines(self, scale):
        return [f"partners: {ONE_MORE_PASS}, and as many images again"]


class TFKD(MethodSection):
    title = "TF-KD"
    colour = "#009E73"
    implementation = "pskd_timm.methods.tfkd:TFKD"

    teacher: str = "virtual"
    """`virtual` (TF-KD_reg), or trained before (TF-KD_self): a run's folder, a file of weights, or this recipe's `baseline`."""
    alpha: Fraction | None = None
    """α: cross-entropy weighs 1 − α. Default: TF-KD's released ResNet-18 settings, 0.1 with the virtual teacher, else 0.95."""
    temperature: Positive | None = None
    """T. Default: TF-KD's released ResNet-18 settings, 20 with the virtual teacher, else 6."""
    multiplier: Positive | None = None
    """m of the KL term. Default: K with the virtual teacher, else K/2 (released for K = 100: 100, 50); 1, 1/2 with batchmean."""
    reduction: Literal["mean", "batchmean"] = "mean"
    """KL summed over classes (`batchmean`), or that divided by K (`mean`), as TF-KD's code has it."""
    temper_student: bool | None = None
    """Divide the student's logits by T too. Default: TF-KD's code, only with a trained teacher."""
    true_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """The virtual teacher's probability of the true class. Default: TF-KD's released code."""

    @model_validator(mode="after")
    def _fill_in(self):
        virtual = self.teacher == "virtual"
        constants = {
            "alpha": 0.1 if virtual else 0.95,
            "temperature": 20.0 if virtual else 6.0,
            "temper_student": not virtual,
        }
        filled = {name: value for name, value in constants.items() if getattr(self, name) is None}
        # Not by assignment: they would count as given then, and stay with another teacher.
        self.__dict__.update(filled)
        self.model_fields_set.difference_update(filled)
        return self

    @property
    def trained_teacher(self):
        return None if self.teacher == "virtual" else self.teacher

    @property
    def variant(self):
        return "virtual" if self.teacher == "virtual" else "trained"

    def kl_weight(self, num_classes: int) -> float:
        """The factor of the KL term, summed over classes and averaged over B."""
        constants = self.alpha, self.temperature, self.multiplier, self.reduction
        return tfkd_weight(num_classes, self.teacher == "virtual", *constants)

    def effective_loss(self, num_classes, num_epochs, epoch):
        kl, cross_entropy = self.kl_weight(num_classes), 1.0 - self.alpha
        if self.trained_teacher:
            temperature = self.temperature if self.temper_student else 1.0
            return EffectiveLoss(cross_entropy, kl, "the teacher's prediction", temperature)
        # As label smoothing where the student is not tempered: the target has two values, `true` and `other`.
        gap = self.true_probability - (1 - self.true_probability) / (num_classes - 1)
        ratio = math.exp(gap / self.temperature)
        other = 1.0 / (ratio + num_classes - 1)
        remark = f"the teacher's target: {ratio * other:.4g} for the label, {other:.4g} for each other class"
        if self.temper_student:
            return EffectiveLoss(cross_entropy, kl, "virtual teacher", self.temperature, None, [remark])
        smoothing = num_classes * kl * other / (cross_entropy + kl)
        return EffectiveLoss(cross_entropy, kl, "virtual teacher", 1.0, smoothing, [remark])

    def cost_lines(self, scale):
        return [f"trained teacher per rank: {scale.network_size()}; {ONE_MORE_PASS}"] if self.trained_teacher else []


class PSKD(MethodSection):
    title = "PS-KD"
    colour = "#D55E00"
    implementation = "pskd_timm.methods.pskd:PSKD"

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    """α_T, the last epoch's weight of a sample's last prediction. Default: the paper's for CIFAR-100 (0.3 for ImageNet)."""
    alpha_schedule: Literal["linear", "constant", "cosine"] = "linear"
    """How α grows to α_T after the warm-up: `linear` (the paper), `constant` (there at once), `cosine` (half a cosine)."""
    alpha_warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the start with α = 0, plain cross-entropy; the schedule runs over the rest."""
    teacher: Literal["store", "snapshot"] = "store"
    """`store`: each sample's last prediction, kept in a table; `snapshot`: the network as the last epoch left it, run again."""
    store_dtype: Literal["float16", "float32"] = "float16"
    """Precision of the stored predictions; the paper's code keeps float32."""
    store_topk: Count | None = None
    """Keep so many of a prediction's probabilities, the largest, and spread the rest evenly over the other classes; else all."""
    store_device: Literal["auto", "cpu"] = "auto"
    """Where the predictions lie: on the run's device if half of its free memory holds them, or on the CPU."""

    def conflict(self, epochs):
        if self.alpha_warmup_epochs >= epochs:
            return f"pskd.alpha_warmup_epochs {self.alpha_warmup_epochs} must be below epochs {epochs}: set it to 0"
        return None

    def effective_loss(self, num_classes, num_epochs, epoch):
        alpha = alpha_at(epoch, num_epochs, self.alpha, self.alpha_schedule, self.alpha_warmup_epochs)
        warm = f" after {self.alpha_warmup_epochs} epochs of plain cross-entropy" if self.alpha_warmup_epochs else ""
        target = "its own last prediction" if self.teacher == "store" else "what the last epoch's weights say of it"
        remark = f"in epoch {epoch + 1} of {num_epochs}; α grows to {self.alpha:g} ({self.alpha_schedule}){warm}"
        return EffectiveLoss(1.0 - alpha, alpha, target, remarks=[remark])

    @property
    def store_settings(self):
        return (self.store_dtype, self.store_topk) if self.teacher == "store" else None

    def cost_lines(self, scale):
        lines = []
        if self.teacher == "snapshot":
            first = max(2, self.alpha_warmup_epochs + 1)
            lines.append(f"snapshot teacher per rank: {scale.network_size()}; {ONE_MORE_PASS} from epoch {first} on")
        elif scale.unmixed < 1.0:
            renewed = round(scale.unmixed * scale.num_rows)
            lines.append(f"rows renewed: about {renewed:,} of {scale.num_rows:,} an epoch, those of unmixed batches")
        if scale.counts == "images" and scale.num_epochs <= SHORT_RUN:
            lines.append(
                f"short run: PS-KD gains once the network is overconfident; on CIFAR-100 up to {SHORT_RUN} epochs did not make a "
                "small one so, and α 0.8 raised its NLL (recipes/results/when_pskd_pays); "
                "pskd-timm search RECIPE --over pskd.alpha=0.1,0.3,0.8 chooses α on held-out images"
            )
        return lines


class OLS(MethodSection):
    title = "Online LS"
    colour = "#0044FF"
    implementation = "pskd_timm.methods.ols:OLS"

    weight: Fraction = 0.5
    """Weight of the cross-entropy against soft labels; that against the labels weighs 1 less it. Default: OLS's code."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        if epoch == 0:
            return EffectiveLoss(1.0 - self.weight, remarks=["in the first epoch, which has no soft labels yet"])
        return EffectiveLoss(1.0 - self.weight, self.weight, "the class's mean correct prediction of an epoch ago")

    @property
    def learns_unmixed(self):
        return True

    def cost_lines(self, scale):
        from ..progress import readable  # imports rich, which reading a recipe has no use for

        return [f"soft labels of classes per rank: {readable(class_table_bytes(scale.num_classes))}"]


class MbLS(MethodSection):
    title = "Margin-based LS"
    colour = "#006644"
    implementation = "pskd_timm.methods.mbls:MbLS"

    margin: NonNegative = 10.0
    """m: logits may lie so far below the largest one before they cost anything. Default: MbLS's code."""
    weight: NonNegative = 0.1
    """Weight of the mean excess over the margin. Default: MbLS's code (its command for Tiny-ImageNet)."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        formula = f"cross-entropy + {self.weight:g} × mean over classes of max(0, z_max − z − {self.margin:g})"
        remark = f"plain cross-entropy while all logits lie within {self.margin:g} of the largest"
        beyond = f"each logit beyond pulls itself up by {self.weight / num_classes:.3g} and the largest down by as much"
        return EffectiveLoss(1.0, formula=formula, remarks=[f"{remark}; {beyond}"])


class Focal(MethodSection):
    title = "Focal loss"
    colour = "#BB0000"
    implementation = "pskd_timm.methods.focal:Focal"

    gamma: NonNegative = 3.0
    """γ of samples whose label has a probability of at least `low_probability`. Default: FLSD-53."""
    low_gamma: NonNegative = 5.0
    """γ of the others. Default: FLSD-53."""
    low_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """Below it a label's probability is low; 0 gives all samples the same γ, the plain focal loss. Default: FLSD-53."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        low = f", γ = {self.low_gamma:g} where p < {self.low_probability:g}" if self.low_probability else ""
        slopes = [
            f"{focal_slope(p, self.low_gamma if p < self.low_probability else self.gamma):.2f} at {p:g}"
            for p in (0.1, 0.5, 0.9)
        ]
        remark = f"a sample's gradient in units of cross-entropy's: 1 at p = 0, {', '.join(slopes)}"
        return EffectiveLoss(1.0, formula=f"mean of (1 − p)^{self.gamma:g} × −log p{low}", remarks=[remark])


class DualFocal(MethodSection):
    title = "Dual focal loss"
    colour = "#BB66BB"
    implementation = "pskd_timm.methods.focal:DualFocal"

    gamma: NonNegative = 5.0
    """γ. Default: others' code, which names the paper's Table 13; the authors' own has none."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        formula = f"mean of (1 − p + p_j)^{self.gamma:g} × −log p, p_j the largest probability below the label's p"
        return EffectiveLoss(1.0, formula=formula, remarks=["cross-entropy's gradient where p is 0"])


class DLB(MethodSection):
    title = "DLB"
    colour = "#7733BB"
    implementation = "pskd_timm.methods.dlb:DLB"
    takes_mixed_inputs = False
    why_unmixed = "it compares two views of an image, and they would not be mixed alike"
    needs_partners = "view"

    weight: NonNegative = 1.0
    """α, the weight of the KL term. Default: the paper's, as others quote it; its code has none."""
    temperature: Positive = 3.0
    """T of both softmaxes. Default: the paper's, as others quote it; its code has none."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        remark = "cross-entropy over this batch and the last one, KL over the last one"
        kl = self.weight * self.temperature**2
        return EffectiveLoss(1.0, kl, "its prediction of a step ago", self.temperature, remarks=[remark])

    def cost_lines(self, scale):
        return ["last batch: one more forward and backward pass a step, and as many images again"]


class Zipf(MethodSection):
    title = "Zipf's LS"
    colour = "#9977FF"
    implementation = "pskd_timm.methods.zipf:Zipf"

    weight: NonNegative = 0.1
    """λ, the weight of the KL term. Default: Zipf's LS's code for CIFAR-100 (1 for Tiny-ImageNet)."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        formula = (
            f"cross-entropy + {self.weight:g} × KL(1/rank ‖ prediction), both among the classes that are not the label"
        )
        return EffectiveLoss(1.0, formula=formula, remarks=["the KL term leaves the label's logit alone"])


class MaxSup(MethodSection):
    title = "MaxSup"
    colour = "#994488"
    implementation = "pskd_timm.methods.maxsup:MaxSup"

    weight: NonNegative = 0.1
    """λ in the first epoch. Default: MaxSup's code for ImageNet."""
    final_weight: NonNegative = 0.2
    """λ in the last epoch, after even growth. Default: MaxSup's code for ImageNet."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        weight = maxsup_weight(epoch, num_epochs, self.weight, self.final_weight)
        remarks = [
            f"in epoch {epoch + 1} of {num_epochs}; λ goes evenly from {self.weight:g} to {self.final_weight:g}",
            f"the same as label smoothing with ε = {weight:.3g} (ε/K) where the label's logit is the largest",
        ]
        return EffectiveLoss(1.0, formula=f"cross-entropy + {weight:.3g} × (z_max − mean z)", remarks=remarks)
