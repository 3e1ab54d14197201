"""A finished run's network on images of one's own: decoded as the test images were, with calibrated confidences."""

import glob
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from .calibration import Temperature, fit_to_parts, kept_probabilities, probability_parts, with_temperature
from .cpus import num_cpus
from .data.augmentation import normalize
from .data.decode import fit, open_image
from .data.sources import PICTURE_SUFFIXES, image_files
from .errors import InputError, first_line
from .losses import at_least_float32
from .models.build import load_model, normalisation
from .progress import Display
from .recipe import Recipe
from .run.folder import how_to_mend, read_recipe, read_result, task_of
from .run.launch import autocast, prepare_scoring


@dataclass
class Classifier:
    """A finished run's network, on the CPU or the GPU there is, and what it needs to know to be asked."""

    model: nn.Module
    recipe: Recipe
    class_names: list[str]
    temperature: Temperature  # fitted on the held-out part; its `reason` says why there is none

    @classmethod
    def of_run(cls, run: str | Path, best: bool = False) -> "Classifier":
        """The last epoch's network of the run in a folder, or with `best` the best epoch's."""
        run = Path(run).expanduser()
        if task_of(run) == "detection":
            raise InputError(
                f"{run}: a detector's run, which classifies no images: `pskd-timm predict {run} IMAGES` finds objects with it"
            )
        recipe = read_recipe(run)
        if recipe.task != "images":
            raise InputError(f"{run}: a run of task {recipe.task}, which classifies no images")
        read_result(run)  # the run is finished
        folder = run / "best" if best else run
        model = load_model(folder).eval().to(prepare_scoring(recipe))
        names = json.loads((folder / "config.json").read_text())["label_names"]
        return cls(model, recipe, names, held_out_temperature(folder))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the network was trained on."""
        return tuple(self.model.pretrained_cfg["input_size"][-2:])

    def prepare(self, stored, position: int = 0) -> np.ndarray:
        """A file, or an image as a data set stores it, as the test images are decoded: uint8 [H, W, 3].

        Raises InputError, which names its `position`, if that cannot be done.
        """
        stored = {"bytes": None, "path": str(stored)} if isinstance(stored, str | Path) else stored
        image = open_image(stored, position)
        if self.recipe.data.image_size:
            return np.asarray(fit(image, self.recipe.data.image_size, self.recipe.data.crop_pct))
        # The data were all of one size, which these pictures need not be.
        height, width = self.image_size
        if image.size == (width, height):
            return np.asarray(image)
        if height == width:
            return np.asarray(fit(image, height, 1.0))
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax outputs [N, K] (CPU) for uint8 `images` [N, 3, H, W], without temperature: those of predictions.parquet."""
        device = next(self.model.parameters()).device
        mean, std = (torch.tensor(values, device=device) for values in normalisation(self.model, self.recipe))
        found = []
        for batch in images.split(self.recipe.batch_size):
            with autocast(device, self.recipe.mixed_precision):
                logits = self.model(normalize(batch.to(device), mean, std))
            found.append(at_least_float32(logits).softmax(dim=1).cpu())
        return torch.cat(found)

    def confidences(self, probabilities: Tensor) -> Tensor:
        """`probabilities` [N, K], calibrated where the run has a temperature to do so."""
        return probabilities if self.temperature.reason else with_temperature(probabilities, self.temperature.value)


def held_out_temperature(folder: Path) -> Temperature:
    """The temperature that suits the held-out predictions in a run's folder; 1, with the reason, where there is none."""
    path = folder / "holdout.parquet"
    if not path.is_file():
        return Temperature(1.0, 0, "the run held no images out (data.holdout_fraction)")
    try:
        if not kept_probabilities(path):
            return Temperature(1.0, 0, "the run kept no probabilities (keep_probabilities)")
        return fit_to_parts(part[:2] for part in probability_parts(path))
    except (OSError, ValueError) as error:  # pyarrow's are among them
        run_dir = folder.parent if folder.name == "best" else folder
        raise InputError(f"{path}: damaged: {first_line(error)}; {how_to_mend(run_dir)}") from None


def find_images(names: list[str]) -> list[Path]:
    """The image files that `names` (files, folders with all below them, patterns) stand for, each once, in that order."""
    found = []
    for name in names:
        path = Path(name).expanduser()
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise InputError(f"{name}: no such image, folder or pattern")
        files = [file for match in matches for file in (image_files(match) if match.is_dir() else [match])]
        if not files:
            raise InputError(f"{name}: no images in this folder ({' '.join(PICTURE_SUFFIXES)})")
        found += files
    return list(dict.fromkeys(found))


