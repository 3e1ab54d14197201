"""Pre-activation residual networks for small images (He et al., ECCV 2016, arXiv 1603.05027)."""

from collections import OrderedDict

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_conv2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from .base import CifarNet, build, cifar_cfg, make_stages, make_stem


class PreActBasic(nn.Module):
    """BN-ReLU-conv 3×3 twice; every shortcut, the identity too, starts from the first ReLU."""

    expansion = 1

    def __init__(self, in_chs: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = create_conv2d(in_chs, width, 3, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = create_conv2d(width, width, 3)
        self.shortcut = make_shortcut(in_chs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(x), inplace=True)
        y = self.conv1(x)
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        return y + self.shortcut(x)


class PreActBottleneck(nn.Module):
    """BN-ReLU-conv three times (1×1, strided 3×3, 1×1 to four times the width), shortcuts as in PreActBasic."""

    expansion = 4

    def __init__(self, in_chs: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = create_conv2d(in_chs, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = create_conv2d(width, width, 3, stride=stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = create_conv2d(width, 4 * width, 1)
        self.shortcut = make_shortcut(in_chs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(x), inplace=True)
        y = self.conv1(x)
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        y = self.conv3(F.relu(self.bn3(y), inplace=True))
        return y + self.shortcut(x)


def make_shortcut(in_chs: int, out_chs: int, stride: int) -> nn.Module:
    """Nothing where the shapes agree, else a 1×1 convolution without batch norm."""
    if stride == 1 and in_chs == out_chs:
        return nn.Identity()
    return nn.Sequential(OrderedDict(conv=create_conv2d(in_chs, out_chs, 1, stride=stride)))


class PreActResNet(CifarNet):
    """Stem of `width` channels, stages of `width` × 1, 2, 4, …, and, as in the PS-KD code, no norm before the pool."""

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...], width: int = 64, in_chans: int = 3, **head):
        widths = [width * 2**i for i in range(len(depths))]
        super().__init__(make_stem(in_chans, width), make_stages(block, width, widths, depths), **head)


default_cfgs = generate_default_cfgs(
    {
        "cifar_preact_resnet18": cifar_cfg(pool_size=4),
        "cifar_preact_resnet34": cifar_cfg(pool_size=4),
        "cifar_preact_resnet50": cifar_cfg(pool_size=4),
        "cifar_preact_resnet101": cifar_cfg(pool_size=4),
        "cifar_preact_resnet152": cifar_cfg(pool_size=4),
        "cifar_preact_resnet_tiny": cifar_cfg(pool_size=8),
    }
)


@register_model
def cifar_preact_resnet18(pretrained: bool = False, **kwargs) -> PreActResNet:
    """PreAct ResNet-18 of the PS-KD paper, 11.2 M parameters."""
    return build(PreActResNet, "cifar_preact_resnet18", pretrained, (2, 2, 2, 2), block=PreActBasic, **kwargs)


@register_model
def cifar_preact_resnet34(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Pre-activation ResNet-34."""
    return build(PreActResNet, "cifar_preact_resnet34", pretrained, (3, 4, 6, 3), block=PreActBasic, **kwargs)


@register_model
def cifar_preact_resnet50(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Pre-activation ResNet-50."""
    return build(PreActResNet, "cifar_preact_resnet50", pretrained, (3, 4, 6, 3), block=PreActBottleneck, **kwargs)


@register_model
def cifar_preact_resnet101(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Pre-activation ResNet-101; the network that the paper calls so is `cifar_preact_resnet101_paper`."""
    return build(PreActResNet, "cifar_preact_resnet101", pretrained, (3, 4, 23, 3), block=PreActBottleneck, **kwargs)


@register_model
def cifar_preact_resnet152(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Pre-activation ResNet-152."""
    return build(PreActResNet, "cifar_preact_resnet152", pretrained, (3, 8, 36, 3), block=PreActBottleneck, **kwargs)


@register_model
def cifar_preact_resnet_tiny(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Three basic blocks of 16, 32 and 64 channels, for tests and for images from 8×8 on."""
    kwargs = dict(width=16) | kwargs
    return build(PreActResNet, "cifar_preact_resnet_tiny", pretrained, (1, 1, 1), block=PreActBasic, **kwargs)
