"""The command line: each command is one call into the package, whose imports wait until it runs."""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from .detection.recipes import load_detection_recipe
from .detection.settings import DetectionRecipe
from .errors import Diverged, InputError, RankError, nearest, reason
from .options import make_parser, overrides, with_values_joined
from .recipe import Recipe, settings
from .recipe_files import load_recipe, with_overrides
from .section import COMMAND_LINE

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # and 143 or 138 after SIGTERM or SIGUSR1


def load(arguments, rest) -> Recipe:
    return load_recipe(arguments.recipe, overrides(arguments, rest))


def run_train(arguments, rest):
    recipe = load(arguments, rest)
    recipe.check_method(recipe.method)

    def run(display):
        from .training import train

        return train(recipe, display=display)

    return run_to_end(recipe, run, arguments.quiet)


def run_detect(arguments, rest):
    refuse(rest, arguments)
    given = {key: value for key, value in vars(arguments).items() if key in settings(DetectionRecipe)}
    given["model.backbone"] = arguments.backbone
    if arguments.pretrained:
        given["model.pretrained"] = "true"
    recipe = load_detection_recipe(arguments.recipe, given)

    def run(display):
        from .detection.training import train_detector

        return train_detector(recipe, display=display)

    return run_to_end(recipe, run, arguments.quiet)


def run_to_end(recipe: Recipe | DetectionRecipe, run, quiet: bool) -> int:
    """The exit code of `run(display)`, which trains as `recipe` says, with a line for whatever ends it."""
    from safetensors import SafetensorError
    from torch import OutOfMemoryError, distributed

    from .progress import Display
    from .ranks import tells_of_a_lost_rank

    began = time.time()
    try:
        with Display(quiet) as display:
            result = run(display)
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # else it has said what it saved
            stopped.args = (f"interrupted; the same command {resumes(recipe, began)}",)
        raise
    except Diverged as error:
        print(f"pskd-timm: {recipe.run_dir}: {error}", file=sys.stderr)
        return FAILED
    except OutOfMemoryError as error:
        helps = f"--grad_accum_steps {2 * recipe.grad_accum_steps} splits each step's samples into smaller parts"
        print(f"pskd-timm: {recipe.run_dir}: {str(error).split('. ')[0]}: {helps}", file=sys.stderr)
        return FAILED
    except RuntimeError as error:
        if not tells_of_a_lost_rank(error):
            raise
        lost = f"rank {os.environ['RANK']} lost another, which failed or did not answer for {recipe.timeout_minutes:g} minutes"
        then = f"unless a line of that rank says why, the same command {resumes(recipe, began)}"
        print(f"pskd-timm: {recipe.run_dir}: {lost}; {then}", file=sys.stderr)
        return FAILED
    except (OSError, SafetensorError) as error:
        print(
            f"pskd-timm: {recipe.run_dir}: {reason(error)}; once that is mended, the same command {resumes(recipe, began)}",
            file=sys.stderr,
        )
        return FAILED
    if is_main_process():
        from .metrics import format_metrics, telling_metrics
        from .run.folder import read_metrics

        metrics = telling_metrics(read_metrics(result.values), result.values["num_classes"])
        last, best = result.last, result.best
        print(f"last epoch {last['epoch']}: {format_metrics(last, metrics)}")
        print(f"best epoch {best['epoch']} (best on {best['chosen_on']}): {format_metrics(best, metrics)}")
        print(f"wrote {result.run_dir}")
    if distributed.is_initialized():  # NCCL warns where a process leaves without
        distributed.destroy_process_group()
    return DONE


def resumes(recipe: Recipe, since: float) -> str:
    """What the same command will do after a failure of what was started at `since`."""
    from .run.folder import own_checkpoint

    newest = own_checkpoint(recipe, since)
    if newest is None:
        return "starts from scratch: there is no checkpoint yet"
    return f"{'(without --resume never) ' if recipe.resume == 'never' else ''}resumes from {newest.name}"


def run_compare(arguments, rest):
    recipe = load(arguments, rest)
    from .comparison import compare
    from .progress import Display

    with Display(arguments.quiet) as display:
        found = compare(recipe, arguments.methods, arguments.seeds, arguments.jobs, display)
    tell(found)
    return FAILED if found.failed else DONE


def run_report(arguments, rest):
    refuse(rest, arguments)
    from .reports.build import report

    tell(report(arguments.runs, arguments.output, arguments.metrics))
    return DONE


