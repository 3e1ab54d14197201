"""Files of weights: those of the PS-KD authors' code, written here by a small network of its layout, and other people's."""

import argparse
from collections import defaultdict
from pathlib import PosixPath

import numpy as np
import pytest
import timm
import torch
from test_convert import OldPreActBlock, OldResNet
from torch import nn

from pskd_timm import InputError, convert_checkpoint, load_recipe, train
from pskd_timm.cli import main
from pskd_timm.data import load_data
from pskd_timm.models.weights import load_weights, read_weights_file
from runs import newest

N = 60


def old_network():
    network = OldResNet(OldPreActBlock, 1, [2, 2, 2, 2])
    network.linear = nn.Linear(512, 10)
    return network


@pytest.fixture
def recipe(tmp_path):
    def make(**overrides):
        settings = {
            "epochs": 4,
            "batch_size": 20,
            "data.limit_train": N,
            "data.limit_test": 50,
            "model.name": "cifar_preact_resnet18",
            "model.kwargs": {},
            "output_dir": str(tmp_path / "runs"),
            "tracking.log_every": 1,
            "pskd.store_dtype": "float32",
        }
        return load_recipe("digits", settings | overrides)

    return make


@pytest.fixture(scope="module")
def authors():
    """A checkpoint dictionary after two epochs of the old code's network, as its training script writes it."""
    torch.manual_seed(0)
    network = nn.DataParallel(old_network())
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True)
    network(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    predictions = torch.rand(N, 10).softmax(1)
    predictions[7] = 0
    return {
        "net": network.state_dict(),
        "epoch": 1,
        "best_acc": np.float64(33.0),
        "accuracy": 33.0,
        "alpha_t": 0.4,
        "optimizer": optimizer.state_dict(),
        "prev_predictions": predictions,
    }


@pytest.fixture
def file(authors, tmp_path):
    torch.save(authors, tmp_path / "old.pth")
    return tmp_path / "old.pth"


def test_an_authors_file_is_continued_with_weights_momentum_predictions_and_epoch(file, authors, recipe, monkeypatch):
    import sys

    seen = {}
    original = sys.modules["pskd_timm.training"].start_from

    def look(path, model, optimizer, store, epochs):
        progress = original(path, model, optimizer, store, epochs)
        seen.update(table=store.gather(), weights={k: v.clone() for k, v in model.state_dict().items()})
        layouts = [(p.stride(), optimizer.state[p]["momentum_buffer"].stride()) for p in model.parameters()]
        seen.update(
            layouts=layouts,
            momentum={n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()},
        )
        return progress

    monkeypatch.setattr(sys.modules["pskd_timm.training"], "start_from", look)
    result = train(recipe(init_from=str(file)))
    assert [line["epoch"] for line in result.history] == [3, 4]
    assert [line["alpha"] for line in result.history] == pytest.approx([0.8 * 3 / 4, 0.8])
    known = torch.arange(N) != 7
    torch.testing.assert_close(seen["table"][known], authors["prev_predictions"][known])
    assert seen["table"][7].max() == 1  # never seen: its one-hot label
    model = timm.create_model("cifar_preact_resnet18", num_classes=10)
    for name, tensor in convert_checkpoint(authors, model).items():
        assert torch.equal(seen["weights"][name], tensor)
    # The optimizer numbers parameters as the file orders its weights: the momentum beside each weight has its shape.
    names = [name for name in authors["net"] if "running" not in name and "batches" not in name]
    converted = dict(zip(names, [n for n in convert_checkpoint(authors, model) if n in seen["momentum"]], strict=True))
    for number, name in enumerate(names):
        buffer = authors["optimizer"]["state"][number]["momentum_buffer"]
        assert torch.equal(seen["momentum"][converted[name]], buffer)
    # A fused step refuses others; the shipped recipes have channels_last, where those of convolutions differ from the file's.
    assert all(weights == momentum for weights, momentum in seen["layouts"])
    assert any(strides[1] == 1 and len(strides) == 4 for strides, _ in seen["layouts"])
    assert newest(result.run_dir)


def test_evaluate_scores_an_authors_file_as_the_old_network_would(file, authors, recipe, capsys):
    data = load_data(recipe().data, recipe().augment)
    network = old_network().eval()
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in authors["net"].items()})
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    with torch.no_grad():
        logits = network((data.test.images / 255 - mean) / std)
    nll = nn.functional.cross_entropy(logits, data.test.labels).item()
    options = ["--data.limit_train", str(N), "--data.limit_test", "50", "--data.gaussian_noise", "0.65"]
    command = [
        "evaluate",
        "--checkpoint",
        str(file),
        "--model.name",
        "cifar_preact_resnet18",
        "--data.source",
        "digits",
    ]
    assert main([*command, *options]) == 0
    assert f"NLL {nll:.3f}" in capsys.readouterr().out


