import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.stats import binomtest, norm

from pskd_timm.metrics import (
    FURTHER_METRICS,
    METRICS,
    OF_ROWS,
    Metric,
    Outcomes,
    further_of_outcomes,
    outcomes,
    score,
    summarize,
)
from pskd_timm.reports.kept import Kept
from pskd_timm.reports.resampling import LAID_OUT, Layout, Predicted
from pskd_timm.reports.significance import against, in_words, interval_and_p, mcnemar

RESAMPLED = ["nll", "ece", "aurc"]  # of the six


def predictions(num_samples, seed, accuracy=0.7, decimals=8):
    """A frame like predictions.parquet's; few decimals make ties."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1, num_samples).round(decimals)
    correct = rng.uniform(size=num_samples) < accuracy * confidence / confidence.mean()
    return pd.DataFrame({"confidence": confidence, "correct": correct, "nll": rng.exponential(1.0, num_samples)})


def figures(table):
    """The three figures by the package's own metrics, which sort and average over ties."""
    column = {name: table[name].to_numpy() for name in table}
    found = summarize(Outcomes(column["confidence"], column["correct"], column["correct"], column["nll"]))
    return [found[name] for name in RESAMPLED]


def test_mcnemar_of_one_seed_is_the_binomial_test_on_the_samples_that_one_of_the_two_gets_wrong():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(1, 300)) < 0.25, rng.uniform(size=(1, 300)) < 0.32
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert mcnemar(a, b) == pytest.approx(binomtest(only_a, only_a + only_b, 0.5).pvalue, rel=1e-10)
    assert mcnemar(a, a) == 1.0


def test_mcnemar_of_several_seeds_is_the_share_of_sign_flips_that_are_as_extreme():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(size=(3, 14)) < 0.3, rng.uniform(size=(3, 14)) < 0.5
    difference = a.sum(0) - b.sum(0)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 14)).reshape(14, -1)
    share = (np.abs(difference @ signs) >= abs(difference.sum())).mean()
    assert mcnemar(a, b) == pytest.approx(share, rel=1e-10)


def test_three_copies_of_one_seed_are_no_more_certain_than_one():
    rng = np.random.default_rng(2)
    a, b = rng.uniform(size=(1, 400)) < 0.25, rng.uniform(size=(1, 400)) < 0.30
    assert mcnemar(a.repeat(3, 0), b.repeat(3, 0)) == pytest.approx(mcnemar(a, b), rel=1e-10)


@pytest.fixture(params=[np.float32, np.float16], ids=["float32", "float16"])
def kept(request, tmp_path):
    """Kept probabilities of six classes; in float16 many are equal."""
    rng = np.random.default_rng(3)
    return kept_file(tmp_path / "kept.parquet", rng.dirichlet(np.full(6, 0.4), 90).astype(request.param), rng)


def kept_file(path, probabilities, rng):
    """A file of predictions of labels that these probabilities are over-confident about."""
    labels = [
        rng.choice(len(p), p=p)
        for p in np.sqrt(probabilities.astype(float)) / np.sqrt(probabilities.astype(float)).sum(axis=1, keepdims=True)
    ]
    each = outcomes(probabilities, np.array(labels))
    values = pa.FixedSizeListArray.from_arrays(pa.array(probabilities.ravel()), probabilities.shape[1])
    columns = {"label": labels, "correct": each.correct, "confidence": each.confidence, "nll": each.nll}
    parquet.write_table(pa.table({**columns, "probabilities": values}), path)
    return Kept(path)


def test_every_figure_of_a_resample_is_the_score_of_its_samples_written_out(kept):
    ((probabilities, labels),) = kept.parts()
    drawn = np.random.default_rng(4).integers(90, size=(20, 90))
    counts = np.stack([np.bincount(row, minlength=90) for row in drawn]).astype(float)
    names = [*RESAMPLED, *FURTHER_METRICS]
    assert set(LAID_OUT) < set(names)
    found = Layout(kept.outcomes, names, kept).figures(counts)
    expected = [list(score(probabilities[row], labels[row], names).values()) for row in drawn]
    exact = [name not in ("smooth_ece", "classwise_ece") for name in names]  # those are in float32
    np.testing.assert_allclose(found[:, exact], np.array(expected)[:, exact], rtol=1e-9)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_figures_of_a_resample_of_which_all_confidences_are_equal_are_those_of_its_samples():
    table = predictions(70, seed=1, decimals=0)
    names = [name for name in LAID_OUT if name not in OF_ROWS]
    drawn = np.random.default_rng(4).integers(70, size=(10, 40))
    counts = np.stack([np.bincount(row, minlength=70) for row in drawn]).astype(float)
    expected = [
        further_of_outcomes(part.confidence.to_numpy(), part.correct.to_numpy(), names)
        for part in (table.iloc[row] for row in drawn)
    ]
    found = pd.DataFrame(Layout(table, names).figures(counts), columns=names)[list(expected[0])]
    np.testing.assert_allclose(found, pd.DataFrame(expected), rtol=1e-4)


