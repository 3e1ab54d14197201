import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from pyarrow import parquet
from rich.console import Console
from torchmetrics.classification import MulticlassAccuracy

import browser
from pskd_timm import InputError, Result, report, train
from pskd_timm.calibration import fit_temperature, with_temperature
from pskd_timm.cli import main, tell
from pskd_timm.floors import ece_floor
from pskd_timm.methods import PAPER
from pskd_timm.metrics import METRICS, Metric, score
from pskd_timm.progress import WIDE, Display
from pskd_timm.recipe import METHOD_SECTIONS
from pskd_timm.recipe_files import load_recipe
from pskd_timm.reports import plots
from pskd_timm.reports.page import figure_tables, paper_notes, table_html, untested
from pskd_timm.reports.paper import departures, paper_figures
from pskd_timm.reports.plots import (
    COLOURS,
    SCALED,
    TITLES,
    class_errors,
    confidence_histogram,
    curves,
    looks,
    per_class_error,
    reliability,
    risk_coverage,
    spread,
)
from pskd_timm.reports.runs import by_method, find_runs, history, predictions, rows
from pskd_timm.reports.scaling import scale, scaled_baselines
from pskd_timm.reports.svg import svg
from pskd_timm.reports.tables import _broken, latex_table, markdown_table, signed, summary, terminal_table
from pskd_timm.reports.versus import against_baseline, predicted
from pskd_timm.run.folder import read_result

SIX = list(METRICS.values())

SETTINGS = {
    "epochs": 2,
    "batch_size": 64,
    "threads": 1,
    "data.limit_train": 300,
    "data.limit_test": 120,
    "data.gaussian_noise": 0.2,
    "data.holdout_fraction": 0.2,
    "optim.lr": 0.05,
    "model.kwargs": {"width": 8},
}


