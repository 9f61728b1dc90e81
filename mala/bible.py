"""Bible editions to Taxi1500's layout: the labels stand at English verses, and verse ids carry them to any other language.

An edition is a text file as in the Parallel Bible Corpus (Mayer & Cysouw 2014), of which Taxi1500's free corpus is a part:

    # language_name:        Swahili
    # closest ISO 639-3:    swh
    # ISO 15924:            Latn
    40001001	Yesu Kristo alikuwa mzawa wa Daudi, mzawa wa Abrahamu. …

A verse id is two digits of the book, three of the chapter, three of the verse.
"""

from __future__ import annotations

import errno
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from mala.checkpoint import atomic_directory
from mala.cli import UserError
from mala.corpus import LANGUAGE

SPLITS = ("train", "dev", "test")
Labels = Mapping[str, list[tuple[str, str]]]  # split -> (verse id, label) of each English row, in order
Lines = Iterator[tuple[int, str]]  # (number from 1, line without its end)

# The first word of a letter's name in Unicode -> ISO 15924.
SCRIPTS = dict(pair.split() for pair in (
    "LATIN Latn,CYRILLIC Cyrl,GREEK Grek,ARMENIAN Armn,GEORGIAN Geor,COPTIC Copt,HEBREW Hebr,ARABIC Arab,SYRIAC Syrc,"
    "THAANA Thaa,NKO Nkoo,ETHIOPIC Ethi,TIFINAGH Tfng,VAI Vaii,ADLAM Adlm,DEVANAGARI Deva,BENGALI Beng,GURMUKHI Guru,"
    "GUJARATI Gujr,ORIYA Orya,TAMIL Taml,TELUGU Telu,KANNADA Knda,MALAYALAM Mlym,SINHALA Sinh,OL Olck,MEETEI Mtei,CHAKMA Cakm,"
    "TIBETAN Tibt,MYANMAR Mymr,KHMER Khmr,THAI Thai,LAO Laoo,BALINESE Bali,JAVANESE Java,MONGOLIAN Mong,CJK Hani,"
    "HIRAGANA Jpan,KATAKANA Jpan,HANGUL Hang,YI Yiii,LISU Lisu,MIAO Plrd,CHEROKEE Cher,CANADIAN Cans,GOTHIC Goth"
).split(","))  # fmt: skip


def read_archive(path: Path) -> Iterator[tuple[str, Lines]]:
    """(name, lines) of each edition in a zip archive, in order of name. Raises BadZipFile where the archive is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".txt") and not Path(name).name.startswith("."))
            for name in tqdm(names, desc="reading Bibles", unit="edition", leave=False, disable=None):
                # To its end, before the first line is looked at: only then is its CRC-32 checked, and damage no wrong line.
                yield name, _lines(name, archive.read(name))
    except Exception as error:  # zipfile stumbles over damage in many ways
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.EINVAL):  # of another origin
            raise
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from None


def _lines(name: str, data: bytes) -> Lines:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start} is not UTF-8 (0x{data[error.start]:02x}); convert it with iconv") from None
    for number, line in enumerate(text.split("\n"), 1):  # \n alone ends a line, as in mala.corpus.read_lines
        yield number, line.rstrip("\r")


def join(labels: Labels, editions: Iterable[tuple[str, Lines]], is_tolerant: bool = False
         ) -> tuple[dict[str, dict[str, str]], dict[str, str]]:  # fmt: skip
    """language -> verse id -> text of its labelled verses; and, where an edition is left out, its file's name -> why.

    editions: (file, its lines). Of a language's editions the one with most labelled verses counts, as the authors' script takes
    the longest; of several, the first by name. is_tolerant: an edition with a wrong line is left out, and raises nothing.
    """
    wanted = {id for split in SPLITS for id, _ in labels[split]}
    best: dict[str, tuple[int, str]] = {}
    found, left_out = {}, {}
    for name, lines in editions:
        file = Path(name).name
        try:
            header, verses = read_edition(name, lines, wanted)
            if not verses:
                left_out[file] = "it has none of the labelled verses"
                continue
            language = language_of(name, header, verses.values())
        except UserError as error:
            if not is_tolerant:
                raise
            left_out[file] = str(error)
            continue
        rank = (-len(verses), file)
        if language not in best or rank < best[language]:
            best[language], found[language] = rank, verses
    return found, left_out


def read_edition(name: str, lines: Lines, wanted: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The header of an edition, its keys in lower case, and the texts of those of its verses that are `wanted`.

    A verse without a text is absent; a tab within a text becomes a space, as Taxi1500 has three columns. Raises UserError for a
    line that does not begin with a verse id and a tab, and for an id that comes twice.
    """
    header: dict[str, str] = {}
    verses: dict[str, str] = {}
    seen = set()
    for number, line in lines:
        if line.startswith("#"):  # verses that are commented out, too
            key, _, value = line[1:].partition(":")
            header.setdefault(key.strip().lower(), value.strip())
        elif line.strip():
            # An id alone, from which an editor took the tab, is a verse without a text, and to the authors' script, too.
            id, _, text = line.partition("\t")
            if not (len(id) == 8 and id.isascii() and id.isdigit()):
                raise UserError(
                    f"{name}: line {number} begins with {id[:30]!r}, expected a verse id of 8 digits and a tab; mend it"
                )
            if id in seen:
                raise UserError(f"{name}: line {number} has the verse id {id} for the second time; keep one of the two")
            seen.add(id)
            if id in wanted and text.strip():
                verses[id] = text.replace("\t", " ")
    return header, verses