def test_bare_weights_are_a_start_at_the_first_epoch(authors, recipe, tmp_path):
    torch.save(authors["net"], tmp_path / "bare.pth")
    assert [line["epoch"] for line in train(recipe(epochs=1, init_from=str(tmp_path / "bare.pth"))).history] == [1]


class Loop(nn.Module):
    """A training loop's module around a network, as Lightning's are, with a loss that has weights of its own."""

    def __init__(self, network):
        super().__init__()
        self.model, self.criterion = network, nn.Linear(2, 2)


def about_a_run():
    """What training scripts write beside the weights."""
    arguments = argparse.Namespace(lr=0.1, output=PosixPath("/some/where"), sizes=[32, 32], note=None)
    return {"args": arguments, "metrics": defaultdict(list, top1=[1.0]), "best": np.float64(3.0), "epoch": 7}


def checkpoints(network):
    """By name, a checkpoint in each layout that people have and that holds `network`'s weights."""
    state = network.state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "bare": state,
        "timm": {"arch": "x", "state_dict": state, "version": 2},
        "model": {"model": state},
        "compiled": {"state_dict": torch.compile(network).state_dict()},
        "parallel": {"state_dict": nn.DataParallel(network).state_dict()},
        "compiled and parallel": {"state_dict": nn.DataParallel(torch.compile(network)).state_dict()},
        "moving average": {"state_dict": other, "state_dict_ema": nn.DataParallel(network).state_dict()},
        "torch's average": {"model": torch.optim.swa_utils.AveragedModel(network).state_dict()},
        "lightning": {"pytorch-lightning_version": "2.5", "state_dict": Loop(network).state_dict()},
        "lightning, compiled": {"state_dict": Loop(torch.compile(network)).state_dict()},
    }


@pytest.mark.parametrize("layout", checkpoints(nn.Linear(1, 1)))
@pytest.mark.parametrize("name", ["cifar_preact_resnet_tiny", "resnet18"])
def test_weights_of_timms_lightnings_and_ones_own_loops_are_found_without_running_code(name, layout, tmp_path):
    torch.manual_seed(1)
    network = timm.create_model(name, num_classes=3)
    torch.save(checkpoints(network)[layout] | about_a_run(), tmp_path / "model_best.pth.tar")
    filled = timm.create_model(name, num_classes=3)
    load_weights(tmp_path / "model_best.pth.tar", filled)
    for (key, ours), theirs in zip(filled.state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


def test_evaluate_and_init_from_take_timms_checkpoint(recipe, tmp_path, capsys):
    network = timm.create_model("cifar_preact_resnet_tiny", num_classes=10)
    torch.save({"state_dict": network.state_dict()} | about_a_run(), tmp_path / "last.pth.tar")
    result = train(
        recipe(epochs=1, init_from=str(tmp_path / "last.pth.tar"), **{"model.name": "cifar_preact_resnet_tiny"})
    )
    assert [line["epoch"] for line in result.history] == [1]


class Payload:
    def __reduce__(self):
        return print, ("this code must not run",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Payload(), r"would run code of its own \(builtins.print\)"),
        ({"state_dict": {}, "hyper_parameters": nn.Linear(1, 1)}, r"would run code of its own \(torch.nn"),
        ({"epoch": 3, "lr": 0.1}, "no weights in it, only epoch, lr"),
        (b"no checkpoint", "no checkpoint that can be read"),
        ([1, 2], "a dictionary of weights, this is list"),
        ({"net": {"linear.weight": torch.zeros(3, 3)}}, "does not fit the model"),
        (None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_line(content, says, recipe, tmp_path, capsys):
    path = tmp_path / "bad.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=says) as error:
        train(recipe(init_from=str(path)))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"epochs": 2}, "has done 2 epochs already"),
        ({"data.limit_train": 40}, r"predictions \[60, 10\], this run needs \[40, 10\]"),
    ],
)
def test_an_authors_file_that_does_not_fit_the_run_is_refused(file, recipe, overrides, says):
    with pytest.raises(InputError, match=says):
        train(recipe(init_from=str(file), **overrides))


def test_numpy_predictions_are_read_too(authors, tmp_path):
    torch.save(authors | {"prev_predictions": authors["prev_predictions"].numpy()}, tmp_path / "old.pth")
    assert read_weights_file(tmp_path / "old.pth")["prev_predictions"].shape == (N, 10)


def test_a_network_with_a_small_stem_is_trained_saved_loaded_and_evaluated(recipe):
    from pskd_timm import evaluate
    from pskd_timm.metrics import METRICS

    settings = {"model.name": "resnet18", "model.small_input": "true", "epochs": 1, "method": "baseline"}
    result = train(recipe(**settings))
    found = evaluate(result.run_dir)["last"]
    assert {name: found[name] for name in METRICS} == found["recorded"]
    with pytest.raises(InputError, match="small_input does not know the stem"):
        train(recipe(**settings | {"model.name": "cifar_preact_resnet_tiny", "seed": 1}))