def trained(folder, **overrides):
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return train(load_recipe("digits", SETTINGS | {"output_dir": str(folder)} | given), display=Display(quiet=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods, two seeds: the one training that these tests share."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("baseline", "pskd"):
        for seed in (0, 1):
            trained(folder, method=method, seed=seed)
    return folder


@pytest.fixture(scope="module")
def compared(runs):
    return report([runs])


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the runs to damage."""
    return Path(shutil.copytree(runs, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoints", "comparison*")))


class Tables(HTMLParser):
    """The cells of a page's tables: [table][row][cell]."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = [dict(attributes).get("data-value"), ""]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.cell[1] += data


def results(folder, method, which="last"):
    each = [json.loads((folder / method / f"seed{seed}" / "result.json").read_text())[which] for seed in (0, 1)]
    return {name: np.array([values[name] for values in each]) for name in METRICS}


def swatches(found):
    return {run.method: "" for run in found}


def page(comparison):
    return comparison.paths[-1].read_text()


def test_csv_latex_markdown_and_page_have_the_figures_of_result_json(runs, compared):
    assert [path.name for path in compared.paths] == [
        *("comparison.csv", "comparison.md", "comparison.tex", "significance.csv", "comparison.png", "report.html")
    ]
    csv = pd.read_csv(runs / "comparison.csv")
    tables = Tables(page(compared)).tables
    for place, method in ((0, "baseline"), (2, "pskd")):  # between them, the baseline after temperature scaling
        last, best = results(runs, method), results(runs, method, "best")
        for i, name in enumerate(METRICS):
            mine = csv[csv.method == method]
            np.testing.assert_allclose(mine[name], last[name], rtol=1e-12)
            np.testing.assert_allclose(mine[f"best_{name}"], best[name], rtol=1e-12)
            for table, values in ((0, last[name]), (1, best[name])):
                value, text = tables[table][1 + place][2 + i]
                assert float(value) == pytest.approx(values.mean())
                assert text.startswith(f"{values.mean():.2f} ± {values.std(ddof=1):.2f}")
            written = f"{last[name].mean():.2f} $\\pm$ {last[name].std(ddof=1):.2f}"
            assert written in (runs / "comparison.tex").read_text()
    with Image.open(runs / "comparison.png") as picture:
        assert picture.width > 1500


def test_the_latex_table_has_booktabs_bold_for_the_best_and_nothing_unescaped(compared):
    table_rows = compared.rows.copy()
    table_rows.loc[3, "status"] = "failed: 100% of_it\nbroke"
    text = latex_table(table_rows, SIX, "digits")
    table = text[text.index(r"\begin{tabular}") :]
    assert all(rule in table for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"top-1 error \%"))
    for line in table.splitlines()[4:6]:
        assert line.count("&") == 9 and line.endswith(r"\\")
    assert table.count(r"\textbf{") >= len(METRICS) - 1  # no ECE that perfect calibration explains
    assert all(line.startswith("%") for line in text[: text.index(r"\begin{tabular}")].splitlines())
    assert not re.search(r"(?<!\\)%", table) and not set("±×³–_") & set(table)


def test_the_differences_with_their_intervals_stand_in_a_file_too(runs, compared, copied):
    table = pd.read_csv(runs / "significance.csv")
    assert set(table.method) == {"pskd", "baseline+temperature"} and set(table.baseline) == {"baseline"}
    of_pskd = table[table.method == "pskd"].set_index("metric")
    assert (of_pskd.seeds == 2).all() and list(of_pskd.index) == ["top1_error", "nll", "ece", "aurc"]
    for metric in of_pskd.index:
        assert of_pskd.difference[metric] == pytest.approx(
            results(runs, "pskd")[metric].mean() - results(runs, "baseline")[metric].mean(), rel=1e-4, abs=1e-6
        )
    nll = of_pskd.loc["nll"]
    assert nll.low < nll.difference < nll.high and 0 < nll.p <= 1
    for path in copied.rglob("predictions.parquet"):
        path.unlink()
    notes = report(copied).notes
    assert not (copied / "significance.csv").exists()
    assert notes == ["No difference is tested: there is no predictions.parquet beside the results."]


def test_frames_hold_the_runs_the_means_and_the_epochs(runs, compared):
    last = results(runs, "pskd")["nll"]
    assert compared.frame.loc["pskd", "nll"] == pytest.approx(last.mean())
    assert compared.frame.loc["pskd", "nll_std"] == pytest.approx(last.std(ddof=1)) and compared.frame.runs["pskd"] == 2
    history = compared.history_frame
    assert (
        len(history) == 8 and set(history.method) == {"baseline", "pskd"} and {"epoch", "seed", "nll"} <= set(history)
    )
    assert "PS-KD" in compared._repr_html_() and "<b>" in compared._repr_html_()
    result = Result(runs / "pskd" / "seed1", read_result(runs / "pskd" / "seed1"))
    assert result.frame.loc["last", "nll"] == result.last["nll"] and list(result.history_frame.epoch) == [1, 2]
    shown = result._repr_html_()
    assert f"{result.last['top1_error']:.2f}" in shown and "pskd" in shown and str(runs) in shown


def test_temperature_on_the_page_is_fitted_on_the_held_out_part_and_scores_the_test_part(runs, compared):
    def read(path):
        table = pd.read_parquet(path)
        return torch.tensor(np.stack(table.probabilities)), torch.tensor(table.label.to_numpy())

    table = next(t for t in Tables(page(compared)).tables if "temperature" in t[0][2][1])
    row = next(line for line in table[1:] if line[0][1] == "PS-KD")
    temperatures, before, after = [], [], []
    for seed in (0, 1):
        folder = runs / "pskd" / f"seed{seed}"
        held, labels = read(folder / "holdout.parquet")
        right = int((held.argmax(1) == labels).sum())
        if right < 10:  # of 60
            reason = f"PS-KD, seed {seed}: only {right} of 60 held-out predictions are right, 10 are needed to fit one"
            assert reason in page(compared)
            continue
        grid = np.exp(np.linspace(-2, 2, 4001))
        nll = [torch.nn.functional.cross_entropy(held.log() / t, labels).item() for t in grid]
        temperatures.append(grid[int(np.argmin(nll))])
        test, labels = read(folder / "predictions.parquet")
        before.append(score(test, labels)["nll"])
        after.append(score(with_temperature(test, temperatures[-1]), labels)["nll"])
    assert float(row[2][0]) == pytest.approx(np.mean(temperatures), rel=2e-3)
    assert (
        row[1][1] == str(len(temperatures)) and row[3][1] == "60"
    )  # runs with a temperature, held-out samples of each
    assert float(row[4][0]) == pytest.approx(np.mean(before), rel=1e-5)
    assert float(row[5][0]) == pytest.approx(np.mean(after), rel=1e-4)


def test_the_page_shows_what_was_run_tests_plots_and_pictures_and_asks_nothing_of_the_network(compared):
    text = page(compared)
    for words in (
        "cifar_preact_resnet_tiny",
        "4 of 4 finished",
        "differ in method and seed only",
        "torch",
        "McNemar",
        "p =",
        "0.2 × cross-entropy + 0.8 × KL(its own last prediction",  # what PS-KD's loss amounts to
    ):
        assert words in text
    assert text.count("<svg") > 10 and text.count('src="data:image/png;base64,') == 12
    assert "#000000" not in text.split("</style>")[1] and "DejaVu" not in text
    outside = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!data:|#)([^"\'\s>)]+)', text)
    assert outside == [] and "@import" not in text


def test_the_mistakes_are_those_that_are_wrong_with_the_most_confidence(runs, compared):
    table = pd.read_parquet(runs / "baseline" / "seed0" / "predictions.parquet")
    wrong = table[table.label != table.prediction].nlargest(6, "confidence")
    shown = re.findall(r"said <b>(\d)</b>, ([\d.]+) %<br>is <b>(\d)</b>", page(compared))[:6]
    expected = [(str(r.prediction), f"{100 * r.confidence:.1f}", str(r.label)) for r in wrong.itertuples()]
    assert shown == expected


def test_runs_that_failed_stopped_or_are_missing_are_told_in_every_table(copied):
    failed = copied / "baseline" / "seed1"
    shutil.rmtree(failed)
    failed.mkdir()
    (failed / "run.log").write_text("Traceback …\nDiverged: <loss>\nfailed: Diverged: <loss>\n")
    (copied / "pskd" / "seed0" / "result.json").unlink()
    trainless = copied / "label_smoothing" / "seed0"
    trainless.mkdir(parents=True)
    shutil.copy(copied / "baseline" / "seed0" / "recipe.yaml", trainless)
    text = (trainless / "recipe.yaml").read_text().replace("method: baseline", "method: label_smoothing")
    (trainless / "recipe.yaml").write_text(text)
    found = report(copied)
    status = found.rows.set_index(["method", "seed"]).status
    assert (
        status["baseline", 1] == "failed: Diverged: <loss>"
        and status["pskd", 0] == "unfinished: 2 of 2 epochs, but no result.json"
    )
    assert status["label_smoothing", 0] == "unfinished: 0 of 2 epochs" and status["label_smoothing", 1] == "missing"
    assert found.failed == 4
    assert "4 of 6 runs are not in the figures" in page(found) and "Diverged: &lt;loss&gt;" in page(found)
    for name in ("comparison.md", "comparison.tex", "comparison.csv"):
        assert "Diverged" in (copied / name).read_text() and "missing" in (copied / name).read_text()
    # Baseline has seed 0 only and PS-KD seed 1 only: no pair.
    assert "Not compared with a baseline" in page(found) and "PS-KD" in page(found).split("Not compared with")[1][:160]


def test_a_run_given_twice_is_taken_once_and_two_results_of_one_run_are_refused(copied, tmp_path, capsys):
    before = report(copied).rows
    shutil.copytree(copied / "pskd", tmp_path / "again" / "pskd")
    again = report([copied, copied / "pskd", tmp_path / "again"], tmp_path / "out").rows
    pd.testing.assert_frame_equal(again, before)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("once more: taken once" in line for line in said)
    path = tmp_path / "again" / "pskd" / "seed0" / "result.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"seconds": values["seconds"] + 1}))
    with pytest.raises(InputError, match="are one run with two results: leave one out"):
        report([copied, tmp_path / "again"], tmp_path / "out")


def test_of_a_finished_run_and_one_that_is_not_the_finished_one_is_taken(copied, tmp_path, capsys):
    again = shutil.copytree(copied / "pskd" / "seed1", tmp_path / "again" / "pskd" / "seed1")
    (again / "result.json").unlink()
    found = report([tmp_path / "again", copied], tmp_path / "out")
    assert set(found.rows.status) == {"finished"} and found.frame.runs["pskd"] == 2
    error = capsys.readouterr().err
    assert f"left out: {again} (unfinished: 2 of 2 epochs" in error and "which is finished" in error


def test_a_failure_that_was_logged_before_the_last_epoch_is_an_earlier_starts(copied):
    run = copied / "pskd" / "seed0"
    (run / "result.json").unlink()
    (run / "run.log").write_text("failed: Diverged: loss\n")
    assert report(copied).rows.set_index(["method", "seed"]).status["pskd", 0] == "failed: Diverged: loss"
    later = (run / "run.log").stat().st_mtime + 10
    os.utime(run / "metrics.jsonl", (later, later))
    assert report(copied).rows.set_index(["method", "seed"]).status["pskd", 0].startswith("unfinished: 2 of 2 epochs")


def test_runs_of_which_only_some_name_an_argument_of_the_network_are_told_apart(copied):
    for run in copied.glob("pskd/seed*"):
        text = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(re.sub(r"kwargs:\s*\n?\s*\{?width: 8\}?", "kwargs: {}", text))
    assert "kwargs: {}" in (copied / "pskd/seed0/recipe.yaml").read_text()
    methods = {run.method for run in find_runs([copied])}
    assert methods == {"baseline model.kwargs.width=8", "pskd model.kwargs.width=None"}


@pytest.mark.parametrize("width", [80, 100, 140])
def test_in_a_terminal_no_figure_is_cut_where_settings_make_the_names_long(copied, width):
    for seed, alpha in ((0, 0.3), (1, 0.5)):
        recipe = copied / "pskd" / f"seed{seed}" / "recipe.yaml"
        text = recipe.read_text().replace("alpha: 0.8", f"alpha: {alpha}")
        recipe.write_text(text.replace("store_topk: null", f"store_topk: {3 + seed}"))
    found = report(copied)
    assert max(len(title) for title in found.frame.index) > 30
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(terminal_table(found.rows, found.metrics, found.heading, width))
    text = console.export_text()
    assert "…" not in text
    for method in found.frame.index:
        for metric in ("top1_error", "nll", "ece", "aurc"):
            assert f"{found.frame[metric][method]:.2f}" in text


def test_in_a_narrow_terminal_the_table_has_its_right_border_and_no_word_is_broken(compared):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(compared.rows, compared.metrics, compared.heading, 80))
    lines = console.export_text().splitlines()
    table = [line for line in lines if line[0] in "┏┃┡│└"]
    assert all(len(line.rstrip()) == len(table[0].rstrip()) <= 80 for line in table)
    assert "calibrated" in "".join(table) and "seconds" not in "".join(table)
    words = next(line for line in table if "│ Baseline  " in line).replace("│", " ").split()
    assert words[:2] == ["Baseline", "2"] and all(re.fullmatch(r"\d+\.\d\d", word) for word in words[2:])
    left_out = "In comparison.md, and in a terminal of 140 columns: top-5 error %, E-AURC ×10³, seconds."
    assert left_out in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("width", [36, 44, 60, 80, 140])
