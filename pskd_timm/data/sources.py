"""Where images come from: each source opens as tables of encoded images and labels, nothing decoded yet."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, first_line, nearest
from ..ranks import warn_on_main
from ..recipe import Data as DataSection
from .subsets import name_some, stratified_split


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
TEST_SPLITS = ("test", "validation", "val", "valid")
ARCHIVE_CLUTTER = "__MACOSX"  # what macOS adds to its archives
FOLDER_COLUMNS = ["image", "label", "bytes", "stamp"]  # of a folder of images as a table


class Sizes(NamedTuple):
    """What is known of a data set before it is decoded."""

    num_train: int
    num_test: int
    num_classes: int
    image_size: int | None


@dataclass(frozen=True)
class Table:
    """The samples in the `rows` [N] (int64) of an HF `Dataset`, with the names of its image and label columns.

    `folder` is the one that the images' files lie under, None where they are no files.
    """

    dataset: object
    rows: Tensor
    image_column: str
    label_column: str
    folder: Path | None = None

    def __len__(self):
        return len(self.rows)

    @property
    def selected(self):
        """The rows as an HF `Dataset`."""
        return self.dataset if len(self) == len(self.dataset) else self.dataset.select(self.rows)

    @property
    def encoded_images(self):
        """All images of the `Dataset` as one of a single column that gives them encoded."""
        from datasets import Image

        column = self.dataset.select_columns([self.image_column])
        if isinstance(column.features[self.image_column], Image):
            column = column.cast_column(self.image_column, Image(decode=False))
        return column

    @property
    def class_names(self) -> list[str]:
        """The names that the labels 0 … K − 1 stand for, or the sorted distinct labels where they are not numbered."""
        return self._numbered_names() or [str(label) for label in sorted(set(self._label_values()))]

    def labels(self, split: str, class_names: list[str]) -> Tensor:
        """The label numbers int64 [N]; InputError, which calls the table the `split` split, where they are none."""
        values, names = self._label_values(), self._numbered_names()
        if not values:
            raise InputError(f"data: the {split} split has no samples")
        if names is not None and (unlabelled := values.count(-1)):  # the way of HF's test splits without labels
            raise InputError(
                f"data: {unlabelled} of {len(values)} samples of the {split} split have the label −1, which stands for none"
            )
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
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise InputError(f"data: the {split} split must be labelled 0 … {len(class_names) - 1}")
        return labels

    def paths(self, rows: Tensor) -> list[str] | None:
        """The files of `rows` of the `Dataset`, relative to `folder`; None where there is no folder."""
        if self.folder is None:
            return None
        import pyarrow.compute as arrow

        paths = arrow.struct_field(self.dataset.data.column(self.image_column), "path").take(rows.numpy())
        return [path.removeprefix(f"{self.folder}/") for path in paths.to_pylist()]

    def _numbered_names(self) -> list[str] | None:
        return getattr(self.dataset.features[self.label_column], "names", None)

    def _label_values(self) -> list:
        values = list(self.selected[self.label_column])
        kinds = {type(value) for value in values}
        if not (kinds <= {int} or kinds <= {str} or kinds <= {bool}):
            raise InputError(f"data.label_column: {self.label_column} {_wrong_labels(values)}")
        return values


def _wrong_labels(values: list) -> str:
    """What is wrong with labels that are neither whole numbers nor words."""
    missing = [row for row, value in enumerate(values) if value is None or value != value]
    if missing:
        return f"is empty for {len(missing)} of {len(values)} samples, first for sample {missing[0]}: leave these out"
    others = [value for value in values if not isinstance(value, int | str)]
    if not others:
        return "holds numbers and words, mixed: a class is one or the other"
    if isinstance(others[0], float):
        return f"holds decimal numbers ({others[0]}), as for a regression: a class is a whole number or a word"
    return f"holds {str(others[0])[:40]}: it should hold one class a sample, a whole number or a word"


def known_sizes(section: DataSection) -> Sizes | None:
    """The sizes of a well-known source as it is published, without opening it; None for every other one and local copies."""
    source = SOURCES.get(section.source or "")
    if source is None or section.path is not None or section.test_fraction:
        return None
    return Sizes(source.num_train, source.num_test, source.num_classes, source.image_size)


def open_tables(section: DataSection) -> tuple[Table, Table | None]:
    """The training and the test table (None without `test`) of a recipe's data. Raises InputError where one is missing."""
    splits = _digits() if section.source == "digits" else _open(section)
    train = _table(splits, section.train_split, "data.train_split", section)
    test = None
    if section.test_fraction:
        if unused := [name for name in TEST_SPLITS if name in splits and name != section.train_split]:
            warn_on_main(
                f"data.test_fraction: the test part comes from {section.train_split}, {unused[0]} stays unused"
            )
        names = train.class_names
        kept, taken = stratified_split("test_fraction", section, train.labels("train", names), names)
        train, test = replace(train, rows=kept), replace(train, rows=taken)
    elif section.test:
        name = section.test_split or _test_split(splits)
        test = _table(splits, name, "data.test_split", section)
    return train, test if section.test else None


