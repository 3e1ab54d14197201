"""Published settings and what they amount to: losses and gradients against the formulas, written out here once more."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Echo, cross_entropy, kl, softmax
from timm import create_model

from pskd_timm import METHODS, Batch, InputError, load_recipe
from pskd_timm.cli import main
from pskd_timm.methods.sections import SHORT_RUN, alpha_at
from pskd_timm.presets import DEFAULTS, PRESETS
from pskd_timm.progress import readable
from pskd_timm.recipe import METHOD_SECTIONS, sections
from pskd_timm.recipe_files import as_recipe

K, B = 100, 6


class Reversed(Echo):
    """A teacher with an opinion of its own."""

    def forward(self, x):
        return x.flip(1)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, K)) * 2, rng.integers(0, K, B), rng.normal(size=(B, K)) * 2


def recipe_of(method, **settings):
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return load_recipe("cifar100/densenet121", {"method": method, **settings})


def taught(recipe, num_samples=B):
    """The recipe's method, set up for K classes; a trained teacher is `Reversed`."""
    section = getattr(recipe, recipe.method).model_dump()
    if section.get("teacher") == "trained":
        method = METHODS["tfkd"](**{**section, "teacher": Reversed(K)})
    else:
        method = METHODS[recipe.method].from_section(section)
    method.setup(num_samples=num_samples, num_classes=K, num_epochs=recipe.epochs, device="cpu")
    method.begin_epoch(recipe.epochs - 1, torch.arange(num_samples))
    return method


def loss_of(recipe, z, labels, partners):
    batch = Batch(*map(torch.tensor, (z, labels, np.arange(B), partners)))
    return taught(recipe).loss(Echo(K), batch)[0].item()


def test_every_constant_of_a_method_says_where_its_default_comes_from():
    constants = {f"{method}.{name}" for method in METHOD_SECTIONS for name in sections()[method].model_fields}
    assert set(DEFAULTS) == constants
    kinds = ("paper", "authors' code", "maintainers' answer", "third party", "ours")
    assert all(source.startswith(kinds) for source in [*DEFAULTS.values(), *(p.source for p in PRESETS)])


# α, T, m as released for CIFAR-100 (Yuan et al., their repository); where no m is released, K.
REG = {"resnet18": (0.1, 20, 100), "densenet121": (0.1, 40, 100), "resnext29": (0.5, 40, 100)}
SELF = {
    "resnet18": (0.95, 6, 50),
    "densenet121": (0.9, 20, 50),
    "resnext29": (0.9, 20, 100),
    "mobilenetv2": (0.95, 20, 1),
    "shufflenetv2": (0.95, 20, 1),
}


@pytest.mark.parametrize("network", REG)
def test_tfkds_preset_with_the_virtual_teacher_is_the_released_loss(problem, network):
    z, labels, partners = problem
    alpha, temperature, m = REG[network]
    q = np.where(np.eye(K)[labels] == 1, 0.99, 0.01 / (K - 1))
    expected = (1 - alpha) * cross_entropy(np.eye(K)[labels], z)
    expected += alpha * m * kl(softmax(q / temperature), softmax(z)) / K
    recipe = recipe_of("tfkd", preset="official", preset_of=f"cifar100/{network}", model__name="resnet34")
    assert loss_of(recipe, z, labels, partners) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("network", SELF)
def test_tfkds_preset_with_a_trained_teacher_is_the_released_loss(problem, network):
    z, labels, partners = problem
    alpha, temperature, m = SELF[network]
    expected = (1 - alpha) * cross_entropy(np.eye(K)[labels], z)
    expected += alpha * m * temperature**2 * kl(softmax(z[:, ::-1] / temperature), softmax(z / temperature)) / K
    of = {"preset": "official", "preset_of": f"cifar100/{network}", "model__name": "resnet34"}
    recipe = recipe_of("tfkd", tfkd__teacher="trained", **of)
    assert loss_of(recipe, z, labels, partners) == pytest.approx(expected, rel=1e-12)


