"""Two nodes as two network namespaces, and Slurm's scripts with a stand-in for srun."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import LIMIT, wait_until
from pskd_timm.recipe_files import SHIPPED
from pskd_timm.run.result import read_lines
from runs import newest

SCRIPTS = sorted((SHIPPED / "slurm").glob("*.sh"))
SMALL = ["--data.limit_train", "320", "--data.limit_test", "60", "--model.kwargs.width", "4", "--threads", "1"]

SRUN = """#!{python}
# What srun does, as far as the scripts need it: SLURM_NTASKS tasks, signals passed on, the largest exit code.
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
for rank in range(int(os.environ["SLURM_NTASKS"])):
    environment = os.environ | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
    tasks.append(subprocess.Popen(words, env=environment))
open("srun.pid", "w").write(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> scontrol.log
[ "$1" = show ] && echo 127.0.0.1
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A function that starts a script's body as a Slurm job of so many tasks."""
    for name, text in {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": SCONTROL,
        "hostname": "#!/bin/sh\necho 127.0.0.1\n",
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def submit(script, *words, tasks=2, **environment):
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": str(tasks), "PATH": path} | environment
        command = ["bash", str(SHIPPED / "slurm" / script), "digits", *SMALL, "--output_dir", str(tmp_path), *words]
        return subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurms_scripts_are_valid_bash_that_requeue_after_a_signal(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    options = re.findall(r"^#SBATCH (\S+)", script.read_text(), re.M)
    assert "--requeue" in options and any(option.startswith("--signal=USR1@") for option in options)


def test_there_is_a_script_for_one_node_for_several_and_for_an_array():
    assert [script.name for script in SCRIPTS] == ["array.sh", "multi_node.sh", "single_node.sh"]


def test_a_job_that_slurm_ends_saves_asks_to_be_requeued_and_the_next_one_goes_on(slurm, tmp_path):
    run_dir = tmp_path / "pskd" / "seed0"
    settings = ["--method", "pskd", "--epochs", "20", "--tracking.log_every", "1"]
    job = slurm("single_node.sh", *settings)
    wait_until(lambda: len(read_lines(run_dir / "metrics.jsonl")) >= 2 or job.poll() is not None)
    assert job.poll() is None
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    output, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == 138, output
    assert output.count("the same command resumes") == 1
    assert (tmp_path / "scontrol.log").read_text().split() == ["requeue", str(os.getpid())]
    stopped_at = newest(run_dir).name
    job = slurm("multi_node.sh", *settings, SLURM_JOB_NODELIST="node[1-2]")
    output, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, output
    epoch, step = map(int, stopped_at.split("-"))
    assert f"resuming after epoch {epoch}, step {step} of 5" in output
    assert [line["epoch"] for line in read_lines(run_dir / "metrics.jsonl")] == list(range(1, 21))
    assert json.loads((run_dir / "result.json").read_text())["num_processes"] == 2
    assert (tmp_path / "scontrol.log").read_text().splitlines()[1:] == ["show hostnames node[1-2]"]


def test_a_task_of_the_array_is_a_method_and_a_seed(slurm, tmp_path):
    job = slurm("array.sh", "--epochs", "1", tasks=1, SLURM_ARRAY_TASK_ID="7")
    output, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, output
    assert (tmp_path / "cskd" / "seed1" / "result.json").is_file()


def test_two_nodes_train_one_network(tmp_path):
    script = [str(Path(__file__).parent / "two_nodes.sh"), sys.executable, "digits", *SMALL]
    done = subprocess.run(
        [*script, "--epochs", "2", "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=LIMIT
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "pskd" / "seed0" / "result.json").read_text())["num_processes"] == 2
