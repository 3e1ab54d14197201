"""A run's confidences of its test images against those of images of something else."""

import html
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Picture
from pyarrow import parquet
from scipy.special import softmax
from sklearn.metrics import roc_auc_score, roc_curve

from pskd_timm import InputError, load_recipe, predict, report, train
from pskd_timm.cli import main
from pskd_timm.out_of_distribution import against
from pskd_timm.prediction import Classifier
from pskd_timm.progress import Display
from pskd_timm.reports.out_of_distribution import FILE, read

GRID = np.geomspace(0.02, 50, 6001)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = {"epochs": 2, "batch_size": 32, "threads": 1, "data.limit_train": 300, "data.limit_test": 90}
    settings |= {"model.kwargs": {"width": 8}, "optim.lr": 0.05, "output_dir": str(folder), "data.gaussian_noise": 0.0}
    for seed in (0, 1):
        train(load_recipe("digits", settings | {"seed": seed}), display=Display(quiet=True))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise of several sizes and modes, in folders."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for i in range(45):
        pixels = rng.integers(0, 256, (8 + i % 3, 8, 3), dtype=np.uint8)
        (folder / f"part {i % 2}").mkdir(exist_ok=True)
        Picture.fromarray(pixels).convert("L" if i % 5 == 0 else "RGB").save(folder / f"part {i % 2}" / f"{i}.png")
    return folder


