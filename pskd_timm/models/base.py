"""What every network for small images shares: stem, stages, head, and timm's interface to them."""

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, create_conv2d
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor

from .recompute import recompute

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


class Stage(nn.Module):
    """Blocks run one after the other, whose output has `out_chs` channels."""

    def __init__(self, blocks: Iterable[nn.Module], out_chs: int):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.out_chs = out_chs
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108, as TorchScript needs it
                x = recompute(block, x)
            else:
                x = block(x)
        return x


class CifarNet(nn.Module):
    """Stem, stages (each after the first halves the map), final norm or none, pooled classifier, as timm has them."""

    __jit_unused_properties__ = ("head_hidden_size",)

    def __init__(
        self,
        stem: nn.Sequential,
        stages: list[Stage],
        final_norm: bool = False,
        num_classes: int = 100,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans, self.num_features = stem.conv.in_channels, stages[-1].out_chs
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm_act(self.num_features) if final_norm else nn.Identity()
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.feature_info = [dict(num_chs=stem.conv.out_channels, reduction=1, module=f"stem.{last_name(stem)}")]
        for i, stage in enumerate(stages):
            self.feature_info.append(dict(num_chs=stage.out_chs, reduction=2**i, module=f"stages.{i}"))
        if final_norm:
            self.feature_info[-1]["module"] = f"norm.{last_name(self.norm)}"

    @property
    def head_hidden_size(self) -> int:
        return self.num_features * self.head.global_pool.feat_mult()

    def group_matcher(self, coarse: bool = False) -> dict:
        fine = [(r"^stages\.(\d+)\.transition", None), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else fine)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        # timm 1.0.20 makes the new classifier on the CPU in float32.
        self.head.to(self.stem.conv.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """`forward_features`, and what the stem (0) and the stages (1, 2, …) gave at `indices`, each [B, C, H, W].

        An int stands for the last so many of them, None for all. `norm` applies the final norm to the last stage's,
        `stop_early` runs no stage beyond the last index.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt should be NCHW, got {output_fmt}")
        last_stage = len(self.stages)
        wanted, highest = feature_take_indices(last_stage + 1, indices)
        layers, found = [self.stem, *self.stages], []
        for i, layer in enumerate(layers[: highest + 1] if stop_early else layers):
            x = layer(x)
            if i in wanted:
                found.append(self.norm(x) if norm and i == last_stage else x)
        if intermediates_only:
            return found
        return (self.norm(x) if i == last_stage else x), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` of the same `indices` does not need, and return them from 0."""
        wanted, highest = feature_take_indices(len(self.stages) + 1, indices)
        self.stages = self.stages[:highest]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def make_stem(in_chans: int, out_chs: int, bn: bool = True, act: bool = True) -> nn.Sequential:
    """A 3×3 convolution with stride 1, then batch norm and ReLU where asked for."""
    layers = OrderedDict(conv=create_conv2d(in_chans, out_chs, 3))
    if bn:
        layers["bn"] = nn.BatchNorm2d(out_chs)
    if act:
        layers["act"] = nn.ReLU()
    return nn.Sequential(layers)


def make_stages(
    block: type[nn.Module], in_chs: int, widths: Iterable[int], depths: Iterable[int], **block_args
) -> list[Stage]:
    """Stages of `block(in_chs, width, stride, **block_args)`, which returns width × `block.expansion` channels."""
    stages = []
    for width, depth in zip(widths, depths, strict=True):
        blocks = []
        for i in range(depth):
            blocks.append(block(in_chs, width, stride=2 if stages and i == 0 else 1, **block_args))
            in_chs = width * block.expansion
        stages.append(Stage(blocks, in_chs))
    return stages


def norm_act(num_features: int) -> nn.Sequential:
    """Batch norm and ReLU; two plain modules, because SyncBatchNorm's conversion would lose a fused activation."""
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(num_features), act=nn.ReLU()))


def conv_bn(in_chs: int, out_chs: int, stride: int) -> nn.Sequential:
    """A shortcut for changed shapes: 1×1 convolution and batch norm."""
    return nn.Sequential(OrderedDict(conv=create_conv2d(in_chs, out_chs, 1, stride=stride), bn=nn.BatchNorm2d(out_chs)))


def last_name(module: nn.Module) -> str:
    """The name of the child registered last."""
    return [name for name, _ in module.named_children()][-1]


def cifar_cfg(pool_size: int) -> dict:
    """timm's description of a CIFAR-100 network whose last map is `pool_size` wide at 32×32."""
    return dict(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(pool_size, pool_size),
        crop_pct=1.0,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        first_conv="stem.conv",
        classifier="head.fc",
    )


def build(
    model_cls: type[CifarNet],
    variant: str,
    pretrained: bool,
    depths: tuple[int, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> nn.Module:
    """Build through timm, which adds default_cfg and, for `features_only`, taps after the stem and every stage.

    `device` and `dtype` are where and of what type the weights are, by default torch's.
    """
    feature_cfg = dict(out_indices=tuple(range(len(depths) + 1)), flatten_sequential=True)
    with torch.device(device) if device else nullcontext():
        model = build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=feature_cfg, depths=depths, **kwargs)
    return model.to(dtype=dtype) if dtype else model
