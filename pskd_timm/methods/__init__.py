"""The methods, a line each. What is imported here needs no torch: `build.py` gives the methods themselves."""

from .sections import (
    CSKD,
    DLB,
    OLS,
    PSKD,
    TFKD,
    Baseline,
    DualFocal,
    Focal,
    LabelSmoothing,
    MaxSup,
    MbLS,
    MethodSection,
    Zipf,
)

METHOD_SECTIONS: dict[str, type[MethodSection]] = {
    "baseline": Baseline,
    "label_smoothing": LabelSmoothing,
    "cskd": CSKD,
    "tfkd": TFKD,
    "pskd": PSKD,
    "ols": OLS,
    "mbls": MbLS,
    "focal": Focal,
    "dual_focal": DualFocal,
    "dlb": DLB,
    "zipf": Zipf,
    "maxsup": MaxSup,
}
# Those of PS-KD's paper, which `compare` trains where no method is named.
PAPER = ("baseline", "label_smoothing", "cskd", "tfkd", "pskd")
