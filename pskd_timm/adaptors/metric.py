"""The six metrics as one of torchmetrics' metrics, for loops that log with these."""

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..losses import at_least_float32
from ..metrics import Outcomes, as_array, summarize
from ..outcomes import batch_outcomes

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat
except ImportError:
    raise ImportError("pskd_timm.adaptors.metric needs torchmetrics: pip install torchmetrics") from None


class CalibrationMetrics(Metric):
    """`score` over all batches since the last reset, and over all processes: a dictionary of the six metrics' values.

    `update(preds, target)` takes probabilities [B, K], or with `from_logits` what a softmax makes them of, and labels [B];
    nothing of it waits for the device. Raises InputError where shapes do not fit and, in `compute`, where probabilities are
    none.

    Example:
        >>> metric = CalibrationMetrics(from_logits=True)
        >>> metric.update(model(images), labels)
        >>> metric.compute()["ece"]
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, from_logits: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.from_logits = from_logits
        for name in Outcomes._fields:  # a few numbers a sample
            self.add_state(name, default=[], dist_reduce_fx="cat")
        # Of a rank that saw nothing, torchmetrics gathers an empty tensor of the metric's own type: all states are of it.
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor):
        if preds.ndim != 2 or target.shape != preds.shape[:1] or not preds.is_floating_point():
            raise InputError(
                f"preds must be floats of shape [B, K] and target [B], got {preds.dtype} {list(preds.shape)} and "
                f"{list(target.shape)}"
            )
        preds = at_least_float32(preds) if self.from_logits or preds.dtype == torch.bfloat16 else preds
        if self.from_logits:
            each = batch_outcomes(preds, preds.softmax(dim=1), target)
        else:
            true = preds.gather(1, target[:, None])[:, 0].double().clamp_min(torch.finfo(torch.float32).tiny)
            each = batch_outcomes(preds, preds, target)._replace(nll=-true.log())
        for name, values in each._asdict().items():
            getattr(self, name).append(values.double())

    def compute(self) -> dict[str, float]:
        each = Outcomes(*(as_array(dim_zero_cat(getattr(self, name))) for name in Outcomes._fields))
        each = each._replace(correct=each.correct == 1, top5_correct=each.top5_correct == 1)
        if not 0 <= each.confidence.min() <= each.confidence.max() <= 1 + 1e-3:  # NaN if any is
            raise InputError(
                "preds are no probabilities (CalibrationMetrics(from_logits=True) puts logits through a softmax)"
            )
        return summarize(each._replace(confidence=_narrowest(each.confidence)))


def _narrowest(values: np.ndarray) -> np.ndarray:
    """The same values in the type that they came in, on which it depends what lies on a bin's edge."""
    types = (np.float16, np.float32, np.float64)
    return next(values.astype(kind) for kind in types if (values.astype(kind) == values).all())
