"""Each method's loss against its formula, written out here in NumPy float64 from the papers, not from our code."""

import numpy as np
import pytest
import torch
from reference import Echo, cross_entropy, kl, softmax
from torch import nn

from pskd_timm import CSKD, METHODS, PSKD, TFKD, Batch, InputError, LabelSmoothing
from pskd_timm.methods.base import frozen
from pskd_timm.methods.baseline import Baseline

N, K, B, E = 23, 7, 5, 4


def one_hot(labels):
    return np.eye(K)[labels]


def batch_of(z, labels, index, partners=None):
    return Batch(
        torch.tensor(z), torch.tensor(labels), torch.tensor(index), None if partners is None else torch.tensor(partners)
    )


def ready(method):
    return method.setup(num_samples=N, num_classes=K, num_epochs=E, device="cpu")


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, K)) * 2, rng.integers(0, K, B), rng.normal(size=(B, K)) * 2


def loss_of(method, z, labels, partners=None):
    loss, logits = ready(method).loss(Echo(K), batch_of(z, labels, np.arange(B), partners))
    assert np.array_equal(logits.numpy(), z)
    return loss.item()


def test_baseline_is_cross_entropy(problem):
    z, labels, _ = problem
    assert loss_of(Baseline(), z, labels) == pytest.approx(cross_entropy(one_hot(labels), z), rel=1e-12)


def test_label_smoothing_spreads_epsilon_over_all_classes(problem):
    z, labels, _ = problem
    targets = 0.9 * one_hot(labels) + 0.1 / K
    assert loss_of(LabelSmoothing(0.1), z, labels) == pytest.approx(cross_entropy(targets, z), rel=1e-12)


def test_label_smoothing_can_spread_epsilon_over_the_other_classes(problem):
    z, labels, _ = problem
    targets = np.where(one_hot(labels) == 1, 0.9, 0.1 / (K - 1))
    assert loss_of(LabelSmoothing(0.1, "others"), z, labels) == pytest.approx(cross_entropy(targets, z), rel=1e-12)


def test_cskd_adds_the_tempered_kl_from_the_partner(problem):
    z, labels, partners = problem
    expected = cross_entropy(one_hot(labels), z) + 3 * 16 * kl(softmax(partners / 4), softmax(z / 4))
    assert loss_of(CSKD(weight=3, temperature=4), z, labels, partners) == pytest.approx(expected, rel=1e-12)


def test_cskd_teaches_the_anchor_only(problem):
    z, labels, partners = problem
    batch = batch_of(z, labels, np.arange(B), partners)
    batch.inputs.requires_grad_(), batch.partner_inputs.requires_grad_()
    ready(CSKD()).loss(Echo(K), batch)[0].backward()
    assert batch.inputs.grad.abs().sum() > 0 and batch.partner_inputs.grad is None


def test_cskd_runs_partners_in_train_mode_so_running_statistics_move_twice_a_step():
    model = nn.BatchNorm1d(K)
    batch = Batch(torch.randn(B, K), torch.zeros(B, dtype=torch.long), torch.arange(B), torch.randn(B, K))
    ready(CSKD()).loss(model, batch)
    assert model.num_batches_tracked == 2


def test_cskds_partners_in_eval_mode_are_seen_through_running_statistics_that_they_do_not_move():
    class Network(nn.Sequential):
        num_classes = K

    model, again = (Network(nn.BatchNorm1d(K), nn.Dropout(0.5)) for _ in range(2))
    model[1].eval()  # a part that was in eval mode stays in it
    again[1].eval()
    batch = Batch(torch.randn(B, K), torch.zeros(B, dtype=torch.long), torch.arange(B), torch.randn(B, K))
    loss, _ = ready(CSKD(weight=1, temperature=4, partner_mode="eval")).loss(model, batch)
    z = again(batch.inputs).detach().numpy()
    norm = again[0]
    partners = ((batch.partner_inputs - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).numpy()
    expected = cross_entropy(one_hot(batch.labels), z) + 16 * kl(softmax(partners / 4), softmax(z / 4))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert model[0].num_batches_tracked == 1 and model[0].training and not model[1].training
    assert torch.equal(model[0].running_mean, norm.running_mean)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("reduction", "multiplier"), [("mean", 3.0), ("batchmean", 3.0), ("batchmean", None)])
