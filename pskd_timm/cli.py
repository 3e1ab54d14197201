"""The command line: each command is one call into the package, whose imports wait until it runs."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .detection.recipes import DEFAULT as DETECTION
from .detection.recipes import load_detection_recipe
from .detection.settings import DetectionRecipe
from .errors import Diverged, InputError, RankError, nearest, reason
from .methods import METHOD_SECTIONS
from .recipe import Recipe, settings
from .recipe_files import FORMER_NAMES, load_recipe, shipped_recipes, with_overrides

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # and 143 or 138 after SIGTERM or SIGUSR1

EPILOG = """exit codes: 0 done, 1 a run failed, 2 bad input; saved and stopped by a signal: 130 INT, 143 TERM, 138 USR1
several processes: accelerate launch --multi_gpu --num_processes N -m pskd_timm train RECIPE (also without a GPU)"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        # An option before it may have taken it for one of its values.
        first = ", before the options" if "are required: " in message else ""
        raise InputError(f"{message}{first} ({self.prog} --help)")


def make_parser() -> Parser:
    """All commands; each setting of a recipe is an option of those that take a recipe."""
    style = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(
        "pskd-timm",
        description="Classifiers whose confidences can be trusted, without a teacher network.",
        epilog=EPILOG,
        **style,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name, help, run, takes_recipe=True):
        epilog = EPILOG.replace("train RECIPE", "detect BACKBONE") if name == "detect" else EPILOG
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog, **style)
        sub.set_defaults(run=run)
        if takes_recipe:
            sub.add_argument("recipe", metavar="RECIPE", help=f"a YAML file, or one of: {', '.join(shipped_recipes())}")
        return sub

    for add in (add_training_commands, add_reading_commands, add_using_commands, add_bench_command):
        add(command)
    for sub in commands.choices.values():
        options = [option.removeprefix("--") for action in sub._actions for option in action.option_strings]
        sub.set_defaults(options=[option for option in options if not option.startswith("-")])
    return parser


def add_training_commands(command: Callable[..., Parser]):
    """What trains: one network, a detector, methods × seeds, trials."""
    train = command("train", "train one network with one method", run_train)
    add_settings(train)
    train.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    detect = command("detect", "train a detector (Faster R-CNN) on a backbone", run_detect, takes_recipe=False)
    detect.add_argument(
        "backbone", metavar="BACKBONE", help="a finished run's folder, local-dir:DIR, hf-hub:ID, or a timm model"
    )
    detect.add_argument(
        "--recipe", metavar="RECIPE", default=DETECTION, help=f"a YAML file, or a shipped one (default: {DETECTION})"
    )
    detect.add_argument(
        "--pretrained", action="store_true", help="start a timm model by name from its pretrained weights"
    )
    add_settings(detect, without=("model.backbone", "model.pretrained"), kind=DetectionRecipe)
    detect.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    compare = command("compare", "train every method with every seed and put them into one table", run_compare)
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        default=["paper"],
        help=f"of: {' '.join(METHOD_SECTIONS)}; `all`, or `paper`: the first five (default: paper)",
    )
    compare.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=[0], help="default: 0")
    compare.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at once, each with its share of cores or its own GPU (default: one a GPU, else as many as `threads` allows)",
    )
    compare.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    add_settings(compare, without=("method", "seed"))
    search = command("search", "choose settings on held-out training data; the test part is not read", run_search)
    search.add_argument(
        "--over",
        nargs="+",
        action="extend",
        metavar="SETTING=VALUES",
        default=[],
        help="what to choose: pskd.alpha=0.3:0.9, optim.lr=0.01:0.3:log, optim.name=sgd,adamw",
    )
    search.add_argument("--trials", type=int, metavar="N", default=8, help="trials to run (default: 8)")
    search.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=[0], help="of each trial (default: 0)")
    search.add_argument(
        "--metric", metavar="NAME", default="nll", help="the best on the held-out part wins (default: nll)"
    )
    search.add_argument("--prune", action="store_true", help="stop trials that do worse than the median (Optuna's)")
    search.add_argument("--search_seed", type=int, metavar="SEED", default=0, help="fixes what is drawn (default: 0)")
    search.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    add_settings(search, without=("seed",))


