"""Image classifiers whose confidences can be trusted: PS-KD and what it is compared with, on timm and Accelerate."""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

# Public names are imported when first used (PEP 562): torch and timm take seconds, and `pskd-timm --help` needs neither.
_HOMES = {
    "Batch": "batch",
    "InputError": "recipe",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "score": "metrics",
    "convert_checkpoint": "models.convert",
    "PredictionStore": "store",
    "METHODS": "methods",
    "PSKD": "methods",
    "train": "train",
    "Result": "train",
    "evaluate": "evaluate",
    "compare": "compare",
    "report": "report",
    "Comparison": "report",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'pskd_timm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return __all__


class _Package(ModuleType):
    def __setattr__(self, name, value):
        # Importing pskd_timm/train.py binds the module `train` over the public function of that name; keep the function.
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in _HOMES else value)


sys.modules[__name__].__class__ = _Package
