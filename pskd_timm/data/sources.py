"""Where images come from: each source opens as tables of encoded images and labels, nothing decoded yet."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, nearest
from ..recipe import Data as DataSection
from .parts import part_off


class Source(NamedTuple):
    """A well-known data set: its hub id, the columns to read and its size."""

    hub_id: str
    image_column: str
    label_column: str
    num_train: int
    num_test: int
    num_classes: int
    image_size: int | None  # None where images differ in size


SOURCES = {
    "cifar10": Source("uoft-cs/cifar10", "img", "label", 50_000, 10_000, 10, 32),
    "cifar100": Source("uoft-cs/cifar100", "img", "fine_label", 50_000, 10_000, 100, 32),
    "imagenet": Source("ILSVRC/imagenet-1k", "image", "label", 1_281_167, 50_000, 1000, None),
    "digits": Source("", "image", "label", 1_200, 597, 10, 8),
}
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
PICTURE_SUFFIXES += (".avif", ".heic", ".heif")  # which Pillow may not read: named then, not passed over
TEST_SPLITS = ("test", "validation", "val")


class Sizes(NamedTuple):
    """What is known of a data set before it is decoded."""

    num_train: int
    num_test: int
    num_classes: int
    image_size: int | None


class Table(NamedTuple):
    """One split: an HF `Dataset` and the names of its image and label columns."""

    dataset: object
    image_column: str
    label_column: str

    @property
    def class_names(self) -> list[str]:
        """The names that the labels 0 … K − 1 stand for, or the sorted distinct labels where they are not numbered."""
        names = getattr(self.dataset.features[self.label_column], "names", None)
        return names or [str(label) for label in sorted(set(self._values()))]

    def labels(self, split: str, class_names: list[str]) -> Tensor:
        """The label numbers int64 [N]; InputError, which calls the table the `split` split, where they are none."""
        values, names = self._values(), getattr(self.dataset.features[self.label_column], "names", None)
        if names != class_names:  # a test split may number its classes in its own way, or lack some
            class_of = {
                value: names[value] if value in range(len(names or ())) else str(value) for value in set(values)
            }
            if unknown := sorted(set(class_of.values()) - set(class_names)):
                raise InputError(
                    f"data: the {split} split has the label {unknown[0]!r}, which the training split has not"
                )
            number = {name: i for i, name in enumerate(class_names)}
            values = [number[class_of[value]] for value in values]
        labels = torch.tensor(values)
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(class_names):
            raise InputError(f"data: the {split} split must have samples, labelled 0 … {len(class_names) - 1}")
        return labels

    def _values(self) -> list:
        values = list(self.dataset[self.label_column])
        kinds = {type(value) for value in values}
        if not (kinds <= {int} or kinds <= {str} or kinds <= {bool}):
            example = next(value for value in values if type(value) not in (int, str) or len(kinds) > 1)
            raise InputError(
                f"data.label_column: {self.label_column} should hold a number or a word a sample, it holds {str(example)[:40]}"
            )
        return values


def known_sizes(section: DataSection) -> Sizes | None:
    """The sizes of a well-known source as it is published, without opening it; None for every other one and local copies."""
    source = SOURCES.get(section.source or "")
    if source is None or section.path is not None or section.test_fraction:
        return None
    return Sizes(source.num_train, source.num_test, source.num_classes, source.image_size)


def open_tables(section: DataSection) -> tuple[Table, Table | None]:
    """The training and the test table (None without `test`) of a recipe's data. Raises InputError where one is missing."""
    splits = _digits() if section.source == "digits" else _open(section)
    train = _take(splits, section.train_split, "data.train_split")
    if section.test_fraction:
        table = _checked(train, section)
        labels = table.labels("train", table.class_names)
        parts = part_off("test_fraction", section, labels, table.class_names)
        train, test = (train.select(rows) for rows in parts)
    elif section.test:
        test = _take(splits, section.test_split or _test_split(splits, section), "data.test_split")
    return _checked(train, section), _checked(test, section) if section.test else None


def _digits() -> dict:
    """Handwritten digits (UCI, as scikit-learn ships them): 8×8, 17 grey levels; two thirds to train on."""
    import numpy as np
    from datasets import Array3D, ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)
    parts = train_test_split(
        images, digits.target, test_size=SOURCES["digits"].num_test, stratify=digits.target, random_state=0
    )
    features = Features({"image": Array3D((8, 8, 3), "uint8"), "label": ClassLabel(names=[str(d) for d in range(10)])})

    def table(images, labels):
        return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)

    return {"train": table(parts[0], parts[2]), "test": table(parts[1], parts[3])}


