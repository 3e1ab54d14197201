"""Published settings of the methods, and where each default comes from. Data only: nothing here claims what nobody published."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """One published setting of a method: whose (`name`), for which data set and network, the values and their source."""

    name: str
    method: str
    of: str  # data set, or data set/network; without a network it holds for any
    values: dict[str, Any]
    source: str
    teacher: str = ""  # TF-KD: `virtual` or `trained`


def _tfkd(network: str, teacher: str, **values) -> Preset:
    if teacher == "virtual":
        values["true_probability"] = 0.99
    return Preset("official", "tfkd", f"cifar100/{network}", values, "authors' code", teacher)


_TABLE = {"teacher": "store", "alpha_schedule": "linear", "alpha_warmup_epochs": 0}
_QUOTED = "third party: the supplement as quoted in the authors' issue 4, and others' code"
_SMOOTHED = {"epsilon": 0.1, "spread": "all"}
_FLSD_53 = {"gamma": 3.0, "low_gamma": 5.0, "low_probability": 0.2}
_LAST_BATCH = "third party: the paper's as others quote them; the authors' code has no default"
_BY_VOTES = "authors' code, there with ranks by votes"
_PARTNERS = {"temperature": 4.0, "partner_mode": "train"}

PRESETS = [
    # TF-KD's released configurations for DenseNet-121 and ResNeXt-29 with the virtual teacher have no multiplier.
    _tfkd("resnet18", "virtual", alpha=0.1, temperature=20.0, multiplier=100.0),
    _tfkd("densenet121", "virtual", alpha=0.1, temperature=40.0),
    _tfkd("resnext29", "virtual", alpha=0.5, temperature=40.0),
    _tfkd("resnet18", "trained", alpha=0.95, temperature=6.0, multiplier=50.0),
    _tfkd("densenet121", "trained", alpha=0.9, temperature=20.0, multiplier=50.0),
    _tfkd("resnext29", "trained", alpha=0.9, temperature=20.0, multiplier=100.0),
    _tfkd("mobilenetv2", "trained", alpha=0.95, temperature=20.0, multiplier=1.0),
    _tfkd("shufflenetv2", "trained", alpha=0.95, temperature=20.0, multiplier=1.0),
    Preset("official", "cskd", "cifar100", {"weight": 1.0, **_PARTNERS}, "authors' code"),
    Preset("official", "cskd", "fine_grained", {"weight": 3.0, **_PARTNERS}, "authors' code"),
    Preset("official", "label_smoothing", "imagenet", _SMOOTHED, "paper"),
    Preset("pskd", "label_smoothing", "cifar100", _SMOOTHED, "maintainers' answer (PS-KD's issue 6)"),
    Preset("pskd", "label_smoothing", "imagenet", _SMOOTHED, "maintainers' answer (PS-KD's issue 6)"),
    *[Preset(name, "pskd", "cifar100", {"alpha": 0.8, **_TABLE}, "paper") for name in ("official", "pskd")],
    *[Preset(name, "pskd", "imagenet", {"alpha": 0.3, **_TABLE}, _QUOTED) for name in ("official", "pskd")],
]
PRESETS += [
    *[Preset("official", "ols", of, {"weight": 0.5}, "authors' code") for of in ("cifar100", "imagenet")],
    Preset("official", "mbls", "tiny_imagenet", {"margin": 10.0, "weight": 0.1}, "authors' code"),
    *[Preset("official", "focal", of, _FLSD_53, "authors' code") for of in ("cifar10", "cifar100", "tiny_imagenet")],
    Preset("official", "dlb", "cifar100", {"weight": 1.0, "temperature": 3.0}, _LAST_BATCH),
    *[Preset("official", "zipf", of, {"weight": 0.1}, _BY_VOTES) for of in ("cifar100", "imagenet")],
    Preset("official", "zipf", "tiny_imagenet", {"weight": 1.0}, _BY_VOTES),
    Preset("official", "maxsup", "imagenet", {"weight": 0.1, "final_weight": 0.2}, "authors' code"),
]
PLACES = sorted({preset.of for preset in PRESETS})

# The networks, by model.name and model.small_input, that are those of the released settings.
NETWORKS = {
    ("resnet18", True): "resnet18",
    ("cifar_densenet121", False): "densenet121",
    ("cifar_resnext29_8x64d", False): "resnext29",
}

# Where each default of a method's section comes from.
DEFAULTS = {
    "label_smoothing.epsilon": "maintainers' answer (PS-KD's issue 6)",
    "label_smoothing.spread": "maintainers' answer (PS-KD's issue 6)",
    "cskd.weight": "authors' code, for CIFAR-100",
    "cskd.temperature": "authors' code",
    "cskd.partner_mode": "authors' code",
    "tfkd.teacher": "ours: of the authors' two, the one that needs no earlier run",
    "tfkd.alpha": "authors' code, for ResNet-18 on CIFAR-100",
    "tfkd.temperature": "authors' code, for ResNet-18 on CIFAR-100",
    "tfkd.multiplier": "ours: the authors' 100 and 50 for K = 100, in units of K",
    "tfkd.reduction": "authors' code",
    "tfkd.temper_student": "authors' code",
    "tfkd.true_probability": "authors' code",
    "ols.weight": "authors' code",
    "mbls.margin": "authors' code",
    "mbls.weight": "authors' code",
    "focal.gamma": "authors' code, FLSD-53",
    "focal.low_gamma": "authors' code, FLSD-53",
    "focal.low_probability": "authors' code, FLSD-53",
    "dual_focal.gamma": "third party: others' code, which names the paper's Table 13",
    "dlb.weight": "third party: the paper's as others quote it",
    "dlb.temperature": "third party: the paper's as others quote it",
    "zipf.weight": "authors' code, for CIFAR-100",
    "maxsup.weight": "authors' code, for ImageNet",
    "maxsup.final_weight": "authors' code, for ImageNet",
    "pskd.alpha": "paper, for CIFAR-100",
    "pskd.alpha_schedule": "paper",
    "pskd.alpha_warmup_epochs": "paper",
    "pskd.teacher": "authors' code",
    "pskd.store_dtype": "ours: the authors' code has float32",
    "pskd.store_topk": "authors' code",
    "pskd.store_device": "ours",
}


def place(source: str | None, network: tuple[str, bool]) -> str:
    """A recipe's data set and network (model.name, model.small_input) as `PRESETS` names them."""
    return f"{source or 'data of your own'}/{NETWORKS.get(network, network[0])}"


def fitting(name: str, method: str, teacher: str, places: list[str]) -> Preset | None:
    """The published setting of `method` for the first of `places` that has one; `teacher` is '' but for TF-KD."""
    offered = offers(name, method, teacher)
    fits = (p for where in places for p in offered if where == p.of or where.startswith(f"{p.of}/"))
    return next(fits, None)


def offers(name: str, method: str, teacher: str) -> list[Preset]:
    """All published settings of a method under a preset's name."""
    return [p for p in PRESETS if p.name == name and p.method == method and p.teacher in ("", teacher)]


def refusal(name: str, method: str, teacher: str, places: list[str]) -> str:
    """Why no published setting fits, and what there is instead."""
    if found := [p.of for p in offers(name, method, teacher)]:
        what = f"{method} with a {teacher} teacher" if teacher else method
        return (
            f"preset {name}: nothing is published for {what} on {', '.join(places)}; there is {', '.join(found)}: "
            f"--preset_of {found[0]} takes that over"
        )
    known = ", ".join(dict.fromkeys(p.method for p in PRESETS if p.name == name))
    return f"preset {name}: what it used for {method} is not public; there is one for baseline, {known}"