def stdout():
    """rich's console, as wide as the terminal, or as WIDE where there is none."""
    from rich.console import Console

    from .progress import WIDE

    return Console(width=None if sys.stdout.isatty() else WIDE)


def tell(comparison):
    """Print a comparison's table and where it was written."""
    from .reports.tables import further_table, terminal_table

    console = stdout()
    console.print(
        terminal_table(comparison.rows, comparison.metrics, comparison.heading, console.width, comparison.kind)
    )
    if comparison.further:
        console.print(further_table(comparison.rows, comparison.further))
    for note in comparison.notes:  # each a line where there is no terminal
        console.print(note, markup=False, emoji=False, highlight=False, soft_wrap=not sys.stdout.isatty())
    print("wrote " + ", ".join(map(str, comparison.paths)))  # paths stay whole


def run_search(arguments, rest):
    recipe = load(arguments, rest)
    from .metrics import format_metrics
    from .progress import Display
    from .study import search
    from .tasks import task_class

    options = (arguments.trials, arguments.seeds, arguments.metric, arguments.prune, arguments.search_seed)
    try:
        with Display(arguments.quiet) as display:
            found = search(recipe, arguments.over, *options, display)
    except KeyboardInterrupt as stopped:
        never = " without --resume never" if recipe.resume == "never" else ""
        stopped.args = (f"interrupted; the same command{never} goes on from what is there",)
        raise
    chosen = ", ".join(f"{key} {value}" for key, value in found.best.settings.items())
    print(f"chosen: trial {found.best.number} of {len(found.trials)}: {chosen}")
    print(f"on the held-out part: {format_metrics(found.best.figures, task_class(recipe.task).metrics)}")
    print("wrote " + ", ".join(map(str, found.paths)))
    return DONE


def run_show(arguments, rest):
    recipe = load(arguments, rest)
    recipe.check_method(recipe.method)
    from .show import run_lines, sources_table

    stdout().print(sources_table(recipe))
    print("\n".join(run_lines(recipe)))
    return DONE


def run_evaluate(arguments, rest):
    from .metrics import format_metrics, telling_metrics
    from .progress import Display

    given = overrides(arguments, rest)
    if arguments.checkpoint:
        name = arguments.run_or_recipe
        recipe = load_recipe(name, given) if name else with_overrides({"epochs": 1}, given, COMMAND_LINE, "evaluate")
        from .evaluation import evaluate_checkpoint
        from .tasks import task_class

        with Display() as display:
            found = evaluate_checkpoint(arguments.checkpoint, recipe, display.advance)
        print(format_metrics(found, task_class(recipe.task).metrics))
        return DONE
    if not arguments.run_or_recipe:
        raise InputError("evaluate needs a finished run's folder, or --checkpoint FILE")
    from .evaluation import evaluate
    from .run.folder import read_metrics, read_result

    with Display() as display:
        scores = evaluate(arguments.run_or_recipe, given, display.advance)
    values = read_result(Path(arguments.run_or_recipe))
    metrics = telling_metrics(read_metrics(values), values["num_classes"])
    for which, found in scores.items():
        recorded = found.pop("recorded")
        agrees = (
            "equal to result.json" if recorded == found else f"result.json has: {format_metrics(recorded, metrics)}"
        )
        print(f"{which}: {format_metrics(found, metrics)} ({agrees})")
    return DONE


def run_dashboard(arguments, rest):
    refuse(rest, arguments)
    from .reports.dashboard import dashboard

    path, url = dashboard(arguments.runs, arguments.entity, arguments.project, arguments.publish)
    print(f"wrote {path}")
    if url:
        print(f"published {url}")
    else:
        print("with a wandb account: `wandb sync` brings runs that were offline to the server, the same command with")
        print("--publish this dashboard")
    return DONE


def run_models(arguments, rest):
    refuse(rest, arguments)
    from .show import models_table

    stdout().print(models_table())
    return DONE


