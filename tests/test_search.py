import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pskd_timm import InputError, load_recipe, report, train
from pskd_timm.cli import main
from pskd_timm.data import load_data
from pskd_timm.progress import Display
from pskd_timm.recipe_files import differing, with_overrides
from pskd_timm.reports import plots
from pskd_timm.reports.trials import find_searches
from pskd_timm.study import search

OVER = ["pskd.alpha=0.3:0.9"]


@pytest.fixture(scope="module")
def unreadable_test(tmp_path_factory):
    """Digits as Parquet files whose test part is garbage."""
    from pskd_timm.data.sources import _digits

    folder = tmp_path_factory.mktemp("unreadable")
    _digits()["train"].select(range(300)).to_parquet(folder / "train.parquet")
    (folder / "test.parquet").write_bytes(b"not to be read")
    return folder


@pytest.fixture
def closed(tiny, unreadable_test):
    """The tiny recipe on data whose test part cannot be read."""

    def recipe(**settings):
        return tiny(data__source="null", data__path=str(unreadable_test), data__limit_train=200, **settings)

    return recipe


def test_a_search_ranks_by_the_held_out_part_and_never_reads_the_test_part(closed, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        train(closed())
    found = search(closed(data__holdout_fraction=0.25), OVER, trials=3, seeds=[0, 1], metric="ece")
    folder = tmp_path / "runs" / "search-pskd"
    by_hand = []
    for trial in found.trials:
        assert 0.3 <= trial.settings["pskd.alpha"] <= 0.9
        runs = [folder / f"trial{trial.number}" / "pskd" / f"seed{seed}" for seed in (0, 1)]
        of_seeds = []
        for run in runs:
            held_out = pd.read_parquet(run / "holdout.parquet")
            assert len(held_out) == 50 and json.loads((run / "result.json").read_text())["num_test"] == 0
            bins = np.minimum(np.ceil(held_out.confidence * 10), 10)
            gaps = held_out.groupby(bins)[["correct", "confidence"]].agg(["mean", "size"])
            gap = (gaps.correct["mean"] - gaps.confidence["mean"]).abs() * gaps.correct["size"]
            of_seeds.append(100 * gap.sum() / len(held_out))
        by_hand.append(np.mean(of_seeds))
    table = pd.read_csv(folder / "trials.csv")
    assert table.ece.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert found.best.number == table.trial[int(np.argmin(by_hand))]

    chosen = load_recipe(str(folder / "best.yaml"))
    assert chosen.pskd.alpha == found.best.settings["pskd.alpha"] == found.recipe.pskd.alpha
    assert chosen.data.test and chosen.data.holdout_fraction == 0.25
    assert {k: v for k, v in chosen.identity().items() if k not in ("pskd.alpha",)} == {
        k: v for k, v in closed(data__holdout_fraction=0.25).identity().items() if k not in ("pskd.alpha",)
    }
    header = (folder / "best.yaml").read_text().split("\nname")[0]
    assert "test part was not read" in header and "best ece" in header and OVER[0] in header
    assert (folder / "search.png").stat().st_size > 10_000


def test_image_folders_and_saved_data_sets_leave_their_test_part_unread_too(tmp_path):
    from PIL import Image

    from pskd_timm.data.sources import _digits

    for part, label in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (tmp_path / "images" / part / label).mkdir(parents=True)
        for i in range(4):
            path = tmp_path / "images" / part / label / f"{i}.png"
            path.write_bytes(b"no image") if part == "test" else Image.new("L", (8, 8), 9 * i).save(path)
    from datasets import DatasetDict

    saved = DatasetDict({"train": _digits()["train"].select(range(40)), "test": _digits()["test"].select(range(40))})
    saved.save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved" / "test").glob("*.arrow")).write_bytes(b"no table")
    for name in ("images", "saved"):
        given = {"data.source": "null", "data.path": str(tmp_path / name), "data.gaussian_noise": 0}
        given |= {"data.image_size": 8, "data.holdout_fraction": 0.5}
        with pytest.raises(InputError):
            load_data(*_data(given))
        data = load_data(*_data(given | {"data.test": False}))
        assert data.test is None and len(data.train) and len(data.holdout)


def _data(given):
    recipe = load_recipe("digits", given)
    return recipe.data, recipe.augment


def test_a_run_without_a_test_part_needs_a_held_out_one_and_is_scored_on_it(tiny):
    with pytest.raises(InputError, match="test false needs holdout_fraction"):
        tiny(data__test=False)
    result = train(tiny(data__test=False, data__holdout_fraction=0.2, epochs=1))
    assert result.values["evaluated_on"] == "holdout" and result.values["num_test"] == 0
    assert result.last == result.values["holdout"]["last"]
    assert len(pd.read_parquet(result.run_dir / "predictions.parquet")) == 60


class Stopping(Display):
    """Sends SIGINT once the first epoch of the second trial is told."""

    def say(self, text):
        self.trial = text if text.startswith("trial 2") else getattr(self, "trial", "")
        if self.trial and "epoch 1/3" in text:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_search_stopped_in_mid_trial_and_continued_equals_the_uninterrupted_one(tiny, tmp_path, monkeypatch):
    options = {"over": OVER, "trials": 3, "search_seed": 5, "prune": True}
    recipe = tiny(epochs=3)
    whole = search(recipe, **options, display=Display(quiet=True))
    elsewhere = recipe.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    with pytest.raises(KeyboardInterrupt):
        search(elsewhere, **options, display=Stopping())
    folder = tmp_path / "stopped" / "search-pskd"
    assert len((folder / "trials.jsonl").read_text().splitlines()) == 1
    assert not (folder / "trial2" / "pskd" / "seed0" / "result.json").is_file()
    seen = []
    monkeypatch.setattr(Display, "say", lambda self, text: seen.append(text))
    found = search(elsewhere, **options)
    assert any("resuming after epoch 1" in text for text in seen)
    for one, other in zip(whole.trials, found.trials, strict=True):
        assert (one.settings, one.figures, one.by_epoch) == (other.settings, other.figures, other.by_epoch)
    assert len({trial.settings["pskd.alpha"] for trial in found.trials}) == 3

    # More trials go on from these; another search in this folder is refused.
    assert search(elsewhere, **options | {"trials": 4}).trials[:3] == found.trials
    with pytest.raises(InputError, match="holds another search, with metric nll"):
        search(elsewhere, **options, metric="ece")
    with pytest.raises(InputError, match="holds another search, with epochs 3"):
        search(elsewhere.model_copy(update={"epochs": 4}), **options)


def test_a_search_without_a_held_out_part_is_refused_where_it_is_asked_for(tmp_path, capsys):
    words = ["search", "digits", "--over", "pskd.alpha=0.1,0.8", "--output_dir", str(tmp_path / "runs")]
    assert main([*words, "--data.holdout_fraction", "0"]) == 2
    assert "a search chooses on a held-out part" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_setting_that_no_trial_reads_is_told(tiny, capsys):
    search(with_overrides(tiny(epochs=1).model_dump(), {"optim.min_lr": 0.01}, "a file", "tiny"), over=OVER, trials=1)
    assert "optim.min_lr is given, but optim.schedule step does not read it" in capsys.readouterr().out


def test_an_interrupted_search_says_what_the_same_command_will_do(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pskd_timm.study.search", interrupted)
    command = ["search", "digits", "--over", "pskd.alpha=0.1,0.8", "--output_dir", str(tmp_path)]
    assert main(command) == main([*command, "--resume", "never"]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "pskd-timm: interrupted; the same command goes on from what is there",
        "pskd-timm: interrupted; the same command without --resume never goes on from what is there",
    ]


def test_a_poor_trial_stops_early_and_one_that_diverges_does_not_end_the_search(tiny, tmp_path):
    rates = "optim.lr=0.02,0.05,0.08,1e-5,1e30"
    recipe = tiny(epochs=4, method="baseline")
    found = search(recipe, [rates], trials=10, prune=True, display=Display(quiet=True))
    states = {trial.settings["optim.lr"]: trial.state for trial in found.trials}
    assert states["1e30"] == "diverged" and states["1e-5"] == "stopped early" and "finished" in states.values()
    assert 1e-5 < float(found.best.settings["optim.lr"]) < 1
    stopped = next(trial for trial in found.trials if trial.state == "stopped early")
    assert len(stopped.by_epoch) < 4
    figure = plots.search(pd.read_csv(tmp_path / "runs" / "search-baseline" / "trials.csv"), "nll", "baseline")
    assert [axes.get_ylabel().split(" (")[0] for axes in figure.axes] == ["NLL", "ECE %", "top-1 error %"]


def test_trials_that_are_equal_are_said_to_be(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(Display, "say", lambda self, text: seen.append(text))
    # In a first epoch PS-KD has no prediction of before, so its α does nothing.
    search(tiny(epochs=1), ["pskd.alpha=0.2,0.6"], trials=2)
    assert any(line.startswith("equal in nll: trial 1, which is taken, and 2") for line in seen)


def test_whole_numbers_are_drawn_for_whole_settings_and_logarithmic_ranges_evenly_in_the_logarithm(tiny):
    import optuna

    from pskd_timm.study import parse_over

    over = ["batch_size=8:64", "optim.lr=0.001:0.1:log", "model.kwargs.width=4:8", "pskd.store_topk=2:8"]
    ranges = parse_over(over, tiny())
    assert [drawn_from.whole for drawn_from in ranges.values()] == [True, False, True, True]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [[ranges[key].draw(study.ask(), key) for _ in range(60)] for key in ("batch_size", "optim.lr")]
    assert all(type(value) is int and 8 <= value <= 64 for value in drawn[0])
    assert 0.3 < np.mean(np.array(drawn[1]) < 0.01) < 0.7
    assert all(len(f"{value:.10g}".lstrip("0.")) <= 4 for value in drawn[1])


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ("pskd.alfa=0.1:0.5", "unknown setting 'pskd.alfa': did you mean pskd.alpha"),
        ("pskd.alpha=0.3:1.5", r"pskd.alpha should be less than or equal to 1"),
        ("optim.min_lr=0.001:0.01", "optim.schedule step does not read it"),
        ("pskd.alpha=0.9:0.3", "the low end 0.9 should be below the high end 0.3"),
        ("pskd.alpha=0:1:log", "logarithmic range starts above 0"),
        ("pskd.alpha=0.1:0.5:lin", "low:high:log"),
        ("pskd.alpha=a:b", "'a' and 'b' should be numbers"),
        ("pskd.alpha=0.5", "a single value is no choice"),
        ("pskd.alpha", "write --over setting=low:high"),
        ("epochs=1.5:4", "whole number"),
        ("pskd.store_topk=2:12", "pskd.store_topk 12 must be from 1 to 9, below the 10 classes"),
        ("pskd.store_topk=2,20", "pskd.store_topk 20 must be from 1 to 9"),
        ("cskd.weight=1:3", "of method pskd it decides nothing"),
        ("tracking.log_every=1:3", "decides nothing"),
        ("seed=1:3", "a search fixes it"),
        ("data.holdout_fraction=0.1:0.5", "a search fixes it"),
        ("data.gaussian_noise=0:0.5", "a search fixes it, so that its trials compare"),
        ("optim.name=sgd,adamm", "optim.name"),
        ("model.name=cifar_preact_resnet_tiny,resnet1888", "timm has no model 'resnet1888'"),
    ],
)
def test_a_bad_range_is_refused_in_one_line_before_anything_is_trained(over, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["search", "digits", "--over", over, "--data.limit_train", "100"]
    assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(says, said) and "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_search_without_optuna_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", "digits", "--over", *OVER]) == 2
    assert "pip install optuna" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["search", "digits", "--over", *OVER, "--metric", "nnl"]) == 2
    assert "did you mean nll" in capsys.readouterr().err
    assert main(["search", "digits"]) == 2
    assert "--over pskd.alpha=0.3:0.9" in capsys.readouterr().err
    taught = ["--method", "tfkd", "--tfkd.teacher", "baseline", "--over", "tfkd.alpha=0.1:0.9"]
    assert main(["search", "digits", *taught]) == 2
    assert "train it with --data.holdout_fraction 0.1" in capsys.readouterr().err
    taught = ["--method", "tfkd", "--over", "tfkd.teacher=virtual,baseline"]  # before a trial draws it
    assert main(["search", "digits", *taught]) == 2
    assert "train it with --data.holdout_fraction 0.1" in capsys.readouterr().err


