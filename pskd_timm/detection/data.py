"""Pictures with boxes: VOC's folders, and HF data sets; read whole before anything is trained, decoded when they are needed.

A box is left, top, right, bottom in pixels from 0, right and bottom exclusive: VOC's 1-based inclusive xmin … xmax become
xmin − 1 … xmax, so that a box has the same area and overlap as by VOC's own code.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import rng
from ..cpus import WORKERS_START
from ..errors import InputError, nearest, reason
from ..fingerprint import digest
from ..ranks import warn_on_main
from .settings import VOC_CLASSES
from .settings import Data as DataSection

FLIP = 21  # stream of random numbers
ROUNDING = 0.01  # pixels: COCO's boxes have two decimals


class Objects(NamedTuple):
    """A picture's objects: boxes [n, 4] (float32), labels [n] (int64, from 0), difficult [n] (bool)."""

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray

    @classmethod
    def of(cls, rows: list[tuple[list[float], int, bool]]) -> "Objects":
        """Those of a list of (box, label, difficult)."""
        boxes, labels, difficult = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(
            np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(labels, np.int64), np.asarray(difficult, bool)
        )

    def easy(self) -> "Objects":
        """Those that are not difficult."""
        return Objects(*(values[~self.difficult] for values in self))


@dataclass
class Part:
    """The pictures to train or to test on: their names, their objects, and what opens the i-th of them."""

    names: list[str]
    objects: list[Objects]
    open: Callable[[int], Image.Image]

    def __len__(self):
        return len(self.names)

    def picture(self, i: int) -> Image.Image:
        """The i-th picture as RGB. Raises InputError where it cannot be decoded."""
        return self._read(i, lambda picture: picture.convert("RGB"))

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of the i-th picture, of which only the head is read. Raises InputError where that cannot be done."""
        return self._read(i, lambda picture: picture.size)

    def _read(self, i: int, what: Callable):
        try:
            with self.open(i) as picture:
                return what(picture)
        except Exception as error:  # each of Pillow's readers raises what it likes
            why = str(error)[:200] or type(error).__name__
            raise InputError(f"data: the picture {self.names[i]} cannot be decoded: {why}") from None


class DetectionData(NamedTuple):
    """Training and test part, and the names of the classes."""

    train: Part
    test: Part
    class_names: list[str]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digests of the names of the classes and of the pictures, and of the boxes (fingerprint.py)."""
        parts = (self.train, self.test)
        return {
            "class_names": digest(name.encode() + b"\0" for name in self.class_names),
            "samples": digest(name.encode() + b"\0" for part in parts for name in (*part.names, "")),
            "labels": digest(values.tobytes() for part in parts for objects in part.objects for values in objects),
        }


def open_data(section: DataSection) -> DetectionData:
    """The pictures of a recipe. Raises InputError for whatever cannot be trained on as it stands."""
    folder = Path(section.path).expanduser() if section.path else None
    if folder and not folder.is_dir():
        raise InputError(f"data.path: {folder} is {'a file, not a folder' if folder.exists() else 'not there'}")
    is_voc = folder is not None and any(folder.glob("*/ImageSets/Main"))
    if not is_voc and folder is not None and all("/" in name for name in section.train):
        raise InputError(
            f"data.path: {folder} holds no VOC2007/ImageSets/Main or the like: name the folder VOCdevkit, "
            "or for an HF data set its splits (data.train '[train]')"
        )
    if is_voc:
        names = section.class_names or VOC_CLASSES
        rules = Rules(section.other_names, names)
        parts = [_voc_part(folder, key, getattr(section, key), rules) for key in ("train", "test")]
    else:
        from .hf_data import open_hf

        parts, names, rules = open_hf(section)
    rules.say()
    train, test = parts
    if both := set(train.names) & set(test.names):
        warn_on_main(
            f"data: {len(both)} pictures are in the training and in the test part, {sorted(both)[0]} among them"
        )
    train, test = _first(train, section.limit_train), _first(test, section.limit_test)
    if not section.train_difficult:
        train.objects = [objects.easy() for objects in train.objects]
    if not any(len(objects.labels) for objects in train.objects):
        but = "" if section.train_difficult else " that is not difficult"
        raise InputError(f"data.train: its {len(train)} pictures have no object{but}")
    if not any(len(objects.easy().labels) for objects in test.objects):
        raise InputError(f"data.test: its {len(test)} pictures have no object that is not difficult")
    return DetectionData(train, test, list(names))


def _first(part: Part, limit: int | None) -> Part:
    return Part(part.names[:limit], part.objects[:limit], part.open)