def run_predict(arguments, rest):
    refuse([word for word in rest if word.startswith("-")], arguments)
    arguments.images += rest  # those that stand after an option
    check_json(arguments.json)
    if bool(arguments.images) == bool(arguments.against):
        raise InputError("predict RUN IMAGES classifies images, predict RUN --against DATA holds the run against them")
    from .run.folder import task_of

    detector = task_of(Path(arguments.run_dir)) == "detection"
    for option in ("top", "against") if detector else ("output", "confidence"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option} is for {'classifiers' if detector else 'detectors'}, not for this run")
    if detector:
        return run_predict_boxes(arguments)
    if arguments.against:
        return run_against(arguments)
    from .prediction import calibration_line, predict, predictions_table
    from .progress import Display

    with Display(not sys.stdout.isatty()) as display:
        found = predict(
            arguments.run_dir, arguments.images, 5 if arguments.top is None else arguments.top, arguments.best, display
        )
    stdout().print(predictions_table(found))
    print(calibration_line(found))
    if arguments.json:
        write_json(arguments.json, found)
        print(f"wrote {arguments.json}")
    return tell_unreadable(found)


def run_predict_boxes(arguments):
    from .detection.prediction import CONFIDENCE, boxes_table, predict_boxes
    from .progress import Display

    confidence = CONFIDENCE if arguments.confidence is None else arguments.confidence
    where = (arguments.output, arguments.json)
    with Display(not sys.stdout.isatty()) as display:
        found = predict_boxes(arguments.run_dir, arguments.images, *where, confidence, arguments.best, display)
    stdout().print(boxes_table(found))
    folder = arguments.output or Path(arguments.run_dir) / "predicted"
    print(f"wrote copies with boxes into {folder}, and {arguments.json or Path(folder) / 'predictions.json'}")
    return tell_unreadable(found)


def write_json(path: str, found):
    """Write what was found as JSON, through a link to where it leads; into a pipe or device as it is."""
    from .files import write_atomic

    place, text = Path(path), json.dumps(found, indent=1, ensure_ascii=False)
    try:
        if place.exists() and not place.is_file():
            place.write_text(text, encoding="utf-8")
        else:
            write_atomic(place.resolve(), text)
    except OSError as error:
        raise InputError(f"--json: {path} cannot be written: {reason(error)}") from None


def tell_unreadable(found: dict) -> int:
    """Print a line for each image that could not be read; the exit code."""
    unreadable = [row["error"] for row in found["images"] if "error" in row]
    for error in unreadable:
        print(f"pskd-timm: {error}", file=sys.stderr)
    return FAILED if unreadable else DONE


def run_against(arguments):
    from .out_of_distribution import against
    from .progress import Display

    with Display(not sys.stdout.isatty()) as display:
        found = against(arguments.run_dir, arguments.against, arguments.best, display)
    print(
        f"AUROC {found['auroc']:.2f} %  FPR95 {found['fpr95']:.2f} %: confidence in {found['test_images']:,} test images"
    )
    if "temperature" in found:
        print(
            f"AUROC {found['calibrated_auroc']:.2f} %  FPR95 {found['calibrated_fpr95']:.2f} %: calibrated, "
            f"temperature {found['temperature']:.3g}"
        )
    images = "image" if found["images"] == 1 else "images"
    print(f"against {found['images']:,} {images} of {found['name']}, {found['weights']} epoch's network")
    if arguments.json:
        write_json(arguments.json, found)
        print(f"wrote {arguments.json}")
    return FAILED if found["unreadable"] else DONE


def run_translate(arguments, rest):
    if arguments.file == "-" and len(rest) == 1 and not rest[0].startswith("-"):
        arguments.file = rest.pop()  # which stands after an option
    refuse(rest, arguments)
    if arguments.json != "-":
        check_json(arguments.json)
    from .progress import Display
    from .translation.text import read_lines, split_lines

    from_stdin = arguments.file == "-"
    lines = split_lines(sys.stdin.buffer.read(), "stdin") if from_stdin else read_lines(Path(arguments.file))
    from .translation.translate import translate  # which takes seconds: a file that is none is told before

    with Display(not sys.stderr.isatty(), sys.stderr) as display:  # stdout is for the translations
        found = translate(arguments.run_dir, lines, arguments.best, bool(arguments.json), display.advance)
    if arguments.json == "-":
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return DONE
    for row in found:
        print(row["translation"])
    if arguments.json:
        write_json(arguments.json, found)
        print(f"pskd-timm: wrote {arguments.json}", file=sys.stderr)
    return DONE


def run_push(arguments, rest):
    refuse(rest, arguments)
    from .export import push

    if arguments.private and not arguments.hub:
        raise InputError("--private is for the hub: add --hub")
    where = push(arguments.run_dir, arguments.to, arguments.hub, arguments.private, arguments.best)
    print(f"wrote {where}")
    tell_calibration(arguments)
    return DONE


