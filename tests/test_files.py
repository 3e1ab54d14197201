"""Files that a reader sees whole or not at all."""

import os

import pytest

from pskd_timm import files


def test_a_file_that_two_write_at_once_is_one_of_theirs_and_no_part_stays(tmp_path, monkeypatch):
    path, replace = tmp_path / "file", os.replace

    def replaced_meanwhile(partial, final):
        monkeypatch.setattr("os.replace", replace)
        files.write_atomic(path, "the other's")
        replace(partial, final)

    monkeypatch.setattr("os.replace", replaced_meanwhile)
    files.write_atomic(path, "mine")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_or_is_interrupted_leaves_the_former_file_and_no_part(tmp_path, monkeypatch, error):
    def fails(path):
        raise error

    path = tmp_path / "file"
    files.write_atomic(path, "before")
    monkeypatch.setattr(files, "flush_to_disk", fails)
    with pytest.raises(error):
        files.write_atomic(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
