"""Constants chosen on the held-out part of the training data: trials of one recipe, the test part left unread."""

import json
import math
import os
import shlex
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout

from . import rng
from .checks import check_recipe
from .errors import Diverged, InputError, nearest, reason
from .files import write_atomic
from .metrics import Metric
from .optim import given_in_vain, unread
from .progress import Display
from .recipe import Recipe, settings
from .recipe_files import FORMER_NAMES, as_recipe, differing, given, with_overrides
from .reports import plots
from .reports.trials import DIVERGED, DONE, REFUSED, STOPPED, TOO_LARGE, Trial, ranged, read_trials, trials_table
from .run.result import Result
from .section import COMMAND_LINE
from .tasks import task_class
from .teacher import BASELINE
from .training import train

HOLDOUT_FRACTION = 0.1  # of a recipe that holds nothing out itself
DIGITS = 4  # of a drawn number: what a recipe shows of it is all there is to it
RANDOM_TRIALS = 5  # before Optuna's TPE looks at what they gave
SAMPLER = 12  # stream of random numbers
# Of the data's settings only these leave every trial the same held-out images.
SEARCHED_DATA = ("data.image_size", "data.label_noise")
ANEW = "choose another --output_dir, or --resume never to delete it"


@dataclass(frozen=True)
class Range:
    """What a setting is drawn from: uniform from `low` to `high`, log-uniform with `log`, or one of `choices`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()
    whole: bool = False  # whole numbers only

    @property
    def ends(self) -> tuple:
        """The values that the setting's bounds are checked at."""
        return self.choices or (self.low, self.high)

    @property
    def countable(self):
        """All values there are, where they can be counted, else None."""
        return self.choices or (range(self.low, self.high + 1) if self.whole else None)

    def draw(self, trial, key: str):
        """A value for `key` from an Optuna trial."""
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        drawn = suggest(key, self.low, self.high, log=self.log)
        return min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high) if not self.whole else drawn


@dataclass
class SearchResult:
    """What `search` gives: all trials, the best of them, the recipe with its settings and the files written."""

    trials: list[Trial]
    best: Trial
    recipe: Recipe
    paths: list[Path]


def search(
    recipe: Recipe,
    over: list[str],
    trials: int = 8,
    seeds=(0,),
    metric: str = "nll",
    prune: bool = False,
    search_seed: int = 0,
    display: Display | None = None,
) -> SearchResult:
    """Train `trials` choices of the settings `over` ("pskd.alpha=0.3:0.9") and rank them by `metric` on the held-out part.

    Everything goes into <output root>/search-<method>; the same call resumes what is there, unless the recipe says
    `resume: never`. With `prune`, a trial whose first seed does worse than the median of the earlier ones at the same epoch
    ends there (Optuna's median pruner). A trial that diverges, whose settings do not go together or whose network does not
    fit into memory is named and passed over. Raises InputError for bad input, before anything is trained.

    Example:
        >>> search("digits", over=["pskd.alpha=0.3:0.9"], trials=8).best.settings
    """
    recipe = as_recipe(recipe, over=over, seeds=seeds)
    if "WORLD_SIZE" in os.environ:
        raise InputError("search trains its runs one by one in this process: call it without accelerate launch")
    metrics = {known.name: known for known in task_class(recipe.task).metrics}
    if metric not in metrics:
        raise InputError(f"--metric: unknown metric {metric!r}{nearest(metric, metrics)} (of {', '.join(metrics)})")
    if prune and metrics[metric].only_at_end:
        raise InputError(f"--prune compares epochs, and {metrics[metric].title} is worked out after the last one only")
    seeds = list(dict.fromkeys(seeds))
    if trials < 1 or not seeds or min(seeds) < 0:
        raise InputError("--trials must be at least 1, and --seeds must be given and not negative")
    display, ranges = display or Display(), parse_over(over, recipe)
    _optuna()
    folder = recipe.output_root / f"search-{recipe.method}"
    base = _on_holdout(recipe)
    for line in given_in_vain(recipe, ranges):
        display.say(line)
    _check(base, ranges, folder, display)
    with _locked(folder):
        done = _trials_of_before(folder, base, ranges, seeds, metric, search_seed)
        if done:
            display.say(f"{folder}: {len(done)} trials done before")
        for number in range(len(done) + 1, trials + 1):
            asked, values = _ask(recipe, done, ranges, metrics[metric], search_seed)
            display.say(f"trial {number} of {trials}: {_settings(values)}")
            if twin := next((trial for trial in done if trial.settings == values), None):
                display.say(f"trial {number} repeats trial {twin.number}: every choice has been tried")
                trial = replace(twin, number=number, seconds=0.0)
            else:
                trial = _train_trial(base, number, values, folder, seeds, metric, asked if prune else None, display)
            done.append(trial)
            write_atomic(folder / "trials.jsonl", "".join(json.dumps(asdict(trial)) + "\n" for trial in done))
            display.say(_line(trial, metric))
        finished = [trial for trial in done if trial.state == DONE]
        if all(trial.state == REFUSED for trial in done):
            raise InputError(f"{folder}: all {len(done)} trials were refused: none has settings that go together")
        if not finished:
            raise Diverged(f"{folder}: none of {len(done)} trials came to its end")
        best = _best(finished, metrics[metric], display)
        chosen = with_overrides(given(recipe), best.settings, str(folder), recipe.name)
        return SearchResult(done, best, chosen, _write(folder, recipe, base, chosen, done, best, over, seeds, metric))


