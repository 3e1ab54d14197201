"""Files that a reader sees whole or not at all."""

import os
import threading

import pytest

from pskd_timm import InputError, files
from pskd_timm.cli import check_json, write_json


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


def test_json_goes_through_a_link_and_into_a_pipe_as_it_is(tmp_path):
    link, target, pipe = tmp_path / "link.json", tmp_path / "target.json", tmp_path / "pipe"
    target.write_text("before")
    link.symlink_to(target)
    write_json(str(link), ["é"])
    assert link.is_symlink() and target.read_text(encoding="utf-8") == '[\n "é"\n]'
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    write_json(str(pipe), ["é"])
    reader.join(10)
    assert pipe.is_fifo() and read == ['[\n "é"\n]']


def test_json_replaces_no_picture_and_no_file_of_a_run(tmp_path):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    files_of_run = [run / "recipe.yaml", run / "result.json", run / "best" / "config.json"]
    for path in (tmp_path / "a.png", tmp_path / "found.json", *files_of_run):
        path.write_text("here")
    (tmp_path / "link.json").symlink_to(run / "result.json")
    for path in (tmp_path / "a.png", tmp_path / "link.json", *files_of_run):
        with pytest.raises(InputError, match="is there and would be replaced: name a new file"):
            check_json(str(path))
    for name in (None, str(tmp_path / "found.json"), str(run / "new.json"), str(tmp_path / "new.txt")):
        check_json(name)