def with_partners(weight):
    return lambda y, z, b: cross_entropy(y, z) + weight * 16 * kl(softmax(b / 4), softmax(z / 4))


@pytest.mark.parametrize(
    ("preset", "method", "of", "expected"),
    [
        ("official", "cskd", "cifar100", with_partners(1)),
        ("official", "cskd", "fine_grained", with_partners(3)),
        ("official", "label_smoothing", "imagenet", lambda y, z, b: cross_entropy(0.9 * y + 0.1 / K, z)),
        ("pskd", "label_smoothing", "cifar100", lambda y, z, b: cross_entropy(0.9 * y + 0.1 / K, z)),
    ],
)
def test_the_other_methods_presets_are_their_authors_losses(problem, preset, method, of, expected):
    z, labels, partners = problem
    recipe = load_recipe("digits", {"method": method, "preset": preset, "preset_of": of})
    assert loss_of(recipe, z, labels, partners) == pytest.approx(expected(np.eye(K)[labels], z, partners), rel=1e-12)


def test_pskds_preset_follows_the_data_set():
    chosen = {"preset": "official", "preset_of": "imagenet"}
    assert load_recipe("digits", chosen).pskd.alpha == 0.3
    assert recipe_of("pskd", **chosen).pskd.alpha == 0.8  # the data set's own goes first


def test_the_command_line_lies_over_the_file_the_file_over_the_preset_and_the_preset_over_the_default():
    recipe = recipe_of("tfkd", preset="official", tfkd__alpha="0.3", pskd__alpha_schedule="cosine")
    assert (recipe.tfkd.alpha, recipe.tfkd.temperature) == (0.3, 40)
    assert recipe.source_of("tfkd.alpha") == "command line"
    assert recipe.source_of("tfkd.temperature") == "preset official of cifar100/densenet121: authors' code"
    assert recipe.source_of("tfkd.multiplier") == "default"
    assert recipe.pskd.alpha_schedule == "cosine"
    assert recipe.source_of("pskd.alpha").endswith("densenet121.yaml")


@pytest.mark.parametrize(
    "start",
    [{}, {"tfkd.alpha": "null"}, {"tfkd.temperature": "9"}, {"preset": "official", "preset_of": "cifar100/resnet18"}],
)
@pytest.mark.parametrize(
    "change",
    [
        {"tfkd.teacher": "somewhere"},
        {"preset": "official", "preset_of": "cifar100/densenet121"},
        {"preset": None, "preset_of": []},
        {"optim.lr": 0.3},
    ],
)
def test_settings_laid_over_a_recipe_give_what_they_give_over_its_file(start, change):
    over = as_recipe(load_recipe("digits", start), change)
    assert over.model_dump() == load_recipe("digits", start | change).model_dump()


def test_what_is_set_in_place_stays_where_settings_are_laid_over_it():
    recipe = load_recipe("digits", {"preset": "official", "preset_of": "imagenet"})
    recipe.optim.lr, recipe.pskd.alpha, recipe.tfkd.alpha = 0.7, 0.45, 0.1
    recipe.model.kwargs["width"] = 5
    over = as_recipe(recipe, {"tfkd.teacher": "somewhere", "epochs": 3})
    assert over.model.kwargs["width"] == 5
    assert (over.optim.lr, over.pskd.alpha, over.tfkd.alpha, over.epochs) == (0.7, 0.45, 0.1, 3)


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("tfkd", {"preset": "pskd"}, "what it used for tfkd is not public"),
        (
            "cskd",
            {"preset": "pskd"},
            "what it used for cskd is not public; there is one for baseline, label_smoothing, pskd",
        ),
        (
            "tfkd",
            {"preset": "official"},
            "virtual teacher on digits/.*cifar100/densenet121.*--preset_of cifar100/resnet18",
        ),
        ("label_smoothing", {"preset": "official"}, "there is imagenet"),
    ],
)
def test_what_nobody_published_is_refused_with_what_there_is(method, settings, says):
    recipe = load_recipe("digits", {"method": method, **settings})
    with pytest.raises(InputError, match=says) as error:
        recipe.check_method(method)
    assert "\n" not in str(error.value)
    load_recipe("digits", settings).check_method("baseline")


