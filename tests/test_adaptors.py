"""Each loop is the other library's own; what it must give is what `train` logged, step by step."""

import gc
import json

import numpy as np
import pytest
import timm.task
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_loader
from timm.data.loader import PrefetchLoader, fast_collate
from timm.utils import CheckpointSaver
from torchmetrics import MetricCollection

from pskd_timm import METHODS, PSKD, InputError, load_recipe, score, train
from pskd_timm.adaptors import Indexed
from pskd_timm.adaptors.metric import CalibrationMetrics
from pskd_timm.data import load_data
from pskd_timm.models.build import normalisation
from pskd_timm.order import epoch_order
from pskd_timm.run.result import read_lines
from pskd_timm.tasks import open_task

EPOCHS = 3


@pytest.fixture
def plain(tiny):
    """The tiny recipe without augmentation and with a constant rate; 256 samples are whole batches only."""
    given = {"epochs": EPOCHS, "data__limit_train": 256, "augment__crop_padding": 0, "optim__schedule": "constant"}
    return lambda **settings: tiny(**given | settings)


def ours(recipe):
    """Losses of every step, and the network after the last, of our own loop."""
    result = train(recipe)
    losses = [line["loss"] for line in read_lines(result.run_dir / "steps.jsonl")]
    return losses, timm.create_model(f"local-dir:{result.run_dir}", pretrained=True)


def method_of(recipe, data):
    method = METHODS[recipe.method].from_section(getattr(recipe, recipe.method).model_dump())
    sizes = {"num_samples": len(data.train), "num_classes": data.num_classes, "num_epochs": recipe.epochs}
    return method.setup(**sizes, device="cpu", labels=data.train.labels)


def sgd(model, recipe):
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": recipe.optim.weight_decay}
    return torch.optim.SGD(model.parameters(), recipe.optim.lr, **options)


class InOurOrder(torch.utils.data.Sampler):
    """The order of our own loop, epoch after epoch, for the other loops to follow."""

    def __init__(self, num_samples, seed, epoch=0):
        self.num_samples, self.seed, self.epoch = num_samples, seed, epoch

    def __len__(self):
        return self.num_samples

    def __iter__(self):
        yield from epoch_order(self.num_samples, self.seed, self.epoch).tolist()
        self.epoch += 1


class Pictures:
    """The training split as timm's data sets give it."""

    transform = None

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        image = Image.fromarray(self.split.images[i].permute(1, 2, 0).numpy())
        return self.transform(image), int(self.split.labels[i])


def timms_loop(recipe, data, folder, stop_after=EPOCHS, resume=None):
    """Training with timm's loader, task, saver and resume, as its documentation writes the loop."""
    from pskd_timm.adaptors.timm_task import MethodTask

    model = open_task(recipe).network()
    mean, std = normalisation(model, recipe)
    options = {
        "is_training": True,
        "no_aug": True,
        "num_workers": 0,
        "persistent_workers": False,
        "device": torch.device("cpu"),
    }
    loader = create_loader(Indexed(Pictures(data.train)), (3, 8, 8), recipe.batch_size, mean=mean, std=std, **options)
    task = MethodTask(model, method_of(recipe, data))
    optimizer = sgd(task.get_trainable_module(), recipe)
    first = timm.task.resume_task_checkpoint(task, resume, optimizer) if resume else 0
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(folder), task=task)
    # timm's loaders draw their own order; here it is ours, to be compared.
    loader.loader.batch_sampler.sampler = InOurOrder(len(data.train), recipe.seed, first)
    losses = []
    for epoch in range(first, stop_after):
        task.begin_epoch(epoch)
        task.train()
        for input, target in loader:
            result = task(input, target)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            losses.append(result["loss"].item())
            assert result["output"].shape == (recipe.batch_size, data.num_classes)
        task.end_epoch()
        saver.save_checkpoint(epoch, metric=epoch)
    return losses, task


