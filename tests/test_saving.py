"""What a run leaves for other people's tools: timm and transformers load the saved network, or refuse it."""

import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pskd_timm import InputError, load_recipe, train
from pskd_timm.data.decode import fit
from pskd_timm.export import plain, push, recipe_for_others
from pskd_timm.models import build
from pskd_timm.models.build import check_saves, create_model, load_model, save_model
from pskd_timm.prediction import predict
from pskd_timm.recipe import Model

CLASSES = ["ä cat", "dog", "hot dog"]
NETWORKS = [
    ("resnet18", {}, 32, False),
    ("vit_tiny_patch16_224", {}, 32, False),
    ("cifar_preact_resnet_tiny", {"width": 4}, 8, False),
    ("coat_tiny", {}, 64, False),  # shares weights between its parts
    ("resnet10t", {"global_pool": None}, 32, False),
    ("resnet18", {}, 32, True),
]


def saved(folder, name, kwargs, size, small_input, crop_pct=0.9):
    torch.manual_seed(0)
    model = create_model(Model(name=name, kwargs=kwargs, small_input=small_input), 3, (size, size)).eval()
    check_saves(model)
    save_model(model, folder, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], (size, size), crop_pct, CLASSES)
    return model, torch.rand(2, 3, size, size)


@pytest.mark.parametrize("name, kwargs, size, small_input", NETWORKS)
def test_timm_and_we_load_a_saved_network_as_it_was(tmp_path, name, kwargs, size, small_input):
    model, images = saved(tmp_path, name, kwargs, size, small_input)
    expected = model(images)
    assert torch.equal(load_model(tmp_path).eval()(images), expected)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), expected)


@pytest.mark.parametrize("name, small_input", [("resnet50", False), ("resnet18", True)])
def test_the_file_says_how_the_network_was_tested_and_nothing_of_weights_that_were_never_loaded(
    tmp_path, name, small_input
):
    published = timm.get_pretrained_cfg(name)
    assert published.test_input_size and published.origin_url and published.tag  # what must not be kept
    saved(tmp_path, name, {}, 32, small_input, crop_pct=0.875)
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    left_out = {"tag", "license", "origin_url", "paper_ids", "hf_hub_id", "url", "test_input_size", "test_crop_pct"}
    assert not left_out & config.keys()
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for test_input_size in (False, True):  # as timm's validate.py asks with and without --use-train-size
        seen = timm.data.resolve_model_data_config(model, use_test_size=test_input_size)
        assert tuple(seen["input_size"]) == (3, 32, 32) and seen["crop_pct"] == 0.875 and seen["crop_mode"] == "center"
        assert tuple(seen["mean"]) == (0.4, 0.5, 0.6) and seen["interpolation"] == "bicubic"


@pytest.mark.parametrize("name, kwargs, size, small_input", NETWORKS[:3])
def test_transformers_loads_a_saved_network_with_its_class_names(tmp_path, name, kwargs, size, small_input):
    from transformers import AutoModelForImageClassification, pipeline

    model, images = saved(tmp_path, name, kwargs, size, small_input, crop_pct=1.0)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(images).logits, model(images))
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    ours = dict(zip(CLASSES, model(((image - mean) / std)[None]).softmax(1)[0].tolist(), strict=True))
    found = pipeline("image-classification", model=str(tmp_path))(Image.fromarray(pixels))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(ours, abs=1e-4)