def _best(finished: list[Trial], metric: Metric, display: Display) -> Trial:
    """The trial with the best figure, the first of equal ones, which is said."""
    best = (max if metric.higher_is_better else min)(finished, key=lambda trial: trial.figures[metric.name])
    equal = [
        str(trial.number)
        for trial in finished
        if trial.figures[metric.name] == best.figures[metric.name] and trial.settings != best.settings
    ]
    if equal:
        display.say(f"equal in {metric.name}: trial {best.number}, which is taken, and {', '.join(equal)}")
    return best


def _ask(recipe: Recipe, done: list[Trial], ranges: dict, metric: Metric, search_seed: int) -> tuple[Any, dict]:
    """Optuna's trial after those `done`, and its settings: a function of the seed, its number and the trials before it,
    so that a resumed search draws the same."""
    optuna, number = _optuna(), len(done) + 1
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=RANDOM_TRIALS, seed=rng.derive_key(search_seed, SAMPLER, number) % 2**32
    )
    direction = "maximize" if metric.higher_is_better else "minimize"
    study = optuna.create_study(sampler=sampler, pruner=_pruner(optuna, recipe.epochs), direction=direction)
    study.add_trials([_known(optuna, trial, ranges, metric.name) for trial in done])
    asked = study.ask()
    values = {key: drawn_from.draw(asked, key) for key, drawn_from in ranges.items()}
    if any(trial.settings == values for trial in done):
        values = _untried(ranges, done) or values  # what can be counted is drawn more than once
    return asked, values