@pytest.mark.parametrize("settings", [{}, {"pskd__teacher": "snapshot"}, {"method": "tfkd"}], ids=str)
def test_timms_task_gives_the_losses_and_the_network_of_our_own_loop(plain, tmp_path, settings):
    recipe = plain(**settings)
    losses, network = ours(recipe)
    found, task = timms_loop(recipe, load_data(recipe.data, recipe.augment), tmp_path)
    assert len(found) == EPOCHS * 4 and found == pytest.approx(losses, abs=1e-6)
    for (name, one), other in zip(
        network.state_dict().items(), task.trainable_module.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("teacher", ["store", "snapshot"])
def test_a_resumed_timm_checkpoint_brings_back_what_the_method_remembers(plain, tmp_path, teacher):
    recipe = plain(pskd__teacher=teacher)
    data = load_data(recipe.data, recipe.augment)
    whole, _ = timms_loop(recipe, data, tmp_path)
    timms_loop(recipe, data, tmp_path, stop_after=2)
    rest, task = timms_loop(recipe, data, tmp_path, resume=str(tmp_path / "last.pth.tar"))
    assert rest == whole[8:]
    if teacher == "store":
        with pytest.raises(InputError, match="not of this method and data set"):
            task.load_task_state({"predictions": torch.zeros(3, 10), "method": {}})


def distributed_parts(distributed):
    """A linear network on 64 digits with timm's loader, and the task for it; in each process, or in one for all."""
    from pskd_timm.adaptors.timm_task import MethodTask

    given = {"data.limit_train": 64, "model.kwargs": {"width": 4}, "data.gaussian_noise": 0}
    recipe = load_recipe("digits", given)
    data = load_data(recipe.data, recipe.augment)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    options = {
        "is_training": True,
        "no_aug": True,
        "num_workers": 0,
        "persistent_workers": False,
        "device": torch.device("cpu"),
    }
    loader = create_loader(Indexed(Pictures(data.train)), (3, 8, 8), 8, distributed=distributed, **options)
    sizes = {"num_samples": 64, "num_classes": 10, "num_epochs": 3, "device": "cpu"}
    task = MethodTask(model, PSKD(alpha=0.8, store_dtype="float32").setup(**sizes))
    return loader, task, torch.optim.SGD(model.parameters(), 0.02)


def one_rank(rank, folder):
    """Writes this rank's losses, and rank 0's checkpoints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    losses = distributed_losses(rank, folder)
    gc.collect()  # DDP goes before its group: torch 2.11 can wait for ever where the group goes with it
    (folder / f"losses-{rank}").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


def distributed_losses(rank, folder):
    """The losses of timm's distributed loader, DDP and saver with PS-KD's task, on this rank."""
    loader, task, optimizer = distributed_parts(distributed=True)
    saver = CheckpointSaver(task.trainable_module, optimizer, checkpoint_dir=str(folder), task=task)
    task.prepare_distributed()
    losses = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        task.begin_epoch(epoch, order=list(loader.sampler))
        for images, pairs in loader:
            result = task(images, pairs)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            losses.append(result["loss"].item())
        task.end_epoch()
        if rank == 0:
            saver.save_checkpoint(epoch, metric=epoch)
    return losses


def test_timms_task_on_two_processes_gives_the_losses_and_the_table_of_one(tmp_path):
    # Forked from here they would share autograd's and OpenMP's locks, and might wait for ever.
    torch.multiprocessing.start_processes(one_rank, (tmp_path,), nprocs=2, start_method="forkserver")
    by_rank = [json.loads((tmp_path / f"losses-{rank}").read_text()) for rank in (0, 1)]
    loader, task, optimizer = distributed_parts(distributed=False)
    dataset, losses = loader.loader.dataset, []
    for epoch in range(3):
        # What torch's sampler gives each of two ranks, batch by batch together.
        orders = [torch.utils.data.DistributedSampler(dataset, 2, rank, seed=0) for rank in (0, 1)]
        for order in orders:
            order.set_epoch(epoch)
        task.begin_epoch(epoch)
        shares = [torch.tensor(list(order)).split(8) for order in orders]
        for ids in map(torch.cat, zip(*shares, strict=True)):
            ((images, pairs),) = PrefetchLoader(
                [fast_collate([dataset[i] for i in ids.tolist()])], device=torch.device("cpu")
            )
            loss = task(images, pairs)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        task.end_epoch()
    assert np.mean(by_rank, axis=0).tolist() == pytest.approx(losses, abs=1e-6) and by_rank[0] != by_rank[1]
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)["task_state"]["predictions"]
    torch.testing.assert_close(saved, task.method.store.gather(), atol=1e-6, rtol=0)


def test_timms_task_refuses_plain_labels_and_methods_that_need_partners(plain):
    from pskd_timm.adaptors.timm_task import MethodTask

    recipe = plain()
    data = load_data(recipe.data, recipe.augment)
    task = MethodTask(open_task(recipe).network(), method_of(recipe, data))
    with pytest.raises(InputError, match=r"wrap the training set, Indexed"):
        task(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match="CSKD needs a second input"):
        MethodTask(open_task(recipe).network(), METHODS["cskd"]())


class ForTrainer(torch.nn.Module):
    """A network as the Trainer wants it: named inputs, logits in a mapping."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixel_values, labels=None):
        return {"logits": self.network(pixel_values)}


class Samples(torch.utils.data.Dataset):
    """A split as mappings, normalised."""

    def __init__(self, split, mean, std):
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.pixels, self.labels = (split.images.float() - 255 * mean) / (255 * std), split.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "label": int(self.labels[i])}


