"""Networks for small images; importing this module adds them to timm's registry."""

from . import preact_resnet  # noqa: F401
