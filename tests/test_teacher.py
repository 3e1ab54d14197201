"""TF-KD with a trained teacher, end to end: found or trained first, checked, recorded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pskd_timm import InputError, compare, load_recipe, train
from pskd_timm.metrics import METRICS
from pskd_timm.progress import Display

QUIET = Display(quiet=True)
SETTINGS = {
    "epochs": 1,
    "threads": 1,
    "data.limit_train": 100,
    "data.limit_test": 60,
    "model.kwargs": {"width": 4},
    "tfkd.teacher": "baseline",
    "method": "tfkd",
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    recipe = load_recipe("digits", SETTINGS | {"output_dir": str(tmp_path_factory.mktemp("taught"))})
    return recipe, compare(recipe, ["tfkd"], [0, 1], jobs=3, display=QUIET)


def result(recipe, method, seed=0):
    return json.loads((Path(recipe.output_dir) / method / f"seed{seed}" / "result.json").read_text())


def test_compare_trains_each_seeds_baseline_before_its_student_and_records_it_beside_the_students_figures(compared):
    recipe, found = compared
    rows = [("baseline", 0), ("baseline", 1), ("tfkd", 0), ("tfkd", 1)]
    assert list(zip(found.rows.method, found.rows.seed, strict=True)) == rows and not found.failed
    for seed in (0, 1):
        baseline, student = (result(recipe, method, seed) for method in ("baseline", "tfkd"))
        assert student["teacher"]["run"] == str(Path(recipe.output_dir) / "baseline" / f"seed{seed}")
        assert student["teacher"]["seed"] == seed
        assert {name: student["teacher"][name] for name in METRICS} == {n: baseline["last"][n] for n in METRICS}
    assert "teacher" not in result(recipe, "baseline")
    told = (Path(recipe.output_dir) / "comparison.md").read_text()
    notes = [note for note in found.notes if "was taught by" in note]
    assert len(notes) == 2
    for seed, note in enumerate(notes):
        assert f"- {note}" in told and f"baseline/seed{seed} (epoch 1): top-1 error" in note
        assert f"NLL {result(recipe, 'baseline', seed)['last']['nll']:.3f}" in note


def test_a_run_alone_uses_the_finished_baseline_and_says_what_to_run_where_there_is_none(compared, tmp_path):
    recipe, _ = compared
    again = recipe.model_copy(update={"resume": "never"})
    assert train(again, display=QUIET).values["teacher"]["nll"] == result(recipe, "baseline")["last"]["nll"]
    with pytest.raises(InputError, match="seed0 is not finished: run the same command with --method baseline first"):
        train(recipe.model_copy(update={"output_dir": str(tmp_path)}), display=QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.kwargs": {"width": 8}}, r"with stem\S* \[4, .*the student .*\[8, .*\n.*student's arch"),
        ({"data.limit_train": 120}, "was trained with data.limit_train 100, this run has 120:\n"),
        ({"data.holdout_fraction": 0.2}, "data.holdout_fraction 0.0, this run has 0.2"),
        ({"augment.mean": [0.1, 0.1, 0.1]}, "augment.mean"),
    ],
)
def test_a_teacher_of_another_architecture_or_other_data_is_refused_in_two_lines(compared, tmp_path, change, says):
    teacher = Path(compared[0].output_dir) / "baseline" / "seed0"
    settings = SETTINGS | {"tfkd.teacher": str(teacher), "output_dir": str(tmp_path / "runs")} | change
    with pytest.raises(InputError, match=says) as error:
        train(load_recipe("digits", settings), display=QUIET)
    assert str(error.value).count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_file_of_weights_teaches_as_the_run_does_that_it_was_taken_from(compared, tmp_path):
    folder = Path(compared[0].output_dir) / "baseline" / "seed0"
    weights = load_file(folder / "model.safetensors")
    timms = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": timms, "epoch": 3, "arch": "x"}, tmp_path / "model_best.pth.tar")
    save_file(weights, tmp_path / "weights.safetensors")
    places = [folder, tmp_path / "model_best.pth.tar", tmp_path / "weights.safetensors", folder / "model.safetensors"]
    found = []
    for number, place in enumerate(places):
        settings = SETTINGS | {"tfkd.teacher": str(place), "output_dir": str(tmp_path / str(number))}
        found.append(train(load_recipe("digits", settings), display=QUIET))
    assert all(each.last == found[0].last for each in found)
    assert [each.values["teacher"].get("nll") is None for each in found] == [False, True, True, False]
    assert found[3].values["teacher"]["run"] == str(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.pth", "tfkd.teacher: .*nowhere.pth: there is no such folder or file"),
        ("other.safetensors", "tfkd.teacher: .*other.safetensors does not fit the model: .* is not in the checkpoint"),
        ("empty", "tfkd.teacher: .*empty: no model here"),
    ],
)
def test_what_is_no_teacher_is_refused_in_a_line(tmp_path, name, says):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    settings = SETTINGS | {"tfkd.teacher": str(tmp_path / name), "output_dir": str(tmp_path / "runs")}
    with pytest.raises(InputError, match=says) as error:
        train(load_recipe("digits", settings), display=QUIET)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_another_baseline_in_the_output_folder_is_no_teacher(compared):
    recipe = load_recipe("digits", SETTINGS | {"output_dir": compared[0].output_dir, "optim.lr": 0.01, "seed": 1})
    (recipe.run_dir / "result.json").rename(recipe.run_dir / "aside.json")
    with pytest.raises(InputError, match="optim.lr 0.1, not 0.01|optim.lr 0.1, this run has 0.01"):
        train(recipe, display=QUIET)
    (recipe.run_dir / "aside.json").rename(recipe.run_dir / "result.json")


def test_a_failed_teacher_fails_its_student_in_words_and_nothing_else(tmp_path):
    settings = SETTINGS | {"output_dir": str(tmp_path), "optim.lr": 1e30, "epochs": 2}
    found = compare(load_recipe("digits", settings), ["tfkd"], [0], jobs=2, display=QUIET)
    baseline, student = found.rows.status
    assert "a lower optim.lr" in baseline
    assert student == f"failed: its teacher {tmp_path / 'baseline' / 'seed0'} failed"
    # The student never began: its folder holds only why, for the report.
    assert [path.name for path in (tmp_path / "tfkd").rglob("*") if path.is_file()] == ["run.log"]
