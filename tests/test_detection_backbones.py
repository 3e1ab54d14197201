"""Where a detector's backbone comes from (a run, the hub, timm's weights), and what a run does beside training on it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detection_data import make_devkit, small_settings
from PIL import Image
from safetensors.torch import load_file, save_file
from test_tracking import logged, of_type, records, summary
from timm.models import save_for_hf

from pskd_timm import InputError, load_recipe, train
from pskd_timm.cli import main
from pskd_timm.detection import training
from pskd_timm.detection.network import STRIDES, make_detector
from pskd_timm.detection.recipes import load_detection_recipe
from pskd_timm.detection.settings import Model
from pskd_timm.detection.training import train_detector
from pskd_timm.recipe_files import SHIPPED, default_name, shipped_recipes
from pskd_timm.run.result import read_lines

SMALL = {"fpn_channels": 16, "head_width": 32, "short_side": [64], "max_side": 96, "anchor_scale": 4}
PAGES = [*SHIPPED.glob("detection/*.yaml"), SHIPPED / "README.md", SHIPPED.parent / "README.md"]
GUIDE = (SHIPPED / "README.md").read_text(encoding="utf-8").split("## Detection")[1].split("\n## ")[0]
EXAMPLES = [
    (page.name, backbone)
    for page in PAGES
    for backbone in re.findall(r"pskd-timm detect (runs/\S+)", page.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return make_devkit(tmp_path_factory.mktemp("voc") / "VOCdevkit")


def cached(folder: Path, repository: str) -> Path:
    """The folder where huggingface_hub looks for the newest files of a repository that it has fetched before."""
    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return place / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("page, backbone", EXAMPLES)
def test_a_run_that_the_documentation_takes_as_a_backbone_has_the_maps_for_it(page, backbone):
    names = {default_name(SHIPPED / f"{name}.yaml"): name for name in shipped_recipes()}
    section = load_recipe(names[backbone.split("/")[1]], {"data.path": "mine"}).model
    strides = timm.create_model(section.name, features_only=True).feature_info.reduction()
    assert not section.small_input and len(set(strides) & set(STRIDES)) >= 2 and backbone.endswith("/pskd/seed0")


def test_the_documentation_has_such_examples():
    assert len(EXAMPLES) >= 3


def test_a_run_of_the_custom_recipe_is_a_backbone(tmp_path, devkit):
    for part in ("train", "test"):
        for k, name in enumerate(("one", "two")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.full((64, 64, 3), 60 * k + 10 * i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{i}.png")
    settings = {"data.path": str(tmp_path / "images"), "epochs": 2, "output_dir": str(tmp_path / "runs")}
    run = train("custom", {**settings, "tracking.wandb": "disabled"}).run_dir
    detector = make_detector(Model(backbone=str(run), **SMALL), 3)
    assert list(detector.backbone.strides) == [4, 8, 16, 32]
    weights = load_file(run / "model.safetensors")
    assert torch.equal(
        detector.backbone.features.state_dict()["layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"]
    )


def test_a_backbone_from_the_hub_brings_weights_mean_and_std(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = timm.create_model("test_resnet", num_classes=7)
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    save_for_hf(model, cached(tmp_path, "me/mine"), safe_serialization=True)
    section = Model(backbone="hf-hub:me/mine", **SMALL)
    detector = make_detector(section, 3)
    for name, values in detector.backbone.features.state_dict().items():
        assert torch.equal(values, model.state_dict()[name])
    assert detector.transform.image_mean == [0.1, 0.2, 0.3] and detector.transform.image_std == [0.4, 0.5, 0.6]
    assert section.name == "mine"


def test_a_name_with_pretrained_brings_timms_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = timm.create_model("test_resnet")
    save_file(model.state_dict(), cached(tmp_path, "timm/test_resnet.r160_in1k") / "model.safetensors")
    detector = make_detector(Model(backbone="test_resnet", pretrained=True, **SMALL), 3)
    weights = detector.backbone.features.state_dict()
    assert torch.equal(weights["layer4.0.conv1.weight"], model.state_dict()["layer4.0.conv1.weight"])
    assert detector.transform.image_mean == list(model.pretrained_cfg["mean"])


@pytest.mark.parametrize(
    "name, can",
    [(name, "cifar" not in name) for name in re.findall(r"`(\w+_tiny|test_resnet|resnet10t|mobile\w+)`", GUIDE)],
)
def test_of_the_small_networks_in_the_documentation_those_can_be_backbones_that_it_says_can(name, can):
    if can:
        assert list(make_detector(Model(backbone=name, **SMALL), 3).backbone.strides) == [4, 8, 16, 32]
    else:
        with pytest.raises(InputError, match="has maps of stride 1, 2, 4 only"):
            make_detector(Model(backbone=name, **SMALL), 3)


@pytest.mark.parametrize(
    "backbone", ["runs/digits/pskd/seed0", "local-dir:runs/digits/pskd/seed0", "../pskd/seed1/best"]
)
def test_a_backbone_keeps_its_runs_name_whether_its_folder_is_there_or_not(tmp_path, monkeypatch, backbone):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Model(backbone=backbone).name == "pskd"
    Path(backbone.removeprefix("local-dir:")).mkdir(parents=True)
    assert Model(backbone=backbone).name == "pskd"
    assert Model(backbone="timm/resnet18").name == "resnet18-untrained"


@pytest.mark.parametrize("task", ["translation", "detection"])
@pytest.mark.parametrize("part", ["", "best"])
def test_a_run_of_another_task_is_refused_as_a_backbone_by_its_task(tmp_path, devkit, capsys, task, part):
    run = tmp_path / "pskd" / "seed0"
    (run / "best").mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"task: {task}\n")
    if task == "translation":
        for folder in (run, run / "best"):
            (folder / "config.json").write_text('{"architectures": ["MarianMTModel"]}')
            (folder / "model.safetensors").write_bytes(b"")
    assert main(["detect", str(run / part), "--data.path", str(devkit), "--output_dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert f"model.backbone: {run / part} is a run of task {task}: one of task images" in said and said.count("\n") == 1


@pytest.mark.parametrize("of_hub", [True, False])
def test_a_folder_or_hub_id_of_another_librarys_network_is_said_to_be_none_of_timms(tmp_path, monkeypatch, of_hub):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = cached(tmp_path, "me/translator")
    (folder / "config.json").write_text('{"architectures": ["MarianMTModel"]}')
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="config.json has no 'architecture': it is not that of a timm model"):
        make_detector(Model(backbone="hf-hub:me/translator" if of_hub else str(folder), **SMALL), 3)


def saved_mobilenet(folder: Path, change=None) -> Path:
    """A folder with a network whose features_only form lacks a part of it, its weights changed by `change`."""
    save_for_hf(timm.create_model("mobilenetv3_small_050", num_classes=7), folder, safe_serialization=True)
    weights = load_file(folder / "model.safetensors")
    if change:
        change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_timm_is_not_heard_about_a_trained_networks_classifier_which_a_backbone_leaves_out(tmp_path, caplog, capsys):
    folder = saved_mobilenet(tmp_path)
    torch.manual_seed(3)
    detector = make_detector(Model(backbone=str(folder), **SMALL), 3)
    assert not caplog.records and capsys.readouterr() == ("", "")
    weights, ours = load_file(folder / "model.safetensors"), detector.backbone.features.state_dict()
    assert torch.equal(ours["conv_stem.weight"], weights["conv_stem.weight"]) and "conv_head.weight" in weights


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_the_weights_of_a_classifier_which_no_backbone_has_are_not_said_to_be_lacking(tmp_path, capsys, name):
    save_for_hf(timm.create_model(name, num_classes=7), tmp_path, safe_serialization=True)
    make_detector(Model(backbone=str(tmp_path), **SMALL), 3)
    assert capsys.readouterr() == ("", "")


def test_weights_that_no_part_of_a_backbone_has_are_still_named(tmp_path, caplog):
    make_detector(Model(backbone=str(saved_mobilenet(tmp_path, lambda w: w.update(stray=torch.ones(1)))), **SMALL), 3)
    assert "stray" in caplog.text


def test_weights_that_a_backbone_lacks_are_named_in_a_line(tmp_path, capsys):
    folder = saved_mobilenet(tmp_path, lambda weights: weights.pop("conv_stem.weight"))
    make_detector(Model(backbone=str(folder), **SMALL), 3)
    line = capsys.readouterr().err
    assert line == f"pskd-timm: model.backbone: {folder} has no weights conv_stem.weight: these start at random\n"


@pytest.mark.parametrize("words", [["hf-hub:me/absent"], ["test_resnet", "--pretrained"]])
def test_a_backbone_that_cannot_be_fetched_is_told_in_a_line(tmp_path, monkeypatch, devkit, capsys, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["detect", *words, "--data.path", str(devkit), "--output_dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert f"model.backbone: {words[0]} cannot be had" in said and said.count("\n") == 1


def test_a_backbone_that_cannot_be_one_is_refused_before_any_data_are_read(devkit, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "open_data", lambda section: pytest.fail("the data were read"))
    recipe = load_detection_recipe("detection/voc_small", small_settings(devkit, tmp_path))
    recipe.model.backbone = "cifar_resnet_tiny"
    with pytest.raises(InputError, match="has maps of stride 1, 2, 4 only"):
        train_detector(recipe)
    assert not recipe.run_dir.exists()


def test_a_run_in_bf16_computes_in_it_and_learns_as_in_float32(devkit, tmp_path, monkeypatch):
    seen = set()
    real = training.detector_on

    def watched(*arguments):
        detector = real(*arguments)
        detector.backbone.fpn.register_forward_hook(lambda module, given, maps: seen.add(maps["0"].dtype))
        return detector

    monkeypatch.setattr(training, "detector_on", watched)
    losses = {}
    for precision in ("no", "bf16"):
        settings = small_settings(devkit, tmp_path / precision, mixed_precision=precision, epochs=2)
        result = train_detector(load_detection_recipe("detection/voc_small", settings))
        losses[precision] = [line["loss"] for line in read_lines(result.run_dir / "steps.jsonl")]
    assert seen == {torch.float32, torch.bfloat16}
    np.testing.assert_allclose(losses["bf16"], losses["no"], rtol=0.1)
    assert (result.run_dir / "result.json").is_file()


def test_wandb_gets_a_detectors_numbers_under_the_files_names(devkit, tmp_path):
    more = {"tracking.wandb": "offline", "tracking.project": "boxes", "tracking.tags": ["first look"]}
    settings = small_settings(devkit, tmp_path, **more)
    run_dir = train_detector(load_detection_recipe("detection/voc_small", settings)).run_dir
    folder = next((run_dir / "wandb").glob("offline-run-*"))
    found = records(folder)
    epochs, steps = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "steps.jsonl")
    for name in ("map", "ap75", "ece", "train_loss"):
        assert logged(found, name) == [line[name] for line in epochs]
    for name in ("loss", "loss_classifier", "loss_rpn_box_reg", "grad_norm"):
        assert logged(found, name) == [line[name] for line in steps]
    run = of_type(found, "run")[0]
    assert run["project"] == "boxes" and run["run_group"] == "detection-voc_small"
    assert run["job_type"] == "test_resnet-untrained" and {"first look", "seed0", "VOCdevkit"} <= set(run["tags"])
    assert summary(folder)["summary"]["map"]["max"] == max(line["map"] for line in epochs)
    assert json.loads((run_dir / "result.json").read_text())["last"]["map"] == epochs[-1]["map"]
