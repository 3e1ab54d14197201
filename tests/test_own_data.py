"""A stranger's folder: unbalanced classes, pictures of every mode and size, names in any script."""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar

from pskd_timm import InputError, Result, load_recipe, report, train
from pskd_timm.calibration import probability_parts
from pskd_timm.cli import main
from pskd_timm.data.sources import _image_folders
from pskd_timm.export import export_onnx, model_card
from pskd_timm.methods import PAPER
from pskd_timm.metrics import METRICS, score
from pskd_timm.prediction import Classifier, held_out_temperature, predict
from pskd_timm.recipe import Data
from pskd_timm.run.folder import read_result
from pskd_timm.tasks import open_task

CLASSES = {"Kreis ○": 22, "deux carrés": 12, "三角": 7}  # how many training pictures each has
MODES = ["RGB", "L", "RGBA", "P", "1", "LA"]


def picture(kind, seed):
    """A shape of one of three kinds, its mode and size by `seed`."""
    rng = np.random.default_rng(seed)
    width, height = rng.integers(20, 60, 2).tolist()
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 90, 3).tolist()))
    draw, colour = ImageDraw.Draw(image), tuple(rng.integers(130, 255, 3).tolist())
    box = [width // 5, height // 5, width - width // 5, height - height // 5]
    if kind == 0:
        draw.ellipse(box, fill=colour)
    elif kind == 1:
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=colour)
    return image.convert(MODES[seed % len(MODES)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("my images")
    for kind, (name, count) in enumerate(CLASSES.items()):
        for part, number in (("train", count), ("test", 4)):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                picture(kind, 1000 * kind + 100 * (part == "test") + i).save(root / part / name / f"bild {i}.png")
    return root


def recipe_for(folder, output, **settings):
    given = {"data.path": str(folder), "data.image_size": 24, "epochs": 3, "batch_size": 16, "threads": 1}
    given |= {
        "model.name": "cifar_preact_resnet_tiny",
        "model.kwargs": {"width": 8},
        "optim.lr": 0.05,
        "optim.warmup_epochs": 0,
    }
    given |= {"data.holdout_fraction": 0.25, "tracking.wandb": "disabled", "output_dir": str(output)}
    return load_recipe("custom", given | {key.replace("__", "."): value for key, value in settings.items()})


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return train(recipe_for(folder, tmp_path_factory.mktemp("runs"))).run_dir


@pytest.fixture(autouse=True)
def few_images_carry_a_temperature(monkeypatch):
    """So that a run of seconds has one; how many it needs is test_calibration's."""
    monkeypatch.setattr("pskd_timm.calibration.FEWEST", 1)


def test_a_temperature_from_too_few_images_is_none_and_everything_that_leaves_says_so(
    run, folder, tmp_path, monkeypatch, capsys
):
    import onnxruntime

    monkeypatch.undo()
    found = predict(run, [str(folder / "test")])
    why = found["not_calibrated_because"]
    assert not found["calibrated"] and found["temperature"] == 1.0 and found["held_out_images"] == 11
    assert "of 11 held-out predictions are" in why and "10 are needed" in why
    assert main(["push", str(run), str(tmp_path / "pushed")]) == 0
    assert f"confidences are not calibrated: {why}\n" in capsys.readouterr().out
    assert f"not calibrated: {why}" in card(tmp_path / "pushed")[1]
    config = json.loads((tmp_path / "pushed" / "config.json").read_text())
    assert config["calibrated"] is False and config["temperature"] == 1.0
    assert main(["export", str(run), str(tmp_path / "x.onnx")]) == 0
    assert f"confidences are not calibrated: {why}\n" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["calibrated"] == "false"


def test_with_so_few_classes_no_top5_error_is_printed(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("top-1 error") == 2 and "top-5" not in said


def test_the_report_says_why_a_baseline_that_held_images_out_has_no_temperature(folder, tmp_path, monkeypatch):
    monkeypatch.undo()
    train(recipe_for(folder, tmp_path, method="baseline", epochs=1))
    (note,) = [note for note in report(tmp_path).notes if "with a temperature has no line" in note]
    assert note.startswith("Baseline seed 0") and "10 are needed to fit one" in note


@pytest.mark.parametrize("name", ["result.json", "predictions.parquet", "holdout.parquet", "model.safetensors"])
def test_a_damaged_file_of_a_run_is_named_with_what_mends_it_and_nothing_is_pushed(run, tmp_path, capsys, name):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(b'{"a": 1}' if name == "result.json" else whole[: len(whole) // 2])
    assert main(["push", str(copied), str(tmp_path / "pushed")]) == 2
    error = capsys.readouterr().err
    assert f"{copied / name}: damaged: " in error and error.count("\n") == 1 and not (tmp_path / "pushed").exists()
    if name != "model.safetensors":
        assert "without result.json the same train command writes the run's files again" in error


def test_what_is_pushed_says_nothing_of_this_machine_and_shows_class_names_as_they_are(run, tmp_path):
    from pskd_timm.export import plain

    assert main(["push", str(run), str(tmp_path / "pushed")]) == 0
    shown = (tmp_path / "pushed" / "result.json").read_text() + (tmp_path / "pushed" / "recipe.yaml").read_text()
    assert "hardware" not in shown and str(run.parent.parent) not in shown
    assert plain("<b>\n| [x](y) `z`") == r"\<b\> \| \[x\](y) \`z\`"


def test_a_network_that_neither_exporter_takes_is_a_line_and_leaves_no_file(run, tmp_path, monkeypatch, capsys):
    calls = []

    def fail(*arguments, dynamo, **options):
        calls.append(dynamo)
        raise RuntimeError("no such operator\nand many lines more")

    monkeypatch.setattr("torch.onnx.export", fail)
    assert main(["export", str(run), str(tmp_path / "x.onnx")]) == 2
    said = capsys.readouterr().err
    assert calls == [True, False] and said.count("\n") == 1 and "cannot be exported to ONNX: no such operator" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{True}, {True, False}])
def test_an_exported_network_that_computes_something_else_is_never_written(run, tmp_path, monkeypatch, capsys, wrong):
    export = torch.onnx.export

    def sometimes_wrong(model, *arguments, dynamo, **options):
        if dynamo in wrong:
            model = copy.deepcopy(model)
            model.temperature *= 9
        return export(model, *arguments, dynamo=dynamo, **options)

    monkeypatch.setattr("torch.onnx.export", sometimes_wrong)
    if wrong == {True}:
        assert export_onnx(run, tmp_path / "x.onnx") < 1e-5
        return
    assert main(["export", str(run), str(tmp_path / "x.onnx")]) == 2
    said = capsys.readouterr().err
    assert said.count("the confidences differ from torch's by 0.") == 2 and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_older_exporter_gives_the_same_confidences_where_the_newer_one_fails(run, folder, tmp_path, monkeypatch):
    import onnxruntime

    export = torch.onnx.export

    def older_only(*arguments, dynamo, **options):
        if dynamo:
            raise RuntimeError("no such operator")
        return export(*arguments, dynamo=False, **options)

    monkeypatch.setattr("torch.onnx.export", older_only)
    assert export_onnx(run, tmp_path / "x.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    (confidences,) = session.run(None, {"images": np.zeros((3, 3, 24, 24), np.uint8)})
    assert confidences.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)


def test_a_folder_of_mixed_pictures_trains_and_its_class_names_are_in_the_results(run, folder):
    result = json.loads((run / "result.json").read_text())
    assert result["class_names"] == sorted(CLASSES) and result["num_test"] == 12
    assert json.loads((run / "config.json").read_text())["label_names"] == sorted(CLASSES)
    # Whoever may read the one may read the other: networks are handed on through shared disks.
    assert (run / "model.safetensors").stat().st_mode == (run / "config.json").stat().st_mode
    # A quarter of each class is held out, the small ones too.
    held_out = pd.read_parquet(run / "holdout.parquet").label.value_counts()
    assert [held_out[k] for k in range(3)] == [round(CLASSES[name] / 4) for name in sorted(CLASSES)]


def test_predict_computes_in_the_precision_that_the_run_had(folder, tmp_path):
    run = train(recipe_for(folder, tmp_path, epochs=1, mixed_precision="bf16", data__holdout_fraction=0)).run_dir
    table = pd.read_parquet(run / "predictions.parquet")
    found = predict(run, [str(folder / "test")], top=3)["images"]
    for row, probabilities in zip(found, table.probabilities, strict=True):
        told = {each["class"]: each["confidence"] for each in row["top"]}
        assert [told[name] for name in sorted(CLASSES)] == pytest.approx(probabilities, abs=1e-6)


def test_predictions_for_the_test_images_are_those_of_the_test_split(run, folder):
    for best, at in ((False, run), (True, run / "best")):
        table = pd.read_parquet(at / "predictions.parquet")
        held_out = pd.read_parquet(at / "holdout.parquet")
        raw, labels = np.stack(held_out.probabilities), held_out.label.to_numpy()

        def nll(log_temperature, raw=raw, labels=labels):
            tempered = raw ** np.exp(-log_temperature)
            return -np.log(tempered[range(len(labels)), labels] / tempered.sum(axis=1)).mean()

        temperature = np.exp(minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).x)
        expected = np.stack(table.probabilities) ** (1 / temperature)
        expected /= expected.sum(axis=1, keepdims=True)

        found = predict(run, [str(folder / "test")], top=3, best=best)
        assert found["calibrated"] and found["temperature"] == pytest.approx(temperature, rel=1e-3)
        for row, label, probabilities in zip(found["images"], table.label, expected, strict=True):
            assert Path(row["image"]).parent.name == sorted(CLASSES)[label]
            told = {each["class"]: each["confidence"] for each in row["top"]}
            assert [told[name] for name in sorted(CLASSES)] == pytest.approx(probabilities, abs=1e-4)
            assert row["prediction"] == sorted(CLASSES)[np.argmax(probabilities)]

        classifier = Classifier.of_run(run, best)
        images = [classifier.prepare(row["image"]) for row in found["images"]]
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        same = torch.tensor(np.stack(table.probabilities))
        torch.testing.assert_close(classifier.probabilities(images), same, atol=1e-6, rtol=1e-5)


def test_a_train_folder_is_the_training_split_whatever_lies_beside_it_unless_it_is_a_class(tmp_path, capsys):
    def pictures(*places):
        for place in places:
            (tmp_path / place).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(tmp_path / place / "0.png")

    def splits(name):
        return {k: v.features["label"].names for k, v in _image_folders(tmp_path / name, Data(path="x")).items()}

    pictures(*(f"valid/{split}/{name}" for split in ("train", "valid") for name in ("cat", "dog")))
    assert splits("valid") == {"train": ["cat", "dog"], "valid": ["cat", "dog"]}
    pictures("extra/train/cat", "extra/train/dog", "extra/unlabelled")
    assert splits("extra") == {"train": ["cat", "dog"]}
    assert "beside train, unlabelled in" in capsys.readouterr().err
    pictures("vehicles/train", "vehicles/car")
    assert splits("vehicles") == {"train": ["car", "train"]}


def test_unreadable_images_are_named_and_the_others_predicted(run, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "test" / "三角", "some/三角")
    Path("some/broken.jpg").write_bytes(b"no picture")
    Path("some/phone.HEIC").write_bytes(b"no picture")  # what Pillow cannot read is named too
    Path("some/folder.jpg").mkdir()
    for hidden in ("some/.ipynb_checkpoints/0.png", "some/__MACOSX/0.png", "some/._bild 0.png"):
        Path(hidden).parent.mkdir(exist_ok=True)
        Path(hidden).write_bytes(b"no picture")
    command = ["predict", str(run), "some", "some/三角/*0.png", "--json", "out.json", "--top", "2"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "some/broken.jpg cannot be decoded" in said.err and "三角" in said.out and "cannot be read" in said.out
    assert "calibrated on the run's held-out part: temperature" in said.out
    rows = {row["image"]: row for row in json.loads(Path("out.json").read_text())["images"]}
    assert (
        len(rows) == 6 and "error" in rows["some/phone.HEIC"] and "error" in rows["some/broken.jpg"]
    )  # what two names stand for is there once
    assert len(rows["some/三角/bild 0.png"]["top"]) == 2
    Path("some/broken.jpg").unlink()
    Path("some/phone.HEIC").unlink()
    assert main(command) == 0
    # A pattern may name folders, and a name bytes that are no text.
    shutil.copy("some/三角/bild 0.png", b"some/\xff.png")
    assert main(["predict", str(run), "so*", "--json", "out.json"]) == 0
    names = [row["image"] for row in json.loads(Path("out.json").read_text())["images"]]
    assert len(names) == 5 and "some/\N{REPLACEMENT CHARACTER}.png" in names
    for bad, says in (
        (["predict", str(run), "nowhere/*.png"], "nowhere/*.png: no such image"),
        (["predict", "nowhere", "some"], "nowhere: there is no such folder"),
        (["predict", str(run), "some/folder.jpg"], "no images in this folder"),
        (["predict", str(run), "some", "--top", "0"], "--top must be at least 1"),
        (["predict", str(run), "some", "--topp", "3"], "did you mean --top?"),
    ):
        assert main(bad) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["result.json", "holdout.parquet", "model.safetensors", "config.json"])
def test_a_damaged_run_is_told_in_a_line_that_names_what_is_damaged(run, folder, tmp_path, capsys, name):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run" / name).write_bytes((run / name).read_bytes()[:100])
    for command in (
        ["predict", str(tmp_path / "run"), str(folder)],
        ["push", str(tmp_path / "run"), str(tmp_path / "x")],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and ("damaged" in said or "cannot be loaded" in said)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_is_not_scored_on_data_whose_classes_are_others_or_numbered_otherwise(run, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data")
    for part in ("train", "test"):  # "三角" comes first then
        (tmp_path / "data" / part / "三角").rename(tmp_path / "data" / part / "Dreieck")
    assert main(["evaluate", str(run), "--data.path", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert "the model's class 0 is 'Kreis ○', that of the data 'Dreieck'" in said and said.count("\n") == 1


def test_a_run_that_held_nothing_out_says_that_its_confidences_are_not_calibrated(folder, tmp_path, capsys):
    # The pictures of one size that the run saw are cut out of others: no data.image_size.
    for path in (folder / "train").rglob("*.png"):
        to = tmp_path / "same size" / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((24, 16)).save(to)
    settings = {"data__image_size": None, "data__test_fraction": 0.3, "data__holdout_fraction": 0, "epochs": 1}
    result = train(recipe_for(tmp_path / "same size", tmp_path / "runs", augment__crop_padding=0, **settings))
    assert main(["predict", str(result.run_dir), str(folder / "test" / "三角")]) == 0
    assert "not calibrated: the run held no images out" in capsys.readouterr().out
    found = predict(result.run_dir, [str(folder / "test")])
    assert not found["calibrated"] and found["temperature"] == 1.0 and len(found["images"]) == 12
    assert Classifier.of_run(result.run_dir).prepare(found["images"][0]["image"]).shape == (16, 24, 3)


@pytest.fixture(scope="module")
def cached_weights():
    """Random weights under the name of a small pretrained network, where the hub's cache would have them."""
    from huggingface_hub.constants import HF_HUB_CACHE

    model = timm.create_model("test_resnet")
    generator = torch.Generator().manual_seed(0)
    state = {
        k: torch.randn(v.shape, generator=generator) * 0.05 if v.ndim > 1 else v for k, v in model.state_dict().items()
    }
    repository = Path(HF_HUB_CACHE) / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(state, snapshot / "model.safetensors")
    yield state
    shutil.rmtree(repository)


PRETRAINED = {"model__name": "test_resnet.r160_in1k", "model__kwargs": {}, "model__pretrained": True, "epochs": 1}


def test_pretrained_weights_that_cannot_be_had_are_told_in_one_line(folder, tmp_path):
    with pytest.raises(InputError, match="test_efficientnet.r160_in1k") as error:
        train(recipe_for(folder, tmp_path, **PRETRAINED | {"model__name": "test_efficientnet.r160_in1k"}))
    assert "\n" not in str(error.value) and "--model.pretrained false" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [*PAPER, "dlb"])
def test_a_pretrained_network_is_fine_tuned_with_each_method(folder, tmp_path, cached_weights, method):
    recipe = recipe_for(folder, tmp_path, method=method, **PRETRAINED)
    start = open_task(recipe).network().state_dict()
    for name, weights in cached_weights.items():
        if "fc" not in name:
            torch.testing.assert_close(start[name], weights, msg=name)
    assert start["fc.weight"].shape[0] == 3
    result = train(recipe)
    assert np.isfinite(list(result.last.values())).all() and result.values["class_names"] == sorted(CLASSES)


def card(folder):
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_a_pushed_folder_is_timms_and_its_card_tells_the_results(run, folder, tmp_path, monkeypatch, best):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), "pushed/shapes", *["--best"] * best]) == 0
    pushed = Path("pushed/shapes")
    head, body = card(pushed)
    result = json.loads((run / "result.json").read_text())["best" if best else "last"]
    assert head["library_name"] == "timm" and head["pipeline_tag"] == "image-classification" and "pskd" in head["tags"]
    measured = {each["type"]: each["value"] for each in head["model-index"][0]["results"][0]["metrics"]}
    assert measured["accuracy"] == pytest.approx(1 - result["top1_error"] / 100) and measured["nll"] == result["nll"]
    # Of three classes the right one is always among five.
    told = [name for name in METRICS if name != "top5_error"]
    assert "as trained | " + " | ".join(f"{result[name]:.2f}" for name in told) + " |\n" in body and "top-5" not in body
    assert "On the 12 test images." in body and ("(chosen on the held-out images)" in body) == best
    assert "with temperature" in body and all(name in body for name in CLASSES) and "(reliability.png)" in body
    kept = next(probability_parts((run / "best" if best else run) / "predictions.parquet"))
    temperature = held_out_temperature(run / "best" if best else run).value
    scaled = score(torch.as_tensor(kept[0]).log().div(temperature).softmax(1), torch.as_tensor(kept[1]))
    assert (
        f", fitted on held-out training images | {result['top1_error']:.2f} | {scaled['nll']:.2f} | {scaled['ece']:.2f} |"
        in body
    )
    # Where the pictures lay on this machine is nobody's business.
    assert str(folder.parent) not in (pushed / "recipe.yaml").read_text() + body and f"path: {folder.name}" in body
    assert load_recipe(str(pushed / "recipe.yaml")).model.kwargs == {"width": 8}
    assert (pushed / "reliability.png").stat().st_size > 10_000
    assert main(["push", str(run), "pushed/shapes"]) == 2

    # The card's own lines, on a picture that needs no resizing.
    Image.open(next((folder / "train" / "三角").iterdir())).convert("RGB").resize((24, 24)).save("image.jpg")
    code = body.split("```python\n")[1].split("```")[0].replace("local-dir:shapes", "local-dir:pushed/shapes")
    scope = {}
    exec(code, scope)
    (row,) = predict(run, ["image.jpg"], top=3, best=best)["images"]
    told = {each["class"]: each["confidence"] for each in row["top"]}
    assert [told[name] for name in sorted(CLASSES)] == pytest.approx(scope["confidences"][0].tolist(), abs=1e-4)


def test_a_card_claims_no_calibration_for_the_images_that_the_temperature_was_fitted_on(run):
    result = Result(run, read_result(run))
    result.values |= {"evaluated_on": "holdout", "best": result.best | {"chosen_on": "test"}}
    body = model_card(result, Classifier.of_run(run), True, "local-dir:x")
    assert "with temperature" not in body and f"On the {result.values['num_holdout']} held-out training images." in body
    assert "(chosen on the test images themselves: the figures are a little too good)" in body


def test_pushing_to_the_hub_without_token_or_network_fails_in_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(run), "me/shapes", "--hub"]) == 2
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main(["push", str(run), "me/shapes", "--hub", "--private"]) == 2
    assert main(["push", str(run), "me/shapes", "--private"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, says in zip(lines, ("needs a token", "me/shapes: the hub did not take it", "add --hub"), strict=True):
        assert says in line


def test_the_onnx_file_gives_the_calibrated_confidences_from_pixels(run, folder, tmp_path, capsys):
    import onnxruntime

    path = tmp_path / "shapes.onnx"
    assert main(["export", str(run), str(path), "--format", "onnx"]) == 0
    assert "differ from torch's by" in capsys.readouterr().out and [file.name for file in tmp_path.iterdir()] == [
        path.name
    ]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == sorted(CLASSES) and json.loads(about["image_size"]) == [24, 24]
    found = predict(run, [str(folder / "test")], top=3)
    assert float(about["temperature"]) == found["temperature"]
    classifier = Classifier.of_run(run)
    pixels = np.stack([classifier.prepare(row["image"]) for row in found["images"]]).transpose(0, 3, 1, 2)
    (confidences,) = session.run(None, {"images": pixels})  # as many at once as one likes
    for row, of_onnx in zip(found["images"], confidences, strict=True):
        told = {each["class"]: each["confidence"] for each in row["top"]}
        assert [told[name] for name in sorted(CLASSES)] == pytest.approx(of_onnx.tolist(), abs=1e-5)


def test_export_without_its_packages_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run), str(tmp_path / "x.onnx")]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err and not list(tmp_path.iterdir())
