"""Any timm model from a recipe, to a folder that timm can load, and back."""

import json
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from ..errors import InputError, first_line, nearest
from ..files import write_atomic
from ..recipe import Model as ModelSection
from ..recipe import Recipe
from .small_input import SMALL_INPUT, small_input

LOCAL, HUB = "local-dir:", "hf-hub:"  # what timm calls models that lie in a folder, or in a repository of the hub


def check_name(name: str):
    """Raise InputError, with the nearest names, if timm has no model `name` and no folder is called so."""
    folder = Path(name.removeprefix(LOCAL)).expanduser()
    if name.startswith(LOCAL) and not folder.is_dir():
        raise InputError(f"model.name: there is no folder {folder}")
    if ":" in name or timm.is_model(name.split(".")[0].removeprefix("timm/")):
        return
    if folder.is_dir():
        raise InputError(f"model.name: {name} is a folder: {LOCAL}{name} is the network saved in it")
    if is_path(name):
        raise InputError(f"model.name: there is no folder {folder}; a model on the hub is named {HUB}user/name")
    raise InputError(f"model.name: timm has no model {name!r}{nearest(name, timm.list_models())}")


def is_path(name: str) -> bool:
    """Whether a network's name reads like a folder's, or a hub id that lacks its scheme."""
    return "/" in name.removeprefix("timm/") or name.startswith((".", "~"))


def create_model(section: ModelSection, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """The model of a recipe for `num_classes` and RGB images of `image_size` (H, W), tried on one of them.

    `local-dir:FOLDER` is a network that a run or `push` saved, with `pretrained` its weights too.
    """
    check_name(section.name)
    _check_arguments(section)
    make = _from_folder if section.name.startswith(LOCAL) else _from_timm
    try:
        model, arguments = make(section, num_classes, image_size)
    except InputError:
        raise
    except Exception as error:  # each model raises what it likes
        hint = " (--model.kwargs '{}' drops the recipe's arguments)" if section.kwargs else ""
        weights = ""
        if section.pretrained:
            weights, hint = " and pretrained weights", f"{hint} (--model.pretrained false starts without)"
        made = f"model {section.name} cannot be made with {section.kwargs}{weights}"
        raise InputError(f"{made}: {first_line(error)}{hint}") from None
    if section.small_input and not getattr(model, "has_small_input", False):
        try:
            model = small_input(model)
        except ValueError as error:
            raise InputError(f"model.small_input: {error}") from None
        model.has_small_input = True
    model.has_small_input = getattr(model, "has_small_input", False)
    model.started_pretrained = section.pretrained
    # What the model was made with, for the config.json that loads it again.
    model.creation_arguments = {key: value for key, value in arguments.items() if key not in ("num_classes", "base")}
    _try(model, section.name, num_classes, image_size)
    return model


def _from_timm(section: ModelSection, num_classes: int, image_size: tuple[int, int]) -> tuple[nn.Module, dict]:
    arguments, of_hub = {"num_classes": num_classes, **section.kwargs}, {}
    if section.name.startswith(HUB):
        config, _, of_hub = load_model_config_from_hf(section.name.removeprefix(HUB))
        bound = "img_size" in of_hub or config.get("fixed_input_size")
    else:
        bound = _is_bound_to_a_size(section.name)
    if bound:
        arguments.setdefault("img_size", image_size)
    model = timm.create_model(section.name, pretrained=section.pretrained, **arguments)
    return model, of_hub | arguments  # timm itself adds those in a repository's config.json


def _from_folder(section: ModelSection, num_classes: int, image_size: tuple[int, int]) -> tuple[nn.Module, dict]:
    folder = Path(section.name.removeprefix(LOCAL)).expanduser()
    config = read_config(folder)
    arguments = config.get("model_args", {}) | section.kwargs
    if "img_size" in arguments:
        arguments |= {"img_size": section.kwargs.get("img_size", image_size)}
    config["model_args"] = arguments
    model = from_config(config)
    if section.pretrained:
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict(_for_another_size(weights, config) if "img_size" in arguments else weights)
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    return model, config["model_args"]


def _for_another_size(weights: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Weights for the image size that a config.json's arguments say: timm resizes position embeddings where it differs."""
    arguments = config["model_args"] | {"num_classes": config["num_classes"]}
    overlay = {"state_dict": weights, "num_classes": config["num_classes"], "label_offset": 0}
    return timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **arguments
    ).state_dict()


def _is_bound_to_a_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name.split(".")[0]) else None
    return bool(config and config.fixed_input_size)


