"""Every setting of a run on one page: typed, bounded, a sentence each. No torch here, so help and errors are instant."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator

from . import presets
from .effective import EffectiveLoss
from .errors import InputError, nearest
from .methods import METHOD_SECTIONS, MethodSection
from .section import Area, Count, Fraction, Names, NonNegative, Positive, Section, SourcedSection
from .tasks import TASKS
from .translation.section import Translation

# YAML 1.1 reads a bare `no` or `off` as false.
Precision = Annotated[
    Literal["no", "tf32", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
]
Compile = Annotated[
    Literal["off", "default", "max-autotune", "graphs"],
    BeforeValidator(lambda value: ("off", "default")[value] if isinstance(value, bool) else value),
]


class Data(Section):
    source: str | None = None
    """`digits` (ships with the package), `cifar10`, `cifar100`, `imagenet`, or the id of any image data set on the HF hub."""
    path: str | None = None
    """Local folder to read instead of the hub: Parquet files, a saved HF data set, or a folder of images per class."""
    image_column: str | None = None
    """Column of the images; by default the source's own, else `image`."""
    label_column: str | None = None
    """Column of the labels; by default the source's own, else `label`."""
    train_split: str = "train"
    """Name of the training split."""
    test_split: str | None = None
    """Name of the test split; by default `test`, `validation` or `val`, whichever there is."""
    test_fraction: Fraction = 0.0
    """Part of each class of the training split to set aside as the test split, where the data set has none."""
    test: bool = True
    """Score the test part at the end; `false` leaves it unread and scores the held-out part instead, as a search does."""
    image_size: Annotated[int, Field(ge=4)] | None = None
    """Height and width in pixels: the shorter side is resized, the centre kept; by default the size all images have."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Test images: the part of the resized shorter side that the centre keeps (0.875: 224 of 256 pixels)."""
    loading: Literal["resident", "streaming"] = "resident"
    """`resident`: all images decoded once and kept in memory; `streaming`: decoded for every batch by `workers` processes."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode for each rank when streaming; by default one for each core, eight at most."""
    shrink_to: Annotated[int, Field(ge=4)] | None = None
    """Streaming: training images whose shorter side is longer are resized to it once, and read from `cache_dir` thereafter."""
    damaged: Literal["fail", "skip"] = "fail"
    """A training image that cannot be decoded ends the run or is left out by name; one tested on or streamed held out ends it."""
    limit_train: Count | None = None
    """Train on so many samples only, taken evenly from all classes; of translations on so many pairs."""
    limit_test: Count | None = None
    """Test on so many samples only, taken evenly from all classes; of translations on so many pairs of each test part."""
    holdout_fraction: Fraction = 0.0
    """Part of each class of the training samples, or of the pairs, to hold out and choose the best epoch on."""
    label_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Part of the training labels to replace by another class."""
    gaussian_noise: NonNegative = 0.0
    """Noise added once to every image, train and test: standard deviation as a part of the pixel range, then clipped."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is fixed about the data (parts, label noise, image noise); the run's own seed does not touch it."""
    cache_dir: str | None = None
    """Folder of the decoded or smaller images; by default $PSKD_TIMM_CACHE, else ~/.cache/pskd_timm."""

    @model_validator(mode="after")
    def _names_something(self):
        if self.source is None and self.path is None:
            raise ValueError(
                "name a data set: `source` (digits, cifar10, cifar100, imagenet or a hub id) or `path` (a local folder)"
            )
        if not self.test and not self.holdout_fraction:
            raise ValueError("test false needs holdout_fraction: else there is nothing to score")
        if self.loading == "streaming" and self.image_size is None:
            raise ValueError("loading streaming needs image_size")
        if self.loading == "streaming" and self.gaussian_noise:
            raise ValueError("gaussian_noise needs loading resident")
        if self.shrink_to and self.loading != "streaming":
            raise ValueError("shrink_to needs loading streaming: resident images are resized once, to image_size")
        if self.shrink_to and self.shrink_to < self.image_size:
            raise ValueError(f"shrink_to {self.shrink_to} is less than image_size {self.image_size}")
        if self.crop_pct < 1 and self.image_size is None:
            raise ValueError("crop_pct needs image_size")
        if self.source == "digits" and self.path is not None:
            raise ValueError(
                "source digits ships with the package and takes no path: for data of your own leave source out"
            )
        return self