def language_of(name: str, header: Mapping[str, str], texts: Iterable[str]) -> str:
    """`<ISO 639-3>_<ISO 15924>` of an edition: what its file's name begins with, as `swh_Latn.txt`. Otherwise the code of the
    language stands in the header, or begins the file's name, and the script stands there, or is that of most letters of the
    texts. Raises UserError where it is not to be found."""
    file = Path(name).name
    if whole := re.match(rf"{LANGUAGE.pattern}(?![A-Za-z])", file):
        return whole[0]
    language = re.fullmatch("[a-z]{3}", header.get("closest iso 639-3", "")) or re.match("[a-z]{3}(?![A-Za-z])", file)
    if not language:
        raise UserError(f"{name}: its language is not to be found; let the file's name begin with it, as in swh_Latn.txt")
    if script := re.fullmatch("[A-Z][a-z]{3}", header.get("iso 15924", "")):
        return f"{language[0]}_{script[0]}"
    scripts: Counter[str | None] = Counter()
    for char, count in Counter("".join(texts)).items():
        if char.isalpha():
            scripts[SCRIPTS.get(unicodedata.name(char, "?").split()[0])] += count
    most = max(scripts, key=scripts.__getitem__, default=None)
    if most is None:
        raise UserError(
            f"{name}: its script is not to be found; let the file's name begin with it, as in {language[0]}_Latn.txt"
        )
    return f"{language[0]}_{most}"


def write_languages(labels: Labels, found: Mapping[str, Mapping[str, str]], out: Path, min_verses: int = 900
                    ) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """Write a folder for each language of `join`, in the order of the English rows, unless it has too few verses.

    Returns the languages written, and, where one was not, language -> why. An existing folder is replaced, as a whole.
    """
    written, left_out = [], {}
    for language, verses in sorted(found.items()):
        splits = {split: [row for row in labels[split] if row[0] in verses] for split in SPLITS}
        total = sum(map(len, splits.values()))
        empty = [split for split in SPLITS if not splits[split]]
        if total < min_verses:
            left_out[language] = f"it has {total:,} labelled verses, fewer than {min_verses:,}"
        elif empty:
            left_out[language] = f"it has no verse of the {' and the '.join(empty)} split"
        else:
            with atomic_directory(out / language, replace=True) as folder:
                for split, rows in splits.items():
                    text = "".join(f"{id}\t{label}\t{verses[id]}\n" for id, label in rows)
                    (folder / f"{language}_{split}.tsv").write_bytes(text.encode())
            written.append(language)
    return written, left_out
