"""Reads tables of recordings (CSV, TSV, JSONL), and names the file and the line of what is wrong.

All values of a CSV or TSV file are text, also "1" and "null". CSV is read strictly, with quotes as in RFC 4180. TSV has
no quotes, as in Common Voice, whose sentences may begin with one.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass
class Table:
    """The rows of a table.

    Args:
        path: the file.
        columns: the names of the columns in their order.
        rows: the values of each row by column; a row of a JSONL file may lack a column.
        lines: the line of the file in which each row starts, counted from 1.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, Any]]
    lines: list[int]

    def texts(self, column: str, *, empty: bool = True, null: bool = False) -> list[Any]:
        """The values of a column, all of which must be text.

        Args:
            column: its name.
            empty: whether a value may be the empty text.
            null: whether a value may be missing.

        Raises:
            ValueError: naming the line of the first row whose value is something else.
        """
        values = [row.get(column) for row in self.rows]
        for line, value in zip(self.lines, values, strict=True):
            if value is None and null:
                continue
            if not isinstance(value, str) or not (value or empty) or not _is_unicode(value):
                found = "nothing" if value is None else repr(value)[:80]
                raise ValueError(
                    f"line {line} of {self.path}: {column!r} must be text{'' if empty else ' that is not empty'}, got "
                    f"{found}; correct the value, or remove the row"
                )
        return values

    def where(self, column: str, value: str) -> Table:
        """The table with only the rows whose column has the value; no rows if none has."""
        kept = [number for number, found in enumerate(self.texts(column)) if found == value]
        return Table(self.path, self.columns, [self.rows[n] for n in kept], [self.lines[n] for n in kept])


def read_table(path: Path) -> Table:
    """Reads a CSV, TSV or JSONL file.

    Raises:
        ValueError: naming the file, and the line if it is one line that is wrong.
    """
    if path.suffix not in TABLES:
        raise ValueError(f"a table must be one of {', '.join(TABLES)}, got {path}")
    text = _decode(path)
    table = _read_json_lines(path, text) if path.suffix == ".jsonl" else _read_fields(path, text)
    if not table.rows:
        raise ValueError(f"{path} has no rows; it must have at least one")
    return table


def _decode(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); correct its path or its permissions") from error
    if content[:2] in BYTE_ORDER_MARKS:
        raise ValueError(
            f"{path} is in UTF-16, and a table must be in UTF-8; save it as UTF-8, or convert it, as with "
            "`iconv -f UTF-16 -t UTF-8 TABLE > NEW`"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} of {path} is not UTF-8 (byte {content[error.start]:#x}); save the table as UTF-8, "
            "or convert it from its encoding, as with `iconv -f WINDOWS-1252 -t UTF-8 TABLE > NEW`"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"line {line} of {path} has a NUL character, so that the table is damaged or in UTF-16; save it as UTF-8"
        )
    return text


def _read_json_lines(path: Path, text: str) -> Table:
    columns: dict[str, None] = {}  # in their order, from all rows
    rows, lines = [], []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path} must be a JSON object, got {line[:80]!r} ({error})"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} must be a JSON object, got {line[:80]!r}")
        columns.update(dict.fromkeys(row))
        rows.append(row)
        lines.append(number)
    return Table(path, list(columns), rows, lines)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _is_unicode(text: str) -> bool:
    """Whether a text can be written; JSON can escape half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _read_fields(path: Path, text: str) -> Table:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    records = _records(path, text, delimiter)
    line, columns = next(records, (1, []))
    double = next((name for name in columns if name and columns.count(name) > 1), None)
    if double is not None:
        raise ValueError(
            f"line {line} of {path} has two columns called {double!r}; rename or remove one of them"
        )
    rows, lines = [], []
    for line, fields in records:
        if len(fields) != len(columns):
            raise ValueError(
                f"line {line} of {path} must have as many fields as line 1, {len(columns)}, got {len(fields)}; a field "
                + ("must not hold a tab" if delimiter == "\t" else "that holds a comma must be in quotes")
            )
        # Columns without a name, such as those of tabs at the ends of all lines, cannot be asked for.
        rows.append({name: field for name, field in zip(columns, fields, strict=True) if name})
        lines.append(line)
    table = Table(path, [name for name in columns if name], rows, lines)
    if delimiter == "\t":
        _warn_of_quotes(table)
    return table


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record, and the line in which it starts. Empty lines are left out."""
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    num_fields = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path} cannot be read in the row that starts in line {line} ({error}); "
                + (
                    "a field is too long or holds a line break"
                    if delimiter == "\t"
                    else "close each quote, and write a quote within a quoted field twice"
                )
            ) from error
        if not fields:
            continue
        num_fields = num_fields or len(fields)
        if any(_holds_rows(field, delimiter, num_fields) for field in fields):
            raise ValueError(
                f"lines {line} to {reader.line_num} of {path} are one row with a quoted field that looks like rows; "
                "close its quote, or, if the field is right, write the table as .jsonl"
            )
        yield line, fields


def _holds_rows(field: str, delimiter: str, num_fields: int) -> bool:
    """Whether a field has a line break, and a line that could be the end of a row, as where a quote is not closed."""
    lines = field.splitlines()
    return len(lines) > 1 and any(line.count(delimiter) >= num_fields - 1 for line in lines[1:])


def _warn_of_quotes(table: Table) -> None:
    """Says where a TSV file seems to have the quotes of CSV, as some programs write them."""
    for line, row in zip(table.lines, table.rows, strict=True):
        for name, field in row.items():
            inner = field[1:-1]
            if field[:1] == field[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
                logger.warning(
                    f"line {line} of {table.path}: {name!r} is in quotes as in CSV, {field[:80]}; TSV is read without "
                    "quoting, so that they stay in the text. If that is wrong, write the table as .csv"
                )
                return
