"""What only a GPU shows. It runs where there is one and PSKD_TIMM_TEST_GPU is set: `pytest -n 0 tests/test_gpu.py`."""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from detection_data import make_devkit, small_settings
from safetensors.torch import load_file

from pskd_timm import METHODS, evaluate, train
from pskd_timm.detection.recipes import load_detection_recipe
from pskd_timm.detection.training import train_detector
from pskd_timm.run.result import read_lines

NOT_RECORDED = {"dlb"}  # model.compile graphs refuses it


@contextmanager
def waits():
    """The list that torch's warnings of waits for the GPU go to."""
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [one for one in told if "synchronizing CUDA operation" in str(one.message)]


def losses(run_dir):
    return [line["loss"] for line in read_lines(run_dir / "steps.jsonl")]


def test_there_is_a_gpu():
    assert torch.cuda.is_available(), "set PSKD_TIMM_TEST_GPU=1 on a machine with a GPU"


@pytest.mark.parametrize(
    "method, settings",
    [
        *((name, {}) for name in METHODS),
        ("pskd", {"pskd.teacher": "snapshot"}),
        ("pskd", {"pskd.store_topk": 3}),
        ("pskd", {"mixed_precision": "fp16"}),
        ("pskd", {"model.compile": "graphs"}),
        ("cskd", {"model.compile": "graphs"}),
    ],
)
def test_no_step_waits_for_the_gpu(tiny, method, settings):
    def count(batch_size):
        sizes = {"data.limit_train": 48, "data.limit_test": 10, "batch_size": batch_size, "tracking.log_every": 1000}
        given = {"mixed_precision": "bf16", "keep_probabilities": "none", **sizes, **settings}
        recipe = tiny(**given, method=method, output_dir=str(tiny().run_dir / str(batch_size)))
        with waits() as found:
            train(recipe)
        return len(found)

    # Four times the steps, and as many waits: at the ends of epochs and of the run.
    assert count(12) == count(48)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - NOT_RECORDED))
def test_recorded_steps_give_the_losses_of_plain_ones(tiny, tmp_path, method):
    given = {"method": method, "epochs": 3, "batch_size": 30, "tracking.log_every": 1}
    plain, recorded = (
        losses(train(tiny(**given, output_dir=str(tmp_path / mode), **{"model.compile": mode})).run_dir)
        for mode in ("off", "graphs")
    )
    assert len(plain) == 30 and recorded == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize("method", ["pskd", "cskd", "dlb"])
def test_compiled_steps_give_the_losses_of_plain_ones(tiny, tmp_path, method, mode):
    plain, compiled = (
        losses(train(tiny(method=method, output_dir=str(tmp_path / each), **{"model.compile": each})).run_dir)
        for each in ("off", mode)
    )
    assert compiled == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("precision", ["no", "tf32", "bf16", "fp16"])
def test_every_precision_learns_and_leaves_finite_weights_and_momentum(tiny, precision):
    result = train(tiny(method="baseline", mixed_precision=precision, epochs=6))
    first, *_, last = (line["train_loss"] for line in result.history)
    assert last < first - 0.1
    assert all(tensor.isfinite().all() for tensor in load_file(result.run_dir / "model.safetensors").values())
    newest = max((result.run_dir / "checkpoints").iterdir())
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert state and all(each["momentum_buffer"].isfinite().all() for each in state.values())
    assert evaluate(result.run_dir)


def test_a_store_on_the_cpu_gives_the_losses_of_one_on_the_gpu(tiny, tmp_path):
    here, there = (
        losses(train(tiny(output_dir=str(tmp_path / place), **{"pskd.store_device": place})).run_dir)
        for place in ("auto", "cpu")
    )
    assert here == pytest.approx(there, rel=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_streamed_give_the_losses_of_resident_ones(tiny, tmp_path, workers):
    plain = {"epochs": 3, "data.image_size": 8, "data.gaussian_noise": 0.0, "augment.crop_padding": 0}
    streamed = {"data.loading": "streaming", "data.workers": workers}
    here, there = (
        losses(train(tiny(**plain, **given, output_dir=str(tmp_path / str(len(given))))).run_dir)
        for given in ({}, streamed)
    )
    assert there == pytest.approx(here, rel=1e-3)


def test_a_run_that_was_stopped_goes_on_as_one_that_was_not(tiny, tmp_path):
    whole = train(tiny(epochs=4)).history
    recipe = tiny(epochs=4, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[interrupt_after_two])
    again = train(recipe).history
    assert [line["train_loss"] for line in again] == pytest.approx([line["train_loss"] for line in whole], rel=1e-2)


def interrupt_after_two(line):
    if line["epoch"] == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_detector_trains(tmp_path, precision):
    devkit = make_devkit(tmp_path / "VOCdevkit")
    settings = small_settings(devkit, tmp_path / "runs", mixed_precision=precision)
    result = train_detector(load_detection_recipe("detection/voc_small", settings))
    assert all(math.isfinite(line["loss"]) for line in read_lines(result.run_dir / "steps.jsonl"))