def pictures(folder, sizes, per_class):
    """A folder of noisy pictures in colours of their class."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            width, height = sizes[i % len(sizes)]
            pixels = rng.integers(0, 160, (height, width, 3), np.uint8)
            pixels[..., k] += 90
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


SIZES = [(40, 30), (31, 47), (36, 36), (90, 33)]
SWIN = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
VIT = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize(
    "name, kwargs",
    [("resnet10t", {}), ("vit_tiny_patch16_224", VIT), ("cifar_preact_resnet_tiny", {"width": 4})],
    ids=["CNN", "ViT", "cifar"],
)
def test_a_pushed_run_says_the_same_in_predict_in_transformers_and_in_its_cards_own_code(
    tmp_path, monkeypatch, name, kwargs
):
    from transformers import pipeline

    data = pictures(tmp_path / "data", SIZES, 8)
    settings = {"data.path": str(data), "data.test_fraction": 0.25, "data.image_size": 32, "data.crop_pct": 0.9}
    settings |= {"model.name": name, "model.kwargs": kwargs, "method": "pskd", "epochs": 2, "batch_size": 8}
    settings |= {"threads": 1, "tracking.wandb": "disabled", "output_dir": str(tmp_path / "runs")}
    run = train(load_recipe("custom", settings)).run_dir
    push(run, str(tmp_path / "pushed"))

    files = sorted(map(str, data.rglob("*.png")))[:12]
    ours = [{row["class"]: row["confidence"] for row in each["top"]} for each in predict(run, files)["images"]]
    theirs = pipeline("image-classification", model=str(tmp_path / "pushed"))(files)
    assert [{row["label"]: row["score"] for row in each} for each in theirs] == [
        pytest.approx(o, abs=1e-4) for o in ours
    ]

    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "pushed" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "confidences = logits.softmax(dim=1)" in code  # nothing was held out that a temperature could be fitted on
    for file, expected in zip(files, ours, strict=True):
        scope = {}
        exec(code.replace("image.jpg", file), scope)
        found = dict(zip(sorted(CLASSES), scope["confidences"][0].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size, crop_pct", [(32, 1.0), (32, 0.875), (224, 0.9), (64, 0.95), (33, 0.83)])
def test_test_images_are_to_the_pixel_what_timms_transform_for_evaluation_shows(size, crop_pct):
    plain_values = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic", "crop_mode": "center"}
    transform = timm.data.create_transform((3, size, size), crop_pct=crop_pct, **plain_values)
    rng = np.random.default_rng(0)
    for width, height in [*SIZES, (size, size), (300, 201), (75, 50)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        expected = (transform(image) * 255).round().byte().permute(1, 2, 0)
        assert np.array_equal(fit(image, size, crop_pct), expected.numpy())


@pytest.mark.parametrize("name, kwargs, size, small_input", NETWORKS)
@pytest.mark.parametrize("num_classes", [3, 5])
def test_a_run_may_start_from_a_saved_network(tmp_path, name, kwargs, size, small_input, num_classes):
    model, images = saved(tmp_path / "first", name, kwargs, size, small_input)
    section = Model(name=f"local-dir:{tmp_path / 'first'}", pretrained=True)
    again = create_model(section, num_classes, (size, size)).eval()
    assert again.num_classes == num_classes
    features = [each.forward_features(images) for each in (again, model)]
    one, other = (of if isinstance(of, list) else [of] for of in features)  # CoAT has several
    assert len(one) == len(other) and all(map(torch.equal, one, other))
    check_saves(again)
    save_model(again, tmp_path / "second", [0.5] * 3, [0.5] * 3, (size, size), 1.0, CLASSES)
    assert torch.equal(load_model(tmp_path / "second").eval()(images), again(images))


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The folder in the hub's cache of the repository me/mine."""
    (tmp_path / "models--me--mine" / "refs").mkdir(parents=True)
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--me--mine" / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("name, kwargs", [("vit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN)])
def test_a_network_bound_to_an_image_size_may_start_from_one_of_another_size_as_timm_resizes_it(
    snapshot, tmp_path, name, kwargs
):
    saved(snapshot, name, kwargs, 32, False)
    images = torch.rand(2, 3, 64, 64)
    expected = timm.create_model(f"local-dir:{snapshot}", pretrained=True, img_size=(64, 64)).eval()(images)
    for source in (f"local-dir:{snapshot}", "hf-hub:me/mine"):
        model = create_model(Model(name=source, pretrained=True), 3, (64, 64)).eval()
        assert torch.equal(model(images), expected)
        check_saves(model)
        save_model(model, tmp_path / "again", [0.5] * 3, [0.5] * 3, (64, 64), 1.0, CLASSES)
        assert torch.equal(load_model(tmp_path / "again").eval()(images), expected)