def _try(model: nn.Module, name: str, num_classes: int, image_size: tuple[int, int]):
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, *image_size))
    except Exception as error:  # each model raises what it likes
        raise InputError(
            f"model {name} does not take {image_size[0]}×{image_size[1]} images (data.image_size): {first_line(error)}"
        ) from None
    if not isinstance(logits, Tensor):
        raise InputError(f"model {name} returns {len(logits)} outputs for one image, not logits: it is no classifier")
    if tuple(logits.shape) != (1, num_classes):
        raise InputError(
            f"model {name} returns {list(logits.shape)} for one image, not [1, {num_classes}]: it is no classifier"
        )
    model.train(training)


# Arguments of timm's that make something else of a classifier, and what that is.
NO_CLASSIFIER = {
    "features_only": "returns feature maps instead of logits",
    "in_chans": "takes other images than RGB ones, which all are here",
    "aux_logits": "returns logits of auxiliary heads too",
    "num_classes": "has another number of classes than the data",
}


def _check_arguments(section: ModelSection):
    plain = {"in_chans": 3, "aux_logits": False, "features_only": False}
    for name, reason in NO_CLASSIFIER.items():
        if name in section.kwargs and section.kwargs[name] != plain.get(name):
            raise InputError(f"model.kwargs.{name} {section.kwargs[name]}: the network then {reason}: leave it out")
    if section.kwargs.get("global_pool") == "":
        raise InputError("model.kwargs.global_pool '': the network then returns a map of logits: leave it out")


# Arguments of timm.create_model that make it read other files.
READ_FILES = ("checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
# Of a pretrained_cfg, what speaks of the weights that the architecture was published with, not of its structure.
OF_PUBLISHED_WEIGHTS = (
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset"),
    *("test_input_size", "test_crop_pct", "label_names", "label_descriptions"),
)
CREDITS = ("tag", "architecture_tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "description")


def save_model(
    model: nn.Module, folder: Path, mean, std, image_size: tuple[int, int], crop_pct: float, class_names: list[str]
):
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    What the file says of preprocessing is what the run evaluated with. A `small_input` network's architecture is
    `pskd_small_input`, which timm refuses unless `pskd_timm.models` was imported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(model, mean, std, image_size, crop_pct, class_names)
    write_atomic(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False))
    # safetensors' save_file lets the owner alone read, and leaves a part of the file where the disk is full.
    # Libraries that read several formats look for whose it is.
    write_atomic(folder / "model.safetensors", save(contiguous_state(model), {"format": "pt"}))


def model_config(model: nn.Module, mean, std, image_size, crop_pct: float, class_names: list[str]) -> dict:
    """config.json in timm's format."""
    left_out = (*OF_PUBLISHED_WEIGHTS, *(() if model.started_pretrained else CREDITS))
    known = {key: value for key, value in model.pretrained_cfg.items() if key not in left_out and value is not None}
    architecture = known.pop("architecture")
    known |= {"num_classes": model.num_classes, "input_size": (3, *image_size), "mean": tuple(mean), "std": tuple(std)}
    known |= {"crop_pct": crop_pct, "crop_mode": "center", "interpolation": "bicubic"}
    arguments = model.creation_arguments
    if model.has_small_input:
        architecture, arguments = SMALL_INPUT, {"base": architecture, **arguments}
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": class_names,
        # Without num_classes, which transformers would hand to timm twice.
        "model_args": {key: value for key, value in arguments.items() if value is not None},
        "pretrained_cfg": known,
    }


