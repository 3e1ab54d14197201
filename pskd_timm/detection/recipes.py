"""Reading the recipe of a detection run: a file or a shipped name, the backbone and settings of the command line over it."""

from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..recipe_files import SHIPPED, load_recipe
from .settings import DetectionRecipe

DEFAULT = "detection/voc"


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.glob("detection/*.yaml"))


def load_detection_recipe(name: str | Path = DEFAULT, overrides: dict[str, Any] | None = None) -> DetectionRecipe:
    """The recipe of a file or shipped name, with settings replaced by `overrides`, by dotted name.

    Raises InputError that names the setting, what is wrong with it and where it came from.

    Example:
        >>> recipe = load_detection_recipe("detection/voc", {"model.backbone": "resnet50", "data.path": "VOCdevkit"})
    """
    path = Path(name)
    if not path.is_file():
        wanted = str(name).removeprefix("recipes/").removesuffix(".yaml")
        if wanted not in shipped():
            hint = nearest(wanted, shipped()) or f": neither a file nor one of {', '.join(shipped())}"
            raise InputError(f"no detection recipe {str(name)!r}{hint}")
        path = SHIPPED / f"{wanted}.yaml"
    return load_recipe(str(path), overrides, DetectionRecipe)
