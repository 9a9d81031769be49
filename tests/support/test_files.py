"""secateur.support.files: whole or not there at all, whatever happens on the way."""

import contextlib
import gc
import os
import stat
import subprocess
import sys
import threading
import warnings

import pytest

from secateur.errors import InputError, WriteError
from secateur.support import files
from secateur.support.files import Reader, replacing, replacing_folder, require_file


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
    with pytest.raises(WriteError, match=r"give the name of a file in it|give a new folder, or move it away"):
        written(verb, name)
    assert names(tmp_path) == ["here", "here/sub"]


@VERBS
def test_the_errors_of_others_are_theirs(tmp_path, verb):
    def fail(error):
        with verb(tmp_path / "x") as unfinished:
            fill(unfinished)
            raise error

    for error in (ValueError("mine"), KeyboardInterrupt("mine")):
        with pytest.raises(type(error), match=r"^mine$"):
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

KILLED = """
import os, signal, sys
from secateur.support import files
verb, path, text = getattr(files, sys.argv[1]), sys.argv[2], sys.argv[3]
if text == "halfway":  # between the two renames of a system that cannot exchange
    files.exchange = lambda *_: False
    rename = os.replace
    def then_die(old, new):
        rename(old, new)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace = then_die
with verb(path) as unfinished:
    (unfinished / "inside" if unfinished.is_dir() else unfinished).write_text(text)
    if text == "held":
        print("writing", flush=True)
        sys.stdin.read()
    elif text != "halfway":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def writer(verb, path, text, **how):
    command = [sys.executable, "-c", KILLED, verb.__name__, str(path), text]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **how)


@VERBS
def test_the_leftovers_of_the_dead_go(tmp_path, verb):
    writer(verb, tmp_path / "x", "killed").communicate()
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".x.00000000.tmp").mkdir()  # one that died sooner still
    written(verb, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@VERBS
def test_those_of_the_living_and_of_others_stay(tmp_path, verb):
    with writer(verb, tmp_path / "x", "held") as process:
        assert process.stdout.readline() == "writing\n"
        others = {path.name for path in tmp_path.iterdir()}
        for name in (".xx.00000000.tmp", ".x.0000000.tmp", ".x.00000000.txt", ".x.y.00000000.tmp", ".x.1111111a.tmp"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text("")
            others.add(name)
        written(verb, tmp_path / "x")
        assert {path.name for path in tmp_path.iterdir()} == {"x", *others}
        process.communicate("")
    assert len(list(tmp_path.iterdir())) == 6
    assert "held" in ((tmp_path / "x" / "inside") if verb is replacing_folder else tmp_path / "x").read_text()


def test_a_folder_whose_writer_was_killed_between_two_renames(tmp_path):
    """Elsewhere than on Linux the old folder is put aside first: the next write finds it again."""
    written(replacing_folder, tmp_path / "x", "old")
    writer(replacing_folder, tmp_path / "x", "halfway").communicate()
    assert not (tmp_path / "x").exists()

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


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    writer(replacing, tmp_path / "x", "killed").communicate()
    monkeypatch.setattr(files, "_lock", lambda descriptor: False)
    written(replacing, tmp_path / "x")
    assert len(list(tmp_path.iterdir())) == 2


# ---- one step, on the disk, as private as before ----------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is a call of Linux")
def test_a_folder_is_exchanged_in_one_step(tmp_path, monkeypatch):
    written(replacing_folder, tmp_path / "x", "old")

    def refuse(*_):
        raise AssertionError("a folder was renamed, so that for a moment there is none")

    monkeypatch.setattr(files.os, "replace", refuse)
    written(replacing_folder, tmp_path / "x", "new")
    assert (tmp_path / "x" / "inside").read_text() == "new"
    assert names(tmp_path) == ["x", "x/inside"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("exchanges", [False, True])
@VERBS
def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch, verb, there, exchanges):
    if there:
        written(verb, tmp_path / "x", "old")
    done, fsync, rename, swap = [], os.fsync, os.replace, files.exchange

    def flushed(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def exchanged(*paths):
        done.append("exchange")
        return exchanges and swap(*paths)

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.os, "replace", lambda old, new: (done.append("rename"), rename(old, new)))
    monkeypatch.setattr(files, "exchange", exchanged)
    written(verb, tmp_path / "x")
    if verb is replacing:
        assert done == ["new", "rename", tmp_path.name]
    else:
        names_it = ["rename"] if not there else ["exchange"] if exchanges else ["exchange", "rename", "rename"]
        assert done == ["inside", "new", *names_it, tmp_path.name]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("wanted", [0o600, 0o640, 0o604, 0o400, 0o666, 0o755])
def test_a_file_keeps_its_mode(tmp_path, wanted):
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(wanted)
    with replacing(tmp_path / "x") as unfinished:
        unfinished.write_text("new")
        assert mode(unfinished.parent) == 0o700  # nobody else looks in before it is done
    assert (mode(tmp_path / "x"), (tmp_path / "x").read_text()) == (wanted, "new")


def test_a_new_file_has_the_mode_of_new_files_or_less(tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "private").write_text("")
    (tmp_path / "private").chmod(0o600)
    written(replacing, tmp_path / "x")
    assert mode(tmp_path / "x") == mode(tmp_path / "plain")
    with replacing(tmp_path / "y", like=tmp_path / "private") as unfinished:
        unfinished.write_text("new")
    assert mode(tmp_path / "y") == 0o600


def test_a_folder_keeps_its_modes_and_those_of_its_files(tmp_path):
    written(replacing_folder, tmp_path / "x")
    (tmp_path / "x").chmod(0o750)
    (tmp_path / "x" / "inside").chmod(0o600)
    with replacing_folder(tmp_path / "x") as unfinished:
        fill(unfinished)
        (unfinished / "more").write_text("")
    (tmp_path / "plain").write_text("")
    assert (mode(tmp_path / "x"), mode(tmp_path / "x" / "inside")) == (0o750, 0o600)
    assert mode(tmp_path / "x" / "more") == mode(tmp_path / "plain")


def test_a_file_whose_group_cannot_be_kept_is_closed_to_groups(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(0o664)
    with contextlib.suppress(OSError):
        os.chown(tmp_path / "x", -1, 12345)
    if (tmp_path / "x").stat().st_gid != 12345:
        pytest.skip("only root may give a file to any group")
    monkeypatch.setattr(files.os, "chown", lambda *_: None)
    written(replacing, tmp_path / "x")
    assert mode(tmp_path / "x") == 0o604


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
@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_written_through(tmp_path, verb, there):
    (tmp_path / "far").mkdir()
    if there:
        written(verb, tmp_path / "far" / "real", "old")
    (tmp_path / "link").symlink_to("far/real")
    written(verb, tmp_path / "link")
    place = tmp_path / "far" / "real"
    assert (place / "inside" if verb is replacing_folder else place).read_text() == "new"
    assert os.readlink(tmp_path / "link") == "far/real"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link"]
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["real"]


@VERBS
def test_links_in_a_circle(tmp_path, verb):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(WriteError, match="leads back to itself: give another name"):
        written(verb, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_link_in_a_folder_is_something_to_lose(tmp_path):
    written(replacing_folder, tmp_path / "x")
    (tmp_path / "x" / "inside").rename(tmp_path / "far")
    (tmp_path / "x" / "inside").symlink_to(tmp_path / "far")
    with pytest.raises(WriteError, match="x holds inside, which would be lost: give a new folder, or move it away"):
        written(replacing_folder, tmp_path / "x")
    assert (tmp_path / "x" / "inside").is_symlink()


@VERBS
def test_a_pipe_or_a_device_stays_what_it_is(tmp_path, verb):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(
            WriteError, match=r"(a pipe or a device: give the name of a file|give the name of a folder)"
        ):
            written(verb, place)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_that_cannot_take_its_place(tmp_path, monkeypatch):
    written(replacing_folder, tmp_path / "x", "old")
    replace = os.replace

    def refuse(old, new):
        if str(new) == str(tmp_path / "x") and str(old).endswith("new"):
            raise PermissionError(13, "Permission denied")
        replace(old, new)

    monkeypatch.setattr(files, "exchange", lambda *_: False)
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
    with pytest.raises(FileNotFoundError, match="none"):
        Reader(tmp_path / "none")


def test_what_is_no_ordinary_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place, remedy in [
        (tmp_path / "pipe", "pipe or a device: copy what it gives to a file first"),
        ("/dev/zero", "pipe or a device: copy what it gives"),
        (tmp_path, "is a folder: give a file in it"),
        (tmp_path / "none", "cannot be read .*: give a file that is there"),
    ]:
        with pytest.raises(InputError, match=remedy) as caught:
            require_file(place)
        assert str(place) in str(caught.value)