@contextmanager
def _locked(folder: Path):
    """The search's folder, made and held for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{folder}: another search is at work here: wait for it, or choose another --output_dir"
        ) from None
    except OSError as error:
        raise InputError(f"output_dir: {folder} cannot be written: {reason(error)}") from None
    try:
        yield
    finally:
        lock.release()


def parse_over(over: list[str], recipe: Recipe) -> dict[str, Range]:
    """`key=a:b`, `key=a:b:log` or `key=x,y,z` by key, for settings that decide how `recipe` turns out."""
    ranges = {}
    for text in over:
        key, equals, values = text.partition("=")
        key, known = FORMER_NAMES.get(key, key), settings()
        inside = known.get(key.rpartition(".")[0]) if key not in known else None
        is_mapping = inside is not None and "dict" in str(inside.annotation)
        if not equals or not values:
            raise InputError(f"--over {text}: write --over setting=low:high, setting=low:high:log or setting=one,other")
        if key not in known and not is_mapping:
            raise InputError(f"--over {text}: unknown setting {key!r}{nearest(key, known)}")
        if key in ("method", "seed") or (key.startswith("data.") and key not in SEARCHED_DATA):
            raise InputError(f"--over {text}: {key} cannot be searched: a search fixes it, so that its trials compare")
        if key in known and key not in recipe.identity():
            raise InputError(f"--over {text}: {key} cannot be searched: of method {recipe.method} it decides nothing")
        if key in ranges:
            raise InputError(f"--over {text}: {key} is given twice")
        ranges[key] = _range(text, values, known[key].annotation if key in known else None)
    for key, why in unread(recipe.optim).items():
        if key in ranges and why.split()[0] not in ranges:
            raise InputError(f"--over {key}: cannot be searched: {why} does not read it")
    if not ranges:
        raise InputError("--over names no setting: write --over pskd.alpha=0.3:0.9")
    return ranges


def _range(text: str, values: str, annotation) -> Range:
    if ":" not in values:
        choices = tuple(dict.fromkeys(values.split(",")))
        if len(choices) < 2:
            raise InputError(f"--over {text}: a single value is no choice: write low:high, or values with commas")
        return Range(choices=choices)
    low, high, *more = values.split(":")
    try:
        numbers = [float(low), float(high)]
    except ValueError:
        raise InputError(f"--over {text}: {low!r} and {high!r} should be numbers") from None
    if more not in ([], ["log"]):
        raise InputError(f"--over {text}: write low:high or low:high:log")
    if not all(map(math.isfinite, numbers)) or numbers[0] >= numbers[1]:
        raise InputError(f"--over {text}: the low end {low} should be below the high end {high}")
    if more and numbers[0] <= 0:
        raise InputError(f"--over {text}: a logarithmic range starts above 0")
    whole = _is_whole(annotation) if annotation is not None else all(number.is_integer() for number in numbers)
    if whole and not all(number.is_integer() for number in numbers):
        raise InputError(f"--over {text}: this setting is a whole number")
    return Range(*(map(int, numbers) if whole else numbers), log=bool(more), whole=whole)


def _is_whole(annotation) -> bool:
    """Whether a setting's type is int, bounded or optional."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return any(_is_whole(part) for part in get_args(annotation))
    return annotation is int


def _on_holdout(recipe: Recipe) -> Recipe:
    """The recipe as its trials train it: part of the training data held out, the test part left unread."""
    fraction = recipe.data.holdout_fraction or HOLDOUT_FRACTION
    if recipe.data.holdout_fraction == 0 and recipe.source_of("data.holdout_fraction") == COMMAND_LINE:
        raise InputError(
            "data.holdout_fraction 0: a search chooses on a held-out part: give one above 0, or leave the setting out for a tenth"
        )
    fixed = {"data.test": False, "data.holdout_fraction": fraction}
    if recipe.source_of("tracking.wandb") == "default":
        fixed["tracking.wandb"] = "disabled"  # trials are many, and trials.csv holds them together
    return with_overrides(given(recipe), fixed, "search", recipe.name)


def _untried(ranges: dict[str, Range], done: list[Trial]) -> dict | None:
    """The first combination that no trial has had, where all values can be counted and one is left."""
    if not all(drawn_from.countable for drawn_from in ranges.values()):
        return None
    grid = product(*(drawn_from.countable for drawn_from in ranges.values()))
    tried = [trial.settings for trial in done]
    return next(
        (values for values in (dict(zip(ranges, one, strict=True)) for one in grid) if values not in tried), None
    )