def open_images(name: str) -> Table:
    """The images of a data set, a local folder, a well-known name or a hub id, of its test split where it has one.

    Labels are not looked at. Raises InputError where there is no such data set or no column of images in it.
    """
    section = DataSection(**{"path" if Path(name).expanduser().is_dir() else "source": name})
    splits = _digits() if section.source == "digits" else _open(section)
    dataset = splits[next((split for split in TEST_SPLITS if split in splits), next(iter(splits)))]
    column = _column_names(section)[0]
    column = next((key for key, kind in dataset.features.items() if type(kind).__name__ == "Image"), column)
    if column not in dataset.column_names:
        raise InputError(f"{name}: no column of images in the data, it has {', '.join(dataset.column_names)}")
    return Table(dataset, torch.arange(len(dataset)), column, "")


def _digits() -> dict:
    """8×8 images of handwritten digits in 17 grey levels, two thirds to train on.

    The 1797 that scikit-learn ships, drawn once by its stratified `train_test_split` (random_state 0), from: E. Alpaydin,
    C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998, CC BY 4.0.
    """
    from datasets import Dataset
    from pyarrow.parquet import read_table

    folder = Path(__file__).with_name("digits")
    return {part: Dataset(read_table(folder / f"{part}.parquet")) for part in ("train", "test")}


def _open(section: DataSection) -> dict:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read is raised as well
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
        is_table = any(path.name.lower().endswith(TABLE_SUFFIXES) for path in _files(folder))
        splits = _load(str(folder.resolve()), section) if is_table else {}
    except Exception as error:  # the library raises whatever its readers raise
        raise InputError(f"data.path: {folder} cannot be read as a data set: {first_line(error)}") from None
    return (
        _with_own_class_names(splits, str(folder.resolve()), section) if is_table else _image_folders(folder, section)
    )


def _load(name: str, section: DataSection) -> dict:
    """The splits of a folder or hub id; without `test` only the training split's files are read."""
    import datasets

    if section.test:
        return datasets.load_dataset(name)
    builder = datasets.load_dataset_builder(name)
    files = {str(split): paths for split, paths in builder.config.data_files.items()}
    training = {section.train_split: files[section.train_split]} if section.train_split in files else files
    return datasets.load_dataset(builder.name, data_files=training, features=builder.info.features)


def _with_own_class_names(splits: dict, name: str, section: DataSection) -> dict:
    """`splits` of a folder or hub id with the class names that stand in each one's own files.

    The library takes the first file's for all.
    """
    import datasets

    column = _column_names(section)[1]
    files = datasets.load_dataset_builder(name).config.data_files or {}  # none where the hub is not asked
    names = {split: _class_names_in(paths, column, split) for split, paths in files.items() if split in splits}
    if len({tuple(each) for each in names.values() if each}) < 2:
        return splits
    features = {split: datasets.ClassLabel(names=each) for split, each in names.items() if each}
    return {**splits, **{split: splits[split].cast_column(column, feature) for split, feature in features.items()}}


def _class_names_in(files: list[str], column: str, split: str) -> list[str] | None:
    """The class names of `column` that Parquet and Arrow files hold in their schema; None where they hold none.

    Of files elsewhere than on this machine the first one is read.
    """
    here = [file for file in files if os.path.isfile(file)] or files[:1]
    found = {tuple(names): file for file in here if (names := _names_in(file, column))}
    if len(found) > 1:
        raise InputError(
            f"data: the files of the {split} split number its classes differently: {', '.join(list(found.values())[:2])}"
        )
    return list(next(iter(found))) if found else None


def _names_in(file: str, column: str) -> list[str] | None:
    import fsspec
    import pyarrow
    from pyarrow import parquet

    if not file.endswith((".parquet", ".arrow")):
        return None
    with fsspec.open(file, "rb") as source:  # of a file on the hub it reads the schema alone
        is_parquet = file.endswith(".parquet")
        schema = parquet.read_schema(source) if is_parquet else pyarrow.ipc.open_stream(source).schema
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = about.get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if isinstance(feature, dict) else None


