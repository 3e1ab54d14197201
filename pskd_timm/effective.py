"""What a loss amounts to: the weights of its terms, the label smoothing that equals it, warnings. No torch here."""

from dataclasses import dataclass, field

UNEQUAL = 1.5  # a mixture's gradient scale outside 1/UNEQUAL … UNEQUAL is reported as a change of the learning rate
INERT = 0.02  # a regulariser with less than this part of the gradient is reported as inert


@dataclass(frozen=True)
class EffectiveLoss:
    """What a loss amounts to: `cross_entropy`·CE(labels) + `kl`·KL, KL summed over classes and averaged over B.

    `temperature` divides the student's logits in the KL term. `smoothing` is the ε of the label smoothing (ε/K over all
    classes) whose gradient, times `gradient_scale`, is this loss's; None where there is none. A loss that is no such sum says
    in `formula` what it is; `cross_entropy` is then its gradient, in units of cross-entropy's, where a prediction is wholly
    wrong, and `remarks` say the rest.
    """

    cross_entropy: float
    kl: float = 0.0
    target: str = ""
    temperature: float = 1.0
    smoothing: float | None = None
    remarks: list[str] = field(default_factory=list)
    formula: str = ""

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
        if self.formula:
            return [f"effective loss: {self.formula}", *(f"  {line}" for line in self.remarks + self.warnings(lr))]
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
