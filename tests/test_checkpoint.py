"""Checkpoints: when they are written, what is found at load, and what a full disk does."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open

from commands import cli
from kills import differences, limit_files_once
from pskd_timm import InputError, PredictionStore, train
from pskd_timm.bench.rounds import peak
from pskd_timm.cli import main, run_to_end
from pskd_timm.files import Lines, checksum
from pskd_timm.run import checkpoint
from pskd_timm.run.folder import checkpoints
from pskd_timm.run.result import read_lines


@pytest.fixture
def finished(finished_run):
    """The finished run's recipe and folder."""
    recipe, result = finished_run
    return recipe, result.run_dir


def unfinished_copy(finished, root: Path):
    """The run's folder as it is before its result is written, in another place, and its recipe."""
    recipe, run_dir = finished
    recipe = recipe.model_copy(update={"output_dir": str(root)})
    shutil.copytree(run_dir, recipe.run_dir, ignore=shutil.ignore_patterns(".lock"))
    (recipe.run_dir / "result.json").unlink()
    return recipe


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_state(**values):
    def change(path):
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | values))

    return change


DAMAGES = {
    "a truncated file": ("model.safetensors", truncate, "model.safetensors is not as it was written (wrong checksum)"),
    "a flipped byte in the optimizer": ("optimizer.pt", flip_a_byte, "optimizer.pt is not as it was written"),
    "a flipped byte in the best weights": ("best.safetensors", flip_a_byte, "best.safetensors is not as it was"),
    "a flipped byte in the state": ("state.json", flip_a_byte, "state.json "),
    "a changed number in the state": (
        "state.json",
        change_state(world_size=2),
        "state.json is not as it was written (wrong checksum)",
    ),
    "a missing shard": (
        "store-00000-of-00001.safetensors",
        Path.unlink,
        "store-00000-of-00001.safetensors is missing",
    ),
    "a missing state": ("state.json", Path.unlink, "state.json is missing"),
    "a future version": (
        "state.json",
        change_state(version=4),
        "written in version 4 of the format, this pskd_timm reads version 3",
    ),
    "a foreign file": (
        "state.json",
        lambda path: path.write_text('{"step": 1}'),
        "state.json is not that of a checkpoint which this pskd_timm can read",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_and_the_newest_whole_checkpoint_used_instead(finished, tmp_path, capsys, case):
    name, spoil, says = DAMAGES[case]
    recipe = unfinished_copy(finished, tmp_path)
    folder = recipe.run_dir / "checkpoints"
    spoil(folder / "000003-00000000" / name)
    result = train(recipe)
    out, err = capsys.readouterr()
    print(err.strip())
    assert err.count("\n") == 1 and err.startswith(f"pskd-timm: {folder / '000003-00000000'}: {says}")
    assert "; resuming from 000002-00000000 instead; damaged-000003-00000000 can be deleted" in err
    assert "resuming after epoch 2, step 0" in out
    assert not differences(finished[1], result.run_dir)


def test_without_a_whole_checkpoint_the_run_is_refused_in_a_line_and_resume_never_starts_from_scratch(
    finished, tmp_path
):
    recipe = unfinished_copy(finished, tmp_path)
    for path in (recipe.run_dir / "checkpoints").iterdir():
        truncate(path / "optimizer.pt")
    before = sorted(path.name for path in (recipe.run_dir / "checkpoints").iterdir())
    with pytest.raises(InputError, match="optimizer.pt is not as .*; no other checkpoint is whole; --resume never"):
        train(recipe)
    assert sorted(path.name for path in (recipe.run_dir / "checkpoints").iterdir()) == before
    assert not differences(finished[1], train(recipe.model_copy(update={"resume": "never"})).run_dir)


def test_another_recipes_checkpoint_is_refused_in_a_line(finished, tmp_path):
    recipe = unfinished_copy(finished, tmp_path)
    other = recipe.model_copy(update={"method": "baseline", "output_dir": str(tmp_path / "other")})
    other = other.model_copy(update={"model": other.model.model_copy(update={"kwargs": {"width": 8}})})
    shutil.copytree(recipe.run_dir / "checkpoints", other.run_dir / "checkpoints")
    with pytest.raises(InputError, match="does not fit this recipe's network and optimizer") as error:
        train(other)
    assert "\n" not in str(error.value)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_code_in_a_checkpoint_is_not_executed(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = unfinished_copy(finished, tmp_path)
    folder = recipe.run_dir / "checkpoints" / "000003-00000000"
    torch.save({"state": Payload()}, folder / "optimizer.pt")
    state = json.loads((folder / "state.json").read_text())
    state["checksums"]["optimizer.pt"] = checksum(folder / "optimizer.pt")
    del state["checksum"]
    (folder / "state.json").write_text(json.dumps(state | {"checksum": checkpoint._state_checksum(state)}))
    assert checkpoint.damage(folder) is None
    with pytest.raises(InputError, match="does not fit this recipe's network and optimizer"):
        train(recipe)
    assert not Path("executed").exists()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_during_a_save_is_a_line_and_neither_the_run_nor_the_earlier_checkpoint_suffers(
    finished, tmp_path, capsys, at
):
    recipe = finished[0].model_copy(update={"output_dir": str(tmp_path)})
    restore = limit_files_once(3000, at)
    try:
        result = train(recipe)
    finally:
        restore()
    err = capsys.readouterr().err
    print(err.strip())
    assert err.count("\n") == 1 and "the checkpoint cannot be written: " in err and "File too large" in err
    stays = f"; the run goes on; 00000{at - 1}-00000000 stays the newest" if at > 1 else "; the run goes on\n"
    assert stays in err
    names = {path.name for path in (result.run_dir / "checkpoints").iterdir()}
    assert names == {f"00000{epoch}-00000000" for epoch in (1, 2, 3) if epoch != at}
    assert all(checkpoint.damage(path) is None for path in (result.run_dir / "checkpoints").iterdir())
    assert (result.run_dir / "model.safetensors").read_bytes() == (finished[1] / "model.safetensors").read_bytes()


def test_no_permission_to_publish_a_checkpoint_is_a_line_too(finished, tmp_path, capsys, monkeypatch):
    def refuse(partial, final):
        raise PermissionError(13, "Permission denied", str(final))

    monkeypatch.setattr(checkpoint, "rename_atomic", refuse)
    recipe = finished[0].model_copy(update={"output_dir": str(tmp_path)})
    result = train(recipe)
    assert capsys.readouterr().err.count("cannot be written: PermissionError: [Errno 13] Permission denied") == 3
    assert not list((result.run_dir / "checkpoints").iterdir())
    assert (result.run_dir / "model.safetensors").read_bytes() == (finished[1] / "model.safetensors").read_bytes()


def test_a_result_that_cannot_be_written_is_a_line_and_the_same_command_goes_on(
    finished, tmp_path, capsys, monkeypatch
):
    recipe = unfinished_copy(finished, tmp_path)
    command = ["train", str(recipe.run_dir / "recipe.yaml"), "--output_dir", str(tmp_path)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "File too large" in err and "the same command resumes" in err
    assert main(command) == 0
    assert not differences(finished[1], recipe.run_dir)


def test_a_full_disk_promises_to_go_on_only_where_there_is_a_checkpoint(finished, tmp_path, capsys):
    def full(display):
        raise OSError(28, "No space left on device")

    recipe = unfinished_copy(finished, tmp_path)
    name = checkpoints(recipe.run_dir)[-1].name
    assert run_to_end(recipe, full, quiet=True) == 1
    assert f"once that is mended, the same command resumes from {name}\n" in capsys.readouterr().err
    shutil.rmtree(recipe.run_dir / "checkpoints")
    assert run_to_end(recipe, full, quiet=True) == 1
    assert "the same command starts from scratch: there is no checkpoint yet\n" in capsys.readouterr().err


def test_lines_that_a_full_disk_refuses_are_written_once_it_has_room(tmp_path, capsys):
    lines = Lines(tmp_path / "steps.jsonl", [{"step": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))  # room for a part of the next line
        lines.add({"step": 2})
        lines.add({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_lines(lines.path) == [{"step": 1}]
    assert capsys.readouterr().err.count("\n") == 1
    lines.add({"step": 4})
    assert read_lines(lines.path) == [{"step": step} for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, ["000001-00000000", "000002-00000000"]),
        ({"every_epochs": 2}, ["000002-00000000"]),
        ({"every_epochs": 2, "every_steps": 3}, ["000000-00000003", "000001-00000002", "000002-00000000"]),
        ({"every_epochs": 2, "every_minutes": 1e-9}, [f"000000-{i:08d}" for i in range(1, 4)] + ["000001-00000000"]),
    ],
)
def test_checkpoints_are_written_by_epochs_steps_and_minutes(tiny, section, expected):
    settings = {f"checkpoint__{key}": value for key, value in section.items()}
    run_dir = train(tiny(data__limit_train=256, checkpoint__keep=99, **settings)).run_dir
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names[: len(expected)] == expected and names[-1] == "000002-00000000"
    assert len(names) == (8 if "every_minutes" in section else len(expected))


def test_a_run_resumed_between_two_log_lines_writes_the_same_lines(tiny, tmp_path):
    settings = {"tracking__log_every": 4, "checkpoint__every_steps": 3, "checkpoint__keep": 9}
    whole = train(tiny(output_dir=str(tmp_path / "whole"), **settings)).run_dir
    recipe = tiny(output_dir=str(tmp_path / "parts"), **settings)
    shutil.copytree(whole, recipe.run_dir, ignore=shutil.ignore_patterns(".lock", "result.json"))
    for path in (recipe.run_dir / "checkpoints").iterdir():
        if path.name > "000000-00000003":
            shutil.rmtree(path)
    assert not differences(whole, train(recipe).run_dir)


def test_a_second_process_in_the_same_run_folder_is_refused_with_exit_code_2(finished, tmp_path):
    recipe = unfinished_copy(finished, tmp_path)
    with FileLock(recipe.run_dir / ".lock"):
        done = cli("train", recipe.run_dir / "recipe.yaml", "--output_dir", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"pskd-timm: {recipe.run_dir}: another process is at work on this run: wait for it, or choose another --output_dir\n"
    )


def test_a_run_deleted_by_half_never_looks_like_a_run_that_can_go_on(finished, tmp_path, monkeypatch):
    recipe = unfinished_copy(finished, tmp_path).model_copy(update={"resume": "never", "seed": 0})
    deleted = []

    def stop_after_one(path, **_):
        deleted.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pskd_timm.run.folder"].shutil, "rmtree", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert deleted and (recipe.run_dir / "recipe.yaml").is_file()
    assert not differences(finished[1], train(recipe).run_dir)


def test_synchronised_batch_norm_is_refused_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["train", "digits", "--model.sync_bn", "true", "--output_dir", str(tmp_path / "runs")]) == 2
    assert "model.sync_bn needs GPUs" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_file_written_piece_by_piece_is_what_safetensors_reads_and_its_checksum_that_of_the_file(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "BYTES_AT_ONCE", 64)
    tensors = {str(dtype): torch.arange(99).reshape(9, 11).t().to(dtype) for dtype in checkpoint.TYPES}
    tensors |= {"none": torch.empty(0, 3), "one": torch.tensor(7), "like an image": torch.randn(2, 3, 5, 5)}
    tensors["like an image"] = tensors["like an image"].to(memory_format=torch.channels_last)
    with checkpoint.HashedFile(tmp_path / "all.safetensors") as file:
        checkpoint.write_tensors(file, tensors)
    assert file.checksum == checksum(tmp_path / "all.safetensors")
    with safe_open(tmp_path / "all.safetensors", "pt") as read:
        assert set(read.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert read.get_tensor(name).dtype == tensor.dtype and torch.equal(read.get_tensor(name), tensor)


def test_a_checkpoint_is_written_without_a_second_copy_of_optimizer_store_or_weights(tmp_path):
    network = torch.nn.Linear(2500, 4000)  # 40 MB
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 2500)).sum().backward()
    optimizer.step()
    store = PredictionStore(40_000, 1000)  # 80 MB
    state = checkpoint.TrainState(network, None, optimizer, None, store, torch.zeros(3), {})
    assert checkpoint.save(tmp_path, checkpoint.Progress(), state, keep=1)
    needed = peak(lambda: checkpoint.save(tmp_path, checkpoint.Progress(step=1), state, keep=1))
    assert needed < 20e6


def test_a_checkpoint_of_another_device_leaves_the_optimizer_the_kernels_of_this_one(tmp_path):
    network = torch.nn.Linear(2, 2)

    def state(fused):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=fused)
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return checkpoint.TrainState(network, None, optimizer, None, None, torch.zeros(3), {})

    assert checkpoint.save(tmp_path, checkpoint.Progress(step=1), state(False), keep=1)
    here = state(True)
    checkpoint.load(checkpoint.newest_whole(tmp_path), here)
    (group,) = here.optimizer.param_groups
    assert group["fused"] is True and group["momentum"] == 0.9


def test_each_rank_looks_at_its_own_shard_and_all_of_them_at_every_file(finished, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    shutil.copytree(finished[1] / "checkpoints" / "000003-00000000", folder)
    state = json.loads((folder / "state.json").read_text())
    names = [f"store-{rank:05d}-of-00005.safetensors" for rank in range(5)]
    (folder / "store-00000-of-00001.safetensors").unlink()
    del state["checksum"], state["checksums"]["store-00000-of-00001.safetensors"]
    for name in names:
        (folder / name).write_bytes(name.encode())
        state["checksums"][name] = checksum(folder / name)
    state["world_size"] = 5
    (folder / "state.json").write_text(json.dumps(state | {"checksum": checkpoint._state_checksum(state)}))
    looked = []
    monkeypatch.setattr(checkpoint, "checksum", lambda path: looked.append(path.name) or checksum(path))
    for world_size in (1, 2, 5, 7):
        shares = []
        for rank in range(world_size):
            looked.clear()
            assert checkpoint.damage(folder, rank, world_size) is None
            shares.append(list(looked))
        assert sorted(sum(shares, [])) == sorted(state["checksums"])
        assert all(names[rank] in shares[rank] for rank in range(min(5, world_size)))
        assert all(name.startswith("store-") for share in shares[1:] for name in share)