class Augment(Section):
    random_resized_crop: Annotated[
        Annotated[list[Area], Field(min_length=2, max_length=2)] | None, Field(examples=["[0.08, 1.0]"])
    ] = None
    """Range of the area of a random box resized to the image's size, [0.08, 1] on ImageNet (ratio 3/4 … 4/3)."""
    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Random crop of the image's own size after padding by so many zero pixels a side; 0 turns it off."""
    hflip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Probability of mirroring an image left–right."""
    color_jitter: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Brightness, contrast and saturation are scaled by up to 1 ± this, in random order."""
    lighting: NonNegative = 0.0
    """Standard deviation of the noise along ImageNet's principal colours (0.1 in the AlexNet way)."""
    auto_augment: str | None = None
    """timm's policy for each decoded image: `rand-m9-mstd0.5` (RandAugment), `augmix-m3`, `original` (streaming only)."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side in pixels of a square, anywhere on the image, that is set to the mean colour; 0 turns it off."""
    random_erasing: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Probability of setting a box of 2 to 33 % of the image, ratio 0.3 … 3.3, to the mean colour (Zhong et al., AAAI 2020)."""
    mixup: NonNegative = 0.0
    """a of the Beta(a, a) that mixup's λ is drawn from (timm's usual 0.2 … 0.8); 0 turns it off."""
    cutmix: NonNegative = 0.0
    """a of the Beta(a, a) that cutmix's λ is drawn from (usually 1); 0 turns it off; with mixup half each."""
    mix_prob: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Part of the batches that mixup and cutmix mix; the others renew the predictions that PS-KD stores."""
    mean: Annotated[
        Annotated[list[float], Field(min_length=3, max_length=3)] | None, Field(examples=["[0.485, 0.456, 0.406]"])
    ] = None
    """Channel means to subtract, in units of the pixel range; by default the model's own (timm's default_cfg)."""
    std: Annotated[
        Annotated[list[Positive], Field(min_length=3, max_length=3)] | None, Field(examples=["[0.229, 0.224, 0.225]"])
    ] = None
    """Channel standard deviations to divide by, in units of the pixel range; by default the model's own."""


class Model(Section):
    name: str
    """Any timm model, this package's cifar_* networks among them (`pskd-timm models` lists those)."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    small_input: bool = False
    """Replace the large stem of an ImageNet network (resnet, densenet, convnext, efficientnet) by one of stride 1."""
    kwargs: dict[str, Any] = {}
    """Further arguments of the model, as `timm.create_model` takes them: {drop_rate: 0.1}."""
    channels_last: bool = False
    """Lay tensors out as NHWC, which convolutions on GPUs (and often CPUs) run faster on."""
    compile: Compile = "off"
    """torch.compile in its `default` or `max-autotune` mode, or `graphs`: steps replayed as one CUDA graph (one GPU)."""
    sync_bn: bool = False
    """Take batch norm's statistics over all processes (GPUs only)."""


class Optim(Section):
    name: str = "sgd"
    """`sgd` (torch's, with `momentum` and `nesterov`) or any optimizer of timm by name (`adamw`, `lion`, …)."""
    lr: Positive = 0.1
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of momentum (SGD)."""
    weight_decay: NonNegative = 5e-4
    """Weight decay."""
    betas: Annotated[
        Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None, Field(examples=["[0.9, 0.98]"])
    ] = None
    """β₁ and β₂ of Adam and its kin; by default the optimizer's own."""
    decay_norm_and_bias: bool = True
    """Decay norm weights and biases too, as the paper's code does."""
    schedule: Literal["step", "cosine", "constant", "inverse_sqrt"] = "step"
    """How `lr` falls: by `decay_rate` at `milestones`, along half a cosine to `min_lr`, not at all, as √(warmup_steps/step)."""
    milestones: list[Positive] = [0.5, 0.75]
    """When the learning rate drops: below 1 a part of the run, from 1 on an epoch."""
    decay_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Factor of each drop."""
    min_lr: NonNegative = 0.0
    """Where the cosine ends."""
    warmup_epochs: NonNegative = 0.0
    """Epochs over which the learning rate rises linearly to its peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The same in steps, in place of `warmup_epochs`; `inverse_sqrt` falls from there."""
    clip_grad_norm: Positive | None = None
    """Largest norm of the gradient; longer gradients are scaled down to it."""

    @model_validator(mode="after")
    def _warms_up_once(self):
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("warmup_epochs and warmup_steps say the same: give one of them")
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("schedule inverse_sqrt needs warmup_steps, from which the learning rate falls")
        return self


class Checkpoint(Section):
    every_epochs: Count = 1
    """Save after every so many epochs, and after the last."""
    every_minutes: Positive | None = None
    """Save in mid-epoch too, once so many minutes have passed; several processes look every `tracking.log_every` steps."""
    every_steps: Count | None = None
    """Save in mid-epoch too, after every so many steps of the run."""
    keep: Count = 1
    """How many of the newest checkpoints to keep, each with the best epoch's weights."""


