import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pskd_timm.calibration import fit_temperature, fit_to_parts, scaled_figures, with_temperature
from pskd_timm.metrics import score


def drawn(num_samples, num_classes, temperature, seed=0, dtype=torch.float64):
    """Logits scaled by `temperature` of a network whose softmax at 1 gives the labels' true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_samples, num_classes, generator=generator, dtype=dtype)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits * temperature, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_synthetic_logits_is_found_again(temperature):
    logits, labels = drawn(100_000, 10, temperature)
    assert fit_temperature(logits.softmax(1), labels) == pytest.approx(temperature, rel=0.01)


def test_no_temperature_of_a_fine_grid_has_a_lower_nll():
    logits, labels = drawn(500, 7, 1.7, seed=1)
    grid = np.exp(np.linspace(np.log(0.2), np.log(10), 4001))
    nll = [F.cross_entropy(logits / t, labels).item() for t in grid]
    fitted = fit_temperature(logits.softmax(1), labels)
    assert fitted == pytest.approx(grid[int(np.argmin(nll))], rel=2e-3)
    assert F.cross_entropy(logits / fitted, labels).item() <= min(nll) + 1e-12


def test_float32_and_a_batch_larger_than_a_chunk_give_the_same_temperature():
    logits, labels = drawn(20_000, 5, 3.0)
    probabilities = logits.softmax(1)
    assert fit_temperature(probabilities.float(), labels) == pytest.approx(
        fit_temperature(probabilities, labels), rel=1e-4
    )


def test_scaling_divides_the_logits_and_keeps_the_order_of_the_classes():
    logits, _ = drawn(100, 6, 1.0)
    scaled = with_temperature(logits.softmax(1), 2.0)
    assert torch.allclose(scaled, (logits / 2).softmax(1), atol=1e-12)
    assert torch.equal(scaled.argsort(1), logits.argsort(1))


def test_probabilities_of_zero_stay_finite_and_all_right_or_all_wrong_samples_get_the_bounds():
    certain = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    assert fit_temperature(certain, torch.tensor([0, 0])) == 0.01
    assert fit_temperature(certain, torch.tensor([1, 1])) == 100.0
    assert with_temperature(certain, 3.0).isfinite().all()


@pytest.mark.parametrize(("size", "scale"), [(50, 0.1), (3000, 1.0), (12_000, 6.0)])
def test_the_temperature_and_the_figures_of_parts_are_those_of_the_whole(size, scale):
    logits, labels = drawn(size, 9, scale, seed=size, dtype=torch.float32)
    probabilities = logits.softmax(1)
    parts = list(zip(probabilities.split(700), labels.split(700), strict=True))
    temperature = fit_to_parts(iter(parts))

    def nll(t):
        return F.cross_entropy(probabilities.double().clamp_min(1e-37).log() / t, labels).item()

    # A minimum: the NLL on both sides of it is no lower.
    assert nll(temperature) <= min(nll(temperature * 1.001), nll(temperature / 1.001))
    hits = [(p, y, p.argmax(1) == y) for p, y in parts]
    found, whole = scaled_figures(hits, temperature), score(with_temperature(probabilities, temperature), labels)
    assert found["nll"] == pytest.approx(whole["nll"], abs=1e-5)
    assert found["ece"] == pytest.approx(whole["ece"], abs=1e-4)
