"""A table that prints as text, as Markdown and as HTML: what `report`, `measure`, `compare` and others show."""

from __future__ import annotations

import html
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from secateur.errors import printable

_NARROW = 16  # characters: no column is made narrower than this, so that numbers stay whole
_COUNT = re.compile("0|[1-9][0-9]*")
_Rows = list[Sequence[str]]  # of one table, the header first


@dataclass(frozen=True)
class Table:
    """Rows of ready-made strings under a header; the first column is aligned left, the others right.

    Names are shown by `secateur.errors.printable`: control characters in them are escaped.

    Attributes:
        keys: columns that say which row it is: they stand in each part of a table that is too wide.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = field(default=())
    keys: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        for name in ("header", "notes"):
            object.__setattr__(self, name, [printable(cell) for cell in getattr(self, name)])
        object.__setattr__(self, "rows", [[printable(cell) for cell in row] for row in self.rows])
        object.__setattr__(self, "title", printable(self.title))

    def text(self, width: int | None = 80) -> str:
        """Plain text, columns aligned, notes below; no line is longer than `width` characters (None: no limit).

        A table that is too wide is folded, never cut: a long name stands on a line of its own above its row, other
        long cells take several lines, and columns that still find no room follow in a further part.
        """
        parts = ["\n".join(_lines(rows, width)) for rows in _parts([self.header, *self.rows], width, self.keys)]
        folded = [line for note in self.notes for line in _fold(note, width)]
        return "\n".join([*_fold(self.title, width), "\n\n".join(parts), *folded])

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table, notes below."""
        rows = [[_in_markdown(cell) for cell in row] for row in (self.header, *self.rows)]
        lines = [f"| {' | '.join(_aligned(row, _widths(rows)))} |" for row in rows]
        lines.insert(1, f"|{'|'.join(['---', *['---:'] * (len(self.header) - 1)])}|")
        title = [f"**{_in_markdown(self.title)}**", ""] if self.title else []
        notes = ["", *map(_in_markdown, self.notes)] if self.notes else []
        return "\n".join([*title, *lines, *notes])

    def html(self) -> str:
        """An HTML table, as notebooks show it: the title is its caption, the notes stand below."""

        def row(cells: Sequence[str], tag: str) -> str:
            styles = ["text-align: left; white-space: pre-wrap", *["text-align: right"] * (len(cells) - 1)]
            pairs = zip(cells, styles, strict=True)
            made = [f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for cell, style in pairs]
            return f"<tr>{''.join(made)}</tr>"

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        body = "\n".join(row(cells, "td") for cells in self.rows)
        notes = "".join(f"\n<div>{html.escape(note)}</div>" for note in self.notes)
        return f"<table>{caption}\n<thead>{row(self.header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{notes}"


class Printed(ABC):
    """What prints as a table: as text by `str()`, as Markdown, and in notebooks by itself."""

    @abstractmethod
    def table(self) -> Table:
        """The table that is printed."""

    def markdown(self) -> str:
        """The table in Markdown."""
        return self.table().markdown()

    def __str__(self) -> str:
        return self.table().text()

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        return self.table().html()


def _parts(rows: _Rows, width: int | None, keys: Sequence[int]) -> Iterator[_Rows]:
    """The table itself, or where it is too wide several, each with the key columns and as many others as fit."""
    least = [min(w, _NARROW) for w in _widths(rows)]
    part = set(keys)
    for column in range(len(least)):
        together = sum(least[i] + 2 for i in part | {column}) - 2
        if width is not None and together > width and len(part) > len(keys):
            yield [[row[i] for i in sorted(part)] for row in rows]
            part = set(keys)
        part.add(column)
    yield [[row[i] for i in sorted(part)] for row in rows]


