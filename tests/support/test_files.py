"""secateur.support.files: whole or not there at all, whatever happens on the way."""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import warnings

import pytest

from secateur.errors import WriteError
from secateur.support import files
from secateur.support.files import Reader, replacing, replacing_folder


def test_a_new_file_replaces_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old")
    with replacing(tmp_path / "file") as unfinished:
        unfinished.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unfinished_file_leaves_no_trace(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail():
        with replacing(str(tmp_path / "file")) as unfinished:
            unfinished.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


VERBS = pytest.mark.parametrize("verb", [replacing, replacing_folder])


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(unfinished, text="new"):
    """Write a file, or a folder with one file."""
    (unfinished / "inside" if unfinished.is_dir() else unfinished).write_text(text)


def written(verb, path, text="new"):
    with verb(path) as unfinished:
        fill(unfinished, text)


# ---- where nothing can be written -------------------------------------------------------------------------------


@VERBS
def test_what_is_of_the_other_kind_stays(tmp_path, verb):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    target, remedy = ("folder", "name of a file in it") if verb is replacing else ("file", "give the name of a folder")
    with pytest.raises(WriteError, match=remedy):
        written(verb, tmp_path / target)
    assert names(tmp_path) == ["file", "folder"]


@VERBS
def test_a_folder_that_is_missing(tmp_path, verb):
    with pytest.raises(WriteError, match=r"x was not written .*what was there is intact: make its folder first"):
        written(verb, tmp_path / "none" / "x")
    assert names(tmp_path) == []


@VERBS
def test_a_folder_that_is_a_file(tmp_path, verb):
    (tmp_path / "file").write_text("old")
    with pytest.raises(WriteError, match=r"was not written .*what was there is intact"):
        written(verb, tmp_path / "file" / "x")
    assert names(tmp_path) == ["file"]


@VERBS
def test_a_name_that_the_system_refuses(tmp_path, verb):
    with pytest.raises(WriteError, match=r"was not written .*see to room and permissions"):
        written(verb, tmp_path / ("x" * 300))
    assert names(tmp_path) == []


@VERBS
@pytest.mark.parametrize("name", [".", "sub/.."])
def test_the_folder_one_is_in(tmp_path, monkeypatch, verb, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(WriteError):
        written(verb, name)
    assert names(tmp_path) == ["here", "here/sub"]


@VERBS
def test_the_errors_of_others_are_theirs(tmp_path, verb):
    def fail(error):
        with verb(tmp_path / "x") as unfinished:
            fill(unfinished)
            raise error

    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert names(tmp_path) == []


@VERBS
@pytest.mark.parametrize("name", ["x", "ü [a] *?", "%s {0}", ".hidden", "x.tmp", "-o"])
def test_names_of_all_kinds(tmp_path, verb, name):
    for text in ("one", "two"):
        written(verb, tmp_path / name, text)
    place = tmp_path / name
    assert (place / "inside" if verb is replacing_folder else place).read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ---- what a killed process left ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(pid, target, host=None):
    return target.with_name(f".{target.name}.{host or socket.gethostname()}-{pid}.tmp")


@VERBS
def test_the_leftovers_of_the_dead_go(tmp_path, verb, dead):
    left_by(dead, tmp_path / "x").write_text("half")
    left_by(10**9, tmp_path / "x").mkdir()
    (left_by(10**9, tmp_path / "x") / "half").write_text("half")
    written(verb, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@VERBS
def test_those_of_the_living_and_of_others_stay(tmp_path, verb, dead):
    others = [
        left_by(os.getppid(), tmp_path / "x"),
        left_by(dead, tmp_path / "x", "another-machine"),
        left_by(dead, tmp_path / "xx"),
        left_by(f"{dead}x", tmp_path / "x"),
        left_by(dead, tmp_path / "x").with_suffix(".txt"),
    ]
    for other in others:
        other.write_text("half")
    written(verb, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x", *(other.name for other in others)])


def test_a_folder_whose_writer_was_killed_between_the_two_renames(tmp_path, dead):
    """It had been put aside, and its successor was not in its place yet: one whole version is found again."""
    aside = left_by(dead, tmp_path / "x").with_suffix(".old")
    aside.mkdir()
    fill(aside, "old")
    left_by(dead, tmp_path / "x").mkdir()

    def fail():
        with replacing_folder(tmp_path / "x"):
            raise ValueError

    with contextlib.suppress(ValueError):
        fail()
    assert names(tmp_path) == ["x", "x/inside"]
    assert (tmp_path / "x" / "inside").read_text() == "old"
    written(replacing_folder, tmp_path / "x")
    assert names(tmp_path) == ["x", "x/inside"]
    assert (tmp_path / "x" / "inside").read_text() == "new"


def test_what_a_killed_process_had_put_aside_goes_once_there_is_a_new_one(tmp_path, dead):
    aside = left_by(dead, tmp_path / "x").with_suffix(".old")
    for folder in (aside, tmp_path / "x"):
        folder.mkdir()
        fill(folder, "old")
    written(replacing_folder, tmp_path / "x")
    assert names(tmp_path) == ["x", "x/inside"]
    assert (tmp_path / "x" / "inside").read_text() == "new"


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_new_folder_replaces_an_old_one_of_which_it_has_all(tmp_path):
    with replacing_folder(tmp_path / "x") as unfinished:
        (unfinished / "a").write_text("old")
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "b").write_text("old")
        assert not (tmp_path / "x").exists()
    with replacing_folder(tmp_path / "x") as unfinished:
        (unfinished / "sub").mkdir()
        for name in ("a", "sub/b", "c"):
            (unfinished / name).write_text("new")
        assert (tmp_path / "x" / "a").read_text() == "old"
    assert names(tmp_path) == ["x", "x/a", "x/c", "x/sub", "x/sub/b"]
    assert (tmp_path / "x" / "sub" / "b").read_text() == "new"


@pytest.mark.parametrize("extra", ["mine", ".hidden", "sub/mine", "sub"])
def test_nothing_is_lost(tmp_path, extra):
    written(replacing_folder, tmp_path / "x")
    (tmp_path / "x" / "sub").mkdir()
    if extra != "sub":
        (tmp_path / "x" / extra).write_text("mine")
    before = names(tmp_path)
    with pytest.raises(WriteError, match=r"x holds (mine|\.hidden|sub).*, which would be lost: give a new folder, or"):
        written(replacing_folder, tmp_path / "x")
    assert names(tmp_path) == before


def test_an_empty_folder_gives_way(tmp_path):
    (tmp_path / "x").mkdir()
    written(replacing_folder, tmp_path / "x")
    assert names(tmp_path) == ["x", "x/inside"]


@VERBS
def test_a_link_leaves_nothing_behind(tmp_path, verb):
    written(verb, tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    written(verb, tmp_path / "link")
    place = tmp_path / "link"
    assert (place / "inside" if verb is replacing_folder else place).read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_folder_that_cannot_take_its_place(tmp_path, monkeypatch):
    written(replacing_folder, tmp_path / "x", "old")
    replace = os.replace

    def refuse(old, new):
        if str(new) == str(tmp_path / "x") and str(old).endswith(".tmp"):
            raise PermissionError(13, "Permission denied")
        replace(old, new)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(WriteError, match=r"\(Permission denied\), and what was there is intact: see to room and perm"):
        written(replacing_folder, tmp_path / "x")
    assert names(tmp_path) == ["x", "x/inside"]
    assert (tmp_path / "x" / "inside").read_text() == "old"


# ---- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pread", [True, False])
def test_many_threads_read_one_file(tmp_path, monkeypatch, pread):
    if not pread:
        monkeypatch.delattr(files.os, "pread")
    numbers = b"".join(i.to_bytes(4, "little") for i in range(10_000))
    (tmp_path / "file").write_bytes(numbers)
    reader, wrong = Reader(tmp_path / "file"), []

    def read(first):
        for i in range(first, 10_000, 8):
            if reader.read(4 * i, 4) != i.to_bytes(4, "little"):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert reader.read(39_998, 10) == numbers[39_998:]
    assert reader.read(50_000, 10) == b""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_a_file_is_closed_when_nobody_has_it(tmp_path):
    (tmp_path / "file").write_text("text")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readers = [Reader(tmp_path / "file") for _ in range(5)]
        assert len(os.listdir("/proc/self/fd")) == before + 5
        del readers
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "none")
