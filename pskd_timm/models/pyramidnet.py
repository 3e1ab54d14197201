"""Pyramidal residual networks for small images (Han et al., CVPR 2017, arXiv 1610.02915)."""

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_conv2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from .base import CifarNet, Stage, build, cifar_cfg, make_stem
from .shakedrop import ShakeDrop


class PyramidBottleneck(nn.Module):
    """BN-conv 1×1, BN-ReLU-conv 3×3, BN-ReLU-conv 1×1 to four times the width, BN, ShakeDrop, plus the shortcut."""

    def __init__(self, in_chs: int, width: int, stride: int, shakedrop: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = create_conv2d(in_chs, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = create_conv2d(width, width, 3, stride=stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = create_conv2d(width, 4 * width, 1)
        self.bn4 = nn.BatchNorm2d(4 * width)
        self.shake_drop = ShakeDrop(shakedrop) if shakedrop else nn.Identity()
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        y = self.conv3(F.relu(self.bn3(y), inplace=True))
        y = self.shake_drop(self.bn4(y))
        missing = y.shape[1] - x.shape[1]
        return y + F.pad(self.pool(x), [0, 0, 0, 0, 0, missing])


class PyramidNet(CifarNet):
    """Widths grow from 16 by `alpha` in n equal steps, one a block; block i (from 1) has p = `shakedrop` × i/n."""

    def __init__(self, depths: tuple[int, ...], alpha: float, shakedrop: float = 0.0, in_chans: int = 3, **head):
        chs, done, total = 16, 0, sum(depths)
        stem, stages = make_stem(in_chans, chs, act=False), []
        for depth in depths:
            blocks = []
            for i in range(depth):
                done += 1
                width = round(16 + alpha * done / total)
                stride = 2 if stages and i == 0 else 1
                blocks.append(PyramidBottleneck(chs, width, stride, shakedrop * done / total))
                chs = 4 * width
            stages.append(Stage(blocks, chs))
        super().__init__(stem, stages, final_norm=True, **head)
        self.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")


default_cfgs = generate_default_cfgs(
    {
        "cifar_pyramidnet200_a240": cifar_cfg(pool_size=8),
        "cifar_pyramidnet200_a240_shakedrop": cifar_cfg(pool_size=8),
        "cifar_pyramidnet_tiny": cifar_cfg(pool_size=8),
        "cifar_pyramidnet_tiny_shakedrop": cifar_cfg(pool_size=8),
    }
)


@register_model
def cifar_pyramidnet200_a240(pretrained: bool = False, **kwargs) -> PyramidNet:
    """PyramidNet-200 of the PS-KD paper, α = 240, 26.8 M parameters."""
    return build(PyramidNet, "cifar_pyramidnet200_a240", pretrained, (22, 22, 22), **(dict(alpha=240) | kwargs))


@register_model
def cifar_pyramidnet200_a240_shakedrop(pretrained: bool = False, **kwargs) -> PyramidNet:
    """PyramidNet-200, α = 240, with ShakeDrop up to 0.5 in the last block."""
    kwargs = dict(alpha=240, shakedrop=0.5) | kwargs
    return build(PyramidNet, "cifar_pyramidnet200_a240_shakedrop", pretrained, (22, 22, 22), **kwargs)


@register_model
def cifar_pyramidnet_tiny(pretrained: bool = False, **kwargs) -> PyramidNet:
    """Six blocks, α = 10, for tests."""
    return build(PyramidNet, "cifar_pyramidnet_tiny", pretrained, (2, 2, 2), **(dict(alpha=10) | kwargs))


@register_model
def cifar_pyramidnet_tiny_shakedrop(pretrained: bool = False, **kwargs) -> PyramidNet:
    """Six blocks, α = 10, with ShakeDrop up to 0.5 in the last block, for tests."""
    kwargs = dict(alpha=10, shakedrop=0.5) | kwargs
    return build(PyramidNet, "cifar_pyramidnet_tiny_shakedrop", pretrained, (2, 2, 2), **kwargs)