@pytest.mark.parametrize("temper_student", [False, True])
def test_tfkds_variants_are_their_formulas(problem, trained, reduction, multiplier, temper_student):
    z, labels, theirs = problem
    alpha, temperature = 0.3, 5.0
    q = softmax(theirs / 5) if trained else softmax(np.where(one_hot(labels) == 1, 0.99, 0.01 / (K - 1)) / 5)
    weight = (multiplier or (0.5 if trained else 1)) * (25 if trained else 1) / (K if reduction == "mean" else 1)
    p = softmax(z / 5) if temper_student else softmax(z)
    expected = 0.7 * cross_entropy(one_hot(labels), z) + 0.3 * weight * kl(q, p)
    teacher = Echo(K) if trained else None
    if trained:
        teacher.forward = lambda x: torch.tensor(theirs)
    method = TFKD(teacher, alpha, temperature, multiplier, reduction=reduction, temper_student=temper_student)
    assert loss_of(method, z, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("multiplier", [None, 3.0])
def test_tfkd_with_the_virtual_teacher_is_the_released_formula(problem, multiplier):
    z, labels, _ = problem
    alpha, temperature, true = 0.1, 20.0, 0.99
    q = np.where(one_hot(labels) == 1, true, (1 - true) / (K - 1))
    kl_el = kl(softmax(q / temperature), softmax(z)) / K
    expected = (1 - alpha) * cross_entropy(one_hot(labels), z) + alpha * (multiplier or K) * kl_el
    assert loss_of(TFKD(None, alpha, temperature, multiplier, true), z, labels) == pytest.approx(expected, rel=1e-12)


def test_tfkd_with_a_trained_teacher_is_the_released_formula(problem):
    z, labels, _ = problem
    teacher = Echo(K)
    teacher.forward = lambda x: torch.flip(x, [1])
    kl_el = kl(softmax(z[:, ::-1] / 6), softmax(z / 6)) / K
    expected = 0.05 * cross_entropy(one_hot(labels), z) + 0.95 * 50 * 36 * kl_el
    assert loss_of(TFKD(teacher, alpha=0.95, temperature=6, multiplier=50), z, labels) == pytest.approx(
        expected, rel=1e-12
    )


def test_tfkd_refuses_a_teacher_of_other_classes():
    teacher = Echo(K)
    teacher.num_classes = 3
    with pytest.raises(InputError, match=f"3 classes, the data {K}"):
        ready(TFKD(teacher))


def test_a_teacher_lies_in_memory_as_its_student_does():
    last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert frozen(nn.Conv2d(3, 4, 3), like=last).weight.stride() == last.weight.stride()
    assert frozen(nn.Conv2d(3, 4, 3), like=nn.Conv2d(3, 4, 3)).weight.is_contiguous()


def test_tfkds_teacher_stays_in_eval_mode_and_learns_nothing():
    class Network(nn.Sequential):
        num_classes = K

    teacher = Network(nn.Linear(K, K), nn.Dropout(0.5))
    method = ready(TFKD(teacher))
    batch = batch_of(np.ones((B, K), dtype=np.float32), [0] * B, np.arange(B))
    assert method.loss(Echo(K), batch)[0] == method.loss(Echo(K), batch)[0]
    assert not any(p.requires_grad for p in teacher.parameters())


class Recomputed:
    """PS-KD from the paper alone: dictionaries and loops, no table, no store."""

    def __init__(self, alpha, num_epochs):
        self.alpha, self.num_epochs, self.seen = alpha, num_epochs, {}

    def loss(self, epoch, ids, z, labels):
        alpha = self.alpha * (epoch + 1) / self.num_epochs
        p, total = softmax(z), 0.0
        for row, (sample, label) in enumerate(zip(ids, labels, strict=True)):
            last = self.seen.get(sample, np.eye(K)[label])
            target = (1 - alpha) * np.eye(K)[label] + alpha * last
            total -= (target * np.log(p[row])).sum()
        for row, sample in enumerate(ids):
            self.seen[sample] = p[row]
        return total / len(ids)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6), ("float16", 2e-3)])
