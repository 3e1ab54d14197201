"""Parameter groups, the steps at which the learning rate falls, and the gradient's norm."""

from fractions import Fraction

import pytest
import timm
import torch
from torch import nn

import pskd_timm.models  # noqa: F401 (which registers its networks)
from pskd_timm import load_recipe
from pskd_timm.optim import given_in_vain, grad_norm, lr_at, make_optimizer, slow_warmup, unread
from pskd_timm.recipe import Optim

SMALL = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "depths": (1, 1, 1, 1),
        "embed_dim": 24,
        "num_heads": (1, 1, 1, 1),
    },
    "cifar_preact_resnet_tiny": {"width": 8},
}


def decays(model, section):
    optimizer = make_optimizer(model, section)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: decay[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_what_a_model_exempts_from_weight_decay_never_decays_and_norms_and_biases_by_the_setting(
    name, optimizer, decay_norm_and_bias
):
    model = timm.create_model(name, num_classes=5, **SMALL[name])
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    assert any("pos_embed" in each or "bias_table" in each for each in exempt) == (not name.startswith("cifar"))
    section = Optim(name=optimizer, weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)
    for parameter, decay in decays(model, section).items():
        of_norm_or_bias = model.get_parameter(parameter).ndim <= 1 or parameter.endswith(".bias")
        assert decay == (0.0 if parameter in exempt or (of_norm_or_bias and not decay_norm_and_bias) else 0.1), (
            parameter
        )


def test_a_model_that_exempts_nothing_keeps_the_papers_one_group_in_the_models_order():
    model = timm.create_model("cifar_preact_resnet_tiny", num_classes=5, width=8)
    (group,) = make_optimizer(model, Optim()).param_groups
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))


@pytest.mark.parametrize("overflows", [True, False])
def test_a_fused_first_step_that_fp16_overflows_in_leaves_no_trace_and_another_is_plain_sgds(monkeypatch, overflows):
    layer, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(layer.state_dict())
    section = Optim(lr=0.5, weight_decay=0.1)
    reference = torch.optim.SGD(plain.parameters(), 0.5, momentum=0.9, nesterov=True, weight_decay=0.1)
    optimizer, scaler = make_optimizer(layer, section), torch.amp.GradScaler("cpu", init_scale=1.0)
    for group in optimizer.param_groups:
        group["fused"] = True  # as on a GPU
    optimizer._step_supports_amp_scaling = True
    # What memory holds that is handed out again.
    monkeypatch.setattr("torch.empty_like", lambda tensor, **_: torch.full_like(tensor, 1e20))
    for step in range(3):
        gradients = [torch.full_like(weights, 1.0 + step) for weights in layer.parameters()]
        skipped = overflows and step == 0
        for weights, others, gradient in zip(layer.parameters(), plain.parameters(), gradients, strict=True):
            weights.grad = gradient * torch.inf if skipped else gradient.clone()
            others.grad = gradient
        scaler.scale(torch.zeros(()))  # makes what it keeps
        scaler.step(optimizer)
        scaler.update(1.0)
        if not skipped:
            reference.step()
    for weights, others in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weights, others)


