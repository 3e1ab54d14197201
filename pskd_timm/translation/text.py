"""Pairs of sentences: from Hugging Face data sets, Parquet, JSON or plain files, cleaned by stated rules.

Cleaning: soft hyphens, zero-width spaces and byte-order marks go; every run of white space, no-break spaces among it,
becomes one blank; blanks at the ends go. Letters are made small only where the recipe says `lowercase`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, first_line, nearest
from ..recipe import Recipe

INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\ufeff"))
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
TABLE_READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
MOST_NAMED = 6  # files that a message names


@dataclass
class Pairs:
    """Cleaned sentences and their translations, of which `name` says the split and `numbers` the places in it, from 1."""

    name: str
    sources: list[str]
    targets: list[str]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, rows: list[int]) -> "Pairs":
        taken = ([column[i] for i in rows] for column in (self.sources, self.targets, self.numbers))
        return Pairs(self.name, *taken)


@dataclass
class Corpus:
    """The parts of a corpus: training, validation (None where there is none) and the test splits by name; what splits it has."""

    train: Pairs
    validation: Pairs | None
    tests: dict[str, Pairs]
    splits: tuple[str, ...]


def clean(text: str, lowercase: bool = False) -> str:
    """`text` by the rules above."""
    text = " ".join(text.translate(INVISIBLE).split())
    return text.lower() if lowercase else text


def read_corpus(recipe: Recipe) -> Corpus:
    """The parts that a recipe names. Raises InputError for what is missing or cannot be read."""
    data, section = recipe.data, recipe.translation
    splits = open_splits(recipe)
    train = _part(splits, data.train_split, "data.train_split", recipe)
    validation = section.validation_split or next((name for name in VALIDATION_SPLITS if name in splits), None)
    tests = (section.test_splits or [name for name in splits if name.startswith("test")]) if data.test else []
    if data.test and not tests:
        raise InputError(
            f"data: no test split among {', '.join(splits)}: name some with translation.test_splits, or train without "
            "with data.test false"
        )
    return Corpus(
        train,
        _part(splits, validation, "translation.validation_split", recipe) if validation else None,
        {name: _part(splits, name, "translation.test_splits", recipe) for name in tests},
        tuple(splits),
    )


def open_splits(recipe: Recipe) -> dict:
    """Each split's reader by name, nothing read yet but a table's head."""
    data = recipe.data
    if data.path is None:
        return _from_hub(data.source)
    folder = Path(data.path).expanduser()
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "not there: --data.path names where the text is now"
        raise InputError(f"data.path: {folder.absolute()} is {what}")
    if (folder / "dataset_dict.json").is_file():
        return _tables(lambda: _load_from_disk(folder), str(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if plain := _plain_files(files, recipe.translation):
        if tables := [path.name for path in files if path.suffix in TABLE_READERS]:
            from ..ranks import warn_on_main  # torch takes a second, and lines of a file are read without it

            warn_on_main(f"data.path: plain files are read, {', '.join(tables[:MOST_NAMED])} beside them not")
        return plain
    by_split: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix in TABLE_READERS:
            by_split.setdefault(SHARD.sub("", path.stem), []).append(path)
    if not by_split:
        section = recipe.translation
        there = ", ".join(path.name for path in files[:MOST_NAMED]) + ("" if len(files) <= MOST_NAMED else ", …")
        raise InputError(
            f"data.path: {folder} has neither Parquet or JSON files nor plain ones (train.{section.source_lang} beside "
            f"train.{section.target_lang}), it has {there or 'no files'}: translation.source_lang and target_lang name the "
            "languages"
        )
    for name, paths in by_split.items():
        _check_one_place(name, paths)
    return {name: _lazy_table(paths) for name, paths in by_split.items()}


def _check_one_place(split: str, paths: list[Path]):
    """Raise InputError where the files of a split lie in several folders: they may be versions of one another."""
    if other := next((path for path in paths if path.parent != paths[0].parent), None):
        raise InputError(
            f"data.path: {paths[0]} and {other} are both the split {split}: name the folder of one of them as data.path"
        )


def _plain_files(files: list[Path], section) -> dict:
    """Plain files, a sentence a line, by what stands before the language: train.de and train.en."""
    found = {}
    for path in files:
        if path.suffix == f".{section.source_lang}":
            other = path.with_suffix(f".{section.target_lang}")
            if not other.is_file():
                raise InputError(f"data.path: {path} has no {other.name} beside it")
            _check_one_place(path.stem, [*found.get(path.stem, ())[:1], path])
            found[path.stem] = (path, other)
    return found


def _lazy_table(paths: list[Path]):
    def load():
        import datasets

        reader = TABLE_READERS[paths[0].suffix]
        return datasets.load_dataset(reader, data_files={"train": [str(path) for path in paths]}, split="train")

    named = ", ".join(map(str, paths[:MOST_NAMED])) + ("" if len(paths) <= MOST_NAMED else ", …")
    return lambda: _guarded(load, f"data.path: {named}")


def _load_from_disk(folder: Path):
    import datasets

    return datasets.load_from_disk(str(folder))


def _from_hub(name: str) -> dict:
    """A data set of the hub, its configuration behind a colon (wmt/wmt16:de-en)."""
    hub_id, _, config = name.partition(":")

    def read():
        import datasets

        return datasets.load_dataset(hub_id, config or None)

    return _tables(read, f"data.source: {name!r} on the Hugging Face hub")


def _tables(read, where: str) -> dict:
    splits = _guarded(read, where)
    if not hasattr(splits, "items"):
        raise InputError(f"{where}: a data set with named splits is wanted (a DatasetDict)")
    return {split: (lambda table=table: table) for split, table in splits.items()}


def _guarded(read, where: str):
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read is raised as well
    try:
        return read()
    except InputError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        cause = error
        while cause.__cause__ is not None:  # the outermost one says only that a data set could not be made
            cause = cause.__cause__
        line = first_line(cause)
        raise InputError(f"{where}: cannot be read: {line}") from None


def _part(splits: dict, name: str, setting: str, recipe: Recipe) -> Pairs:
    """The cleaned pairs of the split `name`, which `setting` asks for."""
    if name not in splits:
        raise InputError(f"{setting}: no split {name!r} in the data, it has {', '.join(splits)}{nearest(name, splits)}")
    section, opened = recipe.translation, splits[name]
    if isinstance(opened, tuple):
        sources, targets = (read_lines(path) for path in opened)
        if len(sources) != len(targets):
            source, target = opened
            raise InputError(
                f"data.path: {source} has {len(sources):,} lines, {target.name} {len(targets):,}: line i of one is "
                "the translation of line i of the other"
            )
    else:
        where = f"data.path: split {name}" if recipe.data.path else f"data.source: split {name}"
        table = _guarded(opened, where)
        sources, targets = (_column(table, lang, name) for lang in (section.source_lang, section.target_lang))
    if not sources:
        raise InputError(f"data: the {name} split has no pairs")
    return Pairs(
        name,
        [clean(text, section.lowercase) for text in sources],
        [clean(text, section.lowercase) for text in targets],
        range(1, len(sources) + 1),
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Raises InputError where it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return split_lines(content, str(path))


def split_lines(content: bytes, name: str) -> list[str]:
    """The lines of UTF-8 text; only line feeds end one, another separator inside a sentence does not."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{name} line {line}: not UTF-8: save the text as UTF-8") from None
    return text.removesuffix("\n").split("\n") if text else []