def check_saves(model: nn.Module):
    """Raise InputError where what `save_model` will write cannot be written, or would not give this network back."""
    name = model.pretrained_cfg["architecture"]
    try:
        config = json.loads(json.dumps(model_config(model, [0.5], [0.5], (1, 1), 1.0, [])))
        again = _without_weights(config)
    except Exception as error:  # each model raises what it likes
        raise InputError(f"model {name} cannot be saved as it was made: {first_line(error)}") from None
    here, there = ({n: tuple(t.shape) for n, t in each.state_dict().items()} for each in (model, again))
    if different := [name for name in here | there if here.get(name) != there.get(name)]:
        raise InputError(
            f"model {name} cannot be saved as it was made: built again, {different[0]} is {there.get(different[0])}, "
            f"not {here.get(different[0])} (model.kwargs {model.creation_arguments})"
        )


def _without_weights(config: dict) -> nn.Module:
    """`from_config` without the time and the random numbers that weights take, where the network lets itself be built so."""
    try:
        with torch.device("meta"):
            return from_config(config)
    except Exception:  # constructors that read numbers from tensors (RegNet), which meta tensors do not hold
        with torch.random.fork_rng(devices=[]):
            return from_config(config)


def from_config(config: dict) -> nn.Module:
    """The network that a config.json describes, with new weights; nothing but the file's own words is read."""
    architecture, arguments = config["architecture"], dict(config.get("model_args", {}))
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}")
    if refused := [name for name in arguments if name in READ_FILES]:
        raise ValueError(f"its model_args name other files to read ({refused[0]})")
    arguments["num_classes"] = config["num_classes"]
    model = timm.create_model(architecture, pretrained=False, **arguments)
    if config.get("small_input"):  # as earlier versions marked it
        model = small_input(model)
    model.has_small_input = architecture == SMALL_INPUT or bool(config.get("small_input"))
    model.pretrained_cfg = {**model.pretrained_cfg, **config.get("pretrained_cfg", {})}
    return model


def contiguous_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous, and weights that a network shares once for each name."""
    state, places = {}, set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.contiguous()
        state[name] = tensor.clone() if tensor.numel() and tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return state


def read_config(folder: Path) -> dict:
    """What config.json says of the model saved in `folder`. Raises InputError if there is none.

    This and model.safetensors are all that is read: timm itself looks for weights under other names too.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file: a folder is wanted" if folder.exists() else f"there is no folder {folder}"
        )
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        if (folder / "pytorch_model.bin").is_file():  # as timm saves without being told otherwise
            raise InputError(
                f"{folder}: its weights are in pytorch_model.bin, and only model.safetensors is read: "
                "timm.models.save_for_hf(model, folder, safe_serialization=True) writes that"
            )
        raise InputError(f"{folder}: no model here (a finished run has config.json and model.safetensors)")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architecture"], config["num_classes"]  # noqa: B018 (what a config.json must say)
    except KeyError as error:
        raise InputError(f"{folder}: config.json has no {error}: it is not that of a timm model") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: config.json cannot be read: {first_line(error)}") from None
    return config


def load_model(folder: str | Path) -> nn.Module:
    """The model in a run's folder, with its weights, on the CPU. Raises InputError if there is none."""
    folder = Path(folder).expanduser()
    config = read_config(folder)
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / 'model.safetensors'}: damaged: {first_line(error)}") from None
    try:
        model = from_config(config)
        model.load_state_dict(weights)
    except Exception as error:  # each model raises what it likes
        raise InputError(f"{folder}: the model cannot be loaded: {first_line(error)}") from None
    return model


def normalisation(model: nn.Module, recipe: Recipe) -> tuple[list[float], list[float]]:
    """Mean and std [3] in units of the pixel range: the recipe's, else the model's own."""
    config = model.pretrained_cfg
    return recipe.augment.mean or list(config["mean"]), recipe.augment.std or list(config["std"])
