"""Reading recipes: files and shipped names, with values of the command line over them, checked with an error of a line."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from . import presets
from .errors import InputError, nearest, reason
from .methods import METHOD_SECTIONS
from .recipe import Recipe, flatten, sections, settings
from .section import COMMAND_LINE, Section

# In a wheel the recipes lie inside the package, in a checkout beside it.
SHIPPED = Path(__file__).parent / "recipes"
if not SHIPPED.is_dir():
    SHIPPED = Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package, as `show` and `compare` take them."""
    paths = (path.relative_to(SHIPPED).with_suffix("") for path in SHIPPED.rglob("*.yaml"))
    # The sweep is wandb's, those of detection/ are read by `pskd-timm detect`; what lies deeper is of runs (results/, runs/).
    shipped = (path for path in paths if len(path.parts) <= 2 and path.parts[0] not in ("sweep", "detection"))
    return sorted(path.as_posix() for path in shipped)


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one (`digits`, `recipes/digits.yaml`, `cifar100/…`)."""
    if Path(name).is_file():
        return Path(name)
    shipped = name.removeprefix("recipes/").removesuffix(".yaml")
    if shipped in shipped_recipes():
        return SHIPPED / f"{shipped}.yaml"
    hint = nearest(shipped, shipped_recipes())
    hint = hint or f": neither a file nor one of {', '.join(shipped_recipes())}"
    raise InputError(f"no recipe {name!r}{hint}")


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML lets the second of two equal keys win without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        if other := [key for key in keys if not isinstance(key, str)]:
            mark = node.start_mark
            raise yaml.constructor.ConstructorError(None, None, f"the key {other[0]!r} is no text: quote it", mark)
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(map(str, twice))} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: type[Section] = Recipe) -> dict:
    """The mapping in a YAML file."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None
    if not isinstance(tree, dict):
        what = "empty" if tree is None else type(tree).__name__
        raise InputError(f"{path}: a recipe is a YAML mapping of settings, this is {what}")
    for name, value in tree.items():
        if name in sections(kind) and not isinstance(value, dict):
            raise InputError(f"{path}: {name} should be a section of settings ({name}: {{…}}), got {value!r}")
        if "." in name:
            raise InputError(f"{path}: write {name} as a section: {name.replace('.', ': {', 1)}: …}}")
    return tree


def _value(text):
    """A command-line value: lists, mappings and null as YAML, everything else as the text that pydantic converts."""
    if not isinstance(text, str) or not (text[:1] in "[{" or text in ("null", "None")):
        return text
    return None if text == "None" else _yaml_value(text)


def _yaml_value(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"cannot read {text!r}: write lists as [3, 4] and mappings as '{{width: 16}}'") from None


def _override(flat: dict, key: str, value, kind: type[Section]):
    """Set the dotted `key`, which may reach into a setting that is a mapping (model.kwargs.width)."""
    parent, _, name = key.rpartition(".")
    if key not in settings(kind) and parent in settings(kind):
        mapping = flat.get(parent) if isinstance(flat.get(parent), dict) else {}
        flat[parent] = {**mapping, name: _yaml_value(value) if isinstance(value, str) else value}
    else:
        flat[key] = value


def load_recipe(name: str, overrides: dict[str, Any] | None = None, kind: type[Section] = Recipe) -> Section:
    """The recipe of a file or shipped name, with settings replaced by `overrides`, by dotted name.

    Raises InputError that names the setting, what is wrong with it and where it came from.

    Example:
        >>> recipe = load_recipe("cifar100/preact_resnet18", {"method": "pskd", "pskd.alpha": 0.7})
    """
    path = find_recipe(str(name))
    written = read_yaml(path, kind)
    if kind is Recipe and written.get("task") == "detection":
        raise InputError(f"{path}: a recipe or run of a detector, which only detect, predict and report take")
    return with_overrides(written, overrides, str(path), default_name(path), kind)


def as_recipe(recipe: Recipe | str | Path, overrides: dict[str, Any] | None = None, **lists: Iterable) -> Recipe:
    """`recipe`, or the recipe of that file or shipped name, with `overrides` by dotted name.

    Raises InputError where it is none, and where one of `lists`, by the name of its argument, is no list.
    """
    if not isinstance(recipe, Recipe | str | Path):
        raise InputError(f"a recipe, a recipe's file or name is wanted, got {recipe!r:.60}")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise InputError(f"overrides should be settings by dotted name, {{'optim.lr': 0.05}}, got {overrides!r:.60}")
    for name, value in lists.items():
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise InputError(f"{name} should be a list: {name}=[{value!r}]")
    if not isinstance(recipe, Recipe):
        return load_recipe(str(recipe), overrides)
    return with_overrides(given(recipe), overrides, "the recipe", recipe.name) if overrides else recipe


def given(recipe: Recipe) -> dict:
    """The settings that `recipe` was given, as a recipe file would have them.

    Without what follows from others of them, TF-KD's constants and a preset's values, which then follow from changed ones too.
    """
    tree = {}
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if not isinstance(value, Section):
            tree |= {name: value} if name in recipe.model_fields_set else {}
            continue
        own = {key for key in value.model_fields_set if not recipe.source_of(f"{name}.{key}").startswith("preset ")}
        tree[name] = value.model_dump(include=own)
    # What was changed in place since: inside a list or mapping, over a preset's value, or a teacher without its constants.
    again = with_overrides(tree, None, "the recipe", recipe.name).model_dump()
    for name, value in recipe.model_dump().items():
        if isinstance(getattr(recipe, name), Section):
            tree[name] |= {key: own for key, own in value.items() if own != again[name][key]}
        elif value != again[name]:
            tree[name] = value
    return tree


