"""What a recipe says, where each value comes from, and what the run will cost, before any training."""

from .data.sources import Sizes, known_sizes, open_tables
from .progress import readable
from .recipe import InputError, Recipe, find_recipe, flatten, read_yaml, shipped_recipes


def sources_table(recipe: Recipe):
    """A rich table of every setting of the recipe's own method, its value and its source."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"recipe {recipe.name}", title_justify="left")
    for header in ("setting", "value", "source"):
        table.add_column(header, overflow="fold")
    identity = recipe.identity()
    for key, value in flatten(recipe.model_dump()).items():
        other_method = key not in identity and key.split(".")[0] in (
            "baseline",
            "label_smoothing",
            "cskd",
            "tfkd",
            "pskd",
        )
        if not other_method:
            source = recipe.source_of(key)
            table.add_row(key, escape(str(value)), escape(source), style="dim" if source == "default" else None)
    return table


def models_table():
    """A rich table of this package's networks and the paper's: parameters, MACs, the paper's name, the recipe."""
    import timm
    from rich.table import Table

    from .models import PAPER_NAMES
    from .models.count import parameters_and_macs

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
        known = Sizes(len(train.dataset), len(test.dataset) if test else 0, len(train.class_names), None)
    num_train = min(known.num_train, recipe.data.limit_train or known.num_train)
    num_train -= round(num_train * recipe.data.holdout_fraction)
    num_test = min(known.num_test, recipe.data.limit_test or known.num_test)
    return Sizes(num_train, num_test, known.num_classes, recipe.data.image_size or known.image_size)


def cost_lines(recipe: Recipe) -> list[str]:
    """Steps, memory of the prediction store and size of the data, a line each."""
    from .order import num_batches
    from .store import store_bytes

    try:
        size = sizes(recipe)
    except InputError as error:
        return [f"cost: unknown until the data can be read: {error}"]
    steps = num_batches(size.num_train, recipe.batch_size)
    lines = [
        f"data: {size.num_train:,} training samples, {size.num_test:,} test samples, {size.num_classes} classes",
        f"steps: {steps} an epoch × {recipe.epochs} epochs = {steps * recipe.epochs:,}",
    ]
    if recipe.method == "pskd":
        shape = (size.num_train, size.num_classes, recipe.pskd.store_dtype)
        per_rank = {n: store_bytes(*shape, n, recipe.pskd.store_topk) for n in (1, 2, 8)}
        parts = [f"{n} rank{'s' * (n > 1)} {readable(count)}" for n, count in per_rank.items()]
        lines.append(f"prediction store per rank: {', '.join(parts)}")
    else:
        lines.append(f"prediction store: none with {recipe.method}")
    if recipe.data.loading == "streaming":
        lines.append("data in memory: none, images are decoded for every batch")
    elif side := size.image_size:
        images = readable((size.num_train + size.num_test) * 3 * side * side)
        lines.append(f"data in memory: {images} (uint8, {side}×{side})")
    else:
        lines.append("data in memory: known once images are decoded (data.image_size is not set)")
    return lines
