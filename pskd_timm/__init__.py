"""Image classifiers whose confidences can be trusted: PS-KD and what it is compared with, on timm and Accelerate."""

from importlib import import_module

__version__ = "0.2.0"

# Public names are imported when first used (PEP 562): torch and timm take seconds, and `pskd-timm --help` needs neither.
_HOMES = {
    "Batch": "batch",
    "InputError": "errors",
    "Recipe": "recipe",
    "load_recipe": "recipe_files",
    "score": "metrics",
    "convert_checkpoint": "models.convert",
    "PredictionStore": "store",
    "METHODS": "methods.build",
    "Method": "methods.base",
    "PSKD": "methods.pskd",
    "LabelSmoothing": "methods.label_smoothing",
    "CSKD": "methods.cskd",
    "TFKD": "methods.tfkd",
    "train": "training",
    "Result": "run.result",
    "evaluate": "evaluation",
    "compare": "comparison",
    "report": "reports.build",
    "Comparison": "reports.build",
    "search": "study",
    "predict": "prediction",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'pskd_timm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return __all__
