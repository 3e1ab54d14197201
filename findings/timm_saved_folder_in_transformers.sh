#!/usr/bin/env bash
# timm 1.0.31 with transformers 5.24.0: a folder that timm saves with other than the architecture's number of classes does not load
# in transformers' timm wrapper.
#
# `save_for_hf` writes `num_classes` twice, beside and inside `model_args`; transformers hands both to `create_model`. Without the
# one inside, both libraries load it.
# Seen: TypeError: …_create_timm_model_with_error_handling() got multiple values for keyword argument 'num_classes'; then loaded.
# Guess before the run: the TypeError. It was right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "timm==1.0.31" "transformers==5.24.0" "torch==2.14.1" "torchvision==0.29.1"
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/saved" 2>/dev/null <<'PY'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import timm
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification

folder = Path(sys.argv[1])
save_for_hf(timm.create_model("resnet10t", num_classes=4), folder)
config = json.loads((folder / "config.json").read_text())
try:
    AutoModelForImageClassification.from_pretrained(folder)
    said = "loaded"
except TypeError as error:
    said = f"TypeError: {error}"
del config["model_args"]["num_classes"]
(folder / "config.json").write_text(json.dumps(config))
classes = AutoModelForImageClassification.from_pretrained(folder).config.num_labels
print(f"timm {version('timm')}, transformers {version('transformers')}: {said}; without it {classes} classes")
assert "multiple values for keyword argument 'num_classes'" in said and classes == 4
PY
