"""HF data sets with boxes: a column of pictures, and one of objects with `bbox` and `category`."""

import io
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError, first_line
from .data import Objects, Part, Rules
from .settings import Data as DataSection


def open_hf(section: DataSection) -> tuple[list[Part], list[str], Rules]:
    """Training and test part, the classes' names, and what became of data that do not quite fit.

    The names are the recipe's, else those of the category's ClassLabel, else the sorted words that the training part has.
    """
    splits = _load(section)
    chosen = [[_split(splits, key, name) for name in getattr(section, key)] for key in ("train", "test")]
    for dataset in (dataset for of in chosen for dataset in of):
        for setting in ("image_column", "objects_column"):
            column = getattr(section, setting)
            if column not in dataset.column_names:
                there = ", ".join(dataset.column_names)
                raise InputError(f"data.{setting}: no column {column!r} in the data, it has {there}")
    known = _category_names(chosen[0][0].features[section.objects_column])
    names = section.class_names or known or _words(chosen[0], section)
    rules = Rules(section.other_names, names)
    parts = [
        _joined([_part(dataset, name, section, known, rules) for dataset, name in zip(of, keys, strict=True)])
        for of, keys in zip(chosen, (section.train, section.test), strict=True)
    ]
    return parts, names, rules


def _load(section: DataSection) -> dict:
    import datasets

    datasets.disable_progress_bars()
    source = section.source or str(Path(section.path).expanduser().resolve())
    try:
        if section.path and (Path(source, "dataset_dict.json").is_file() or Path(source, "state.json").is_file()):
            saved = datasets.load_from_disk(source)
            return saved if isinstance(saved, dict) else {"train": saved}
        return datasets.load_dataset(source)
    except Exception as error:  # the library raises whatever its readers raise
        setting = "path" if section.path else "source"
        why = first_line(error)
        raise InputError(
            f"data.{setting}: {source} holds neither VOC's folders nor a data set with boxes: {why}"
        ) from None


def _split(splits: dict, key: str, name: str):
    if name not in splits:
        raise InputError(f"data.{key}: no split {name!r} in the data, which has {', '.join(splits)}")
    return splits[name]


def _category_names(feature) -> list[str] | None:
    """The names of the objects' categories, where the data set gives them."""
    inner = getattr(feature, "feature", feature)
    inner = inner[0] if isinstance(inner, list) else inner
    category = inner.get("category") if isinstance(inner, dict) else None
    return getattr(getattr(category, "feature", category), "names", None)


def _words(datasets_: list, section: DataSection) -> list[str]:
    found = {
        category
        for dataset in datasets_
        for objects in dataset[section.objects_column]
        for category in _columns(objects).get("category", ())
    }
    if not found or not all(isinstance(each, str) for each in found):
        raise InputError(
            f"data.objects_column: the categories in {section.objects_column} are numbers without names: "
            "data.class_names gives them"
        )
    return sorted(found)


def _columns(objects) -> dict[str, list]:
    """A picture's objects as lists by name, whether stored so or as a list of objects."""
    if isinstance(objects, list):
        return {key: [each.get(key) for each in objects] for key in (objects[0] if objects else ())}
    return dict(objects or {})


def _part(dataset, split: str, section: DataSection, known: list[str] | None, rules: Rules) -> Part:
    pictures = _encoded(dataset, section.image_column)
    names = [f"{split}/{row}" for row in range(len(dataset))]
    opened = partial(_open, pictures, section.image_column)
    part = Part(names, [], opened)
    part.objects = [
        _objects(_columns(each), part.size(row), section, known, rules, f"data: picture {names[row]}")
        for row, each in enumerate(dataset[section.objects_column])
    ]
    return part


def _encoded(dataset, column: str):
    """The pictures as a data set of one column that gives them encoded."""
    from datasets import Image as ImageFeature

    if not isinstance(dataset.features[column], ImageFeature):
        raise InputError(f"data.image_column: {column} holds no pictures (HF's Image), but {dataset.features[column]}")
    return dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False))


def _open(pictures, column: str, row: int) -> Image.Image:
    """The row-th picture, of which only the head is read; boxes are of its pixels as they are stored."""
    stored = pictures[row][column]
    if stored is None:
        raise ValueError("there is none")
    return Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))


def _objects(
    columns: dict[str, list],
    size: tuple[int, int],
    section: DataSection,
    known: list[str] | None,
    rules: Rules,
    where: str,
) -> Objects:
    if not columns:
        return Objects.of([])
    if missing := {"bbox", "category"} - columns.keys():
        raise InputError(f"{where}: its objects have no {sorted(missing)[0]!r}, only {', '.join(columns)}")
    hard = columns.get("difficult") or [False] * len(columns["bbox"])
    counts = [len(values) for values in (columns["bbox"], columns["category"], hard)]
    if len(set(counts)) > 1:
        raise InputError(
            f"{where}: has {counts[0]} bbox, {counts[1]} category and {counts[2]} difficult: one an object"
        )
    rows = []
    for number, (box, category, difficult) in enumerate(
        zip(columns["bbox"], columns["category"], hard, strict=True), 1
    ):
        of_object = f"{where}, object {number}"
        corners = _corners(box, section.box_format, of_object)
        label = rules.label(_name(category, known or section.class_names, of_object), of_object)
        if label is not None:
            rows.append((rules.inside(corners, size, of_object), label, bool(difficult)))
    return Objects.of(rows)


def _corners(box: Any, box_format: str, where: str) -> list[float]:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(each) for each in box):
        raise InputError(f"{where}: a bbox should be four numbers, it is {str(box)[:60]}")
    left, top, *rest = map(float, box)
    return [left, top, left + rest[0], top + rest[1]] if box_format == "xywh" else [left, top, *rest]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _name(category, names: list[str] | None, where: str) -> str:
    if isinstance(category, str):
        return category
    if not isinstance(category, int) or not names or category not in range(len(names)):
        raise InputError(f"{where}: the category {category!r} is none of {len(names or ())} classes")
    return names[category]


def _joined(parts: list[Part]) -> Part:
    """Several splits as one part."""
    places = [(part, row) for part in parts for row in range(len(part))]
    return Part(
        [name for part in parts for name in part.names],
        [objects for part in parts for objects in part.objects],
        partial(_open_in, places),
    )


def _open_in(places: list[tuple[Part, int]], i: int):
    part, row = places[i]
    return part.open(row)
