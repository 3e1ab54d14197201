import itertools

import numpy as np
import pytest
import relplot
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score, roc_curve, top_k_accuracy_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from pskd_timm import InputError, score
from pskd_timm.floors import classwise_floor, ece_floor
from pskd_timm.metrics import (
    ALL_METRICS,
    METRICS,
    adaptive_ece,
    augrc,
    auroc,
    classwise_ece,
    coverage_at_risk,
    ece,
    fpr_at_recall,
    further_of_outcomes,
    outcomes,
    risk_at_coverage,
    smooth_ece,
)
from pskd_timm.outcomes import batch_outcomes


def random_problem(n=400, k=10, seed=0, sharpness=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * sharpness
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, np.array([rng.choice(k, p=0.5 * row + 0.5 / k) for row in p])


def brute_ece(p, y, bins=10):
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(len(y)) if b / bins < p[i].max() <= (b + 1) / bins]
        if inside:
            accuracy = np.mean([p[i].argmax() == y[i] for i in inside])
            total += abs(accuracy - np.mean([p[i].max() for i in inside])) * len(inside) / len(y)
    return 100 * total


def brute_aurc(confidence, wrong):
    """The mean over every order that sorts the confidences: ties in all their permutations."""
    groups = [[i for i in range(len(wrong)) if confidence[i] == c] for c in sorted(set(confidence), reverse=True)]
    areas = []
    for orders in itertools.product(*(list(itertools.permutations(group)) for group in groups)):
        errors = np.array([wrong[i] for group in orders for i in group], dtype=float)
        areas.append(np.mean(np.cumsum(errors) / np.arange(1, len(errors) + 1)))
    return 1000 * np.mean(areas)


def optimal(wrong):
    """The area when every error stands behind every hit."""
    errors = np.sort(np.array(wrong, dtype=float))
    return 1000 * np.mean(np.cumsum(errors) / np.arange(1, len(errors) + 1))


@pytest.mark.parametrize("k", [2, 6, 10])
def test_errors_and_nll_equal_scikit_learns(k):
    p, y = random_problem(k=k)
    found = score(p, y)
    classes = np.arange(k)
    scores, kwargs = (p[:, 1], {}) if k == 2 else (p, {"labels": classes})
    assert found["top1_error"] == pytest.approx(100 * np.mean(p.argmax(1) != y))
    if k > 2:
        assert found["top1_error"] == pytest.approx(100 * (1 - top_k_accuracy_score(y, scores, k=1, **kwargs)))
        assert found["top5_error"] == pytest.approx(100 * (1 - top_k_accuracy_score(y, scores, k=5, **kwargs)))
    else:
        assert found["top5_error"] == 0
    assert found["nll"] == pytest.approx(log_loss(y, p, labels=classes))