def test_the_first_of_the_resamples_is_the_test_part_itself_and_all_runs_see_the_same_draws():
    table = predictions(80, seed=5)
    one, other = (Predicted(table).resampled(RESAMPLED, 50) for _ in range(2))
    assert one.shape == (51, 3) and (one == other).all()
    np.testing.assert_allclose(one[0], figures(table), rtol=1e-10)


def test_a_figure_that_was_resampled_before_is_that_of_the_same_draws():
    run = Predicted(predictions(80, seed=5))
    before = run.resampled(["ece"], 50)
    assert (run.resampled(["aurc", "ece"], 50) == Predicted(run.outcomes).resampled(["aurc", "ece"], 50)).all()
    assert (run.resampled(["ece"], 50) == before).all()


def test_a_figure_whose_probabilities_a_run_has_not_kept_is_not_tested_and_the_others_are(kept):
    runs = {"baseline": [Predicted(kept.outcomes, kept)], "pskd": [Predicted(kept.outcomes)]}
    metrics = [METRICS["nll"], FURTHER_METRICS["brier"], FURTHER_METRICS["augrc"]]
    found = against("baseline", runs, metrics).set_index("metric")
    assert found.p[["nll", "augrc"]].notna().all()
    assert found.loc["brier", ["difference", "low", "high", "p"]].isna().all() and not found.better["brier"]
    assert "Brier" not in in_words("PS-KD", "Baseline", found.reset_index(), metrics)


def test_the_interval_of_a_paired_difference_in_brier_score_is_the_normal_one(tmp_path):
    rng = np.random.default_rng(0)
    one = kept_file(tmp_path / "one.parquet", rng.dirichlet(np.full(4, 0.5), 1500), rng)
    ((probabilities, labels),) = one.parts()
    flat = 0.9 * probabilities + 0.1 / 4
    parquet.write_table(
        parquet.read_table(one.path).set_column(
            4, "probabilities", pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), 4)
        ),
        tmp_path / "other.parquet",
    )
    other = Kept(tmp_path / "other.parquet")
    runs = {"a": [Predicted(one.outcomes, one)], "b": [Predicted(other.outcomes, other)]}
    (found,) = against("a", runs, [FURTHER_METRICS["brier"]]).itertuples()
    difference = ((flat - np.eye(4)[labels]) ** 2 - (probabilities - np.eye(4)[labels]) ** 2).sum(axis=1)
    error = difference.std() / np.sqrt(1500)
    assert found.difference == pytest.approx(difference.mean())
    ends = difference.mean() - 1.96 * error, difference.mean() + 1.96 * error
    assert (found.low, found.high) == pytest.approx(ends, abs=0.15 * error)


def test_the_interval_of_a_paired_difference_in_nll_is_the_normal_one():
    a, b = predictions(2000, seed=6), predictions(2000, seed=7)
    b["nll"] = a.nll + 0.02 + 0.3 * b.nll - 0.3
    found = against("baseline", {"baseline": [Predicted(a)], "pskd": [Predicted(b)]}).set_index("metric").loc["nll"]
    difference = b.nll - a.nll
    error = difference.std(ddof=0) / np.sqrt(2000)
    assert found.difference == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx(
        (difference.mean() - 1.96 * error, difference.mean() + 1.96 * error), abs=0.15 * error
    )
    assert found.p == pytest.approx(2 * norm.sf(abs(difference.mean()) / error), abs=0.05)


def test_equal_methods_are_rarely_told_apart_and_different_ones_are():
    told = []
    for seed in range(40):
        a, b = (Predicted(predictions(300, 2 * seed + i)) for i in (0, 1))
        found = against("a", {"a": [a], "b": [b]})
        told.append(found.p < 0.05)
    assert np.mean(told) < 0.12
    a, b = Predicted(predictions(800, 1, 0.5)), Predicted(predictions(800, 2, 0.75))
    better = against("a", {"a": [a], "b": [b]}).set_index("metric")
    assert better.p["top1_error"] < 0.001 and better.difference["aurc"] < 0 and better.p["aurc"] < 0.01


def test_equal_networks_are_rarely_told_apart_by_a_coverage_which_jumps():
    told = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        runs = {name: [Predicted(calibrated(400, rng))] for name in ("a", "b")}
        told.append(against("a", runs, [FURTHER_METRICS["coverage_at_5_risk"]]).p[0] < 0.05)
    assert np.mean(told) < 0.12


