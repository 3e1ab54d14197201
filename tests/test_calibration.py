import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pskd_timm.calibration import FEWEST, fit_temperature, fit_to_parts, scaled_outcomes, with_temperature
from pskd_timm.metrics import ece, score


def drawn(num_samples, num_classes, temperature, seed=0, dtype=torch.float64):
    """Logits scaled by `temperature` of a network whose softmax at 1 gives the labels' true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_samples, num_classes, generator=generator, dtype=dtype)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits * temperature, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_synthetic_logits_is_found_again(temperature):
    logits, labels = drawn(100_000, 10, temperature)
    assert fit_temperature(logits.softmax(1), labels) == (pytest.approx(temperature, rel=0.01), 100_000, "")


def test_no_temperature_of_a_fine_grid_has_a_lower_nll():
    logits, labels = drawn(500, 7, 1.7, seed=1)
    grid = np.exp(np.linspace(np.log(0.2), np.log(10), 4001))
    nll = [F.cross_entropy(logits / t, labels).item() for t in grid]
    fitted = fit_temperature(logits.softmax(1), labels).value
    assert fitted == pytest.approx(grid[int(np.argmin(nll))], rel=2e-3)
    assert F.cross_entropy(logits / fitted, labels).item() <= min(nll) + 1e-12


def test_float32_and_a_batch_larger_than_a_chunk_give_the_same_temperature():
    logits, labels = drawn(20_000, 5, 3.0)
    probabilities = logits.softmax(1)
    whole, half = fit_temperature(probabilities, labels), fit_temperature(probabilities.float().numpy(), labels.numpy())
    assert half.value == pytest.approx(whole.value, rel=1e-4) and half.num_samples == 20_000


def test_scaling_divides_the_logits_and_keeps_the_order_of_the_classes():
    logits, _ = drawn(100, 6, 1.0)
    scaled = with_temperature(logits.softmax(1), 2.0)
    assert torch.allclose(scaled, (logits / 2).softmax(1), atol=1e-12)
    assert torch.equal(scaled.argsort(1), logits.argsort(1))


def test_probabilities_of_zero_stay_finite():
    certain = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    assert with_temperature(certain, 3.0).isfinite().all()


def sure(num_right, num_wrong, num_classes=4, confidence=0.7):
    """Predictions of class 0 with one confidence, of which so many are right."""
    rest = (1 - confidence) / (num_classes - 1)
    probabilities = np.full((num_right + num_wrong, num_classes), rest)
    probabilities[:, 0] = confidence
    return probabilities, np.r_[np.zeros(num_right, int), np.ones(num_wrong, int)]


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        (2, 0, "only 0 of 2 held-out predictions are wrong, 10 are needed to fit one"),
        (1, 1, "only 1 of 2 held-out predictions are right"),
        (500, 0, "only 0 of 500 held-out predictions are wrong"),
        (0, 500, "only 0 of 500 held-out predictions are right"),
        (500, FEWEST - 1, "only 9 of 509 held-out predictions are wrong"),
        (FEWEST, 500, "the best one lies outside 0.01 … 100"),  # less sure of class 0 than of others would suit these
    ],
)
def test_too_few_right_or_wrong_samples_and_an_optimum_outside_the_bounds_give_no_temperature(right, wrong, reason):
    fitted = fit_temperature(*sure(right, wrong))
    assert fitted.value == 1.0 and fitted.num_samples == right + wrong and fitted.reason.startswith(reason)


def test_probabilities_that_are_no_numbers_give_no_temperature():
    probabilities, labels = sure(40, 40)
    probabilities[7] = np.nan
    assert "no numbers" in fit_temperature(probabilities, labels).reason


def test_label_smoothing_s_mild_confidences_get_a_sound_temperature_below_1():
    probabilities, labels = sure(480, 20, confidence=0.9 * 0.9 + 0.025)
    fitted = fit_temperature(probabilities, labels)
    assert fitted.reason == "" and fitted.value < 1
    assert with_temperature(probabilities, fitted.value)[0, 0] == pytest.approx(0.96, abs=1e-5)


def test_ten_right_and_ten_wrong_samples_are_enough_not_to_make_most_test_parts_worse():
    worse = []
    for seed in range(60):
        logits, labels = drawn(30, 10, 1.5, seed)
        test_logits, test_labels = drawn(2000, 10, 1.5, 1000 + seed)
        fitted = fit_temperature(logits.softmax(1), labels)
        if not fitted.reason:
            before, after = (F.cross_entropy(test_logits / t, test_labels) for t in (1.0, fitted.value))
            worse.append(float(after > before))
    assert len(worse) > 20 and np.mean(worse) < 0.25


@pytest.mark.parametrize(("size", "scale"), [(50, 0.1), (3000, 1.0), (12_000, 6.0)])
def test_the_temperature_and_the_figures_of_parts_are_those_of_the_whole(size, scale):
    logits, labels = drawn(size, 9, scale, seed=size, dtype=torch.float32)
    probabilities = logits.softmax(1)
    parts = list(zip(probabilities.split(700), labels.split(700), strict=True))
    temperature = fit_to_parts((p.numpy(), y.numpy()) for p, y in parts).value

    def nll(t):
        return F.cross_entropy(probabilities.double().clamp_min(1e-37).log() / t, labels).item()

    # A minimum: the NLL on both sides of it is no lower.
    assert nll(temperature) <= min(nll(temperature * 1.001), nll(temperature / 1.001))
    hits = [(p.numpy(), y.numpy(), (p.argmax(1) == y).numpy()) for p, y in parts]
    confidence, correct, nll_of_each = scaled_outcomes(hits, temperature)
    whole = score(with_temperature(probabilities, temperature), labels)
    assert nll_of_each.mean() == pytest.approx(whole["nll"], abs=1e-5)
    assert 100 * ece(confidence, correct) == pytest.approx(whole["ece"], abs=1e-4)
