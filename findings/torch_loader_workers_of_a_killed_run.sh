#!/usr/bin/env bash
# torch 2.14.1: a DataLoader's workers end within seconds of a run that was killed where they were forked or spawned, and stay for
# ever where Python's fork server started them, which is the default on Linux from Python 3.14 on: a worker asks whether its parent
# process has changed, its parent is the server, and the server stays for as long as it has a worker.
#
# Input: a data set of numbers, two workers, the main process ended with SIGKILL after ten batches (as a scheduler or a full memory
# does it), then a wait of 40 seconds; torch's workers look every 5.
# Seen: fork: none alive after 5.5 s. spawn: none after 10.1 s. forkserver: both alive after 40 s, with the server.
# Expected before it was met: none alive after 15 s, whatever started them. It was wrong for the fork server.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy==2.4.6"
cat > "$folder/run.py" <<'PY'
import multiprocessing
import sys

from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 10**6

    def __getitem__(self, i):
        return i


if __name__ == "__main__":
    for n, _ in enumerate(DataLoader(Numbers(), 8, num_workers=2, multiprocessing_context=sys.argv[1])):
        if n == 10:
            print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
PY
"$folder/venv/bin/python" - "$folder/run.py" <<'PY'
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


print("torch", version("torch"), "on Python", sys.version.split()[0])
left = {}
for method in ("fork", "spawn", "forkserver"):
    run = subprocess.Popen([sys.executable, sys.argv[1], method], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    workers = [int(word) for word in run.stdout.readline().split()]
    assert len(workers) == 2 and all(map(is_alive, workers))
    run.kill()
    run.wait()
    killed = time.monotonic()
    while (alive := [pid for pid in workers if is_alive(pid)]) and time.monotonic() - killed < 40:
        time.sleep(0.5)
    print(f"{method}: {len(alive)} of {len(workers)} workers alive {time.monotonic() - killed:.1f} s after the run was killed")
    left[method] = len(alive)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
assert left == {"fork": 0, "spawn": 0, "forkserver": 2}, left
PY