def test_every_column_is_shown_or_named_among_those_left_out(compared, width):
    console = Console(width=width, record=True, file=io.StringIO())
    table = terminal_table(compared.rows, compared.metrics, compared.heading, width)
    console.print(table)
    shown = {" ".join(str(column.header).split()) for column in table.columns}
    everything = markdown_table(compared.rows, compared.metrics).splitlines()[0].strip("| ").split(" | ")
    (_, *left_out) = " ".join(console.export_text().split()).split(f"in a terminal of {WIDE} columns: ")
    named = left_out[0].split(".")[0].split(", ") if left_out else []
    assert sorted([*shown, *named]) == sorted(everything)
    assert ("If calibrated:" in str(table.caption)) == ("ECE % if calibrated" in shown)


def test_in_a_terminal_the_notes_are_broken_between_words_and_elsewhere_each_is_a_line(compared, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    said = {}
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stdout", kind())
        tell(compared)
        said[kind] = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue()).splitlines()
    note = compared.notes[0]
    assert len(note) > 60 and note in said[io.StringIO]
    assert said[Terminal][-1] == said[io.StringIO][-1] and max(map(len, said[Terminal][:-1])) <= 60  # but for paths
    assert note in " ".join(line.rstrip() for line in said[Terminal])


def test_a_small_difference_is_not_shown_as_none():
    assert [signed(value) for value in (-1.234, 0.0042, -0.0042, 0.0)] == ["−1.23", "+0.0042", "−0.0042", "+0.00"]


def test_a_setting_in_a_narrow_name_is_broken_after_its_marks_alone():
    name = "PS-KD pskd.alpha=0.8 pskd.teacher=store"
    assert _broken(name, 60) == name
    assert _broken(name, 14).splitlines() == ["PS-KD", "pskd.alpha=0.8", "pskd.teacher=", "store"]
    assert _broken("Label smoothing", 10).splitlines() == ["Label", "smoothing"]


def test_the_report_says_how_far_confidences_lie_above_the_accuracy(runs, compared):
    (note,) = [note for note in compared.notes if note.startswith("Mean confidence less accuracy")]
    for method, name in (("baseline", "Baseline"), ("pskd", "PS-KD")):
        files = [runs / method / f"seed{seed}" / "predictions.parquet" for seed in (0, 1)]
        gaps = [100 * (table.confidence.mean() - table.correct.mean()) for table in map(pd.read_parquet, files)]
        assert f" {name} {np.mean(gaps):+.1f}".replace("-", "−").replace("PS−KD", "PS-KD") in note


def test_a_seed_is_missing_where_other_methods_of_the_same_settings_have_it(copied):
    shutil.rmtree(copied / "baseline" / "seed1")
    assert list(report(copied).rows.status) == ["finished", "missing", "finished", "finished"]
    recipe = copied / "baseline" / "seed0" / "recipe.yaml"
    recipe.write_text(re.sub(r"\blr: .*", "lr: 0.01", recipe.read_text()))
    assert list(report(copied).rows.status) == ["finished"] * 3


def test_a_report_of_runs_none_of_which_finished_says_so(copied):
    for path in copied.rglob("result.json"):
        path.unlink()
    assert "No run has finished yet" in page(report([copied / "pskd"]))
    assert not (copied / "pskd" / "comparison.png").exists()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


