"""The methods beyond the paper's: losses, gradients, what is remembered, against loops over samples in NumPy float64."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Echo, cross_entropy, kl, softmax
from safetensors.torch import load, save
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pskd_timm import METHODS, Batch, InputError, load_recipe, train
from pskd_timm.checks import check_recipe
from pskd_timm.comparison import method_names
from pskd_timm.data import Loader
from pskd_timm.data.split import Split
from pskd_timm.methods import METHOD_SECTIONS, PAPER
from pskd_timm.methods.dlb import DLB, Seen
from pskd_timm.methods.ols import OLS
from pskd_timm.methods.sections import Scale, focal_slope
from pskd_timm.order import even_slice_of_pairs
from pskd_timm.progress import Display
from pskd_timm.recipe import Augment
from pskd_timm.run.graph import check_recordable
from pskd_timm.run.result import read_lines

N, K, B, E = 23, 7, 6, 4
FURTHER = [name for name in METHODS if name not in PAPER]


def ready(method):
    return method.setup(num_samples=N, num_classes=K, num_epochs=E, device="cpu")


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(B, K)) * 2
    z[0, 3] = z[0].max() + 12  # one row that is sure of a class
    return z, rng.integers(0, K, B)


def rows(z):
    """Log-probabilities and probabilities of each row."""
    for row in z:
        log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
        yield row, log_p, np.exp(log_p)


def focal(z, labels, gamma=3.0, low_gamma=5.0, low_probability=0.2):
    total = 0.0
    for (_, log_p, p), y in zip(rows(z), labels, strict=True):
        total -= (1 - p[y]) ** (low_gamma if p[y] < low_probability else gamma) * log_p[y]
    return total / len(z)


def dual_focal(z, labels, gamma=5.0):
    total = 0.0
    for (_, log_p, p), y in zip(rows(z), labels, strict=True):
        runner_up = max((q for q in p if q < p[y]), default=0.0)
        total -= (1 - p[y] + runner_up) ** gamma * log_p[y]
    return total / len(z)


def zipf(z, labels, weight=0.1):
    total = 0.0
    for row, y in zip(z, labels, strict=True):
        others = [c for c in range(K) if c != y]
        share = {c: 1 / (1 + sum(row[d] > row[c] for d in others)) for c in others}
        of_all = sum(np.exp(row[c]) for c in others)
        for c in others:
            t = share[c] / sum(share.values())
            total += t * (np.log(t) - np.log(np.exp(row[c]) / of_all))
    return weight * total / len(z)


def excess(z, margin=10.0, weight=0.1):
    return weight * np.mean([max(0.0, max(row) - value - margin) for row in z for value in row])


def suppression(z, weight=0.1):
    return weight * np.mean([max(row) - sum(row) / K for row in z])


def plain(z, labels):
    return cross_entropy(np.eye(K)[labels], z)


# (method, settings, the part that has labels, the part that has none).
FORMULAS = [
    ("mbls", {}, plain, excess),
    ("mbls", {"margin": 1.5, "weight": 0.7}, plain, lambda z: excess(z, 1.5, 0.7)),
    ("focal", {}, focal, None),
    ("focal", {"gamma": 2.0, "low_probability": 0.0}, lambda z, y: focal(z, y, 2.0, 2.0), None),
    ("focal", {"gamma": 0.5, "low_gamma": 1.0, "low_probability": 0.5}, lambda z, y: focal(z, y, 0.5, 1.0, 0.5), None),
    ("focal", {"gamma": 0.0, "low_gamma": 0.0}, plain, None),
    ("dual_focal", {}, dual_focal, None),
    ("dual_focal", {"gamma": 2.0}, lambda z, y: dual_focal(z, y, 2.0), None),
    ("zipf", {}, lambda z, y: plain(z, y) + zipf(z, y), None),
    ("zipf", {"weight": 1.0}, lambda z, y: plain(z, y) + zipf(z, y, 1.0), None),
    ("maxsup", {}, plain, suppression),
    ("maxsup", {"weight": 0.4, "final_weight": 0.0}, plain, lambda z: suppression(z, 0.4)),
]


@pytest.mark.parametrize(("name", "settings", "labelled", "free"), FORMULAS)
def test_the_loss_is_a_loop_over_samples_and_of_mixed_images_that_with_both_labels(
    problem, name, settings, labelled, free
):
    z, labels = problem
    method = ready(METHODS[name](**settings))
    of_logits = free(z) if free else 0.0
    loss, logits = method.loss(Echo(K), Batch(torch.tensor(z), torch.tensor(labels), torch.arange(B)))
    assert loss.item() == pytest.approx(labelled(z, labels) + of_logits, rel=1e-12)
    assert np.array_equal(logits, z)
    permutation, lam = [1, 0, 3, 2, 4, 5], 0.7
    mixed = Batch(
        torch.tensor(z),
        torch.tensor(labels),
        torch.arange(B),
        permutation=torch.tensor(permutation),
        lam=torch.tensor(lam, dtype=torch.float64),
    )
    expected = lam * labelled(z, labels) + (1 - lam) * labelled(z, labels[permutation]) + of_logits
    assert method.loss(Echo(K), mixed)[0].item() == pytest.approx(expected, rel=1e-12)


def test_equal_logits_share_a_zipf_rank_and_the_last_class_may_be_the_label():
    z, labels = np.array([[1.0, 1.0, 0.0, 0.0, 0.0, 3.0, 2.0]]), np.array([6])
    loss, _ = ready(METHODS["zipf"](weight=2.0)).loss(Echo(K), Batch(*map(torch.tensor, (z, labels, labels))))
    ranks = np.array([2, 2, 4, 4, 4, 1])
    t, p = (1 / ranks) / (1 / ranks).sum(), softmax(z[:, :6])[0]
    assert loss.item() == pytest.approx(plain(z, labels) + 2 * (t * np.log(t / p)).sum(), rel=1e-12)


def test_a_label_below_which_nothing_lies_has_no_runner_up():
    z = np.array([[-3.0, 1.0, 2.0, 0.0, 0.5, 1.5, 3.0], [0.0] * K])
    loss, _ = ready(METHODS["dual_focal"]()).loss(Echo(K), Batch(*map(torch.tensor, (z, [0, 2], [0, 1]))))
    p = softmax(z)[[0, 1], [0, 2]]
    assert loss.item() == pytest.approx(np.mean((1 - p) ** 5 * -np.log(p)), rel=1e-12)


def gradient_of(name, settings, z, labels):
    """What `gradcheck` looks at: the loss of logits [B, K], for DLB of those of the last batch's second view too."""
    views, said = z.detach().flip(1).clone().requires_grad_(), z.detach().roll(1, 1)

    def loss(logits, again):
        method = ready(METHODS[name](**settings))
        method.begin_epoch(2, torch.arange(B))
        if name == "ols":
            method.soft_labels = torch.rand(K, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if name == "dlb":
            method.now = {0: Seen(again, labels, said)}
        return method.loss(Echo(K), Batch(logits, labels, torch.arange(B), logits.detach()))[0] + 0.0 * again.sum()

    return loss, (z, views)


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in FURTHER]
    + [("mbls", {"margin": 1.5}), ("focal", {"gamma": 0.5}), ("dual_focal", {"gamma": 1.0})],
)
def test_the_gradient_is_that_of_finite_differences(problem, name, settings):
    z, labels = torch.tensor(problem[0], requires_grad=True), torch.tensor(problem[1])
    loss, inputs = gradient_of(name, settings, z, labels)
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("certain", [60.0, 1e4])
def test_a_certain_prediction_right_or_wrong_has_a_finite_loss_and_gradient(name, certain):
    z = torch.zeros(2, K)
    z[:, 0] = certain
    z.requires_grad_()
    method = ready(METHODS[name](**({"gamma": 0.5} if "focal" in name else {})))
    for _ in range(2):
        loss, _ = method.loss(Echo(K), Batch(z, torch.tensor([0, 1]), torch.arange(2), z.detach()))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("name", FURTHER)