class Tracking(Section):
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """Weights & Biases: not at all, into the run's folder, or to the server (which needs an account)."""
    project: str = "pskd_timm"
    """Project that wandb files the run under."""
    entity: str | None = None
    """User or team that wandb files the run under."""
    tags: Annotated[list[str], Field(examples=["[first try]"])] = []
    """Tags that wandb gives the run beside its data set, network and seed."""
    notes: str | None = None
    """Notes that wandb keeps with the run."""
    artifact: bool = False
    """Hand the weights of the last and the best epoch to wandb as an artifact."""
    log_every: Count = 50
    """Steps between two reads of the running loss, its terms and the gradient's norm."""
    profile_steps: Annotated[int, Field(ge=0)] = 0
    """Steps, after the first 23, whose time torch's profiler takes apart in profile.txt and profile.json.gz."""


class RecipeBase(SourcedSection):
    name: Annotated[str, Field(pattern=r"^(\w[\w .+-]*)?$")] = ""
    """Name of the runs' folder; by default the recipe file's name."""
    task: str = "images"
    """What is trained: `images`, or another line of the tasks' table."""
    method: Literal[tuple(METHOD_SECTIONS)] = "pskd"
    """Training method."""
    preset: Literal["official", "pskd"] | None = None
    """Published constants for the methods' sections: their own authors' (`official`) or those of PS-KD's table (`pskd`)."""
    preset_of: Names = []
    """Where nothing is published for this data set and network: those whose preset to take over (cifar100/resnet18)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes everything random about the run."""
    epochs: Count
    """Length of the run."""
    batch_size: Count = 128
    """Samples a step over all processes together."""
    grad_accum_steps: Count = 1
    """Forward and backward passes that a step's samples are split into, to fit into memory."""
    mixed_precision: Precision = "no"
    """Type of the forward pass: float32 (`no`; `tf32` lets GPUs round factors), bfloat16, or float16 with loss scaling."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Evaluate and keep a running mean of the weights: its decay, at most 1 − (s + 1)^(−2/3) in step s (timm's ModelEmaV3)."""
    threads: Count | None = None
    """CPU threads of torch; one is often fastest for small networks. By default torch's own choice."""
    output_dir: str | None = None
    """Root of the run folders <method>/seed<seed>; by default runs/<name>."""
    keep_probabilities: Literal["auto", "float32", "float16", "none"] = "auto"
    """What is kept of each evaluated image's probabilities: all, their logarithms in 16 bits, or none; `auto`: all up to 1 GB."""
    timeout_minutes: Positive = 10.0
    """How long a process waits for one that died or hangs before it ends."""
    init_from: str | None = None
    """File to start from: weights (.pth, .safetensors), or a checkpoint of the PS-KD authors' code, which is continued."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: resume from the run folder's newest checkpoint if it has one; `never`: delete it and start from scratch."""
    data: Data
    augment: Augment = Augment()
    model: Model
    optim: Optim = Optim()
    translation: Translation = Translation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _fits_together(self):
        late = [epoch for epoch in self.optim.milestones if epoch >= self.epochs and epoch >= 1]
        if late and self.optim.schedule == "step":
            raise ValueError(
                f"optim.milestones {late} lie beyond the last of {self.epochs} epochs; below 1 they are parts of the run"
            )
        if self.augment.auto_augment and self.data.loading != "streaming":
            raise ValueError("augment.auto_augment needs data.loading streaming, where workers hold single images")
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} must be below epochs {self.epochs}: "
                f"for so short a run --optim.warmup_epochs {self.epochs / 10:g}, or 0"
            )
        for name in METHOD_SECTIONS:
            if conflict := getattr(self, name).conflict(self.epochs):
                raise ValueError(conflict)
        if self.task not in TASKS:
            raise ValueError(f"task: no task {self.task!r}{nearest(self.task, TASKS)} (of {', '.join(TASKS)})")
        if self.preset_of and self.preset is None:
            raise ValueError("preset_of needs preset (official or pskd)")
        if unknown := [of for of in self.preset_of if of not in presets.PLACES]:
            raise ValueError(f"preset_of: nothing published of {unknown[0]!r}: there is {', '.join(presets.PLACES)}")
        if self.grad_accum_steps > self.batch_size:
            raise ValueError(f"grad_accum_steps {self.grad_accum_steps} must not exceed batch_size {self.batch_size}")
        if self.grad_accum_steps > 1 and self.model.compile == "max-autotune":
            # https://github.com/pytorch/pytorch/issues/169545: its CUDA graphs write gradients over those to be added to.
            raise ValueError(
                "grad_accum_steps does not go with model.compile max-autotune: default and graphs add gradients up"
            )
        return self

    @property
    def output_root(self) -> Path:
        """Where the files of this recipe's runs go."""
        return Path(self.output_dir or f"runs/{self.name}").expanduser()

    @property
    def run_dir(self) -> Path:
        """Where this run's files go."""
        return self.output_root / self.method / f"seed{self.seed}"

    def published(self, method: str, name: str | None = None) -> presets.Preset | None:
        """The published constants of `method` under preset `name` (by default the recipe's) that fit this recipe."""
        return presets.fitting(name or self.preset, *self._taught(method))

    @property
    def method_section(self) -> MethodSection:
        """The settings of the recipe's method."""
        return getattr(self, self.method)

    def effective_loss(self, num_classes: int, epoch: int | None = None) -> EffectiveLoss:
        """What the method's loss amounts to with `num_classes` classes, in `epoch` (0-based; by default the last)."""
        return self.method_section.effective_loss(num_classes, self.epochs, self.epochs - 1 if epoch is None else epoch)

    @property
    def methods(self) -> list[str]:
        """The methods that the recipe's task has: those that need a second input for each go with images alone."""
        return [name for name in METHOD_SECTIONS if self.task == "images" or not getattr(self, name).needs_partners]

    def check_method(self, method: str):
        """Raise InputError where `method` does not go with the rest: the task, mixed inputs, its preset."""
        section = getattr(self, method)
        if method not in self.methods:
            inputs = {"class": "two inputs of one class", "view": "two views of an input"}[section.needs_partners]
            raise InputError(
                f"method {method} compares {inputs}, which task {self.task} has not: "
                f"it goes with {', '.join(self.methods)}"
            )
        if self.task != "images" and section.trained_teacher:
            raise InputError(
                f"{method}.teacher {section.trained_teacher}: a trained teacher is a network for images: with task {self.task} "
                f"leave it virtual, or leave {method} out"
            )
        mixes = self.augment.mixup or self.augment.cutmix
        if mixes and not section.takes_mixed_inputs:
            raise InputError(
                f"augment.mixup and augment.cutmix do not go with {method}: {section.why_unmixed}: "
                f"leave {method} out of --methods, or set both to 0"
            )
        if mixes and self.augment.mix_prob == 1 and section.learns_unmixed:
            without = f", or {method}.teacher snapshot" if section.store_settings else ""
            raise InputError(
                "augment.mix_prob 1 mixes every batch, and no stored prediction is ever renewed: "
                f"choose one below 1{without}"
            )
        # A preset must be public for the data set and the network.
        if self.preset and type(section).model_fields and not self.published(method):
            raise InputError(presets.refusal(self.preset, *self._taught(method)))

    def _taught(self, method: str) -> tuple[str, str, list[str]]:
        own = presets.place(self.data.source, (self.model.name, self.model.small_input))
        return method, getattr(self, method).variant, [own, *self.preset_of]

    def identity(self) -> dict[str, Any]:
        """The settings that decide a run's outcome, flat; two runs of equal identity may continue each other."""
        values = flatten(self.model_dump())
        if self.data.path is not None:
            values["data.path"] = str(Path(self.data.path).expanduser().resolve())
        sections = {name for name in METHOD_SECTIONS if name != self.method}
        return {
            k: v
            for k, v in values.items()
            if k not in _NO_OUTCOME and k.split(".")[0] not in sections | {"tracking", "checkpoint"}
        }