DAMAGES = {
    "empty result": ("result.json", lambda path: path.write_text(""), "result.json is empty"),
    "cut result": ("result.json", cut_short, "result.json is not whole"),
    "other result": ("result.json", lambda path: path.write_text('{"seed": 1}'), "result.json: name: Field required"),
    "NaN": (
        "result.json",
        lambda path: path.write_text(re.sub(r'"nll": [\d.]+', '"nll": NaN', path.read_text())),
        "result.json: last.nll: Input should be a finite number",
    ),
    "no metrics": ("metrics.jsonl", Path.unlink, "metrics.jsonl is empty or missing"),
    "cut metrics": ("metrics.jsonl", cut_short, "metrics.jsonl, line 2 is not whole"),
    "binary metrics": ("metrics.jsonl", lambda path: path.write_bytes(b"\xff\0\n"), "metrics.jsonl, line 1 is not"),
    "empty predictions": ("predictions.parquet", lambda path: path.write_bytes(b""), "predictions.parquet cannot be"),
    "cut predictions": ("predictions.parquet", cut_short, "predictions.parquet cannot be read"),
    "cut holdout": ("holdout.parquet", cut_short, "holdout.parquet cannot be read"),
    "fewer predictions": (
        "predictions.parquet",
        lambda path: shutil.copy(path.with_name("holdout.parquet"), path),
        "predictions.parquet has 60 samples, result.json 120",
    ),
    "no recipe": ("recipe.yaml", Path.unlink, "recipe.yaml is missing"),
    "cut recipe": ("recipe.yaml", lambda path: path.write_text("epochs: [2"), "recipe.yaml line 1: not valid YAML"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_told_with_its_file_and_the_others_stay(copied, damage):
    name, harm, says = DAMAGES[damage]
    harm(copied / "pskd" / "seed1" / name)
    status = rows(find_runs([copied])).set_index(["method", "seed"]).status
    told = [text for text in status if text != "finished"]
    assert len(told) == 1 and told[0].startswith("damaged: ") and says in told[0] and "\n" not in told[0]


def test_the_report_shows_damaged_runs_and_leaves_out_what_nothing_tells_the_method_of(copied, capsys):
    (copied / "pskd" / "seed1" / "result.json").write_text("")
    (copied / "strange").mkdir()
    (copied / "strange" / "recipe.yaml").write_text("epochs: [2")
    content = (copied / "pskd" / "seed0" / "predictions.parquet").read_bytes()
    # Inside the column of probabilities, which only the temperature needs.
    middle = len(content) // 2
    (copied / "pskd" / "seed0" / "predictions.parquet").write_bytes(
        content[: middle - 40] + b"\xff" * 80 + content[middle + 40 :]
    )
    (copied / "baseline" / "seed0" / "mistakes.parquet").write_text("garbage")
    text = page(report(copied))
    assert "1 of 4 runs is not in the figures" in text and "damaged: result.json is empty" in text
    assert "mistakes.parquet is damaged" in text and "PS-KD" in text
    assert re.search(r"left out: .*strange.*not valid YAML", capsys.readouterr().err)


def test_a_report_of_runs_none_of_whose_recipes_can_be_read_has_a_heading(copied):
    for path in copied.rglob("recipe.yaml"):
        path.write_text("epochs: [2")
    assert report(copied / "pskd").heading == "runs, last epoch"


def test_other_numbers_of_classes_under_one_recipe_are_refused(copied):
    path = copied / "pskd" / "seed1" / "result.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"num_classes": 7, "class_names": values["class_names"][:7]}))
    for name in ("predictions.parquet", "holdout.parquet"):
        path.with_name(name).unlink()
    with pytest.raises(InputError, match="different data .num_classes 10, 7"):
        find_runs([copied])


def test_one_seed_has_no_spread_and_its_p_values_are_not_stated_of_the_methods(runs, tmp_path):
    found = report([runs / method / "seed0" for method in ("baseline", "pskd")], tmp_path)
    text = html.unescape(page(found))
    figures = text.split('id="figures"')[1].split('id="curves"')[0]
    assert "±" not in figures and "<b>" not in figures and "one run a method (n = 1)" in figures
    assert "PS-KD's one run" in figures
    assert "One seed each (n = 1)" in text and "±" not in text.split('id="temperature"')[1].split('id="classes"')[0]
    for name in ("comparison.md", "comparison.tex"):
        assert "±" not in (tmp_path / name).read_text() and "n = 1" in (tmp_path / name).read_text()


def test_the_error_of_the_most_frequent_class_stands_under_the_tables(runs, compared):
    labels = pd.read_parquet(runs / "pskd" / "seed0" / "predictions.parquet").label
    error = 100 * (1 - np.bincount(labels).max() / len(labels))
    line = f"always saying the most frequent class of the test part gives a top-1 error of {error:.2f} %"
    assert (
        line in page(compared)
        and line in (runs / "comparison.md").read_text()
        and any(line in note for note in compared.notes)
    )


def test_five_classes_or_fewer_have_no_top5_error_in_any_table(runs, compared):
    found = find_runs([runs])
    for num_classes, shown in ((5, False), (6, True)):
        few = compared.rows.assign(num_classes=num_classes)
        for text in (markdown_table(few, SIX), latex_table(few, SIX, "x"), table_html("x", few, SIX)):
            assert ("top-5" in text) == shown and "top-1" in text
        assert {len(line["cells"]) for line in figure_tables(found, few, SIX, swatches(found))[0]["lines"]} == {
            5 + shown
        }


def test_markdown_cells_keep_their_bars_and_brackets(compared):
    table_rows = compared.rows.copy()
    table_rows.loc[3, "status"] = "failed: a | b <c>\nd"
    assert r"failed: a \| b \<c> d |" in markdown_table(table_rows, SIX)


def test_runs_of_one_method_with_several_settings_are_told_apart(copied):
    recipe = copied / "pskd" / "seed1" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("alpha: 0.8", "alpha: 0.5"))
    found = report(copied)
    methods = {"baseline", "baseline+temperature", "pskd pskd.alpha=0.8", "pskd pskd.alpha=0.5"}
    assert set(found.frame.index) == methods
    recipe.write_text(recipe.read_text().replace("alpha: 0.5", "alpha: 0.8").replace("width: 8", "width: 4"))
    labels = {run.method for run in find_runs([copied]) if run.name == "pskd"}
    assert labels == {"pskd model.kwargs.width=8", "pskd model.kwargs.width=4"}
    recipe.write_text(recipe.read_text().replace("alpha: 0.8", "alpha: 0.5").replace("width: 4", "width: 8"))
    assert "PS-KD pskd.alpha=0.5" in page(found) and "<code>pskd.alpha</code> (0.5 | 0.8)" in page(found)
    found = looks(found.runs)
    assert {look.colour for look in list(found.values())[1:]} == {COLOURS["pskd"]}
    assert len({(look.dash, look.marker) for look in found.values()}) == 3


def with_setting(runs, folder, before, after, shifts):
    """Copies of all runs in `folder`, each with a line of the recipe changed and the NLL of PS-KD's seeds shifted."""
    for run in sorted(runs.glob("*/seed*")):
        copy = shutil.copytree(run, folder / run.parent.name / run.name, ignore=shutil.ignore_patterns("checkpoints"))
        recipe = copy / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(before, after))
        result = json.loads((copy / "result.json").read_text())
        result["last"]["nll"] = 2.0 + (shifts[result["seed"]] if result["method"] == "pskd" else 0.0)
        (copy / "result.json").write_text(json.dumps(result))