def add_reading_commands(command: Callable[..., Parser]):
    """What reads: recipes, finished runs, weights in a file."""
    report = command("report", "compare existing runs: tables and one HTML page", run_report, takes_recipe=False)
    report.add_argument("runs", metavar="RUNS", nargs="+", help="run folders, or folders that hold some (runs/digits)")
    report.add_argument(
        "--output", metavar="DIR", help="where to write (default: the folder that holds all of the runs)"
    )
    report.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        default=[],
        help="further figures: all, or of: brier ece15 adaptive_ece classwise_ece smooth_ece augrc coverage_at_5_risk "
        "risk_at_80_coverage",
    )
    show = command("show", "print a recipe, where each value comes from, and what the run will cost", run_show)
    add_settings(show)
    evaluate = command(
        "evaluate", "score a finished run's weights, or those in a file", run_evaluate, takes_recipe=False
    )
    evaluate.add_argument(
        "run_or_recipe", metavar="RUN", nargs="?", help="a finished run; with --checkpoint a recipe, or nothing"
    )
    evaluate.add_argument("--checkpoint", metavar="FILE", help="weights, or a checkpoint of the PS-KD authors' code")
    add_settings(evaluate)
    dashboard = command("dashboard", "build wandb's workspace that compares a recipe's runs", run_dashboard, False)
    dashboard.add_argument("runs", metavar="RUNS", help="a comparison's folder (runs/digits), or its recipe")
    dashboard.add_argument("--entity", help="user or team on wandb (default: the recipe's, else the account's own)")
    dashboard.add_argument("--project", help="project on wandb (default: the recipe's)")
    dashboard.add_argument("--publish", action="store_true", help="put it on wandb (with an account)")
    command("models", "list this package's networks", run_models, takes_recipe=False)


def add_using_commands(command: Callable[..., Parser]):
    """What uses a finished run: on other people's pictures and lines, for other people's machines."""
    predict = command(
        "predict",
        "classify images of your own, or find objects in them, with a finished run",
        run_predict,
        takes_recipe=False,
    )
    predict.add_argument("run_dir", metavar="RUN", help="a finished run's folder")
    predict.add_argument("images", metavar="IMAGES", nargs="*", help="image files, folders or quoted patterns")
    predict.add_argument(
        "--against", metavar="DATA", help="tell the run's test images from these: a folder of images, or a data set"
    )
    predict.add_argument("--json", metavar="FILE", help="write the predictions there too")
    predict.add_argument(
        "--top", type=int, metavar="N", help="classifiers: classes to name for each image (default: 5)"
    )
    predict.add_argument(
        "--output", metavar="DIR", help="detectors: folder for copies with boxes (default: RUN/predicted)"
    )
    predict.add_argument(
        "--confidence", type=float, metavar="P", help="detectors: least confidence of a box (default: 0.5)"
    )
    predict.add_argument("--best", action="store_true", help="the best epoch's network instead of the last's")
    translate = command("translate", "translate lines with a finished run", run_translate, takes_recipe=False)
    translate.add_argument("run_dir", metavar="RUN", help="a finished run's folder")
    translate.add_argument("file", metavar="FILE", nargs="?", default="-", help="a line a sentence (default: -, stdin)")
    translate.add_argument(
        "--json", metavar="FILE", help="write translations and each token's confidence there too; - to stdout instead"
    )
    translate.add_argument("--best", action="store_true", help="the best epoch's network instead of the last's")
    push = command(
        "push", "write a finished run with its model card for timm and the hub", run_push, takes_recipe=False
    )
    push.add_argument("run_dir", metavar="RUN", help="a finished run's folder")
    push.add_argument("to", metavar="REPO_OR_FOLDER", help="a new folder; with --hub a repository (user/name)")
    push.add_argument("--hub", action="store_true", help="to the Hugging Face hub")
    push.add_argument("--private", action="store_true", help="as a private repository, where it is a new one")
    push.add_argument("--best", action="store_true", help="the best epoch's network instead of the last's")
    export = command("export", "write a finished run as one ONNX file", run_export, takes_recipe=False)
    export.add_argument("run_dir", metavar="RUN", help="a finished run's folder")
    export.add_argument("file", metavar="FILE", help="where to write it")
    export.add_argument("--format", choices=["onnx"], default="onnx", help="default: onnx")
    export.add_argument("--best", action="store_true", help="the best epoch's network instead of the last's")