class Rules:
    """What is done with data that do not quite fit, and how often it was: `say` names it in a line each.

    An object whose name is none of the classes' ends the reading or is left out, as `other_names` says; a box that reaches
    beyond its picture is cut at the edge; an annotation's size that is not the picture's is passed over.
    """

    def __init__(self, other_names: str, class_names: list[str]):
        self.other_names, self.number = other_names, {name: i for i, name in enumerate(class_names)}
        self.left_out = Counter()
        self.cut: list[str] = []  # where each such box is
        self.other_sizes: list[str] = []  # which annotations, with both sizes

    def label(self, name: str, where: str) -> int | None:
        """The number of a class; None where the object is to be left out."""
        if name in self.number:
            return self.number[name]
        if self.other_names == "fail":
            raise InputError(
                f"{where}: an object is called {name!r}, which is none of the classes{nearest(name, self.number)}: "
                "--data.class_names names others, --data.other_names skip leaves such objects out"
            )
        self.left_out[name] += 1
        return None

    def inside(self, box: list[float], size: tuple[int, int], where: str) -> list[float]:
        """`box` cut at the edges of a picture of `size` (width, height). Raises InputError where nothing is left of it."""
        if box[0] >= box[2] or box[1] >= box[3]:
            raise InputError(f"{where}: the box {[round(x, 2) for x in box]} (from 0) has no area")
        width, height = size
        cut = [max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))]
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            raise InputError(
                f"{where}: the box {[round(x, 2) for x in box]} (from 0) lies outside the {width}×{height} picture"
            )
        if max(abs(before - after) for before, after in zip(box, cut, strict=True)) > ROUNDING:
            self.cut.append(where)
        return cut

    def say(self):
        """Name what was left out, cut or passed over."""
        if self.left_out:
            names = ", ".join(f"{count} {name}" for name, count in self.left_out.most_common(8))
            warn_on_main(f"data: {self.left_out.total()} objects of other names are left out: {names}")
        if self.cut:
            warn_on_main(
                f"data: {_counted(self.cut, 'box reaches', 'boxes reach')} beyond the picture and "
                f"{'is' if len(self.cut) == 1 else 'are'} cut at its edges: {_first_of(self.cut)}"
            )
        if self.other_sizes:
            warn_on_main(
                f"data: {_counted(self.other_sizes, 'annotation gives', 'annotations give')} a size that is not the "
                f"picture's, and the picture's counts: {_first_of(self.other_sizes)}"
            )


def _counted(places: list[str], one: str, several: str) -> str:
    return f"{len(places)} {one if len(places) == 1 else several}"


def _first_of(places: list[str]) -> str:
    first = places[0].removeprefix("data: ")
    return first if len(places) == 1 else f"{first} is the first"


def _voc_part(devkit: Path, key: str, sets: list[str], rules: Rules) -> Part:
    """The pictures of the image sets that the setting data.`key` names."""
    names = {}
    for image_set in sets:
        for name in _image_set(devkit, key, image_set):
            if name in names:
                raise InputError(
                    f"data.{key}: the picture {name} is in {names[name]} and in {image_set}: name one of them"
                )
            names[name] = image_set
    pictures = [_picture_path(devkit, name) for name in names]
    part = Part(list(names), [], partial(_open_path, pictures))
    # The size is that of the picture: the annotation's own `size` is not always right.
    annotations = [devkit / name.replace("/", "/Annotations/", 1) for name in names]
    part.objects = [
        read_annotation(path.with_name(f"{path.name}.xml"), part.size(i), rules) for i, path in enumerate(annotations)
    ]
    return part


def _open_path(paths: list[Path], i: int) -> Image.Image:
    return Image.open(paths[i])


def _image_set(devkit: Path, key: str, image_set: str) -> list[str]:
    """The pictures of `VOC2007/trainval`, each named `VOC2007/000005`; `key` is the setting of `data` that names the set."""
    year, _, name = image_set.partition("/")
    path = devkit / year / "ImageSets" / "Main" / f"{name}.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        there = sorted(
            f"{file.parts[-4]}/{file.stem}"
            for file in devkit.glob("*/ImageSets/Main/*.txt")
            if "_" not in file.stem  # those of one class
        )
        # No guess at which was meant: the nearest name to a training part that is missing may be the test part's.
        raise InputError(
            f"data.{key}: no image set {image_set!r} in {devkit}, which has {', '.join(there) or 'none'}"
        ) from None
    rows = [line.split() for line in lines if line.strip()]
    if not rows or any(len(row) != 1 for row in rows):
        what = "has a second column, as the sets of one class have" if rows else "names no picture"
        raise InputError(f"{path}: {what}; a set of pictures has one name a line")
    found = [f"{year}/{row[0]}" for row in rows]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise InputError(f"{path}: names {twice[0]} twice")
    return found


def _picture_path(devkit: Path, name: str) -> Path:
    year, _, stem = name.partition("/")
    for suffix in (".jpg", ".png", ".jpeg"):
        if (path := devkit / year / "JPEGImages" / f"{stem}{suffix}").is_file():
            return path
    raise InputError(f"{devkit / year / 'JPEGImages' / stem}.jpg: the picture is missing")