def test_with_three_values_of_a_setting_the_differences_are_shown_by_it(runs, tmp_path):
    for epochs, shifts in ((5, (0.3, 0.1)), (20, (0.1, 0.0)), (80, (-0.3, -0.5))):
        with_setting(runs, tmp_path / f"{epochs}", "\nepochs: 2\n", f"\nepochs: {epochs}\n", shifts)
    found = report(tmp_path)
    table = found.by_setting.differences
    assert found.by_setting.key == "epochs" and set(table.method) == {"pskd"} and len(table) == 6
    assert table.groupby("value").nll.mean().to_dict() == pytest.approx({5: 0.2, 20: 0.05, 80: -0.4})
    error = {row.seed: row.top1_error for row in table[table.value == 20].itertuples()}
    expected = results(runs, "pskd")["top1_error"] - results(runs, "baseline")["top1_error"]
    assert [error[0], error[1]] == pytest.approx(list(expected))
    text = (tmp_path / "comparison.md").read_text()
    heads, _, *lines = text.partition("## Difference to the baseline by epochs\n\n")[2].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[1] for line in lines] == ["5", "20", "80"]
    nll = [name.strip("| ") for name in heads.split(" | ")].index("NLL")
    assert [line.split(" | ")[nll] for line in lines] == ["+0.20 ± 0.14", "+0.05 ± 0.07", "−0.40 ± 0.14"]
    assert 'href="#by-setting">By epochs' in page(found) and "<td>+0.20 ± 0.14</td>" in re.sub(
        ' data-value="[^"]*"', "", page(found)
    )
    assert Image.open(tmp_path / "by_setting.png").width > 1000
    axes = plots.differences(table, "epochs", METRICS["nll"]).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "PS-KD")
    assert line.get_xdata() == pytest.approx([5, 20, 80]) and line.get_ydata() == pytest.approx([0.2, 0.05, -0.4])
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["5", "20", "80"]


def test_a_methods_own_setting_has_one_baseline_and_two_values_make_no_line(runs, tmp_path):
    for alpha in (0.3, 0.5, 0.8):
        with_setting(runs, tmp_path / f"{alpha}", "alpha: 0.8", f"alpha: {alpha}", (alpha, alpha))
        if alpha > 0.3:
            shutil.rmtree(tmp_path / f"{alpha}" / "baseline")
        if alpha == 0.5:
            two = report(tmp_path)
            assert two.by_setting is None and not (tmp_path / "by_setting.png").exists()
            assert "by-setting" not in page(two)
    found = report(tmp_path).by_setting
    assert (tmp_path / "by_setting.png").exists()
    shutil.rmtree(tmp_path / "0.8")
    report(tmp_path)
    assert not (tmp_path / "by_setting.png").exists()  # an earlier report's
    assert found.key == "pskd.alpha"
    assert found.differences.groupby("value").nll.mean().to_dict() == pytest.approx({0.3: 0.3, 0.5: 0.5, 0.8: 0.8})


def test_the_report_goes_where_it_is_told_and_takes_single_run_folders(runs, tmp_path, capsys):
    folders = [str(runs / "baseline" / "seed0"), str(runs / "pskd" / "seed0")]
    assert main(["report", *folders, "--output", str(tmp_path / "out")]) == 0
    assert "PS-KD" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "comparison.tex"}


def test_without_predictions_or_pictures_the_page_says_so_and_keeps_its_figures(copied):
    (copied / "pskd" / "seed0" / "mistakes.parquet").unlink()
    text = page(report(copied))
    assert "kept no pictures of their mistakes, as earlier versions did not: PS-KD." in text
    assert text.count('src="data:image/png') == 6 and text.count("said <b>") == 12
    for path in copied.rglob("predictions.parquet"):
        path.unlink()
    text = page(report(copied))
    assert "4 finished runs have no predictions.parquet" in text and "said <b>" not in text and "±" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: [folder / "nowhere"], "nowhere does not exist"),
        (lambda folder: [folder / "baseline" / "seed0" / "best"], "no run here"),
        (lambda folder: [folder / "baseline" / "seed0" / "recipe.yaml"], "is a file: give run folders"),
    ],
)
def test_folders_without_runs_are_refused_in_a_line(runs, change, says):
    with pytest.raises(InputError, match=says) as error:
        report(change(runs))
    assert "\n" not in str(error.value)


def test_different_data_are_refused(copied):
    path = copied / "pskd" / "seed1" / "recipe.yaml"
    path.write_text(path.read_text().replace("gaussian_noise: 0.2", "gaussian_noise: 0.3"))
    with pytest.raises(InputError, match="different data .data.gaussian_noise 0.2, 0.3.*report of its own"):
        report([copied])


def test_other_labels_in_the_test_part_are_not_compared(copied):
    finished = by_method(find_runs([copied]))
    runs = predicted(finished)
    assert [found.seeds for found in against_baseline(finished, runs, SIX)] == [(0, 1)]
    runs["pskd"][0].outcomes["label"] = (runs["pskd"][0].outcomes.label + 1) % 10
    assert [found.seeds for found in against_baseline(finished, runs, SIX)] == [(1,)]
    del runs["pskd"][1]
    assert against_baseline(finished, runs, SIX) == [] and untested(finished, []) == ["PS-KD"]


def test_the_papers_figures_stand_beside_runs_of_its_network_with_what_differs():
    recipe = load_recipe("cifar100/preact_resnet18", {"epochs": "2"})
    figures = paper_figures(recipe)
    assert figures["pskd"] == {"top1_error": 20.82, "top5_error": 5.10, "nll": 0.76, "ece": 1.77, "aurc": 52.10}
    assert set(figures) == set(PAPER) and departures(recipe) == ["epochs 2 instead of 300"]
    assert departures(load_recipe("cifar100/preact_resnet18", {"data.path": "here"})) == []
    assert departures(load_recipe("imagenet/resnet152", {"data.holdout_fraction": "0.04"})) == [
        "data.holdout_fraction 0.04 instead of 0.0"
    ]
    assert paper_figures(load_recipe("digits")) == {}
    assert paper_figures(load_recipe("imagenet/resnet152"))["baseline"]["aurc"] == 61.79


def test_the_page_puts_the_papers_figure_and_the_difference_into_the_cell(copied):
    for path in copied.rglob("recipe.yaml"):
        text = (
            path.read_text()
            .replace("source: digits", "source: cifar100")
            .replace("gaussian_noise: 0.2", "gaussian_noise: 0.0")
        )
        path.write_text(text.replace("cifar_preact_resnet_tiny", "cifar_preact_resnet18"))
    found = find_runs([copied])
    ours = results(copied, "pskd")["top1_error"].mean()
    cell, beside = figure_tables(found, rows(found), SIX, swatches(found))[0]["lines"][1]["cells"][0][1:3]
    assert cell.mean == pytest.approx(ours) and beside == f"paper 20.82 ({ours - 20.82:+.2f})".replace("-", "−")
    assert "epochs 2 instead of 300" in paper_notes(by_method(found))


