"""Small VOCdevkits of coloured squares, and settings of a detector that trains on them in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"cat": (220, 40, 40), "dog": (40, 60, 220)}


def annotation(objects: list[str], width: int, height: int) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def xml_object(name, box, difficult=0, more=""):
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{more}<bndbox>{corners}</bndbox></object>"


def make_devkit(folder: Path, year: str = "VOC2007", pictures: int = 8, per_picture: int = 2, seed: int = 0) -> Path:
    """A devkit with image sets `train` and `val`, each of half the pictures, of 96×64 and 64×96 pixels."""
    generator = np.random.default_rng(seed)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / year / name).mkdir(parents=True, exist_ok=True)
    names = [f"{i:06d}" for i in range(pictures)]
    for i, name in enumerate(names):
        width, height = (96, 64) if i % 2 else (64, 96)
        pixels = np.full((height, width, 3), 128, np.uint8)
        objects = []
        for _ in range(per_picture):
            label = ("cat", "dog")[generator.integers(2)]
            side = int(generator.integers(20, 33))
            left, top = int(generator.integers(0, width - side)), int(generator.integers(0, height - side))
            pixels[top : top + side, left : left + side] = COLOURS[label]
            objects.append(xml_object(label, (left + 1, top + 1, left + side, top + side)))
        Image.fromarray(pixels).save(folder / year / "JPEGImages" / f"{name}.jpg", quality=95)
        (folder / year / "Annotations" / f"{name}.xml").write_text(annotation(objects, width, height))
    half = pictures // 2
    for part, chosen in (("train", names[:half]), ("val", names[half:])):
        (folder / year / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(chosen) + "\n")
    return folder


def small_settings(devkit: Path, output_dir: Path, **more) -> dict:
    """Settings over detection/voc_small for a devkit of `make_devkit`; a second or two an epoch."""
    return {
        "epochs": 2,
        "batch_size": 2,
        "data.path": str(devkit),
        "data.train": ["VOC2007/train"],
        "data.test": ["VOC2007/val"],
        "model.backbone": "test_resnet",
        "model.short_side": [64],
        "model.max_side": 96,
        "model.fpn_channels": 16,
        "model.head_width": 32,
        "model.proposals": 50,
        "model.rois_per_image": 32,
        "optim.lr": 0.01,
        "tracking.log_every": 1,
        "output_dir": str(output_dir),
    } | {key.replace("__", "."): value for key, value in more.items()}
