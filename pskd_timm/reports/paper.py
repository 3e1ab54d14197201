"""The figures of the paper (Kim et al., ICCV 2021), kept in paper_results.csv: error and ECE in %, NLL in nats, AURC × 10³."""

from pathlib import Path

import pandas as pd

from ..methods import METHOD_SECTIONS
from ..recipe import Recipe
from ..recipe_files import find_recipe, load_recipe, read_yaml, shipped_recipes

SOURCE = "Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021"

PAPER_NAMES = {
    "cifar_preact_resnet18": "PreAct ResNet-18",
    "cifar_preact_resnet101_paper": "PreAct ResNet-101",
    "cifar_densenet121": "DenseNet-121",
    "cifar_resnext29_8x64d": "ResNeXt-29",
    "cifar_pyramidnet200_a240": "PyramidNet-200",
    "cifar_pyramidnet200_a240_shakedrop": "PyramidNet-200 + ShakeDrop",
    "resnet152": "ResNet-152",
    "densenet264": "DenseNet-264",
}


def paper_figures(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Method → metric → the paper's figure for the recipe's data set and network; empty where the paper has none."""
    if recipe.data.source not in ("cifar100", "imagenet"):
        return {}
    table = pd.read_csv(Path(__file__).parent / "paper_results.csv")
    mine = table[(table.dataset == recipe.data.source) & (table.model == PAPER_NAMES.get(recipe.model.name))]
    return {row["method"]: dict(row.drop(["dataset", "model", "method"])) for _, row in mine.iterrows()}


def departures(recipe: Recipe) -> list[str]:
    """Where a recipe of the paper's data set and network departs from the shipped one, as `epochs 2 instead of 300`."""
    for name in shipped_recipes():
        written = read_yaml(find_recipe(name))
        # A recipe that names a method is another paper's way of training it.
        if "method" in written or written.get("data", {}).get("source") != recipe.data.source:
            continue
        original = load_recipe(name)
        if original.model.name == recipe.model.name:
            this, theirs = recipe.identity(), original.identity()
            keys = [
                k for k in theirs if k.split(".")[0] not in METHOD_SECTIONS and k not in ("method", "seed", "data.path")
            ]
            return [f"{key} {this[key]} instead of {theirs[key]}" for key in keys if this[key] != theirs[key]]
    return []