def _open(section: DataSection) -> dict:
    import datasets

    datasets.disable_progress_bars()
    source = SOURCES.get(section.source or "")
    if section.path is None:
        return _from_hub(source.hub_id if source else section.source, section)
    folder = Path(section.path).expanduser()
    if not folder.is_dir():
        raise InputError(f"data.path: {folder} is {'a file, not a folder' if folder.exists() else 'not there'}")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            if not section.test and (folder / section.train_split).is_dir():
                return {section.train_split: datasets.load_from_disk(str(folder / section.train_split))}
            saved = datasets.load_from_disk(str(folder))
            return saved if isinstance(saved, dict) else {"train": saved}
        if any(path.suffix.lower() in TABLE_SUFFIXES for path in folder.rglob("*")):
            return _load(str(folder.resolve()), section)
    except Exception as error:  # the library raises whatever its readers raise
        raise InputError(f"data.path: {folder} cannot be read as a data set: {_first_line(error)}") from None
    return _image_folders(folder, section)


def _load(name: str, section: DataSection) -> dict:
    """The splits of a folder or hub id; without `test` only the training split's files are read."""
    import datasets

    if section.test:
        return datasets.load_dataset(name)
    builder = datasets.load_dataset_builder(name)
    files = {str(split): paths for split, paths in builder.config.data_files.items()}
    training = {section.train_split: files[section.train_split]} if section.train_split in files else files
    return datasets.load_dataset(builder.name, data_files=training, features=builder.info.features)


def _image_folders(folder: Path, section: DataSection) -> dict:
    """Folders of images a class: below folders named as the splits are, or right here.

    Read literally: the HF reader takes a class or file whose name has `test` or `dev` in it for a split.
    """
    inside = {path.name: path for path in _folders(folder)}
    tests = [section.test_split] if section.test_split else TEST_SPLITS
    splits = [name for name in (section.train_split, *tests) if name in inside]
    if section.train_split in splits and (len(splits) > 1 or len(inside) == 1):
        return {name: _image_folder(inside[name]) for name in splits}
    return {section.train_split: _image_folder(folder)}


def _folders(folder: Path) -> list[Path]:
    """The folders in one, by name; hidden ones (.ipynb_checkpoints) are none of the user's."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _image_folder(folder: Path):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    classes = _folders(folder)
    rows = {"image": [], "label": [], "stamp": []}
    for label, path in enumerate(classes):
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in PICTURE_SUFFIXES:
                rows["image"].append(str(file))
                rows["label"].append(label)
                rows["stamp"].append(file.stat().st_mtime_ns)  # part of the fingerprint: a changed file is decoded anew
    if not rows["image"]:
        raise InputError(f"data.path: {folder} has no folders of images: it should hold one for each class")
    names = ClassLabel(names=[path.name for path in classes])
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": names, "stamp": Value("int64")}))


def _from_hub(hub_id: str, section: DataSection) -> dict:
    try:
        return _load(hub_id, section)
    except Exception as error:  # the library raises whatever its readers raise
        hint = nearest(hub_id, SOURCES) or " (data.path reads a local folder)"
        raise InputError(
            f"data.source: {hub_id!r} cannot be had from the Hugging Face hub{hint}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _test_split(splits: dict, section: DataSection) -> str:
    if name := next((name for name in TEST_SPLITS if name in splits), None):
        return name
    raise InputError(
        f"data: no test split among {', '.join(splits)}: name one with data.test_split, "
        "or take part of the training split with data.test_fraction 0.2"
    )


def _take(splits: dict, name: str, setting: str):
    if name not in splits:
        raise InputError(f"{setting}: no split {name!r} in the data, it has {', '.join(splits)}")
    return splits[name]


def _checked(dataset, section: DataSection) -> Table:
    source = SOURCES.get(section.source or "")
    image_column = section.image_column or (source.image_column if source else "image")
    label_column = section.label_column or (source.label_column if source else "label")
    for setting, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in dataset.column_names:
            there, hint = ", ".join(dataset.column_names), nearest(column, dataset.column_names)
            raise InputError(f"data.{setting}: no column {column!r} in the data, it has {there}{hint}")
    return Table(dataset, image_column, label_column)