@pytest.mark.parametrize("settings", [{"preset": "official", "preset_of": "mnist"}, {"preset_of": "cifar100"}])
def test_a_preset_of_something_unknown_or_of_nothing_is_refused(settings):
    with pytest.raises(InputError, match="preset_of"):
        load_recipe("digits", settings)


# (method, settings): those whose effective loss has an equivalent label smoothing.
SMOOTHED = [
    ("label_smoothing", {"label_smoothing__epsilon": 0.1}),
    ("label_smoothing", {"label_smoothing__epsilon": 0.1, "label_smoothing__spread": "others"}),
    ("tfkd", {}),
    ("tfkd", {"tfkd__alpha": 0.5, "tfkd__temperature": 2.0}),
    ("tfkd", {"tfkd__alpha": 0.5, "tfkd__temperature": 40.0, "tfkd__multiplier": 1.0}),
    ("tfkd", {"tfkd__multiplier": 2.0, "tfkd__reduction": "batchmean"}),
]


def gradient(loss, z):
    return torch.autograd.grad(loss, z)[0].numpy()


@pytest.mark.parametrize(("method", "settings"), SMOOTHED)
def test_the_gradient_is_that_of_the_stated_label_smoothing_times_the_stated_scale(problem, method, settings):
    recipe = recipe_of(method, **settings)
    stated = recipe.effective_loss(K)
    z, labels = torch.tensor(problem[0], requires_grad=True), torch.tensor(problem[1])
    found = gradient(taught(recipe).loss(Echo(K), Batch(z, labels, torch.arange(B)))[0], z)
    same = stated.gradient_scale * F.cross_entropy(z, labels, label_smoothing=stated.smoothing)
    assert found == pytest.approx(gradient(same, z), rel=1e-9, abs=1e-15)