def _column(table, lang: str, split: str) -> list[str]:
    """One language's texts: its own column's, or those under its key in the column `translation`."""
    if lang in table.column_names:
        texts = list(table[lang])
    elif "translation" in table.column_names:
        rows = list(table["translation"])
        if bad := next((i for i, row in enumerate(rows, 1) if row and not isinstance(row, dict)), 0):
            what = f"{str(rows[bad - 1])[:40]!r} under 'translation', no mapping of languages"
            raise InputError(f"data: row {bad} of split {split} holds {what}")
        keys = {key for row in rows for key in row or ()}
        if lang not in keys:
            raise InputError(f"data: the translations of split {split} have {', '.join(sorted(keys))}, not {lang!r}")
        texts = [row.get(lang) if row else None for row in rows]
    else:
        there = ", ".join(table.column_names)
        raise InputError(
            f"data: split {split} has no column {lang!r} and no column 'translation', it has {there}: "
            "translation.source_lang and target_lang name them"
        )
    if bad := next((i for i, text in enumerate(texts, 1) if text is not None and not isinstance(text, str)), 0):
        raise InputError(
            f"data: row {bad} of split {split} holds {str(texts[bad - 1])[:40]!r} under {lang!r}, which is no text"
        )
    return ["" if text is None else text for text in texts]
