import pytest

from secateur.files import replacing


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
