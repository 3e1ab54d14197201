import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import parquet
from torch import nn

from pskd_timm.bench.rounds import peak
from pskd_timm.calibration import fit_temperature, fit_to_parts, probability_parts
from pskd_timm.data.split import Split
from pskd_timm.errors import InputError
from pskd_timm.metrics import score
from pskd_timm.outcomes import ROW_GROUP_BYTES, ProbabilityRows
from pskd_timm.prediction import held_out_temperature
from pskd_timm.reports.kept import Kept
from pskd_timm.tasks.images import predict


class Sums(nn.Module):
    """Logits that are weighted sums of 48 pixel values."""

    def __init__(self, num_classes, scale=1.0):
        super().__init__()
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(scale * torch.randn(48, num_classes, generator=generator))

    def forward(self, images):
        return images.flatten(1) @ self.weights


def split(num_samples, num_classes):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num_samples, 3, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    return Split(images, labels, torch.arange(num_samples))


def write(folder, network, samples, dtype):
    rows = ProbabilityRows(folder / "rows", network.num_classes, dtype)
    predict(network, samples, 128, [0.5] * 3, [0.25] * 3, rows=rows).write(folder / "holdout.parquet")


def written(folder, num_samples, num_classes, dtype, scale=1.0):
    """The file of a network's predictions, its logits in float64, and the labels."""
    network, samples = Sums(num_classes, scale), split(num_samples, num_classes)
    write(folder, network, samples, dtype)
    pixels = (samples.images.double() / 255 - 0.5) / 0.25
    return folder / "holdout.parquet", pixels.flatten(1) @ network.weights.detach().double(), samples.labels


def test_the_file_of_predictions_has_every_probability_in_row_groups_of_bounded_size(tmp_path):
    path, logits, _ = written(tmp_path, 1500, 5000, "float32")
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == -(-1500 // (ROW_GROUP_BYTES // 20_000))
    table = pd.read_parquet(path)
    assert table["index"].tolist() == list(range(1500))
    torch.testing.assert_close(
        torch.tensor(np.stack(table.probabilities)).double(), logits.softmax(1), rtol=1e-3, atol=1e-7
    )
    assert (table.prediction.to_numpy() == logits.argmax(1).numpy()).all()


def test_16_bits_keep_the_logarithms_of_probabilities_that_float16_has_not(tmp_path):
    path, logits, _ = written(tmp_path, 300, 1000, "float16", scale=1.0)
    kept = np.stack(pd.read_parquet(path).log_probabilities)
    assert kept.dtype == np.float16
    expected = logits.log_softmax(1).numpy()
    assert expected.min() < np.log(6e-8)
    np.testing.assert_allclose(kept.astype(np.float64), expected, rtol=2**-11, atol=1e-4)


def test_a_temperature_from_16_bits_and_its_figures_are_those_of_all_the_probabilities(tmp_path):
    path, logits, labels = written(tmp_path, 1000, 1000, "float16", scale=0.3)
    labels = torch.where(torch.arange(1000) % 3 > 0, logits.argmax(1), labels)
    probabilities = logits.softmax(1)
    table = parquet.read_table(path)
    for name, column in (("label", labels), ("correct", labels == logits.argmax(1))):
        table = table.set_column(table.column_names.index(name), name, [column.numpy()])
    parquet.write_table(table, path)
    fitted = fit_to_parts(part[:2] for part in probability_parts(path))
    assert fitted.value == pytest.approx(fit_temperature(probabilities, labels).value, rel=1e-3)
    assert held_out_temperature(tmp_path).value == fitted.value
    path.rename(tmp_path / "predictions.parquet")
    scaled = score((logits / fitted.value).softmax(1), labels)
    found = Kept(tmp_path / "predictions.parquet", fitted.value).scaled_figures()
    assert (
        found == pytest.approx({name: scaled[name] for name in found}, rel=2e-3)
        and {"nll", "ece", "aurc"} <= found.keys()
    )


def test_a_final_evaluation_of_many_classes_keeps_no_table_of_them_in_memory(tmp_path):
    network, samples = Sums(8000), split(10_000, 8000)
    write(tmp_path / "first", network, samples.take(torch.arange(128)), "float16")  # what is loaded with the first use
    needed = peak(lambda: write(tmp_path / "all", network, samples, "float16"))
    assert needed < 220e6  # of 320 MB in float32 for the probabilities alone


def test_a_full_disk_ends_the_evaluation_with_what_needs_no_room(tmp_path):
    rows = ProbabilityRows(tmp_path / "rows", 1000, "float32")
    rows.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(InputError, match="No space left on device; --keep_probabilities none needs no room"):
        rows.add(torch.rand(10, 1000))


def test_a_run_that_keeps_no_probabilities_has_all_figures_and_no_temperature(tiny):
    from pskd_timm import report, train

    settings = {"data__holdout_fraction": 0.2, "data__limit_train": 100, "tracking__wandb": "disabled"}
    runs = [train(tiny(keep_probabilities=keep, seed=s, **settings)) for s, keep in enumerate(("none", "float16"))]
    without, with_16_bits = (pd.read_parquet(run.run_dir / "holdout.parquet") for run in runs)
    assert "log_probabilities" in with_16_bits and not any("probabilities" in name for name in without)
    assert not list(runs[1].run_dir.glob("**/*.rows"))
    assert "kept no probabilities" in held_out_temperature(runs[0].run_dir).reason
    assert held_out_temperature(runs[1].run_dir).num_samples == 20
    assert report(runs[0].run_dir.parent).frame.runs.tolist() == [2]
