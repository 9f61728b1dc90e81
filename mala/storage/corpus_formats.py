"""The formats of corpus files, and how the documents of one file are read.

    .txt                one document per line
    .jsonl              one document per JSON object, with the text in one of its fields
    .tsv                SIB-200's files (tab-separated CSV with a header) and Taxi1500's (raw, no header)
    .parquet, .arrow    tables, one document per row; .arrow is a stream (as `datasets` saves it) or a file

The first three may be compressed (`.gz`). Every reader streams, so a file may be larger than memory.
"""

import csv
import gzip
import json
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mala.cli import UserError, option
from mala.storage.files import refuse_pointer

TEXT_FIELDS = ("text", "content")  # the fields in which to look for the text, in this order
SIB200_HEADER = ["index_id", "category", "text"]
# White space and format characters (Unicode's Cf, all in these ranges). A text of only these is blank.
CHARACTERS = map(chr, (*range(0x1D200), *range(0xE0000, 0xE0080)))
UNSEEN = frozenset(char for char in CHARACTERS if char.isspace() or unicodedata.category(char) == "Cf")
# The beginning of another row within a quoted field: the quote was never closed.
SWALLOWED = re.compile(r"[\r\n]\d+\t[^\t\r\n]+\t")


@dataclass
class Reading:
    """How to read documents: settings of every command that takes a corpus."""

    text_field: str | None = option(None, "the field with a document's text; default: text, else content")
    skip_bad_lines: bool = option(False, "skip and count lines that hold no text, instead of stopping")


DEFAULT = Reading()


class BadLines:
    """The lines of a file that hold no text. The first raises an error, or, if `skip`, all are counted."""

    def __init__(self, file: Path, skip: bool = False):
        self.file, self.skip, self.count, self.first = file, skip, 0, ""

    def add(self, number: int, fault: str) -> None:
        """Count a bad line. Raises UserError unless bad lines are skipped."""
        if not self.skip:
            raise UserError(f"{self.file}: line {number} {fault}")
        self.count += 1
        self.first = self.first or f"line {number} {fault}"