def test_class_errors_are_torchmetrics_accuracies_and_every_method_has_its_look(runs):
    tables = [pd.read_parquet(runs / "pskd" / f"seed{seed}" / "predictions.parquet") for seed in (0, 1)]
    accuracy = MulticlassAccuracy(10, average="none")
    each = [accuracy(torch.tensor(t.prediction.to_numpy()), torch.tensor(t.label.to_numpy())).numpy() for t in tables]
    np.testing.assert_allclose(class_errors(tables), 100 * (1 - np.mean(each, axis=0)), rtol=1e-5)
    assert set(COLOURS) == set(TITLES) == set(METHOD_SECTIONS)
    every = looks(METHOD_SECTIONS).values()
    assert len({look.colour for look in every}) == len({(look.dash, look.marker) for look in every}) == len(every) == 12
    paper = looks(PAPER).values()
    assert len({look.dash for look in paper}) == len({look.marker for look in paper}) == 5


def test_long_curves_are_thinned_to_300_points():
    history = pd.DataFrame({"method": "pskd", "seed": 0, "epoch": range(1, 2001), "nll": np.linspace(2, 1, 2000)})
    line = curves(history, "nll").axes[0].lines[0]
    assert len(line.get_xdata()) == 300 and (line.get_xdata()[0], line.get_xdata()[-1]) == (1, 2000)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"confidence": rng.uniform(size=5000), "correct": rng.uniform(size=5000) < 0.5})
    assert len(risk_coverage({"pskd": [table]}).axes[0].lines[0].get_xdata()) == 300
    points = reliability({"pskd": [table]}).axes[0].lines[1].get_xydata()
    expected = [table[(table.confidence > k / 10) & (table.confidence <= (k + 1) / 10)].mean() for k in range(10)]
    np.testing.assert_allclose(points, expected, rtol=1e-9)


def test_names_beside_lines_stay_apart_in_order_and_as_near_as_they_can():
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    np.testing.assert_allclose(spread([0.5, 0.5, 0.5], 0.1), [0.4, 0.5, 0.6])
    np.testing.assert_allclose(spread([0.0, 0.01, 0.99, 1.0], 0.1), [0.0, 0.1, 0.9, 1.0])
    rng = np.random.default_rng(0)
    for _ in range(50):
        placed = np.array(spread(sorted(rng.uniform(size=6)), 0.08))
        assert (np.diff(placed) > 0.08 - 1e-9).all() and placed[0] >= 0 and placed[-1] <= 1 + 1e-9


def test_curves_are_named_at_their_ends_and_histograms_have_no_text_over_bars():
    lines = [
        {"method": method, "seed": 0, "epoch": epoch, "nll": 2 / epoch + 0.01 * i}
        for i, method in enumerate(METHOD_SECTIONS)
        for epoch in range(1, 6)
    ]
    axes = curves(pd.DataFrame(lines), "nll", legend=False, names=True).axes[0]
    named = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert sorted(named, key=named.get) == [TITLES[method] for method in METHOD_SECTIONS]
    table = pd.DataFrame({"confidence": [0.05, 0.5, 0.9], "correct": [True, False, True]})
    axes = confidence_histogram([table], looks(["pskd"])["pskd"]).axes[0]
    assert [text.get_position()[1] > 1 for text in axes.texts] == [True]


NO_BROWSER = (
    "no Chromium here, so the page is not looked at: install it with `apt-get update && apt-get install -y chromium`"
)


@pytest.fixture(scope="module")
def window():
    if browser.CHROMIUM is None:
        pytest.skip(NO_BROWSER)
    # A short path: Chromium's socket has no room for pytest's.
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as folder:
        opened = browser.Page(Path(folder))
        yield opened
        opened.close()


def column(window, number):
    cells = (
        f"[...document.querySelectorAll('#table-last tbody tr')].map(r => r.cells[{number}].getAttribute('data-value'))"
    )
    return [float(value) for value in window.run(cells)]


def test_in_a_browser_the_page_is_quiet_and_its_tables_sort_by_click_and_by_keyboard(compared, window):
    window.complaints.clear(), window.requests.clear()
    window.open(compared.paths[-1])
    before = column(window, 4)
    window.click("#table-last th:nth-child(5) button")
    assert column(window, 4) == sorted(before)
    window.run("document.querySelector('#table-last th:nth-child(5) button').focus()")
    window.press("Enter")
    assert column(window, 4) == sorted(before, reverse=True)
    sorts = "[...document.querySelectorAll('#table-last th[aria-sort]')].map(h => h.getAttribute('aria-sort'))"
    assert [kind for kind in window.run(sorts) if kind != "none"] == ["descending"]
    window.press("Tab")
    assert window.run("document.activeElement.textContent") == "ECE %"
    assert window.complaints == []
    assert [url for url in window.requests if not url.startswith(("data:", "file:"))] == []


def test_in_a_browser_both_themes_are_readable_and_the_button_turns_them(compared, window):
    def contrast():
        colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        light = [
            sum(
                w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
                for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True)
            )
            for rgb in ([int(v) / 255 for v in re.findall(r"\d+", text)[:3]] for text in window.run(colours))
        ]
        return light[0] > light[1], (max(light) + 0.05) / (min(light) + 0.05)

    for scheme in ("light", "dark"):
        window.open(compared.paths[-1], scheme=scheme)
        is_light, ratio = contrast()
        assert is_light == (scheme == "light") and ratio > 10
        # The baseline's black follows the page's text.
        line = "getComputedStyle(document.querySelector('#curves ~ .plots path[style*=baseline]')).stroke"
        assert window.run(line) == ("rgb(0, 0, 0)" if is_light else "rgb(242, 242, 242)")
        window.click(".theme")
        assert contrast()[0] != is_light
        assert window.run("document.querySelector('.theme').getAttribute('aria-pressed')") == str(is_light).lower()


def test_in_a_browser_nothing_sticks_out_on_a_phone(compared, window):
    window.open(compared.paths[-1], width=390, height=844)
    assert window.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    smallest = "Math.min(...[...document.querySelectorAll('svg.plot text')].map(t => t.getBoundingClientRect().height))"
    assert window.run(smallest) > 8
    window.run("document.querySelector('details').open = true")
    assert window.run("document.documentElement.scrollWidth") == 390


def test_in_a_browser_a_printed_page_cuts_no_table_and_is_light(compared, window):
    window.open(compared.paths[-1], width=718, height=1000)  # A4 less its margins
    window.click(".theme")
    window.call("Emulation.setEmulatedMedia", media="print")
    wide = "Math.max(...[...document.querySelectorAll('.scroll > table')].map(t => t.getBoundingClientRect().right))"
    assert window.run(wide) <= 718
    assert window.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    window.call("Emulation.setEmulatedMedia", media="")