def test_half_precision_logits_are_widened_before_any_sum(problem, name):
    half, labels = torch.tensor(problem[0]).bfloat16(), torch.tensor(problem[1])
    found = []
    for z in (half, half.float()):
        method = ready(METHODS[name]())
        for _ in range(2):  # the second step of DLB has a last batch
            loss, _ = method.loss(Echo(K), Batch(z, labels, torch.arange(B), z))
        found.append(loss)
    assert found[0].dtype == torch.float32 and torch.equal(*found)


class Waits(TorchDispatchMode):
    """Notes every operation that has to look at a value on the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


class Conversions(TorchFunctionMode):
    """Counts tensors that become Python's numbers and lists."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_no_loss_waits_for_the_device(problem, name):
    z, labels = torch.tensor(problem[0]), torch.tensor(problem[1])
    method = ready(METHODS[name]())
    method.begin_epoch(0, torch.arange(B))
    with Waits() as waits, Conversions() as conversions:
        for _ in range(2):
            method.loss(Echo(K), Batch(z, labels, torch.arange(B), z))
    assert not waits.found and not conversions.count


# Online label smoothing


class Recomputed:
    """Online label smoothing with lists and loops."""

    def __init__(self, weight):
        self.weight, self.soft, self.right = weight, [[0.0] * K for _ in range(K)], [[] for _ in range(K)]

    def loss(self, z, labels, count=True):
        total = 0.0
        for (_, log_p, p), y in zip(rows(z), labels, strict=True):
            total -= (1 - self.weight) * log_p[y] + self.weight * sum(self.soft[y][c] * log_p[c] for c in range(K))
            if count and max(range(K), key=lambda c: p[c]) == y:
                self.right[y].append(p)
        return total / len(labels)

    def end_epoch(self):
        self.soft = [np.mean(found, axis=0) if found else np.full(K, 1 / K) for found in self.right]
        self.right = [[] for _ in range(K)]


