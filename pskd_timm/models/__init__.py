"""Networks for small images; importing this module adds them to timm's registry."""

from . import densenet, preact_resnet, pyramidnet, resnet, resnext  # noqa: F401
