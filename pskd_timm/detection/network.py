"""Faster R-CNN with a feature pyramid (Lin et al., CVPR 2017) on the maps of a timm network or of a finished run."""

import json
from collections import OrderedDict
from pathlib import Path

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from ..errors import InputError, first_line, nearest
from ..files import write_atomic
from ..models.build import from_config, load_model, read_config
from ..models.small_input import SMALL_INPUT
from ..run.folder import task_of
from .loading import features_of
from .settings import Model as ModelSection

STRIDES = (4, 8, 16, 32)
WHICH_CAN = "convolutional networks of timm such as resnet50 or efficientnet_b0 can"
TRIED_SIDE = 128  # pixels of the image that strides are measured on, a multiple of every stride
PAIRS_AT_ONCE = 2**22  # boxes × anchors whose overlap is computed at once


class Backbone(nn.Module):
    """The maps of a network at strides among 4, 8, 16 and 32, as a pyramid of `out_channels` each, and one map beyond."""

    def __init__(self, features: nn.Module, name: str, out_channels: int):
        super().__init__()
        shapes = measure(features, name)
        self.strides = {stride: level for level, (stride, _) in enumerate(shapes) if stride in STRIDES}
        if len(self.strides) < 2:
            found = sorted({stride for stride, _ in shapes})
            raise InputError(
                f"model.backbone: {name} has maps of stride {', '.join(map(str, found))} only, and a pyramid needs two of "
                f"{', '.join(map(str, STRIDES))}: {WHICH_CAN}"
            )
        self.features = features
        channels = [shapes[level][1] for level in self.strides.values()]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.features(images)
        chosen = (maps[level] for level in self.strides.values())
        return self.fpn(OrderedDict((str(i), each.contiguous()) for i, each in enumerate(chosen)))


class ChannelsFirst(nn.Module):
    """A network whose maps are [B, H, W, C], with maps [B, C, H, W]."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> list[Tensor]:
        return [each.permute(0, 3, 1, 2) for each in self.features(images)]


def measure(features: nn.Module, name: str) -> list[tuple[int, int]]:
    """Stride and channels of each map, measured on an image that is no square; a stride of 0 is none."""
    training = features.training
    try:
        with torch.no_grad():
            maps = features.eval()(torch.zeros(1, 3, TRIED_SIDE, 2 * TRIED_SIDE))
    except Exception as error:  # each model raises what it likes
        raise InputError(
            f"model.backbone: {name} does not take pictures of any size ({first_line(error)}): {WHICH_CAN}"
        ) from None
    features.train(training)
    found = []
    for each in maps:
        stride, rest = divmod(TRIED_SIDE, each.shape[2])
        found.append((0 if rest or 2 * each.shape[2] != each.shape[3] else stride, each.shape[1]))
    return found


def make_features(section: ModelSection) -> tuple[nn.Module, dict]:
    """The network that gives the maps of `section.backbone`, and timm's description of it.

    Raises InputError where it cannot be had, or has no maps.
    """
    backbone, run = section.backbone, run_folder(section.backbone)
    if run is None and not timm.is_model(backbone.split(".")[0].removeprefix("timm/")) and ":" not in backbone:
        raise InputError(
            f"model.backbone: no folder and no model of timm is called {backbone!r}{nearest(backbone, timm.list_models())}"
        )
    if run and has_small_input(run):
        return _small_input_features(run, backbone)
    source = f"local-dir:{run.resolve()}" if run else backbone
    pretrained = section.pretrained or ":" in source
    try:
        return _created(source, pretrained)
    except (RuntimeError, AttributeError, KeyError, TypeError, NotImplementedError, AssertionError) as error:
        if isinstance(error, KeyError) and ":" in source:
            raise InputError(
                f"model.backbone: {backbone}: config.json has no {error}: it is not that of a timm model"
            ) from None
        raise InputError(
            f"model.backbone: {backbone} has no maps to build a pyramid on ({first_line(error)}): {WHICH_CAN}"
        ) from None
    except Exception as error:  # the hub and safetensors raise what they like
        raise InputError(f"model.backbone: {backbone} cannot be had: {first_line(error)}") from None


def save_description(section: ModelSection, detector: FasterRCNN, folder: Path):
    """Write config.json into `folder`: what `make_detector` builds the backbone from once its own folder is gone."""
    run = run_folder(section.backbone)
    if run:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    else:
        config = {"architecture": detector.backbone.architecture}
    seen = {"mean": detector.transform.image_mean, "std": detector.transform.image_std}
    config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), **seen}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(config, indent=1))


def described_features(folder: Path) -> tuple[nn.Module, dict]:
    """As `make_features`, from what `save_description` wrote, without weights."""
    if has_small_input(folder):
        return _maps_of(from_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    return _created(f"local-dir:{folder.resolve()}", pretrained=False)


def _created(source: str, pretrained: bool) -> tuple[nn.Module, dict]:
    features = features_of(source, pretrained)
    config = features.pretrained_cfg
    return ChannelsFirst(features) if getattr(features, "output_fmt", None) == "NHWC" else features, config


def _maps_of(model: nn.Module) -> tuple[nn.Module, dict]:
    return FeatureGetterNet(model, out_indices=tuple(range(len(model.feature_info)))), model.pretrained_cfg


def _small_input_features(run: Path, backbone: str) -> tuple[nn.Module, dict]:
    model = load_model(run)
    if not hasattr(model, "forward_intermediates"):
        raise InputError(
            f"model.backbone: {backbone} was trained with small_input, and timm has no maps of it: {WHICH_CAN}"
        )
    return _maps_of(model)


def run_folder(backbone: str) -> Path | None:
    """The folder that a backbone's name stands for, if it stands for one.

    Raises InputError where that is no folder, holds no network of timm's, or a run of another task.
    """
    scheme, _, rest = backbone.rpartition(":")
    folder = Path(rest).expanduser()
    if scheme not in ("", "local-dir") or not (scheme or folder.is_dir() or "/" in backbone.removeprefix("timm/")):
        return None
    task = task_of(folder.parent if folder.name == "best" else folder)
    if task != "images":
        raise InputError(
            f"model.backbone: {folder} is a run of task {task}: one of task images is wanted, whose network has maps to build "
            "a pyramid on"
        )
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(
            f"model.backbone: {folder} holds no network (a finished run has config.json and model.safetensors)"
            if folder.is_dir()
            else f"model.backbone: there is no folder {folder}; a model on the hub is named hf-hub:{rest}"
        )
    try:
        read_config(folder)
    except InputError as error:
        raise InputError(f"model.backbone: {error}") from None
    return folder


def has_small_input(folder: Path) -> bool:
    """Whether the network in a run's folder was trained with `model.small_input`."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("small_input")) or config.get("architecture") == SMALL_INPUT
    except (ValueError, AttributeError) as error:
        raise InputError(f"model.backbone: {folder / 'config.json'}: damaged: {error}") from None


