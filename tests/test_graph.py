"""A recorded step, without a GPU: torch.fx records the operations and freezes what Python decides, as a CUDA graph does."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pskd_timm import METHODS, PSKD, Batch, InputError
from pskd_timm.run.graph import WARMUP, Recorder, StepGraph, check_recordable

N, K, EPOCHS = 23, 4, 3


def losses(name: str, settings: dict, recorded: bool) -> tuple[list[float], int]:
    """The loss of each step of a network whose weights change at random, and how many steps were replayed."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(N, 3, 4, 4, generator=generator), torch.arange(N) % K
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, K))
    method = METHODS[name](**settings)
    method.setup(num_samples=N, num_classes=K, num_epochs=EPOCHS, device="cpu", labels=labels, model=model)
    total, found, replays = torch.zeros(()), [], 0

    @torch.no_grad()
    def step(batch, weight):
        total.add_(method.loss(model, batch)[0] * weight)

    def record(work):
        # Unlike a CUDA graph, torch.fx runs what it records: that is undone.
        counted = [method.sums, method.hits] if name == "ols" else []
        changed = [total, *([method.store.home] if method.store else counted)]
        before = [tensor.clone() for tensor in changed]
        program = make_fx(work)()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

        def replay():
            nonlocal replays
            replays += 1
            program()

        return replay

    take = StepGraph(step, lambda: method.variant, record) if recorded else step
    for epoch in range(EPOCHS):
        order = torch.randperm(N, generator=generator)
        method.begin_epoch(epoch, order)
        for index in order.split(4):
            partners = images[index.flip(0)] if method.needs_partners else None
            take(Batch(images[index], labels[index], index, partners), 0.5)
            found.append(total.item())
            total.zero_()
            for weights in model.parameters():
                weights.data.add_(0.1 * torch.randn(weights.shape, generator=generator))
        method.end_epoch()
    return found, replays


@pytest.mark.parametrize(
    "name, settings",
    [
        ("baseline", {}),
        ("label_smoothing", {}),
        ("cskd", {}),
        ("tfkd", {}),
        ("ols", {}),
        ("mbls", {"margin": 0.1}),
        ("focal", {}),
        ("dual_focal", {}),
        ("zipf", {}),
        ("maxsup", {}),
        ("pskd", {}),
        ("pskd", {"store_topk": 2}),
        ("pskd", {"teacher": "snapshot"}),
        ("pskd", {"teacher": "snapshot", "alpha_warmup_epochs": 2}),
    ],
)
def test_a_recorded_step_gives_the_losses_of_the_plain_one_through_tails_and_epochs(name, settings):
    plain, _ = losses(name, settings, recorded=False)
    replayed, replays = losses(name, settings, recorded=True)
    assert replayed == pytest.approx(plain, rel=1e-6)
    full, variants = (N // 4) * EPOCHS, 2 if "teacher" in settings else 1
    assert replays == full - variants * WARMUP


def test_a_step_that_cannot_be_recorded_is_told_in_a_line(monkeypatch):
    @contextmanager
    def recording(graph, **_):
        try:
            yield
        finally:  # as torch ends one
            raise RuntimeError("operation failed due to a previous error during capture")

    def refused():
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture\nand more")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("torch.cuda.graph", recording)
    for name in ("CUDAGraph", "graph_pool_handle"):
        monkeypatch.setattr(f"torch.cuda.{name}", object)
    with pytest.raises(InputError, match=r"cannot be recorded \(Cannot call .* capture\): use model.compile default"):
        Recorder()(refused)
    with pytest.raises(torch.OutOfMemoryError):
        Recorder()(full)


def test_a_step_with_a_store_on_the_cpu_is_not_recorded():
    known = {"num_samples": 4, "num_classes": 2, "num_epochs": 1, "device": "cpu"}
    with pytest.raises(InputError, match="graphs needs the prediction store on the GPU"):
        check_recordable(PSKD().setup(**known))
    check_recordable(PSKD(teacher="snapshot").setup(**known))
