"""The file of choices: writers lose nothing of one another's, readers see whole files, damage is as good as nothing."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from fused_sepconv.planning.cache_file import CacheFile, Content, folder

ENVIRONMENT = {"gpu": "a GPU", "driver": "1"}


def test_what_is_added_is_there_for_the_same_environment(tmp_path):
    file = CacheFile(tmp_path / "new", ENVIRONMENT)
    assert file.read() == Content({}, {})
    file.add({"a": {"x": 1.0}})
    file.add({"b": {"x": 2.0}}, {"y": "wrong"})
    expected = Content({"a": {"x": 1.0}, "b": {"x": 2.0}}, {"y": "wrong"})
    assert file.read() == CacheFile(tmp_path / "new", ENVIRONMENT).read() == expected
    other = CacheFile(tmp_path / "new", {**ENVIRONMENT, "driver": "2"})
    assert other.read() == Content({}, {})
    file.path.rename(other.path)  # not believed
    assert other.read() == Content({}, {})


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[]", b"null", b"[" * 100_000, b"{}"], ids=range(7))
def test_a_damaged_file_is_as_good_as_none_and_mended(content, tmp_path):
    file = CacheFile(tmp_path, ENVIRONMENT)
    file.path.write_bytes(content)
    assert file.read() == Content({}, {})
    file.add({"a": {"x": 1.0}})
    assert file.read() == Content({"a": {"x": 1.0}}, {})


@pytest.mark.parametrize(
    "seconds", ["7", "[]", "{}", '{"x": NaN}', '{"x": -1.0}', '{"x": 0.0}', '{"x": "1"}', '{"x": Infinity}']
)
def test_what_is_no_measurement_or_reason_is_left_out(seconds, tmp_path):
    file = CacheFile(tmp_path, ENVIRONMENT)
    measurements = f'{{"a": {seconds}, "b": {{"x": 1.0}}}}'
    excluded = '{"y": 3, "z": "wrong"}'
    text = f'{{"environment": {json.dumps(ENVIRONMENT)}, "measurements": {measurements}, "excluded": {excluded}}}'
    file.path.write_text(text)
    assert file.read() == Content({"b": {"x": 1.0}}, {"z": "wrong"})
    file.path.write_text(text.replace(measurements, "7").replace(excluded, "[]"))
    assert file.read() == Content({}, {})


def test_a_file_that_can_not_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError("No space left on device")

    file = CacheFile(tmp_path, ENVIRONMENT)
    file.add({"a": {"x": 1.0}})
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        file.add({"b": {"x": 1.0}})
    assert file.read().measurements == {"a": {"x": 1.0}}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}


def test_writers_at_once_lose_nothing_and_readers_see_whole_files(tmp_path):
    def write(writer: int) -> None:
        file = CacheFile(tmp_path, ENVIRONMENT)
        for number in range(25):
            file.add({f"{writer}, {number}": {"a": 1.0}}, {f"{writer}, {number}": "wrong"})

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for writer in writers:
        writer.start()
    file, count = CacheFile(tmp_path, ENVIRONMENT), 0
    while any(writer.is_alive() for writer in writers):
        seen = len(file.read().measurements)
        assert seen >= count
        count = seen
    names = {f"{writer}, {number}" for writer in range(4) for number in range(25)}
    assert set(file.read().measurements) == set(file.read().excluded) == names
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}


def test_a_lock_that_is_never_given_back_does_not_stop_a_writer(tmp_path):
    file = CacheFile(tmp_path, ENVIRONMENT)
    with file.measuring("a", 5), file.measuring("b", 5), file._locked(0, 5):
        file.add({"problem": {"a": 1.0}})
        with file.measuring("a", 0.05):
            pass
    assert file.read().measurements == {"problem": {"a": 1.0}}


def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "fused_sepconv"
    monkeypatch.setenv("HOME", str(tmp_path))
    for not_absolute in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", not_absolute)
        assert folder() == tmp_path / ".cache" / "fused_sepconv"
    monkeypatch.setattr(Path, "home", no_home)
    assert folder() is None
