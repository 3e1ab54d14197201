#!/usr/bin/env bash
# The tests on the oldest versions that setup.cfg allows, in an environment of their own; too long for every run:
#   bash tests/floors.sh FOLDER [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift
python3 -m venv "$folder"
. "$folder/bin/activate"
# A package may stand in several extras (transformers), with one floor.
wanted=$(sed -n 's/^    \([A-Za-z0-9_-]*\)>=\([0-9.]*\)$/\1 \2/p' setup.cfg | awk '!seen[$1]++ {
  print ($1 ~ /^(torch|torchvision|timm|accelerate|datasets|transformers)$/) ? $1 "==" $2 ".*" : $1 ">=" $2 }')
pip install -q $wanted
pip install -q --no-deps --no-build-isolation -e .
pip list | grep -iE '^(torch|torchvision|timm|accelerate|datasets|transformers|pydantic|numpy) '
pytest "$@"