def test_a_chosen_recipe_keeps_what_was_set_back_from_a_preset():
    given = {"preset": "official", "preset_of": "[fine_grained]", "method": "cskd"}
    for more in ({}, {"cskd.weight": "1.0"}, {"optim.lr": "0.3", "data.limit_train": "50"}):
        recipe = load_recipe("digits", given | more)
        assert recipe.cskd.weight == (1.0 if "cskd.weight" in more else 3.0)
        again = with_overrides(differing(recipe), {}, "best.yaml", "digits")
        assert again.identity() == recipe.identity()


def test_a_choice_that_is_drawn_again_gives_way_to_one_that_was_not_tried(tiny, tmp_path):
    recipe = tiny(epochs=1, data__limit_train=60)
    found = search(recipe, ["pskd.alpha=0.3,0.9"], trials=3, seeds=[0])
    tried = [trial.settings["pskd.alpha"] for trial in found.trials]
    assert set(tried[:2]) == {"0.3", "0.9"} and tried[2] in tried[:2]


def test_settings_that_do_not_go_together_fail_their_trial_alone_and_the_table_keeps_its_columns(tiny, tmp_path):
    recipe = tiny(epochs=1, data__limit_train=60)
    over = ["batch_size=2:6", "grad_accum_steps=1:6"]
    found = search(recipe, over, trials=6, search_seed=1, display=Display(quiet=True))
    fits = [trial.settings["grad_accum_steps"] <= trial.settings["batch_size"] for trial in found.trials]
    assert [trial.state == "finished" for trial in found.trials] == fits and 0 < sum(fits) < 6
    assert {trial.state for trial in found.trials} == {"finished", "refused"} and found.trials[0].state == "refused"
    table = pd.read_csv(tmp_path / "runs" / "search-pskd" / "trials.csv")
    assert table.columns[2:5].tolist() == ["batch_size", "grad_accum_steps", "top1_error"]
    assert len(plots.search(table, "nll", "pskd").axes) == 6


