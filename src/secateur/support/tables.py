"""A table that prints as text and as Markdown: what `report`, `measure` and `compare` show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of ready-made strings under a header; the first column is aligned left, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = field(default=())

    def text(self) -> str:
        """Plain text, columns aligned, notes below."""
        lines = [self._line(row, "  ") for row in (self.header, *self.rows)]
        lines.insert(1, "  ".join("-" * width for width in self._widths()))
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes])

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table, notes below."""
        rule = "|".join(["---", *["---:"] * (len(self.header) - 1)])
        lines = ["| " + self._line(row, " | ", "\\|") + " |" for row in (self.header, *self.rows)]
        lines.insert(1, f"|{rule}|")
        title = [f"**{self.title}**", ""] if self.title else []
        notes = ["", *self.notes] if self.notes else []
        return "\n".join([*title, *lines, *notes])

    def _widths(self) -> list[int]:
        return [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]

    def _line(self, row: Sequence[str], gap: str, bar: str = "|") -> str:
        cells = [cell.replace("|", bar) for cell in row]
        widths = self._widths()
        first = cells[0].ljust(widths[0])
        return gap.join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()


def number(value: float) -> str:
    """A count for people: 1,234,567."""
    return f"{value:,.0f}"


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