def trainers_loop(recipe, data, folder, resume=None, accumulate=1, **arguments):
    """The HF Trainer's own `train`; the losses that it was given."""
    from transformers import Trainer, TrainingArguments

    from pskd_timm.adaptors.hf_trainer import MethodCallback

    network = open_task(recipe).network()
    mean, std = normalisation(network, recipe)
    callback = MethodCallback(method_of(recipe, data))
    losses = []

    def watched(outputs, labels, num_items_in_batch=None):
        loss = callback.loss(outputs, labels, num_items_in_batch)
        if outputs["logits"].requires_grad:
            losses.append(loss.item())
        return loss

    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "report_to": [], "disable_tqdm": True}
    options |= {"use_cpu": True, "max_grad_norm": 0.0, "num_train_epochs": EPOCHS, "label_names": ["labels"]}
    options |= {
        "per_device_train_batch_size": recipe.batch_size // accumulate,
        "gradient_accumulation_steps": accumulate,
    }
    optimizer = sgd(network, recipe)
    trainer = Trainer(
        ForTrainer(network),
        TrainingArguments(str(folder), **options | arguments),
        train_dataset=Indexed(Samples(data.train, mean, std)),
        eval_dataset=Samples(data.test, mean, std),
        compute_loss_func=watched,
        callbacks=[callback],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    # The Trainer draws an order of its own; here it is ours, to be compared.
    sampler = InOurOrder(len(data.train), recipe.seed, 2 if resume else 0)
    trainer._get_train_sampler = lambda dataset=None: sampler
    trainer.train(resume_from_checkpoint=resume)
    return losses, trainer


def test_the_trainer_gives_the_losses_and_the_network_of_our_own_loop_and_goes_on_from_a_checkpoint(plain, tmp_path):
    recipe = plain()
    losses, network = ours(recipe)
    data = load_data(recipe.data, recipe.augment)
    found, trainer = trainers_loop(recipe, data, tmp_path / "hf")
    assert found == pytest.approx(losses, abs=1e-6)
    for (name, one), other in zip(
        network.state_dict().items(), trainer.model.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
    # In evaluation labels are plain and the loss is cross-entropy.
    logged = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    ours_logged = [line["nll"] for line in read_lines(recipe.run_dir / "metrics.jsonl")]
    assert logged == pytest.approx(ours_logged, rel=0.02)  # the Trainer averages over batches, the last a short one

    rest, _ = trainers_loop(recipe, data, tmp_path / "hf", resume=str(tmp_path / "hf" / "checkpoint-8"))
    assert rest == pytest.approx(losses[8:], abs=1e-6)
    (tmp_path / "hf" / "checkpoint-8" / "predictions.safetensors").unlink()
    with pytest.raises(InputError, match="checkpoint-8"):
        trainers_loop(recipe, data, tmp_path / "hf", resume=str(tmp_path / "hf" / "checkpoint-8"))


def test_the_trainers_accumulated_shares_add_up_to_our_accumulated_loss(plain, tmp_path):
    recipe = plain(epochs=EPOCHS, grad_accum_steps=2)
    losses, _ = ours(recipe)
    found, _ = trainers_loop(recipe, load_data(recipe.data, recipe.augment), tmp_path / "hf", accumulate=2)
    assert np.reshape(found, (-1, 2)).sum(1) == pytest.approx(losses, abs=1e-6)


def test_the_trainer_refuses_methods_that_need_the_images(plain):
    from pskd_timm.adaptors.hf_trainer import MethodCallback

    with pytest.raises(InputError, match="CSKD needs the images"):
        MethodCallback(METHODS["cskd"]())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torchmetrics_metric_is_the_score_of_all_batches_since_the_last_reset(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (120, 7), generator=generator).double()  # many ties
    probabilities, labels = logits.softmax(1).to(dtype), torch.randint(7, (120,), generator=generator)
    metric = CalibrationMetrics()
    metric.update(probabilities[:10].flip(1), labels[:10])
    metric.reset()
    of_batch = metric(probabilities[:50], labels[:50])
    assert of_batch == pytest.approx(score(probabilities[:50], labels[:50]), rel=1e-9)
    metric.update(probabilities[50:], labels[50:])
    assert metric.compute() == pytest.approx(score(probabilities, labels), rel=1e-9)
    of_logits = MetricCollection({"test": CalibrationMetrics(from_logits=True)})
    of_logits.update(logits, labels)
    assert of_logits.compute() == pytest.approx(score(logits.softmax(1), labels))


def test_torchmetrics_metric_counts_a_confidence_on_a_bin_edge_as_the_score_does():
    rows = torch.tensor([[0.3, 0.2, 0.25, 0.25], [0.28, 0.24, 0.24, 0.24], [0.32, 0.22, 0.23, 0.23]])
    metric = CalibrationMetrics()
    metric.update(rows, torch.tensor([0, 1, 0]))
    assert metric.compute()["ece"] == pytest.approx(score(rows, [0, 1, 0])["ece"])


PROBABILITIES = torch.full((8, 4), 0.25)
LABELS = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("preds", "target", "says"),
    [
        (PROBABILITIES, LABELS[:7], r"floats of shape \[B, K\]"),
        (PROBABILITIES.long(), LABELS, r"floats of shape \[B, K\]"),
        (PROBABILITIES, LABELS.float(), "target must be integers, got torch.float32"),
        (PROBABILITIES, LABELS.bool(), "target must be integers, got torch.bool"),
        (PROBABILITIES.numpy(), LABELS, "must be tensors, got ndarray and Tensor"),
        (PROBABILITIES[:, :3], LABELS, "preds have 3 classes, those before them 4"),
    ],
)
def test_torchmetrics_metric_refuses_a_batch_of_other_shapes_and_types(preds, target, says):
    metric = CalibrationMetrics()
    metric.update(PROBABILITIES, LABELS)
    with pytest.raises(InputError, match=says):
        metric.update(preds, target)
    assert metric.compute() == score(PROBABILITIES, LABELS)
    metric.reset()
    metric.update(PROBABILITIES[:, :3], LABELS)  # a reset forgets how many classes there were


@pytest.mark.parametrize(
    ("from_logits", "row", "label", "says"),
    [
        (False, [5.0, -1.0, 0.0, 2.0], 0, "from_logits=True"),
        (False, [-0.1, 0.3, 0.5, 0.3], 0, "preds are no probabilities"),
        (False, [0.9, 0.9, 0.0, 0.0], 0, "preds are no probabilities"),
        (False, [0.1, 0.2, 0.1, 0.0], 0, "preds are no probabilities"),
        (False, [float("nan")] * 4, 0, "preds are no probabilities"),
        (False, [0.25] * 4, 4, "labels in target lie outside"),
        (False, [0.25] * 4, -1, "labels in target lie outside"),
        (True, [float("nan")] * 4, 0, "logits that are not finite"),
        (True, [0.0] * 4, -100, "labels in target lie outside"),
    ],
)
def test_torchmetrics_metric_says_in_compute_which_values_are_wrong(from_logits, row, label, says):
    metric = CalibrationMetrics(from_logits=from_logits)
    metric.update(PROBABILITIES, LABELS)
    metric.update(torch.tensor([row]), torch.tensor([label]))
    with pytest.raises(InputError, match=says):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_torchmetrics_metric_of_empty_batches_has_nothing_to_compute_and_beside_others_they_count_for_nothing():
    metric = CalibrationMetrics()
    metric.update(PROBABILITIES[:0], LABELS[:0])
    with pytest.raises(InputError, match="no sample since the last reset"):
        metric.compute()
    metric.update(PROBABILITIES, LABELS)
    assert metric.compute() == score(PROBABILITIES, LABELS)


def test_torchmetrics_metric_takes_its_setting_by_name_only():
    with pytest.raises(TypeError, match="positional"):
        CalibrationMetrics(["brier"])
