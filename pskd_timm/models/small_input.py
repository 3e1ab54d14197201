"""timm's ImageNet networks on small images."""

import timm
import torch.nn as nn
from timm.models import load_pretrained, register_model
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet

SMALL_INPUT = "pskd_small_input"  # the name of such networks in timm's registry
# Where a family has its strided stem convolutions, and its stem pool; ResNet includes resnext and wide_resnet.
STEMS = {
    ResNet: ("conv1", "maxpool"),
    DenseNet: ("features.conv0", "features.pool0"),
    ConvNeXt: ("stem", None),
    EfficientNet: ("conv_stem", None),
}


def small_input(model: nn.Module) -> nn.Module:
    """Change `model` in place so that its first stage works at the full size of its input, with 3×3 stem kernels."""
    if type(model) not in STEMS:
        known = "resnet, resnext, wide_resnet, densenet, convnext and efficientnet"
        raise ValueError(f"small_input does not know the stem of {type(model).__name__}, only those of timm's {known}")
    stem, pool = STEMS[type(model)]
    for name, module in list(model.named_modules()):
        if f"{name}.".startswith(f"{stem}.") and isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            model.set_submodule(name, unstrided(module))
    if pool:
        model.set_submodule(pool, nn.Identity())
    return model


def unstrided(conv: nn.Conv2d) -> nn.Conv2d:
    """A new 3×3 convolution between the channels of `conv`, with stride 1."""
    weight, bias = conv.weight, conv.bias is not None
    new = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, padding=1, bias=bias, device=weight.device, dtype=weight.dtype
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out")
    if bias:
        nn.init.zeros_(new.bias)
    return new


@register_model
def pskd_small_input(pretrained: bool = False, base: str = "", **kwargs) -> nn.Module:
    """timm's model `base` with the stem of `small_input`: what config.json names, so that timm alone refuses such a folder."""
    if not timm.is_model(base):
        raise ValueError(f"timm has no model {base!r}")  # a folder or a repository is none
    config = kwargs.pop("pretrained_cfg", None) or {}
    config = config if isinstance(config, dict) else config.to_dict()
    if "num_classes" in config:
        kwargs.setdefault("num_classes", config["num_classes"])
    model = small_input(timm.create_model(base, pretrained=False, **kwargs))
    if config:  # what it lacks is not filled in: the architecture's own description is of other weights
        said = {key: value for key, value in config.items() if value is not None}
        model.pretrained_cfg = {"architecture": model.pretrained_cfg["architecture"], **said}
    model.has_small_input = True
    if pretrained:
        load_pretrained(model, model.pretrained_cfg, model.num_classes)
    return model