def test_a_trial_has_its_own_teachers_constants_and_what_was_set_in_place():
    from pskd_timm.study import _on_holdout, _trial_recipe

    recipe = load_recipe("digits", {"method": "tfkd"})
    recipe.model.kwargs["width"] = 5
    trial = _trial_recipe(_on_holdout(recipe), {"tfkd.teacher": "somewhere"}, Path("runs"), 1)
    assert (trial.tfkd.alpha, trial.tfkd.temperature, trial.model.kwargs["width"]) == (0.95, 6.0, 5)


def test_a_search_all_of_whose_trials_are_refused_says_so_and_blames_no_learning_rate(tiny):
    recipe = tiny(epochs=1, data__limit_train=60, batch_size=6)  # with which either end of either goes
    with pytest.raises(InputError, match="all 2 trials were refused") as error:
        search(recipe, ["grad_accum_steps=4:6", "batch_size=2:3"], trials=2, display=Display(quiet=True))
    assert "optim.lr" not in str(error.value)


def test_a_trial_that_ended_before_its_figure_was_worked_out_is_told_without_it():
    from pskd_timm.reports.trials import DIVERGED, Trial
    from pskd_timm.study import _line

    trial = Trial(2, DIVERGED, {"pskd.alpha": 0.3})
    trial.figures = {"top1_error": 50.0}  # of its last epoch; BLEU is worked out after the run
    assert _line(trial, "bleu") == f"trial 2: pskd.alpha 0.3: {DIVERGED}"


