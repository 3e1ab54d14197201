"""A detector on timm's maps: what its backbone may be, how it trains, resumes, and what it leaves."""

import json
import os
import signal

import pandas as pd
import pytest
import timm
import torch
from detection_data import make_devkit, small_settings
from safetensors.torch import load_file
from torchvision.ops import box_iou

from commands import Command, together, wait_until, writers
from pskd_timm import InputError, train
from pskd_timm.cli import main
from pskd_timm.detection import network
from pskd_timm.detection.data import Example, open_data
from pskd_timm.detection.evaluation import detect
from pskd_timm.detection.metrics import objects_table, score
from pskd_timm.detection.network import iou_in_parts, make_detector, save_description
from pskd_timm.detection.recipes import load_detection_recipe, shipped
from pskd_timm.detection.settings import Model
from pskd_timm.detection.training import split, train_detector
from pskd_timm.errors import Diverged
from pskd_timm.progress import Display
from pskd_timm.run.result import read_lines

SMALL = {"fpn_channels": 16, "head_width": 32, "short_side": [64], "max_side": 96, "anchor_scale": 4}


def recipe(devkit, output_dir, **more):
    return load_detection_recipe("detection/voc_small", small_settings(devkit, output_dir, **more))


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return make_devkit(tmp_path_factory.mktemp("voc") / "VOCdevkit")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A finished run of ours, for its network of strides 1, 2, 4, 8 and mean and std of its own."""
    folder = tmp_path_factory.mktemp("backbones")
    settings = {
        "epochs": 1,
        "threads": 1,
        "data.limit_train": 60,
        "data.limit_test": 30,
        "model.name": "resnet10t",
        "model.kwargs": {},
        "model.small_input": True,
        "augment.mean": [0.1, 0.2, 0.3],
        "augment.std": [0.4, 0.5, 0.6],
        "method": "baseline",
        "output_dir": str(folder),
    }
    return train("digits", settings).run_dir


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "efficientnet_lite0", "densenet121", "cifar_preact_resnet18"]
)
def test_maps_have_the_strides_that_the_network_says(name):
    backbone = make_detector(Model(backbone=name, **SMALL), 3).backbone
    info = timm.create_model(name, features_only=True).feature_info
    assert list(backbone.strides) == [stride for stride in info.reduction() if stride in (4, 8, 16, 32)]
    sides = [each.shape[-1] for each in backbone.eval()(torch.zeros(1, 3, 64, 128)).values()]
    assert sides[:-1] == [128 // stride for stride in backbone.strides]


def test_anchors_grow_with_the_strides_and_are_centred_on_the_maps_cells():
    detector = make_detector(Model(backbone="resnet10t", **SMALL), 3).eval()
    images = torch.zeros(1, 3, 64, 96)
    maps = list(detector.backbone(images).values())
    from torchvision.models.detection.image_list import ImageList

    anchors = detector.rpn.anchor_generator(ImageList(images, [(64, 96)]), maps)[0]
    first = anchors[: maps[0].shape[2] * maps[0].shape[3] * 3].view(*maps[0].shape[2:], 3, 4)
    centres = (first[..., :2] + first[..., 2:]) / 2
    assert (centres[1, 2, 1] - centres[0, 0, 1]).tolist() == [2 * 4, 4]
    square = first[0, 0, 1]
    assert (square[2:] - square[:2]).tolist() == [4 * 4, 4 * 4]


@pytest.mark.parametrize(
    "name, line",
    [
        ("vit_tiny_patch16_224", "does not take pictures of any size"),
        (
            "cifar_resnet_tiny",
            "has maps of stride 1, 2, 4 only, and a pyramid needs two of 4, 8, 16, 32: convolutional",
        ),
        ("resnett18", "no folder and no model of timm is called 'resnett18': did you mean resnet18"),
        ("runs/none", "there is no folder runs/none; a model on the hub is named hf-hub:runs/none"),
        ("local-dir:{folder}", "holds no network"),
    ],
)
def test_a_network_without_such_maps_is_refused_in_a_line_that_says_which_can(tmp_path, name, line):
    with pytest.raises(InputError) as caught:
        make_detector(Model(backbone=name.format(folder=tmp_path), **SMALL), 3)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_finished_runs_weights_mean_and_std_are_the_detectors(classifier):
    detector = make_detector(Model(backbone=str(classifier), **SMALL), 3)
    ours, theirs = detector.backbone.state_dict(), load_file(classifier / "model.safetensors")
    shared = [name for name in theirs if f"features.model.{name}" in ours]
    assert len(shared) > 40 and all(torch.equal(ours[f"features.model.{name}"], theirs[name]) for name in shared)
    assert detector.transform.image_mean == [0.1, 0.2, 0.3] and detector.transform.image_std == [0.4, 0.5, 0.6]
    assert list(detector.backbone.strides) == [4, 8]  # with small_input its maps have strides 1, 1, 2, 4, 8


def test_a_trained_backbones_batch_norms_stay_as_they_are_and_an_untrained_ones_do_not(classifier):
    def moved(section):
        detector = make_detector(section, 3).train()
        before = {name: value.clone() for name, value in detector.state_dict().items() if "running_mean" in name}
        detector([torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}])
        return any(not torch.equal(value, detector.state_dict()[name]) for name, value in before.items())

    assert not moved(Model(backbone=str(classifier), **SMALL))
    assert moved(Model(backbone=str(classifier), freeze_batch_norm=False, **SMALL))
    assert moved(Model(backbone="resnet10t", **SMALL))


@pytest.mark.parametrize("of_run", [True, False])
def test_a_detector_is_rebuilt_from_its_run_once_the_backbones_folder_is_gone(tmp_path, classifier, of_run):
    section = Model(backbone=str(classifier) if of_run else "resnet10t", **SMALL)
    detector = make_detector(section, 3).eval()
    save_description(section, detector, tmp_path)
    gone = section.model_copy(update={"backbone": "gone/for/good"})
    again = make_detector(gone, 3, tmp_path).eval()
    again.load_state_dict(detector.state_dict())
    image = torch.rand(3, 64, 80)
    assert all(
        torch.equal(one, other) for one, other in zip(*(d([image])[0].values() for d in (detector, again)), strict=True)
    )


def test_boxes_are_not_rounded_where_the_heads_speak_bf16():
    detector = make_detector(Model(backbone="resnet10t", **SMALL), 3).eval()
    detector.roi_heads.score_thresh = 0.0
    anchors = [torch.tensor([[701.3, 402.7, 851.9, 533.1], [0.5, 0.25, 9.75, 8.5]])]
    for head, width in ((detector.rpn, 1), (detector.roi_heads, 4)):
        boxes = head.box_coder.decode(torch.zeros(2, 4 * width, dtype=torch.bfloat16), anchors)
        torch.testing.assert_close(boxes, anchors[0][:, None].expand(2, width, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = detector([torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))])
    assert len(found["boxes"]) and found["boxes"].dtype == torch.float32
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_overlaps_in_parts_are_torchvisions(monkeypatch):
    monkeypatch.setattr(network, "PAIRS_AT_ONCE", 70)
    corners = torch.rand(43, 2, generator=torch.Generator().manual_seed(0)) * 50
    boxes = torch.cat([corners, corners + 10], dim=1)
    assert torch.equal(iou_in_parts(boxes, boxes[:30]), box_iou(boxes, boxes[:30]))
    assert iou_in_parts(boxes[:0], boxes).shape == (0, 43)


def test_overlaps_of_many_objects_are_computed_few_at_once(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        network, "box_iou", lambda one, other: sizes.append(len(one) * len(other)) or box_iou(one, other)
    )
    detector = make_detector(Model(backbone="resnet10t", **SMALL), 3).train()
    monkeypatch.setattr(network, "PAIRS_AT_ONCE", 5000)
    corners = torch.rand(200, 2) * 50
    targets = {"boxes": torch.cat([corners, corners + 10], dim=1), "labels": torch.ones(200, dtype=torch.int64)}
    losses = detector([torch.rand(3, 64, 64)], [targets])
    assert max(sizes) <= 5000 and len(sizes) > 10 and torch.stack(list(losses.values())).isfinite().all()


def test_pictures_without_objects_are_trained_on():
    detector = make_detector(Model(backbone="resnet10t", **SMALL), 3).train()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = detector([torch.rand(3, 64, 64)], [none])
    sum(losses.values()).backward()
    assert all(weights.grad is not None for weights in detector.parameters() if weights.requires_grad)


def test_a_steps_pictures_are_split_into_parts_of_which_none_is_empty():
    pictures = [Example(None, None, torch.tensor([i])) for i in range(5)]
    assert [len(part) for part in split(pictures, 2)] == [3, 2]
    assert [len(part) for part in split(pictures[:2], 4)] == [1, 1]


@pytest.fixture(scope="module")
def finished(devkit, tmp_path_factory):
    settings = small_settings(devkit, tmp_path_factory.mktemp("run"), checkpoint__every_steps=1, grad_accum_steps=2)
    return train_detector(load_detection_recipe("detection/voc_small", settings))


def test_a_run_leaves_its_figures_weights_detections_and_objects(finished, devkit):
    values = json.loads((finished.run_dir / "result.json").read_text())
    assert values["task"] == "detection" and values["method"] == "test_resnet-untrained" and values["num_test"] == 4
    assert [metric["name"] for metric in values["metrics"]] == ["map", "map_11", "ap50", "ap75", "ap", "ece"]
    assert all(metric["higher_is_better"] for metric in values["metrics"][:5])
    lines = read_lines(finished.run_dir / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2] and lines[-1]["map"] == values["last"]["map"]
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} <= read_lines(
        finished.run_dir / "steps.jsonl"
    )[0].keys()
    assert sum(values["num_objects"].values()) == 8
    table = pd.read_parquet(finished.run_dir / "detections.parquet")
    assert {"index", "label", "left", "confidence", "iou", "correct", "ignored"} <= set(table)
    objects = pd.read_parquet(finished.run_dir / "objects.parquet")
    assert len(objects) == 8 and set(objects["index"]) == set(range(4))


def test_the_weights_that_are_left_give_the_figures_that_are_recorded(finished, devkit):
    recipe = load_detection_recipe(finished.run_dir / "recipe.yaml")
    data = open_data(recipe.data)
    detector = make_detector(recipe.model, len(data.class_names), finished.run_dir / "backbone")
    detector.load_state_dict(load_file(finished.run_dir / "model.safetensors"), strict=False)
    found = score(detect(detector, data.test, recipe, torch.device("cpu")), objects_table(data.test.objects), 20)
    for name, value in found.figures.items():
        assert value == pytest.approx(finished.last[name], abs=1e-6)


def test_boxes_come_back_in_the_pictures_own_pixels(devkit, tmp_path):
    """The same weights at half the size find boxes in the same coordinates, whatever size the network sees."""
    section = Model(backbone="resnet10t", **SMALL)
    torch.manual_seed(0)
    detector = make_detector(section, 3).eval()
    image = torch.rand(3, 128, 160)
    found = detector([image])[0]["boxes"]
    assert found[:, 2].max() <= 160 and found[:, 3].max() <= 128 and found[:, 2].max() > 96


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_was_killed_resumes_to_the_same_bits(finished, devkit, tmp_path, workers):
    settings = small_settings(devkit, tmp_path, checkpoint__every_steps=1, grad_accum_steps=2, data__workers=workers)
    words = [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    backbone = words.index("--model.backbone")
    command = ["detect", words[backbone + 1], "--recipe", "detection/voc_small"]
    command += words[:backbone] + words[backbone + 2 :]
    run_dir = tmp_path / "test_resnet-untrained" / "seed0"
    running = Command("pskd_timm", *command)
    wait_until(lambda: list((run_dir / "checkpoints").glob("0*")), running)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    wait_until(lambda: not writers(running.output))  # its loader's worker ends too, once it notices
    assert not (run_dir / "result.json").is_file()
    assert main(command) == 0
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (finished.run_dir, run_dir))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    times = ("seconds", "images_per_second")
    for name in ("metrics.jsonl", "steps.jsonl"):
        lines = [
            [{k: v for k, v in line.items() if k not in times} for line in read_lines(folder / name)]
            for folder in (finished.run_dir, run_dir)
        ]
        assert lines[0] == lines[1]


def test_a_signal_while_the_last_epoch_is_scored_stops_the_run_and_another_finishes_it(
    finished, devkit, tmp_path, monkeypatch, capsys
):
    settings = small_settings(devkit, tmp_path, grad_accum_steps=2)
    advance, scored = Display.advance, []

    def interrupted(self, what, done, total):
        if what == "evaluating" and done == total:
            scored.append(done)
            if len(scored) == settings["epochs"]:
                signal.raise_signal(signal.SIGINT)
        advance(self, what, done, total)

    monkeypatch.setattr(Display, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_detector(load_detection_recipe("detection/voc_small", settings))
    assert "stopped after epoch 2; the same command resumes it from there" in capsys.readouterr().out
    again = train_detector(load_detection_recipe("detection/voc_small", settings))
    assert again.last == finished.last


def test_two_processes_train_and_evaluate_every_picture_once(finished, devkit, tmp_path):
    """What is drawn of anchors differs by rank, and padding by batch: losses are alike, not equal."""
    settings = small_settings(devkit, tmp_path)
    words = [
        word
        for key, value in settings.items()
        if key != "model.backbone"
        for word in (f"--{key}", json.dumps(value).strip('"'))
    ]
    together(2, "pskd_timm", "detect", "test_resnet", "--recipe", "detection/voc_small", *words)
    run_dir = tmp_path / "test_resnet-untrained" / "seed0"
    values = json.loads((run_dir / "result.json").read_text())
    assert values["num_processes"] == 2 and values["num_test"] == 4
    one, two = (read_lines(folder / "steps.jsonl") for folder in (finished.run_dir, run_dir))
    assert [line["step"] for line in one] == [line["step"] for line in two] and [line["lr"] for line in one] == [
        line["lr"] for line in two
    ]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.15)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_line_that_says_what_to_lower(devkit, tmp_path):
    wild = recipe(devkit, tmp_path, optim__lr=1e20, optim__warmup_epochs=0, optim__clip_grad_norm=None)
    with pytest.raises(Diverged, match=r"lower --optim.lr \(it is 1e\+20\)"):
        train_detector(wild)
    assert not (wild.run_dir / "result.json").is_file()


def test_a_finished_run_is_not_trained_again_and_another_one_not_written_over(finished, devkit):
    same = load_detection_recipe(finished.run_dir / "recipe.yaml")
    before = (finished.run_dir / "result.json").stat().st_mtime_ns
    assert train_detector(same).values["last"] == finished.values["last"]
    with pytest.raises(InputError, match="holds a run with optim.lr 0.01, not 0.02"):
        train_detector(load_detection_recipe(finished.run_dir / "recipe.yaml", {"optim.lr": 0.02}))
    assert (finished.run_dir / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_one(name):
    assert load_detection_recipe(name, {"data.path": "VOCdevkit"}).epochs >= 1


@pytest.mark.parametrize(
    "words, line",
    [
        (["--optim.rl", "1"], "unknown option --optim.rl: did you mean --optim.lr?"),
        (["--recipe", "detection/vok"], "no detection recipe 'detection/vok': did you mean detection/voc"),
        (["--batch_size", "0"], "batch_size should be greater than or equal to 1, got '0'"),
        (["--data.path", "x", "--model.short_side", "[2000]"], "short_side 2000 must not exceed max_side 1333"),
        (["--data.path", "nowhere"], "data.path: nowhere is not there"),
        ([], "name the pictures"),
    ],
)
def test_bad_input_ends_in_a_line(capsys, words, line):
    assert main(["detect", "resnet10t", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_a_recipe_file_with_an_unknown_setting_is_told_the_nearest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 1\ndata: {path: x}\nmodel: {backbone: resnet18, fpn_chanels: 8}\n")
    with pytest.raises(InputError, match="unknown setting 'model.fpn_chanels': did you mean model.fpn_channels"):
        load_detection_recipe(path)


@pytest.mark.parametrize(
    "setting, text, example",
    [
        ("data.train", "trainval", "[VOC2007/trainval]"),
        ("data.test", "VOC2007/test", "[VOC2007/test]"),
        ("data.class_names", "cat", "[cat, dog]"),
        ("model.short_side", "256", "[640, 800]"),
        ("tracking.tags", "first", "[first try]"),
        ("optim.milestones", "3", "[3, 4]"),
    ],
)
def test_a_single_value_where_a_list_is_wanted_is_answered_with_one_that_the_setting_takes(setting, text, example):
    needed = {"model.backbone": "resnet18", "data.path": "x"}
    with pytest.raises(InputError) as caught:
        load_detection_recipe("detection/voc", needed | {setting: text})
    assert str(caught.value) == f"command line: {setting} should be a valid list, written {example}, got {text!r}"
    load_detection_recipe("detection/voc", needed | {setting: example})


@pytest.mark.parametrize("command, inside", [("evaluate", ""), ("train", "recipe.yaml"), ("show", "recipe.yaml")])
def test_commands_that_do_not_take_a_detectors_run_say_so_in_a_line(tmp_path, capsys, command, inside):
    run = tmp_path / "resnet18" / "seed0"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("task: detection\nepochs: 1\ndata: {path: x}\nmodel: {backbone: resnet18}\n")
    assert main([command, str(run / inside)]) == 2
    said = capsys.readouterr().err
    assert "of a detector, which only detect, predict and report take" in said and said.count("\n") == 1