def is_trained(section: ModelSection) -> bool:
    """Whether the backbone brings weights that somebody has trained."""
    return section.pretrained or ":" in section.backbone or run_folder(section.backbone) is not None


def make_backbone(section: ModelSection, saved: Path | None = None) -> Backbone:
    """The pyramid on a recipe's backbone, with `architecture`, `mean` and `std` as timm describes it.

    With `saved`, a folder that `save_description` has written to, for weights that are loaded afterwards: neither the
    backbone's own weights nor its folder are needed then. Raises InputError where the backbone cannot be one.
    """
    features, config = described_features(saved) if saved else make_features(section)
    freeze = is_trained(section) if section.freeze_batch_norm is None and not saved else section.freeze_batch_norm
    if freeze or saved:
        features = freeze_batch_norm_2d(features)
    backbone = Backbone(features, section.backbone, section.fpn_channels)
    backbone.architecture, backbone.mean, backbone.std = config.get("architecture"), config["mean"], config["std"]
    return backbone


def make_detector(section: ModelSection, num_classes: int, saved: Path | None = None) -> FasterRCNN:
    """The detector of a recipe for `num_classes`, on `make_backbone`."""
    return detector_on(make_backbone(section, saved), section, num_classes)


class WideBoxCoder(BoxCoder):
    """torchvision's, whose boxes stay float32 where the heads speak bf16, which has no odd pixels above 256."""

    def decode(self, rel_codes, boxes):
        return super().decode(rel_codes.float(), boxes)


def detector_on(backbone: Backbone, section: ModelSection, num_classes: int) -> FasterRCNN:
    """Faster R-CNN of a recipe for `num_classes` on a backbone, with its mean and std."""
    levels = len(backbone.strides)
    strides = [*backbone.strides, 2 * list(backbone.strides)[-1]]
    sizes = tuple((round(section.anchor_scale * stride),) for stride in strides)
    detector = FasterRCNN(
        backbone,
        min_size=tuple(section.short_side),
        max_size=section.max_side,
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_pre_nms_top_n_train=2 * section.proposals,
        rpn_pre_nms_top_n_test=section.proposals,
        rpn_post_nms_top_n_train=2 * section.proposals,
        rpn_post_nms_top_n_test=section.proposals,
        # A box of 28 × the anchors' scale, 224 pixels as published, is looked at on the map of stride 16.
        box_roi_pool=MultiScaleRoIAlign(
            [str(level) for level in range(levels)], 7, 2, canonical_scale=round(28 * section.anchor_scale)
        ),
        box_head=TwoMLPHead(section.fpn_channels * 7**2, section.head_width),
        box_predictor=FastRCNNPredictor(section.head_width, num_classes + 1),  # with the background
        box_batch_size_per_image=section.rois_per_image,
        box_score_thresh=section.score_threshold,
        box_detections_per_img=section.detections_per_image,
    )
    for head in (detector.rpn, detector.roi_heads):
        head.box_coder = WideBoxCoder(head.box_coder.weights)
    # With 200 objects in a picture torchvision's intermediate values would take gigabytes.
    detector.rpn.box_similarity = detector.roi_heads.box_similarity = iou_in_parts
    return detector


def iou_in_parts(boxes: Tensor, others: Tensor) -> Tensor:
    """torchvision's `box_iou` of boxes [N, 4] and others [M, 4] as [N, M], a few boxes at once."""
    at_once = max(1, PAIRS_AT_ONCE // max(1, len(others)))
    if len(boxes) <= at_once:
        return box_iou(boxes, others)
    return torch.cat([box_iou(some, others) for some in boxes.split(at_once)])