def test_another_search_at_work_a_damaged_one_and_one_that_is_to_be_replaced(tiny, tmp_path):
    from filelock import FileLock

    recipe, folder = tiny(epochs=1, data__limit_train=60), tmp_path / "runs" / "search-pskd"
    options = {"over": OVER, "trials": 1, "display": Display(quiet=True)}
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(InputError, match="another search is at work here"):
        search(recipe, **options)
    first = search(recipe, **options)
    for name in ("search.json", "trials.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) // 2])
        with pytest.raises(InputError, match="damaged"):
            search(recipe, **options)
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=r"another search, with over pskd.alpha=0.3:0.9: .*--resume never"):
        search(recipe, **options | {"over": ["pskd.alpha=0.3:0.8"]})
    anew = recipe.model_copy(update={"resume": "never"})
    replaced = search(anew, **options | {"over": ["pskd.alpha=0.1:0.2"]})
    assert replaced.best.settings["pskd.alpha"] <= 0.2 < first.best.settings["pskd.alpha"]
    assert load_recipe(str(folder / "best.yaml")).resume == "auto"  # what it is compared by is kept
    assert len((folder / "trials.jsonl").read_text().splitlines()) == 1


def test_whole_numbers_that_are_few_are_all_tried_and_a_report_has_the_trials_where_it_is_asked_for_them(
    tiny, tmp_path
):
    found = search(tiny(epochs=3, data__limit_train=60), ["pskd.alpha_warmup_epochs=0:2"], trials=3)
    assert sorted(trial.settings["pskd.alpha_warmup_epochs"] for trial in found.trials) == [0, 1, 2]
    of_trials = report(tmp_path / "runs" / "search-pskd")
    assert sorted(of_trials.frame.nll) == sorted(trial.figures["nll"] for trial in found.trials)
    page = (tmp_path / "runs" / "search-pskd" / "report.html").read_text()
    assert "pictures cannot be shown" not in page and "on the test part" not in page
    assert "Last epoch, on the held-out part" in page and "NLL after" not in page  # fitted on what is scored
    for label in ("NLL", "ECE %", "top-1 error %"):
        assert f'aria-label="{label} against pskd.alpha_warmup_epochs"' in page
    (beside,) = find_searches([tmp_path / "runs"])  # a report of runs/ shows its curves too
    assert beside.over == ["pskd.alpha_warmup_epochs=0:2"] and beside.best["nll"] == found.best.figures["nll"]
    # Beside a comparison they were tested on other images, and would be refused.
    with pytest.raises(InputError, match="a search's folder is named itself"):
        report(tmp_path / "runs")