def add_bench_command(command: Callable[..., Parser]):
    """What measures the machine."""
    bench = command("bench", "measure what this machine does", run_bench, takes_recipe=False)
    parts = ["step", "data", "store", "metrics", "start", "translation", "detection"]
    bench.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {' '.join(parts)} (default: all but the last two, under five minutes)",
    )
    bench.add_argument(
        "--processes", nargs="+", type=int, metavar="N", help="store: so many each time (default: 1 2 4)"
    )
    bench.add_argument(
        "--sizes", nargs="+", metavar="NxK", help="store: samples x classes (default: 50000x100 300000x1000)"
    )
    bench.add_argument("--images", metavar="DIR", help="data: JPEG files to stream (default: random ones)")
    bench.add_argument("--text", metavar="DIR", help="translation: pairs in de and en (default: random words)")
    bench.add_argument("--json", metavar="PATH", help="write the figures there too")


def add_settings(parser: argparse.ArgumentParser, without=(), kind=Recipe):
    """An option for every setting, with its sentence; values are checked by the recipe, not here."""
    groups = {}
    for key, field in settings(kind).items():
        if key in without:
            continue
        section = key.rpartition(".")[0] or "run"
        group = groups.setdefault(section, parser.add_argument_group(section) if section not in groups else None)
        default = "" if field.is_required() else f" (default: {field.default})"
        group.add_argument(
            f"--{key}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=(field.description + default).replace("%", "%%"),
        )
    for former, key in FORMER_NAMES.items():
        if key in settings(kind) and key not in without:
            parser.add_argument(f"--{former}", dest=key, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def overrides(arguments: argparse.Namespace, rest: list[str]) -> dict[str, str]:
    """The settings given on the command line, those inside a mapping (--model.kwargs.width 16) among them."""
    found = {key: value for key, value in vars(arguments).items() if key in settings()}
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise InputError(f"unexpected argument {word!r}: settings are given as --section.name value")
        if not _is_inside_mapping(name):
            raise InputError(f"unknown option --{name}{nearest(name, arguments.options, '--')}")
        if not equals:
            raise InputError(f"--{name} needs a value")
        found[name] = value
    return found


def _is_inside_mapping(name: str) -> bool:
    parent = settings().get(name.rpartition(".")[0])
    return parent is not None and "dict" in str(parent.annotation)


def with_values_joined(words: list[str]) -> list[str]:
    """`--model.kwargs.width=16` for `--model.kwargs.width 16`: argparse does not know it and would read 16 as RECIPE or RUN."""
    joined, words = [], list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--") and _is_inside_mapping(word[2:]) and words and not words[0].startswith("--"):
            word = f"{word}={words.pop(0)}"
        joined.append(word)
    return joined


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

    try:
        with Display(quiet) as display:
            result = run(display)
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # else it has said what it saved
            stopped.args = (f"interrupted; the same command {resumes(recipe)}",)
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
        print(
            f"pskd-timm: {recipe.run_dir}: {lost}; unless a line of that rank says why, the same command {resumes(recipe)}",
            file=sys.stderr,
        )
        return FAILED
    except (OSError, SafetensorError) as error:
        print(
            f"pskd-timm: {recipe.run_dir}: {reason(error)}; once that is mended, the same command {resumes(recipe)}",
            file=sys.stderr,
        )
        return FAILED
    if is_main_process():
        from .metrics import format_metrics
        from .run.folder import read_metrics

        last, best, metrics = result.last, result.best, read_metrics(result.values)
        print(f"last epoch {last['epoch']}: {format_metrics(last, metrics)}")
        print(f"best epoch {best['epoch']} (best on {best['chosen_on']}): {format_metrics(best, metrics)}")
        print(f"wrote {result.run_dir}")
    if distributed.is_initialized():  # NCCL warns where a process leaves without
        distributed.destroy_process_group()
    return DONE


def resumes(recipe: Recipe) -> str:
    """What the same command will do after a failure."""
    from .run.folder import checkpoints

    newest = checkpoints(recipe.run_dir)[-1:]
    if not newest:
        return "starts from scratch: there is no checkpoint yet"
    return f"{'without --resume never ' if recipe.resume == 'never' else ''}resumes from {newest[0].name}"


def run_compare(arguments, rest):
    recipe = load(arguments, rest)
    from .comparison import compare
    from .progress import Display

    with Display(arguments.quiet) as display:
        found = compare(recipe, arguments.methods, arguments.seeds, arguments.jobs, display)
    tell(found)
    return FAILED if found.failed else DONE


def run_report(arguments, rest):
    if rest:
        raise InputError(f"unknown option {rest[0]}: report takes run folders, --metrics NAMES and --output DIR")
    from .reports.build import report

    tell(report(arguments.runs, arguments.output, arguments.metrics))
    return DONE


def tell(comparison):
    """Print a comparison's table and where it was written."""
    from rich.console import Console

    from .reports.tables import further_table, terminal_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        terminal_table(comparison.rows, comparison.metrics, comparison.heading, console.width, comparison.kind)
    )
    if comparison.further:
        console.print(further_table(comparison.rows, comparison.further))
    print("\n".join([*comparison.notes, "wrote " + ", ".join(map(str, comparison.paths))]))


