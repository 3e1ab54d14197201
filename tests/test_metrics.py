import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from pskd_timm import InputError, score
from pskd_timm.metrics import ece, ece_floor, outcomes
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
        (np.array([["a", "b"]]), [0], "cannot score an array of"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_a_reason(p, y, says):
    with pytest.raises(InputError, match=says):
        score(p, np.array(y, dtype=int))
