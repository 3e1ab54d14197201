"""A method is one file, one section, one line: a new one in a copy of the package runs through every command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pskd_timm
from pskd_timm.recipe_files import SHIPPED

FILE = '''"""Cross-entropy times a factor."""

from functools import partial

import torch.nn.functional as F

from .. import losses
from .base import Method


class Scaled(Method):
    term_names = ("cross_entropy",)

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def loss(self, model, batch):
        logits = model(batch.inputs)
        cross_entropy = batch.label_loss(partial(F.cross_entropy, losses.at_least_float32(logits)))
        self.terms = cross_entropy.detach()[None]
        return self.factor * cross_entropy, logits
'''
SECTION = '''

class Scaled(MethodSection):
    title = "Scaled loss"
    colour = "#CC79A7"
    implementation = "pskd_timm.methods.scaled:Scaled"

    factor: Positive = 0.5
    """What cross-entropy is multiplied by."""

    def effective_loss(self, num_classes, num_epochs, epoch):
        return EffectiveLoss(self.factor)
'''
LINE = '    "scaled": Scaled,\n}'


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package and its recipes with one more method, by the three steps that pskd_timm/README.md names."""
    folder = tmp_path_factory.mktemp("sixth")
    copy = shutil.copytree(Path(pskd_timm.__file__).parent, folder / "pskd_timm")
    if not (copy / "recipes").is_dir():
        shutil.copytree(SHIPPED, folder / "recipes")
    (copy / "methods" / "scaled.py").write_text(FILE)
    with (copy / "methods" / "sections.py").open("a") as sections:
        sections.write(SECTION)
    table = copy / "methods" / "__init__.py"
    table.write_text(
        table.read_text().replace("    LabelSmoothing,\n", "    LabelSmoothing,\n    Scaled,\n").replace("}", LINE)
    )
    return folder


def command(package, *words):
    code = "import sys; from pskd_timm.__main__ import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=environment, cwd=package
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_new_method_is_a_file_a_section_and_a_line(package):
    shown = command(package, "show", "digits", "--method", "scaled", "--scaled.factor", "0.25")
    assert "scaled.factor" in shown and "effective loss: 0.25 × cross-entropy" in shown
    small = ["--epochs", 2, "--data.limit_train", 200, "--data.limit_test", 100, "--model.kwargs", "{width: 4}"]
    command(package, "compare", "digits", "--methods", "baseline", "scaled", *small, "--output_dir", "runs")
    results = {
        m: json.loads((package / "runs" / m / "seed0" / "result.json").read_text()) for m in ("baseline", "scaled")
    }
    assert results["scaled"]["method"] == "scaled" and results["scaled"]["last"] != results["baseline"]["last"]
    assert "Scaled loss" in command(package, "report", "runs")
    page = (package / "runs" / "report.html").read_text()
    assert "Scaled loss" in page and "#CC79A7" in page.upper()
