"""Augmentation of whole batches on the device; every draw a function of (seed, epoch, sample), see rng.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rng

# One number for each thing that is drawn: a new draw takes a new number and leaves the others' values alone.
TOP, LEFT, FLIP = range(3)


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Windows of the size of `images` [B, C, H, W] at (top, left) [B] of the images padded by `padding` zeros a side."""
    height, width = images.shape[-2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """`images` [B, C, H, W] with those left–right mirrored where `mirrored` [B] is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float images from uint8 `images` [B, C, H, W]; `mean` and `std` [C] are in units of the pixel range, as timm's."""
    return (images.float() - 255.0 * mean[:, None, None]) / (255.0 * std[:, None, None])


def augment(images: Tensor, index: Tensor, key: int, padding: int, hflip: float) -> Tensor:
    """Random crop and horizontal flip of uint8 `images` [B, C, H, W] of the samples `index` [B]; `key` names the epoch."""
    if padding:
        top = rng.integers(rng.fold(key, TOP), index, 2 * padding + 1)
        left = rng.integers(rng.fold(key, LEFT), index, 2 * padding + 1)
        images = crop(images, top, left, padding)
    if hflip:
        images = flip(images, rng.uniform(rng.fold(key, FLIP), index) < hflip)
    return images
