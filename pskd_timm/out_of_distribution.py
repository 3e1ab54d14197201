"""How well a finished run's confidences tell its test images from images of something else (Hendrycks and Gimpel, ICLR 2017)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pyarrow import ArrowException, parquet

from .calibration import kept_probabilities
from .cpus import num_cpus
from .data.sources import image_files, open_images
from .errors import InputError, first_line
from .files import warn
from .fingerprint import digest
from .metrics import auroc, fpr_at_recall
from .prediction import Classifier, find_images
from .progress import Display
from .reports.kept import Kept
from .reports.out_of_distribution import Against, keep
from .run.folder import read_result


def against(run: str | Path, data: str, best: bool = False, display: Display | None = None) -> Against:
    """Hold a run's confidences of its test images against those of the images in `data`; the run's folder keeps the figures.

    `data` is an image, a pattern or a folder of images, a data set in a folder, a well-known one or a hub id (its test split
    where it has one). An image that cannot be decoded is named and left out. The confidence is the largest probability; where
    the run has a temperature, the figures of calibrated confidences come beside. Raises InputError where there are no such
    images, or the run kept no predictions.

    Example:
        >>> from pskd_timm.out_of_distribution import against
        >>> against("runs/cifar100/pskd/seed0", "data/tiny_imagenet")["auroc"]
    """
    run = Path(run).expanduser()
    classifier = Classifier.of_run(run, best)
    folder = run / "best" if best else run
    of_tests, calibrated_tests = test_confidences(folder), None
    if not classifier.temperature.reason and read_result(run)["evaluated_on"] == "test":
        calibrated_tests = calibrated_confidences(folder, classifier.temperature.value)
    images = Images(data)
    if classifier.recipe.data.gaussian_noise:
        warn("the run's test images had noise added (data.gaussian_noise), these images have none")
    of_others, calibrated_others, contents = confidences(classifier, images, display or Display(quiet=True))
    if len(of_others) == 0:
        raise InputError(f"{data}: none of its {len(images)} images can be decoded")
    found = Against(
        name=images.name,
        weights="best" if best else "last",
        contents=contents,
        images=len(of_others),
        unreadable=len(images) - len(of_others),
        test_images=len(of_tests),
        auroc=100 * auroc(of_tests, of_others),
        fpr95=100 * fpr_at_recall(of_tests, of_others),
    )
    if calibrated_tests is not None:
        found["temperature"] = classifier.temperature.value
        found["calibrated_auroc"] = 100 * auroc(calibrated_tests, calibrated_others)
        found["calibrated_fpr95"] = 100 * fpr_at_recall(calibrated_tests, calibrated_others)
    keep(run, found)
    return found


class Images:
    """The images that a name stands for: files, or a data set's, as `Classifier.prepare` takes them."""

    def __init__(self, data: str):
        path = Path(data).expanduser()
        of_files = (path.is_dir() and image_files(path)) or path.is_file() or any(mark in data for mark in "*?[")
        self.name = path.resolve().name if path.exists() else data
        self.files = find_images([data]) if of_files else None
        self.table = None if of_files else self._open(data)

    @staticmethod
    def _open(data: str):
        try:
            return open_images(data)
        except InputError as error:
            why = str(error).partition(": ")[2] or error
            raise InputError(f"--against {data}: neither images nor a data set that can be read: {why}") from None

    def __len__(self) -> int:
        return len(self.table if self.files is None else self.files)

    def batches(self, size: int) -> Iterator[Sequence]:
        column = None if self.table is None else self.table.encoded_images
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield self.files[rows] if column is None else column[rows][self.table.image_column]


def test_confidences(folder: Path) -> np.ndarray:
    """The confidences [N] that a run kept of its scored images. Raises InputError where it kept none."""
    path = folder / "predictions.parquet"
    if not path.is_file():
        raise InputError(f"{path} is not there: the confidences of the run's test images are gone")
    try:
        return parquet.read_table(path, columns=["confidence"])["confidence"].to_numpy()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged: {first_line(error)}") from None


def calibrated_confidences(folder: Path, temperature: float) -> np.ndarray | None:
    """Those of `test_confidences` at a temperature; None where the run kept no probabilities of these images."""
    path = folder / "predictions.parquet"
    try:
        if not kept_probabilities(path):
            return None
        return np.concatenate([probabilities.max(axis=1) for probabilities, _ in Kept(path, temperature).parts()])
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged: {first_line(error)}") from None


def confidences(classifier: Classifier, images: Images, display: Display) -> tuple[np.ndarray, np.ndarray, str]:
    """The confidence of each image that can be decoded, as it is and calibrated, and a digest of all as the network sees them."""
    found, calibrated, digests, done = [np.empty(0, np.float32)], [np.empty(0, np.float32)], [], 0

    def decoded(numbered) -> np.ndarray | None:
        try:
            return classifier.prepare(numbered[1], numbered[0])
        except InputError as error:
            warn(f"{error}; left out")
            return None

    with ThreadPoolExecutor(num_cpus()) as pool:
        for batch in images.batches(classifier.recipe.batch_size):
            pixels = [image for image in pool.map(decoded, enumerate(batch, start=done)) if image is not None]
            if pixels:
                pixels = np.stack(pixels)
                digests.append(digest([pixels.tobytes()]).encode())
                probabilities = classifier.probabilities(torch.from_numpy(pixels).permute(0, 3, 1, 2))
                found.append(probabilities.amax(dim=1).numpy())
                calibrated.append(classifier.confidences(probabilities).amax(dim=1).numpy())
            done += len(batch)
            display.advance("predicting", done, len(images))
    return np.concatenate(found), np.concatenate(calibrated), digest(digests)