def default_name(path: Path) -> str:
    """What the runs of a recipe file are filed under, where it does not say."""
    if path.resolve().is_relative_to(SHIPPED.resolve()):
        return "-".join(path.resolve().relative_to(SHIPPED.resolve()).with_suffix("").parts)
    return path.stem


def differing(recipe: Recipe) -> dict:
    """The settings that differ from the defaults, as the mapping of a recipe file that gives the same run.

    A preset is left out: its values are among them, and would fill in again where one was set back to the default.
    """
    return recipe.model_dump(exclude_defaults=True, exclude={"preset", "preset_of"})


# Settings that had another name before; files and command lines with it still mean the same.
FORMER_NAMES = {"accumulate": "grad_accum_steps", "augment.mix_share": "augment.mix_prob"}


def _current_names(flat: dict[str, Any], origin: str) -> dict[str, Any]:
    for key, name in FORMER_NAMES.items():
        if key in flat and name in flat:
            raise InputError(f"{origin}: {key} is what {name} was called before: give one of them")
    current = {FORMER_NAMES.get(key, key): value for key, value in flat.items()}
    # It said `full`, or `topk` beside store_topk.
    if current.pop("pskd.store_format", None) == "full":
        current.setdefault("pskd.store_topk", None)
    return current


def with_overrides(
    written: dict, overrides: dict[str, Any] | None, origin: str, name: str, kind: type[Section] = Recipe
) -> Section:
    """The recipe of the settings `written` in `origin` with `overrides` by dotted name laid over them.

    `kind` is its class: Recipe, or what another command takes instead.
    """
    flat = _current_names(flatten(written, kind), origin)
    sources = dict.fromkeys(flat, origin)
    for key, value in _current_names(flatten(overrides or {}, kind), COMMAND_LINE).items():
        _override(flat, key, _value(value), kind)
        parent = key.rpartition(".")[0]
        sources[parent if key not in settings(kind) and parent in settings(kind) else key] = COMMAND_LINE
    tree: dict[str, Any] = {key: {} for key, value in written.items() if value == {} and key in sections(kind)}
    for key, value in flat.items():
        section, _, setting = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[setting] = value
    tree.setdefault("name", name)
    recipe = _validated(tree, sources, origin, kind)
    if kind is Recipe and recipe.preset:
        for method in METHOD_SECTIONS:
            _fill_from_preset(tree, sources, method, recipe.published(method))
        recipe = _validated(tree, sources, origin, kind)
    recipe._sources = sources
    return recipe


FIRST_TOLD = {"extra_forbidden": 0, "missing": 2}  # kinds of pydantic's errors; 1 all others


def _validated(tree: dict, sources: dict[str, str], origin: str, kind: type[Section]) -> Section:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # A misspelt name first: what seems to be missing may be what it stands for.
        first = min(error.errors(), key=lambda each: FIRST_TOLD.get(each["type"], 1))
        raise InputError(_explain(first, sources, origin, kind)) from None


def _fill_from_preset(tree: dict, sources: dict[str, str], method: str, preset: presets.Preset | None):
    """Put a preset's values where neither file nor command line has said anything."""
    for setting, value in preset.values.items() if preset else ():
        if f"{method}.{setting}" not in sources:
            tree.setdefault(method, {})[setting] = value
            sources[f"{method}.{setting}"] = f"preset {preset.name} of {preset.of}: {preset.source}"


def _explain(error: dict, sources: dict[str, str], origin: str, kind: type[Section]) -> str:
    """One of pydantic's errors in a line."""
    parts = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-"))]
    key = ".".join(parts[:2] if parts and parts[0] in sections(kind) else parts[:1])
    where = sources.get(key, origin)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown setting {key!r}{nearest(key, [*sections(kind), *settings(kind)])}"
    if error["type"] == "missing":
        return f"{where}: {key} is missing ({_description(key, kind).rstrip('.')})"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if error["type"] == "string_pattern_mismatch":
        message = "should be a plain name of letters, digits, spaces and . _ + -"
    if error["type"] == "list_type":
        examples = settings(kind)[key].examples if key in settings(kind) else None
        message += f", written {examples[0] if examples else '[3, 4]'}"
    if error["type"] == "value_error" and key not in settings(kind):
        return f"{_origins(message, key, sources) or origin}: {key + ': ' if key else ''}{message}"
    if error["type"] == "value_error":
        return f"{where}: {key}: {message}"
    return f"{where}: {key} {message}, got {error['input']!r}"


def _origins(message: str, section: str, sources: dict[str, str]) -> str:
    """Where the settings that `message` names were set, those of its `section` without its name."""
    words = re.findall(r"[a-z_]+(?:\.[a-z_]+)?", message)
    named = [f"{section}.{word}" if section and "." not in word else word for word in words]
    return " and ".join(dict.fromkeys(sources[name] for name in named if name in sources))


def _description(key: str, kind: type[Section]) -> str:
    field = settings(kind).get(key)
    return field.description.split("\n")[0] if field is not None else "a section of the recipe"
