"""Networks for small images, and timm's with a small stem; importing this module adds them to timm's registry."""

from . import densenet, preact_resnet, pyramidnet, resnet, resnext, small_input  # noqa: F401
