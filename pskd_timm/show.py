"""What a recipe says, where each value comes from, and what the run will cost, before any training."""

from . import presets
from .data.sources import Sizes, known_sizes, open_tables
from .errors import InputError
from .methods import METHOD_SECTIONS
from .methods.sections import Scale
from .optim import unread
from .progress import readable
from .recipe import Recipe, flatten
from .recipe_files import find_recipe, read_yaml, shipped_recipes
from .tasks import check_read, is_read, open_task


def sources_table(recipe: Recipe):
    """A rich table of every setting that the run reads, its value and its source."""
    from rich.markup import escape
    from rich.table import Table

    vain = unread(recipe.optim)
    table = Table(title=f"recipe {recipe.name}", title_justify="left")
    for header in ("setting", "value", "source"):
        table.add_column(header, overflow="fold")
    for key, value in flatten(recipe.model_dump()).items():
        section = key.split(".")[0]
        if is_read(key, recipe.task) and (section not in METHOD_SECTIONS or section == recipe.method):
            source = source_line(recipe, key, value) + (f"; {vain[key]} does not read it" if key in vain else "")
            quiet = recipe.source_of(key) == "default"
            table.add_row(key, escape(str(value)), escape(source), style="dim" if quiet else None)
    return table


def source_line(recipe: Recipe, key: str, value) -> str:
    """Where a value comes from; for a constant of a method also who published it, where somebody did."""
    source = recipe.source_of(key)
    if source == "default" and key in presets.DEFAULTS:
        return f"default: {presets.DEFAULTS[key]}"
    method, _, setting = key.partition(".")
    if method in METHOD_SECTIONS and not source.startswith("preset "):
        for name in ("official", "pskd"):
            there = recipe.published(method, name)
            if there and there.values.get(setting) == value:
                return f"{source} (as in preset {name}: {there.source})"
    return source


def run_lines(recipe: Recipe) -> list[str]:
    """What the loss of the recipe's method amounts to, and what the run will cost."""
    if recipe.task == "images":
        check_read(recipe)
        return loss_lines(recipe) + cost_lines(recipe)
    task = open_task(recipe)
    return recipe.effective_loss(task.num_classes).lines(recipe.optim.lr) + task.cost_lines()


def loss_lines(recipe: Recipe) -> list[str]:
    """What the loss of the recipe's method amounts to; nothing where the number of classes is not known yet."""
    try:
        num_classes = sizes(recipe).num_classes
    except InputError:
        return []
    return recipe.effective_loss(num_classes).lines(recipe.optim.lr)


def models_table():
    """A rich table of this package's networks and the paper's: parameters, MACs, the paper's name, the recipe."""
    import timm
    from rich.table import Table

    from .models.count import parameters_and_macs
    from .reports.paper import PAPER_NAMES

    recipes = {read_yaml(find_recipe(name))["model"]["name"]: name for name in shipped_recipes()}
    title = "parameters and multiply-adds of one image, 100 classes (ImageNet's networks: 1000)"
    table = Table(title=title, title_justify="left")
    for header in ("model", "parameters", "MACs", "in the paper", "recipe"):
        table.add_column(header, justify="right" if header in ("parameters", "MACs") else "left", no_wrap=True)
    for name in dict.fromkeys([*timm.list_models("cifar_*"), *PAPER_NAMES]):
        parameters, macs = parameters_and_macs(name, 100 if name.startswith("cifar_") else 1000)
        table.add_row(name, f"{parameters:,}", f"{macs:,}", PAPER_NAMES.get(name, ""), recipes.get(name, ""))
    return table


def sizes(recipe: Recipe) -> Sizes | None:
    """How large the data set is: as published for the well-known ones, else from opening it (nothing is decoded)."""
    known = known_sizes(recipe.data)
    if known is None:
        train, test = open_tables(recipe.data)
        known = Sizes(len(train), len(test) if test else 0, len(train.class_names), None)
    num_train = min(known.num_train, recipe.data.limit_train or known.num_train)
    num_train -= round(num_train * recipe.data.holdout_fraction)
    num_test = min(known.num_test, recipe.data.limit_test or known.num_test)
    return Sizes(num_train, num_test, known.num_classes, recipe.data.image_size or known.image_size)


def cost_lines(recipe: Recipe) -> list[str]:
    """Steps, memory of the prediction store, what a teacher costs, and size of the data, a line each."""
    from .order import num_batches
    from .store import store_bytes

    try:
        size = sizes(recipe)
    except InputError as error:
        return [f"cost: unknown until the data can be read: {error}"]
    steps = num_batches(size.num_train, recipe.batch_size)
    unseen = ", less training images that turn out damaged" if recipe.data.damaged == "skip" else ""
    lines = [
        f"data: {size.num_train:,} training samples, {size.num_test:,} test samples, {size.num_classes} classes{unseen}",
        f"steps: {steps} an epoch × {recipe.epochs} epochs = {steps * recipe.epochs:,}",
    ]
    section = recipe.method_section
    if section.store_settings is None:
        lines.append(f"prediction store: none with {recipe.method}")
    else:
        dtype, topk = section.store_settings
        per_rank = {n: store_bytes(size.num_train, size.num_classes, dtype, n, topk) for n in (1, 2, 8)}
        parts = [f"{n} rank{'s' * (n > 1)} {readable(count)}" for n, count in per_rank.items()]
        lines.append(f"prediction store per rank: {', '.join(parts)} (of several: its share and the rows it visits)")
    mixes = recipe.augment.mixup or recipe.augment.cutmix
    unmixed = 1.0 - recipe.augment.mix_prob if mixes else 1.0
    scale = Scale(size.num_train, size.num_classes, recipe.epochs, unmixed, lambda: network_size(recipe, size))
    lines += section.cost_lines(scale)
    if recipe.data.loading == "streaming":
        lines.append("data in memory: none, images are decoded for every batch")
    elif side := size.image_size:
        images = readable((size.num_train + size.num_test) * 3 * side * side)
        lines.append(f"data in memory: {images} (uint8, {side}×{side})")
    else:
        lines.append("data in memory: known once images are decoded (data.image_size is not set)")
    return lines


def network_size(recipe: Recipe, size: Sizes) -> str:
    """How much memory the network's weights take once more, for people."""
    from .models.build import create_model

    if size.image_size is None:
        return "the network's weights once more"
    section = recipe.model.model_copy(update={"pretrained": False})
    model = create_model(section, size.num_classes, (size.image_size, size.image_size))
    return readable(sum(tensor.nbytes for tensor in model.state_dict().values()))