def ols_steps(epochs=E):
    """Random logits of each step, mostly right but never for class 6; the last batch of an epoch is short."""
    rng = np.random.default_rng(1)
    for epoch in range(epochs):
        for size in (B, B, 3):
            labels = rng.integers(0, K, size)
            z = rng.normal(size=(size, K))
            z[np.arange(size), labels] += np.where(labels == 6, -9, 1.5)
            yield epoch, z, labels


def test_online_label_smoothing_is_its_recomputation_over_epochs_and_counts_no_mixed_image():
    ols, expected, now = ready(OLS(weight=0.3)), Recomputed(0.3), 0
    for epoch, z, labels in ols_steps():
        if epoch > now:
            ols.end_epoch()
            expected.end_epoch()
            assert ols.soft_labels.numpy() == pytest.approx(np.array(expected.soft), abs=1e-7)
            assert (ols.soft_labels[6] == np.float32(1 / K)).all() and ols.without_hit >= 1
            now = epoch
        ols.begin_epoch(epoch, torch.arange(N))
        batch = Batch(torch.tensor(z), torch.tensor(labels), torch.arange(len(z)))
        assert ols.loss(Echo(K), batch)[0].item() == pytest.approx(expected.loss(z, labels), rel=1e-6)
        turned = np.roll(np.arange(len(z)), 1)
        mixed = Batch(*vars(batch).values())
        mixed.permutation, mixed.lam = torch.tensor(turned), torch.tensor(0.6, dtype=torch.float64)
        both = 0.6 * expected.loss(z, labels, False) + 0.4 * expected.loss(z, labels[turned], False)
        assert ols.loss(Echo(K), mixed)[0].item() == pytest.approx(both, rel=1e-6)


def test_in_the_first_epoch_online_label_smoothing_is_a_part_of_cross_entropy(problem):
    z, labels = problem
    loss, _ = ready(OLS()).loss(Echo(K), Batch(*map(torch.tensor, (z, labels, labels))))
    assert loss.item() == pytest.approx(0.5 * plain(z, labels), rel=1e-12)


def saved(method):
    """What a checkpoint keeps of the method, through safetensors' bytes."""
    return load(save(method.state_dict()))