def test_with_m_of_k_the_virtual_teacher_is_label_smoothing_with_alpha_for_epsilon():
    stated = recipe_of("tfkd").effective_loss(100)
    assert stated.smoothing == pytest.approx(0.1, rel=1e-3) and stated.gradient_scale == pytest.approx(1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("tfkd", {"tfkd__teacher": "trained"}),
        ("tfkd", {"tfkd__teacher": "trained", "tfkd__temper_student": False, "tfkd__temperature": 1.0}),
        ("tfkd", {"tfkd__temper_student": True}),
        ("cskd", {"cskd__weight": 3.0}),
        ("pskd", {}),
    ],
)
def test_the_gradient_of_small_logits_is_that_of_the_stated_weights(problem, method, settings):
    recipe = recipe_of(method, **settings)
    stated = recipe.effective_loss(K)
    scale = 1e-4
    z, labels = torch.tensor(problem[0] * scale, requires_grad=True), torch.tensor(problem[1])
    partners = torch.tensor(problem[2] * scale)
    method = taught(recipe)
    target = {"cskd": partners, "tfkd": z.detach().flip(1), "pskd": partners}[recipe.method]
    if recipe.method == "pskd":
        method.store.write(torch.arange(B), partners.softmax(1))
        target = method.store.read(torch.arange(B), labels).double().log()
    if recipe.tfkd.teacher == "virtual" and recipe.method == "tfkd":
        rows = torch.full((B, K), 0.01 / (K - 1), dtype=torch.float64)
        rows[torch.arange(B), labels] = 0.99
        target = rows / recipe.tfkd.temperature * stated.temperature  # at the student's temperature: what T makes of it
    found = gradient(method.loss(Echo(K), Batch(z, labels, torch.arange(B), partners))[0], z)
    plain = F.kl_div(z.log_softmax(1), target.softmax(1), reduction="batchmean")
    pull = stated.gradient_scale_of_small_logits - stated.cross_entropy
    same = stated.cross_entropy * F.cross_entropy(z, labels) + pull * plain
    assert found == pytest.approx(gradient(same, z), rel=2e-2, abs=1e-7)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("tfkd", {"tfkd__teacher": "trained"}),
        ("tfkd", {"tfkd__teacher": "trained", "tfkd__alpha": 0.9, "tfkd__temperature": 20.0}),
        ("tfkd", {"tfkd__teacher": "trained", "tfkd__temper_student": False}),
        ("cskd", {"cskd__weight": 3.0}),
        ("pskd", {}),
    ],
)
def test_where_a_prediction_is_wholly_wrong_the_gradient_is_cross_entropys_times_the_stated_scale(method, settings):
    recipe = recipe_of(method, **settings)
    z, right = torch.zeros(1, K, dtype=torch.float64), torch.zeros(1, K, dtype=torch.float64)
    z[0, 0], right[0, K - 1] = 1e4, 1e4  # the student is sure of class 0; label and teacher of the last
    z.requires_grad_()
    method = taught(recipe, num_samples=1)
    if recipe.method == "pskd":
        method.store.write(torch.arange(1), right.softmax(1))
    labels = torch.tensor([K - 1])
    found = gradient(method.loss(Echo(K), Batch(z, labels, torch.arange(1), right))[0], z)
    same = recipe.effective_loss(K).gradient_scale * F.cross_entropy(z, labels)
    assert found == pytest.approx(gradient(same, z), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "kl", "scale", "warns"),
    [
        ({"tfkd__alpha": 0.95, "tfkd__temperature": 6, "tfkd__multiplier": 50}, 17.1, 2.9, "hidden"),
        ({"tfkd__alpha": 0.9, "tfkd__temperature": 20, "tfkd__multiplier": 50}, 180, 9.1, "hidden"),
        ({"tfkd__alpha": 0.9, "tfkd__temperature": 20, "tfkd__multiplier": 100}, 360, 18.1, "hidden"),
        ({"tfkd__alpha": 0.95, "tfkd__temperature": 20, "tfkd__multiplier": 1}, 3.8, 0.24, "hidden"),
        ({"tfkd__teacher": "virtual", "tfkd__temperature": 40, "tfkd__multiplier": 1}, 0.001, 0.901, "inert"),
        ({"tfkd__teacher": "virtual", "tfkd__alpha": 0.5, "tfkd__multiplier": 1}, 0.005, 0.505, "inert hidden"),
    ],
)
def test_published_settings_state_their_weights_and_warn_of_what_they_hide(settings, kl, scale, warns):
    stated = recipe_of("tfkd", **{"tfkd__teacher": "trained", **settings}).effective_loss(100)
    assert stated.kl == pytest.approx(kl) and stated.gradient_scale == pytest.approx(scale)
    text = "\n".join(stated.lines(0.1))
    assert [word for word in ("inert", "hidden") if word in text] == warns.split()
    assert ("hidden" not in text) or f"{0.1 * scale:.3g} instead of 0.1" in text


