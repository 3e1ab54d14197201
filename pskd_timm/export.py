"""A finished run for others: a folder or hub repository that timm loads, with a model card; an ONNX file."""

import io
import json
import logging
import re
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor, nn

from . import __version__
from .data.augmentation import normalize
from .errors import InputError, first_line, reason
from .files import write_atomic
from .metrics import telling_metrics
from .models.base import CifarNet
from .models.build import LOCAL, normalisation
from .prediction import Classifier, describe_calibration
from .recipe import METHOD_SECTIONS, Recipe
from .recipe_files import differing
from .reports.kept import Kept
from .reports.plots import reliability_and_risk, title
from .run.folder import how_to_mend, read_metrics, read_result
from .run.result import Result, RunResult
from .teacher import BASELINE


def push(run: str | Path, to: str, hub: bool = False, private: bool = False, best: bool = False) -> str:
    """Write a finished run with its model card into the new folder `to`, or with `hub` into that repository of the hub.

    Returns where it is. Raises InputError where there is no such run, or the folder or the hub cannot take it.
    """
    classifier = Classifier.of_run(run, best)
    if not hub:
        folder = Path(to).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{to}: there is something already: name a new folder, or a repository with --hub")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                partial = Path(temporary) / "model"
                write_folder(Path(run).expanduser(), partial, classifier, best, f"local-dir:{folder.name}")
                partial.replace(folder)
        except OSError as error:
            raise InputError(f"{to}: cannot be written: {reason(error)}") from None
        return str(folder)
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError("push --hub needs a token of the Hugging Face hub: `hf auth login`, or HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(Path(run).expanduser(), Path(temporary) / "model", classifier, best, f"hf-hub:{to}")
        try:
            api = HfApi()
            repository = api.create_repo(to, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository.repo_id, folder_path=Path(temporary) / "model")
        except Exception as error:  # whatever the library and the network raise
            line = first_line(error)
            raise InputError(f"{to}: the hub did not take it: {line}") from None
    return str(repository)


def write_folder(run: Path, folder: Path, classifier: Classifier, best: bool, timm_name: str):
    """The files of `push`: model.safetensors, config.json, recipe.yaml, result.json, reliability.png and README.md."""
    source = run / "best" if best else run
    folder.mkdir()
    shutil.copy(source / "model.safetensors", folder)
    config = json.loads((source / "config.json").read_text())
    config |= describe_calibration(classifier.temperature)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    (folder / "recipe.yaml").write_text(recipe_for_others(classifier.recipe))
    result = Result(run, read_result(run))
    (folder / "result.json").write_text(json.dumps(result_for_others(result.values), indent=1, ensure_ascii=False))
    predictions = source / "predictions.parquet"
    try:
        table = pd.read_parquet(predictions, columns=["confidence", "correct"])
        card = model_card(result, classifier, best, timm_name)  # which reads them once more
    except (OSError, ValueError) as error:  # pyarrow's are among them
        raise InputError(f"{predictions}: damaged: {first_line(error)}; {how_to_mend(run)}") from None
    reliability_and_risk({classifier.recipe.method: [table]}).savefig(folder / "reliability.png", dpi=150)
    (folder / "README.md").write_text(card)


def recipe_for_others(recipe: Recipe) -> str:
    """The settings that differ from the defaults, without what says something of this machine alone."""
    tree = differing(recipe)
    for key in ("output_dir", "tracking", "threads"):
        tree.pop(key, None)
    tree["data"].pop("cache_dir", None)
    if "path" in tree["data"]:
        tree["data"]["path"] = Path(tree["data"]["path"]).name
    if "init_from" in tree:
        tree["init_from"] = Path(tree["init_from"]).name
    tree["model"]["name"] = name_for_others(recipe)
    for method in METHOD_SECTIONS:
        section = tree.get(method, {})
        if getattr(recipe, method).trained_teacher not in (None, BASELINE):
            section["teacher"] = Path(section["teacher"]).name
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def name_for_others(recipe: Recipe) -> str:
    """The model's name; of one that was read from a folder of this machine only the folder's own name."""
    name = recipe.model.name
    return f"{LOCAL}{Path(name.removeprefix(LOCAL)).name}" if name.startswith(LOCAL) else name


def result_for_others(values: RunResult) -> dict:
    """result.json without the machine it was computed on and where a teacher lay there."""
    kept = {key: value for key, value in values.items() if key != "hardware"}
    if "teacher" in kept:
        kept["teacher"] = kept["teacher"] | {"run": Path(kept["teacher"]["run"]).name}
    return kept


def plain(text: str) -> str:
    """`text` as Markdown shows it literally: no markup, no line breaks, no control characters."""
    visible = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", visible)


CHOSEN_ON = {"holdout": "held-out images", "test": "test images themselves: the figures are a little too good"}
CARD = """
# {name}: {model}, {method}

An image classifier for {num_classes} classes, trained on {num_train:,} images by pskd_timm {version} with {method} for {epochs}
epochs; the {which} epoch's weights{chosen}, {num_parameters:,} parameters.

{table}
On the {split} images. Errors and ECE in %, NLL in nats, AURC and E-AURC × 10³; lower is better.

![Reliability diagram and risk–coverage curve](reliability.png)

## Use

```python
import timm, torch
from PIL import Image
{imports}
model = {loading}.eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
confidences = {scaled}.softmax(dim=1)
```

{calibration}

Classes, in the order of the outputs: {classes}.

## Recipe

```yaml
{recipe}```
"""


def model_card(result: Result, classifier: Classifier, best: bool, timm_name: str) -> str:
    """README.md as the hub reads it: YAML with the figures, then the table, the picture, how to load it and the recipe."""
    recipe = classifier.recipe
    imports, loading = "", f'timm.create_model("{timm_name}", pretrained=True)'
    model = classifier.model
    if model.has_small_input or isinstance(model, CifarNet):
        imports = "import pskd_timm.models  # registers this network with timm\n"
    return card_head(result, recipe, best) + CARD.format(
        name=recipe.name,
        model=name_for_others(recipe),
        method=title(recipe.method),
        num_classes=len(classifier.class_names),
        version=__version__,
        epochs=recipe.epochs,
        which="best" if best else "last",
        chosen=f" (chosen on the {CHOSEN_ON[result.best['chosen_on']]})" if best else "",
        num_parameters=result.values["num_parameters"],
        num_train=result.values["num_train"],
        table=card_table(result, classifier, best),
        split=scored_images(result),
        imports=imports,
        loading=loading,
        scaled="logits" if classifier.temperature.reason else f"(logits / {classifier.temperature.value:.4f})",
        calibration=calibration_line(classifier),
        classes=", ".join(map(plain, classifier.class_names)),
        recipe=recipe_for_others(recipe),
    )


def calibration_line(classifier: Classifier) -> str:
    """What the confidences are: calibrated, from how many images, or not, and why."""
    temperature = classifier.temperature
    if temperature.reason:
        return f"The confidences are the network's own, not calibrated: {temperature.reason}."
    source = f"{temperature.num_samples:,} held-out training images"
    return f"The confidences are calibrated by the temperature {temperature.value:.4f}, fitted on {source}."


def scored_images(result: Result) -> str:
    """Which images the figures are from, and how many."""
    if result.values["evaluated_on"] == "test":
        return f"{result.values['num_test']:,} test"
    return f"{result.values['num_holdout']:,} held-out training"


def card_head(result: Result, recipe: Recipe, best: bool) -> str:
    """The card's YAML: what the hub files the model under, and its figures as a model index."""
    from huggingface_hub import EvalResult, ModelCardData

    figures = result.best if best else result.last
    about = {"task_type": "image-classification", "dataset_type": recipe.name, "dataset_name": recipe.name}
    measured = {"accuracy": 1 - figures["top1_error"] / 100, "nll": figures["nll"], "ece": figures["ece"] / 100}
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "pskd_timm", "calibration", recipe.method],
        metrics=["accuracy"],
        model_name=f"{recipe.name} {name_for_others(recipe)} {recipe.method}",
        eval_results=[
            EvalResult(**about, dataset_split=result.values["evaluated_on"], metric_type=name, metric_value=value)
            for name, value in measured.items()
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def card_table(result: Result, classifier: Classifier, best: bool) -> str:
    """The figures as the network gives them, and with the temperature where other images than the scored ones gave it."""
    rows = {"as trained": result.best if best else result.last}
    if not classifier.temperature.reason and result.values["evaluated_on"] == "test":
        label = f"with temperature {classifier.temperature.value:.4f}, fitted on held-out training images"
        source = result.run_dir / "best" if best else result.run_dir
        kept = Kept(source / "predictions.parquet", classifier.temperature.value)
        rows[label] = rows["as trained"] | kept.scaled_figures()
    metrics = telling_metrics(read_metrics(result.values), len(classifier.class_names))
    lines = [["confidences", *(metric.header for metric in metrics)], ["---", *("---:" for _ in metrics)]]
    lines += [[label, *(f"{row[m.name]:.{m.digits}f}" for m in metrics)] for label, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


NAMES = {"input_names": ["images"], "output_names": ["confidences"], "verbose": False}
MOST_DIFFERENCE = 1e-3  # of a confidence, between ONNX Runtime and torch


class Deployed(nn.Module):
    """From pixels to confidences in one graph: normalisation, network, temperature, softmax."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.model = classifier.model.cpu()
        mean, std = normalisation(classifier.model, classifier.recipe)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.temperature = classifier.temperature.value

    def forward(self, images: Tensor) -> Tensor:
        """Confidences [B, K] for RGB pixels uint8 [B, 3, H, W]."""
        return (self.model(normalize(images, self.mean, self.std)) / self.temperature).softmax(dim=1)


def export_onnx(run: str | Path, path: str | Path, best: bool = False) -> float:
    """Write a finished run as one ONNX file: uint8 `images` [B, 3, H, W] (RGB) in, `confidences` [B, K] out.

    Class names, temperature, whether it calibrates and image size are in the file's metadata. Returns the largest
    difference between ONNX Runtime's and torch's confidences on random pixels.
    """
    classifier = Classifier.of_run(run, best)
    try:
        import onnx
        import onnxruntime  # noqa: F401, what is written is tried in it
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ImportError:
        raise InputError("export to ONNX needs a few packages: pip install onnx onnxscript onnxruntime") from None
    path = Path(path).expanduser()
    generator = torch.Generator().manual_seed(0)
    shape = 7, 3, *classifier.image_size
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    model, difference = to_onnx(Deployed(classifier).eval(), pixels, classifier.recipe.model.name)
    onnx.helper.set_model_props(
        model,
        {
            "class_names": json.dumps(classifier.class_names, ensure_ascii=False),
            "image_size": json.dumps(classifier.image_size),
            **{key: json.dumps(value) for key, value in describe_calibration(classifier.temperature).items()},
        },
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, model.SerializeToString())
    except (OSError, ValueError) as error:  # a ValueError where the network exceeds the 2 GB of a protocol buffer
        raise InputError(f"{path}: cannot be written: {reason(error)}") from None
    return difference


def to_onnx(deployed: Deployed, pixels: Tensor, name: str):
    """`deployed` as an `onnx.ModelProto` for any number of images, and how far ONNX Runtime's outputs are from torch's.

    torch's older exporter is tried where the newer one fails or the network comes out as another one. Raises InputError
    where it does not help.
    """
    reasons = []
    for export in (_exported, _exported_as_before):
        try:
            model = export(deployed, pixels[:2])
            difference = max(_difference(model, deployed, pixels[:count]) for count in (1, len(pixels)))
        except Exception as error:  # the exporters and the runtime raise what they like, over many lines
            reasons.append(first_line(error))
            continue
        if difference <= MOST_DIFFERENCE:
            return model, difference
        reasons.append(f"the confidences differ from torch's by {difference:.1g}")
    raise InputError(
        f"model {name} cannot be exported to ONNX: {reasons[0]}; with torch's older exporter: {reasons[1]}"
    )


def _exported(deployed: Deployed, example: Tensor):
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with quiet_exporters():
        return torch.onnx.export(deployed, (example,), dynamo=True, dynamic_shapes=shapes, **NAMES).model_proto


def _exported_as_before(deployed: Deployed, example: Tensor):
    import onnx

    file, axes = io.BytesIO(), {"images": {0: "batch"}, "confidences": {0: "batch"}}
    with quiet_exporters():
        torch.onnx.export(deployed, (example,), file, dynamo=False, dynamic_axes=axes, **NAMES)
    return onnx.load_from_string(file.getvalue())


@contextmanager
def quiet_exporters():
    """What torch's exporters print and warn of stays unsaid: `to_onnx` tries what they give."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _difference(model, deployed: Deployed, pixels: Tensor) -> float:
    """The largest difference between ONNX Runtime's and torch's outputs; infinite where the runtime's are not finite."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"images": pixels.numpy()})
    return float(np.nan_to_num(np.abs(outputs - deployed(pixels).numpy()).max(), nan=np.inf))