# One section a method; so a method needs no line here.
Recipe = create_model(
    "Recipe",
    __base__=RecipeBase,
    __module__=__name__,
    **{name: (section, section()) for name, section in METHOD_SECTIONS.items()},
)

_NO_OUTCOME = {
    "name",
    "preset",
    "preset_of",
    "output_dir",
    "keep_probabilities",
    "resume",
    "threads",
    "timeout_minutes",
    "data.cache_dir",
    "data.workers",
    "pskd.store_device",
}


def sections(recipe: type[Section] = Recipe) -> dict[str, type[Section]]:
    """The sections of a recipe by name."""
    return {
        name: f.annotation
        for name, f in recipe.model_fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
    }


def settings(recipe: type[Section] = Recipe) -> dict[str, Any]:
    """Every setting by its dotted name, with pydantic's description of it."""
    found = {name: field for name, field in recipe.model_fields.items() if name not in sections(recipe)}
    for section, cls in sections(recipe).items():
        found |= {f"{section}.{name}": field for name, field in cls.model_fields.items()}
    return found


def flatten(tree: dict, recipe: type[Section] = Recipe) -> dict[str, Any]:
    """{"optim": {"lr": 0.1}} as {"optim.lr": 0.1}; a dictionary that is a setting's value stays one."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key in sections(recipe):
            flat |= {f"{key}.{name}": of_section for name, of_section in value.items()}
        else:
            flat[key] = value
    return flat


def data_name(section: Section) -> str:
    """What people call a data section's data set: a well-known name, of which `path` may be a copy, a hub id, or a folder's."""
    source, path = section.source, section.path
    return source if path is None or (source and "/" not in source) else Path(path).resolve().name