@pytest.mark.parametrize("name, kwargs, size, small_input", [NETWORKS[2], NETWORKS[-1]])
def test_a_run_may_start_from_a_pushed_network_on_the_hub(snapshot, tmp_path, name, kwargs, size, small_input):
    model, images = saved(snapshot, name, kwargs, size, small_input)
    again = create_model(Model(name="hf-hub:me/mine", pretrained=True), 3, (size, size)).eval()
    assert torch.equal(again(images), model(images))
    check_saves(again)
    save_model(again, tmp_path / "second", [0.5] * 3, [0.5] * 3, (size, size), 1.0, CLASSES)
    assert torch.equal(load_model(tmp_path / "second").eval()(images), model(images))


IN_A_NEW_PROCESS = """
import sys
import timm
import torch

def loaded(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

folders = sys.argv[1:]
for folder in folders:
    try:
        loaded(folder)
    except RuntimeError as error:
        print(error)
import pskd_timm.models
torch.save([loaded(folder)(torch.ones(1, 3, 32, 32)) for folder in folders], f"{folders[0]}/logits.pt")
"""


def test_timm_alone_refuses_our_networks_and_those_with_a_small_stem_and_loads_them_after_the_import(tmp_path):
    folders, expected = [tmp_path / "ours", tmp_path / "small"], []
    for folder, (name, kwargs, _, small_input) in zip(folders, [NETWORKS[2], NETWORKS[-1]], strict=True):
        model, _ = saved(folder, name, kwargs, 32, small_input)
        expected.append(model(torch.ones(1, 3, 32, 32)))
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, *folders], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"Unknown model ({n})" for n in ("cifar_preact_resnet_tiny", "pskd_small_input")
    ]
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(folders[0] / "logits.pt"), expected)


def test_a_folder_saved_by_an_earlier_version_still_loads(tmp_path):
    model, images = saved(tmp_path, "resnet18", {}, 32, True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config |= {"architecture": config["model_args"].pop("base"), "small_input": True}
    path.write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path).eval()(images), model(images))


def test_a_folder_that_is_not_ours_is_refused_in_a_line(tmp_path):
    saved(tmp_path, "cifar_preact_resnet_tiny", {"width": 4}, 8, False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "hf-hub:some/model"}))
    with pytest.raises(InputError, match="timm has no model 'hf-hub:some/model'"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no model here"):
        load_model(tmp_path)


def test_a_folder_with_timms_other_file_of_weights_is_answered_with_how_to_save_the_one_that_is_read(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path)
    with pytest.raises(InputError, match=r"in pytorch_model.bin, and only .* safe_serialization=True\) writes that"):
        load_model(tmp_path)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert load_model(tmp_path).num_classes == 3


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_args": {"checkpoint_path": "weights.pth"}}, r"name other files to read \(checkpoint_path\)"),
        ({"model_args": {"pretrained": True}}, r"name other files to read \(pretrained\)"),
        (
            {"architecture": "pskd_small_input", "model_args": {"base": "hf-hub:some/model"}},
            "timm has no model 'hf-hub:some/model'",
        ),
        ({"num_classes": "three"}, "the model cannot be loaded"),
        ({"model_args": [1]}, "the model cannot be loaded"),
    ],
)
def test_a_config_that_leads_elsewhere_is_refused(tmp_path, changes, says):
    saved(tmp_path, "cifar_preact_resnet_tiny", {"width": 4}, 8, False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=says):
        load_model(tmp_path)


@timm.models.register_model
def reads_a_number_from_a_tensor(pretrained=False, **kwargs):
    return timm.create_model("resnet10t", drop_path_rate=torch.linspace(0, 0.1, 3)[1].item(), **kwargs)


