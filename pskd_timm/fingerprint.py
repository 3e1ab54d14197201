"""What tells one data set from another: short digests by which a run notices that its data have changed."""

import hashlib
from collections.abc import Iterable

# The digests of a data set, the most telling ones first, and how a message calls what they are of.
KINDS = {
    "class_names": "class names",
    "samples": "samples (some were added, removed, renamed or moved between the parts)",
    "labels": "labels",
    "contents": "contents of the training images",
    "test_contents": "contents of the test images",
}


def digest(chunks: Iterable[bytes]) -> str:
    """The first 64 bits of the SHA-256 of `chunks`, one after the other, as hexadecimal digits."""
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()[:16]


def changed(before: dict[str, str], now: dict[str, str]) -> str | None:
    """What differs between the fingerprints `before` and `now`, in words; None where nothing does.

    Digests that one of them lacks, as an earlier version may, are not compared.
    """
    different = [kind for kind in KINDS if kind in before and kind in now and before[kind] != now[kind]]
    if "samples" in different:  # then labels and contents are other ones in any case
        different = different[: different.index("samples") + 1]
    names = ", ".join(KINDS[kind] for kind in different)
    return f"the data have changed since the run began, other {names}" if names else None
