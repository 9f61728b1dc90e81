"""The formats of corpus files: how the documents of one file are read.

    .txt                a document a line
    .jsonl              a document a JSON object, its text in one of the fields
    .tsv                SIB-200's files (CSV with tabs, below a header) and Taxi1500's (raw, no header)
    .parquet, .arrow    tables, a document a row; .arrow is a stream (as `datasets` saves it) or a file

The first three may be compressed, `.gz`. Every reader streams, so that a file may be larger than memory.
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

TEXT_FIELDS = ("text", "content")  # the fields where a text is looked for, in this order
SIB200_HEADER = ["index_id", "category", "text"]
# White space and format characters (Unicode's Cf, all of which lie here): a text of nothing else is blank.
CHARACTERS = map(chr, (*range(0x1D200), *range(0xE0000, 0xE0080)))
UNSEEN = frozenset(char for char in CHARACTERS if char.isspace() or unicodedata.category(char) == "Cf")
# Within a quoted field: the beginning of another row, so the quote was never closed.
SWALLOWED = re.compile(r"[\r\n]\d+\t[^\t\r\n]+\t")


@dataclass
class Reading:
    """How documents are read: settings of every command that takes a corpus."""

    text_field: str | None = option(None, "the field with a document's text; default: text, else content")
    skip_bad_lines: bool = option(False, "skip lines that hold no text, and count them, not refuse them")


DEFAULT = Reading()


class BadLines:
    """The lines of a file that hold no text: the first is refused, or all are skipped and counted."""

    def __init__(self, file: Path, skip: bool = False):
        self.file, self.skip, self.count, self.first = file, skip, 0, ""

    def add(self, number: int, fault: str) -> None:
        """Raises UserError unless bad lines are skipped."""
        if not self.skip:
            raise UserError(f"{self.file}: line {number} {fault}")
        self.count += 1
        self.first = self.first or f"line {number} {fault}"


@cache
def say_once(message: str) -> None:
    """Print to stderr, by one process only, what is found anew on every pass."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def read_documents(file: Path, reading: Reading = DEFAULT) -> Iterator[str]:
    """The documents of one corpus file, blank ones left out. Raises UserError with the file and the line."""
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
    """(number from 1, text) of every line that is not blank, of a UTF-8 file, plain or `.gz`. is_csv: blank
    lines, too, and all with their ends, which may lie within a quoted field."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
        try:
            for number, raw in enumerate(lines, 1):  # bytes: only \n ends a line, not U+2028 and its like
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
            if not text_field and isinstance(row, dict):  # the first row with a text decides for the file
                text_field = next((name for name in TEXT_FIELDS if name in row), None)
            text = row[text_field]
            text.encode()  # half a surrogate pair, "\ud800", is JSON but no text
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            fault = f'is not a JSON object with a string "{text_field or TEXT_FIELDS[0]}"'
            if isinstance(row, dict) and text_field not in row:
                fault += f"; {_fields(row)}"
            elif isinstance(row, dict) and text is None:
                continue  # null, which is no text in a table either
            bad.add(number, fault)
        else:
            yield text


def _fields(names: Sequence[str]) -> str:
    return f"its fields are {', '.join(names) or 'none'}: name the text's with --text-field"


def read_tsv(file: Path, header: list[str] | None) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, its three columns) of each row of a benchmark's file. One that begins with
    `header` is CSV, as pandas writes it: quotes enclose fields. Else they are text, as are further tabs."""
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
                raise csv.Error("another row lies within them")
            if any(cell.strip() for cell in cells):
                yield first, cells
            first = rows.line_num + 1
    except csv.Error as error:
        found = f"{file}: line {first} begins a row that is no CSV with tabs as pandas writes it ({error})"
        remedy = "expected quotes that close, a text's own doubled; download the file again, or mend the row"
        raise UserError(f"{found}; {remedy}") from None


def _read_benchmark(file: Path, text_field: str | None, bad: BadLines) -> Iterator[str]:
    """The text of SIB-200's rows, which lie below a header, or Taxi1500's, which have none."""
    return (cells[2] for _, cells in read_tsv(file, SIB200_HEADER) if cells != SIB200_HEADER)


def _read_table(file: Path, text_field: str | None, bad: BadLines) -> Iterator[str]:
    """One column of a Parquet file, an Arrow stream or an Arrow file: the content tells, not the name."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(f"{file}: reading .parquet and .arrow takes pyarrow: pip install pyarrow") from None
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
            raise UserError(f"{file}: column {text_field!r} is {kind}, no string; {_fields(schema.names)}")
        if is_parquet:
            batches = table.iter_batches(columns=[text_field])
        else:
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        for batch in batches:
            yield from (text for text in batch.column(text_field).to_pylist() if text is not None)
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: no whole Parquet or Arrow file ({reason}); download it again") from None


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".tsv": _read_benchmark}  # how each format is read
READERS |= {".parquet": _read_table, ".arrow": _read_table}
