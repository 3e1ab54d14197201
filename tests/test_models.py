import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.models import group_parameters
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel

from pskd_timm.models.shakedrop import ShakeDrop
from pskd_timm.models.small_input import small_input
from pskd_timm.reports.paper import PAPER_NAMES

ALL = timm.list_models("cifar_*")
TINY = timm.list_models("cifar_*_tiny*")

# The authors' code's parameters, multiply-adds for one image, and numbers of convolutions, batch norms, linear layers
AUTHORS = {
    "cifar_preact_resnet18": (11_217_444, 555_468_800, (20, 17, 1)),
    "cifar_resnet101": (42_697_380, 2_510_168_064, (104, 104, 1)),
    "cifar_preact_resnet101_paper": (42_697_380, 2_510_168_064, (104, 104, 1)),
    "cifar_densenet121": (7_048_548, 888_442_880, (120, 120, 1)),
    "cifar_resnext29_8x64d": (34_518_948, 5_387_358_208, (31, 31, 1)),
    "cifar_pyramidnet200_a240": (26_844_952, 4_519_698_176, (199, 266, 1)),
    "cifar_pyramidnet200_a240_shakedrop": (26_844_952, 4_519_698_176, (199, 266, 1)),
    "resnet152": (60_192_808, 11_513_626_624, (155, 155, 1)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    """All networks share one compiled `forward`, and more than eight versions of it count as an error."""
    torch.compiler.reset()


def on_meta(name, **kwargs):
    """Shapes without numbers: a network of any size runs in milliseconds."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def images(batch=2, chans=3, size=16, device="cpu"):
    return torch.randn(batch, chans, size, size, device=device)


def macs(model, x):
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model.eval()(x)
    return total


# Counts and initialisation


@pytest.mark.parametrize("name", AUTHORS)
def test_parameters_macs_and_layers_are_those_of_the_authors_code(name):
    model = on_meta(name)
    layers = tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    parameters = sum(p.numel() for p in model.parameters())
    size = model.default_cfg["input_size"][-1]
    assert (parameters, macs(model, images(1, size=size, device="meta")), layers) == AUTHORS[name]


def test_densenet264_is_torchvisions_densenet_with_the_blocks_of_its_paper():
    with torch.device("meta"):
        theirs = torchvision.models.DenseNet(growth_rate=32, block_config=(6, 12, 64, 48), num_init_features=64)
    ours, x = on_meta("densenet264"), images(1, size=224, device="meta")
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert macs(ours, x) == macs(theirs, x)


def test_every_paper_name_can_be_built():
    assert all(on_meta(name).num_classes in (100, 1000) for name in PAPER_NAMES)


def test_true_preact101_starts_its_blocks_with_batch_norm_and_the_papers_with_a_convolution():
    firsts = [
        next(iter(on_meta(n).stages[0].blocks[0].children())) for n in ("cifar_preact_resnet101", "cifar_resnet101")
    ]
    assert [type(m) for m in firsts] == [nn.BatchNorm2d, nn.Conv2d]


def test_the_paper_alias_is_the_post_activation_network_and_says_so():
    alias, honest = on_meta("cifar_preact_resnet101_paper"), on_meta("cifar_resnet101")
    assert list(alias.state_dict()) == list(honest.state_dict())
    assert alias.default_cfg["architecture"] == "cifar_resnet101"
    assert "post-activation" in timm.model_entrypoint("cifar_preact_resnet101_paper").__doc__


def test_half_the_width_leaves_a_quarter_of_the_multiply_adds_between_stem_and_classifier():
    whole, half = (on_meta("cifar_preact_resnet18", width=w) for w in (64, 32))
    x = images(1, size=32, device="meta")
    ends = [9 * 3 * w * 32 * 32 + 8 * w * 100 for w in (64, 32)]
    assert macs(whole, x) - ends[0] == 4 * (macs(half, x) - ends[1])


def std_is(weight, expected):
    """Within six standard errors of a uniform or normal sample's standard deviation, never closer than 0.1 %."""
    tolerance = max(6 / math.sqrt(2 * weight.numel()), 1e-3)
    return weight.std(correction=0).item() == pytest.approx(expected, rel=tolerance)


def by_fan_out(weight):
    return weight.shape[0] * weight[0, 0].numel()


@pytest.mark.parametrize("name", ["cifar_preact_resnet18", "cifar_resnet_tiny", "cifar_densenet_tiny"])
def test_default_initialisation_is_uniform_by_fan_in(name):
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.abs().max() <= bound
            assert std_is(module.weight, bound / math.sqrt(3))


@pytest.mark.parametrize("name", ["cifar_resnext29_8x64d", "cifar_pyramidnet200_a240_shakedrop"])
def test_convolutions_are_normal_by_fan_out(name):
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            scale = math.sqrt(2 / by_fan_out(module.weight))
            assert std_is(module.weight, scale)
            # A uniform of this deviation ends at 1.73 of it; twelve of 1000 normal draws lie beyond 2.5.
            assert module.weight.numel() < 1000 or module.weight.abs().max() > 2.5 * scale


def test_resnexts_classifier_is_normal_by_fan_in_without_bias_at_first():
    fc = timm.create_model("cifar_resnext29_8x64d").get_classifier()
    assert std_is(fc.weight, math.sqrt(2 / 1024))
    assert fc.weight.abs().max() > 3 * math.sqrt(2 / 1024)
    assert not fc.bias.any()


@pytest.mark.parametrize("name", TINY)
def test_batch_norms_start_as_identities(name):
    norms = [m for m in timm.create_model(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and not m.bias.any() for m in norms)


# timm's interface, on shapes


@pytest.mark.parametrize("name", ALL)
def test_num_classes_and_in_chans_set_the_ends(name):
    model = on_meta(name, num_classes=7, in_chans=1)
    assert model(images(chans=1, device="meta")).shape == (2, 7)
    assert model.num_classes == model.get_classifier().out_features == 7 and model.in_chans == 1


@pytest.mark.parametrize("name", TINY)
def test_weights_are_made_where_and_of_the_type_that_one_says_as_timms_are(name):
    for features_only in (False, True):
        model = timm.create_model(name, device="meta", dtype=torch.bfloat16, features_only=features_only)
        assert {(weights.device.type, weights.dtype) for weights in model.parameters()} == {("meta", torch.bfloat16)}
    assert next(timm.create_model(name).parameters()).dtype == torch.float32
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, not_an_argument=1)


@pytest.mark.parametrize("name", TINY)
def test_reset_classifier_changes_classes_and_pool_or_removes_both(name):
    model, x = on_meta(name), images(device="meta")
    model.reset_classifier(5)
    assert (model(x).shape, model.num_classes) == ((2, 5), 5)
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size) == (2, 2 * model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == model.forward_features(x).shape


@pytest.mark.parametrize("pool, width", [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2)])
@pytest.mark.parametrize("name", TINY)
def test_global_pool_decides_the_hidden_size(name, pool, width):
    model = on_meta(name, global_pool=pool)
    hidden = model.forward_head(model.forward_features(images(device="meta")), pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size) == (2, width * model.num_features)
    assert model(images(device="meta")).shape == (2, 100)


@pytest.mark.parametrize("name", ALL)
def test_features_only_gives_the_announced_maps_and_ends_with_the_features(name):
    taps, model = on_meta(name, features_only=True), on_meta(name)
    maps = taps(images(size=32, device="meta"))
    assert [m.shape[1] for m in maps] == taps.feature_info.channels()
    assert [32 // m.shape[2] for m in maps] == taps.feature_info.reduction()
    assert maps[-1].shape == model.forward_features(images(size=32, device="meta")).shape
    assert len(on_meta(name, features_only=True, out_indices=(1, 2))(images(device="meta"))) == 2


@pytest.mark.parametrize("name", ALL)
def test_any_even_size_gives_the_map_that_the_reduction_says(name):
    model = on_meta(name)
    reduction = model.feature_info[-1]["reduction"]
    for size in (16, 48, 64) if name in TINY else (48,):
        assert model.forward_features(images(size=size, device="meta")).shape[2:] == (size // reduction,) * 2


@pytest.mark.parametrize("name", ALL)
def test_default_cfg_describes_cifar_and_names_real_modules(name):
    model = on_meta(name)
    cfg = model.default_cfg
    assert (cfg["mean"], cfg["std"]) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (cfg["num_classes"], cfg["input_size"]) == (100, (3, 32, 32))
    assert model.forward_features(images(size=32, device="meta")).shape[2:] == cfg["pool_size"]
    assert model.get_submodule(cfg["first_conv"]) is next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


def forward_order(model):
    """Parameters in the order in which the forward pass uses their modules."""
    names, used = {p: n for n, p in model.named_parameters()}, []
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: used.extend(names[p] for p in m.parameters(recurse=False)))
    model(images(device="meta"))
    return used


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_groups_hold_every_parameter_and_rise_along_the_forward_pass(name, coarse):
    model = on_meta(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    index = {parameter: i for i, names in groups.items() for parameter in names}
    used = forward_order(model)
    assert sorted(used) == sorted(index)
    assert [index[n] for n in used] == sorted(index[n] for n in used)
    blocks = len(model.stages) if coarse else sum(len(stage.blocks) for stage in model.stages)
    assert len(groups) >= blocks + 2


# timm's interface, on numbers


def trained(name, **kwargs):
    """A tiny network whose batch norms have seen a batch, so that evaluation is not the identity."""
    model = timm.create_model(name, **kwargs).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model(images(8))
    return model


@pytest.mark.parametrize("name", TINY)
def test_the_head_is_a_mean_over_the_map_and_a_linear_layer(name):
    model, x = trained(name).eval(), images(size=32)
    features, size = model.forward_features(x), model.default_cfg["pool_size"]
    pooled = F.avg_pool2d(features, size).flatten(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), F.linear(pooled, model.head.fc.weight, model.head.fc.bias))


@pytest.mark.parametrize("name", TINY)
def test_features_only_ends_with_the_values_of_forward_features(name):
    model, taps = trained(name).eval(), timm.create_model(name, features_only=True).eval()
    weights = {
        n.replace("stages.", "stages_").replace("stem.", "stem_").replace("norm.", "norm_"): w
        for n, w in model.state_dict().items()
        if not n.startswith("head.")
    }
    taps.load_state_dict(weights)
    x = images()
    torch.testing.assert_close(taps(x)[-1], model.forward_features(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_drop_rate_drops_that_part_of_the_pooled_features_in_training_only(name):
    model = timm.create_model(name, drop_rate=0.75)
    ones = torch.ones(500, model.num_features, 2, 2)
    dropped = (model.train().forward_head(ones, pre_logits=True) == 0).float().mean().item()
    assert dropped == pytest.approx(0.75, abs=0.02)
    assert (model.eval().forward_head(ones, pre_logits=True) == 1).all()


@pytest.mark.parametrize("name", TINY)
def test_a_state_dict_carries_the_whole_network(name):
    model, other = trained(name).eval(), timm.create_model(name).eval()
    other.load_state_dict(model.state_dict())
    x = images()
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TINY)
def test_compiled_training_without_graph_breaks_equals_eager_training(name):
    eager = timm.create_model(name).train()
    compiled = torch.compile(copy.deepcopy(eager), backend="eager", fullgraph=True)
    for model in (eager, compiled):
        torch.manual_seed(1)
        model(images()).square().sum().backward()
    for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", TINY)
def test_an_exported_network_takes_any_batch_size(name):
    model = trained(name).eval()
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: Dim("batch")},)).module()
    x = images(5)
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", TINY)
def test_channels_last_gives_the_same_numbers_and_is_kept(name):
    model, x = trained(name).eval(), images()
    expected = model(x)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_bf16_autocast_keeps_bf16_to_the_logits_and_is_near_float32(name, training):
    model, x = trained(name).train(training), images(8)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_features(x)
        logits = model.forward_head(features)
    assert features.dtype == logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["cifar_preact_resnet_tiny", "cifar_densenet_tiny"])
