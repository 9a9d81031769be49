"""The bar: on stderr, when it is asked for."""

import pytest

from secateur.support.progress import progress_bar


@pytest.mark.parametrize("total", [3, None])
def test_a_bar_on_stderr(total, capsys):
    with progress_bar("sampling", total, shown=True) as advance:
        for _ in range(3):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "sampling" in err
    assert f"3/{3 if total else '?'}" in err


def test_bytes_are_written_as_bytes(capsys):
    with progress_bar("packing", 3_000_000, shown=True, in_bytes=True) as advance:
        advance(1_000_000)
    assert "1.0/3.0 MB" in capsys.readouterr().err


def test_nothing_unless_it_is_asked_for(capsys):
    with progress_bar("sampling", 3, shown=False) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_an_error_comes_through_and_ends_the_bar(capsys):
    with pytest.raises(ValueError, match="its own"), progress_bar("sampling", 3, shown=True):
        raise ValueError("its own")
    assert "sampling" in capsys.readouterr().err