def read_annotation(path: Path, size: tuple[int, int], rules: Rules) -> Objects:
    """The objects of one of VOC's XML files about a picture of `size` (width, height).

    Only objects right below `annotation`, and of each only the box right below it, count: a person's parts have boxes of
    their own. Coordinates may be fractions; a box that reaches beyond the picture is cut at its edge, and `rules` counts it, as
    it does a `size` that is not the picture's; without `difficult` an object is not difficult; no object at all is a picture
    without objects. Raises InputError, naming the file, for broken XML, no or several boxes, a coordinate that is missing or no
    number, and a box without area or outside the picture.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason(error)}"
        raise InputError(f"{path}: the annotation {why}") from None
    if root.tag != "annotation":
        raise InputError(f"{path}: starts with <{root.tag}>, not <annotation>: no VOC annotation")
    if (said := _size_of(root)) not in (None, size):
        rules.other_sizes.append(f"{path} ({said[0]:g}×{said[1]:g}, the picture is {size[0]}×{size[1]})")
    rows = []
    for number, node in enumerate(root.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = (node.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{where} has no name")
        left, top, right, bottom = _coordinates(node, f"{where} ({name})")
        label = rules.label(name, str(path))
        if label is not None:
            box = rules.inside([left - 1, top - 1, right, bottom], size, f"{where} ({name})")
            rows.append((box, label, _difficult(node, f"{where} ({name})")))
    return Objects.of(rows)


def _size_of(root: ElementTree.Element) -> tuple[float, float] | None:
    """Width and height as an annotation gives them, NaN where that is no number; None where it does not."""
    size = root.find("size")
    return None if size is None else (_number(size, "width")[1], _number(size, "height")[1])


def _number(node: ElementTree.Element, key: str) -> tuple[str, float]:
    """What stands in a node's `key`: the text, and the number that it is, NaN where it is none."""
    text = (node.findtext(key) or "").strip()
    try:
        return text, float(text)
    except ValueError:
        return text, math.nan


def _coordinates(node: ElementTree.Element, where: str) -> list[float]:
    boxes = node.findall("bndbox")
    if len(boxes) != 1:
        raise InputError(f"{where} has {len(boxes) or 'no'} bndbox{'es' if boxes else ''}, one is wanted")
    found = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text, value = _number(boxes[0], key)
        if not math.isfinite(value):
            raise InputError(f"{where}: {key} should be a number, it is {text[:40]!r}")
        found.append(value)
    return found


def _difficult(node: ElementTree.Element, where: str) -> bool:
    text = (node.findtext("difficult") or "0").strip()
    if text not in ("0", "1"):
        raise InputError(f"{where}: difficult should be 0 or 1, it is {text[:40]!r}")
    return text == "1"


def mirrored(boxes: np.ndarray, width: int) -> np.ndarray:
    """The boxes [n, 4] of a picture of `width` once it is mirrored left–right."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


class Example(NamedTuple):
    """A picture as a float tensor [3, H, W] in [0, 1], and its boxes [n, 4] and labels [n] (from 1, as torchvision's)."""

    image: Tensor
    boxes: Tensor
    labels: Tensor


class _Examples(Dataset):
    """Decoded pictures by (epoch, index); mirrored as (seed, epoch, index) says, or not at all where `hflip` is 0."""

    def __init__(self, part: Part, hflip: float, seed: int):
        self.part, self.hflip, self.seed = part, hflip, seed

    def __len__(self):
        return len(self.part)

    def __getitem__(self, item: tuple[int, int]) -> Example | InputError:
        # An error that a worker raised would come back with its traceback as its text.
        try:
            return self._example(*item)
        except InputError as error:
            return error

    def _example(self, epoch: int, index: int) -> Example:
        pixels = np.array(self.part.picture(index))
        boxes, labels, _ = self.part.objects[index]
        draw = rng.uniform(rng.derive_key(self.seed, FLIP, epoch), torch.tensor([index])).item() if self.hflip else 1.0
        if draw < self.hflip:
            pixels, boxes = np.ascontiguousarray(pixels[:, ::-1]), mirrored(boxes, pixels.shape[1])
        image = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255)
        return Example(image, torch.from_numpy(boxes), torch.from_numpy(labels) + 1)


def examples(
    part: Part, batches: list[list[int]], epoch: int, workers: int, hflip: float = 0.0, seed: int = 0
) -> Iterator[list[Example]]:
    """The pictures of each of `batches` (indices into `part`). Raises InputError at one that cannot be decoded."""
    workers = min(workers, len(batches))  # none for no batch, as a rank may have
    numbered = [[(epoch, int(index)) for index in batch] for batch in batches]
    loader = DataLoader(
        _Examples(part, hflip, seed),
        batch_sampler=numbered,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context=WORKERS_START if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for pictures in loader:
        if errors := [each for each in pictures if isinstance(each, InputError)]:
            raise errors[0]
        yield pictures
