"""What was run, for the page: its data, settings, versions and hardware, a line a run."""

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta

from ..methods import METHOD_SECTIONS
from ..metrics import Metric
from ..recipe import data_name, flatten
from .plots import title
from .runs import Run


def facts(found: list[Run]) -> list[tuple[str, str]]:
    """The head of the page: name and value."""
    recipes = [run.recipe for run in found if run.recipe]
    values = [run.values for run in found if run.values]
    lines = [
        ("data", distinct(data_name(r.data) for r in recipes)),
        ("network", distinct(r.model.name for r in recipes)),
        ("parameters", distinct(f"{v['num_parameters']:,}" for v in values)),
        ("trained on", distinct(f"{v['num_train']:,} {counted(v)}" for v in values)),
        ("tested on", distinct(tested_on(v) for v in values)),
        ("epochs", distinct(str(r.epochs) for r in recipes)),
        ("seeds", distinct(str(seed) for seed in sorted({run.seed for run in found}))),
        ("runs", f"{len(values)} of {len(found)} finished"),
        ("training time", str(timedelta(seconds=round(sum(v["seconds"] for v in values)))) + " in all"),
    ]
    return [(name, value) for name, value in lines if value]


def tested_on(values: dict) -> str:
    """What the figures of a run's result.json are of."""
    what = counted(values)
    part = values["evaluated_on"]
    samples = f"{values['num_test']:,} {what}{'' if part == 'test' else f' of {part}'}"
    if part == "holdout":
        samples = f"{values['num_holdout']:,} held-out training {what}"
    # Of a detector's classes those without an object to find are in no figure.
    occurring = sum(count > 0 for count in values.get("num_objects", {}).values())
    only = f"{occurring:,} of " if 0 < occurring < values["num_classes"] else ""
    return f"{samples}, {only}{values['num_classes']:,} classes{' with objects' if only else ''}"


def counted(values: dict) -> str:
    """What a run's samples are called."""
    return {"images": "images", "translation": "tokens", "detection": "pictures"}.get(values["task"], "samples")


def distinct(words: Iterable[str]) -> str:
    """Each of the words once, in a line."""
    return ", ".join(dict.fromkeys(words))


def versions_and_hardware(found: list[Run]) -> list[tuple[str, str]]:
    """Versions and hardware, as the runs recorded them."""
    values = [run.values for run in found if run.values]
    names = dict.fromkeys(name for v in values for name in v["versions"])
    lines = [(name, distinct(v["versions"].get(name, "?") for v in values)) for name in names]
    hardware = distinct(
        f"{v['hardware']['name']} ({v['hardware']['device']}, {v['num_processes']} "
        f"{'process' if v['num_processes'] == 1 else 'processes'}, threads: {v['hardware']['threads']}, "
        f"{v['hardware']['cpu_count']} cores)"
        for v in values
    )
    return [("hardware", hardware), *lines] if values else []


def settings_lines(found: list[Run]) -> list[tuple[str, str, bool]]:
    """Every setting with its values over all runs, and whether they differ; a method's own settings from its own runs."""
    seen: dict[str, dict[str, None]] = {}
    decisive = {key for run in found if run.recipe for key in run.recipe.identity()}
    for run in found:
        for key, value in flatten(run.recipe.model_dump()).items() if run.recipe else ():
            section = key.partition(".")[0]
            if key not in ("method", "seed") and (section not in METHOD_SECTIONS or section == run.name):
                seen.setdefault(key, {})[str(value)] = None
    return [(key, " | ".join(values), len(values) > 1 and key in decisive) for key, values in seen.items()]


def losses(finished: dict[str, list[Run]]) -> list[tuple[str, list[str]]]:
    """What the loss of each method's runs amounts to, warnings included: title and lines."""
    return [
        (title(method), runs[0].recipe.effective_loss(runs[0].values["num_classes"]).lines(runs[0].recipe.optim.lr))
        for method, runs in finished.items()
    ]


def run_lines(found: list[Run], metrics: Sequence[Metric]) -> list[dict]:
    """A line a run: how it ended and its figures."""
    return [
        {
            "method": title(run.method),
            "seed": run.seed,
            "status": run.status,
            "folder": str(run.folder),
            "last": [(value := run.values["last"][m.name], f"{value:.{m.digits}f}") for m in metrics]
            if run.values
            else [],
            "seconds": run.values["seconds"] if run.values else math.nan,
            "best": run.values["best"]["epoch"] if run.values else "",
        }
        for run in found
    ]
