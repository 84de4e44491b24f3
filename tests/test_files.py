"""Files appear when they are whole, and a place that cannot be written to is refused up front."""

import os
import re
import resource

import pytest

from dit_jax.config import ConfigError
from dit_jax.files import check_file, check_folder, whole_file, write_whole


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "file"
    with whole_file(target) as beside:
        beside.write_text("half")
        assert not target.exists() and beside.parent == target.parent
    assert target.read_text() == "half"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_what_was_there_stays_when_writing_fails(tmp_path):
    target = tmp_path / "file"
    write_whole(target, "old")

    def write_half():
        with whole_file(target) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_without_room_is_refused(tmp_path):
    check_folder("--train.workdir", tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as on a full disk, more cannot be written
    try:
        with pytest.raises(ConfigError, match=r"--train.workdir is '.*made', where no file can be written"):
            check_folder("--train.workdir", tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_place_that_is_none_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match=r"--train.workdir .*; expected a folder with room"):
        check_folder("--train.workdir", file / "run")
    with pytest.raises(
        ConfigError, match=re.escape(f"--out is '{tmp_path}', which is a folder; expected a file")
    ):
        check_file("--out", tmp_path)
    check_file("--out", file)
    assert file.read_text() == "x"
    os.mkfifo(tmp_path / "fifo")
    for name, found in (
        ("fifo", "which is a device or a pipe"),
        ("n" * 255, r"which cannot be written \(File name too long\)"),
        ("big", r"a file of 4.* GB, but its disk has .* GB left"),
    ):
        with pytest.raises(ConfigError, match=f"^--out is '.*', {found}; expected"):
            check_file("--out", tmp_path / name, size=2**62)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file"]
