"""How long a user waits before anything happens."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TITLE = "from the command to its first answer"
OPTIONS = ()


def measure(say) -> list[dict]:
    """Seconds to `--help`, to a refused recipe, and to the first step of the digits, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        train = ["train", "digits", "--epochs", "2", "--tracking.log_every", "1", "--output_dir", f"{folder}/runs"]
        rows = [
            {"what": "--help", "seconds": median(_ends(["--help"]) for _ in range(3))},
            {
                "what": "a misspelt setting",
                "seconds": median(_ends(["train", "digits", "--lrr", "1"]) for _ in range(3)),
            },
            {"what": "the first step of train digits", "seconds": _first_step(train, Path(folder) / "runs")},
        ]
    for row in rows:
        say(f"  {row['what']:<32} {row['seconds']:.2f} s")
    return rows


def _command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "pskd_timm", *words]


def _ends(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(_command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def _first_step(words: list[str], runs: Path) -> float:
    start = time.perf_counter()
    process = subprocess.Popen(_command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(path.stat().st_size for path in runs.rglob("steps.jsonl")):
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds
