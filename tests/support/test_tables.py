"""secateur.support.tables: aligned text, Markdown that GitHub reads, numbers for people."""

import pytest

from secateur.support.tables import Table, number, percent, size

TABLE = Table(("name", "n"), [["a", "1"], ["long name", "1,000"]], title="Title", notes=["one note", "another"])


def test_text():
    assert TABLE.text().split("\n") == [
        "Title",
        "name           n",
        "---------  -----",
        "a              1",
        "long name  1,000",
        "one note",
        "another",
    ]


def test_markdown():
    assert TABLE.markdown().split("\n") == [
        "**Title**",
        "",
        "| name      |     n |",
        "|---|---:|",
        "| a         |     1 |",
        "| long name | 1,000 |",
        "",
        "one note",
        "another",
    ]


def test_bars_are_escaped_in_markdown_only():
    table = Table(("x|y", "z"), [["a|b", "c"]])
    assert "a|b" in table.text()
    assert "a\\|b" in table.markdown()
    assert "x\\|y" in table.markdown()


def test_a_table_without_rows():
    assert Table(("a", "b"), []).text().split("\n") == ["a  b", "-  -"]
    assert Table(("a", "b"), []).markdown().split("\n") == ["| a | b |", "|---|---:|"]


def test_no_line_ends_in_blanks():
    table = Table(("a", "bbb"), [["x", ""], ["", ""]])
    assert all(line == line.rstrip() for line in table.text().split("\n"))


@pytest.mark.parametrize(("value", "want"), [(0, "0"), (999, "999"), (1234567, "1,234,567"), (-1000, "-1,000")])
def test_number(value, want):
    assert number(value) == want


@pytest.mark.parametrize(("value", "want"), [(0, "0.00 %"), (0.8999, "89.99 %"), (1, "100.00 %"), (0.651, "65.10 %")])
def test_percent(value, want):
    assert percent(value) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [(0, "0 B"), (812, "812 B"), (45_100, "45.1 kB"), (1_200_000, "1.2 MB"), (3e9, "3.0 GB"), (5e13, "50000.0 GB")],
)
def test_size(value, want):
    assert size(value) == want
