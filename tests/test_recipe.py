import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pskd_timm
from pskd_timm import InputError, load_recipe
from pskd_timm.cli import load
from pskd_timm.detection.recipes import load_detection_recipe
from pskd_timm.options import make_parser
from pskd_timm.recipe import data_name, settings
from pskd_timm.recipe_files import SHIPPED, shipped_recipes

PACKAGE = Path(pskd_timm.__file__).parent


def shipped(name):
    """A shipped recipe; the one for users' own data needs to be told where that is."""
    return load_recipe(name, {"data.path": "my_images"} if name == "custom" else None)


def test_runs_that_lie_among_the_recipes_are_none(tmp_path, monkeypatch):
    for name in ("digits", "cifar100/resnext29", "runs/notebook/pskd/seed0/recipe", "results/digits/pskd/seed0/recipe"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.yaml").touch()
    monkeypatch.setattr("pskd_timm.recipe_files.SHIPPED", tmp_path)
    assert shipped_recipes() == ["cifar100/resnext29", "digits"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_its_header_says_how_to_run_it(name):
    assert shipped(name).epochs >= 1
    header = (SHIPPED / f"{name}.yaml").read_text().split("\nepochs")[0]
    assert header.startswith("#") and f"pskd-timm compare {name}" in header


def test_every_setting_has_a_sentence():
    assert [key for key, field in settings().items() if not (field.description or "").endswith(".")] == []


def test_the_command_line_lies_over_the_recipe_and_the_recipe_over_the_default():
    recipe = load_recipe("digits", {"optim.lr": "0.05", "model.kwargs.width": "8", "optim.milestones": "[3, 4.5]"})
    assert (recipe.optim.lr, recipe.model.kwargs["width"], recipe.optim.milestones) == (0.05, 8, [3.0, 4.5])
    assert recipe.source_of("optim.lr") == recipe.source_of("model.kwargs") == "command line"
    assert recipe.source_of("data.source").endswith("digits.yaml")
    assert recipe.source_of("optim.momentum") == "default"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"optim.lrr": "1"}, "unknown setting 'optim.lrr': did you mean optim.lr?"),
        ({"lr": "1"}, "did you mean optim.lr"),
        ({"optim.lr": "-1"}, "command line: optim.lr should be greater than 0, got '-1'"),
        ({"optim.lr": "fast"}, "optim.lr should be a valid number"),
        ({"pskd.alpha": "1.5"}, "pskd.alpha should be less than or equal to 1"),
        ({"pskd.alpha": "nan"}, "finite"),
        ({"epochs": "2.5"}, "epochs should be a valid integer"),
        ({"method": "psk"}, "'baseline', 'label_smoothing', 'cskd', 'tfkd', 'pskd', .* or 'maxsup'"),
        ({"optim.milestones": "[500]"}, r"\[500.0\] lie beyond the last of"),
        ({"optim.milestones": "[3, 4"}, r"write lists as \[3, 4\]"),
        ({"optim.warmup_epochs": "1000"}, "must be below epochs"),
        ({"grad_accum_steps": "1000"}, "must not exceed batch_size"),
        ({"augment": "5"}, "augment should be a valid dictionary"),
        ({"augment.mean": "[0.5]"}, "augment.mean .*at least 3 items"),
        ({"optim.milestones": "3"}, r"should be a valid list, written \[3, 4\]"),
        ({"augment.mean": "0.5"}, r"should be a valid list, written \[0.485, 0.456, 0.406\]"),
        ({"model.kwargs.width": "a: b: c"}, "cannot read 'a: b: c'"),
        ({"data.path": "x"}, "source digits ships with the package and takes no path"),
        ({"tfkd.alpha": "true"}, "tfkd.alpha"),
        (
            {"grad_accum_steps": 2, "model.compile": "max-autotune"},
            "does not go with model.compile max-autotune",
        ),
    ],
)
def test_a_bad_setting_is_refused_in_one_line_that_names_it(overrides, says):
    with pytest.raises(InputError, match=says) as error:
        load_recipe("digits", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epochs: 1\nepochs: 2\n", "epochs stands twice"),
        ("epochs: [1\n", "not valid YAML"),
        ("- epochs\n", "mapping"),
        ("epochs: 1\nmodel: {name: resnet18}\n", "data is missing"),
        ("epochs: 1\nmodel: {name: resnet18}\ndata: {}\n", "name a data set"),
        # A misspelt name is told before what is missing, which it may stand for.
        ("epoch: 1\nmodel: {name: resnet18}\ndata: {source: digits}\n", "unknown setting 'epoch'.*did you mean epochs"),
        ("epochs: 1\nmodle: {name: resnet18}\ndata: {source: digits}\n", "unknown setting 'modle'.*did you mean model"),
        ("optim: {lrr: 1}\nmodel: {name: resnet18}\n", "unknown setting 'optim.lrr'.*did you mean optim.lr"),
        ("optim: {lr: fast}\nmodel: {name: resnet18}\n", "optim.lr should be a valid number"),
        (
            "epochs: 1\naccumulate: 2\ngrad_accum_steps: 2\n",
            "accumulate is what grad_accum_steps was called before: give one",
        ),
        (
            "epochs: 1\nmodel: {name: resnet18}\ndata: {source: digits, sise: 3}\n",
            "data.sise.*did you mean data.source|data.sise",
        ),
        ("epochs: 1\nmodel:\ndata: {source: digits}\n", "model should be a section"),
        ("epochs: 1\nmodel: resnet18\n", "model should be a section of settings .*got 'resnet18'"),
        ("epochs: true\nmodel: {name: resnet18}\ndata: {source: digits}\n", "epochs: should be a number, not true"),
        ("1: 2\n", "the key 1 is no text"),
        ("optim.lr: 0.1\n", "write optim.lr as a section"),
        ("", "this is empty"),
        ("name: ../up\nepochs: 1\nmodel: {name: resnet18}\ndata: {source: digits}\n", "name should be a plain name"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as error:
        load_recipe(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_former_names_mean_the_same_in_files_in_python_and_on_the_command_line(tmp_path):
    (tmp_path / "old.yaml").write_text(
        "epochs: 1\naccumulate: 2\naugment: {mix_share: 0.3}\nmodel: {name: resnet18}\ndata: {source: digits}\n"
    )
    by_file = load_recipe(str(tmp_path / "old.yaml"))
    by_python = load_recipe("digits", {"accumulate": 2, "augment.mix_share": 0.3})
    words = ["train", "digits", "--accumulate", "2", "--augment.mix_share=0.3"]
    arguments, rest = make_parser().parse_known_args(words)
    by_command = load(arguments, rest)
    for recipe in (by_file, by_python, by_command):
        assert recipe.grad_accum_steps == 2 and recipe.augment.mix_prob == 0.3
    assert by_command.source_of("grad_accum_steps") == "command line"


def test_a_file_that_names_the_stores_format_means_the_same(tmp_path):
    for text, topk in (("store_format: topk, store_topk: 3", 3), ("store_format: full", None)):
        path = tmp_path / "old.yaml"
        path.write_text(f"epochs: 1\nmodel: {{name: resnet18}}\ndata: {{source: digits}}\npskd: {{{text}}}\n")
        assert load_recipe(str(path)).pskd.store_topk == topk


@pytest.mark.parametrize("command", ["train", "search", "detect"])
def test_help_tells_no_former_names(command, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args([command, "--help"])
    shown = capsys.readouterr().out
    assert "--grad_accum_steps" in shown and "--accumulate" not in shown
    assert f"-m pskd_timm {'detect BACKBONE' if command == 'detect' else 'train RECIPE'}" in shown


def test_an_override_may_be_a_section_and_leaves_the_rest_of_it():
    nested = load_recipe("digits", {"optim": {"lr": 0.3}, "model": {"kwargs": {"width": 8}}})
    assert nested == load_recipe("digits", {"optim.lr": 0.3, "model.kwargs": {"width": 8}})


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({}, "{file}"),
        ({"pskd.alpha_warmup_epochs": "4"}, "command line and {file}"),
        ({"pskd.alpha_warmup_epochs": "4", "epochs": "3"}, "command line"),
        ({"epochs": "3"}, "{file} and command line"),
    ],
)
def test_settings_that_do_not_go_together_are_told_with_where_each_was_set(tmp_path, overrides, where):
    path = tmp_path / "warm.yaml"
    path.write_text(
        "epochs: 4\nmodel: {name: resnet18}\ndata: {source: digits}\nseed: 3\npskd: {alpha_warmup_epochs: 4}\n"
    )
    with pytest.raises(InputError) as error:
        load_recipe(str(path), overrides)
    assert str(error.value).startswith(f"{where.format(file=path)}: pskd.alpha_warmup_epochs 4 must be below epochs")


def test_what_a_short_run_and_mixed_inputs_are_refused_for_comes_with_the_way_out():
    with pytest.raises(InputError, match=r"must be below epochs 1: for so short a run --optim.warmup_epochs 0.1, or 0"):
        load_recipe("custom", {"data.path": "my_images", "epochs": 1})
    load_recipe("custom", {"data.path": "my_images", "epochs": 1, "optim.warmup_epochs": 0.1})
    mixed = load_recipe("digits", {"augment.cutmix": 1})
    with pytest.raises(InputError, match="leave cskd out of --methods, or set both to 0"):
        mixed.check_method("cskd")
    mixed.check_method("pskd")


def test_settings_of_one_section_that_do_not_go_together_are_told_with_where_they_were_set():
    for overrides in ({"data.crop_pct": "0.9"}, {"data.loading": "streaming"}, {"data.path": "x"}):
        with pytest.raises(
            InputError, match=f"^({'.*digits.yaml and ' if 'data.path' in overrides else ''})command line: "
        ):
            load_recipe("digits", overrides)


def test_yaml_merge_keys_and_overrides_of_written_mappings_work(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "epochs: 1\nmodel: {name: resnet18}\ndata: &d {source: digits}\naugment:\n  <<: &a {hflip: 0.5}\n  crop_padding: 2\n"
    )
    recipe = load_recipe(str(path), {"model.kwargs.drop_rate": "0.1"})
    assert (recipe.augment.hflip, recipe.augment.crop_padding, recipe.model.kwargs) == (0.5, 2, {"drop_rate": 0.1})
    assert recipe.name == "merged"


@pytest.mark.parametrize("name", ["digts", "", ".", "/", "digits/"])
def test_a_missing_recipe_is_told_with_the_shipped_ones(name):
    with pytest.raises(InputError, match="digits"):
        load_recipe(name)


def test_tfkds_defaults_follow_its_teacher():
    virtual = load_recipe("digits").tfkd
    trained = load_recipe("digits", {"tfkd.teacher": "runs/x"}).tfkd
    assert (virtual.alpha, virtual.temperature, virtual.multiplier) == (0.1, 20, None)
    assert (trained.alpha, trained.temperature, trained.multiplier) == (0.95, 6, None)


def test_a_resolved_recipe_written_to_yaml_and_read_again_is_the_same(tmp_path):
    import yaml

    for name in shipped_recipes():
        recipe = shipped(name)
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
        assert load_recipe(str(tmp_path / "again.yaml")).model_dump() == recipe.model_dump()


def test_recipe_and_command_line_import_neither_torch_nor_timm():
    code = (
        "import sys, pskd_timm.cli; pskd_timm.cli.main(['train', 'digits', '--epochs', 'x']);"
        "print({'torch', 'timm', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()" and "epochs" in done.stderr


def test_public_names_are_functions_even_after_their_modules_were_imported():
    from pskd_timm import compare, evaluate, train

    assert callable(train) and callable(compare) and callable(evaluate)
    assert pskd_timm.train is train and callable(pskd_timm.evaluate)


# A module may import what stands in its own line or above. What is not named itself goes with its room.
LAYERS = [
    {
        "__init__",
        "errors",
        "section",
        "presets",
        "effective",
        "rng",
        "order",
        "batch",
        "losses",
        "files",
        "fingerprint",
        "cpus",
        "progress",
        "metrics",
        "floors",
    },
    {"methods.__init__", "methods.sections", "tasks.__init__", "translation.__init__", "translation.section"}
    | {"recipe", "recipe_files"},
    {"run.__init__", "run.result", "run.folder", "ranks", "calibration", "outcomes", "store", "models", "optim"}
    | {"detection.__init__", "detection.settings", "detection.metrics", "detection.outcomes"},
    {"run.launch", "teacher", "methods", "data", "translation"},
    {"tasks"},
    {"methods.build"},
    {"run"},
    {"training", "evaluation", "checks", "reports"},
    {"detection"},
    {
        "comparison",
        "study",
        "show",
        "prediction",
        "detection.prediction",
        "out_of_distribution",
        "export",
        "bench",
        "adaptors",
    },
    {"options"},
    {"cli"},
    {"__main__"},
]


def imported_modules(path):
    """The modules of the package that a file imports, by `from .module` or `from pskd_timm.module`, as dotted names."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in left_out:
            words = (node.module or "").split(".") if node.module else []
            if node.level:
                words = [*parts[: len(parts) - node.level], *words]
            elif words[0] == "pskd_timm":
                words = words[1:]
            else:
                continue
            folder = PACKAGE.joinpath(*words)
            if folder.is_dir():
                inside = [".".join([*words, alias.name]) for alias in node.names]
                is_module = [(folder / f"{alias.name}.py").is_file() for alias in node.names]
                whole = ".".join([*words, "__init__"])
                yield from (name if found else whole for name, found in zip(inside, is_module, strict=True))
            else:
                yield ".".join(words)


def test_imports_point_one_way():
    level = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}

    def level_of(module):
        return level[module] if module in level else level[module.split(".")[0]]

    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for target in imported_modules(path):
            assert level_of(target) <= level_of(module), f"{path} imports {target}"


def test_a_data_set_is_named_by_what_is_read():
    def name(**data):
        settings = {f"data.{key}": value for key, value in ({"gaussian_noise": 0} | data).items()}
        return data_name(load_recipe("digits", settings).data)

    assert name() == "digits"
    assert name(source="cifar100", path="/copies/of/it") == "cifar100"
    assert name(source="someone/pets") == "someone/pets"
    assert name(source="someone/pets", path="/my/cats") == "cats"
    assert name(source=None, path="my/dogs/") == "dogs"


def test_a_tilde_in_output_dir_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe("digits", {"output_dir": "~/runs"}).run_dir == tmp_path / "runs" / "pskd" / "seed0"
    detector = load_detection_recipe(
        "detection/voc_small", {"output_dir": "~/runs", "model.label": "one", "data.path": "x"}
    )
    assert detector.run_dir == tmp_path / "runs" / "one" / "seed0"