def test_a_network_whose_constructor_reads_numbers_from_tensors_can_be_saved_and_no_random_numbers_are_used(
    monkeypatch,
):
    with pytest.raises(RuntimeError, match="meta"), torch.device("meta"):
        reads_a_number_from_a_tensor()
    model = timm.create_model("resnet10t", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "reads_a_number_from_a_tensor"}
    model.creation_arguments, model.has_small_input, model.started_pretrained = {}, False, False
    before = torch.get_rng_state()
    check_saves(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_could_not_be_saved_or_built_again_is_refused_before_training():
    model = create_model(Model(name="cifar_preact_resnet_tiny", kwargs={"width": 4}), 3, (8, 8))
    model.creation_arguments = {"width": 8}
    with pytest.raises(InputError, match="cannot be saved as it was made: built again, .* is "):
        check_saves(model)
    model.creation_arguments = {"width": 4, "act_layer": torch.nn.ReLU}
    with pytest.raises(InputError, match="cannot be saved as it was made: .*not JSON serializable"):
        check_saves(model)


def test_weights_that_cannot_be_written_leave_the_earlier_file_and_no_part_of_another(tmp_path, monkeypatch):
    model, _ = saved(tmp_path, "cifar_preact_resnet_tiny", {"width": 4}, 8, False)
    before = load_file(tmp_path / "model.safetensors")

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pskd_timm.files.flush_to_disk", full)
    with torch.no_grad():
        model.head.fc.bias += 1
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path, [0.5] * 3, [0.5] * 3, (8, 8), 1.0, CLASSES)
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("resnet18", {"features_only": True}, "features_only True: the network then returns feature maps"),
        ("resnet18", {"in_chans": 1}, "in_chans 1: the network then takes other images than RGB ones"),
        ("resnet18", {"global_pool": ""}, "global_pool '': the network then returns a map of logits"),
        ("inception_v3", {"aux_logits": True}, "aux_logits True: the network then returns logits of auxiliary heads"),
        ("resnet18", {"num_classes": 7}, "num_classes 7: the network then has another number of classes"),
    ],
)
def test_arguments_that_make_no_classifier_are_named(name, kwargs, says):
    with pytest.raises(InputError, match=says):
        create_model(Model(name=name, kwargs=kwargs), 3, (32, 32))


def test_the_shared_weights_of_a_network_are_written_under_each_of_their_names(tmp_path):
    model, _ = saved(tmp_path, "coat_tiny", {}, 64, False)
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(places)) < len(places)
    assert load_file(tmp_path / "model.safetensors").keys() == build.contiguous_state(model).keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # which transformers up to 4.31 and others ask for


def test_no_folder_of_this_machine_is_published():
    settings = {"data.path": "/home/me/cats", "model.name": "local-dir:/home/me/runs/first", "method": "pskd"}
    settings |= {
        "tfkd.teacher": "/home/me/runs/teacher",
        "init_from": "/home/me/start.pth",
        "output_dir": "/home/me/out",
    }
    shown = recipe_for_others(load_recipe("custom", settings | {"data.cache_dir": "/home/me/cache"}))
    assert "/home/me" not in shown
    tree = yaml.safe_load(shown)
    assert tree["model"]["name"] == "local-dir:first" and tree["tfkd"]["teacher"] == "teacher"


@pytest.mark.parametrize(
    "text", ["<b>bold</b>", "*a* _b_ `c` ~~d~~", "[x](y) ![z](w)", "a | b & c &lt; $d$", "# 猫", "\\"]
)
def test_markdown_shows_a_class_name_as_it_is(text):
    shown = MarkdownIt("gfm-like", {"linkify": False}).render(f"Classes: {plain(text)}, dog.")
    assert shown == f"<p>Classes: {html.escape(text)}, dog.</p>\n"


def test_line_breaks_and_control_characters_of_a_class_name_are_spaces():
    assert re.search(r"\w( +)\w", plain("a\r\n\x1b\u202eb"))[1] == " " * 4
