"""Mixup and cutmix: the images against a loop over them, each method's loss against its definition written anew."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pskd_timm import METHODS, Batch, InputError, train
from pskd_timm.data import Loader
from pskd_timm.data.augmentation import cutmix, mixup
from pskd_timm.data.split import Split
from pskd_timm.recipe import Augment

K, LAM = 5, 0.7
PERMUTATION = torch.tensor([1, 0, 3, 2, 4])  # the last one is left alone
LABELS = torch.tensor([0, 3, 2, 2, 4])
INDEX = torch.tensor([7, 1, 5, 0, 2])


def test_mixup_and_cutmix_equal_a_loop_over_the_images():
    images = torch.randn(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    for i, mixed in enumerate(mixup(images, PERMUTATION, LAM)):
        assert mixed.numpy() == pytest.approx((LAM * images[i] + 0.3 * images[PERMUTATION[i]]).numpy(), abs=1e-6)
    # A box of sqrt(0.3) of each side: 4 of 8 rows, 3 of 6 columns; the second one sticks out below and is clipped.
    for centre, rows, columns in (((0.5, 0.5), range(2, 6), range(2, 5)), ((0.99, 0.5), range(5, 8), range(2, 5))):
        mixed, lam = cutmix(images, PERMUTATION, LAM, centre)
        assert lam == pytest.approx(1 - len(rows) * len(columns) / 48)
        for i in range(5):
            for y in range(8):
                for x in range(6):
                    source = PERMUTATION[i] if y in rows and x in columns else i
                    assert torch.equal(mixed[i, :, y, x], images[source, :, y, x])


class Says(nn.Module):
    """A network whose logits are its weights, whatever it sees."""

    num_classes, pretrained_cfg = K, {"architecture": "says"}

    def __init__(self, seed):
        super().__init__()
        self.logits = nn.Parameter(2 * torch.randn(5, K, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images):
        return self.logits + 0.0 * images.mean()


def mixed_batch():
    return Batch(torch.zeros(5, 3, 4, 4), LABELS, INDEX, permutation=PERMUTATION, lam=torch.tensor(LAM))


def log_softmax(row, temperature=1.0):
    row = np.asarray(row, dtype=float) / temperature
    return row - np.log(np.exp(row).sum())


def kl(q, log_p):
    return float((q * (np.log(q) - log_p)).sum())


def definition(name, settings, student, teacher, last):
    """The mean over the images of the loss, for one image at a time and in plain words: both labels, each with its share."""
    losses = []
    for i in range(5):
        log_p = log_softmax(student[i])
        shares = ((LAM, i), (1 - LAM, int(PERMUTATION[i])))
        cross_entropy = sum(share * -log_p[LABELS[j]] for share, j in shares)
        if name == "baseline":
            losses.append(cross_entropy)
        elif name == "label_smoothing":
            losses.append(0.9 * cross_entropy + 0.1 * -log_p.mean())
        elif name == "tfkd" and teacher is None:
            q = [
                np.exp(log_softmax([0.99 if k == LABELS[j] else 0.01 / (K - 1) for k in range(K)], 20))
                for _, j in shares
            ]
            losses.append(
                0.9 * cross_entropy + 0.1 * sum(w * kl(qj, log_p) for (w, _), qj in zip(shares, q, strict=True))
            )
        elif name == "tfkd":  # the teacher looks at the mixed image itself
            term = kl(np.exp(log_softmax(teacher[i], 6)), log_softmax(student[i], 6))
            losses.append(0.05 * cross_entropy + 0.95 * 0.5 * 36 * term)
        elif settings.get("teacher") == "snapshot":
            losses.append(0.6 * cross_entropy + 0.4 * -(np.exp(log_softmax(teacher[i])) * log_p).sum())
        else:
            target = sum(share * last[int(INDEX[j])] for share, j in shares)
            losses.append(0.6 * cross_entropy + 0.4 * -(target * log_p).sum())
    return np.mean(losses)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("baseline", {}),
        ("label_smoothing", {}),
        ("tfkd", {}),
        ("tfkd", {"teacher": Says(9), "alpha": 0.95, "temperature": 6.0}),
        ("pskd", {"store_dtype": "float32"}),
        ("pskd", {"teacher": "snapshot"}),
    ],
)
def test_the_loss_of_mixed_images_is_its_definition_and_no_stored_row_changes(name, settings):
    model, method = Says(1), METHODS[name](**settings)
    method.setup(num_samples=8, num_classes=K, num_epochs=2, device="cpu", model=model)
    last = np.random.default_rng(0).dirichlet(np.ones(K), 8)
    teacher = settings["teacher"].logits.detach().numpy() if name == "tfkd" and settings else None
    if settings.get("teacher") == "snapshot":
        method.begin_epoch(0, torch.arange(8))
        method.loss(model, mixed_batch())
        method.end_epoch()
        teacher = model.logits.detach().numpy().copy()
        model.logits.data.add_(torch.randn(5, K, generator=torch.Generator().manual_seed(5)))
    if method.store:
        method.begin_epoch(0, torch.arange(8))
        method.store.write(torch.arange(8), torch.tensor(last))
    method.alpha_now = 0.4
    if name == "pskd":
        method._alpha.fill_(0.4)
    loss, _ = method.loss(model, mixed_batch())
    expected = definition(name, settings, model.logits.detach().numpy(), teacher, last)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    if method.store:
        assert method.store.gather().numpy() == pytest.approx(last, abs=1e-6)


def loader(rank=0, world_size=1, **settings):
    images = torch.randint(256, (40, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(40) % K, torch.arange(40))
    section = Augment(hflip=0.5, **settings)
    return Loader(split, K, 30, 8, section, [0.5] * 3, [0.5] * 3, 3, rank, world_size, partners=False)


def test_the_same_batches_are_mixed_alike_on_two_ranks_as_on_one_and_a_share_of_them():
    settings = {"mixup": 0.4, "cutmix": 1.0, "mix_prob": 0.6}
    alone, *ranks = loader(**settings), loader(0, 2, **settings), loader(1, 2, **settings)
    lams = []
    for epoch in range(30):
        whole = [batch for (batch,) in alone.batches(alone.rank_batches(epoch), epoch)]
        halves = [[batch for (batch,) in one.batches(one.rank_batches(epoch), epoch)] for one in ranks]
        for batch, *parts in zip(whole, *halves, strict=True):
            assert torch.equal(batch.inputs, torch.cat([part.inputs for part in parts]))
            assert all((part.lam is None) == (batch.lam is None) for part in parts)
            if batch.lam is not None:
                lams.append(batch.lam.item())
                assert batch.permutation.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
        unmixed = sum(len(batch.index) for batch in whole if batch.permutation is None)
        assert unmixed == alone.rows_renewed(epoch) == ranks[1].rows_renewed(epoch)
    assert len(lams) / 150 == pytest.approx(0.6, abs=0.12)
    assert min(lams) < 0.2 and max(lams) > 0.8 and np.mean(lams) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("world_size, accumulate", [(3, 1), (1, 3), (2, 2)])
def test_pairs_stay_together_on_any_number_of_ranks_and_forward_passes(world_size, accumulate):
    settings = {"mixup": 0.4, "mix_prob": 1.0}
    alone = loader(**settings)
    ranks = [loader(rank, world_size, **settings) for rank in range(world_size)]
    whole = [batch for (batch,) in alone.batches(alone.rank_batches(0), 0)]
    parts = [list(one.batches(one.rank_batches(0), 0, accumulate)) for one in ranks]
    for batch, *shares in zip(whole, *parts, strict=True):
        found = [part for share in shares for part in share]
        assert len(found) == world_size * accumulate
        assert torch.equal(batch.inputs, torch.cat([part.inputs for part in found]))


def test_a_run_with_mixing_tells_how_many_rows_were_renewed(tiny):
    settings = {"augment.cutmix": 1.0, "augment.mix_prob": 0.7, "checkpoint.keep": 3, "epochs": 3}
    result = train(tiny(method="pskd", **settings))
    renewed = [line["rows_renewed"] for line in result.history]
    assert all(0 <= count < 300 and (count % 64 in (0, 300 % 64)) for count in renewed)
    assert len(set(renewed)) > 1 and all(math.isfinite(line["train_loss"]) for line in result.history)


def test_mixing_that_has_no_meaning_is_refused(tiny):
    with pytest.raises(InputError, match="do not go with cskd: it compares two images of one class"):
        train(tiny(method="cskd", augment__mixup=0.2))
    with pytest.raises(InputError, match="no stored prediction is ever renewed"):
        train(tiny(method="pskd", augment__cutmix=1.0, augment__mix_share=1.0))
