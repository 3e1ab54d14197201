"""A finished detector on pictures of one's own: boxes in pixels of each picture, drawn into copies of them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from ..data.decode import open_image
from ..errors import InputError, first_line, reason
from ..files import write_atomic
from ..prediction import find_images, path_text
from ..progress import Display
from ..run.folder import read_recipe, read_result
from ..run.launch import autocast, prepare_scoring
from .drawing import DETECTED, Box, drawn
from .network import make_detector
from .settings import DetectionRecipe

CONFIDENCE = 0.5  # of a box, from which on it is drawn and listed
SHOWN = 8  # objects of a picture that the table names


def load_detector(run: Path, best: bool = False) -> tuple[nn.Module, DetectionRecipe, list[str]]:
    """The last (or `best`) epoch's detector of a finished run, on the device there is, its recipe and its classes' names."""
    recipe, result = read_recipe(run, kind=DetectionRecipe), read_result(run)
    path = (run / "best" if best else run) / "model.safetensors"
    detector = make_detector(recipe.model, result["num_classes"], run / "backbone")
    try:
        # Frozen batch norms do not count the batches that others have counted.
        missing = detector.load_state_dict(load_file(path), strict=False).missing_keys
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from None
    if missing:
        raise InputError(f"{path}: damaged: no weights {missing[0]!r}")
    return detector.eval().to(prepare_scoring(recipe)), recipe, result["class_names"]


def predict_boxes(
    run: str | Path,
    images: list[str],
    output: str | Path | None = None,
    json_file: str | Path | None = None,
    confidence: float = CONFIDENCE,
    best: bool = False,
    display: Display | None = None,
) -> dict:
    """Find objects in `images` (files, folders, patterns) with a finished detector, and draw them into copies.

    Copies go into the folder `output` (default: RUN/predicted), what is returned into `json_file` (default: predictions.json
    beside them): {"run", "weights", "confidence", "images": [{"image", "copy", "width", "height", "objects": [{"label",
    "confidence", "box": [left, top, right, bottom]}, …]}, …]}, with {"image", "error"} for each that cannot be read. Boxes are in
    pixels of the picture, held upright as EXIF says, from 0; objects below `confidence` are left out. Raises InputError where
    there is no run, a name stands for nothing, or nothing can be written.

    Example:
        >>> predict_boxes("runs/detection-voc/resnet50/seed0", ["new_images"])["images"][0]["objects"]
    """
    if not 0 < confidence <= 1:
        raise InputError(f"--confidence should lie above 0 and not above 1, got {confidence:g}")
    paths = find_images([images] if isinstance(images, str | Path) else images)
    detector, recipe, names = load_detector(Path(run).expanduser(), best)
    if confidence < recipe.model.score_threshold:
        detector.roi_heads.score_thresh = confidence
    folder = Path(output).expanduser() if output else Path(run).expanduser() / "predicted"
    if folder.resolve() in {path.resolve().parent for path in paths}:
        raise InputError(
            f"--output: {folder} holds pictures that are looked at, and copies could replace them: name another"
        )
    display = display or Display(quiet=True)
    rows = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, copy in zip(paths, copies(paths, folder), strict=True):
            rows.append(_predict_one(path, copy, lambda image: found(detector, recipe, image, names, confidence)))
            display.advance("predicting", len(rows), len(paths))
        result = {"run": str(run), "weights": "best" if best else "last", "confidence": confidence, "images": rows}
        target = Path(json_file) if json_file else folder / "predictions.json"
        write_atomic(target, json.dumps(result, indent=1, ensure_ascii=False))
    except OSError as error:
        raise InputError(f"{folder}: the predictions cannot be written: {reason(error)}") from None
    return result


def copies(paths: list[Path], folder: Path) -> list[Path]:
    """A file in `folder` for each of `paths`, of its name but PNG where it is no JPEG; `-2`, `-3` … after a name used before."""
    taken, found = set(), []
    for path in paths:
        suffix = path.suffix if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
        stem, number = path_text(Path(path.stem)), 1
        name = f"{stem}{suffix}"
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        taken.add(name.lower())
        found.append(folder / name)
    return found


def _predict_one(path: Path, copy: Path, find: Callable[[Image.Image], list[dict]]) -> dict:
    try:
        picture = open_image({"bytes": None, "path": str(path)}, 0)
    except InputError as error:
        why = str(error).partition("cannot be decoded: ")[2]
        return {"image": path_text(path), "error": f"{path_text(path)} cannot be decoded: {why}"}
    if copy.exists() and copy.samefile(path):
        raise InputError(
            f"--output: {copy.parent} holds the pictures themselves, which copies would replace: name another"
        )
    objects = find(picture)
    # The surest on top.
    boxes = [Box(each["box"], DETECTED, f"{each['label']} {100 * each['confidence']:.0f} %") for each in objects[::-1]]
    drawn(picture, boxes).save(copy, **({} if copy.suffix == ".png" else {"format": "JPEG", "quality": 92}))
    size = {"width": picture.width, "height": picture.height}
    return {"image": path_text(path), "copy": str(copy), **size, "objects": objects}


@torch.no_grad()
def found(
    detector: nn.Module, recipe: DetectionRecipe, picture: Image.Image, names: list[str], confidence: float
) -> list[dict]:
    """The objects of an RGB picture, the surest first. A picture is looked at alone: others beside it would pad it."""
    device = next(detector.parameters()).device
    with autocast(device, recipe.mixed_precision):
        output = detector([pil_to_tensor(picture).to(device).float().div_(255)])[0]
    rows = zip(*(output[name].tolist() for name in ("labels", "scores", "boxes")), strict=True)
    return [
        {"label": names[label - 1], "confidence": score, "box": [round(corner, 2) for corner in box]}
        for label, score, box in rows
        if score >= confidence
    ]


def boxes_table(found: dict):
    """A rich table of what `predict_boxes` gives: an image a row, and what is in it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for header in ("image", f"objects from {100 * found['confidence']:g} % on"):
        table.add_column(header, overflow="fold")
    for row in found["images"]:
        if "error" in row:
            table.add_row(escape(row["image"]), "[red]cannot be read[/red]")
            continue
        words = [f"{each['label']} {100 * each['confidence']:.1f} %" for each in row["objects"][:SHOWN]]
        more = len(row["objects"]) - len(words)
        table.add_row(escape(row["image"]), escape(", ".join(words) or "none") + (f" and {more} more" if more else ""))
    return table
