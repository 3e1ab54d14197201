"""Every setting of a detection run; no torch here."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..recipe import Checkpoint, Precision, flatten
from ..recipe import Optim as ImageOptim
from ..recipe import Tracking as ImageTracking
from ..section import Count, Fraction, NonNegative, Positive, Section, SourcedSection

VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
]
VOC_CLASSES += ["horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Data(Section):
    path: str | None = None
    """VOCdevkit, the folder of VOC's years, or a local HF data set with boxes (saved, or Parquet files)."""
    source: str | None = None
    """Id of an HF data set with boxes on the hub, instead of `path`."""
    train: Annotated[list[str], Field(min_length=1, examples=["[VOC2007/trainval]"])] = [
        "VOC2007/trainval",
        "VOC2012/trainval",
    ]
    """What to train on: folders and image sets of VOCdevkit, or splits of an HF data set."""
    test: Annotated[list[str], Field(min_length=1, examples=["[VOC2007/test]"])] = ["VOC2007/test"]
    """What to test on, named likewise."""
    class_names: Annotated[Annotated[list[str], Field(min_length=1)] | None, Field(examples=["[cat, dog]"])] = None
    """Names of the classes; by default VOC's twenty, or those of the HF data set."""
    other_names: Literal["fail", "skip"] = "fail"
    """What an object of another name does: end the run, or be left out, which is counted in a line."""
    train_difficult: bool = False
    """Train on boxes marked difficult too (in the figures they count neither as found nor as missed)."""
    hflip: Probability = 0.5
    """Probability of mirroring a training picture left–right, with its boxes."""
    image_column: str = "image"
    """HF data sets: column of the pictures."""
    objects_column: str = "objects"
    """HF data sets: column of the objects, each picture's with `bbox` and `category` (and `difficult`, where there is one)."""
    box_format: Literal["xywh", "xyxy"] = "xywh"
    """HF data sets: boxes as left, top, width, height (COCO's), or as left, top, right, bottom; pixels from 0."""
    limit_train: Count | None = None
    """Train on the first so many pictures only."""
    limit_test: Count | None = None
    """Test on the first so many pictures only."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode pictures for each rank; 0: the training process itself."""

    @model_validator(mode="after")
    def _names_something(self):
        if (self.path is None) == (self.source is None):
            raise ValueError("name the pictures: `path` (VOCdevkit or a local HF data set) or `source` (a hub id)")
        if self.class_names and len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names names a class twice")
        return self


class Model(Section):
    backbone: str
    """A run's folder, `local-dir:FOLDER`, `hf-hub:ID`, or the name of a timm model."""
    pretrained: bool = False
    """Start a timm model by name from its pretrained weights."""
    label: Annotated[str, Field(pattern=r"^\w[\w .+-]*$")] | None = None
    """What reports call the backbone and the runs are filed under; by default a run's method, else the model's name."""
    freeze_batch_norm: bool | None = None
    """Keep the backbone's batch norms as they are; by default where it has been trained."""
    sync_bn: bool = False
    """Take batch norm's statistics over all processes (GPUs only)."""
    short_side: Annotated[list[Annotated[int, Field(ge=32)]], Field(min_length=1, examples=["[640, 800]"])] = [800]
    """Pixels of a picture's shorter side; of several, training draws one a picture, and testing takes the last."""
    max_side: Annotated[int, Field(ge=32)] = 1333
    """Most pixels of a picture's longer side."""
    fpn_channels: Annotated[int, Field(ge=8)] = 256
    """Channels of each map of the feature pyramid."""
    head_width: Annotated[int, Field(ge=8)] = 1024
    """Width of the two layers that look at a box."""
    anchor_scale: Positive = 8.0
    """Side of a map's anchors in units of its stride; 4 suits pictures of half the usual size."""
    proposals: Count = 1000
    """Boxes that the first stage hands on in testing; twice as many in training."""
    rois_per_image: Annotated[int, Field(ge=8)] = 512
    """Proposals of a picture that the second stage trains on."""
    score_threshold: Fraction = 0.05
    """Least confidence of a detection."""
    detections_per_image: Count = 100
    """Most detections of a picture."""

    @property
    def name(self) -> str:
        """What the backbone is called."""
        return self.label or default_label(self)

    @model_validator(mode="after")
    def _sides_fit(self):
        if max(self.short_side) > self.max_side:
            raise ValueError(f"short_side {max(self.short_side)} must not exceed max_side {self.max_side}")
        return self