def test_soft_labels_are_the_same_to_the_bit_in_any_order_and_after_a_resume_in_mid_epoch():
    batches = [Batch(torch.tensor(z), torch.tensor(y), torch.arange(len(z))) for _, z, y in ols_steps(epochs=3)]
    tables = []
    for order in ([*range(9)], [*reversed(range(9))]):
        ols = ready(OLS())
        for place, i in enumerate(order):
            ols.loss(Echo(K), batches[i])
            if place == 4:
                again = ready(OLS())
                again.load_state_dict(saved(ols))
                ols = again
        ols.end_epoch()
        tables.append(ols.soft_labels)
    assert torch.equal(*tables)
    with pytest.raises(InputError, match="of 7 classes, not 5"):
        OLS().setup(num_samples=N, num_classes=5, num_epochs=E, device="cpu").load_state_dict(saved(ols))


def test_online_label_smoothing_says_which_classes_it_learned_nothing_of():
    ols = ready(OLS())
    assert ols.describe() == "soft labels: 7 classes, 644 bytes a rank"  # 7·7·(4 + 8) + 7·8
    z = torch.eye(K)[:3] * 5
    ols.loss(Echo(K), Batch(z, torch.tensor([0, 1, 3]), torch.arange(3)))  # the third is wrong
    ols.end_epoch()
    assert ols.describe().endswith("uniform for 5 of which no sample was classified correctly")


# DLB


def dlb_expected(steps, weight, temperature):
    """DLB's loss of each part of each step: `steps` are lists of (logits, logits in the second view, labels)."""
    found, last = [], []
    for step in steps:
        for number, (z, _, labels) in enumerate(step):
            if number >= len(last):
                found.append(plain(z, labels))
                continue
            said, again, theirs = last[number]
            both = np.concatenate([again, z]), np.concatenate([theirs, labels])
            term = kl(softmax(said / temperature), softmax(again / temperature))
            found.append(plain(*both) + weight * temperature**2 * term)
        last = step
    return found


def random_steps(sizes):
    rng = np.random.default_rng(2)
    return [[(rng.normal(size=(n, K)), rng.normal(size=(n, K)), rng.integers(0, K, n)) for n in step] for step in sizes]


def dlb_losses(method, steps):
    found = []
    for step in steps:
        for number, (z, views, labels) in enumerate(step):
            batch = Batch(*map(torch.tensor, (z, labels, labels, views)), micro_batch=number)
            found.append(method.loss(Echo(K), batch)[0].item())
    return found


# A short last batch, and one of so few samples that a part of it is missing.
SIZES = [(3, 3), (3, 3), (2, 1), (3, 3), (1,), (3, 3)]


def test_dlb_sees_each_part_of_the_last_step_again_in_its_second_view():
    steps = random_steps(SIZES)
    found = dlb_losses(ready(DLB(weight=0.7, temperature=2.0)), steps)
    assert found == pytest.approx(dlb_expected(steps, 0.7, 2.0), rel=1e-12)


