"""A finished detector on pictures of one's own: boxes in their pixels, drawn into copies, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detection_data import make_devkit, small_settings
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_tensor

from pskd_timm import InputError, predict
from pskd_timm.cli import main
from pskd_timm.detection.network import make_detector
from pskd_timm.detection.prediction import copies, predict_boxes
from pskd_timm.detection.recipes import load_detection_recipe
from pskd_timm.detection.training import train_detector

LITTLE = 0.02  # confidence: two epochs on eight pictures give no more


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return make_devkit(tmp_path_factory.mktemp("voc") / "VOCdevkit", pictures=16)


@pytest.fixture(scope="module")
def run(devkit, tmp_path_factory):
    settings = small_settings(devkit, tmp_path_factory.mktemp("run"), model__score_threshold=0.01)
    return train_detector(load_detection_recipe("detection/voc_small", settings)).run_dir


@pytest.fixture
def pictures(tmp_path):
    """A photograph-like PNG, the same as a sideways file that says how it was held, and two of one name in two folders."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    for place in (folder, folder / "more"):
        picture.save(place / "b.jpg", quality=95)
    return folder


def test_boxes_are_the_networks_in_the_pictures_own_pixels(run, pictures, tmp_path):
    found = predict_boxes(run, [pictures / "a.png"], tmp_path / "out", confidence=LITTLE)
    recipe = load_detection_recipe(run / "recipe.yaml")
    detector = make_detector(recipe.model, 20, run / "backbone").eval()
    detector.load_state_dict(load_file(run / "model.safetensors"), strict=False)
    with torch.no_grad():
        wanted = detector([to_tensor(Image.open(pictures / "a.png"))])[0]
    kept = wanted["scores"] >= LITTLE
    row = found["images"][0]
    assert (row["width"], row["height"]) == (140, 90) and 0 < kept.sum() == len(row["objects"])
    np.testing.assert_allclose([each["box"] for each in row["objects"]], wanted["boxes"][kept], atol=0.006)
    np.testing.assert_allclose([each["confidence"] for each in row["objects"]], wanted["scores"][kept], rtol=1e-5)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == found


def test_a_picture_that_was_held_sideways_is_looked_at_upright(run, pictures, tmp_path):
    rows = predict_boxes(run, [pictures / "a.png", pictures / "turned.png"], tmp_path / "out", confidence=LITTLE)[
        "images"
    ]
    assert rows[0]["objects"] == rows[1]["objects"] and rows[1]["width"] == 140
    assert Image.open(rows[1]["copy"]).size == (140, 90)


def test_copies_show_the_boxes_and_the_pictures_stay_as_they_are(run, pictures, tmp_path):
    before = {path: path.read_bytes() for path in pictures.rglob("*.*")}
    rows = predict_boxes(run, [pictures], tmp_path / "out", confidence=LITTLE)["images"]
    assert {path: path.read_bytes() for path in before} == before and len(rows) == 4
    assert sorted(Path(row["copy"]).name for row in rows) == ["a.png", "b-2.jpg", "b.jpg", "turned.png"]
    one, copy = (np.asarray(Image.open(path)) for path in (pictures / "a.png", tmp_path / "out" / "a.png"))
    assert one.shape == copy.shape and (one != copy).any()
    none = predict_boxes(run, [pictures / "a.png"], tmp_path / "none", confidence=1)["images"][0]
    assert none["objects"] == [] and np.array_equal(Image.open(none["copy"]), one)


def test_copies_of_one_name_get_numbers_also_where_only_letters_cases_differ():
    names = [path.name for path in copies([Path("x/a.JPG"), Path("y/A.jpg"), Path("a.webp"), Path("a.png")], Path("o"))]
    assert names == ["a.JPG", "A-2.jpg", "a.png", "a-2.png"]


def test_the_command_prints_a_table_writes_into_the_runs_folder_and_names_what_it_cannot_read(run, pictures, capsys):
    (pictures / "broken.jpg").write_bytes(b"no picture")
    assert main(["predict", str(run), str(pictures / "a.png"), str(pictures / "broken.jpg"), "--best"]) == 1
    out, err = capsys.readouterr()
    assert "objects from 50 % on" in out and "cannot be read" in out
    assert "broken.jpg cannot be decoded" in err and err.count("\n") == 1
    rows = json.loads((run / "predicted" / "predictions.json").read_text())
    assert rows["weights"] == "best" and (run / "predicted" / "a.png").is_file() and "error" in rows["images"][1]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--top", "3"], "--top is for classifiers, not for this run"),
        (["--confidence", "0"], "--confidence should lie above 0 and not above 1, got 0"),
        (["--confidence", "high"], "invalid float value: 'high'"),
        (["--output", "{pictures}"], "holds pictures that are looked at"),
        (["--output", "{pictures}/a.png/x"], "the predictions cannot be written"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_ends_in_a_line(run, pictures, capsys, words, says):
    words = [word.format(pictures=pictures) for word in words]
    assert main(["predict", str(run), str(pictures / "a.png"), *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_options_for_detectors_are_refused_for_another_run(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("epochs: 1\ndata: {source: digits}\n")
    assert main(["predict", str(tmp_path), "x.png", "--output", "out"]) == 2
    assert "--output is for detectors, not for this run" in capsys.readouterr().err


def test_python_is_told_what_a_detectors_run_is_for(run, pictures):
    with pytest.raises(InputError, match=f"`pskd-timm predict {run} IMAGES` finds objects with it"):
        predict(run, [pictures / "a.png"])


@pytest.mark.parametrize("words", [["push", "{run}", "me/mine"], ["export", "{run}", "network.onnx"]])
def test_what_takes_classifiers_alone_says_of_a_detector_how_to_predict_with_it(tmp_path, capsys, words):
    run = tmp_path / "seed0"
    run.mkdir()
    (run / "recipe.yaml").write_text("task: detection\n")
    assert main([word.format(run=run) for word in words]) == 2
    said = capsys.readouterr().err
    assert f"`pskd-timm predict {run} IMAGES` finds objects with it" in said and said.count("\n") == 1


def test_weights_that_are_damaged_or_not_all_there_are_named(run, pictures, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("recipe.yaml", "result.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "backbone").mkdir()
    (copy / "backbone" / "config.json").write_bytes((run / "backbone" / "config.json").read_bytes())
    (copy / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="model.safetensors: cannot be read"):
        predict_boxes(copy, [pictures / "a.png"])
    weights = load_file(run / "model.safetensors")
    del weights["backbone.features.conv1.0.weight"]
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: damaged: no weights"):
        predict_boxes(copy, [pictures / "a.png"])