def _trial_recipe(base: Recipe, values: dict, folder: Path, number: int, seed: int = 0) -> Recipe:
    own = {**values, "output_dir": str(folder / f"trial{number}"), "seed": seed}
    own["name"] = f"{base.name} search {base.method} trial {number}"
    return with_overrides(given(base), own, "search", base.name)


def _check(base: Recipe, ranges: dict[str, Range], folder: Path, display: Display):
    """Raise InputError where a trial could not be trained: the ends of all ranges, and networks and data once."""
    _check_teacher(base)
    check_recipe(base, (base.method,), display)
    for key, drawn_from in ranges.items():
        for value in drawn_from.ends:
            recipe = _trial_recipe(base, {key: value}, folder, 0)
            _check_teacher(recipe)
            if drawn_from.choices or key.startswith(("model.", f"{base.method}.")):
                check_recipe(recipe, (base.method,), display)


def _check_teacher(recipe: Recipe):
    if recipe.method_section.trained_teacher == BASELINE:
        held_out = f"--data.holdout_fraction {recipe.data.holdout_fraction:g}"
        raise InputError(
            f"tfkd.teacher baseline: a trial has none beside it: train it with {held_out} and name its folder"
        )


def _train_trial(base, number, values, folder, seeds, metric, asked, display) -> Trial:
    """Train one choice of settings with every seed; `asked`, if pruning, is Optuna's trial."""
    import optuna

    trial = Trial(number, DONE, values)
    metrics = [known.name for known in task_class(base.task).metrics]
    results, reported = [], set()
    try:
        runs = [_trial_recipe(base, values, folder, number, seed) for seed in seeds]
        check_recipe(runs[0], (base.method,), display)
    except InputError as error:  # each setting is in its range, but not with the others
        display.say(f"trial {number}: {error}")
        trial.state = REFUSED
        return trial
    first = Result(runs[0].run_dir, {})

    def watch(line: dict):
        if asked is None or results:
            return
        for earlier in first.history:  # of a resumed run, what it logged before it was stopped too
            if earlier["epoch"] not in reported:
                asked.report(earlier[metric], earlier["epoch"])
                reported.add(earlier["epoch"])
        if asked.should_prune() and line["epoch"] < runs[0].epochs:
            raise optuna.TrialPruned

    try:
        for run in runs:
            results.append(train(run, display=display, callbacks=[watch]))
    except optuna.TrialPruned:
        trial.state = STOPPED
    except (Diverged, torch.OutOfMemoryError) as error:
        trial.state = DIVERGED if isinstance(error, Diverged) else TOO_LARGE
        display.say(f"trial {number}: {str(error).splitlines()[0]}")
    lines = first.history
    trial.by_epoch = {line["epoch"]: line[metric] for line in lines if metric in line}
    if trial.state == DONE:
        table = pd.DataFrame([{name: result.last[name] for name in metrics} for result in results])
        trial.figures = table.mean().to_dict()
        trial.spread = table.std().to_dict() if len(table) > 1 else {}
    elif lines:
        trial.figures = {name: lines[-1][name] for name in metrics if name in lines[-1]}
    trial.seconds = sum(result.values["seconds"] for result in results) or (lines[-1]["seconds"] if lines else 0.0)
    return trial