def _lines(rows: _Rows, width: int | None) -> Iterator[str]:
    widths = _widths(rows)
    while width is not None and sum(w + 2 for w in widths) - 2 > width and max(widths) > _NARROW:
        widths[widths.index(max(widths))] -= 1
    folded = {i for i, w in enumerate(widths) if any(len(row[i]) > w for row in rows[1:])}
    for number, (name, *cells) in enumerate(rows):
        if len(name) > widths[0]:
            yield from _fold(name, width)
            name = ""
        columns = [[name], *(_fold(cell, w) for cell, w in zip(cells, widths[1:], strict=True))]
        for line in zip_longest(*columns, fillvalue=""):
            yield "  ".join(_aligned(line, widths, folded)).rstrip()
        if number == 0:
            yield "  ".join("-" * w for w in widths)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _aligned(row: Sequence[str], widths: Sequence[int], left: Collection[int] = ()) -> Iterator[str]:
    """The cells, filled with blanks: the first column and those named to the left, the others to the right."""
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i == 0 or i in left else cell.rjust(width)


def _fold(text: str, width: int | None) -> list[str]:
    """Lines of at most `width` characters, broken at blanks; in a name without blanks, after a dot or the like."""
    if width is None or len(text) <= width:
        return [text] if text else []
    ends = r"\s" if " " in text else "[./_-]"
    return [line.rstrip() for line in re.findall(rf".{{1,{width}}}(?:(?<={ends})|$)|.{{{width}}}", text)]


def _in_markdown(text: str) -> str:
    """Let no name be read as a tag or as emphasis."""
    return re.sub(r"[|<*`\[]", r"\\\g<0>", text)


def folded(named: Iterable[tuple[str, Hashable]]) -> list[tuple[str, list[int]]]:
    """Fold names that differ in a number between dots, and stand for what is alike, into one.

    Args:
        named: names, and what is equal where two may be folded.

    Returns:
        The names that are left, in order, and the places of what each stands for.

    >>> folded([("layers.0.fc", 1), ("head", 1), ("layers.1.fc", 1), ("layers.2.fc", 1), ("layers.3.fc", 2)])
    [('layers.{0..2}.fc', [0, 2, 3]), ('head', [1]), ('layers.3.fc', [4])]
    """
    found = [(tuple(re.split(r"([.\[])", name)), like, [i]) for i, (name, like) in enumerate(named)]
    for depth in reversed(range(max((len(parts) for parts, *_ in found), default=0))):
        groups: dict[Hashable, list[tuple[tuple[str, ...], Hashable, list[int]]]] = {}
        for one in found:
            parts, like, _ = one
            counts = depth < len(parts) and _COUNT.fullmatch(parts[depth])
            groups.setdefault(((*parts[:depth], None, *parts[depth + 1 :]) if counts else parts, like), []).append(one)
        found = [group[0] if len(group) == 1 else _joined(group, depth) for group in groups.values()]
    return [("".join(parts), places) for parts, _, places in found]


def _joined(
    group: Sequence[tuple[tuple[str, ...], Hashable, list[int]]], depth: int
) -> tuple[tuple[str, ...], Hashable, list[int]]:
    """Names that differ in one part alone as one name."""
    parts, like, _ = group[0]
    spans = _spans(int(parts[depth]) for parts, *_ in group)
    return (*parts[:depth], f"{{{spans}}}", *parts[depth + 1 :]), like, [i for *_, places in group for i in places]


def _spans(numbers: Iterable[int]) -> str:
    """Whole numbers in words, rising: "0..2,5,6"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ",".join(f"{s[0]}..{s[-1]}" if len(s) > 2 else ",".join(map(str, s)) for s in spans)


def number(value: float) -> str:
    """A count for people: 1,234,567."""
    return f"{value:,.0f}"


def counted(count: int, one: str, many: str = "") -> str:
    """A count with its noun: "1 tensor", "1,234 tensors"."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def percent(value: float) -> str:
    """A fraction for people: 0.8999 is "89.99 %"."""
    return f"{100 * value:.2f} %"


def size(count: float) -> str:
    """Bytes for people: "812 B", "45.1 kB", "1.2 MB" (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