@pytest.fixture
def run(runs, tmp_path):
    shutil.copytree(runs / "pskd" / "seed0", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def confidences(run, pictures, best):
    of_tests = pd.read_parquet((run / "best" if best else run) / "predictions.parquet").confidence.to_numpy()
    assert not (found := predict(run, [str(pictures)], best=best))["calibrated"]  # so these are as in the file
    return of_tests, np.array([row["confidence"] for row in found["images"]])


@pytest.mark.parametrize("best", [False, True])
def test_auroc_and_fpr95_are_scikit_learns_of_the_kept_and_the_predicted_confidences(run, pictures, best):
    inside, outside = confidences(run, pictures, best)
    truth, values = np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside]
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    found = against(run, str(pictures), best)
    assert found["auroc"] == pytest.approx(100 * roc_auc_score(truth, values), abs=1e-3)
    assert found["fpr95"] == pytest.approx(100 * fpr[np.argmax(tpr >= 0.95)])
    assert (found["images"], found["test_images"], found["unreadable"]) == (45, 90, 0)
    assert found["weights"] == ("best" if best else "last") and read(run) == [found]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A run with a held-out part, on which a temperature can be fitted."""
    folder = tmp_path_factory.mktemp("held_out")
    settings = {"epochs": 2, "batch_size": 32, "threads": 1, "data.limit_train": 400, "data.limit_test": 90}
    settings |= {"data.holdout_fraction": 0.3, "data.gaussian_noise": 0.0, "output_dir": str(folder)}
    settings |= {"model.kwargs": {"width": 8}, "optim.lr": 0.05, "method": "baseline"}
    train(load_recipe("digits", settings), display=Display(quiet=True))
    return folder / "baseline" / "seed0"


def softened(table):
    """Largest probability at the temperature of the least NLL on the held-out part, found on a grid."""
    log = [np.log(np.clip(np.stack(each.probabilities).astype(float), 1e-38, None)) for each in table]
    labels = table[0].label.to_numpy()
    at = [softmax(log[0] / t, axis=1)[np.arange(len(labels)), labels] for t in GRID]
    return GRID[np.argmax([np.log(p).mean() for p in at])], log[1]


@pytest.mark.parametrize("best", [False, True])
def test_calibrated_auroc_and_fpr95_are_scikit_learns_of_confidences_at_the_temperature(
    held_out, pictures, best, capsys
):
    folder = held_out / "best" if best else held_out
    temperature, of_tests = softened(
        [pd.read_parquet(folder / f"{name}.parquet") for name in ("holdout", "predictions")]
    )
    classifier = Classifier.of_run(held_out, best)
    images = np.stack([classifier.prepare(path) for path in sorted(pictures.rglob("*.png"))])
    of_others = classifier.probabilities(torch.from_numpy(images).permute(0, 3, 1, 2)).double().log().numpy()
    found = against(held_out, str(pictures), best)
    assert found["temperature"] == pytest.approx(temperature, rel=2e-3)
    inside, outside = (softmax(each / found["temperature"], axis=1).max(axis=1) for each in (of_tests, of_others))
    truth, values = np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside]
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    assert found["calibrated_auroc"] == pytest.approx(100 * roc_auc_score(truth, values), abs=1e-3)
    assert found["calibrated_fpr95"] == pytest.approx(100 * fpr[np.argmax(tpr >= 0.95)])
    assert found["auroc"] != found["calibrated_auroc"] and found in read(held_out)
    assert main(["predict", str(held_out), "--against", str(pictures), *["--best"] * best]) == 0
    said = f"AUROC {found['calibrated_auroc']:.2f} %  FPR95 {found['calibrated_fpr95']:.2f} %: calibrated, temperature"
    assert said in capsys.readouterr().out


def test_the_report_has_the_calibrated_figures_beside_the_others_and_a_dash_where_a_run_has_none(
    held_out, pictures, tmp_path
):
    for method in ("baseline", "pskd"):
        shutil.copytree(held_out, tmp_path / method / "seed0", ignore=shutil.ignore_patterns("checkpoints", FILE))
    recipe = tmp_path / "pskd" / "seed0" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: baseline", "method: pskd"))
    (tmp_path / "pskd" / "seed0" / "holdout.parquet").unlink()
    found, none = (against(tmp_path / method / "seed0", str(pictures)) for method in ("baseline", "pskd"))
    assert "temperature" not in none
    section = html.unescape(report(tmp_path).paths[-1].read_text()).split('id="outside"')[1].split("</table>")
    row = section[0].split(">Baseline</th>")[1].split("</tr>")[0]
    shown = [f">{found[name]:.2f}<" for name in ("auroc", "fpr95", "calibrated_auroc", "calibrated_fpr95")]
    assert all(cell in row for cell in shown)
    assert (
        f"AUROC %, calibrated, {pictures.name} (45)" in section[0] and "fitted on the run's held-out part" in section[1]
    )
    assert section[0].split(">PS-KD</th>")[1].split("</tr>")[0].count("–") == 2


def test_probabilities_that_are_gone_or_damaged_leave_or_refuse_the_calibrated_figures(held_out, pictures, tmp_path):
    run = shutil.copytree(held_out, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", FILE))
    table = parquet.read_table(run / "predictions.parquet")
    parquet.write_table(table.drop_columns("probabilities"), run / "predictions.parquet")
    assert "calibrated_auroc" not in against(run, str(pictures))
    (run / "holdout.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match="holdout.parquet: damaged"):
        against(run, str(pictures))


def test_a_data_set_of_the_same_images_gives_the_same_figures_and_another_time_replaces_the_first(
    run, pictures, tmp_path
):
    files = sorted(str(path) for path in pictures.rglob("*.png"))
    table = Dataset.from_dict({"photo": files}, features=Features({"photo": Image()}))
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "validation.parquet")
    of_files, of_table = against(run, str(pictures)), against(run, str(tmp_path / "set"))
    assert of_table == of_files | {"name": "set"}
    assert against(run, str(pictures / "*" / "*.png")) == of_files | {"name": str(pictures / "*" / "*.png")}
    assert against(run, "digits")["images"] == 597  # a well-known one, its test split
    before = read(run)
    assert len(before) == 4 and against(run, str(pictures)) == of_files and len(read(run)) == 4


def test_an_image_that_cannot_be_decoded_is_named_left_out_and_counted(run, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "others")
    (tmp_path / "others" / "broken.jpg").write_bytes(b"no picture")
    expected = against(run, str(pictures))
    command = ["predict", str(run), "--against", str(tmp_path / "others"), "--json", str(tmp_path / "found.json")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "broken.jpg) cannot be decoded" in said.err and "45 images of others" in said.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["unreadable"] == 1 and found["auroc"] == pytest.approx(expected["auroc"])
    assert f"AUROC {found['auroc']:.2f} %" in said.out


def test_a_place_that_cannot_be_written_is_told_in_a_line(run, pictures, capsys):
    assert main(["predict", str(run), "--against", str(pictures), "--json", "/proc/x.json"]) == 2
    said = capsys.readouterr()
    assert "AUROC" in said.out and said.err.startswith("pskd-timm: --json: ") and said.err.count("\n") == 1


def test_the_report_has_a_table_of_them_over_the_seeds(runs, pictures, tmp_path):
    found = [against(runs / "pskd" / f"seed{seed}", str(pictures)) for seed in (0, 1)]
    comparison = report(runs, tmp_path / "report")
    text = html.unescape(comparison.paths[-1].read_text())
    section = text.split('id="outside"')[1].split("</table>")[0]
    for name in ("auroc", "fpr95"):
        values = np.array([each[name] for each in found])
        cell = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
        assert cell in section and cell in (tmp_path / "report" / "comparison.md").read_text()
    assert f"AUROC %, {pictures.name} (45)" in section
    (runs / "pskd" / "seed1" / FILE).write_text("[{")
    assert "seed1" in str(pytest.raises(InputError, read, runs / "pskd" / "seed1").value)
    assert "45" in html.unescape(report(runs, tmp_path / "report").paths[-1].read_text()).split('id="outside"')[1]


def test_what_cannot_be_held_against_the_run_is_refused_with_a_reason(run, pictures, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "words").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "words" / "a.csv").write_text("text\nhello\n")
    for words, says in (
        ([], "predict RUN --against DATA"),
        (["--against", str(pictures), str(pictures)], "predict RUN --against DATA"),
        (["--against", str(tmp_path / "broken")], "none of its 1 images can be decoded"),
        (["--against", str(tmp_path / "words")], "words: neither images nor a data set that can be read: no column of"),
        (["--against", str(tmp_path / "empty")], "empty: neither images nor a data set that can be read: "),
        (["--against", "nowhere/*.png"], "no such image"),
    ):
        assert main(["predict", str(run), *words]) == 2
        assert says in capsys.readouterr().err
    assert main(["predict", str(run), "--top", "1", *map(str, sorted(pictures.rglob("*.png"))[:2])]) == 0
    assert main(["predict", str(run), "--topp", "1", str(pictures)]) == 2
    (run / "predictions.parquet").unlink()
    assert main(["predict", str(run), "--against", str(pictures)]) == 2
    assert "the confidences of the run's test images are gone" in capsys.readouterr().err
