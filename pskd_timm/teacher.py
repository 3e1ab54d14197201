"""TF-KD's trained teacher: which run it is, whether it fits the recipe, and its own figures."""

from pathlib import Path

from .errors import InputError
from .recipe import Recipe
from .run.folder import read_recipe, read_result

BASELINE = "baseline"  # as a teacher: that of the same recipe
# What teacher and student must share beside the architecture, which the method checks: the training samples and their look.
SHARED = ("data.", "augment.mean", "augment.std")
MAY_DIFFER = ("data.loading", "data.test", "data.limit_test", "data.crop_pct")


def baseline_of(recipe: Recipe) -> Recipe:
    """The recipe of the baseline run that `tfkd.teacher: baseline` means: same settings, seed and output folder."""
    return recipe.model_copy(update={"method": BASELINE})


def teacher_place(recipe: Recipe) -> Path | None:
    """The folder, or the file of weights, of what teaches this recipe's run; None where no trained network does."""
    teacher = recipe.method_section.trained_teacher
    if teacher is None:
        return None
    if teacher == BASELINE:
        return baseline_of(recipe).run_dir
    place = Path(teacher).expanduser()
    is_of_a_folder = place.name == "model.safetensors" and (place.parent / "config.json").is_file()
    return place.parent if is_of_a_folder else place


def method_settings(recipe: Recipe) -> dict:
    """The settings of the recipe's method, with a trained teacher as the folder, or the file of weights, that it lies in.

    Raises InputError where the teacher is not there or was trained on other data.
    """
    settings = recipe.method_section.model_dump()
    folder = teacher_place(recipe)
    if folder is None:
        return settings
    if recipe.method_section.trained_teacher == BASELINE and not (folder / "result.json").is_file():
        raise InputError(
            f"tfkd.teacher baseline: {folder} is not finished: run the same command with --method baseline first "
            "(pskd-timm compare does both)"
        )
    if run := _run_of(folder):
        _check_data(recipe, folder, read_recipe(run))
    return settings | {"teacher": str(folder)}


def _check_data(recipe: Recipe, folder: Path, taught: Recipe):
    """Raise InputError with the first setting in which the teacher's run was another one than the student's may be."""
    here, there = recipe.identity(), taught.identity()
    if recipe.method_section.trained_teacher == BASELINE:
        here = baseline_of(recipe).identity()
        keys = list(here)
    else:
        keys = [key for key in here if key.startswith(SHARED) and key not in MAY_DIFFER]
        if not recipe.data.holdout_fraction:
            keys.remove("data.holdout_fraction")  # a teacher may have seen less, but not what the student holds out
    if different := [key for key in keys if there.get(key) != here[key]]:
        key = different[0]
        raise InputError(
            f"tfkd.teacher: {folder} was trained with {key} {there.get(key)!r}, this run has {here[key]!r}:\n"
            "a teacher needs the student's data; with another --output_dir, --tfkd.teacher baseline makes one of its own"
        )


def teacher_figures(recipe: Recipe) -> dict | None:
    """What result.json records of a trained teacher: its folder and, where its run has them, epoch and figures."""
    folder = teacher_place(recipe)
    if folder is None:
        return None
    run = _run_of(folder)
    if run is None or not (run / "result.json").is_file():
        return {"run": str(folder)}
    result = read_result(run)
    figures = result["last" if folder == run else "best"]
    own = {"run": str(folder), "method": result["method"], "seed": result["seed"]}
    return own | {key: figures[key] for key in ("epoch", *(metric["name"] for metric in result["metrics"]))}


def _run_of(folder: Path) -> Path | None:
    """The run that a network's folder is, or is the best epoch of, if it is one."""
    runs = [folder, *([folder.parent] if folder.name == "best" else [])]
    return next((run for run in runs if (run / "recipe.yaml").is_file()), None)
