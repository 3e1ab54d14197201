"""The six metrics as one of torchmetrics' metrics, for loops that log with these."""

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..losses import at_least_float32
from ..metrics import ROW_SUM_TOLERANCE, Outcomes, as_array, summarize
from ..outcomes import batch_outcomes

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat
except ImportError:
    raise ImportError("pskd_timm.adaptors.metric needs torchmetrics: pip install torchmetrics") from None


class CalibrationMetrics(Metric):
    """`score` over all batches since the last reset, and over all processes: a dictionary of the six metrics' values.

    `update(preds, target)` takes probabilities [B, K], or with `from_logits` what a softmax makes them of, and integer labels
    [B]; nothing of it waits for the device. An empty batch counts for nothing. Raises InputError where shapes or types do not
    fit and, in `compute`, where labels lie outside of 0 … K − 1, probabilities are none, or there is nothing to compute.

    Example:
        >>> metric = CalibrationMetrics(from_logits=True)
        >>> metric.update(model(images), labels)
        >>> metric.compute()["ece"]
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, *, from_logits: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.from_logits = from_logits
        self.num_classes: int | None = None  # of the first batch since the last reset
        for name in Outcomes._fields:  # a few numbers a sample
            self.add_state(name, default=[], dist_reduce_fx="cat")
        # Of a rank that saw nothing, torchmetrics gathers an empty tensor of the metric's own type: all states are of it.
        self.set_dtype(torch.float64)

    def reset(self):
        super().reset()
        self.num_classes = None

    def update(self, preds: Tensor, target: Tensor):
        self._check(preds, target)
        if len(preds) == 0:
            return
        preds = at_least_float32(preds) if self.from_logits or preds.dtype == torch.bfloat16 else preds
        known = (target >= 0) & (target < preds.shape[1])
        labels = torch.where(known, target, 0)
        if self.from_logits:
            each = batch_outcomes(preds, preds.softmax(dim=1), labels)
        else:
            true = preds.gather(1, labels[:, None])[:, 0].double().clamp_min(torch.finfo(torch.float32).tiny)
            each = batch_outcomes(preds, preds, labels)._replace(nll=-true.log())
            sums = preds.sum(dim=1, dtype=torch.float64)
            sound = (preds.amin(dim=1) >= 0) & ((sums - 1).abs() <= ROW_SUM_TOLERANCE)
            each = each._replace(confidence=torch.where(sound, each.confidence, torch.nan))
        # What is wrong with values is kept in them, and said by `compute`: here it would wait for the device.
        each = each._replace(nll=torch.where(known, each.nll, -torch.inf))
        for name, values in each._asdict().items():
            getattr(self, name).append(values.double())

    def _check(self, preds: Tensor, target: Tensor):
        if not isinstance(preds, Tensor) or not isinstance(target, Tensor):
            raise InputError(
                f"preds and target must be tensors, got {type(preds).__name__} and {type(target).__name__}"
            )
        if preds.ndim != 2 or preds.shape[1] == 0 or target.shape != preds.shape[:1] or not preds.is_floating_point():
            raise InputError(
                f"preds must be floats of shape [B, K] and target [B], got {preds.dtype} {list(preds.shape)} and "
                f"{list(target.shape)}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise InputError(f"target must be integers, got {target.dtype}")
        self.num_classes = self.num_classes or preds.shape[1]
        if preds.shape[1] != self.num_classes:
            raise InputError(f"preds have {preds.shape[1]} classes, those before them {self.num_classes}")

    def compute(self) -> dict[str, float]:
        if len(self.nll) == 0:
            raise InputError("nothing to compute: there was no sample since the last reset")
        each = Outcomes(*(as_array(dim_zero_cat(getattr(self, name))) for name in Outcomes._fields))
        if (each.nll == -np.inf).any():
            raise InputError("some labels in target lie outside of 0 … K − 1")
        if not 0 <= each.confidence.min() <= each.confidence.max() <= 1 + 1e-3:  # NaN if any is
            raise InputError(
                "preds hold logits that are not finite"
                if self.from_logits
                else "preds are no probabilities (CalibrationMetrics(from_logits=True) puts logits through a softmax)"
            )
        each = each._replace(correct=each.correct == 1, top5_correct=each.top5_correct == 1)
        return summarize(each._replace(confidence=_narrowest(each.confidence)))


def _narrowest(values: np.ndarray) -> np.ndarray:
    """The same values in the type that they came in, on which it depends what lies on a bin's edge."""
    types = (np.float16, np.float32, np.float64)
    return next(values.astype(kind) for kind in types if (values.astype(kind) == values).all())