def _image_folders(folder: Path, section: DataSection) -> dict:
    """Folders of images a class: below folders named as the splits are, or right here.

    Read literally: the HF reader takes a class or file whose name has `test` or `dev` in it for a split.
    """
    inside = {path.name: path for path in _folders(folder)}
    tests = [section.test_split] if section.test_split else TEST_SPLITS
    splits = [name for name in (section.train_split, *tests) if name in inside]
    if section.train_split not in splits:
        return {section.train_split: _image_folder(folder)}
    holds_classes = any(image_files(each) for each in _folders(inside[section.train_split]))
    if len(splits) == 1 and len(inside) > 1 and not holds_classes:  # a class that is called train
        return {section.train_split: _image_folder(folder)}
    if len(splits) == 1 and len(inside) > 1:
        others = name_some([name for name in inside if name not in splits])
        warn_on_main(
            f"data.path: beside {section.train_split}, {others} in {folder} stays unread (data.test_split names one)"
        )
    return {name: _image_folder(inside[name]) for name in splits}


def _folders(folder: Path) -> list[Path]:
    """The folders in one, by name, without those that are none of the user's."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not is_clutter(path.name)]


def is_clutter(name: str) -> bool:
    """Whether a file or folder is one that programs leave behind: .ipynb_checkpoints, .Trash, ._x.jpg, __MACOSX."""
    return name.startswith(".") or name == ARCHIVE_CLUTTER


def image_files(folder: Path) -> list[Path]:
    """The image files at any depth below `folder`, sorted; by their suffix, clutter left out."""
    return sorted(path for path in _files(folder) if path.name.lower().endswith(PICTURE_SUFFIXES))


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError):
        raise InputError(f"{error.filename} cannot be read: {error.strerror}")

    for path, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_clutter(name)]
        yield from (Path(path, name) for name in files if not is_clutter(name))


def _image_folder(folder: Path):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    files = {path.name: image_files(path) for path in _folders(folder)}
    classes = [name for name in files if files[name]]
    ignored = [name for name in files if not files[name]]
    ignored += [ARCHIVE_CLUTTER] * (folder / ARCHIVE_CLUTTER).is_dir()
    if not classes:
        raise InputError(f"data.path: {folder} has no folders of images: it should hold one for each class")
    if ignored:
        warn_on_main(f"data: {folder} has folders without images, which are no classes: {name_some(ignored)}")
    columns = {"image": Image(), "label": ClassLabel(names=classes), "bytes": Value("int64"), "stamp": Value("int64")}
    rows = [(str(file), label, *_stamp(file)) for label, name in enumerate(classes) for file in files[name]]
    try:
        return Dataset.from_dict(dict(zip(columns, zip(*rows, strict=True), strict=True)), features=Features(columns))
    except UnicodeEncodeError:
        odd = next(path for path, *_ in rows if not path.isprintable())
        shown = os.fsencode(odd).decode(errors="replace")
        raise InputError(f"data.path: {shown}: its name is no UTF-8 text: rename it") from None


def _stamp(file: Path) -> tuple[int, int]:
    """Bytes of a file and when it was changed last, which no program can set back: a changed file is decoded again."""
    try:
        status = file.stat()
    except OSError:  # a link to nowhere: a damaged image
        return 0, 0
    return status.st_size, status.st_ctime_ns


def _from_hub(hub_id: str, section: DataSection) -> dict:
    try:
        return _with_own_class_names(_load(hub_id, section), hub_id, section)
    except InputError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        hint = nearest(hub_id, SOURCES) or " (data.path reads a local folder)"
        raise InputError(
            f"data.source: {hub_id!r} cannot be had from the Hugging Face hub{hint}: {first_line(error)}"
        ) from None


def _test_split(splits: dict) -> str:
    name, *others = [name for name in TEST_SPLITS if name in splits] or [None]
    if name is None:
        raise InputError(
            f"data: no test split among {', '.join(splits)}: name one with data.test_split, "
            "or take part of the training split with data.test_fraction 0.2"
        )
    if others:
        warn_on_main(f"data: tests on {name}; {' and '.join(others)} stays unused (data.test_split chooses another)")
    return name


def _table(splits: dict, name: str, setting: str, section: DataSection) -> Table:
    if name not in splits:
        raise InputError(f"{setting}: no split {name!r} in the data, it has {', '.join(splits)}")
    dataset, (image_column, label_column) = splits[name], _column_names(section)
    for kind, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in dataset.column_names:
            there, hint = ", ".join(dataset.column_names), nearest(column, dataset.column_names)
            raise InputError(f"data.{kind}: no column {column!r} in the data, it has {there}{hint}")
    is_folder = dataset.column_names == FOLDER_COLUMNS
    return Table(
        dataset,
        torch.arange(len(dataset)),
        image_column,
        label_column,
        Path(section.path).expanduser() if is_folder else None,
    )


def _column_names(section: DataSection) -> tuple[str, str]:
    """Those of the images and of the labels."""
    source = SOURCES.get(section.source or "")
    return (
        section.image_column or (source.image_column if source else "image"),
        section.label_column or (source.label_column if source else "label"),
    )
