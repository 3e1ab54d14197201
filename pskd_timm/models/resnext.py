"""Residual networks of grouped convolutions for small images (Xie et al., CVPR 2017, arXiv 1611.05431)."""

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_conv2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from .base import CifarNet, build, cifar_cfg, conv_bn, make_stages, make_stem


class ResNeXtBlock(nn.Module):
    """Conv-BN three times, the middle one 3×3 in `groups` groups of `width`, the last ReLU after the sum."""

    expansion = 4

    def __init__(self, in_chs: int, width: int, stride: int, groups: int):
        super().__init__()
        inner = groups * width
        self.conv1 = create_conv2d(in_chs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = create_conv2d(inner, inner, 3, stride=stride, groups=groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = create_conv2d(inner, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Identity() if in_chs == 4 * width else conv_bn(in_chs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNeXt(CifarNet):
    """Stem of `width` channels, then stages with groups of `width` × 1, 2, 4, … channels."""

    def __init__(self, depths: tuple[int, ...], groups: int, width: int = 64, in_chans: int = 3, **head):
        widths = [width * 2**i for i in range(len(depths))]
        stages = make_stages(ResNeXtBlock, width, widths, depths, groups=groups)
        super().__init__(make_stem(in_chans, width), stages, **head)
        self.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """Kaiming's normal, convolutions by fan-out (over all groups together), the classifier by fan-in with bias 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnext29_8x64d": cifar_cfg(pool_size=8),
        "cifar_resnext_tiny": cifar_cfg(pool_size=8),
    }
)


@register_model
def cifar_resnext29_8x64d(pretrained: bool = False, **kwargs) -> ResNeXt:
    """ResNeXt-29 8×64d of the PS-KD paper, 34.5 M parameters."""
    kwargs = dict(groups=8) | kwargs
    return build(ResNeXt, "cifar_resnext29_8x64d", pretrained, (3, 3, 3), **kwargs)


@register_model
def cifar_resnext_tiny(pretrained: bool = False, **kwargs) -> ResNeXt:
    """Three blocks of two groups of 8, 16 and 32 channels, for tests."""
    kwargs = dict(groups=2, width=8) | kwargs
    return build(ResNeXt, "cifar_resnext_tiny", pretrained, (1, 1, 1), **kwargs)