@pytest.mark.parametrize("at", range(len(SIZES)))
def test_dlb_resumes_at_any_step_with_the_losses_of_the_run_that_went_on(at):
    steps = random_steps(SIZES)
    whole, parts, again = (ready(DLB()) for _ in range(3))
    expected = dlb_losses(whole, steps)
    before = dlb_losses(parts, steps[:at])
    state = saved(parts)
    again.load_state_dict(state)
    assert before + dlb_losses(again, steps[at:]) == expected
    assert bool(state) == (at > 0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_another_number_of_ranks_takes_over_dlbs_last_batch_row_by_row(monkeypatch, world_size):
    alone = ready(DLB())
    dlb_losses(alone, random_steps([(8, 6)]))
    state, labels = saved(alone), []
    for rank in range(world_size):
        monkeypatch.setattr("pskd_timm.ranks.rank_and_world_size", lambda rank=rank: (rank, world_size))
        one = ready(DLB())
        one.load_state_dict(state)
        share = even_slice_of_pairs(14, rank, world_size)
        assert [len(seen.labels) for seen in one.now.values()] == [
            len(range(share.stop - share.start)[even_slice_of_pairs(share.stop - share.start, i, 2)]) for i in (0, 1)
        ]
        labels += [seen.labels for seen in one.now.values()]
    assert torch.equal(torch.cat(labels), state["last_labels"])


def test_what_dlb_keeps_of_a_step_is_not_the_networks_output_itself():
    method = METHODS["dlb"]().setup(num_samples=4, num_classes=3, num_epochs=1, device="cpu")
    outputs = torch.randn(4, 3, requires_grad=True)
    images, labels = torch.zeros(4, 1), torch.arange(4) % 3
    method.loss(lambda _: outputs, Batch(images, labels, torch.arange(4), images))
    assert method.now[0].logits.untyped_storage().data_ptr() != outputs.untyped_storage().data_ptr()


def test_no_gradient_flows_into_what_dlb_said_a_step_ago():
    dlb = ready(DLB())
    first, second = torch.randn(B, K, requires_grad=True), torch.randn(B, K, requires_grad=True)
    labels, views = torch.randint(K, (B,)), torch.randn(B, K, requires_grad=True)
    dlb.loss(Echo(K), Batch(first, labels, labels, views))
    dlb.loss(Echo(K), Batch(second, labels, labels, views))[0].backward()
    assert first.grad is None and second.grad.abs().sum() > 0 and views.grad.abs().sum() > 0


def view_loader(rank=0, world_size=1, **augment):
    images = torch.randint(256, (40, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(40) % K, torch.arange(40))
    section = Augment(**augment)
    return Loader(split, K, 5, 12, section, [0.5] * 3, [0.5] * 3, 3, rank, world_size, partners="view")


def test_the_second_view_is_of_the_same_samples_and_drawn_anew_on_any_number_of_ranks():
    def batches(rank=0, world_size=1, accumulate=1, **augment):
        one = view_loader(rank, world_size, **augment)
        return [b for step in one.batches(one.rank_batches(1), 1, accumulate) for b in step]

    assert all(torch.equal(b.inputs, b.partner_inputs) for b in batches())  # nothing is drawn
    moved = {"crop_padding": 2, "hflip": 0.5}
    views = {int(i): view for b in batches(**moved) for i, view in zip(b.index, b.partner_inputs, strict=True)}
    first = {int(i): view for b in batches(**moved) for i, view in zip(b.index, b.inputs, strict=True)}
    assert len(views) == 40 and sum(torch.equal(views[i], first[i]) for i in views) < 10
    halves = batches(0, 2, 2, **moved) + batches(1, 2, 2, **moved)
    assert {b.micro_batch for b in halves} == {0, 1} and sum(len(b.index) for b in halves) == 40
    assert all(
        torch.equal(view, views[int(i)]) for b in halves for i, view in zip(b.index, b.partner_inputs, strict=True)
    )


def test_dlb_with_accumulated_micro_batches_has_the_losses_of_the_whole_batch(tiny, tmp_path):
    settings = {
        "method": "dlb",
        "model__name": "test_resnet",
        "model__kwargs": {"norm_layer": "groupnorm1"},
        "optim__lr": 0.02,
        "batch_size": 60,
    }
    whole, parts = (
        [line["loss"] for line in read_lines(train(tiny(**settings, **own)).run_dir / "steps.jsonl")]
        for own in ({"output_dir": str(tmp_path / "a")}, {"output_dir": str(tmp_path / "b"), "grad_accum_steps": 3})
    )
    assert len(whole) == 10 and parts == pytest.approx(whole, rel=1e-4)


def test_dlb_goes_with_neither_cuda_graphs_nor_mixing_nor_tasks_without_second_inputs(tiny):
    with pytest.raises(InputError, match="graphs does not go with DLB"):
        check_recordable(ready(DLB()))
    with pytest.raises(InputError, match="graphs does not go with DLB"):
        check_recipe(tiny(model__compile="graphs"), ("baseline", "dlb"), Display(quiet=True))
    with pytest.raises(InputError, match="do not go with dlb: it compares two views of an image"):
        train(tiny(method="dlb", augment__mixup=0.2))
    translation = load_recipe("translation/multi30k_de_en")
    with pytest.raises(InputError, match="dlb compares two views of an input, which task translation has not"):
        translation.check_method("dlb")


def test_online_label_smoothing_asks_for_batches_that_are_not_mixed(tiny):
    with pytest.raises(InputError, match="choose one below 1$"):
        train(tiny(method="ols", augment__cutmix=1.0, augment__mix_prob=1.0))


@pytest.mark.parametrize("name", [name for name in FURTHER if not METHODS[name].needs_partners])
def test_what_is_a_function_of_logits_trains_on_tokens_too(tmp_path, name):
    import sequences  # noqa: F401 (which registers the task)

    settings = {"task": "sequences", "method": name, "epochs": 3, "threads": 1, "optim.lr": 0.5}
    result = train(load_recipe("digits", settings | {"output_dir": str(tmp_path), "tracking.wandb": "disabled"}))
    losses = [line["train_loss"] for line in result.history]
    assert losses[2] < losses[1] and result.last["token_accuracy"] > 14.3  # seven classes


# What `show` says


def recipe_of(method, **settings):
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return load_recipe("digits", {"method": method, **settings})


def gradient(loss, z):
    return torch.autograd.grad(loss, z)[0]


def loss_and_logits(recipe, scale=2.0, epoch=None):
    """The method of the recipe in its last epoch, with logits and labels to try it on."""
    generator = torch.Generator().manual_seed(0)
    z = scale * torch.randn(64, K, generator=generator, dtype=torch.float64)
    method = METHODS[recipe.method].from_section(recipe.method_section.model_dump())
    method.setup(num_samples=64, num_classes=K, num_epochs=recipe.epochs, device="cpu")
    method.begin_epoch(recipe.epochs - 1 if epoch is None else epoch, torch.arange(64))
    return method, z.requires_grad_(), torch.randint(K, (64,), generator=generator)


@pytest.mark.parametrize("name", METHODS)
def test_the_effective_loss_of_each_method_is_told_and_warns_of_nothing(name):
    lines = recipe_of(name).effective_loss(100).lines(0.1)
    assert lines[0].startswith("effective loss: ") and len(lines) > 1 and "warning" not in "\n".join(lines)
    assert ("cross-entropy" in lines[0] or "log p" in lines[0]) and not set("[]") & set("".join(lines))


def test_the_stated_loss_of_online_label_smoothing_has_its_gradient():
    recipe = recipe_of("ols", ols__weight=0.3)
    stated = recipe.effective_loss(K)
    ols, z, labels = loss_and_logits(recipe)
    ols.soft_labels.copy_(torch.rand(K, K).softmax(1))
    found = gradient(ols.loss(Echo(K), Batch(z, labels, labels))[0], z)
    same = stated.cross_entropy * F.cross_entropy(z, labels)
    same = same + stated.kl * F.kl_div(z.log_softmax(1), ols.soft_labels[labels].double(), reduction="batchmean")
    torch.testing.assert_close(found, gradient(same, z), rtol=1e-6, atol=1e-9)
    assert recipe.effective_loss(K, epoch=0).lines(0.1)[0] == "effective loss: 0.7 × cross-entropy"


def test_the_stated_loss_of_dlb_has_its_gradient():
    recipe = recipe_of("dlb", dlb__weight=0.5, dlb__temperature=4.0)
    stated = recipe.effective_loss(K)
    dlb, z, labels = loss_and_logits(recipe)
    said = torch.randn(64, K, dtype=torch.float64)
    dlb.now = {0: Seen(z, labels, said)}
    found = gradient(dlb.loss(Echo(K), Batch(z, labels, labels, z.detach()))[0], z)
    same = stated.cross_entropy * F.cross_entropy(z, labels)
    tempered = [(x / stated.temperature).log_softmax(1) for x in (z, said)]
    same = same + stated.kl * F.kl_div(*tempered, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, gradient(same, z))


def test_where_the_labels_logit_is_the_largest_maxsup_is_the_label_smoothing_that_show_names():
    recipe = recipe_of("maxsup", epochs=11, optim__milestones=[0.5])
    for epoch, weight in ((0, 0.1), (5, 0.15), (10, 0.2)):
        assert f"label smoothing with ε = {weight:g} (ε/K)" in "\n".join(recipe.effective_loss(K, epoch).lines())
        method, z, _ = loss_and_logits(recipe, epoch=epoch)
        assert method.values() == {"suppression_weight": pytest.approx(weight)}
        labels = z.argmax(1)
        found = gradient(method.loss(Echo(K), Batch(z, labels, labels))[0], z)
        torch.testing.assert_close(found, gradient(F.cross_entropy(z, labels, label_smoothing=weight), z))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9])
