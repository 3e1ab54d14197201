"""What several tests ask of run folders."""

from pathlib import Path

from pskd_timm.run.folder import checkpoints


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    return next(reversed(checkpoints(run_dir)), None)