def path_text(path: Path) -> str:
    """A path as text that can be written, whatever bytes are in it."""
    return os.fsencode(path).decode(errors="replace")


def predict(
    run: str | Path, images: list[str], top: int = 5, best: bool = False, display: Display | None = None
) -> dict:
    """Classify `images` (files, folders, patterns) with a finished run; returns what `pskd-timm predict --json` writes.

    {"run", "weights", "calibrated", "temperature", "held_out_images", "images": [{"image", "prediction", "confidence",
    "top"}, …]}, with {"image", "error"} for each that cannot be read, and "not_calibrated_because" where there is no sound
    temperature. Raises InputError where there is no run, or a name stands for nothing.

    Example:
        >>> predict("runs/custom/pskd/seed0", ["new_images"])["images"][0]["prediction"]
    """
    if top < 1:
        raise InputError(f"--top must be at least 1, got {top}")
    paths = find_images([images] if isinstance(images, str | Path) else images)
    classifier = Classifier.of_run(run, best)
    display = display or Display(quiet=True)
    rows, step = [], classifier.recipe.batch_size
    with ThreadPoolExecutor(num_cpus()) as pool:
        for start in range(0, len(paths), step):
            rows += _predict_batch(classifier, paths[start : start + step], top, pool)
            display.advance("predicting", len(rows), len(paths))
    return {
        "run": str(run),
        "weights": "best" if best else "last",
        **describe_calibration(classifier.temperature),
        "images": rows,
    }


def describe_calibration(temperature: Temperature) -> dict:
    """What a file for others says of its confidences."""
    fitted = {"temperature": temperature.value, "held_out_images": temperature.num_samples}
    why = {"not_calibrated_because": temperature.reason} if temperature.reason else {}
    return {"calibrated": not temperature.reason, **fitted, **why}


def calibration_line(about: dict) -> str:
    """What `describe_calibration` says, in words."""
    if not about["calibrated"]:
        return f"confidences are not calibrated: {about['not_calibrated_because']}"
    fitted = f"temperature {about['temperature']:.3f}, from {about['held_out_images']:,} images"
    return f"confidences are calibrated on the run's held-out part: {fitted}"


def _predict_batch(classifier: Classifier, paths: list[Path], top: int, pool) -> list[dict]:
    decoded = list(pool.map(lambda path: _decoded(classifier, path), paths))
    readable = [image for image in decoded if not isinstance(image, InputError)]
    if readable:
        images = torch.from_numpy(np.stack(readable)).permute(0, 3, 1, 2)
        confidences = iter(classifier.confidences(classifier.probabilities(images)))
    rows = []
    for path, image in zip(paths, decoded, strict=True):
        if isinstance(image, InputError):
            rows.append({"image": path_text(path), "error": str(image)})
        else:
            rows.append({"image": path_text(path), **_ranked(next(confidences), classifier.class_names, top)})
    return rows


def _decoded(classifier: Classifier, path: Path) -> np.ndarray | InputError:
    try:
        return classifier.prepare(path)
    except InputError as error:
        # Which number it would have in a data set says nothing here.
        return InputError(f"{path_text(path)} cannot be decoded: {str(error).partition('cannot be decoded: ')[2]}")


def _ranked(confidences: Tensor, class_names: list[str], top: int) -> dict:
    values, classes = confidences.topk(min(top, len(class_names)))
    ranked = [
        {"class": class_names[k], "confidence": value}
        for k, value in zip(classes.tolist(), values.tolist(), strict=True)
    ]
    return {"prediction": ranked[0]["class"], "confidence": ranked[0]["confidence"], "top": ranked}


def predictions_table(found: dict):
    """A rich table of what `predict` gives: an image a row, its prediction and confidence, and the runners-up."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for header, side in (("image", "left"), ("prediction", "left"), ("confidence", "right"), ("then", "left")):
        table.add_column(header, justify=side, overflow="fold")
    for row in found["images"]:
        if "error" in row:
            table.add_row(escape(row["image"]), "[red]cannot be read[/red]", "", "")
            continue
        then = ", ".join(f"{other['class']} {100 * other['confidence']:.1f} %" for other in row["top"][1:])
        table.add_row(escape(row["image"]), escape(row["prediction"]), f"{100 * row['confidence']:.1f} %", escape(then))
    return table