def test_show_says_whose_each_constant_is_what_the_loss_amounts_to_and_what_a_teacher_costs(capsys):
    of = ["--preset", "official", "--preset_of", "cifar100/resnet18"]
    assert main(["show", "digits", "--method", "tfkd", "--tfkd.teacher", "baseline", "--tfkd.alpha", "0.95", *of]) == 0
    text = capsys.readouterr().out
    for line in (
        r"tfkd.alpha +│ 0.95 +│ command line \(as in preset official: authors' code\)",
        r"tfkd.temperature +│ 6.0 +│ preset official of cifar100/resnet18: authors' code",
        r"tfkd.reduction +│ mean +│ default: authors' code",
        r"effective loss: 0.05 × cross-entropy \+ 171 × KL",  # m = 50 stays 50 for ten classes
        r"warning: .* hidden learning rate: like optim.lr 0.48 to 2.86 instead of 0.1",
    ):
        assert re.search(line, text), line
    model = create_model("cifar_preact_resnet_tiny", num_classes=10, width=32)
    size = readable(sum(tensor.nbytes for tensor in model.state_dict().values()))
    assert f"trained teacher per rank: {size}; one more forward pass" in text
    assert main(["show", "digits", "--pskd.teacher", "snapshot"]) == 0
    assert f"snapshot teacher per rank: {size}; one more forward pass" in capsys.readouterr().out
    assert main(["show", "digits", "--method", "tfkd", "--preset", "pskd"]) == 2
    assert capsys.readouterr().err.startswith("pskd-timm: preset pskd: what it used for tfkd is not public")


def test_the_readme_shows_what_show_says_of_mobilenetv2():
    of = {"preset": "official", "preset_of": "cifar100/mobilenetv2", "model__name": "resnet34"}
    lines = effective_lines(recipe_of("tfkd", tfkd__teacher="baseline", **of))
    assert len(lines) == 3 and "\n".join(lines) in (Path(__file__).parent.parent / "recipes" / "README.md").read_text()


def test_methods_that_hide_nothing_get_no_warning():
    for method in ("baseline", "label_smoothing", "cskd", "tfkd", "pskd"):
        assert "warning" not in "\n".join(recipe_of(method).effective_loss(100).lines(0.1)), method


def test_alpha_grows_to_its_last_value_along_each_schedule_after_the_warm_up():
    for schedule, middle in (("linear", 0.4), ("cosine", 0.8 * (1 - math.cos(math.pi / 2)) / 2), ("constant", 0.8)):
        values = [alpha_at(epoch, 10, 0.8, schedule, 2) for epoch in range(10)]
        assert values[:2] == [0, 0] and values[-1] == pytest.approx(0.8) and values == sorted(values)
        assert values[5] == pytest.approx(middle)  # four of the eight epochs after the warm-up
    assert [alpha_at(epoch, 4, 0.8) for epoch in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def effective_lines(recipe):
    return recipe.effective_loss(100).lines(recipe.optim.lr)


def test_pskds_effective_loss_is_that_of_the_epoch_asked_for():
    recipe = recipe_of("pskd", epochs=10, pskd__alpha_warmup_epochs=2, optim__milestones=[5])
    assert recipe.effective_loss(K, epoch=1).kl == 0
    assert recipe.effective_loss(K, epoch=5).kl == pytest.approx(0.4)
    last = recipe.effective_loss(K)
    assert (last.cross_entropy, last.kl) == pytest.approx((0.2, 0.8))


def test_show_calls_those_runs_short_in_none_of_which_the_kept_results_have_a_gain(capsys):
    kept = Path(__file__).parent.parent / "recipes/results/when_pskd_pays"
    gains = {}
    for folder in kept.glob("*/epochs*"):
        nll = {
            method: np.mean(
                [json.loads(path.read_text())["last"]["nll"] for path in folder.glob(f"{method}/*/result.json")]
            )
            for method in ("baseline", "pskd")
        }
        gains.setdefault(int(folder.name.removeprefix("epochs")), []).append(nll["baseline"] - nll["pskd"])
    assert len(gains) >= 4 and min(gains) <= 5 and max(map(max, gains.values())) > 0
    for epochs, found in gains.items():
        assert main(["show", "cifar100/preact_resnet18", "--data.limit_train", "5000", "--epochs", str(epochs)]) == 0
        assert ("short run: PS-KD gains once" in capsys.readouterr().out) == (epochs <= SHORT_RUN)
        assert epochs > SHORT_RUN or max(found) < 0
