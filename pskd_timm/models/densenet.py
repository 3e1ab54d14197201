"""Densely connected networks (Huang et al., CVPR 2017, arXiv 1608.06993) for small images, and DenseNet-264."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet as ImageNetDenseNet
from torch import Tensor

from .base import CifarNet, Stage, build, cifar_cfg, make_stem
from .recompute import recompute


class DenseLayer(nn.Module):
    """BN-ReLU-conv 1×1 to 4 × `growth`, BN-ReLU-conv 3×3 to `growth` new channels, from all features so far."""

    def __init__(self, in_chs: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = create_conv2d(in_chs, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = create_conv2d(4 * growth, growth, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.bn1(torch.cat(features, 1)), inplace=True))
        return self.conv2(F.relu(self.bn2(x), inplace=True))


class Transition(nn.Module):
    """BN-ReLU-conv 1×1 to half the channels, then the mean of every 2×2 pixels."""

    def __init__(self, in_chs: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_chs)
        self.conv = create_conv2d(in_chs, in_chs // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True)), 2)


class DenseStage(Stage):
    """`depth` dense layers, after a transition in every stage but the first."""

    def __init__(self, in_chs: int, depth: int, growth: int, first: bool):
        kept = in_chs if first else in_chs // 2
        super().__init__([DenseLayer(kept + i * growth, growth) for i in range(depth)], kept + depth * growth)
        self.transition = nn.Identity() if first else Transition(in_chs)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.transition(x)]
        for layer in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108, as TorchScript needs it
                new = recompute(layer, features)
            else:
                new = layer(features)
            # In front, as in the PS-KD code: the order decides which weight meets which channel.
            features = [new] + features  # noqa: RUF005, TorchScript knows no stars
        return torch.cat(features, 1)


class DenseNet(CifarNet):
    """A bare 3×3 stem of 2 × `growth` channels, dense stages with halving transitions, BN-ReLU before the pool."""

    def __init__(self, depths: tuple[int, ...], growth: int = 32, in_chans: int = 3, **head):
        stages, chs = [], 2 * growth
        for depth in depths:
            stages.append(DenseStage(chs, depth, growth, first=not stages))
            chs = stages[-1].out_chs
        super().__init__(make_stem(in_chans, 2 * growth, bn=False, act=False), stages, final_norm=True, **head)


default_cfgs = generate_default_cfgs(
    {
        "cifar_densenet121": cifar_cfg(pool_size=4),
        "cifar_densenet_tiny": cifar_cfg(pool_size=8),
        "densenet264": dict(pool_size=(7, 7), first_conv="features.conv0", classifier="classifier"),
    }
)


@register_model
def cifar_densenet121(pretrained: bool = False, **kwargs) -> DenseNet:
    """DenseNet-121 of the PS-KD paper, growth 32, 7.0 M parameters."""
    return build(DenseNet, "cifar_densenet121", pretrained, (6, 12, 24, 16), **kwargs)


@register_model
def cifar_densenet_tiny(pretrained: bool = False, **kwargs) -> DenseNet:
    """Three stages of two layers with growth 8, for tests."""
    return build(DenseNet, "cifar_densenet_tiny", pretrained, (2, 2, 2), **(dict(growth=8) | kwargs))


@register_model
def densenet264(pretrained: bool = False, **kwargs) -> ImageNetDenseNet:
    """DenseNet-264 for ImageNet, growth 32, in timm's own layout, 33.3 M parameters."""
    kwargs = dict(growth_rate=32, block_config=(6, 12, 64, 48)) | kwargs
    feature_cfg = dict(flatten_sequential=True)
    return build_model_with_cfg(ImageNetDenseNet, "densenet264", pretrained, feature_cfg=feature_cfg, **kwargs)
