"""Runs that translate: from a corpus to result.json, killed and resumed, on one and two processes, and what reads them."""

import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import sacrebleu
import torch
from safetensors.torch import load_file

from commands import LIMIT, told_by_launcher, wait_until
from corpora import pairs, small_recipe, write_plain
from kills import start
from pskd_timm import InputError, evaluate, train
from pskd_timm.cli import main
from pskd_timm.metrics import score
from pskd_timm.progress import Display
from pskd_timm.reports.build import report
from pskd_timm.run.result import read_lines
from pskd_timm.study import search
from pskd_timm.tasks import open_task
from pskd_timm.translation.translate import translate

QUIET = Display(quiet=True)
SIX = ["top1_error", "top5_error", "nll", "ece", "aurc", "eaurc"]
TIMES = ("seconds", "epoch_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("corpus"), train=400, valid=30, test2016=24, test2017=12)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run long enough to have learnt some of the made-up language."""
    wide = {"layers": 1, "d_model": 64, "ffn_dim": 64, "heads": 2, "dropout": 0.0}
    settings = {"epochs": 14, "model.kwargs": wide, "translation.batch_tokens": 100, "pskd.alpha": 0.3}
    output = tmp_path_factory.mktemp("runs")
    return train(small_recipe(corpus, output_dir=str(output), **settings), display=QUIET)


def test_a_run_learns_to_translate_and_its_figures_are_those_of_its_files(finished, corpus):
    values = finished.values
    assert values["evaluated_on"] == "test2016" and {"test2017", "valid"} <= set(values)
    assert [metric["name"] for metric in values["metrics"]] == [*SIX, "bleu", "bleu_lowercase", "chrf"]
    assert finished.last["nll"] < 1.0 and finished.last["bleu"] > 5
    assert finished.best["chosen_on"] == "valid"
    table = pd.read_parquet(finished.run_dir / "predictions.parquet")
    assert table.correct.mean() == pytest.approx(1 - finished.last["top1_error"] / 100)
    assert table.nll.mean() == pytest.approx(finished.last["nll"])
    assert (table.prediction == table.label).equals(table.correct)
    # A sentence is a group of tokens, the last of which is the end's.
    ends = table.groupby("group").label.last()
    assert list(ends.index) == list(range(24)) and ends.nunique() == 1
    rows = read_lines(finished.run_dir / "predictions.translations.jsonl")
    assert [row["reference"] for row in rows] == [en for _, en in pairs(24, seed=2)]
    said = [row["translation"] for row in rows]
    assert sacrebleu.corpus_bleu(said, [[row["reference"] for row in rows]]).score == finished.last["bleu"]
    assert "nrefs:1|case:mixed|eff:no|tok:13a" in values["sacrebleu"]["bleu"]


def test_token_figures_are_the_metrics_of_the_networks_probabilities_a_sentence_at_a_time(finished, corpus):
    task = open_task(small_recipe(corpus, **{"model.kwargs": {"d_model": 64, "layers": 1, "ffn_dim": 64, "heads": 2}}))
    network, part = task.load(finished.run_dir).eval(), task.evaluated["test2017"]
    probabilities, labels = [], []
    for source, target in zip(part.pairs.sources, part.pairs.targets, strict=True):
        given = task.tokenizer(source, return_tensors="pt")["input_ids"]
        wanted = task.tokenizer(target, return_tensors="pt")["input_ids"]
        shifted = torch.cat([torch.tensor([[network.start]]), wanted[:, :-1]], 1)
        with torch.no_grad():
            logits = network.transformer(input_ids=given, decoder_input_ids=shifted).logits[0]
        probabilities.append(logits.softmax(1))
        labels.append(wanted[0])
    expected = score(torch.cat(probabilities), torch.cat(labels))
    found = finished.values["test2017"]["last"]
    assert {name: found[name] for name in SIX} == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_evaluate_gives_the_figures_of_result_json_again(finished):
    for found in evaluate(finished.run_dir).values():
        assert found.pop("recorded") == found


def test_translate_is_generate_and_its_confidences_are_the_networks(finished):
    lines = ["zwei Hund.", "", "  drei\u00a0Ball eins. "]
    found = translate(finished.run_dir, lines, confidences=True)
    assert [row["source"] for row in found] == lines and found[1]["translation"] == ""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    network = AutoModelForSeq2SeqLM.from_pretrained(finished.run_dir)
    tokenizer = AutoTokenizer.from_pretrained(finished.run_dir)
    for row, text in ((found[0], "zwei Hund."), (found[2], "drei Ball eins.")):
        given = tokenizer(text, return_tensors="pt")["input_ids"]
        said = network.generate(input_ids=given, num_beams=2, max_new_tokens=40)
        assert tokenizer.decode(said[0], skip_special_tokens=True).strip() == row["translation"]
        logits = network(input_ids=given, decoder_input_ids=said[:, :-1]).logits[0]
        expected = logits.softmax(1).gather(1, said[0, 1:, None])[:, 0]
        assert [token["confidence"] for token in row["tokens"]] == pytest.approx(expected.tolist(), rel=1e-3)
        assert row["confidence"] == pytest.approx(expected.prod().item(), rel=1e-3)


def test_translate_on_the_command_line_reads_a_file_and_writes_lines_and_json(finished, tmp_path, capsys):
    (tmp_path / "lines.de").write_text("eins zwei.\n\nHund.\n")
    words = ["translate", str(finished.run_dir), str(tmp_path / "lines.de"), "--json", str(tmp_path / "said.json")]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "said.json").read_text())
    assert said == [row["translation"] for row in rows] and len(said) == 3 and rows[0]["tokens"]
    assert rows[1] == {"source": "", "translation": "", "confidence": None, "tokens": []}
    assert main([*words[:3], "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert main([*words[:2], "--best", words[2]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    (tmp_path / "empty.de").write_text("")
    assert main(["translate", str(finished.run_dir), str(tmp_path / "empty.de")]) == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "bad.de").write_bytes(b"gut\n\xff\n")
    assert main(["translate", str(finished.run_dir), str(tmp_path / "bad.de")]) == 2
    assert "bad.de line 2: not UTF-8" in capsys.readouterr().err
    with pytest.raises(InputError, match="line 2 has .* pieces, more than the 1,024 positions"):
        translate(finished.run_dir, ["eins", "Hund " * 1100])


def run(settings, rank, world_size, port):
    """One process of a run; its words go to OUTPUT_DIR/rank<n>.log."""
    os.environ.update(told_by_launcher(rank, world_size, port))
    log = Path(settings["output_dir"]) / f"rank{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    corpus = settings.pop("corpus")
    train(small_recipe(corpus, **settings))


def to_end(settings, world_size=1):
    processes = start(settings, world_size, run)
    for process in processes:
        process.join(LIMIT)
    log = (Path(settings["output_dir"]) / "rank0.log").read_text()
    assert [process.exitcode for process in processes] == [0] * world_size, log[-3000:]
    return Path(settings["output_dir"]) / settings["method"] / "seed0"


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("teacher", ["store", "snapshot"])
def test_a_run_killed_in_mid_epoch_ends_bit_equal_to_one_that_was_not(corpus, tmp_path, teacher):
    topk = {} if teacher == "store" else {"pskd.teacher": "snapshot"}
    settings = {
        "corpus": corpus,
        "method": "pskd",
        "data.limit_train": 120,
        "data.limit_test": 6,
        "checkpoint.every_steps": 3,
        **topk,
    }
    whole = to_end(settings | {"output_dir": str(tmp_path / "whole")})
    killed = settings | {"output_dir": str(tmp_path / "killed")}
    (victim,) = start(killed, 1, run)
    steps = tmp_path / "killed" / "pskd" / "seed0" / "steps.jsonl"
    per_epoch = len(read_lines(whole / "steps.jsonl")) // 2
    wait_until(lambda: len(read_lines(steps)) >= per_epoch + 4, victim, every=0.001)  # in the second epoch
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    again = to_end(killed)
    assert "resuming after epoch" in (tmp_path / "killed" / "rank0.log").read_text()
    for name in ("model.safetensors", "best/model.safetensors"):
        one, other = load_file(whole / name), load_file(again / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert without_times(read_lines(whole / name)) == without_times(read_lines(again / name))
    for name in ("predictions.translations.jsonl", "tokenizer.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize("teacher", ["store", "snapshot"])
def test_two_processes_give_the_losses_and_figures_of_one(corpus, tmp_path, teacher):
    topk = {} if teacher == "store" else {"pskd.teacher": "snapshot"}
    settings = {
        "corpus": corpus,
        "method": "pskd",
        "data.limit_train": 150,
        "data.limit_test": 7,
        "grad_accum_steps": 2,
        # Adam divides by gradients as small as the rounding in which sums over ranks differ.
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "model.kwargs": {"layers": 1, "d_model": 16, "ffn_dim": 32, "heads": 2, "dropout": 0.0},
        **topk,
    }
    alone, together = (to_end(settings | {"output_dir": str(tmp_path / str(n))}, n) for n in (1, 2))
    for name in ("metrics.jsonl", "steps.jsonl"):
        one, two = (without_times(read_lines(folder / name)) for folder in (alone, together))
        assert len(one) == len(two)
        for line, other in zip(one, two, strict=True):
            numbers = [key for key, value in line.items() if isinstance(value, float)]
            assert {k: other[k] for k in numbers} == pytest.approx({k: line[k] for k in numbers}, rel=1e-3)
    of_one, of_two = (json.loads((folder / "result.json").read_text()) for folder in (alone, together))
    for part in ("last", "best"):
        assert of_two[part]["nll"] == pytest.approx(of_one[part]["nll"], rel=1e-4)
    frames = [pd.read_parquet(folder / "predictions.parquet") for folder in (alone, together)]
    assert frames[0][["group", "label"]].equals(frames[1][["group", "label"]])


def test_the_report_has_the_runs_of_translation(finished, corpus, tmp_path):
    found = report([finished.run_dir.parents[1]], tmp_path)
    assert found.rows.status.tolist() == ["finished"], found.rows
    assert found.rows.bleu.tolist() == [finished.last["bleu"]]
    said, of_other = (tmp_path / "comparison.md").read_text(), finished.values["test2017"]["last"]
    assert "BLEU" in said.partition("## test2017 part, last epoch")[0]
    assert f" | **{of_other['nll']:.2f}** | " in said.partition("## test2017 part, last epoch")[2].partition("##")[0]
    page = (tmp_path / "report.html").read_text()
    assert (
        "Last epoch, on the test2017 part" in page and f"{of_other['bleu']:.1f}" in page.partition("test2017-last")[2]
    )


def test_show_says_what_the_store_takes_and_refuses_a_full_one_that_is_too_large(corpus, capsys, monkeypatch):
    recipe = ["show", "translation/multi30k_de_en", "--data.path", str(corpus), "--translation.vocab_size", "300"]
    assert main([*recipe, "--translation.batch_tokens", "150"]) == 0
    said = capsys.readouterr().out
    assert "train 400" in said and "the 20 largest of each token" in said and "augment" not in said
    assert "short run" not in said  # which is measured on images; the recipe's own runs gain in as few epochs
    from pskd_timm.tasks import translation as room

    monkeypatch.setattr(room.os, "sysconf", lambda name: 1000)
    full = ["--pskd.store_topk", "null"]
    assert main([*recipe, "--translation.batch_tokens", "150", *full]) == 2
    assert "store_topk 20" in capsys.readouterr().err


def test_the_bench_measures_steps_a_run_beside_seq2seqtrainer_and_beam_search(monkeypatch):
    from pskd_timm.bench import translation as part

    for name, value in {"PAIRS": 200, "WORDS": 100, "SECONDS": 0.0, "TURNS": 1, "SENTENCES": 4, "LENGTH": 3}.items():
        monkeypatch.setattr(part, name, value)
    said = []
    rows = part.measure(said.append)
    assert [row["step"] for row in rows] == ["store", "plain", "pskd top-20", "pskd snapshot", "run", "beam"]
    assert rows[0]["bytes"] == rows[0]["num_rows"] * (20 * 4 + 1)
    assert all(row["ratio"] > 0 for row in rows[1:4]) and rows[4]["ratios"][0] > 0 and len(said) == len(rows)


def test_a_search_ranks_by_bleu_on_held_out_pairs_and_does_not_prune_by_it(corpus, tmp_path):
    settings = {"epochs": 2, "method": "baseline", "data.holdout_fraction": 0.1, "output_dir": str(tmp_path)}
    recipe, over = small_recipe(corpus, **settings), ["optim.lr=0.0001,0.01"]
    with pytest.raises(InputError, match="--prune compares epochs, and BLEU is worked out after the last one only"):
        search(recipe, over, trials=2, metric="bleu", prune=True, display=QUIET)
    found = search(recipe, over, trials=2, metric="bleu", display=QUIET)
    assert found.best.figures["bleu"] == max(trial.figures["bleu"] for trial in found.trials)
    assert "had the best bleu" in (tmp_path / "search-baseline" / "best.yaml").read_text()
    assert (tmp_path / "search-baseline" / "search.png").is_file()
