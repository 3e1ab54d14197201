"""Training a detector beside a loop as torchvision's detection reference has it, and mAP beside torchmetrics'."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import VOCDetection
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from ..detection.data import Objects
from ..detection.evaluation import detections_table
from ..detection.metrics import objects_table, score
from ..detection.network import make_detector
from ..detection.recipes import load_detection_recipe
from ..detection.settings import VOC_CLASSES, DetectionRecipe
from ..detection.training import train_detector
from ..progress import Display
from ..run.result import read_lines
from .rounds import ratio, rounds, timed

TITLE = "an epoch beside torchvision's reference loop (resnet18, short side 192), mAP of 5,000 pictures beside torchmetrics'"
OPTIONS = ()
TURNS, PICTURES, SIZE = 4, 32, (375, 500, 3)  # of the made-up photographs: height, width, channels
TESTED, FOUND, OBJECTS = 5_000, 20, 3  # pictures, detections and objects of each
SECONDS = 20.0
ROW = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def measure(say: Callable[[str], None]) -> list[dict]:
    """Rows of images a second and of seconds, with ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_training(Path(folder), say)]
    torch.set_num_threads(threads)
    return rows + measure_scoring(say)


def bench_recipe(devkit: Path, output: Path) -> DetectionRecipe:
    """A recipe of one epoch over the made-up photographs."""
    settings = {
        "epochs": 1,
        "data.path": str(devkit),
        "data.train": ["VOC2012/train"],
        "data.test": ["VOC2012/val"],
        "model.backbone": "resnet18",
        "optim.warmup_epochs": 0.5,
        "output_dir": str(output),
    }
    return load_detection_recipe("detection/voc_small", settings)


def measure_training(folder: Path, say) -> dict:
    """Seconds of an epoch's steps by `train_detector` and by the reference loop, in turns, each from its first step."""
    devkit = make_devkit(folder / "VOCdevkit")
    found = {"train": [], "reference": []}
    for turn in range(TURNS):
        recipe = bench_recipe(devkit, folder / f"run{turn}")
        result = train_detector(recipe, display=Display(quiet=True))
        found["train"].append(PICTURES / read_lines(result.run_dir / "metrics.jsonl")[0]["images_per_second"])
        found["reference"].append(reference_seconds(recipe))
    found = {name: seconds[1:] for name, seconds in found.items()}  # the first turn warms up
    row = {"step": "train", **ratio(found, "reference", "train")}
    row["images_per_second"] = {name: PICTURES / float(np.median(seconds)) for name, seconds in found.items()}
    rates = row["images_per_second"]
    say(
        f"  train {rates['train']:.2f} images/s, torchvision's reference loop {rates['reference']:.2f}: "
        f"{row['ratio']:.3f} × it ({row['low']:.3f} … {row['high']:.3f}, {row['rounds']} rounds)"
    )
    return row