def run_search(arguments, rest):
    recipe = load(arguments, rest)
    from .metrics import format_metrics
    from .progress import Display
    from .study import search
    from .tasks import task_class

    options = (arguments.trials, arguments.seeds, arguments.metric, arguments.prune, arguments.search_seed)
    with Display(arguments.quiet) as display:
        found = search(recipe, arguments.over, *options, display)
    chosen = ", ".join(f"{key} {value}" for key, value in found.best.settings.items())
    print(f"chosen: trial {found.best.number} of {len(found.trials)}: {chosen}")
    print(f"on the held-out part: {format_metrics(found.best.figures, task_class(recipe.task).metrics)}")
    print("wrote " + ", ".join(map(str, found.paths)))
    return DONE


def run_show(arguments, rest):
    recipe = load(arguments, rest)
    recipe.check_method(recipe.method)
    from rich.console import Console

    from .show import run_lines, sources_table

    Console(width=None if sys.stdout.isatty() else 140).print(sources_table(recipe))
    print("\n".join(run_lines(recipe)))
    return DONE


def run_evaluate(arguments, rest):
    from .metrics import format_metrics
    from .progress import Display

    given = overrides(arguments, rest)
    if arguments.checkpoint:
        name = arguments.run_or_recipe
        recipe = load_recipe(name, given) if name else with_overrides({"epochs": 1}, given, "command line", "evaluate")
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
    metrics = read_metrics(read_result(Path(arguments.run_or_recipe)))
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
    from rich.console import Console

    from .show import models_table

    Console(width=None if sys.stdout.isatty() else 140).print(models_table())
    return DONE


def run_predict(arguments, rest):
    refuse([word for word in rest if word.startswith("-")], arguments)
    arguments.images += rest  # those that stand after an option
    check_file("--json", arguments.json)
    if bool(arguments.images) == bool(arguments.against):
        raise InputError("predict RUN IMAGES classifies images, predict RUN --against DATA holds the run against them")
    from rich.console import Console

    from .run.folder import task_of

    detector = task_of(Path(arguments.run_dir)) == "detection"
    for option in ("top", "against") if detector else ("output", "confidence"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option} is for {'classifiers' if detector else 'detectors'}, not for this run")
    if detector:
        return run_predict_boxes(arguments)
    if arguments.against:
        return run_against(arguments)
    from .files import write_atomic
    from .prediction import calibration_line, predict, predictions_table
    from .progress import Display

    with Display(not sys.stdout.isatty()) as display:
        found = predict(
            arguments.run_dir, arguments.images, 5 if arguments.top is None else arguments.top, arguments.best, display
        )
    Console(width=None if sys.stdout.isatty() else 140).print(predictions_table(found))
    print(calibration_line(found))
    if arguments.json:
        try:
            write_atomic(Path(arguments.json), json.dumps(found, indent=1, ensure_ascii=False))
        except OSError as error:
            raise InputError(f"--json: {arguments.json} cannot be written: {reason(error)}") from None
        print(f"wrote {arguments.json}")
    return tell_unreadable(found)


