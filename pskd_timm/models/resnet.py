"""Post-activation residual networks for small images (He et al., CVPR 2016, arXiv 1512.03385)."""

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_conv2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from .base import CifarNet, build, cifar_cfg, conv_bn, make_stages, make_stem


class Bottleneck(nn.Module):
    """Conv-BN three times (1×1, strided 3×3, 1×1 to four times the width), the last ReLU after the sum."""

    expansion = 4

    def __init__(self, in_chs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = create_conv2d(in_chs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = create_conv2d(width, width, 3, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = create_conv2d(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        same = stride == 1 and in_chs == 4 * width
        self.shortcut = nn.Identity() if same else conv_bn(in_chs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet(CifarNet):
    """Stem of `width` channels and stages of bottlenecks of `width` × 1, 2, 4, …"""

    def __init__(self, depths: tuple[int, ...], width: int = 64, in_chans: int = 3, **head):
        widths = [width * 2**i for i in range(len(depths))]
        super().__init__(make_stem(in_chans, width), make_stages(Bottleneck, width, widths, depths), **head)


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet101": cifar_cfg(pool_size=4),
        "cifar_preact_resnet101_paper": cifar_cfg(pool_size=4),
        "cifar_resnet_tiny": cifar_cfg(pool_size=8),
    }
)


@register_model
def cifar_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """Post-activation ResNet-101, 42.7 M parameters."""
    return build(ResNet, "cifar_resnet101", pretrained, (3, 4, 23, 3), **kwargs)


@register_model
def cifar_preact_resnet101_paper(pretrained: bool = False, **kwargs) -> ResNet:
    """The paper's row "PreAct ResNet-101": its code builds the post-activation `cifar_resnet101`, and so does this."""
    return cifar_resnet101(pretrained, **kwargs)


@register_model
def cifar_resnet_tiny(pretrained: bool = False, **kwargs) -> ResNet:
    """Three bottlenecks of 8, 16 and 32 channels, for tests."""
    return build(ResNet, "cifar_resnet_tiny", pretrained, (1, 1, 1), **(dict(width=8) | kwargs))