def test_the_focal_losses_gradient_is_cross_entropys_times_the_stated_slope(p):
    recipe = recipe_of("focal")
    method, _, _ = loss_and_logits(recipe)
    z = torch.full((1, K), np.log((1 - p) / (K - 1)), dtype=torch.float64)
    z[0, 2] = np.log(p)
    z.requires_grad_()
    label = torch.tensor([2])
    found = gradient(method.loss(Echo(K), Batch(z, label, label))[0], z)
    slope = focal_slope(p, 5.0 if p < 0.2 else 3.0)
    torch.testing.assert_close(found, slope * gradient(F.cross_entropy(z, label), z))
    if p >= 0.1:
        assert f"{slope:.2f} at {p:g}" in "\n".join(recipe.effective_loss(K).lines())
    else:
        assert slope == pytest.approx(1, abs=1e-3)


def test_the_margin_pulls_each_logit_beyond_it_as_much_as_is_stated():
    recipe = recipe_of("mbls", mbls__weight=0.7, mbls__margin=1.0)
    method, z, labels = loss_and_logits(recipe)
    found = gradient(method.loss(Echo(K), Batch(z, labels, labels))[0], z) - gradient(F.cross_entropy(z, labels), z)
    beyond = (z < z.amax(1, keepdim=True) - 1.0).detach()
    assert f"pulls itself up by {0.7 / K:.3g}" in recipe.effective_loss(K).lines()[1]
    expected = -0.7 / K * beyond.double()
    expected.scatter_add_(1, z.argmax(1)[:, None], -expected.sum(1, keepdim=True))
    torch.testing.assert_close(64 * found, expected)


