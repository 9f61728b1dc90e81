"""A corpus of many languages: the folder, its formats, and which documents are held out.

A corpus is a folder with one entry per language, `<ISO 639-3>_<ISO 15924>`: a file `swh_Latn.txt` (a document a line) or
`swh_Latn.jsonl` (a document a `text` field), either with `.gz`, or a folder `swh_Latn/` of such files, of `.parquet`, of
`.arrow`, or of SIB-200's and Taxi1500's `.tsv`. Where a language's files are named for their split (`train.tsv`,
`swh_Latn_test.jsonl`), the split is theirs; elsewhere the last documents of each language are held out.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mala.cli import UserError

LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
# `train.tsv`, `swh_Latn_test.jsonl.gz`, and the shards of a hub: `validation-00000-of-00001.parquet`
SPLIT_FILE = re.compile(r"(?:.*_)?(train|dev|validation|test)(?:-\d+-of-\d+)?(?:\..*)?")
FORMATS = (".txt", ".jsonl", ".tsv", ".parquet", ".arrow")


class Corpus:
    """The documents of a corpus folder, by language and split.

    A language without split files of its own is split by order: the last `held_out` share of its documents, at most
    `max_held_out` of them, is its test split, the rest its train split; a share of 1 makes all of it the test split.
    `languages` narrows the corpus.
    """

    def __init__(self, root: str | Path, languages: tuple[str, ...] = (), held_out: float = 0.2,
                 max_held_out: int = 1000):  # fmt: skip
        self.root = Path(root)
        self.held_out, self.max_held_out = held_out, max_held_out
        if not 0 <= held_out <= 1:
            raise UserError(f"the held-out share is {held_out}, expected a number from 0 to 1")
        self.files = _find_files(self.root)
        self.languages = check_languages(self.root, list(self.files), languages)
        self.files = {language: self.files[language] for language in self.languages}
        self.counts: dict[Path, int] = {}  # documents of each file, counted when they are first asked for

    def documents(self, language: str, split: str) -> Documents:
        """The documents of one language in one split ("train", "dev", "test"), blank ones left out; maybe none."""
        files = self.files[language]
        splits = [_split_of(file) for file in files]
        if any(splits):
            if not all(splits):
                odd = files[splits.index(None)]
                raise UserError(f"{odd}: of no split, but files beside it are; expected all or none named train, dev or test")
            return Documents([file for file in files if _split_of(file) == split], lambda total: (0, total), self.counts)

        def part(total: int) -> tuple[int, int]:
            kept = 0
            if self.held_out < 1:
                kept = total - min(int(total * self.held_out), self.max_held_out)
            return {"train": (0, kept), "dev": (0, 0), "test": (kept, total)}[split]

        return Documents(files, part, self.counts)

    def stream(self, split: str) -> dict[str, Documents]:
        """language -> documents, for every language that has some. Raises UserError where none has."""
        return self._all("counting", split, lambda documents: documents)

    def load(self, split: str) -> dict[str, list[str]]:
        """`stream`, but read into memory."""
        return self._all("reading", split, list)

    def _all(self, doing: str, split: str, take: Callable[[Documents], Any]) -> dict[str, Any]:
        bar = tqdm(self.languages, desc=f"{doing} {split}", unit="language", leave=False, disable=None)
        found = {language: taken for language in bar if len(taken := take(self.documents(language, split)))}
        if not found:
            raise UserError(f"{self.root}: the corpus is empty: no language has a document in its {split} split; expected a "
                            f"file named {split}, or, where none is named for a split, enough documents for a held-out share "
                            f"of {self.held_out}")  # fmt: skip
        return found


class Documents:
    """A part of the documents in some files, blank ones not counted. They are read anew each time they are gone through, so
    that they may be larger than memory. part: how many there are -> the first of the part, and the one after its last.
    counts: file -> how many it holds, where that is known; filled."""

    def __init__(self, files: list[Path], part: Callable[[int], tuple[int, int]], counts: dict[Path, int]):
        self.files, self.part, self.counts = files, part, counts

    def bounds(self) -> tuple[int, int]:
        for file in self.files:
            if file not in self.counts:
                self.counts[file] = sum(1 for _ in read_documents(file))
        return self.part(sum(self.counts[file] for file in self.files))

    def __len__(self) -> int:
        first, end = self.bounds()
        return end - first

    def __iter__(self) -> Iterator[str]:
        return islice(chain.from_iterable(read_documents(file) for file in self.files), *self.bounds())


def check_languages(root: Path, found: list[str], chosen: tuple[str, ...]) -> list[str]:
    """Those of the languages `found` in a folder that are `chosen`; all, where none is. Raises UserError for any other."""
    for language in chosen:
        if language not in found:
            raise UserError(f"{root}: there is no language {language!r}; it holds {some(found)}")
    return sorted(set(chosen)) if chosen else found


def _find_files(root: Path) -> dict[str, list[Path]]:
    """language -> its files, both in order of name. Entries that are no language's are named on stderr and skipped."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; expected a corpus with one entry per language")
    found: dict[str, list[Path]] = {}
    skipped = []
    for entry in _visible(root):
        language = entry.name.split(".")[0]
        files = _visible(entry) if entry.is_dir() else [entry]
        files = [file for file in files if _format_of(file)]
        if not LANGUAGE.fullmatch(language) or not files:
            skipped.append(entry.name)
            continue
        if language in found:
            raise UserError(f"{root}: {language} has two entries, {entry.name} is the second; expected one per language")
        found[language] = files
    if skipped:
        print(f"{root}: skipped {some(skipped)}: not named for a language, or no corpus file", file=sys.stderr)
    if not found:
        raise UserError(f"{root}: no corpus: expected entries such as swh_Latn.txt, swh_Latn.jsonl.gz or swh_Latn/")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "README")))


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _format_of(file: Path) -> str | None:
    suffix = Path(file.name.removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS else None


def _split_of(file: Path) -> str | None:
    found = SPLIT_FILE.fullmatch(file.name)
    return found and {"validation": "dev"}.get(found[1], found[1])


def read_documents(file: Path, first: int = 0, end: int | None = None) -> Iterator[str]:
    """The documents of one corpus file, blank ones left out. Raises UserError that names the file and the line.

    first, end: of a .txt or .jsonl file, only the lines that begin from byte `first` to before byte `end`; the number of a line
    in an error then counts from the first of them.
    """
    kind = _format_of(file)
    if kind in (".parquet", ".arrow"):
        texts = _read_arrow(file)
    elif kind == ".jsonl":
        texts = (_json_text(file, number, line) for number, line in read_lines(file, first, end) if line.strip())
    elif kind == ".tsv":
        texts = _tsv_texts(file)
    else:
        texts = (line for _, line in read_lines(file, first, end))
    return (text for text in texts if text.strip())


def read_lines(file: Path, first: int = 0, end: int | None = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, plain or `.gz`; a byte-order mark is dropped."""
    opened = gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")
    with opened as lines:
        try:
            if first:  # on to where a line begins, maybe here
                lines.seek(first - 1)
                first += len(lines.readline()) - 1
            for number, raw in enumerate(lines, 1):  # bytes: only \n ends a line, not U+2028 and its like
                if end is not None and first >= end:
                    break
                first += len(raw)
                line = raw.decode().rstrip("\r\n")
                yield number, line.removeprefix("\ufeff") if first == len(raw) else line
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}: line {number} is not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
                f"convert the file, for instance with iconv"
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: damaged gzip file ({error}); download it again") from None


def _json_text(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # half a surrogate pair, "\ud800", is JSON but no text
        return text
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):  # UnicodeEncodeError is a ValueError
        raise UserError(f'{file}: line {number} is not a JSON object with a string "text"') from None


def read_tsv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, its three columns) of a benchmark's file: quotes are text, and so is a tab in the last column."""
    for number, line in read_lines(file):
        if not line.strip():
            continue
        cells = line.split("\t", 2)
        if len(cells) != 3:
            raise UserError(f"{file}: line {number} has {len(cells)} columns, expected 3 (id, label, text), a tab between them")
        yield number, cells


def _tsv_texts(file: Path) -> Iterator[str]:
    """The text of SIB-200's rows (header `index_id category text`) or Taxi1500's (no header)."""
    return (cells[2] for number, cells in read_tsv(file) if number > 1 or cells != ["index_id", "category", "text"])


def _read_arrow(file: Path) -> Iterator[str]:
    """The column `text` of a Parquet file or an Arrow stream (how `datasets` saves, Glot500-c among them)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(f"{file}: reading .parquet and .arrow takes pyarrow: pip install pyarrow") from None
    try:
        if file.suffix == ".parquet":
            batches = pq.ParquetFile(file).iter_batches(columns=["text"])
        else:
            batches = pa.ipc.open_stream(pa.memory_map(str(file)))
        for batch in batches:
            column = batch.column("text")
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                raise KeyError(f"text is {column.type}, expected string")
            yield from (text for text in column.to_pylist() if text is not None)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(f"{file}: not a table with a column 'text' ({error})") from None


def language_shares(documents: list[int], alpha: float) -> np.ndarray:
    """Probability of each language, proportional to n^alpha, n its number of documents: (languages,) float64.

    alpha 1 draws languages by size, alpha 0 all alike; MaLA-500's 0.3 lets the small ones be heard.
    """
    weights = np.array(documents, dtype=np.float64) ** alpha
    return weights / weights.sum()
