"""A corpus of many languages: the folder, its formats, and which documents are held out.

A corpus is a folder with one entry per language, `<ISO 639-3>_<ISO 15924>`: a file `swh_Latn.txt` (a document
a line) or `swh_Latn.jsonl` (a document a `text` field), either with `.gz`, or a folder `swh_Latn/` of such
files, of `.parquet`, of `.arrow`, or of SIB-200's and Taxi1500's `.tsv`. If a language's files are named for
their split (`train.tsv`, `swh_Latn_test.jsonl`), the split is theirs; else its last documents are held out.
"""

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mala.cli import UserError

LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
# `train.tsv`, `swh_Latn_test.jsonl.gz`, and the shards of a hub: `validation-00000-of-00001.parquet`
SPLIT_FILE = re.compile(r"(?:.*_)?(train|dev|validation|test)(?:-\d+-of-\d+)?(?:\..*)?")
progress = partial(tqdm, unit="language", leave=False, disable=None)


class Documents:
    """A part of the documents in some files, read anew on every pass, so they may be larger than memory.
    part: takes how many there are, returns where the part begins and ends, as in a slice. counts: file -> how
    many it holds, if that is known already; it is filled on the way."""

    def __init__(self, files: list[Path], part: Callable[[int], tuple[int, int]], counts: dict[Path, int]):
        self.files, self.part, self.counts = files, part, counts

    def bounds(self) -> tuple[int, int]:
        for file in self.files:
            if file not in self.counts:
                self.counts[file] = sum(1 for _ in read_documents(file))
        return self.part(sum(self.counts[file] for file in self.files))

    def __len__(self) -> int:
        return len(range(*self.bounds()))

    def __iter__(self) -> Iterator[str]:
        return islice(chain.from_iterable(read_documents(file) for file in self.files), *self.bounds())


class Corpus:
    """The documents of a corpus folder, by language and split. If a language has no split files, the last
    `held_out` share of its documents, at most `max_held_out` of them, is its test split, the rest its train
    split; a share of 1 makes all of it the test split. `languages` narrows the corpus."""

    def __init__(
        self, root: str | Path, languages: Sequence[str] = (), held_out: float = 0.2, max_held_out: int = 1000
    ):
        self.root, self.held_out, self.max_held_out = Path(root), held_out, max_held_out
        if not 0 <= held_out <= 1:
            raise UserError(f"the held-out share is {held_out}, expected a number from 0 to 1")
        files = _find_files(self.root)
        self.languages = check_languages(self.root, list(files), languages)
        self.files = {language: files[language] for language in self.languages}
        self.counts: dict[Path, int] = {}  # documents of each file, counted when they are first asked for

    def documents(self, language: str, split: str) -> Documents:
        """The documents of one language in one split ("train", "dev", "test"), maybe none."""
        files = self.files[language]
        splits = [_split_of(file) for file in files]
        if not any(splits):
            return Documents(files, partial(self._part, split), self.counts)
        if not all(splits):
            odd = files[splits.index(None)]
            raise UserError(f"{odd}: of no split, unlike files beside it; expected all or none of some split")
        of_split = [file for file, its_split in zip(files, splits) if its_split == split]
        return Documents(of_split, lambda total: (0, total), self.counts)

    def _part(self, split: str, total: int) -> tuple[int, int]:
        """Where a split begins and ends among `total` documents that no file name splits."""
        held_out = total if self.held_out == 1 else min(int(total * self.held_out), self.max_held_out)
        return {"train": (0, total - held_out), "dev": (0, 0), "test": (total - held_out, total)}[split]

    def stream(self, split: str) -> dict[str, Documents]:
        """language -> documents, for every language that has some. Raises UserError if none has."""
        parts = {language: self.documents(language, split) for language in self.languages}
        found = {name: part for name, part in progress(parts.items(), f"counting {split}") if len(part)}
        if not found:
            wrong = f"the corpus is empty: no language has a document in its {split} split"
            raise UserError(f"{self.root}: {wrong}; name files for it, or change the share {self.held_out}")
        return found

    def load(self, split: str) -> dict[str, list[str]]:
        """`stream`, but read into memory."""
        parts = self.stream(split)
        return {language: list(part) for language, part in progress(parts.items(), f"reading {split}")}