def test_zipfs_term_leaves_the_labels_logit_alone():
    recipe = recipe_of("zipf", zipf__weight=2.0)
    method, z, labels = loss_and_logits(recipe)
    found = gradient(method.loss(Echo(K), Batch(z, labels, labels))[0], z) - gradient(F.cross_entropy(z, labels), z)
    assert found.gather(1, labels[:, None]).abs().max() < 1e-15 and found.abs().sum() > 0.1


def test_what_a_method_costs_is_said():
    scale = Scale(50_000, 1000, 90, 1.0, lambda: "")
    assert recipe_of("ols").ols.cost_lines(scale) == ["soft labels of classes per rank: 12.0 MB"]
    assert "one more forward and backward pass a step" in recipe_of("dlb").dlb.cost_lines(scale)[0]


@pytest.mark.parametrize(
    ("method", "of", "values"),
    [
        ("ols", "cifar100", {"weight": 0.5}),
        ("mbls", "tiny_imagenet", {"margin": 10.0, "weight": 0.1}),
        ("focal", "cifar100", {"gamma": 3.0, "low_gamma": 5.0, "low_probability": 0.2}),
        ("dlb", "cifar100", {"weight": 1.0, "temperature": 3.0}),
        ("zipf", "tiny_imagenet", {"weight": 1.0}),
        ("zipf", "cifar100", {"weight": 0.1}),
        ("maxsup", "imagenet", {"weight": 0.1, "final_weight": 0.2}),
    ],
)
def test_public_constants_are_presets(method, of, values):
    recipe = recipe_of(method, preset="official", preset_of=of)
    recipe.check_method(method)
    assert recipe.method_section.model_dump() == values