@cache
def say_once(message: str) -> None:
    """Print a message to stderr once, in one process only. Every pass over a corpus would repeat it."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def read_documents(file: Path, reading: Reading = DEFAULT) -> Iterator[str]:
    """Yield the documents of one corpus file, except blank ones. Raises UserError with the file and line."""
    refuse_pointer(file)
    bad = BadLines(file, reading.skip_bad_lines)
    read = READERS.get(format_of(file), READERS[".txt"])
    for text in read(file, reading.text_field, bad):
        if text and (text[0] not in UNSEEN or not UNSEEN.issuperset(text)):
            yield text
    if bad.count:
        lines = "1 bad line" if bad.count == 1 else f"{bad.count:,} bad lines, the first"
        say_once(f"{file}: skipped {lines}: {bad.first}")


def format_of(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def read_lines(file: Path, bad: BadLines | None = None, is_csv: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of every line that is not blank in a UTF-8 file, plain or `.gz`. is_csv:
    yield blank lines too, and keep line ends, because both may lie within a quoted field."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
        try:
            for number, raw in enumerate(lines, 1):  # as bytes: only \n ends a line, not U+2028
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    where = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                    (bad or BadLines(file)).add(number, f"is not UTF-8 ({where}); convert it with iconv")
                    continue
                line = line.removeprefix("\ufeff") if number == 1 else line
                line = line if is_csv else line.rstrip("\r\n")
                if is_csv or line.strip():
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: damaged gzip file ({error}); download it again") from None


def _read_txt(file: Path, text_field: str | None, bad: BadLines) -> Iterator[str]:
    return (line for _, line in read_lines(file, bad))


def _read_jsonl(file: Path, text_field: str | None, bad: BadLines) -> Iterator[str]:
    for number, line in read_lines(file, bad):
        row = text = None
        try:
            row = json.loads(line)
            if not text_field and isinstance(row, dict):  # the first row with a text decides
                text_field = next((name for name in TEXT_FIELDS if name in row), None)
            text = row[text_field]
            text.encode()  # fails for half a surrogate pair, "\ud800": JSON, but not text
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            fault = f'is not a JSON object with a string "{text_field or TEXT_FIELDS[0]}"'
            if isinstance(row, dict) and text_field not in row:
                fault += f"; {_fields(row)}"
            elif isinstance(row, dict) and text is None:
                continue  # null is no error: tables may hold it too
            bad.add(number, fault)
        else:
            yield text


def _fields(names: Sequence[str]) -> str:
    return f"its fields are {', '.join(names) or 'none'}; choose one with --text-field"


def read_tsv(file: Path, header: list[str] | None) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line's number, three columns) of each row of a benchmark's file. A file that begins with
    `header` is CSV with quoted fields, as pandas writes it. In others, quotes and further tabs are text."""
    _, first_line = next(read_lines(file), (1, ""))
    is_csv = first_line.replace('"', "").split("\t") == header
    rows = _csv_rows(file) if is_csv else ((n, line.split("\t")) for n, line in read_lines(file))
    for number, cells in rows:
        if len(cells) < 3:
            raise UserError(f"{file}: line {number} has {len(cells)} columns, expected 3 (id, label, text)")
        yield number, [*cells[:2], "\t".join(cells[2:])]


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    lines = (line for _, line in read_lines(file, is_csv=True))
    rows, first = csv.reader(lines, delimiter="\t", strict=True), 1
    try:
        for cells in rows:
            if any(SWALLOWED.search(cell) for cell in cells):
                raise csv.Error("its quotes enclose another row")
            if any(cell.strip() for cell in cells):
                yield first, cells
            first = rows.line_num + 1
    except csv.Error as error:
        found = f"{file}: line {first} begins a row that is not CSV with tabs as pandas writes it ({error})"
        remedy = "expected closed quotes, doubled within a text; download the file again, or fix the row"
        raise UserError(f"{found}; {remedy}") from None


def _read_benchmark(file: Path, text_field: str | None, bad: BadLines) -> Iterator[str]:
    """Yield the texts of SIB-200's rows, below a header, or of Taxi1500's, without a header."""
    return (cells[2] for _, cells in read_tsv(file, SIB200_HEADER) if cells != SIB200_HEADER)


def _read_table(file: Path, text_field: str | None, bad: BadLines) -> Iterator[str]:
    """Yield one column of a Parquet file, Arrow stream or Arrow file, told apart by content, not by name."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(f"{file}: reading .parquet and .arrow needs pyarrow: pip install pyarrow") from None
    with open(file, "rb") as opened:
        magic = opened.read(6)
    is_parquet, is_file = magic.startswith(b"PAR1"), magic == b"ARROW1"
    reader = pq.ParquetFile if is_parquet else pa.ipc.open_file if is_file else pa.ipc.open_stream
    try:
        table = reader(pa.memory_map(str(file)))
        schema = table.schema_arrow if is_parquet else table.schema
        text_field = text_field or next((name for name in TEXT_FIELDS if name in schema.names), None)
        if text_field not in schema.names:
            raise UserError(f"{file}: no column {text_field or TEXT_FIELDS[0]!r}; {_fields(schema.names)}")
        kind = schema.field(text_field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(kind) not in ("string", "large_string", "string_view", "null"):
            raise UserError(f"{file}: column {text_field!r} is {kind}, not string; {_fields(schema.names)}")
        if is_parquet:
            batches = table.iter_batches(columns=[text_field])
        else:
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        for batch in batches:
            yield from (text for text in batch.column(text_field).to_pylist() if text is not None)
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not a whole Parquet or Arrow file ({reason}); download it again") from None


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".tsv": _read_benchmark}  # format -> reader
READERS |= {".parquet": _read_table, ".arrow": _read_table}
