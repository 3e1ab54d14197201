import re
import shlex
import subprocess
import sys
import zipfile
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from commands import LIMIT
from pskd_timm.cli import main
from pskd_timm.detection.recipes import shipped as shipped_for_detectors
from pskd_timm.options import make_parser
from pskd_timm.recipe_files import load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "recipes", "pskd_timm", "pskd_timm/bench", "findings")
PAGES = {folder: (ROOT / folder / "README.md").read_text() for folder in FOLDERS}


def blocks(language, folder=None):
    text = PAGES[folder] if folder else "\n".join(PAGES.values())
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(marked=None):
    """The words of each of the READMEs' commands, as the shell passes them on.

    `marked` chooses those that say, or do not say, that they need more.
    """
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    if marked is not None:
        lines = [line for line in lines if ("  # needs" in line) == marked]
    words = [list(takewhile(lambda word: word not in (">", "|"), shlex.split(line, comments=True))) for line in lines]
    return [line[line.index(start) + 1 :] for line in words for start in ("pskd-timm", "pskd_timm") if start in line]


def mentioned():
    """The words of each command that stands between the lines."""
    found = [words for page in PAGES.values() for words in re.findall(r"`pskd-timm (\w+ [^`…]+)`", page)]
    return [shlex.split(words) for words in found if not words.endswith("--help")]


# What makes a command of the README one of seconds; later options go before earlier ones.
TINY = "--epochs 1 --model.name cifar_preact_resnet_tiny --model.kwargs.width 4 --tracking.wandb disabled --seeds 0"
SMALLER = {
    "digits": f"{TINY} --data.limit_train 60 --data.limit_test 40 --methods baseline pskd",
    "custom": f"{TINY} --epochs 2 --data.image_size 16 --batch_size 8",
}
SEARCHED = "--epochs 1 --data.limit_train 60 --model.kwargs.width 4 --trials 2"


def test_the_readme_is_short_and_the_links_of_all_pages_lead_somewhere():
    assert PAGES["."].count("\n") <= 220
    for folder, page in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", page):
            path, _, heading = target.partition("#")
            if target.startswith("http"):
                continue
            file = (ROOT / folder / path).resolve() if path else ROOT / folder / "README.md"
            assert file.exists(), f"{folder}/README.md: {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if heading else []
            anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
            assert not heading or heading in anchors, f"{folder}/README.md: {target}"


def test_the_readmes_commands_run_one_after_the_other_but_for_those_that_say_what_they_need(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new_images").mkdir()
    for i in range(30):
        split, kind = ("train", "train", "test")[i % 3], ("dark", "bright")[i % 2]
        (tmp_path / "my_images" / split / kind).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (20 + i, 24), (60 + 100 * (i % 2), i, 9))
        picture.save(tmp_path / "my_images" / split / kind / f"{i}.jpg")
        picture.save(tmp_path / "new_images" / f"{i}.png")
    done = []
    for words in commands(marked=False):
        name = words[1].removeprefix("recipes/").removesuffix(".yaml") if len(words) > 1 else ""
        smaller = SEARCHED if words[0] == "search" else SMALLER.get(name, "")
        assert main([*words, *shlex.split(smaller)]) == 0, (words, capfd.readouterr())
        done.append(words[0])
    assert {"compare", "report", "search", "predict", "push", "export"} <= set(done)
    assert (tmp_path / "runs" / "digits" / "report.html").is_file() and (tmp_path / "predictions.json").is_file()


@pytest.mark.parametrize("words", [*commands(), *mentioned()], ids=" ".join)
def test_every_command_of_the_readme_parses_and_names_a_recipe_that_is_there(words):
    arguments, rest = make_parser().parse_known_args(words)
    assert not rest
    # Some commands take a finished run instead.
    name = getattr(arguments, "recipe", "RECIPE").removeprefix("recipes/").removesuffix(".yaml")
    assert name in shipped_recipes() + shipped_for_detectors() or name == "RECIPE"


def test_the_readmes_first_commands_are_the_set_up():
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert first == "pip install -e . && pskd-timm compare recipes/digits.yaml"
    assert second == "pip install -e '.[test]' && pytest"
    assert second.replace("install", "install -q") in (ROOT / ".ci" / "run").read_text()


def test_the_loop_of_ones_own_in_the_readme_runs_and_learns():
    torch.manual_seed(0)
    labels = torch.arange(100) % 10
    images = torch.eye(10)[labels] + 0.1 * torch.randn(100, 10)
    model = torch.nn.Linear(10, 10)
    scope = {
        "torch": torch,
        "images": images,
        "labels": labels,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 5.0),
    }
    exec(blocks("python")[0], scope)
    assert scope["pskd"].store.gather().argmax(1).eq(labels).float().mean() > 0.9


def test_the_page_of_the_rooms_names_every_module_and_folder_of_the_package():
    package = ROOT / "pskd_timm"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert {name for name in modules | rooms if f"`{name}`" not in PAGES["pskd_timm"]} == set()


def test_accelerates_configuration_is_one_process_that_the_command_line_overrides():
    config = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    assert config["distributed_type"] == "NO" and config["num_processes"] == 1


def test_a_wheel_holds_the_recipes_and_shows_them_from_any_folder(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=LIMIT)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    shipped = {
        path.relative_to(tmp_path / "site/pskd_timm/recipes").with_suffix("").as_posix()
        for path in (tmp_path / "site/pskd_timm/recipes").rglob("*.yaml")
    }
    assert shipped == {*shipped_recipes(), *shipped_for_detectors(), "sweep"}
    assert (tmp_path / "site/pskd_timm/recipes/compare_methods.ipynb").is_file()
    assert len(list((tmp_path / "site/pskd_timm/recipes/slurm").glob("*.sh"))) == 3
    assert all((tmp_path / "site/pskd_timm/reports" / name).is_file() for name in ("page.html", "paper_results.csv"))
    assert (tmp_path / "site/pskd_timm/py.typed").is_file()
    digits = tmp_path / "site/pskd_timm/data/digits"
    assert {path.name for path in digits.iterdir()} == {"train.parquet", "test.parquet"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pskd_timm").rglob("*.py")}
    assert all((tmp_path / "site" / module).is_file() for module in modules)
    code = "import pskd_timm.recipe_files as r; print(r.__file__, r.load_recipe('digits').data.source)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "site")
    assert done.stdout.split() == [str(tmp_path / "site/pskd_timm/recipe_files.py"), "digits"], done.stderr


def test_the_code_is_ruffs():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_digits_recipe_chooses_on_held_out_training_data_and_says_so():
    from pskd_timm.recipe_files import find_recipe

    assert "held-out part of the training data" in find_recipe("digits").read_text().replace("\n# ", " ")
    assert load_recipe("digits").data.gaussian_noise > 0