def run_predict_boxes(arguments):
    from rich.console import Console

    from .detection.prediction import CONFIDENCE, boxes_table, predict_boxes
    from .progress import Display

    confidence = CONFIDENCE if arguments.confidence is None else arguments.confidence
    where = (arguments.output, arguments.json)
    with Display(not sys.stdout.isatty()) as display:
        found = predict_boxes(arguments.run_dir, arguments.images, *where, confidence, arguments.best, display)
    Console(width=None if sys.stdout.isatty() else 140).print(boxes_table(found))
    folder = arguments.output or Path(arguments.run_dir) / "predicted"
    print(f"wrote copies with boxes into {folder}, and {arguments.json or Path(folder) / 'predictions.json'}")
    return tell_unreadable(found)


def tell_unreadable(found: dict) -> int:
    """Print a line for each image that could not be read; the exit code."""
    unreadable = [row["error"] for row in found["images"] if "error" in row]
    for error in unreadable:
        print(f"pskd-timm: {error}", file=sys.stderr)
    return FAILED if unreadable else DONE


def run_against(arguments):
    from .files import write_atomic
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
    print(f"against {found['images']:,} images of {found['name']}, {found['weights']} epoch's network")
    if arguments.json:
        write_atomic(Path(arguments.json), json.dumps(found, indent=1, ensure_ascii=False))
        print(f"wrote {arguments.json}")
    return FAILED if found["unreadable"] else DONE


def run_translate(arguments, rest):
    if arguments.file == "-" and len(rest) == 1 and not rest[0].startswith("-"):
        arguments.file = rest.pop()  # which stands after an option
    refuse(rest, arguments)
    check_file("--json", arguments.json)
    from .files import write_atomic
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
        try:
            write_atomic(Path(arguments.json), json.dumps(found, indent=1, ensure_ascii=False))
        except OSError as error:
            raise InputError(f"--json: {arguments.json} cannot be written: {reason(error)}") from None
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
    if name and not Path(name).absolute().parent.is_dir():
        raise InputError(f"{option}: there is no folder {Path(name).absolute().parent}")
    if name and Path(name).is_dir():
        raise InputError(f"{option}: {name} is a folder, a file is wanted")


def refuse(rest: list[str], arguments: argparse.Namespace):
    """Raise InputError for what a command without settings does not know."""
    if rest:
        raise InputError(f"unknown option {rest[0]}{nearest(rest[0].removeprefix('--'), arguments.options, '--')}")


def run_bench(arguments, rest):
    refuse(rest, arguments)
    from .bench import PARTS, QUICK_PARTS, bench
    from .bench.store import parse_size
    from .files import write_atomic

    if unknown := [part for part in arguments.parts if part not in PARTS]:
        raise InputError(f"bench has no part {unknown[0]!r}, only {', '.join(PARTS)}{nearest(unknown[0], PARTS)}")
    if arguments.processes and not 1 <= min(arguments.processes) <= max(arguments.processes) <= 64:
        raise InputError("--processes must be from 1 to 64")
    check_file("--json", arguments.json)
    sizes = [parse_size(text) for text in arguments.sizes] if arguments.sizes else None
    found = bench(
        dict.fromkeys(arguments.parts or QUICK_PARTS),
        sizes=sizes,
        processes=arguments.processes,
        images=arguments.images,
        text=arguments.text,
    )
    if arguments.json:
        write_atomic(Path(arguments.json), json.dumps(found, indent=1))
    return DONE


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        words = with_values_joined(sys.argv[1:] if argv is None else argv)
        arguments, rest = make_parser().parse_known_args(words)
        return arguments.run(arguments, rest)
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
