"""Small tables: rows to Markdown, and the thesis's own numbers (reference/*.csv) to rows."""

from __future__ import annotations

import csv
from pathlib import Path

REFERENCE = Path(__file__).resolve().parents[1] / "reference"


def markdown(rows, columns=None, formats=None) -> str:
    """A table in Markdown.

    Parameters
    ----------
    rows : list of dictionaries, one a row.
    columns : the keys to show, in this order, or a dictionary key -> heading; all keys of the first row by default.
    formats : key -> format specification (``".3f"``) or function of the value; other values are shown as they are.

    Raises ``ValueError`` where there is no row, or a row lacks a column. ``None`` is shown as an empty cell.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows: nothing to show")
    headings = columns if isinstance(columns, dict) else {key: key for key in (columns or rows[0])}
    formats = formats or {}

    def cell(row, key):
        if key not in row:
            raise ValueError(f"column {key!r} is not in a row with columns {', '.join(map(str, row))}")
        value, how = row[key], formats.get(key, "")
        if value is None:
            return ""
        text = how(value) if callable(how) else format(value, how)
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [list(headings.values()), ["---"] * len(headings)]
    lines += [[cell(row, key) for key in headings] for row in rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def thesis(name: str, folder: Path = REFERENCE) -> list[dict[str, str]]:
    """The rows of a file of the thesis's numbers, every value as the text that was printed.

    name : ``"table_6_1"``, ``"table_A1"``, ``"figures"``, ... Raises ``FileNotFoundError`` listing the valid names.
    """
    path = Path(folder) / f"{name}.csv"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in Path(folder).glob("*.csv"))) or "none: the folder is missing or empty"
        raise FileNotFoundError(f"no thesis numbers under the name {name!r} in {folder}; there are: {names}")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pairs(rows, parameter: str, low, high, value: str, settings) -> tuple[int, int, int]:
    """In how many pairs of rows ``value`` rises, falls, or stays equal as ``parameter`` goes from low to high.

    A pair agrees in all other ``settings`` (names of columns). Values are compared as printed, as numbers.
    """
    others = [name for name in settings if name != parameter]
    found = {(row[parameter], *(row[name] for name in others)): float(row[value]) for row in rows}
    rises = falls = equal = 0
    for (at, *rest), start in found.items():
        end = found.get((high, *rest)) if at == low else None
        if end is not None:
            rises, falls, equal = rises + (end > start), falls + (end < start), equal + (end == start)
    return rises, falls, equal
