"""The methods, a line each. What is imported here needs no torch: `build.py` gives the methods themselves."""

from .sections import CSKD, PSKD, TFKD, Baseline, LabelSmoothing, MethodSection

METHOD_SECTIONS: dict[str, type[MethodSection]] = {
    "baseline": Baseline,
    "label_smoothing": LabelSmoothing,
    "cskd": CSKD,
    "tfkd": TFKD,
    "pskd": PSKD,
}