class Photographs(Dataset):
    """VOC's pictures and targets by torchvision's own reader and transforms."""

    def __init__(self, devkit: Path):
        self.source = VOCDetection(devkit.parent, year="2012", image_set="train")
        self.to_tensor = v2.Compose(
            [v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.RandomHorizontalFlip(0.5)]
        )

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i: int):
        picture, annotation = self.source[i]
        objects = annotation["annotation"]["object"]
        boxes = [[float(each["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for each in objects]
        labels = torch.tensor([1 + VOC_CLASSES.index(each["name"]) for each in objects])
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=(picture.height, picture.width))
        return self.to_tensor(picture, {"boxes": boxes, "labels": labels})


def reference_seconds(recipe: DetectionRecipe) -> float:
    """Seconds of one epoch on the same network: a plain loop that reads the loss at every step, as the reference does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    detector = make_detector(recipe.model, len(VOC_CLASSES)).to(device).train()
    weights = [each for each in detector.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(weights, recipe.optim.lr, recipe.optim.momentum, weight_decay=recipe.optim.weight_decay)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=PICTURES // recipe.batch_size - 1)
    photographs = Photographs(Path(recipe.data.path))
    loader = DataLoader(photographs, recipe.batch_size, shuffle=True, collate_fn=lambda batch: zip(*batch, strict=True))

    def epoch():
        for images, targets in loader:
            images = [image.to(device) for image in images]
            losses = detector(images, [{key: value.to(device) for key, value in each.items()} for each in targets])
            loss = sum(losses.values())
            if not math.isfinite(loss.item()):
                raise RuntimeError("the reference loop's loss is not finite")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup.step()

    return timed(epoch)


def measure_scoring(say) -> list[dict]:
    """Seconds of every figure of `score`, and of torchmetrics' mAP (COCO's alone), from the same arrays."""
    try:
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError:
        say("  not measured: mAP beside torchmetrics needs pip install torchmetrics pycocotools")
        return []
    objects, found = made_up_detections()
    targets = [{"boxes": torch.from_numpy(each.boxes), "labels": torch.from_numpy(each.labels)} for each in objects]
    outputs = [dict(zip(("boxes", "labels", "scores"), map(torch.from_numpy, each[1:]), strict=True)) for each in found]

    def ours():
        score(detections_table(found), objects_table(objects), len(VOC_CLASSES))

    def theirs():
        metric = MeanAveragePrecision()
        metric.update(outputs, targets)
        metric.compute()

    seconds = rounds({"score": ours, "torchmetrics": theirs}, SECONDS)
    row = {"step": "map", "pictures": TESTED, **ratio(seconds, "score", "torchmetrics")}
    row["reference_seconds"] = float(np.median(seconds["torchmetrics"]))
    say(
        f"  VOC's and COCO's mAP, ECE of {TESTED:,} pictures, {TESTED * FOUND:,} detections: {row['seconds']:.2f} s, "
        f"torchmetrics {row['reference_seconds']:.2f} s: {row['ratio']:.3f} × it "
        f"({row['low']:.3f} … {row['high']:.3f}, {row['rounds']} rounds)"
    )
    return [row]


def made_up_detections() -> tuple[list[Objects], list[tuple]]:
    """Objects of TESTED pictures, and detections near some of them: (picture, boxes, labels, scores)."""
    generator = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        corner = generator.uniform(0, 300, (count, 2))
        return np.concatenate([corner, corner + generator.uniform(20, 180, (count, 2))], axis=1).astype(np.float32)

    objects, found = [], []
    for i in range(TESTED):
        truth = Objects(boxes(OBJECTS), generator.integers(len(VOC_CLASSES), size=OBJECTS), np.zeros(OBJECTS, bool))
        near = generator.integers(OBJECTS, size=FOUND)
        is_near = generator.random(FOUND) < 0.5
        box = np.where(is_near[:, None], truth.boxes[near] + generator.uniform(-9, 9, (FOUND, 4)), boxes(FOUND))
        labels = np.where(is_near, truth.labels[near], generator.integers(len(VOC_CLASSES), size=FOUND))
        scores = np.sort(generator.uniform(0.05, 1, FOUND))[::-1]
        objects.append(truth)
        found.append((i, box.astype(np.float32), labels, scores.astype(np.float32)))
    return objects, found


def make_devkit(devkit: Path) -> Path:
    """A devkit of PICTURES photographs to train on and one to test on, all of noise, with OBJECTS objects each."""
    generator = np.random.default_rng(0)
    year = devkit / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    names = [f"{i:06d}" for i in range(PICTURES + 1)]
    for name in names:
        coarse = Image.fromarray(generator.integers(0, 256, (SIZE[0] // 25, SIZE[1] // 25, 3), np.uint8))
        coarse.resize((SIZE[1], SIZE[0])).save(year / "JPEGImages" / f"{name}.jpg")
        rows = []
        for _ in range(OBJECTS):
            left, top = generator.integers(1, 250), generator.integers(1, 200)
            wide, high = generator.integers(40, 170, size=2)
            rows.append(ROW.format(VOC_CLASSES[generator.integers(20)], left, top, left + wide, top + high))
        (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(rows)}</annotation>")
    (year / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names[:-1]) + "\n")
    (year / "ImageSets" / "Main" / "val.txt").write_text(names[-1] + "\n")
    return devkit
