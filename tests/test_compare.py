import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

from commands import LIMIT, Command, cli, here, wait_until, writers
from pskd_timm import InputError, compare, report, train
from pskd_timm.cli import main
from pskd_timm.comparison import BUSY, Job, _after_stop, _apart, _run, gpu_of
from pskd_timm.evaluation import evaluate
from pskd_timm.methods import PAPER
from pskd_timm.metrics import METRICS
from pskd_timm.progress import Display
from pskd_timm.reports.runs import columns, floor_columns
from pskd_timm.reports.tables import markdown_table, summary
from pskd_timm.run.folder import is_locked
from pskd_timm.run.result import read_lines

SIX = list(METRICS.values())

QUICK = ["--epochs", "1", "--data.limit_train", "100", "--data.limit_test", "60", "--model.kwargs.width", "4"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return folder, here("compare", "digits", *QUICK, "--output_dir", folder, "--jobs", "2", "--seeds", "0", "1")


def test_compare_trains_every_method_and_seed_and_writes_table_and_picture(compared):
    folder, done = compared
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "comparison.csv")
    floors = floor_columns("ece")
    best = ["best_epoch", *(f"best_{name}" for name in (*METRICS, *floors))]
    assert list(table.columns) == columns()
    assert columns() == ["method", "seed", "status", *METRICS, *floors, "seconds", *best, "num_classes"]
    assert list(zip(table.method, table.seed, strict=True)) == [(method, seed) for method in PAPER for seed in (0, 1)]
    assert set(table.status) == {"finished"} and table[list(METRICS)].notna().all(axis=None)
    assert all((folder / method / f"seed{seed}" / "result.json").is_file() for method in PAPER for seed in (0, 1))
    for name in ("comparison.csv", "comparison.md", "comparison.tex", "comparison.png", "report.html"):
        assert str(folder / name) in done.stdout
    with Image.open(folder / "comparison.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1_000_000)) > 100
    for word in ("Baseline", "Label smoothing", "CS-KD", "TF-KD", "PS-KD", "E-AURC", "seconds"):
        assert word in done.stdout and (word in (folder / "comparison.md").read_text())


def test_a_second_compare_retrains_nothing_and_prints_the_same_table(compared):
    folder, first = compared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    again = here("compare", "digits", *QUICK, "--output_dir", folder, "--seeds", "0", "1")
    assert "10 already finished" in again.stdout
    assert again.stdout[again.stdout.index("┏") :] == first.stdout[first.stdout.index("┏") :]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == before


def test_a_failed_run_is_told_in_the_table_and_does_not_hide_the_others(tmp_path):
    # A weight that overflows ends CS-KD's loss and no other's.
    options = ["--methods", "baseline", "cskd", "--cskd.weight", "1e38", "--output_dir", tmp_path]
    done = here("compare", "digits", *QUICK, *options)
    assert done.returncode == 1
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert table.status[0] == "finished" and "a lower optim.lr" in table.status[1]
    assert "1 of 2 runs is not in the figures" in (tmp_path / "report.html").read_text()
    assert "a lower optim.lr" in re.sub(r"\s*[│\n]\s*", " ", done.stdout)
    assert "Traceback" not in done.stdout + done.stderr


def test_the_processes_of_a_comparison_do_not_run_its_script_again(tmp_path, monkeypatch):
    script, ran = tmp_path / "script.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w')  # and compare(…), without if __name__ == '__main__'")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    context = multiprocessing.get_context("forkserver")
    for around, runs_it in ((_apart, False), (nullcontext, True)):
        process = context.Process(target=time.sleep, args=(0,))
        with around():
            process.start()
        process.join(LIMIT)
        assert process.exitcode == 0 and ran.exists() == runs_it


