"""The seam for tasks: a task of another kind trains on the same page, with PS-KD over its tokens, exactly as recomputed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_processes import WORKERS

import sequences
from commands import together
from pskd_timm import InputError, evaluate, load_recipe, train
from pskd_timm.cli import main
from pskd_timm.run.folder import checkpoints
from pskd_timm.run.result import read_lines

SETTINGS = {
    "task": "sequences",
    "method": "pskd",
    "epochs": 4,
    "threads": 1,
    "optim.lr": 0.5,
    "optim.weight_decay": 0.0,
    "optim.momentum": 0.0,
    "optim.schedule": "constant",
    "pskd.store_dtype": "float32",
    "pskd.store_topk": 3,
    "tracking.log_every": 1,
    "tracking.wandb": "disabled",
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 30,
}


def recomputed(seed=0, k=3, alpha=0.8):
    """Losses of each step, and the remembered rows: plain dictionaries and loops over tokens, SGD by hand."""
    tokens, mask, _ = sequences.sentences()
    torch.manual_seed(seed)
    network, remembered, losses = sequences.Tagger(), {}, []
    for epoch in range(SETTINGS["epochs"]):
        alpha_now = alpha * (epoch + 1) / SETTINGS["epochs"]
        for ids in sequences.epoch_order(sequences.NUM_SENTENCES, seed, epoch).split(sequences.BATCH):
            places = [(i, t) for i in ids.tolist() for t in range(sequences.LONGEST) if mask[i, t]]
            log_p = network((tokens[ids], mask[ids])).log_softmax(1)
            loss = 0.0
            for (i, t), said in zip(places, log_p, strict=True):
                hard = torch.eye(sequences.NUM_CLASSES)[tokens[i, t]]
                loss = loss - (((1 - alpha_now) * hard + alpha_now * remembered.get((i, t), hard)) * said).sum()
            loss = loss / len(places)
            for (i, t), said in zip(places, log_p.detach().exp(), strict=True):
                best = sorted(range(sequences.NUM_CLASSES), key=lambda c: -said[c])[:k]
                rest = (1 - sum(float(said[c]) for c in best)) / (sequences.NUM_CLASSES - k)
                kept = [float(said[c]) if c in best else rest for c in range(sequences.NUM_CLASSES)]
                remembered[i, t] = torch.tensor(kept)
            network.zero_grad()
            loss.backward()
            with torch.no_grad():
                for weights in network.parameters():
                    weights -= SETTINGS["optim.lr"] * weights.grad
            losses.append(loss.item())
    return losses, network


def recipe(folder, **settings):
    return load_recipe("digits", SETTINGS | settings | {"output_dir": str(folder)})


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return train(recipe(tmp_path_factory.mktemp("sequences")))


def test_pskd_with_top_k_rows_over_tokens_is_what_loops_over_tokens_give(result):
    losses, network = recomputed()
    assert [line["loss"] for line in read_lines(result.run_dir / "steps.jsonl")] == pytest.approx(losses, rel=1e-5)
    for name, weights in load_file(result.run_dir / "model.safetensors").items():
        torch.testing.assert_close(weights, network.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_task_brings_its_own_metrics_counts_and_best_epoch(result):
    assert [metric["name"] for metric in result.values["metrics"]] == ["token_accuracy", "nll"]
    history = result.history
    assert all("tokens_per_second" in line and "top1_error" not in line for line in history)
    assert result.best["token_accuracy"] == max(line["token_accuracy"] for line in history)
    assert list(result.frame.columns) == ["epoch", "token_accuracy", "nll"]
    again = evaluate(result.run_dir)
    assert again["last"]["nll"] == again["last"]["recorded"]["nll"] == result.last["nll"]


def test_a_run_of_another_task_stopped_in_mid_epoch_and_resumed_ends_with_the_same_bits(result, tmp_path):
    class Stop(Exception):
        pass

    def stop(line):
        if line["epoch"] == 2:
            raise Stop

    again = recipe(tmp_path)
    with pytest.raises(Stop):
        train(again, callbacks=[stop])
    newest = checkpoints(again.run_dir)[-1]
    assert newest.name == "000002-00000000"
    for path in checkpoints(again.run_dir)[-2:]:  # the run goes back into the middle of its second epoch
        path.rename(path.with_name(f"kept-{path.name}"))
    resumed = train(again)
    assert resumed.last == result.last
    for name, weights in load_file(resumed.run_dir / "model.safetensors").items():
        assert torch.equal(weights, load_file(result.run_dir / "model.safetensors")[name])


def test_two_processes_train_another_task_as_one_does(result, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS | {"output_dir": str(tmp_path / "two")}))
    together(2, WORKERS, "train_sequences", tmp_path)
    shared = tmp_path / "two" / "pskd" / "seed0"
    losses = [[line["loss"] for line in read_lines(run / "steps.jsonl")] for run in (result.run_dir, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    rows = [
        torch.cat([load_file(path)["rows"] for path in sorted(checkpoints(run)[-1].glob("store-*"))])
        for run in (result.run_dir, shared)
    ]
    assert rows[0].shape == rows[1].shape and (rows[0] != rows[1]).float().mean() < 0.5


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="no task 'imges': did you mean images"):
        load_recipe("digits", {"task": "imges"})


def test_a_task_refuses_settings_that_it_does_not_read_and_show_leaves_them_out(tmp_path, capsys):
    assert main(["train", "digits", "--translation.vocab_size", "500", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "pskd-timm: command line: translation.vocab_size: task images does not read it\n"
    )
    assert main(["show", "digits", "--translation.vocab_size", "500"]) == 2
    for name, read, unread in (
        ("digits", "batch_size", "translation.vocab_size"),
        ("translation/multi30k_de_en", "translation.batch_tokens", "batch_size"),
    ):
        main(["show", name])
        listed = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
        assert read in listed and unread not in listed