@pytest.mark.parametrize(
    ("method", "of", "says"),
    [
        ("dual_focal", "cifar100", "what it used for dual_focal is not public"),
        ("mbls", "cifar100", "nothing is published for mbls on .*; there is tiny_imagenet"),
        ("maxsup", "cifar100", "there is imagenet"),
    ],
)
def test_constants_that_are_not_public_are_refused(method, of, says):
    with pytest.raises(InputError, match=says):
        recipe_of(method, preset="official", preset_of=of).check_method(method)


# Comparisons


def test_groups_of_methods_have_names_and_the_papers_five_are_the_default():
    recipe, translation = load_recipe("digits"), load_recipe("translation/multi30k_de_en")
    assert method_names(recipe, ["paper"]) == ["baseline", "label_smoothing", "cskd", "tfkd", "pskd"]
    assert method_names(recipe, ["ols", "paper", "pskd"]) == ["ols", *PAPER]
    assert method_names(recipe, ["all"]) == list(METHOD_SECTIONS) == [*PAPER, *FURTHER]
    assert method_names(translation, ["all"]) == [name for name in METHODS if name not in ("cskd", "dlb")]
    assert method_names(translation, ["paper"]) == ["baseline", "label_smoothing", "tfkd", "pskd"]


# Linear RGB as people without long-, middle- and short-wave cones see it (Machado et al., 2009, severity 1).
VISION = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# Linear RGB to the cube roots' space, and on to OKLab (Ottosson, 2020).
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("vision", VISION)
def test_the_methods_colours_are_told_apart_with_any_colour_vision(vision):
    seen = {
        name: np.array(TO_LAB) @ np.cbrt(np.clip(np.array(TO_CONES) @ VISION[vision] @ linear(section.colour), 0, 1))
        for name, section in METHOD_SECTIONS.items()
    }
    distances = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(seen, 2)}
    assert min(distances.values()) > 0.09, min(distances, key=distances.get)  # the paper's five alone: 0.11


def test_the_methods_colours_stand_out_from_a_light_and_a_dark_page():
    weights = [0.2126, 0.7152, 0.0722]
    pages = [linear("#ffffff") @ weights, linear("#15171b") @ weights]
    for section in METHOD_SECTIONS.values():
        if section.colour != "#000000":  # the dark page has a light one in its place
            shades = [sorted((linear(section.colour) @ weights, page)) for page in pages]
            assert all((light + 0.05) / (dark + 0.05) > 2.2 for dark, light in shades), section.title


# In other people's loops


def test_timms_task_keeps_the_soft_labels_and_refuses_methods_that_need_a_second_view():
    from pskd_timm.adaptors import timm_task as task

    made = task.MethodTask(Echo(K), ready(OLS()))
    made.begin_epoch(0)
    made(5 * torch.eye(K)[:B], torch.stack([torch.arange(B), torch.arange(B)], 1))
    made.end_epoch()
    again = task.MethodTask(Echo(K), ready(OLS()))
    again.load_task_state(made.get_task_state())
    assert torch.equal(again.method.soft_labels, made.method.soft_labels) and made.method.soft_labels[0, 0] > 0.9
    with pytest.raises(InputError, match="DLB needs a second input"):
        task.MethodTask(Echo(K), ready(DLB()))


def test_the_trainers_checkpoints_keep_the_soft_labels(tmp_path):
    from pskd_timm.adaptors import hf_trainer as trainer

    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=3, epoch=1.0)
    (tmp_path / "checkpoint-3").mkdir()
    methods = [ready(OLS()) for _ in range(2)]
    before, after = map(trainer.MethodCallback, methods)
    before.loss({"logits": 5 * torch.eye(K)[:B]}, torch.stack([torch.arange(B), torch.arange(B)], 1))
    before.on_save(arguments, state, None)
    after.on_train_begin(arguments, state, None)
    for callback in (before, after):
        callback.on_epoch_end(arguments, state, None)
    assert torch.equal(methods[0].soft_labels, methods[1].soft_labels)
    with pytest.raises(InputError, match="cannot resume"):
        trainer.MethodCallback(ready(OLS())).on_train_begin(arguments, SimpleNamespace(global_step=4), None)