def test_the_learning_rate_drops_at_the_first_step_of_the_part_that_the_milestone_is_as_it_is_written():
    late = 0
    for hundredths in range(1, 100):
        for epochs, steps_per_epoch in ((100, 1), (100, 391), (50, 2), (30, 3)):
            section = Optim(lr=1.0, milestones=[hundredths / 100], decay_rate=0.5)
            exact = Fraction(hundredths, 100) * epochs * steps_per_epoch
            first = -(-exact.numerator // exact.denominator)
            assert lr_at(first - 1, steps_per_epoch, epochs, section) == 1.0
            assert lr_at(first, steps_per_epoch, epochs, section) == 0.5
            late += (first / steps_per_epoch) < hundredths / 100 * epochs
    assert late > 10  # so often rounding alone would miss the step


def test_a_milestone_from_one_on_is_an_epoch_and_a_warm_up_ends_at_its_exact_step():
    section = Optim(lr=1.0, milestones=[1, 2.5], decay_rate=0.5)
    assert [lr_at(step, 4, 10, section) for step in (3, 4, 9, 10)] == [1.0, 0.5, 0.5, 0.25]
    # 0.07 of 100 steps are 7: the eighth step is the first at the peak.
    warm = Optim(lr=1.0, schedule="constant", warmup_epochs=0.07)
    assert [lr_at(step, 100, 10, warm) for step in (6, 7)] == [pytest.approx(7 / 8), 1.0]


@pytest.mark.parametrize("value", [3.0, float("inf"), float("nan")])
def test_measuring_the_gradients_norm_leaves_the_gradients_as_they_are(value):
    layer = nn.Linear(2, 3)
    layer.weight.grad = torch.tensor([[value, 4.0], [0.0, 0.0], [0.0, 12.0]])
    before = layer.weight.grad.clone()
    found = grad_norm(layer.parameters())  # the bias has no gradient
    assert found.item() == pytest.approx((value**2 + 160) ** 0.5, nan_ok=True)
    assert torch.equal(before.nan_to_num(-1), layer.weight.grad.nan_to_num(-1))


def test_after_a_warm_up_in_steps_or_epochs_the_cosine_is_that_of_the_rest_of_the_run():
    for warmup in ({"warmup_steps": 40}, {"warmup_epochs": 2}):
        section = Optim(lr=0.4, schedule="cosine", **warmup)
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
        for step in range(40, 200):
            assert lr_at(step, 20, 10, section) == pytest.approx(optimizer.param_groups[0]["lr"]), (warmup, step)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("warmup", [{"warmup_steps": 500}, {"warmup_epochs": 25}])
def test_a_run_that_ends_in_its_warm_up_is_told_where_its_learning_rate_ends(warmup):
    section = Optim(**warmup, schedule="constant")
    for epochs in (1, 3, 24, 26):
        reached = max(lr_at(step, 20, epochs, section) for step in range(20 * epochs)) >= section.lr
        said = slow_warmup(section, 20, epochs)
        assert (said is None) is reached, (epochs, said)
    assert "the run has 60 steps and warms up for 500, so the learning rate ends at 12%" in slow_warmup(section, 20, 3)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "lion", "muon"])
@pytest.mark.parametrize("schedule", ["step", "cosine", "constant", "inverse_sqrt"])
def test_a_setting_is_called_unread_where_another_value_changes_nothing(name, schedule):
    """The optimizer's groups and the learning rates of a run, with each setting in turn at another value."""

    def read(**given):
        section = Optim(name=name, schedule=schedule, warmup_steps=2, **given)
        optimizer = make_optimizer(nn.Linear(2, 2), section)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return groups, [lr_at(step, 5, 4, section) for step in range(20)]

    others = {"momentum": 0.5, "nesterov": False, "betas": [0.5, 0.6]}
    others |= {"min_lr": 0.01, "milestones": [0.2], "decay_rate": 0.7}

    found = unread(Optim(name=name, schedule=schedule, warmup_steps=2))
    assert found.keys() == {f"optim.{key}" for key, other in others.items() if read(**{key: other}) == read()}


def test_what_is_given_on_the_command_line_and_not_read_is_told():
    recipe = load_recipe("digits", {"optim.min_lr": 0.001, "optim.schedule": "step", "optim.betas": [0.9, 0.98]})
    assert given_in_vain(recipe) == [
        "optim.betas is given, but optim.name sgd does not read it",
        "optim.min_lr is given, but optim.schedule step does not read it",
    ]
    assert given_in_vain(recipe, ["optim.name"]) == ["optim.min_lr is given, but optim.schedule step does not read it"]
    without = {"optim.momentum": 0.0, "optim.nesterov": True, "optim.milestones": [], "optim.decay_rate": 0.5}
    assert given_in_vain(load_recipe("digits", without)) == [
        "optim.nesterov is given, but optim.momentum 0 does not read it",
        "optim.decay_rate is given, but optim.milestones [] does not read it",
    ]
    assert given_in_vain(load_recipe("digits", {"optim.schedule": "cosine", "optim.min_lr": 0.001})) == []