def test_digits_of_8_by_8_in_grey_train(name):
    model = timm.create_model(name, num_classes=10, in_chans=1)
    loss = F.cross_entropy(model(images(4, chans=1, size=8)), torch.arange(4))
    loss.backward()
    assert loss.isfinite()


# What timm's own test suite asks of a network


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_intermediates_are_the_maps_of_features_only_and_pruning_keeps_them(name):
    model, x = trained(name).eval(), images(size=32)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [32 // m.shape[2] for m in maps] == [info["reduction"] for info in model.feature_info]
    hooked = []
    for layer in (model.stem, *model.stages):
        layer.register_forward_hook(lambda m, i, output: hooked.append(output))
    model(x)
    for ours, theirs in zip(maps, hooked, strict=True):
        torch.testing.assert_close(ours, theirs)
    (last,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last, features)
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.stages) == 1 and model.get_classifier() is not None
    for pruned, before in zip(model.forward_intermediates(x, intermediates_only=True), early, strict=True):
        torch.testing.assert_close(pruned, before)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_timms_feature_getter_gives_the_maps_of_its_list_of_features(name):
    getter = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=(1, 2)).eval()
    maps = getter(images(size=32))
    assert [m.shape[1] for m in maps] == getter.feature_info.channels()
    assert [32 // m.shape[2] for m in maps] == getter.feature_info.reduction()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_scripted_network_computes_the_same(name):
    with timm.layers.set_scriptable(True):
        model = trained(name).eval()
    x = images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("name", TINY)
def test_torch_fx_traces_a_network_for_evaluation_and_for_training(name):
    from timm.models._features_fx import create_feature_extractor, get_graph_node_names

    model, x = trained(name), images(4)
    train_nodes, eval_nodes = get_graph_node_names(model)
    traced = create_feature_extractor(model, {eval_nodes[-1]: "logits"})
    with torch.no_grad():
        torch.testing.assert_close(traced.eval()(x)["logits"], model.eval()(x))
    traced.train()(x)["logits"].square().mean().backward()
    assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_finite_gradient(name):
    model = timm.create_model(name, num_classes=42).train()
    model(images(4)).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Gradient checkpointing


def step(model, x):
    """The number of bytes that a training step saves for its backward pass, views and weights counted once."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    loss.backward()
    return sum(saved.values())


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_changes_neither_gradients_nor_running_statistics(name):
    model = timm.create_model(name).train()
    other, x = copy.deepcopy(model), images(4)
    other.set_grad_checkpointing()
    for network in (model, other):
        step(network, x)
        step(network, x)
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    for (key, p), q in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(p, q), key
    assert all(m.momentum == 0.1 for m in other.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TINY)
def test_compiled_checkpointing_changes_neither_gradients_nor_running_statistics(name):
    model = timm.create_model(name).train()
    other, x = copy.deepcopy(model), images(4)
    other.set_grad_checkpointing()
    step(model, x)
    torch.manual_seed(1)
    torch.compile(other, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item(), msg=key)
    for (key, p), q in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=key)


@pytest.mark.parametrize("name", ["cifar_densenet_tiny", "cifar_pyramidnet_tiny"])
def test_checkpointing_saves_most_of_the_activations(name):
    model, x = timm.create_model(name).train(), images(16)
    before = step(model, x)
    model.set_grad_checkpointing()
    assert step(model, x) < 0.6 * before
    model.set_grad_checkpointing(False)
    assert step(model, x) == before


# ShakeDrop


def factors(p, batch=1, draws=4000):
    """Forward and backward factors [draws, batch] of ShakeDrop in training, measured on ones."""
    layer = ShakeDrop(p).train()
    x = torch.ones(batch, 1, 1, 1, requires_grad=True)
    pairs = []
    for _ in range(draws):
        out = layer(x)
        pairs.append((out.detach().flatten(), torch.autograd.grad(out.sum(), x)[0].flatten()))
    return (torch.stack(column) for column in zip(*pairs, strict=True))


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_shakedrop_leaves_a_whole_batch_alone_with_probability_1_minus_p(p):
    forward, backward = factors(p, batch=3)
    spared = (forward == 1).all(1)
    assert spared.float().mean().item() == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / 4000))
    assert (backward[spared] == 1).all()
    assert not (forward[~spared] == 1).any()


def test_shakedrop_shakes_forward_by_uniform_alpha_and_backward_by_uniform_beta():
    alpha, beta = factors(1.0)
    for sample, low, high in ((alpha, -1.0, 1.0), (beta, 0.0, 1.0)):
        uniform = ((sample - low) / (high - low)).flatten().sort().values
        ranks = (torch.arange(len(uniform)) + 0.5) / len(uniform)
        # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded once in a thousand samples
        assert (uniform - ranks).abs().max() < 1.95 / math.sqrt(len(uniform))


def test_shakedrop_draws_alpha_and_beta_independently_for_every_sample():
    alpha, beta = factors(1.0, batch=2)
    correlation = torch.corrcoef(torch.cat([alpha, beta], 1).T)
    assert (correlation - torch.eye(4)).abs().max() < 4 / math.sqrt(4000)


def test_shakedrop_scales_a_sample_as_one():
    out = ShakeDrop(1.0).train()(torch.ones(3, 4, 2, 2))
    assert all(len(sample.unique()) == 1 for sample in out)
    assert len(out.unique()) == 3


def test_shakedrops_evaluation_is_the_mean_of_its_training():
    x = images(2)
    forward, _ = factors(0.3)
    assert forward.mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(ShakeDrop(0.3).eval()(x), 0.7 * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shakedrop_keeps_half_precision(dtype):
    assert {ShakeDrop(0.5).train(mode)(images().to(dtype)).dtype for mode in (True, False)} == {dtype}


def test_shakedrop_rises_linearly_to_one_half_over_66_blocks():
    drops = [m for m in on_meta("cifar_pyramidnet200_a240_shakedrop").modules() if isinstance(m, ShakeDrop)]
    assert [m.p for m in drops] == pytest.approx([0.5 * (i + 1) / 66 for i in range(66)])
    assert not [m for m in on_meta("cifar_pyramidnet200_a240").modules() if isinstance(m, ShakeDrop)]


def ddp_worker(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(timm.create_model("cifar_pyramidnet_tiny_shakedrop"))
    torch.manual_seed(rank)
    for _ in range(3):
        model(images()).square().mean().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    both = [torch.empty_like(grads) for _ in range(2)]
    dist.all_gather(both, grads)
    assert torch.equal(*both) and grads.isfinite().all()
    dist.destroy_process_group()


def test_two_processes_with_draws_of_their_own_share_their_gradients(tmp_path):
    mp.spawn(ddp_worker, (tmp_path / "store",), nprocs=2)


# small_input

LAST_MAPS = {
    "resnet18": 4,
    "resnet18d": 4,
    "resnext50_32x4d": 4,
    "wide_resnet50_2": 4,
    "densenet121": 4,
    "convnext_atto": 4,
    "convnext_atto_ols": 4,
    "efficientnet_b0": 2,
    "tf_efficientnet_b0": 2,
}


@pytest.mark.parametrize("name", LAST_MAPS)
@torch.no_grad()
def test_small_input_enlarges_the_last_map_by_the_stem(name):
    model, x = timm.create_model(name, num_classes=7).eval(), images(1, size=32)
    assert model.forward_features(x).shape[-1] == 1
    assert small_input(model).forward_features(x).shape[-1] == LAST_MAPS[name]
    assert model(x).shape == (1, 7)


def test_small_input_leaves_no_stride_before_the_first_stage():
    model, sizes = small_input(timm.create_model("resnet18")), []
    model.layer1.register_forward_hook(lambda m, i, output: sizes.append(output.shape[-1]))
    model(images(size=32))
    assert sizes == [32]


def test_small_input_says_which_family_it_does_not_know():
    with pytest.raises(ValueError, match="does not know the stem of MobileNetV3"):
        small_input(timm.create_model("mobilenetv3_small_050"))
