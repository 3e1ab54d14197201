"""What a method adds to a training step."""

import copy
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from ..batch import Batch
from ..methods import PAPER
from ..methods.build import METHODS
from ..models.build import create_model
from ..optim import make_optimizer
from ..progress import Display, readable
from ..recipe import Model, Optim
from ..recipe_files import load_recipe
from ..run.graph import WARMUP, Recorder, on_side_stream
from ..run.launch import set_backends
from ..run.result import read_lines
from ..training import train
from .rounds import peak, ratio, rounds, timed

TITLE = (
    "each method's step over a bare one (cross-entropy; 128 images of 32×32, K = 100; one CPU thread, or a GPU in bf16)"
)
OPTIONS = ()
BATCH, CLASSES, SAMPLES, SIZE = 128, 100, 50_000, (32, 32)
NETWORKS = {  # name: width, seconds of measuring, steps in a measured turn
    "small": (2, 30.0, 2),
    "cifar_preact_resnet18": (64, 75.0, 1),
}
SLOW = ("bare", "pskd", "pskd snapshot", "cskd")  # what a large network is measured with where there is no GPU
TAUGHT = {
    "baseline": ("baseline", {}),
    "label_smoothing": ("label_smoothing", {}),
    "pskd": ("pskd", {}),
    "pskd snapshot": ("pskd", {"teacher": "snapshot"}),
    "cskd": ("cskd", {}),
    "tfkd virtual": ("tfkd", {}),
    "tfkd trained": ("tfkd", {"temperature": 6.0}),
    **{name: (name, {}) for name in METHODS if name not in PAPER},
}


def measure(say) -> list[dict]:
    """A row for each network and method: seconds of a step, its ratio to the bare one, and the memory it needs."""
    set_backends("bf16" if torch.cuda.is_available() else "no")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for name, (width, seconds, turn) in NETWORKS.items():
        model, steps = _steps(width)
        if turn == 1 and not torch.cuda.is_available():
            steps = {key: steps[key] for key in SLOW}
        num_parameters = sum(p.numel() for p in model.parameters())
        found = rounds({key: _repeat(step, turn) for key, step in steps.items()}, seconds)
        for key, step in steps.items():
            row = {"network": name, "num_parameters": num_parameters, "step": key, **ratio(found, key, "bare")}
            row["seconds"] /= turn
            row["peak_bytes"] = peak(step)
            rows.append(row)
            say(
                f"  {name} ({num_parameters:,} parameters)  {key:<16} {1e3 * row['seconds']:9.2f} ms   "
                f"{row['ratio']:.3f} × bare ({row['low']:.3f} … {row['high']:.3f}, {row['rounds']} rounds)   "
                f"peak {readable(row['peak_bytes'])}"
            )
    if torch.cuda.is_available():
        rows += [_whole_run(say, width=64, samples=25_600, compile=compile) for compile in ("off", "graphs")]
    else:
        rows.append(_whole_run(say, width=2, samples=6_400, compile="off"))
        say("  not measured here: anything on a GPU (bf16, CUDA graphs, the share of the bare step's rate)")
    torch.set_num_threads(threads)
    return rows


def _repeat(step, times: int):
    def turn():
        for _ in range(times):
            step()

    return turn


def _network(width: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = create_model(Model(name="cifar_preact_resnet18", kwargs={"width": width}), CLASSES, SIZE).train()
    if torch.cuda.is_available():
        model = model.to("cuda", memory_format=torch.channels_last)
    return model, make_optimizer(model, Optim(lr=1e-4))


def _autocast():
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


def _bare(model, optimizer, images, labels, recorded: bool = False):
    """What takes a bare step; with `recorded` its forward and backward are one CUDA graph, as with compile graphs."""

    def forward_backward():
        with _autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    def step():
        work()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not recorded)

    work = forward_backward
    if recorded:
        for _ in range(WARMUP):
            on_side_stream(step)
        work = Recorder()(forward_backward)
    return step


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images, partners' images and labels on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, partners = torch.randn(2, BATCH, 3, *SIZE, device=device)
    return images, partners, torch.randint(CLASSES, (BATCH,), device=device)


def _steps(width: int) -> tuple[torch.nn.Module, dict]:
    """A network and, by name, what takes a step of it: the same weights, optimizer and batch for all."""
    model, optimizer = _network(width)
    images, partners, labels = _batch()
    ids = torch.randperm(SAMPLES, device=images.device).split(BATCH)[:-1]

    def taught(method):
        turn = iter(range(10**9))

        def step():
            index = ids[next(turn) % len(ids)]
            batch = Batch(images, labels, index, partners if method.needs_partners else None)
            with _autocast():
                loss, _ = method.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    steps = {"bare": _bare(model, optimizer, images, labels)}
    for key, (name, settings) in TAUGHT.items():
        if key == "tfkd trained":
            settings = {**settings, "teacher": copy.deepcopy(model)}
        method = METHODS[name](**settings)
        method.setup(num_samples=SAMPLES, num_classes=CLASSES, num_epochs=2, device=images.device, model=model)
        method.begin_epoch(0, torch.arange(SAMPLES))
        if getattr(method, "snapshot", None):
            method.snapshot.take()
        steps[key] = taught(method)
    return model, steps


def _whole_run(say, width: int, samples: int, compile: str) -> dict:
    """Images/s of PS-KD's `train`, loader, augmentation and sums included, over the bare step's with the same network."""
    on_gpu = torch.cuda.is_available()
    model, optimizer = _network(width)
    images, _, labels = _batch()
    bare = _bare(model, optimizer, images, labels, recorded=compile == "graphs")

    def bare_seconds():
        return median(timed(_repeat(bare, 50)) / 50 for _ in range(5))

    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "data.path": _images(Path(folder) / "data", samples),
            "data.source": None,
            "data.cache_dir": f"{folder}/cache",
            "data.limit_test": BATCH,
            "model.kwargs": {"width": width},
            "model.channels_last": on_gpu,
            "model.compile": compile,
            "mixed_precision": "bf16" if on_gpu else "no",
            "epochs": 4,
            "threads": 1,
            "batch_size": BATCH,
            "output_dir": f"{folder}/runs",
            "tracking.wandb": "disabled",
            "tracking.log_every": 1000,
        }
        before = bare_seconds()
        result = train(load_recipe("cifar100/preact_resnet18", overrides), display=Display(quiet=True))
        after = bare_seconds()
        rates = [line["images_per_second"] for line in read_lines(result.run_dir / "metrics.jsonl")][1:]
    found = {"images_per_second": median(rates), "bare_images_per_second": BATCH / median([before, after])}
    say(
        f"  width {width}, compile {compile}: train with PS-KD {found['images_per_second']:,.0f} images/s, bare step "
        f"{found['bare_images_per_second']:,.0f}: {found['images_per_second'] / found['bare_images_per_second']:.1%} of it"
    )
    return {"network": f"width {width}", "step": "whole run", "compile": compile, **found}


def _images(folder: Path, count: int) -> str:
    """A saved data set of random images, as CIFAR-100 is shaped."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, disable_progress_bars
    from datasets import Image as ImageFeature
    from PIL import Image

    disable_progress_bars()
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8).numpy()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[f"c{k}" for k in range(CLASSES)])})
    columns = {"image": [Image.fromarray(one) for one in pixels], "label": [i % CLASSES for i in range(count)]}
    table = Dataset.from_dict(columns, features=features)
    DatasetDict(train=table, test=table.select(range(BATCH))).save_to_disk(str(folder))
    return str(folder)
