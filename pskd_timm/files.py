"""Files that a reader sees whole or not at all, whatever ends the writer."""

import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from pathlib import Path

from .errors import reason


def warn(text: str):
    """Print a warning to stderr, also in a quiet run."""
    print(f"pskd-timm: {text}", file=sys.stderr, flush=True)


def write_atomic(path: Path, content: str | bytes):
    """Replace the file `path` by one with `content`; where it cannot be written, `path` stays as it was."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # another process may write the same file
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        flush_to_disk(partial)
        os.replace(partial, path)
    except BaseException:  # a Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def without_nan(value):
    """`value`, of dictionaries, lists and numbers, with None for numbers that are not finite: JSON has none of these."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rename_atomic(partial: Path, final: Path):
    """Flush a folder and give it its final name."""
    flush_to_disk(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    flush_to_disk(final.parent)


def flush_to_disk(path: Path):
    """Have the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class Lines:
    """A JSON-lines file to append to; lines that the disk does not take wait until it does."""

    def __init__(self, path: Path, lines: list[dict]):
        self.path, self.waiting, self.warned = path, b"", False
        text = "".join(json.dumps(without_nan(line), allow_nan=False) + "\n" for line in lines)
        write_atomic(path, text)
        self.end = len(text.encode())

    def add(self, line: dict):
        self.waiting += (json.dumps(without_nan(line), allow_nan=False) + "\n").encode()
        try:
            self.write()
        except OSError as error:
            if not self.warned:
                warn(f"{self.path} cannot be written: {reason(error)}; its lines wait in memory until it can")
            self.warned = True

    def write(self):
        """Write what waits; raises OSError."""
        with self.path.open("r+b") as file:
            # What a write that failed left behind lies beyond the end.
            file.truncate(self.end)
            file.seek(self.end)
            file.write(self.waiting)
        self.end += len(self.waiting)
        self.waiting, self.warned = b"", False

    def sync(self):
        """Have every line on the disk; raises OSError."""
        self.write()
        flush_to_disk(self.path)