def test_runs_of_before_result_json_named_what_was_scored_are_read(copied):
    for path in copied.rglob("result.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in values.items() if k not in ("evaluated_on", "num_holdout")}))
    assert {run.status for run in find_runs([copied])} == {"finished"}


def texts(figure):
    """The words that a figure's axes hold and show."""
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    ticks = [
        axis.get_major_ticks() + axis.get_minor_ticks() for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
    ]
    of_ticks = {label for each in ticks for tick in each for label in (tick.label1, tick.label2)}
    drawn = [
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis._update_ticks()
        for label in (tick.label1, tick.label2)
        if label.get_visible() and label.get_text()
    ]
    words = [text for text in shown if text not in of_ticks] + drawn
    return sorted(text.get_text().replace(r"\$", "$") for text in words)


def drawings_of(runs):
    finished = by_method(find_runs([runs]))
    tables = {method: list(each.values()) for method, each in predictions(finished).items()}
    logged = history(finished)
    easy = logged.assign(ece=logged.ece / 1000, top1_error=logged.top1_error / 100)
    trials = pd.DataFrame(
        {"state": "finished", "optim.lr": [0.001, 0.005, 0.0575], "nll": [0.575, 0.769, 0.6], "top1_error": [1.0, 2, 3]}
    )
    metric = METRICS["nll"]
    return [
        *(curves(logged, name, name, names=True) for name in METRICS),
        curves(easy, "ece", "ece", legend=False),
        reliability(tables),
        risk_coverage(tables),
        confidence_histogram(tables["pskd"], looks(["pskd"])["pskd"]),
        per_class_error(tables, [f"class $k_{k} = {k / 1000}" for k in range(10)]),
        plots.trials(trials, "optim.lr", metric, metric, "pskd"),
        plots.comparison(logged, tables, "costs 5.12345 $ or 0.001$"),
    ]


def test_the_hardest_of_many_classes_are_chosen_among_those_with_enough_samples(monkeypatch):
    """Of 30 classes the odd ones have 10 samples, k // 3 of them wrong, and the even ones 3, all of them wrong."""
    drawn = []
    monkeypatch.setattr(plots, "by_class", lambda shown, heading, *_: drawn.append((set(shown.index), heading)))
    labels = np.repeat(np.arange(30), [3 if k % 2 == 0 else 10 for k in range(30)])
    place = np.concatenate([np.arange(3 if k % 2 == 0 else 10) for k in range(30)])
    table = pd.DataFrame({"label": labels, "correct": (place >= labels // 3) & (labels % 2 == 1)})
    names = [f"class {k}" for k in range(30)]
    per_class_error({"baseline": [table]}, names, most=5)
    per_class_error({"baseline": [table]}, names, most=20)
    per_class_error({"baseline": [table[table.label % 2 == 1]]}, names, most=20)
    hardest = {f"class {k}" for k in (21, 23, 25, 27, 29)}
    assert drawn[0] == (hardest, "Error by class: the hardest 5 of 15 with at least 10 samples")
    assert drawn[1][1] == "Error by class: the hardest 20 of 30" and drawn[2][1] == "Error by class"


def test_the_baseline_with_a_temperature_is_drawn_where_confidences_are_with_a_look_of_its_own(runs, compared):
    text = page(compared)
    sections = {name: text.split(f'id="{name}"')[1].split("<h2")[0] for name in ("curves", "confidence", "classes")}
    legends = {name: re.search(r'<ul class="legend".*?</ul>', section, re.S)[0] for name, section in sections.items()}
    assert [name for name, legend in legends.items() if "Baseline + temperature" in legend] == ["confidence"]
    look = looks(["baseline", SCALED])[SCALED]
    drawn = re.findall(r'<svg class="plot".*?</svg>', sections["confidence"], flags=re.S)
    names = {re.search(' aria-label="([^"]*)"', one)[1]: one for one in drawn}
    with_its_colour = [name for name, one in names.items() if look.colour.lower() in one.lower()]
    assert {"reliability diagram", "risk-coverage curves"} <= set(with_its_colour)
    assert not any("histogram" in name for name in with_its_colour)
    assert look.title == "Baseline + temperature" and look.colour not in COLOURS.values()
    every = looks([*METHOD_SECTIONS, SCALED]).values()
    assert len({(each.dash, each.marker, each.colour) for each in every}) == 13


def test_its_reliability_is_that_of_the_scaled_probabilities(runs):
    finished = by_method(find_runs([runs]))
    scaled = scaled_baselines(finished, scale(finished))
    figure = reliability({SCALED: [run.outcomes for run in scaled]})
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "Baseline + temperature"]
    confidence, correct = [], []
    for run in scaled:
        held_out, tested = (pd.read_parquet(run.folder / f"{name}.parquet") for name in ("holdout", "predictions"))
        temperature = fit_temperature(np.stack(held_out.probabilities), held_out.label.to_numpy()).value
        confidence.append(with_temperature(np.stack(tested.probabilities), temperature).max(axis=1))
        correct.append(tested.correct)
    bins = pd.DataFrame({"confidence": np.concatenate(confidence), "correct": np.concatenate(correct)})
    of_bin = bins.groupby(np.ceil(bins.confidence * 10)).agg(["mean", "size"])
    many = of_bin[("correct", "size")] >= 0.01 * len(bins)
    np.testing.assert_allclose(line.get_xdata(), of_bin[("confidence", "mean")][many], rtol=1e-4)
    np.testing.assert_allclose(line.get_ydata(), of_bin[("correct", "mean")][many], rtol=1e-4)


def test_the_legend_of_the_picture_has_room_for_all_methods_in_rows(runs):
    finished = by_method(find_runs([runs]))
    tables = predictions(finished)["pskd"][0]
    methods = [*METHOD_SECTIONS, SCALED]
    logged = pd.concat([history(finished).assign(method=method, seed=0) for method in METHOD_SECTIONS])
    figure = plots.comparison(logged.drop_duplicates(["method", "epoch"]), {m: [tables] for m in methods}, "digits")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        plots.title(method) for method in (*METHOD_SECTIONS, SCALED)
    ]
    width = legend.get_window_extent().width
    assert 0 < width <= figure.bbox.width


def test_every_word_and_number_of_a_drawing_is_what_its_axes_hold(runs):
    for number, figure in enumerate(drawings_of(runs)):
        written = re.findall(r"<text[^>]*>(.*?)</text>", svg(figure, f"drawing {number}"), flags=re.S)
        assert sorted(html.unescape(re.sub(r"<[^>]*>", "", text)) for text in written) == texts(figure)
        coordinates = re.findall(r'\bd="([^"]*)"', svg(figure, f"drawing {number}"))
        assert coordinates and not any(re.search(r"\.\d{3}", path) for path in coordinates)


def test_a_dollar_sign_in_a_title_a_setting_or_a_class_is_one(copied):
    path = copied / "pskd" / "seed1" / "recipe.yaml"
    path.write_text(re.sub("init_from: .*", r"init_from: 5$ or \\frac{1$", path.read_text()))
    for path in copied.rglob("result.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"class_names": [f"$^{k}" for k in range(10)]}))
    found = report(copied)
    assert set(found.rows.status) == {"finished", "missing"}
    assert "$^3" in page(found) and found.paths[-2].name == "comparison.png"
    assert "PS-KD init_from=5$ or \\frac{1$" in html.unescape(page(found))


def test_a_report_of_finished_runs_imports_neither_torch_nor_timm_nor_datasets(copied):
    code = (
        "import sys; from pskd_timm import report; from pskd_timm.reports.dashboard import find_runs; "
        f"report({str(copied)!r}, metrics=['all']); find_runs({str(copied)!r}); "
        "print(sorted({'torch', 'timm', 'datasets', 'torchvision', 'accelerate', 'sklearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and (copied / "report.html").is_file()


def test_an_ece_that_perfect_calibration_explains_is_not_bold_and_its_floor_stands_beside_it(runs, compared):
    floors = {
        seed: ece_floor(pd.read_parquet(runs / "pskd" / f"seed{seed}" / "predictions.parquet").confidence.to_numpy())
        for seed in (0, 1)
    }
    mean, high = (np.mean([getattr(floor, name) for floor in floors.values()]) for name in ("mean", "high"))
    for text in (page(compared), (runs / "comparison.md").read_text(), (runs / "comparison.tex").read_text()):
        assert f"{mean:.2f} ({high:.2f})" in text
    mine = compared.rows[compared.rows.method == "pskd"].ece_if_calibrated
    np.testing.assert_allclose(mine, [floor.mean for floor in floors.values()])
    for ece, best in ((1.01 * high, True), (0.99 * high, False)):
        changed = compared.rows.copy()
        changed.loc[changed.method == "pskd", "ece"] = ece
        changed.loc[changed.method != "pskd", "ece"] = 50.0
        cells = summary(changed, SIX)
        assert cells["pskd"]["ece"].best == best and not cells["baseline"]["ece"].best


def test_runs_whose_data_had_other_contents_are_refused(copied):
    def fingerprint(path, **digests):
        values = json.loads(path.read_text())
        known = {"class_names": "a", "contents": "b", "test_contents": "b"}
        path.write_text(json.dumps(values | {"data_fingerprint": known | digests}))

    results = sorted(copied.rglob("result.json"))
    for path in results[:-1]:
        fingerprint(path)
    values = json.loads(results[-1].read_text())
    del values["data_fingerprint"]  # as an earlier version wrote it
    results[-1].write_text(json.dumps(values))
    assert len(find_runs([copied])) == 4
    fingerprint(results[0], contents="c")
    with pytest.raises(InputError, match=r"tested on different data \(fingerprint of contents [bc], [bc]\)"):
        find_runs([copied])
    # With other settings of the training data, what was read of it may differ; classes and test images may not.
    recipe = results[0].with_name("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("limit_train: 300", "limit_train: 200"))
    assert len(find_runs([copied])) == 4
    fingerprint(results[0], test_contents="c")
    with pytest.raises(InputError, match="fingerprint of test contents"):
        find_runs([copied])
    fingerprint(results[0], class_names="c")
    with pytest.raises(InputError, match="fingerprint of class names"):
        find_runs([copied])


OTHER_METRICS = [
    Metric("token_accuracy", "token accuracy", "%", 1, higher_is_better=True),
    Metric("loss", "loss", "bit", 3),
]


@pytest.fixture
def other_task(copied):
    """The runs as those of a task with metrics of its own, whose samples belong together in fours."""
    rng = np.random.default_rng(0)
    for path in copied.rglob("result.json"):
        values = json.loads(path.read_text())
        better = 20.0 * (path.parent.parent.name == "pskd")
        of_each = {
            "loss": rng.exponential(1.0, 120),
            "group": np.arange(120) // 4,
            "token_accuracy": 100.0 * (rng.uniform(size=120) < 0.4 + better / 100),
        }
        table = parquet.read_table(path.with_name("predictions.parquet"))
        for name, values_of in of_each.items():
            table = table.append_column(name, pyarrow.array(values_of))
        parquet.write_table(table, path.with_name("predictions.parquet"))
        figures = {name: of_each[name].mean() for name in ("token_accuracy", "loss")}
        values |= {
            "task": "sequences",
            "metrics": [metric._asdict() for metric in OTHER_METRICS],
            "last": {"epoch": 2} | figures,
            "best": {"epoch": 2, "chosen_on": "holdout"} | figures,
        }
        path.write_text(json.dumps(values))
        lines = [{"epoch": epoch, "token_accuracy": 40.0 + epoch, "loss": 1.0 / epoch} for epoch in (1, 2)]
        path.with_name("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copied


def test_metrics_of_another_task_travel_from_result_json_into_every_table_plot_and_test(other_task):
    found = report(other_task)
    assert set(found.rows.status) == {"finished"}
    assert [metric.name for metric in found.metrics] == ["token_accuracy", "loss"]
    assert list(found.rows.columns[3:5]) == ["token_accuracy", "loss"] and "nll" not in found.rows
    accuracy = found.frame.token_accuracy
    assert accuracy["pskd"] > accuracy["baseline"]
    table = (other_task / "comparison.md").read_text()
    assert "| method | runs | token accuracy % | loss bit | seconds |" in table
    assert (
        re.search(r"PS-KD \| 2 \| \*\*\d\d\.\d ± \d+\.\d\*\*", table) and "Higher is better for token accuracy" in table
    )
    text = html.unescape(page(found))
    for absent in ("top-1", "NLL", "ECE %", "AURC ×10³", "if calibrated"):
        assert absent not in text.split('id="settings"')[0], absent
    assert "PS-KD has a higher token accuracy (p" in text and "higher is better; the task's own metric" in text
    assert "token accuracy % over the epochs" in text and "Samples of one group" in text


def test_runs_scored_by_different_metrics_are_refused(copied):
    path = copied / "pskd" / "seed1" / "result.json"
    values = json.loads(path.read_text())
    values["metrics"] = [metric | {"digits": 3} for metric in values["metrics"][:2]]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="scored by different metrics"):
        find_runs([copied])
    path.write_text(json.dumps(values | {"metrics": [{"name": "nll", "colour": "red"}]}))
    told = [run.status for run in find_runs([copied]) if run.status != "finished"]
    assert len(told) == 1 and told[0].startswith("damaged: result.json: metrics: ")