class Optim(ImageOptim):
    lr: Positive = 0.005
    """Peak learning rate (torchvision: 0.02 at 16 pictures a step; scale it with the batch)."""
    nesterov: bool = False
    """Nesterov's form of momentum (SGD)."""
    weight_decay: NonNegative = 1e-4
    """Weight decay."""
    milestones: list[Positive] = [0.67, 0.92]
    """When the learning rate drops: below 1 a part of the run, from 1 on an epoch."""
    warmup_epochs: NonNegative = 0.5
    """Epochs over which the learning rate rises linearly to its peak; without any, detectors often diverge."""
    clip_grad_norm: Positive | None = 10.0
    """Largest norm of the gradient; longer gradients are scaled down to it."""


class Tracking(ImageTracking):
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: not at all, into the run's folder, or to the server (which needs an account)."""
    log_every: Count = 20
    """Steps between two reads of the running losses and the gradient's norm."""


class DetectionRecipe(SourcedSection):
    name: Annotated[str, Field(pattern=r"^(\w[\w .+-]*)?$")] = ""
    """What the runs are filed under; by default the recipe file's name."""
    task: Literal["detection"] = "detection"
    """What is trained."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes everything random about the run."""
    epochs: Count
    """Length of the run."""
    batch_size: Count = 8
    """Pictures a step over all processes together."""
    grad_accum_steps: Count = 1
    """Forward and backward passes that a step's pictures are split into, to fit into memory."""
    evaluate_every: Count = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    mixed_precision: Precision = "no"
    """Type of the forward pass: float32 (`no`; `tf32` lets GPUs round factors), bfloat16, or float16 with loss scaling."""
    threads: Count | None = None
    """CPU threads of torch. By default torch's own choice."""
    output_dir: str | None = None
    """Root of the run folders <backbone>/seed<seed>; by default runs/<name>."""
    timeout_minutes: Positive = 10.0
    """How long a process waits for one that died or hangs before it ends."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: resume from the run folder's newest checkpoint if it has one; `never`: delete it and start from scratch."""
    data: Data
    model: Model
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _fits_together(self):
        late = [epoch for epoch in self.optim.milestones if epoch >= self.epochs and epoch >= 1]
        if late and self.optim.schedule == "step":
            raise ValueError(
                f"optim.milestones {late} lie beyond the last of {self.epochs} epochs; below 1 they are parts of the run"
            )
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(f"optim.warmup_epochs {self.optim.warmup_epochs:g} must be below epochs {self.epochs}")
        if self.grad_accum_steps > self.batch_size:
            raise ValueError(f"grad_accum_steps {self.grad_accum_steps} must not exceed batch_size {self.batch_size}")
        return self

    @property
    def method(self) -> str:
        """What sets runs apart in a report: the backbone's label."""
        return self.model.name

    @property
    def output_root(self) -> Path:
        """Where the files of this recipe's runs go."""
        return Path(self.output_dir or f"runs/{self.name}").expanduser()

    @property
    def run_dir(self) -> Path:
        """Where this run's files go."""
        return self.output_root / self.method / f"seed{self.seed}"

    def identity(self) -> dict[str, Any]:
        """The settings that decide a run's outcome, flat; two runs of equal identity may continue each other."""
        values = flatten(self.model_dump(), DetectionRecipe)
        if self.data.path is not None:
            values["data.path"] = str(Path(self.data.path).expanduser().resolve())
        values["model.backbone"] = resolved(self.model.backbone)
        return {
            key: value
            for key, value in values.items()
            if key not in _NO_OUTCOME and key.split(".")[0] not in ("tracking", "checkpoint")
        }


_NO_OUTCOME = {"name", "output_dir", "resume", "threads", "timeout_minutes", "data.workers", "model.label"}


def resolved(backbone: str) -> str:
    """A backbone's folder as an absolute path; a name as it is."""
    scheme, _, rest = backbone.rpartition(":")
    if scheme == "local-dir" or (not scheme and Path(backbone).expanduser().is_dir()):
        return ":".join(filter(None, [scheme, str(Path(rest).expanduser().resolve())]))
    return backbone


def default_label(section: Model) -> str:
    """A run's method, the folder or the model's name; `-untrained` after that of a timm model without weights."""
    scheme, _, rest = section.backbone.rpartition(":")
    path = Path(rest).expanduser()
    # A run's folder keeps its name once it is gone.
    if scheme == "local-dir" or (not scheme and (path.is_dir() or "/" in rest.removeprefix("timm/"))):
        # <method>/seed<seed>, or best/ in it
        parts = [part for part in path.resolve().parts if part != "best" and not part.startswith("seed")]
        return parts[-1]
    name = section.backbone.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    trained = section.pretrained or ":" in section.backbone
    return name if trained else f"{name}-untrained"