def tell_calibration(arguments):
    """Print whether the confidences of the network that has left are calibrated."""
    from .prediction import calibration_line, describe_calibration, held_out_temperature

    run = Path(arguments.run_dir).expanduser()
    print(calibration_line(describe_calibration(held_out_temperature(run / "best" if arguments.best else run))))


def run_export(arguments, rest):
    refuse(rest, arguments)
    check_file("export", arguments.file)
    from .export import export_onnx

    difference = export_onnx(arguments.run_dir, arguments.file, arguments.best)
    print(f"wrote {arguments.file}: ONNX Runtime's confidences differ from torch's by {difference:.1g} at most")
    tell_calibration(arguments)
    return DONE


def check_file(option: str, name: str | None):
    """Raise InputError, before any work, where a file `name` cannot be written."""
    if name == "-":
        raise InputError(f"{option}: - is no file, and stdout is for people here: name one")
    if name and not Path(name).absolute().parent.is_dir():
        raise InputError(f"{option}: there is no folder {Path(name).absolute().parent}")
    if name and Path(name).is_dir():
        raise InputError(f"{option}: {name} is a folder, a file is wanted")


def check_json(name: str | None):
    """As `check_file`; also where the file is there and is a run's, or no JSON: an image, a text that is translated."""
    check_file("--json", name)
    if name and (place := Path(name).resolve()).is_file():
        run = place.parent.parent if place.parent.name == "best" else place.parent
        if place.suffix != ".json" or (run / "recipe.yaml").is_file():
            raise InputError(
                f"--json: {name} is there and would be replaced: name a new file, or a .json outside of runs"
            )


def refuse(rest: list[str], arguments: argparse.Namespace):
    """Raise InputError for what a command without settings does not know."""
    if rest and not rest[0].startswith("-"):
        raise InputError(f"unexpected argument {rest[0]!r}")
    if rest:
        raise InputError(f"unknown option {rest[0]}{nearest(rest[0].removeprefix('--'), arguments.options, '--')}")


def run_bench(arguments, rest):
    refuse(rest, arguments)
    from .bench import PARTS, QUICK_PARTS, bench
    from .bench.store import parse_size

    if unknown := [part for part in arguments.parts if part not in PARTS]:
        raise InputError(f"bench has no part {unknown[0]!r}, only {', '.join(PARTS)}{nearest(unknown[0], PARTS)}")
    if arguments.processes and not 1 <= min(arguments.processes) <= max(arguments.processes) <= 64:
        raise InputError("--processes must be from 1 to 64")
    check_json(arguments.json)
    if arguments.text and not Path(arguments.text).is_dir():
        raise InputError(f"--text: there is no folder {arguments.text}")
    sizes = [parse_size(text) for text in arguments.sizes] if arguments.sizes else None
    bench(
        dict.fromkeys(arguments.parts or QUICK_PARTS),
        keep=partial(write_json, arguments.json) if arguments.json else None,
        sizes=sizes,
        processes=arguments.processes,
        images=arguments.images,
        text=arguments.text,
    )
    return DONE


COMMANDS = {
    "train": run_train,
    "detect": run_detect,
    "compare": run_compare,
    "search": run_search,
    "report": run_report,
    "show": run_show,
    "evaluate": run_evaluate,
    "dashboard": run_dashboard,
    "models": run_models,
    "predict": run_predict,
    "translate": run_translate,
    "push": run_push,
    "export": run_export,
    "bench": run_bench,
}
LAUNCHED = ("train", "detect", "compare", "search")  # the last two say what to do instead


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether a launcher started this process among others; a cluster may set WORLD_SIZE alone for whatever runs there."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        words = with_values_joined(sys.argv[1:] if argv is None else argv)
        arguments, rest = make_parser().parse_known_args(words)
        if is_one_of_several() and arguments.command not in LAUNCHED:
            raise InputError(f"{arguments.command} is the work of one process: call it without accelerate launch")
        return COMMANDS[arguments.command](arguments, rest)
    except InputError as error:
        if is_main_process() or isinstance(error, RankError):
            print(f"pskd-timm: {error}", file=sys.stderr)
        return BAD_INPUT
    except Diverged as error:
        print(f"pskd-timm: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stopped:
        if is_main_process():
            print(f"pskd-timm: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return DONE
