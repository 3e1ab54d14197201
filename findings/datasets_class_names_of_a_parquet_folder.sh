#!/usr/bin/env bash
# datasets 5.2.0: in a folder of Parquet files every split gets the class names of one file, whatever the others say.
#
# Train numbers its classes cat 0, dog 1; test numbers them dog 0, cat 1, and each file says so in its own schema. Loaded as a
# folder, test keeps its numbers and takes train's names: a picture of a dog is labelled `cat`, without a warning, and a
# classifier without a mistake scores an error of 100 %. Loaded file by file, both are right.
# Seen: {'train': ['cat', 'dog'], 'test': ['cat', 'dog']}; the test row that was written as dog reads cat.
# Guess before the run: one file's names for all splits, silently. It was right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "datasets==5.2.0"
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/data" <<'PY'
import sys
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
folder.mkdir()
for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
    features = Features({"picture": Value("string"), "label": ClassLabel(names=names)})
    rows = {"picture": ["of a cat", "of a dog"], "label": [names.index("cat"), names.index("dog")]}
    Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")

loaded = load_dataset(str(folder))
names = {split: part.features["label"].names for split, part in loaded.items()}
dog = next(row for row in loaded["test"] if row["picture"] == "of a dog")
read = loaded["test"].features["label"].int2str(dog["label"])
alone = load_dataset("parquet", data_files=str(folder / "test.parquet"), split="train").features["label"].names
print(f"datasets {datasets.__version__}: {names}; the test picture of a dog is labelled {read!r}; alone: {alone}")
assert names == {"train": ["cat", "dog"], "test": ["cat", "dog"]} and read == "cat" and alone == ["dog", "cat"]
PY