def test_pskd_equals_an_independent_recomputation_in_losses_rows_and_alpha(dtype, tolerance):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, K, N)
    pskd, expected = ready(PSKD(alpha=0.8, store_dtype=dtype)), Recomputed(0.8, E)
    for epoch in range(E):
        ids = rng.permutation(N)
        pskd.begin_epoch(epoch, torch.tensor(ids))
        assert pskd.values() == {"alpha": pytest.approx(0.8 * (epoch + 1) / E)}
        for start in range(0, N, B):  # 23 samples in batches of 5: the last has three
            index = ids[start : start + B]
            z = rng.normal(size=(len(index), K)) * 2
            loss, _ = pskd.loss(Echo(K), batch_of(z, labels[index], index))
            assert loss.dtype == torch.float64
            assert loss.item() == pytest.approx(expected.loss(epoch, index, z, labels[index]), rel=tolerance)
        pskd.end_epoch()
        table = pskd.store.gather()
        for sample in range(N):
            assert table[sample].numpy() == pytest.approx(expected.seen[sample], abs=tolerance)


def test_pskds_first_epoch_is_plain_cross_entropy(problem):
    z, labels, _ = problem
    pskd = ready(PSKD(alpha=0.8))
    pskd.begin_epoch(0, torch.arange(B))
    loss, _ = pskd.loss(Echo(K), batch_of(z, labels, np.arange(B)))
    assert loss.item() == pytest.approx(cross_entropy(one_hot(labels), z), rel=1e-12)


def test_no_gradient_flows_into_pskds_stored_predictions(problem):
    z, labels, _ = problem
    pskd = ready(PSKD(alpha=0.8, store_dtype="float64"))
    last = softmax(np.random.default_rng(3).normal(size=(B, K)))
    pskd.begin_epoch(E - 1, torch.arange(B))
    pskd.store.write(torch.arange(B), torch.tensor(last))
    batch = batch_of(z, labels, np.arange(B))
    batch.inputs.requires_grad_()
    pskd.loss(Echo(K), batch)[0].backward()
    target = 0.2 * one_hot(labels) + 0.8 * last
    assert batch.inputs.grad.numpy() == pytest.approx((softmax(z) - target) / B, rel=1e-9)
    assert not pskd.store.rows.requires_grad


def test_pskd_takes_the_softmax_in_float32_of_half_precision_logits(problem):
    z, labels, _ = problem
    half = torch.tensor(z).bfloat16()
    pskd = ready(PSKD(alpha=0.8, store_dtype="float32"))
    pskd.begin_epoch(0, torch.arange(B))
    loss, _ = pskd.loss(Echo(K), Batch(half, torch.tensor(labels), torch.arange(B)))
    assert loss.dtype == torch.float32
    assert torch.equal(pskd.store.rows[:B], half.float().softmax(1))


class WithNorm(nn.Sequential):
    """A network whose modes differ: batch norm and dropout."""

    num_classes = K

    def __init__(self):
        super().__init__(nn.Linear(K, K), nn.BatchNorm1d(K), nn.Dropout(0.3))


