"""Replacing a file: all of the new one, or the old one untouched, and nothing left beside it."""

from pathlib import Path

import pytest

from onestepsr.core.errors import UserError
from onestepsr.core.files import read_text, replacing, write_text


def test_a_complete_file_takes_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_whole_with_its_folder_and_read_within_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("a" * 251 + ".txt")
    write_text(path, "\ufeffgrün \udcff")
    assert read_text(path, 100, "poem") == "grün \\udcff"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match="larger than 5 bytes, which is no poem"):
        read_text(path, 5, "poem")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_text(path, 5, "poem")


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a\.txt: cannot be written \("):
        write_text(tmp_path / "file" / "a.txt", "")
    with pytest.raises(UserError, match=r"gone: cannot be read \("):
        read_text(tmp_path / "gone", 5, "poem")
