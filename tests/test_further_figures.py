"""Figures that a report is asked for, and the baseline with temperature scaling beside the methods."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

from pskd_timm import InputError, load_recipe, report, train
from pskd_timm.calibration import fit_temperature, with_temperature
from pskd_timm.cli import main
from pskd_timm.floors import FLOORED, classwise_floor, ece_floor
from pskd_timm.metrics import FURTHER_METRICS, METRICS, score
from pskd_timm.progress import Display
from pskd_timm.reports.plots import SCALED
from pskd_timm.reports.versus import Versus, still_better

SETTINGS = {
    "epochs": 3,
    "batch_size": 32,
    "threads": 1,
    "data.limit_train": 600,
    "data.limit_test": 150,
    "data.gaussian_noise": 0.3,
    "data.holdout_fraction": 0.3,
    "optim.lr": 0.05,
    "model.kwargs": {"width": 8},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods, two seeds, with held-out parts that carry a temperature."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("baseline", "pskd"):
        for seed in (0, 1):
            own = {"method": method, "seed": seed, "output_dir": str(folder)}
            train(load_recipe("digits", SETTINGS | own), display=Display(quiet=True))
    return folder


@pytest.fixture(scope="module")
def compared(runs):
    return report(runs, metrics=["all"])


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the runs to change."""
    return Path(shutil.copytree(runs, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoints", "comparison*")))


def probabilities(path):
    table = pd.read_parquet(path)
    return np.stack(table.probabilities), table.label.to_numpy()


def folders(runs, method, which="last"):
    return [runs / method / f"seed{seed}" / ("best" if which == "best" else "") for seed in (0, 1)]


@pytest.mark.parametrize(("which", "prefix"), [("last", ""), ("best", "best_")])
def test_further_figures_of_a_report_are_the_scores_of_the_kept_predictions_with_their_floors(
    runs, compared, which, prefix
):
    table = pd.read_csv(runs / "comparison.csv")
    for method in ("baseline", "pskd"):
        mine = table[table.method == method]
        for place, folder in enumerate(folders(runs, method, which)):
            kept = probabilities(folder / "predictions.parquet")
            for name, value in score(*kept, FURTHER_METRICS).items():
                assert mine[prefix + name].iloc[place] == pytest.approx(value), name
            confidence = kept[0].max(axis=1)
            floors = {name: ece_floor(confidence, name) for name in FLOORED if name != "classwise_ece"}
            for name, floor in (floors | {"classwise_ece": classwise_floor([kept[0]], 150)}).items():
                assert mine[f"{prefix}{name}_if_calibrated"].iloc[place] == pytest.approx(floor.mean), name
                assert mine[f"{prefix}{name}_if_calibrated_95"].iloc[place] == pytest.approx(floor.high), name


def test_further_figures_stand_in_a_table_of_their_own_on_the_page_in_markdown_latex_and_the_terminal(
    runs, compared, capsys, tmp_path
):
    values = [score(*probabilities(folder / "predictions.parquet"), ["smooth_ece"]) for folder in folders(runs, "pskd")]
    values = np.array([each["smooth_ece"] for each in values])
    cell = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    text = html.unescape((runs / "report.html").read_text())
    further = text.split('id="further-last"')[1].split("</table>")[0]
    assert cell in further and '<span class="sub">' in further
    main_table = text.split('id="table-last"')[1].split("</table>")[0]
    for metric in FURTHER_METRICS.values():
        assert f">{metric.header}<" in further and metric.header not in main_table
        assert f"<b>{metric.title}</b>" in text.split('id="meaning"')[1]
    written = (runs / "comparison.md").read_text().split("## Further figures, last epoch")[1]
    assert cell in written and "smooth ECE % if calibrated" in written and "higher" in written.lower()
    assert cell.replace("±", r"$\pm$") in (runs / "comparison.tex").read_text()
    assert main(["report", str(runs), "--metrics", "smooth_ece", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (
        f" {values.mean():.2f} " in printed
        and "±" not in printed.split("Further")[1]
        and "Further figures" in printed
        and "AUGRC" not in printed
    )


def test_further_figures_after_temperature_scaling_are_the_scores_of_the_scaled_probabilities(runs, compared):
    text = (runs / "report.html").read_text().split('id="temperature"')[1].split("</table>")[1]
    row = re.search(r"PS-KD</th>(.*?)</tr>", text)[1]
    shown = [float(value) for value in re.findall(r'data-value="([^"]*)"', row)[1:]]
    expected = []
    for folder in folders(runs, "pskd"):
        temperature = fit_temperature(*probabilities(folder / "holdout.parquet")).value
        kept, labels = probabilities(folder / "predictions.parquet")
        expected.append(list(score(with_temperature(kept, temperature), labels, FURTHER_METRICS).values()))
    np.testing.assert_allclose(shown, np.mean(expected, axis=0), rtol=1e-3, atol=1e-3)


def test_without_metrics_a_report_has_the_six(runs, tmp_path):
    found = report(runs, tmp_path)
    assert set(found.rows) & set(FURTHER_METRICS) == set() and found.further == []
    assert "Further figures" not in (tmp_path / "report.html").read_text() + (tmp_path / "comparison.md").read_text()


def test_a_figure_that_needs_probabilities_which_a_run_has_not_kept_is_left_out_and_said(copied):
    for path in copied.rglob("result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task": "sequences"}))
        for file in (path.with_name("predictions.parquet"), path.parent / "best" / "predictions.parquet"):
            parquet.write_table(parquet.read_table(file).drop_columns("probabilities"), file)
        path.with_name("holdout.parquet").unlink()
    found = report(copied, metrics=["brier", "augrc", "classwise_ece"])
    assert [metric.name for metric in found.further] == ["augrc"] and found.rows.augrc.notna().all()
    (note,) = [note for note in found.notes if "Not computed" in note]
    assert note.startswith("Not computed for Baseline seed 0, Baseline seed 1, PS-KD seed 0 and PS-KD seed 1")
    assert note.endswith(": Brier score and class-wise ECE.") and SCALED not in set(found.rows.method)


def test_of_a_run_whose_predictions_are_gone_a_dash_stands_for_the_figure_and_a_note_says_so(copied):
    for seed in (0, 1):
        (copied / "pskd" / f"seed{seed}" / "predictions.parquet").unlink()
    found = report(copied, metrics=["augrc"])
    assert found.rows[found.rows.method == "pskd"].augrc.isna().all()
    assert "| PS-KD | 2 | – |" in (copied / "comparison.md").read_text()
    assert any(note.startswith("Not computed for PS-KD seed 0 and PS-KD seed 1") for note in found.notes)


@pytest.mark.parametrize("method", ["baseline", "pskd"])
@pytest.mark.parametrize("file", ["predictions.parquet", "best/predictions.parquet", "best/holdout.parquet"])
def test_probabilities_that_cannot_be_read_cost_their_figures_and_a_line(copied, method, file):
    path = copied / method / "seed0" / file
    content, group = path.read_bytes(), parquet.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    start = next(c.data_page_offset for c in columns if c.path_in_schema.startswith("probabilities")) + 100
    path.write_bytes(content[:start] + b"\xff" * 400 + content[start + 400 :])
    found = report(copied, metrics=["brier", "classwise_ece", "augrc"])
    assert set(found.rows.status) == {"finished"} and found.rows.augrc.notna().all()
    mine = found.rows[(found.rows.method == method) & (found.rows.seed == 0)]
    assert mine.brier.isna().all() == (file == "predictions.parquet")
    assert mine.best_brier.isna().all() == (file == "best/predictions.parquet")


def test_an_unknown_metric_is_named_with_the_nearest_and_the_help_names_all(runs, capsys):
    with pytest.raises(InputError, match="--metrics: there is no 'smoothece', .*did you mean smooth_ece"):
        report(runs, metrics=["smoothece"])
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    printed = capsys.readouterr().out.replace("\n", " ")
    assert all(re.search(rf"\b{name}\b", printed) for name in ("all", *FURTHER_METRICS))


def test_the_baseline_with_a_temperature_is_a_row_whose_figures_are_the_scores_of_its_scaled_predictions(
    runs, compared
):
    rows = compared.rows
    assert list(dict.fromkeys(rows.method)) == ["baseline", SCALED, "pskd"] and compared.failed == 0
    for which, prefix in (("last", ""), ("best", "best_")):
        for place, folder in enumerate(folders(runs, "baseline", which)):
            temperature = fit_temperature(*probabilities(folder / "holdout.parquet")).value
            kept, labels = probabilities(folder / "predictions.parquet")
            after = score(with_temperature(kept, temperature), labels, [*METRICS, *FURTHER_METRICS])
            mine = rows[rows.method == SCALED].iloc[place]
            for name, value in after.items():
                assert mine[prefix + name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
            floor = ece_floor(with_temperature(kept, temperature).max(axis=1))
            assert mine[f"{prefix}ece_if_calibrated"] == pytest.approx(floor.mean, rel=0.02)
    assert (rows[rows.method == SCALED].seconds.to_numpy() == rows[rows.method == "baseline"].seconds).all()


def test_the_baseline_with_a_temperature_is_tested_against_the_baseline_and_a_sentence_names_what_still_gains(
    runs, compared
):
    text = html.unescape((runs / "report.html").read_text())
    significance = text.split('id="significance"')[1].split("</table>")[0]
    assert re.search(r"Baseline \+ temperature</th>\s*<td data-value=\"0.0\">", significance)  # no other error
    of_six, of_further = [
        note for note in compared.notes if note.startswith("Still better than Baseline + temperature")
    ]
    assert all(note in text and note in (runs / "comparison.md").read_text() for note in (of_six, of_further))
    assert re.search(r"\(p < 0.05, 2 seeds\): top-1 error: .*; NLL: .*; ECE: .*; AURC: [^;]*\.$", of_six)
    assert re.search(r"\(p < 0.05, 2 seeds\): Brier score: .*; AUGRC: .*; risk at 80 % coverage: [^;]*\.$", of_further)
    assert "4 of 4 finished" in text and "not in the figures" not in text


def test_further_figures_are_tested_against_the_baseline_in_a_table_and_sentences_of_their_own(runs, compared):
    text = html.unescape((runs / "report.html").read_text()).split('id="further-significance"')[1]
    sentences, table = text.split("</ul>")[0], text.split("</table>")[0]
    assert re.search(r"<li>PS-KD .*(Brier score|than Baseline).*</li>", sentences) and "NLL" not in sentences
    each = {
        method: [
            score(*probabilities(folder / "predictions.parquet"), FURTHER_METRICS) for folder in folders(runs, method)
        ]
        for method in ("baseline", "pskd")
    }
    row = re.search(r">PS-KD</th>(.*?)</tr>", table, flags=re.S)[1]
    shown = [float(value) for value in re.findall(r'data-value="([^"]*)"', row)]
    for name, found in zip(FURTHER_METRICS, shown, strict=True):
        means = [np.mean([values[name] for values in each[method]]) for method in ("baseline", "pskd")]
        assert found == pytest.approx(means[1] - means[0], rel=1e-3, abs=1e-5), name
    assert len(re.findall("p [=≤] ", row)) == row.count("…") == len(FURTHER_METRICS)


def test_what_still_gains_is_what_is_better_with_a_small_p():
    tests = pd.DataFrame(
        [
            ("pskd", "top1_error", -2.0, True, np.nan, np.nan, 0.001),
            ("pskd", "ece", 1.0, False, 0.5, 1.5, 0.002),
            ("cskd", "top1_error", -1.0, True, np.nan, np.nan, 0.03),
            ("cskd", "ece", -0.2, True, -0.5, 0.1, 0.2),
        ],
        columns=["method", "metric", "difference", "better", "low", "high", "p"],
    )
    assert still_better([Versus(SCALED, (0,), tests)], list(METRICS.values())) == [
        "Still better than Baseline + temperature, temperature scaling of the baseline (p < 0.05, one seed): "
        "top-1 error: PS-KD and CS-KD; ECE: no method."
    ]


def test_what_still_gains_is_said_of_groups_with_other_figures_too():
    columns = ["method", "metric", "difference", "better", "low", "high", "p"]
    first = pd.DataFrame([("pskd", "nll", -1.0, True, -2.0, -0.5, 0.001)], columns=columns)
    second = pd.DataFrame([("cskd", "brier", -1.0, True, -2.0, -0.5, 0.001)], columns=columns)
    metrics = [METRICS["nll"], FURTHER_METRICS["brier"]]
    (found,) = still_better([Versus(SCALED, (0, 1), first), Versus(SCALED, (1, 2), second)], metrics)
    assert found.endswith("(p < 0.05, 2 seeds): NLL: PS-KD; Brier score: CS-KD.")


def test_the_spread_of_a_figure_is_over_the_runs_that_have_it(copied):
    (copied / "pskd" / "seed1" / "predictions.parquet").unlink()
    text = report(copied, metrics=["brier"]) and (copied / "comparison.md").read_text()
    assert "nan" not in text
    brier = [line for line in text.split("Further figures")[1].splitlines() if line.startswith("| PS-KD")][0]
    assert "±" not in brier and re.search(r"0\.\d{3} \|", brier)


def test_a_seed_of_the_baseline_without_a_sound_temperature_is_no_missing_run(copied):
    path = copied / "baseline" / "seed1" / "holdout.parquet"
    table = pd.read_parquet(path)
    right = table.probabilities.map(np.argmax)
    table.assign(label=right, prediction=right, correct=True).to_parquet(path)
    names = parquet.read_table(copied / "baseline" / "seed0" / "holdout.parquet").schema
    parquet.write_table(parquet.read_table(path).select(names.names).cast(names), path)
    found = report(copied)
    scaled = found.rows[found.rows.method == SCALED]
    assert list(scaled.seed) == [0] and set(found.rows.status) == {"finished"}
    assert "only 0 of 180 held-out predictions are wrong" in (copied / "report.html").read_text()
