"""secateur.support.tables: aligned text, Markdown that GitHub reads, numbers for people."""

from collections import Counter
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.support.tables import Printed, Table, counted, folded, number, percent, size

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


def test_a_table_prints_itself():
    assert str(TABLE) == TABLE.text()
    assert TABLE._repr_html_() == TABLE.html()


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


NAME = "encoder.layers.11.attention.self.query_key_value.projection.weight"  # 66 characters


def test_a_long_name_stands_above_its_row():
    table = Table(("tensor", "weights", "zeros"), [[NAME, "1,024", "512"], ["short", "16", "8"]])
    assert table.text(width=40).split("\n") == [
        "tensor                    weights  zeros",
        "------------------------  -------  -----",
        "encoder.layers.11.attention.self.query_",
        "key_value.projection.weight",
        "                            1,024    512",
        "short                          16      8",
    ]
    assert NAME in table.text()
    assert len(table.text(width=None).split("\n")) == 4


def test_a_long_cell_takes_several_lines():
    table = Table(("tensor", "why"), [["w", "a bias is left dense, as it is small"]])
    assert table.text(width=30).split("\n") == [
        "tensor  why",
        "------  ----------------------",
        "w       a bias is left dense,",
        "        as it is small",
    ]


def test_columns_without_room_follow_below():
    header = ["tensor", *(f"column {i}" for i in range(4))]
    table = Table(header, [["w", *(f"{i}" * 12 for i in range(4))]], notes=["note"])
    assert table.text(width=40).split("\n") == [
        "tensor      column 0      column 1",
        "------  ------------  ------------",
        "w       000000000000  111111111111",
        "",
        "tensor      column 2      column 3",
        "------  ------------  ------------",
        "w       222222222222  333333333333",
        "note",
    ]


WORD = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=90)


@given(st.data(), st.integers(1, 8), st.integers(40, 120))
def test_no_line_is_wider_and_nothing_is_lost(data, columns, width):
    rows = data.draw(st.lists(st.lists(WORD, min_size=columns, max_size=columns), min_size=1, max_size=4))
    table = Table(rows[0], rows[1:], title=data.draw(WORD), notes=[data.draw(WORD)])
    text = table.text(width)
    assert max(map(len, text.split("\n"))) <= width
    cells = [table.title, *table.notes, *(cell for row in rows for cell in row)]
    assert Counter("".join(cells)) - Counter(text) == Counter()  # a further part repeats the names


def test_what_a_name_holds_is_shown_not_obeyed():
    table = Table(("tensor", "n"), [["\x1b[2Ja\nb\u202e\ud800", "1"]], title="\x07t", notes=["\rn"])
    for shown in (table.text(), table.markdown(), table.html()):
        assert r"x1b" in shown
        assert not set("\x1b\u202e\ud800\x07\r") & set(shown)
    assert "a\\nb\\u202e\\ud800" in table.text()


def test_markdown_takes_names_as_they_are():
    assert r"\*a\*\<b>\`c\`\[d](e)" in Table(("x",), [["*a*<b>`c`[d](e)"]]).markdown()


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))


def test_html():
    found = Cells(Table(("tensor", "n"), [["<b>&", "1"], ["w", "2"]], title="<t>", notes=["a < b"]).html())
    assert found.open == []
    cells = [("th", "tensor"), ("th", "n"), ("td", "<b>&"), ("td", "1"), ("td", "w"), ("td", "2")]
    assert found.texts == [("caption", "<t>"), *cells, ("div", "a < b")]
    assert Cells(Table(("a",), []).html()).texts == [("th", "a")]


def test_what_prints_as_a_table_does_so_in_notebooks():
    class One(Printed):
        def table(self):
            return TABLE

    assert str(One()) == TABLE.text()
    assert One().markdown() == One()._repr_markdown_() == TABLE.markdown()
    assert One()._repr_html_() == TABLE.html()


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


def test_a_name_is_never_a_tag():
    name = "<script>alert(1)</script>"
    table = Table((name, "b"), [[name, name]], title=name, notes=[name])
    assert "<script" not in table.html()
    assert table.html().count("&lt;script&gt;") == 5
    assert table.markdown().count("<script") == table.markdown().count(r"\<script") == 5


def test_key_columns_stand_in_each_part():
    header = ("layer", *(f"a long header {i}" for i in range(5)), "rows", "and yet another")
    rows = [("fc", *"12345", "1", "x"), ("", *"67890", "2-4", "y")]
    parts = Table(header, rows, keys=(0, 6)).text(80).split("\n\n")
    assert len(parts) == 2
    for part in parts:
        assert part.splitlines()[0].split()[0] == "layer"
        assert "rows" in part.splitlines()[0].split()
        assert "2-4" in part.splitlines()[3].split()


def test_counted():
    assert [counted(n, "tensor") for n in (0, 1, 2, 1234)] == ["0 tensors", "1 tensor", "2 tensors", "1,234 tensors"]
    assert counted(1, "call drops", "calls drop") == "1 call drops"
    assert counted(2, "call drops", "calls drop") == "2 calls drop"


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ([], []),
        (["", "a"], ["", "a"]),
        (["a.0", "a.1", "a.3", "a.4", "a.5"], ["a.{0,1,3..5}"]),
        (["0[:]", "1[:]", "head[0:4]"], ["{0,1}[:]", "head[0:4]"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0,1}.b.{0,1}"]),
        (["a.0.b.0", "a.1.b.0", "a.1.b.1"], ["a.0.b.0", "a.1.b.{0,1}"]),
        (["a.9.x", "a.10.x", "a.2.x"], ["a.{2,9,10}.x"]),
        (["layer1.0", "layer2.0", "00", "1"], ["layer1.0", "layer2.0", "00", "1"]),
    ],
)
def test_names_that_differ_in_a_number_are_folded(names, want):
    found = folded((name, None) for name in names)
    assert [name for name, _ in found] == want
    assert sorted(i for _, places in found for i in places) == [*range(len(names))]
    assert folded((name, i) for i, name in enumerate(names)) == [(name, [i]) for i, name in enumerate(names)]