def script_of(language: str) -> str:
    """`swh_Latn` -> `Latn`."""
    return language.partition("_")[2]


def check_languages(root: Path, found: list[str], chosen: Sequence[str]) -> list[str]:
    """The `chosen` of the languages `found` in a folder, or all. Raises UserError if one is not there."""
    for language in chosen:
        if language not in found:
            raise UserError(f"{root}: there is no language {language!r}; it holds {some(found)}")
    return sorted(set(chosen)) if chosen else found


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def language_shares(documents: list[int], alpha: float) -> np.ndarray:
    """Probability of each language, proportional to n^alpha, n its number of documents: (languages,) float64.
    alpha 1 draws languages by size, alpha 0 all alike; MaLA-500's 0.3 lets the small ones be heard."""
    weights = np.array(documents, dtype=np.float64) ** alpha
    return weights / weights.sum()


def _find_files(root: Path) -> dict[str, list[Path]]:
    """language -> its files, both in order of name; other entries are named on stderr and skipped."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; expected a corpus with one entry per language")
    found, skipped = {}, []
    for entry in _visible(root):
        language = entry.name.split(".")[0]
        files = _visible(entry) if entry.is_dir() else [entry]
        files = [file for file in files if _format_of(file) in READERS]
        if not LANGUAGE.fullmatch(language) or not files:
            skipped.append(entry.name)
        elif language in found:
            raise UserError(f"{root}: {language} has two entries, the second is {entry.name}; expected one")
        else:
            found[language] = files
    if skipped:
        print(f"{root}: skipped {some(skipped)}: no language's name, or no corpus file", file=sys.stderr)
    if not found:
        raise UserError(f"{root}: no corpus; expected entries such as swh_Latn.txt or swh_Latn/")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "README")))


def _format_of(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _split_of(file: Path) -> str | None:
    found = SPLIT_FILE.fullmatch(file.name)
    return found and {"validation": "dev"}.get(found[1], found[1])


def read_documents(file: Path) -> Iterator[str]:
    """The documents of one corpus file, blank ones left out. Raises UserError with the file and the line."""
    read = READERS.get(_format_of(file), READERS[".txt"])
    return (text for text in read(file) if text.strip())


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank, of a UTF-8 file, plain or `.gz`."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
        try:
            for number, raw in enumerate(lines, 1):  # bytes: only \n ends a line, not U+2028 and its like
                line = raw.decode().rstrip("\r\n")
                line = line.removeprefix("\ufeff") if number == 1 else line
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            where = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            raise UserError(f"{file}: line {number} is not UTF-8 ({where}); convert it with iconv") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: damaged gzip file ({error}); download it again") from None


def _read_jsonl(file: Path) -> Iterator[str]:
    for number, line in read_lines(file):
        try:
            text = json.loads(line)["text"]
            text.encode()  # half a surrogate pair, "\ud800", is JSON but no text
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise UserError(f'{file}: line {number} is not a JSON object with a string "text"') from None
        yield text


def read_tsv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, its three columns) of a benchmark's file. Quotes are text, as is a tab in the third."""
    for number, line in read_lines(file):
        cells = line.split("\t", 2)
        if len(cells) != 3:
            raise UserError(f"{file}: line {number} has {len(cells)} columns, expected 3 (id, label, text)")
        yield number, cells


def _read_benchmark(file: Path) -> Iterator[str]:
    """The text of SIB-200's rows (header `index_id category text`) or Taxi1500's (no header)."""
    for number, cells in read_tsv(file):
        if number > 1 or cells != ["index_id", "category", "text"]:
            yield cells[2]


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


READERS = {  # a format of corpus files: how its documents are read
    ".txt": lambda file: (line for _, line in read_lines(file)),
    ".jsonl": _read_jsonl,
    ".tsv": _read_benchmark,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}
