"""How well a finished run's confidences tell its test images from images of something else (Hendrycks and Gimpel, ICLR 2017)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pyarrow import ArrowException, parquet

from .cpus import num_cpus
from .data.sources import image_files, open_images
from .errors import InputError, first_line
from .files import warn
from .fingerprint import digest
from .metrics import auroc, fpr_at_recall
from .prediction import Classifier, find_images
from .progress import Display
from .reports.out_of_distribution import Against, keep


def against(run: str | Path, data: str, best: bool = False, display: Display | None = None) -> Against:
    """Hold a run's confidences of its test images against those of the images in `data`; the run's folder keeps the figures.

    `data` is an image, a pattern or a folder of images, a data set in a folder, a well-known one or a hub id (its test split
    where it has one). An image that cannot be decoded is named and left out. The confidence is the largest probability,
    without temperature. Raises InputError where there are no such images, or the run kept no predictions.

    Example:
        >>> from pskd_timm.out_of_distribution import against
        >>> against("runs/cifar100/pskd/seed0", "data/tiny_imagenet")["auroc"]
    """
    run = Path(run).expanduser()
    classifier = Classifier.of_run(run, best)
    of_tests = test_confidences(run / "best" if best else run)
    if classifier.recipe.data.gaussian_noise:
        warn("the run's test images had noise added (data.gaussian_noise), these images have none")
    images = Images(data)
    of_others, contents = confidences(classifier, images, display or Display(quiet=True))
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


def confidences(classifier: Classifier, images: Images, display: Display) -> tuple[np.ndarray, str]:
    """The network's confidence of each image that can be decoded, and a digest of them all as it sees them."""
    found, digests, done = [np.empty(0, np.float32)], [], 0

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
            done += len(batch)
            display.advance("predicting", done, len(images))
    return np.concatenate(found), digest(digests)
