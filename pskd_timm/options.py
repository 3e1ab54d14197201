"""What the command line takes: its commands, their arguments, and an option for each setting of a recipe."""

import argparse
import re
from collections.abc import Callable
from itertools import chain

from . import __version__
from .detection.recipes import DEFAULT as DETECTION
from .detection.settings import DetectionRecipe
from .errors import InputError, nearest
from .methods import METHOD_SECTIONS
from .recipe import Recipe, settings
from .recipe_files import FORMER_NAMES, shipped_recipes

EPILOG = """exit codes: 0 done, 1 a run failed, 2 bad input; stopped by a signal, training saved: 130 INT, 143 TERM, 138 USR1
several processes: accelerate launch --multi_gpu --num_processes N -m pskd_timm train RECIPE (also without a GPU)"""


class Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        self.words = list(args or [])
        return super().parse_known_args(args, namespace)

    def error(self, message):
        if not_a_number := re.fullmatch(r"argument (.+): invalid int value: (.+)", message):
            message = "{} takes whole numbers, not {}".format(*not_a_number.groups())
        missing = message.partition("arguments are required: ")[2]
        if missing:
            message = f"{missing} is missing"
        # What stands after an option may have been taken for one of its values.
        if (missing or not_a_number) and self.words[:1] and self.words[0].startswith("-"):
            message += f": what is no option comes first, `{self.usage_without_options()}`"
        raise InputError(f"{message} ({self.prog} --help)")

    def usage_without_options(self) -> str:
        """`pskd-timm train RECIPE …`"""
        names = [action.metavar for action in self._actions if not action.option_strings]
        return " ".join([self.prog, *names, "…"])


class CommandParser(Parser):
    """That of the words before a command's own."""

    def error(self, message):
        word = next(iter(self.words), "")
        *options, commands = (action.option_strings or list(action.choices) for action in self._actions)
        if not word:
            what = f"COMMAND is missing, one of {', '.join(commands)}"
        elif word.startswith("-"):
            what = f"unknown option {word}{nearest(word, chain(*options))}"
        else:
            what = f"unknown command {word!r}{nearest(word, commands) or ': it is one of ' + ', '.join(commands)}"
        raise InputError(f"{what} ({self.prog} --help)")


def make_parser() -> Parser:
    """All commands; each setting of a recipe is an option of those that take a recipe."""
    style = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = CommandParser(
        "pskd-timm",
        description="Classifiers whose confidences can be trusted, without a teacher network.",
        epilog=EPILOG,
        **style,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name, help, takes_recipe=True):
        epilog = EPILOG.replace("train RECIPE", "detect BACKBONE") if name == "detect" else EPILOG
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog, **style)
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
    train = command("train", "train one network with one method")
    add_settings(train)
    train.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    detect = command("detect", "train a detector (Faster R-CNN) on a backbone", takes_recipe=False)
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
    compare = command("compare", "train every method with every seed and put them into one table")
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
    search = command("search", "choose settings on held-out training data; the test part is not read")
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
    report = command("report", "compare existing runs: tables and one HTML page", takes_recipe=False)
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
    show = command("show", "print a recipe, where each value comes from, and what the run will cost")
    add_settings(show)
    evaluate = command("evaluate", "score a finished run's weights, or those in a file", takes_recipe=False)
    evaluate.add_argument(
        "run_or_recipe", metavar="RUN", nargs="?", help="a finished run; with --checkpoint a recipe, or nothing"
    )
    evaluate.add_argument("--checkpoint", metavar="FILE", help="weights, or a checkpoint of the PS-KD authors' code")
    add_settings(evaluate)
    dashboard = command("dashboard", "build wandb's workspace that compares a recipe's runs", False)
    dashboard.add_argument("runs", metavar="RUNS", help="a comparison's folder (runs/digits), or its recipe")
    dashboard.add_argument("--entity", help="user or team on wandb (default: the recipe's, else the account's own)")
    dashboard.add_argument("--project", help="project on wandb (default: the recipe's)")
    dashboard.add_argument("--publish", action="store_true", help="put it on wandb (with an account)")
    command("models", "list this package's networks", takes_recipe=False)


def add_using_commands(command: Callable[..., Parser]):
    """What uses a finished run: on other people's pictures and lines, for other people's machines."""
    predict = command(
        "predict",
        "classify images of your own, or find objects in them, with a finished run",
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
    translate = command("translate", "translate lines with a finished run", takes_recipe=False)
    translate.add_argument("run_dir", metavar="RUN", help="a finished run's folder")
    translate.add_argument("file", metavar="FILE", nargs="?", default="-", help="a line a sentence (default: -, stdin)")
    translate.add_argument(
        "--json", metavar="FILE", help="write translations and each token's confidence there too; - to stdout instead"
    )
    translate.add_argument("--best", action="store_true", help="the best epoch's network instead of the last's")
    push = command("push", "write a finished run with its model card for timm and the hub", takes_recipe=False)
    push.add_argument("run_dir", metavar="RUN", help="a finished run's folder")
    push.add_argument("to", metavar="REPO_OR_FOLDER", help="a new folder; with --hub a repository (user/name)")
    push.add_argument("--hub", action="store_true", help="to the Hugging Face hub")
    push.add_argument("--private", action="store_true", help="as a private repository, where it is a new one")
    push.add_argument("--best", action="store_true", help="the best epoch's network instead of the last's")
    export = command("export", "write a finished run as one ONNX file", takes_recipe=False)
    export.add_argument("run_dir", metavar="RUN", help="a finished run's folder")
    export.add_argument("file", metavar="FILE", help="where to write it")
    export.add_argument("--format", choices=["onnx"], default="onnx", help="default: onnx")
    export.add_argument("--best", action="store_true", help="the best epoch's network instead of the last's")


def add_bench_command(command: Callable[..., Parser]):
    """What measures the machine."""
    bench = command("bench", "measure what this machine does", takes_recipe=False)
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
            what = "" if word.startswith("-") else "one recipe is taken, and "
            raise InputError(f"unexpected argument {word!r}: {what}settings are given as --section.name value")
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