def test_what_python_hands_over_wrongly_is_told_in_a_line(tiny):
    for call, says in (
        (lambda: compare(3), "a recipe, a recipe's file or name is wanted, got 3"),
        (lambda: compare(tiny(), "pskd"), r"methods should be a list: methods=\['pskd'\]"),
        (lambda: compare(tiny(), ["pskd"], 3), r"seeds should be a list: seeds=\[3\]"),
        (lambda: compare(tiny(), ["pskd"], [-1]), "no seed below 0"),
        (lambda: compare(tiny(), ["pskd"], [0], jobs=0), "--jobs must be at least 1"),
        (lambda: train(tiny(), callbacks=print), "callbacks should be a list"),
        (lambda: train(tiny(), Display(quiet=True)), "overrides should be settings by dotted name"),
        (lambda: train(tiny(), callbacks=["print"]), "callbacks should be functions"),
        (lambda: report([]), "name run folders"),
    ):
        with pytest.raises(InputError, match=says):
            call()


def test_what_one_process_does_is_refused_in_several_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["report", "nowhere"]) == 2  # as a cluster may set it for any shell
    assert "call it without accelerate launch" not in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank, says in (
        ("0", "pskd-timm: report is the work of one process: call it without accelerate launch\n"),
        ("1", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        assert main(["report", "nowhere"]) == 2 and capsys.readouterr().err == says


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.name", "resnet81"], "timm has no model"),
        (["--tfkd.teacher", "nowhere"], "tfkd.teacher: nowhere: there is no such folder or file"),
        (["--optim.name", "sgdd"], "did you mean sgd"),
        (["--output_dir", "file"], "cannot be written"),
    ],
)
def test_compare_refuses_what_no_run_could_do_before_it_starts_any(options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["compare", "digits", *QUICK, "--output_dir", "runs", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_compare_says_once_which_settings_nothing_reads(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pskd_timm.comparison._run_all", interrupted)
    assert main(["compare", "digits", *QUICK, "--optim.min_lr", "0.001", "--output_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().out.count("optim.min_lr is given, but optim.schedule step does not read it") == 1


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("to_run", "number", "code"), [(False, signal.SIGTERM, 143), (True, signal.SIGKILL, 1)])
def test_a_signal_to_compare_stops_its_runs_and_one_to_a_run_is_told(tmp_path, to_run, number, code):
    options = ["--epochs", "400", *QUICK[2:], "--methods", "baseline", "--output_dir", str(tmp_path)]
    comparison = Command("pskd_timm", "compare", "digits", *options)
    wait_until(lambda: len(read_lines(tmp_path / "baseline" / "seed0" / "metrics.jsonl")) >= 2, comparison)
    (run,) = writers(tmp_path / "baseline" / "seed0" / "run.log")
    os.kill(run if to_run else comparison.pid, number)
    if not to_run:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(comparison.pid, number)  # `timeout` sends it twice
    done = comparison.wait()
    assert done.returncode == code
    assert not alive(run)
    says = "ended by signal 9" if to_run else "0 of 1 runs are finished; the same command resumes baseline seed 0\n"
    assert says in done.stdout


def test_the_table_gives_mean_and_sample_deviation_and_marks_the_lowest():
    rows = [("baseline", 0, 4.0), ("baseline", 1, 6.0), ("pskd", 0, 3.0), ("pskd", 1, 3.5)]
    table = pd.DataFrame(
        [
            {
                "method": m,
                "seed": s,
                "status": "finished",
                "seconds": 1.0,
                "num_classes": 10,
                **dict.fromkeys(METRICS, v),
            }
            for m, s, v in rows
        ]
    )
    cell = summary(table, SIX)["baseline"]["nll"]
    assert (cell.mean, cell.std, cell.n, cell.best) == (5.0, pytest.approx(np.std([4, 6], ddof=1)), 2, False)
    assert str(cell) == "5.00 ± 1.41" and summary(table, SIX)["pskd"]["nll"].best
    assert "| PS-KD | 2 | **3.25 ± 0.35** |" in markdown_table(table, SIX)


def test_a_table_without_a_finished_run_still_tells_the_failures():
    rows = pd.DataFrame([{"method": "pskd", "seed": 0, "status": "failed: no"}], columns=columns())
    assert summary(rows, SIX) == {} and "| PS-KD | seed 0 | failed: no |" in markdown_table(rows, SIX)


def test_compare_refuses_unknown_methods_and_being_launched_in_several_processes(tiny, monkeypatch):
    with pytest.raises(InputError, match="unknown method 'psdk'.*pskd"):
        compare(tiny(), methods=["psdk"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--jobs"):
        compare(tiny())


_DIGITS = ["--data.source", "digits", "--model.name", "cifar_preact_resnet_tiny"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "digits", "--optim.lrr", "3"], "did you mean --optim.lr?"),
        (["train", "digits", "--model.nam=resnet18"], "did you mean --model.name or --optim.name?"),
        (["train", "digits", "--epochs", "many"], "epochs should be a valid integer"),
        (["train", "digits", "--epochs", "0"], "greater than or equal to 1"),
        (["train", "digits", "--model.name", "resnet19"], "timm has no model 'resnet19'"),
        (["train", "digits", "--method", "kd"], "'pskd'"),
        (["train", "digits", "--model.compile", "graph"], "'graphs'"),
        (["train", "digits", "--model.compile", "graphs"], "model.compile graphs needs a GPU"),
        (["train", "digits", "more"], "unexpected argument 'more'"),
        (["train", "digits", "--model.kwargs.width"], "needs a value"),
        (["train", "--model.kwargs.width", "16", "nothing.yaml"], "no recipe 'nothing.yaml'"),
        (["evaluate", "--checkpoint", "x.pth", "--model.kwargs.width", "16", *_DIGITS], "x.pth"),
        (["bench", "metrics", "--processs", "1"], "unknown option --processs: did you mean --processes?"),
        (["models", "--tsk", "x"], "unknown option --tsk"),
        (["train", "nothing.yaml"], "no recipe 'nothing.yaml'"),
        (["train"], "RECIPE"),
        (["fly"], "unknown command 'fly': it is one of train, detect,"),
        (["trian", "digits"], "unknown command 'trian': did you mean train?"),
        (["--verison"], "unknown option --verison: did you mean --version?"),
        (["-h5"], "unknown option -h5"),
        ([], "COMMAND is missing, one of train,"),
        (["compare", "digits", "--jobs", "0"], "--jobs must be at least 1"),
        (["compare", "digits", "--seeds", "x"], "--seeds takes whole numbers, not 'x' (pskd-timm compare --help)"),
        (
            ["compare", "--seeds", "0", "digits"],
            "not 'digits': what is no option comes first, `pskd-timm compare RECIPE …`",
        ),
        (["compare", "--methods", "pskd", "digits"], "RECIPE is missing: what is no option comes first"),
        (["compare", "digits", "--seeds", "-1"], "seed"),
        (["evaluate", "nowhere"], "nowhere: there is no such folder"),
        (["evaluate", "."], "no run here"),
        (["train", "digits", "--accumulat", "2"], "did you mean --accumulate?"),
        (["train", "digits", "--model.name", "runs/mine"], "there is no folder runs/mine; a model on the hub is named"),
        (["train", "digits", "--model.name", "./mine"], "there is no folder mine"),
        (["train", "digits", "--model.name", "local-dir:mine"], "model.name: there is no folder mine"),
        (["train", "digits", "--model.name", "../"], "is a folder: local-dir:../"),
        (["report"], "RUNS is missing (pskd-timm report --help)"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["report", ".", "--outptu", "x"], "unknown option --outptu: did you mean --output?"),
        (["models", "x"], "unexpected argument 'x'"),
        (["compare", "digits", "--method", "pskd"], "did you mean --methods?"),
        (["compare", "digits", "--seed", "3"], "did you mean --seeds or --data.seed?"),
        (["show", "digits", "--data.holdout_fraction", "1"], "less than 1"),
        (["predict", "run", "image.png", "--json", "-"], "--json: - is no file"),
        (["train", "custom"], "name a data set"),
        (["train", "digits", "--output_dir", "/proc/no"], "cannot be written"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("pskd-timm: ") and error.count("\n") <= 2


def test_show_prints_values_with_their_sources_and_the_cost_before_any_training(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "cifar100/preact_resnet18", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"seed +│ 3 +│ command line", text) and re.search(
        r"optim.lr +│ 0.1 +│ .*preact_resnet18.yaml", text
    )
    assert re.search(r"optim.clip_grad_norm +│ None +│ default", text)
    assert "391 an epoch × 300 epochs = 117,300" in text
    # 50 000 × (100 × 2 + 1) bytes; with several ranks 1/W of it home, as much a working copy, and 16 bytes a row to find it.
    assert "prediction store per rank: 1 rank 10.1 MB, 2 ranks 10.4 MB, 8 ranks 2.6 MB" in text
    assert "data in memory: 184.3 MB" in text  # 60 000 × 3 × 32 × 32
    assert not list(tmp_path.iterdir())


def test_evaluate_of_a_run_whose_figures_alone_were_kept_says_so(compared, tmp_path):
    run_dir = tmp_path / "seed0"
    run_dir.mkdir()
    for name in ("recipe.yaml", "result.json"):
        shutil.copy(compared[0] / "pskd" / "seed0" / name, run_dir)
    with pytest.raises(InputError, match="no weights here .* only the figures were kept"):
        evaluate(run_dir)


def test_evaluate_finds_the_recorded_figures_again_from_another_folder(compared, capsys, tmp_path, monkeypatch):
    folder, _ = compared
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(folder / "pskd" / "seed1")]) == 0
    assert capsys.readouterr().out.count("equal to result.json") == 2


def test_train_through_the_command_line_tells_last_and_best(tmp_path):
    done = cli("train", "digits", *QUICK, "--method=baseline", "--output_dir", tmp_path, "--quiet")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stdout + done.stderr
    assert (
        lines[0].startswith("last epoch 1: ")
        and "(best on test)" in lines[1]
        and lines[2] == f"wrote {tmp_path / 'baseline' / 'seed0'}"
    )


def test_an_image_folder_is_compared_through_the_custom_recipe_with_any_timm_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, level in (("dark", 60), ("bright", 190)):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(level, 30, size=(20 + i, 24, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / name / f"{i}.jpg")
    options = [
        "--data.path",
        "pictures",
        "--data.image_size",
        "32",
        "--model.name",
        "test_efficientnet",
        "--epochs",
        "2",
        "--batch_size",
        "8",
    ]
    done = here("compare", "custom", *options, "--methods", "baseline", "pskd", "--tracking.wandb", "disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(pd.read_csv(tmp_path / "runs" / "custom" / "comparison.csv")) == 2
    # A training picture less: what has finished cannot stand beside what would be trained now.
    (tmp_path / "pictures/train/dark/0.jpg").unlink()
    methods = ["--methods", "baseline", "pskd", "label_smoothing"]
    done = here("compare", "custom", *options, *methods, "--tracking.wandb", "disabled")
    assert done.returncode == 2 and not (tmp_path / "runs" / "custom" / "label_smoothing").exists()
    assert "baseline/seed0 is finished: the data have changed since the run began, other samples" in done.stderr


def test_runs_of_an_interrupted_compare_go_on_in_another_one_that_has_waited_for_them(tmp_path):
    options = ["--epochs", "12", *QUICK[2:], "--methods", "baseline", "--output_dir", str(tmp_path)]
    one = Command("pskd_timm", "compare", "digits", *options, error=False)
    lines = tmp_path / "baseline" / "seed0" / "metrics.jsonl"
    wait_until(lambda: len(read_lines(lines)) >= 2, one)
    (run,) = writers(tmp_path / "baseline" / "seed0" / "run.log")
    os.kill(run, signal.SIGSTOP)  # or it might be done before the other one has started
    other = Command("pskd_timm", "compare", "digits", *options)
    wait_until(lambda: other.stdout().count("\n") >= 2, other)
    said = other.stdout().splitlines()
    assert "1 runs, 0 already finished" in said[0]
    assert "another process is at work on this run; waiting for it" in said[1]
    first = lines.parent.joinpath("run.log").read_text().splitlines()[0]
    assert "epoch 1/12" in first  # the other one has left the log alone
    os.kill(one.pid, signal.SIGINT)
    wait_until(lambda: "stopping: each run that trains saves" in one.stdout())
    os.kill(run, signal.SIGCONT)
    interrupted = one.wait()
    assert interrupted.returncode == 130 and "Traceback" not in interrupted.stdout
    assert "0 of 1 runs are finished; the same command resumes baseline seed 0" in interrupted.stdout
    assert other.wait().returncode == 0
    assert "resuming after epoch" in Path(tmp_path / "baseline" / "seed0" / "run.log").read_text()
    assert lines.read_text().count("\n") == 12


def test_a_stopped_comparison_says_what_the_same_command_keeps_resumes_and_starts(tiny):
    def left(resume, recipe_age, *contents):
        """What is said of a run that the comparison began a second ago, in whose folder there is this."""
        for path in [*job.recipe.run_dir.glob("*"), *job.recipe.run_dir.glob("checkpoints/*")][::-1]:
            path.rmdir() if path.is_dir() else path.unlink()
        job.recipe.run_dir.mkdir(parents=True, exist_ok=True)
        if recipe_age is not None:
            (job.recipe.run_dir / "recipe.yaml").touch()
            os.utime(job.recipe.run_dir / "recipe.yaml", (now - recipe_age, now - recipe_age))
        for name in contents:
            (job.recipe.run_dir / name).mkdir(parents=True) if "/" in name else (job.recipe.run_dir / name).touch()
        job.recipe = job.recipe.model_copy(update={"resume": resume})
        return _after_stop([job, waits], 3, now - 1)

    job, waits, now = Job(tiny(method="pskd")), Job(tiny(method="pskd", seed=7)), time.time()
    saved = "checkpoints/0003-0000"
    assert left("auto", None) == "1 of 3 runs are finished; the same command keeps them, starts the others"
    assert left("auto", 0, saved) == (
        "1 of 3 runs are finished; the same command keeps them, resumes pskd seed 0, starts the others"
    )
    assert left("auto", 0, saved, "result.json") == (
        "2 of 3 runs are finished; the same command keeps them, starts the others"
    )
    assert left("never", 0, saved) == (
        "1 of 3 runs are finished; the same command without --resume never keeps them, resumes pskd seed 0, starts the others"
    )
    assert left("never", 9, saved, "result.json") == (
        "1 of 3 runs are finished; the same command keeps them, starts the others"
    )
    waits.recipe.run_dir.mkdir(parents=True)
    (waits.recipe.run_dir / "recipe.yaml").touch()
    os.utime(waits.recipe.run_dir / "recipe.yaml", (now - 9, now - 9))
    assert left("never", 0, saved, "result.json") == (
        "2 of 3 runs are finished; the same command without --resume never keeps them, takes the former runs of pskd seed 7 as "
        "they are"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_run_starts_is_obeyed_afterwards_and_a_ctrl_c_does_not_reach_what_started(number):
    started = []
    previous = signal.signal(number, signal.default_int_handler)  # the tests' runner may ignore it
    try:
        with pytest.raises(KeyboardInterrupt), _apart():
            started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"]))
            started[0].send_signal(signal.SIGINT)
            os.kill(os.getpid(), number)
            started.append("went on")
    finally:
        signal.signal(number, previous)
    assert started[1:] == ["went on"] and started[0].wait() == 0


def test_runs_take_turns_on_the_gpus_that_are_given_to_them():
    assert [gpu_of(seat, 2, None) for seat in range(3)] == ["0", "1", "0"]
    assert [gpu_of(seat, 2, "5,MIG-1/0") for seat in range(3)] == ["5", "MIG-1/0", "5"]


def test_a_run_that_another_process_holds_keeps_its_log(tiny):
    recipe = tiny()
    recipe.run_dir.mkdir(parents=True)
    (recipe.run_dir / "run.log").write_text("theirs")
    with FileLock(recipe.run_dir / ".lock"), pytest.raises(SystemExit) as ended:
        _run(recipe, 0, 1, str(recipe.run_dir / "run.log"))
    assert ended.value.code == BUSY and (recipe.run_dir / "run.log").read_text() == "theirs"


def test_a_run_is_held_from_its_first_moment_so_that_two_comparisons_may_begin_together(tiny, monkeypatch):
    recipe, held = tiny(), []
    monkeypatch.setattr("os.dup2", lambda *_: None)  # the log is not to take this process's words
    monkeypatch.setattr("pskd_timm.training.train", lambda recipe: held.append(is_locked(recipe.run_dir)))
    _run(recipe, 0, 1, str(recipe.run_dir / "run.log"))
    assert held == [True] and not is_locked(recipe.run_dir)