@pytest.mark.parametrize("seed", range(3))
def test_ece_equals_torchmetrics_away_from_bin_edges_and_a_loop_over_bins(seed):
    p, y = random_problem(seed=seed)
    found = score(p, y)["ece"]
    assert found == pytest.approx(brute_ece(p, y))
    theirs = multiclass_calibration_error(torch.tensor(p), torch.tensor(y), num_classes=10, n_bins=10, norm="l1")
    assert found == pytest.approx(100 * theirs.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_confidence_on_a_bin_edge_belongs_to_the_bin_below_it(dtype):
    # One right and one wrong sample at each edge: were an edge's pair split or moved, its gap would change bins with the
    # sample 0.05 above the edge that is added to the bin over it.
    edges = [0.6, 0.7, 0.8, 0.9, 1.0]
    p = np.array([[c, 1 - c] for edge in edges for c in (edge, edge - 0.05)], dtype=dtype)
    y = np.array([0, 1] * len(edges))
    expected = sum(abs(0.5 - (float(dtype(edge)) + float(dtype(edge - 0.05))) / 2) * 2 for edge in edges) / len(y)
    assert score(p, y)["ece"] == pytest.approx(100 * expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_aurc_with_ties_is_the_mean_over_all_orders_and_eaurc_takes_the_best_order_off(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 8))
    confidence = rng.choice([0.6, 0.7, 0.9], size=n)
    wrong = rng.random(n) < 0.4
    p = np.stack([confidence, 1 - confidence], axis=1)
    found = score(p, wrong.astype(int))
    assert found["aurc"] == pytest.approx(brute_aurc(confidence, wrong), abs=1e-9)
    assert found["eaurc"] == pytest.approx(brute_aurc(confidence, wrong) - optimal(wrong), abs=1e-9)


def test_aurc_without_ties_is_the_sorted_running_mean():
    p, y = random_problem(n=300, seed=5)
    confidence, wrong = p.max(1), p.argmax(1) != y
    order = np.argsort(-confidence)
    expected = 1000 * np.mean(np.cumsum(wrong[order]) / np.arange(1, 301))
    assert score(p, y)["aurc"] == pytest.approx(expected)


def test_all_right_and_all_wrong():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    right, wrong = score(p, [0, 0, 0]), score(p, [1, 1, 1])
    assert right["top1_error"] == right["aurc"] == right["eaurc"] == 0
    assert wrong["top1_error"] == 100 and wrong["aurc"] == pytest.approx(1000) and wrong["eaurc"] == pytest.approx(0)
    assert wrong["ece"] == pytest.approx(80)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_true_class_of_probability_zero_costs_the_same_finite_nats_in_every_type(dtype):
    assert score(np.array([[1, 0]], dtype=dtype), [1])["nll"] == pytest.approx(-np.log(np.finfo(np.float32).tiny))


def test_outcomes_on_the_device_are_those_of_the_arrays_with_the_nll_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (500, 7), generator=generator).float()  # many ties
    labels = torch.randint(7, (500,), generator=generator)
    probabilities = logits.softmax(1)
    on_device, arrays = batch_outcomes(logits, probabilities, labels), outcomes(probabilities.numpy(), labels.numpy())
    for name in ("confidence", "correct", "top5_correct"):
        assert (getattr(on_device, name).numpy() == getattr(arrays, name)).all(), name
    np.testing.assert_allclose(on_device.nll, arrays.nll, rtol=1e-5, atol=1e-6)
    assert batch_outcomes(torch.tensor([[200.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([1])).nll.item() == 200


@pytest.mark.parametrize("num_samples", [40, 3000])
def test_the_ece_of_perfect_calibration_is_what_outcomes_drawn_one_by_one_give(num_samples):
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1, num_samples).astype(np.float32)
    drawn = [100 * ece(confidence, rng.uniform(size=num_samples) < confidence) for _ in range(2000)]
    floor = ece_floor(confidence)
    assert floor.mean == pytest.approx(np.mean(drawn), rel=0.04)
    assert floor.high == pytest.approx(np.quantile(drawn, 0.95), rel=0.06)
    assert floor == ece_floor(confidence[::-1])  # seeded, and no matter in which order


def test_the_ece_of_perfect_calibration_shrinks_with_the_root_of_the_samples_and_is_0_for_certainty():
    confidence = np.random.default_rng(2).uniform(0.3, 1, 40_000)
    assert ece_floor(confidence[:400]).mean / ece_floor(confidence).mean == pytest.approx(10, rel=0.2)
    assert ece_floor(np.ones(50)) == (0.0, 0.0)


def test_one_sample_two_classes():
    found = score(np.array([[0.75, 0.25]]), [0])
    expected = {"top1_error": 0, "top5_error": 0, "nll": -np.log(0.75), "ece": 25, "aurc": 0, "eaurc": 0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, np.longdouble])
def test_any_float_type_is_taken_and_agrees_with_float64_of_the_same_numbers(dtype):
    p, y = random_problem(n=64, seed=2)
    typed = p.astype(dtype) if dtype is np.longdouble else torch.tensor(p).to(dtype)
    exact = typed.astype(np.float64) if dtype is np.longdouble else typed.double()
    assert score(typed, y)["nll"] == pytest.approx(score(exact, y)["nll"])
    assert score(typed, y)["aurc"] == pytest.approx(score(exact, y)["aurc"])


def test_lists_frames_views_and_any_integer_labels_are_taken():
    import pandas as pd

    p, y = random_problem(n=30)
    expected = score(p, y)
    for values in (p.tolist(), pd.DataFrame(p), np.asfortranarray(p), p.astype(">f8")):
        assert score(values, y) == pytest.approx(expected)
    assert score(p[::-1], y[::-1].astype(np.uint16)) == pytest.approx(expected)


def test_more_rows_than_are_ranked_at_once_change_nothing(monkeypatch):
    p, y = random_problem(n=50)
    whole = score(p, y)
    monkeypatch.setattr("pskd_timm.metrics.ROWS_AT_ONCE", 7)
    assert score(p, y) == whole


@pytest.mark.parametrize(
    ("p", "y", "says"),
    [
        (np.ones(3), [0], "shape"),
        (np.ones((2, 2)) / 2, [0], "labels"),
        (np.ones((1, 2)) / 2, [2], "0 … 1"),
        (np.array([[3.0, -1.0]]), [0], "softmax"),
        (np.array([[np.nan, 1.0]]), [0], "finite"),
        (np.empty((0, 2)), [], "shape"),
        (np.array([[0.9, 0.8]]), [0], "sums to 1.7"),
        (np.array([[0.5, 0.5], [0.3, 0.09]]), [0, 0], "sums to 0.39"),
        (np.array([["a", "b"]]), [0], "cannot score an array of"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_a_reason(p, y, says):
    with pytest.raises(InputError, match=says):
        score(p, np.array(y, dtype=int))


def brute_smooth_ece(confidence, correct, points=2001, images=3):
    """The definition: every sample's kernel with its mirror images, the integral as a sum, the bandwidth by bisection."""
    t = np.linspace(0, 1, points)

    def error(width):
        shifts = [f + 2 * k for k in range(-images, images + 1) for f in (confidence, -confidence)]
        kernel = sum(np.exp(-0.5 * ((t[:, None] - f) / width) ** 2) for f in shifts) / (width * np.sqrt(2 * np.pi))
        return np.trapezoid(np.abs(kernel @ (correct - confidence)) / len(confidence), t)

    low, high = 0.001, 1.0
    for _ in range(22):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return low


@pytest.mark.parametrize("saturated", [0, 30])
def test_smooth_ece_is_the_fixed_point_of_its_definition_written_out(saturated):
    rng = np.random.default_rng(saturated)
    confidence = rng.uniform(0.2, 1, 120)
    confidence[:saturated] = 1.0  # on the edge at which the kernel is reflected
    correct = rng.random(120) < confidence**2
    correct[: saturated // 3] = False
    assert smooth_ece(confidence, correct) == pytest.approx(brute_smooth_ece(confidence, correct), abs=5e-5)


@pytest.mark.parametrize(("num_samples", "power"), [(300, 0.3), (3000, 1.0), (3000, 2.5)])
def test_smooth_ece_is_relplots_within_its_search(num_samples, power):
    rng = np.random.default_rng(num_samples)
    confidence = rng.uniform(0.3, 0.98, num_samples)
    correct = rng.random(num_samples) < confidence**power
    # It halves the interval of bandwidths ten times, and takes the wider end.
    assert smooth_ece(confidence, correct) == pytest.approx(relplot.smECE(confidence, correct * 1.0), abs=1e-3)


def test_smooth_ece_of_one_confidence_is_the_gap_to_its_accuracy_as_far_as_the_kernel_reaches():
    confidence, correct = np.full(1000, 0.5), np.arange(1000) < 900
    assert smooth_ece(confidence, correct) == pytest.approx(0.4, abs=1e-3)
    assert smooth_ece(np.ones(20), np.ones(20, bool)) == 0


@pytest.mark.parametrize("k", [2, 5])
def test_brier_is_scikit_learns(k):
    p, y = random_problem(k=k)
    halved = 2 if k == 2 else 1  # as it defines it for two classes
    expected = halved * brier_score_loss(y, p[:, 1] if k == 2 else p, **({} if k == 2 else {"labels": np.arange(k)}))
    assert score(p, y, ["brier"]) == {"brier": pytest.approx(expected)}


def test_ece_with_15_bins_is_torchmetrics():
    p, y = random_problem(n=1000)
    theirs = multiclass_calibration_error(torch.tensor(p), torch.tensor(y), num_classes=10, n_bins=15, norm="l1")
    assert score(p, y, ["ece15"])["ece15"] == pytest.approx(100 * theirs.item(), rel=1e-5)


def test_adaptive_ece_is_that_of_sorted_parts_of_equal_size():
    p, y = random_problem(n=1003)
    order = np.argsort(p.max(1))
    parts = np.array_split(order, 15)
    gaps = [abs(np.mean(p[part].argmax(1) == y[part]) - p[part].max(1).mean()) * len(part) / 1003 for part in parts]
    assert score(p, y, ["adaptive_ece"])["adaptive_ece"] == pytest.approx(100 * sum(gaps))


def test_adaptive_ece_of_ties_is_that_of_their_mean_accuracy_in_whatever_order_they_come():
    rng = np.random.default_rng(0)
    confidence, correct = rng.choice([0.5, 0.8, 1.0], size=200), rng.random(200) < 0.7
    accuracy = {c: correct[confidence == c].mean() for c in set(confidence)}
    parts = np.array_split(np.sort(confidence), 15)
    expected = sum(abs(sum(accuracy[c] - c for c in part)) for part in parts) / 200
    for _ in range(3):
        order = rng.permutation(200)
        assert adaptive_ece(confidence[order], correct[order]) == pytest.approx(expected)


def test_adaptive_ece_of_fewer_samples_than_bins_is_the_mean_gap():
    assert adaptive_ece(np.array([0.5, 0.75, 1.0]), np.array([True, False, True])) == pytest.approx(1.25 / 3)


def test_classwise_ece_is_the_mean_of_torchmetrics_binary_errors():
    p, y = random_problem(n=700, k=6)
    theirs = [
        binary_calibration_error(torch.tensor(p[:, c]), torch.tensor(y == c).long(), n_bins=15).item() for c in range(6)
    ]
    assert score(p, y, ["classwise_ece"])["classwise_ece"] == pytest.approx(100 * np.mean(theirs), rel=1e-5)


@pytest.mark.parametrize("decimals", [1, 12])
def test_augrc_is_what_the_auroc_of_confidence_and_the_accuracy_give(decimals):
    rng = np.random.default_rng(decimals)
    confidence = rng.uniform(0.2, 1, 500).round(decimals)  # few decimals make ties
    correct = rng.random(500) < confidence
    accuracy = correct.mean()
    expected = (1 - roc_auc_score(correct, confidence)) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(confidence, correct) == pytest.approx(expected)
    assert augrc(confidence, np.ones(500, bool)) == 0 and augrc(confidence, np.zeros(500, bool)) == pytest.approx(0.5)


@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_coverage_at_a_risk_is_the_largest_that_some_threshold_gives(decimals):
    rng = np.random.default_rng(decimals)
    confidence = rng.uniform(0.4, 1, 300).round(decimals)
    correct = rng.random(300) < 0.8 + 0.2 * confidence
    for risk in (0.0, 0.02, 0.05, 0.5):
        accepted = [confidence >= threshold for threshold in set(confidence)]
        allowed = [a.mean() for a in accepted if (~correct[a]).mean() <= risk]
        assert coverage_at_risk(confidence, correct, risk) == pytest.approx(max(allowed, default=0))


@pytest.mark.parametrize(("n", "accepted"), [(7, 6), (10, 8), (15, 12), (1, 1)])
def test_risk_at_a_coverage_is_the_error_of_so_many_of_the_most_confident_and_the_mean_over_orders_of_ties(n, accepted):
    rng = np.random.default_rng(n)
    confidence, correct = rng.permutation(n) / n, rng.random(n) < 0.6
    most = np.argsort(-confidence)[:accepted]
    assert risk_at_coverage(confidence, correct) == pytest.approx((~correct[most]).mean())
    assert risk_at_coverage(np.full(n, 0.7), correct) == pytest.approx((~correct).mean())


@pytest.mark.parametrize("decimals", [1, 12])
def test_auroc_and_fpr95_are_scikit_learns_ties_included(decimals):
    rng = np.random.default_rng(decimals)
    inside, outside = rng.beta(4, 2, 400).round(decimals), rng.beta(2, 2, 250).round(decimals)
    truth, values = np.r_[np.ones(400), np.zeros(250)], np.r_[inside, outside]
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, values))
    assert fpr_at_recall(inside, outside) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


@pytest.mark.parametrize("name", ["ece15", "adaptive_ece", "smooth_ece"])
def test_the_floors_of_the_others_are_what_outcomes_drawn_one_by_one_give(name):
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1, 500).round(2)
    outcomes_of = (rng.uniform(size=500) < confidence for _ in range(400))
    drawn = [further_of_outcomes(confidence, correct, [name])[name] for correct in outcomes_of]
    floor = ece_floor(confidence, name)
    assert floor.mean == pytest.approx(np.mean(drawn), rel=0.05)
    assert floor.high == pytest.approx(np.quantile(drawn, 0.95), rel=0.1)


def test_the_floor_of_the_classwise_ece_is_what_labels_drawn_one_by_one_give(monkeypatch):
    p, _ = random_problem(n=200, k=4, sharpness=1.0)
    rng = np.random.default_rng(1)
    drawn = [100 * classwise_ece(p, np.array([rng.choice(4, p=row) for row in p])) for _ in range(200)]
    floor = classwise_floor([p[:150], p[150:]], 200)
    assert floor.mean == pytest.approx(np.mean(drawn), rel=0.05)
    assert floor.high == pytest.approx(np.quantile(drawn, 0.95), rel=0.1)
    assert classwise_floor([np.eye(4)], 4) == (0.0, 0.0)


def test_a_score_has_the_metrics_it_is_asked_for_in_that_order_of_any_float_type_and_any_number_of_rows_at_once(
    monkeypatch,
):
    p, y = random_problem(n=200, k=7)
    whole = score(p, y, ALL_METRICS)
    assert list(whole) == list(ALL_METRICS) and whole == score(p, y, ["all"])
    assert {name: whole[name] for name in METRICS} == score(p, y)
    assert list(score(p, y, ["augrc", "nll", "augrc"])) == ["augrc", "nll"]
    assert score(torch.tensor(p).float(), y, ALL_METRICS) == pytest.approx(whole, rel=1e-3)
    monkeypatch.setattr("pskd_timm.metrics.ROWS_AT_ONCE", 33)
    assert score(p, y, ALL_METRICS) == pytest.approx(whole)
    with pytest.raises(InputError, match="no metric 'smoothece', only .*did you mean smooth_ece"):
        score(p, y, ["smoothece"])


@pytest.mark.parametrize("names", ["brier", None])
def test_names_of_metrics_come_as_a_list(names):
    with pytest.raises(InputError, match=f"must be a list of names, got {names!r}"):
        score(np.full((4, 2), 0.5), [0, 1, 0, 1], names)