def _optuna():
    try:
        import optuna
    except ImportError:
        raise InputError("search needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _pruner(optuna, epochs: int):
    # The first third of a run says little: PS-KD's α is small there whatever its last value.
    return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=epochs // 3)


def _known(optuna, trial: Trial, ranges: dict[str, Range], metric: str):
    """A trial of before as Optuna takes it."""
    kinds, states = optuna.distributions, optuna.trial.TrialState
    distributions = {}
    for key, drawn_from in ranges.items():
        if drawn_from.choices:
            distributions[key] = kinds.CategoricalDistribution(drawn_from.choices)
        else:
            kind = kinds.IntDistribution if drawn_from.whole else kinds.FloatDistribution
            distributions[key] = kind(drawn_from.low, drawn_from.high, log=drawn_from.log)
    return optuna.trial.create_trial(
        state={DONE: states.COMPLETE, STOPPED: states.PRUNED}.get(trial.state, states.FAIL),
        value=trial.figures[metric] if trial.state in (DONE, STOPPED) else None,
        params=trial.settings,
        distributions=distributions,
        intermediate_values=trial.by_epoch,
    )


def _trials_of_before(folder: Path, base: Recipe, ranges, seeds, metric, search_seed) -> list[Trial]:
    """The trials in `folder`, whose search.json must say the same as this search; it is written where there is none."""
    identity = {key: value for key, value in base.identity().items() if key not in ("seed", "output_dir")}
    this = {
        "over": {key: asdict(drawn_from) for key, drawn_from in ranges.items()},
        "seeds": seeds,
        "metric": metric,
        "search_seed": search_seed,
        "recipe": {key: value for key, value in identity.items() if key not in ranges},
    }
    this = json.loads(json.dumps(this))
    path = folder / "search.json"
    if base.resume == "never" or not path.is_file():
        _start_from_scratch(folder, json.dumps(this, indent=1, ensure_ascii=False))
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        trials = read_trials(folder)
        different = [key for key in this if key != "recipe" and there[key] != this[key]]
        different += [key for key in this["recipe"] if there["recipe"].get(key) != this["recipe"][key]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: what it holds of a search is damaged ({error!r}); {ANEW}") from None
    if different:
        key = different[0]
        value = there[key] if key in there else there["recipe"].get(key)
        what = " ".join(ranged(*each) for each in value.items()) if key == "over" else value
        raise InputError(f"{folder} holds another search, with {key.replace('_', ' ')} {what}: {ANEW}")
    return trials


def _start_from_scratch(folder: Path, identity: str):
    """Delete a search; the trials go before what says which search they are of."""
    (folder / "trials.jsonl").unlink(missing_ok=True)
    for trial in folder.glob("trial[0-9]*"):
        shutil.rmtree(trial)
    write_atomic(folder / "search.json", identity)


def _line(trial: Trial, metric: str) -> str:
    figure = f", {metric} {trial.figures[metric]:.4f}" if metric in trial.figures else ""
    return f"trial {trial.number}: {_settings(trial.settings)}: {trial.state}{figure}"


def _settings(values: dict) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(folder, recipe, base, chosen, trials, best, over, seeds, metric) -> list[Path]:
    """trials.csv, best.yaml and search.png."""
    paths = [folder / "best.yaml", folder / "trials.csv", folder / "search.png"]
    metrics = task_class(base.task).metrics
    table = trials_table(trials, metrics)
    write_atomic(paths[1], table.to_csv(index=False))
    plots.search(table, metric, base.method, metrics).savefig(paths[2], dpi=150)
    spread = f" ± {best.spread[metric]:.4f}" if best.spread else ""
    held_out = f"{100 * base.data.holdout_fraction:g} % of the training part (data.seed {base.data.seed})"
    header = [
        "# Chosen by `pskd-timm search` on held-out training data:",
        f"# {held_out}; the test part was not read.",
        f"# Of {len(trials)} trials over {' '.join(over)}, trial {best.number} had the best {metric}:",
        f"# {best.figures[metric]:.4f}{spread} after the last epoch (mean over seeds {' '.join(map(str, seeds))}).",
        *(f"#   {key}: {_short(value)}" for key, value in best.settings.items()),
        "#",
        f"#   pskd-timm compare {shlex.quote(str(paths[0]))} --methods baseline {recipe.method} --seeds 0 1 2",
    ]
    # Under a name of its own, so that its runs go beside those of the recipe it was chosen for.
    tree = differing(chosen) | {"name": f"{recipe.name}-best"}
    for key in ("output_dir", "resume"):
        tree.pop(key, None)
    write_atomic(paths[0], "\n".join(header) + "\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return paths
