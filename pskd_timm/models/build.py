"""Any timm model from a recipe, to a folder that timm can load, and back."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..errors import InputError, nearest
from ..recipe import Model as ModelSection
from ..recipe import Recipe
from .small_input import small_input


def check_name(name: str):
    """Raise InputError, with the nearest names, if timm has no model `name`."""
    if not timm.is_model(name.split(".")[0].removeprefix("timm/")) and ":" not in name:
        raise InputError(f"model.name: timm has no model {name!r}{nearest(name, timm.list_models())}")


def create_model(section: ModelSection, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """The model of a recipe for `num_classes` and RGB images of `image_size` (H, W), tried on one of them."""
    check_name(section.name)
    arguments = {"num_classes": num_classes, **section.kwargs}
    if _is_bound_to_a_size(section.name):
        arguments.setdefault("img_size", image_size)
    try:
        model = timm.create_model(section.name, pretrained=section.pretrained, **arguments)
    except Exception as error:  # each model raises what it likes
        hint = " (--model.kwargs '{}' drops the recipe's arguments)" if section.kwargs else ""
        weights = ""
        if section.pretrained:
            weights, hint = " and pretrained weights", f"{hint} (--model.pretrained false starts without)"
        made = f"model {section.name} cannot be made with {arguments}{weights}"
        raise InputError(f"{made}: {_first_line(error)}{hint}") from None
    if section.small_input:
        try:
            model = small_input(model)
        except ValueError as error:
            raise InputError(f"model.small_input: {error}") from None
    model.has_small_input = section.small_input
    # What `create_model` was given, for the config.json that loads the model again.
    model.creation_arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    _try(model, section.name, num_classes, image_size)
    return model


def _is_bound_to_a_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name.split(".")[0]) else None
    return bool(config and config.fixed_input_size)


def _try(model: nn.Module, name: str, num_classes: int, image_size: tuple[int, int]):
    training = model.training
    try:
        with torch.no_grad():
            shape = tuple(model.eval()(torch.zeros(1, 3, *image_size)).shape)
    except Exception as error:  # each model raises what it likes
        raise InputError(
            f"model {name} does not take {image_size[0]}×{image_size[1]} images (data.image_size): {_first_line(error)}"
        ) from None
    if shape != (1, num_classes):
        raise InputError(
            f"model {name} returns {list(shape)} for one image, not [1, {num_classes}]: it is no classifier"
        )
    model.train(training)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def save_model(model: nn.Module, folder: Path, mean, std, image_size: tuple[int, int], class_names: list[str]):
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    seen = {"mean": tuple(mean), "std": tuple(std), "input_size": (3, *image_size), "crop_pct": 1.0}
    model.pretrained_cfg = {**model.pretrained_cfg, **seen}
    config = {"num_classes": len(class_names), "label_names": class_names, "small_input": model.has_small_input}
    folder.mkdir(parents=True, exist_ok=True)
    # timm's save_for_hf would write both, but refuses weights in channels_last; safetensors' save_file lets the owner alone read.
    (folder / "model.safetensors").write_bytes(save(contiguous_state(model)))
    save_config_for_hf(model, folder / "config.json", model_config=config, model_args=model.creation_arguments)


def contiguous_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it."""
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def load_model(folder: str | Path) -> nn.Module:
    """The model in a run's folder, with its weights, on the CPU. Raises InputError if there is none."""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(
            f"{folder}: no model here (a finished run or a checkpoint has config.json and model.safetensors)"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        if not config.get("small_input"):
            return timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
        model = build_model(folder)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model
    except Exception as error:  # each model raises what it likes
        raise InputError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from None


def build_model(folder: Path) -> nn.Module:
    """The model that config.json describes, which was trained with `small_input`, without its weights."""
    # timm builds the large stem, so the small one takes its place before the weights come.
    return small_input(timm.create_model(f"local-dir:{folder.resolve()}", pretrained=False))


def normalisation(model: nn.Module, recipe: Recipe) -> tuple[list[float], list[float]]:
    """Mean and std [3] in units of the pixel range: the recipe's, else the model's own."""
    config = model.pretrained_cfg
    return recipe.augment.mean or list(config["mean"]), recipe.augment.std or list(config["std"])
