"""The five methods. A new one is a file here, a section in recipe.py and a line in METHODS."""

from .base import Method
from .baseline import Baseline
from .cskd import CSKD
from .label_smoothing import LabelSmoothing
from .pskd import PSKD
from .tfkd import TFKD

METHODS: dict[str, type[Method]] = {
    "baseline": Baseline,
    "label_smoothing": LabelSmoothing,
    "cskd": CSKD,
    "tfkd": TFKD,
    "pskd": PSKD,
}

__all__ = ["METHODS", "Baseline", "CSKD", "LabelSmoothing", "Method", "PSKD", "TFKD"]