def wrapped_by_torch_compile(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [lambda model: model, wrapped_by_torch_compile], ids=["bare", "compiled"])
def test_pskds_snapshot_teacher_is_last_epochs_network_in_eval_mode_on_the_current_view(wrap):
    torch.manual_seed(0)
    model = WithNorm()
    seen = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    pskd = ready(PSKD(alpha=0.8, teacher="snapshot"))
    images, labels = torch.randn(N, K), torch.randint(K, (N,))
    last = None  # weights and statistics at the end of the last epoch
    for epoch in range(E):
        pskd.begin_epoch(epoch, torch.arange(N))
        for index in torch.randperm(N).split(B):
            view = images[index] + 0.1 * torch.randn(len(index), K)
            loss, logits = pskd.loss(seen, Batch(view, labels[index], index))
            label, z = one_hot(labels[index].numpy()), logits.detach().double().numpy()
            if last is None:
                target = label
            else:
                weight, bias, gamma, beta, mean, var = (t.double().numpy() for t in last)
                hidden = (view.double().numpy() @ weight.T + bias - mean) / np.sqrt(var + model[1].eps) * gamma + beta
                target = (1 - 0.8 * (epoch + 1) / E) * label + 0.8 * (epoch + 1) / E * softmax(hidden)
            assert loss.item() == pytest.approx(cross_entropy(target, z), rel=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last = [t.clone() for name, t in model.state_dict().items() if "num_batches" not in name]
        pskd.end_epoch()
    assert model.training and model[1].num_batches_tracked == E * -(-N // B)
    assert pskd.store is None and not any(p.requires_grad for p in pskd.snapshot.frozen.parameters())
    again = PSKD(alpha=0.8, teacher="snapshot").setup(
        num_samples=N, num_classes=K, num_epochs=E, device="cpu", model=WithNorm()
    )
    again.load_state_dict(pskd.state_dict())
    assert torch.equal(again.snapshot.logits(images), pskd.snapshot.logits(images))


def test_a_snapshot_teacher_that_starts_in_mid_way_takes_the_network_it_was_given_or_asks_for_it():
    pskd = PSKD(teacher="snapshot")
    pskd.setup(num_samples=N, num_classes=K, num_epochs=E, device="cpu", model=WithNorm())
    pskd.begin_epoch(2, torch.arange(N))
    assert pskd.snapshot.frozen is not None
    with pytest.raises(InputError, match="model=model"):
        ready(PSKD(teacher="snapshot")).begin_epoch(2, torch.arange(N))


def test_a_snapshot_teacher_is_not_asked_in_epochs_where_alpha_is_zero(problem):
    z, labels, _ = problem
    pskd = PSKD(teacher="snapshot", alpha_warmup_epochs=2)
    pskd.setup(num_samples=N, num_classes=K, num_epochs=E, device="cpu", model=Echo(K))
    asked = []
    for epoch in range(E):
        pskd.begin_epoch(epoch, torch.arange(B))
        if epoch == 1:
            pskd.snapshot.frozen.register_forward_hook(lambda *_: asked.append(pskd.alpha_now))
        loss, _ = pskd.loss(Echo(K), batch_of(z, labels, np.arange(B)))
        if epoch < 2:
            assert loss.item() == pytest.approx(cross_entropy(one_hot(labels), z), rel=1e-12)
        pskd.end_epoch()
    assert asked == pytest.approx([0.4, 0.8])


def test_pskds_schedule_reaches_the_loss(problem):
    z, labels, _ = problem
    pskd = ready(PSKD(alpha=0.8, store_dtype="float64", alpha_schedule="cosine", alpha_warmup_epochs=1))
    last = softmax(np.random.default_rng(3).normal(size=(B, K)))
    for epoch, alpha in enumerate((0.0, 0.8 * 0.25, 0.8 * 0.75, 0.8)):  # (1 − cos πt)/2 at t = 1/3, 2/3, 1
        pskd.begin_epoch(epoch, torch.arange(B))
        pskd.store.write(torch.arange(B), torch.tensor(last))
        loss, _ = pskd.loss(Echo(K), batch_of(z, labels, np.arange(B)))
        assert loss.item() == pytest.approx(cross_entropy((1 - alpha) * one_hot(labels) + alpha * last, z), rel=1e-12)
        pskd.end_epoch()


@pytest.mark.parametrize("wrong", [{"teacher": "shop"}, {"alpha_schedule": "square"}])
def test_pskd_refuses_what_it_does_not_know(wrong):
    with pytest.raises(InputError, match="must be"):
        PSKD(**wrong)


def test_pskd_refuses_an_alpha_that_is_no_weight():
    with pytest.raises(InputError, match="alpha must lie in"):
        PSKD(alpha=1.7)


def test_every_method_is_in_the_table_under_its_own_name():
    paper = ["baseline", "label_smoothing", "cskd", "tfkd", "pskd"]
    assert list(METHODS) == [*paper, "ols", "mbls", "focal", "dual_focal", "dlb", "zipf", "maxsup"]