def calibrated(num_samples, rng):
    confidence = rng.beta(4, 1, num_samples).astype(np.float32)
    return pd.DataFrame({"confidence": confidence, "correct": rng.uniform(size=num_samples) < confidence, "nll": 0.0})


def test_an_interval_without_zero_and_a_small_p_go_together():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        draws = np.r_[1.0, rng.normal(1.05, 0.45, 999)]
        low, high, p = interval_and_p(draws)
        assert low < high and (p < 0.049 or low <= 0 <= high or p < 0.051)


def test_plain_words_say_who_is_better_or_that_nobody_can_tell():
    def tests(*rows):
        return pd.DataFrame(rows, columns=["metric", "difference", "p"]).assign(
            better=lambda table: (table.difference > 0) == table.metric.isin(["accuracy"])
        )

    both = tests(("top1_error", -2.0, 0.003), ("nll", 0.1, 0.0001), ("ece", -1, 0.4))
    assert in_words("PS-KD", "Baseline", both) == (
        "PS-KD makes fewer errors (p = 0.003) and has a higher NLL (p ≤ 0.002) than Baseline; "
        "no difference in ECE can be shown with this many samples."
    )
    neither = in_words("A", "B", tests(("top1_error", -2.0, 0.3), ("nll", 0.1, 0.05), ("ece", -1, 0.4)))
    assert neither == "A against B: no difference in error, NLL and ECE can be shown with this many samples."
    further = [FURTHER_METRICS[name] for name in ("brier", "augrc", "coverage_at_5_risk")]
    rows = tests(("brier", 0.1, 0.004), ("augrc", 3, 0.0001), ("coverage_at_5_risk", -2.0, 0.04))
    assert in_words("A", "B", rows, further) == (
        "A has a higher Brier score (p = 0.004), AUGRC (p ≤ 0.002) and has a lower coverage at 5 % risk (p = 0.040) than B."
    )
    accuracy = Metric("accuracy", "token accuracy", "%", higher_is_better=True)
    found = in_words("A", "B", tests(("accuracy", 2.0, 0.01)), [accuracy])
    assert found == "A has a higher token accuracy (p = 0.010) than B."


def grouped(num_groups, seed):
    """Samples in groups of 1 to 6, all of a group with one accuracy of its own."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(num_groups), rng.integers(1, 7, num_groups))
    table = predictions(len(group), seed)
    of_group = rng.normal(0, 2, num_groups)[group]
    return table.assign(group=group, nll=table.nll + of_group, correct=of_group < rng.normal(0.5, 0.3, len(group)))


def test_groups_are_drawn_whole():
    table = grouped(30, 0)
    found = Predicted(table).resampled(RESAMPLED, 400)
    rng = np.random.default_rng(1)
    by_group = [part for _, part in table.groupby("group")]
    drawn = [figures(pd.concat([by_group[g] for g in rng.integers(30, size=30)])) for _ in range(400)]
    np.testing.assert_allclose(found[0], figures(table), rtol=1e-10)
    np.testing.assert_allclose(found[1:].std(axis=0), np.std(drawn, axis=0), rtol=0.2)
    alone = Predicted(table.drop(columns="group")).resampled(RESAMPLED, 400)
    assert found[1:, 0].std() > 1.5 * alone[1:, 0].std()


def test_groups_change_sides_whole_in_mcnemars_test():
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(11), 4)
    a, b = rng.uniform(size=(1, 44)) < 0.3, rng.uniform(size=(1, 44)) < 0.5
    difference = np.bincount(group, (a.astype(int) - b)[0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 11)).reshape(11, -1)
    share = (np.abs(difference @ signs) >= abs(difference.sum()) - 1e-9).mean()
    assert mcnemar(a, b, group) == pytest.approx(share, rel=1e-10)


def test_a_metric_of_a_column_of_its_own_is_resampled_and_one_without_is_left_out():
    metrics = [Metric("tokens", "tokens", higher_is_better=True), Metric("bleu", "BLEU", higher_is_better=True)]
    a, b = (grouped(60, 5).assign(tokens=lambda table: 100.0 * table.correct) for _ in range(2))
    b["tokens"] += np.random.default_rng(0).normal(2, 0.5, len(b))
    found = against("a", {"a": [Predicted(a)], "b": [Predicted(b)]}, metrics)
    assert found.metric.tolist() == ["tokens"] and found.better.all()
    assert found.difference[0] == pytest.approx(b.tokens.mean() - a.tokens.mean())
    assert 0 < found.low[0] < found.difference[0] < found.high[0]
