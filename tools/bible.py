"""Bible editions to Taxi1500's layout: English verses have labels, verse ids carry them to other languages.

An edition is a text file as in the Parallel Bible Corpus (Mayer & Cysouw 2014), to which Taxi1500's free
corpus belongs. A verse id is two digits of the book, three of the chapter, three of the verse:

    # language_name:        Swahili
    # closest ISO 639-3:    swh
    # ISO 15924:            Latn
    40001001	Yesu Kristo alikuwa mzawa wa Daudi, mzawa wa Abrahamu. …
"""

from __future__ import annotations

import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from mala.cli import UserError
from mala.storage.files import atomic_directory

SPLITS = ("train", "dev", "test")
MIN_VERSES = 900  # labelled ones, for a language to be written: as published
Labels = Mapping[str, list[tuple[str, str]]]  # split -> (verse id, label) of each English row, in order
Lines = Iterator[tuple[int, str]]  # (number from 1, line without its end)
Verses = dict[str, str]  # id -> text

# The first word of a letter's name in Unicode -> ISO 15924.
_PAIRS = """
    LATIN Latn     CYRILLIC Cyrl  GREEK Grek     ARMENIAN Armn    GEORGIAN Geor  COPTIC Copt
    HEBREW Hebr    ARABIC Arab    SYRIAC Syrc    THAANA Thaa      NKO Nkoo       ETHIOPIC Ethi
    TIFINAGH Tfng  VAI Vaii       ADLAM Adlm     DEVANAGARI Deva  BENGALI Beng   GURMUKHI Guru
    GUJARATI Gujr  ORIYA Orya     TAMIL Taml     TELUGU Telu      KANNADA Knda   MALAYALAM Mlym
    SINHALA Sinh   OL Olck        MEETEI Mtei    CHAKMA Cakm      TIBETAN Tibt   MYANMAR Mymr
    KHMER Khmr     THAI Thai      LAO Laoo       BALINESE Bali    JAVANESE Java  MONGOLIAN Mong
    CJK Hani       HIRAGANA Jpan  KATAKANA Jpan  HANGUL Hang      YI Yiii        LISU Lisu
    MIAO Plrd      CHEROKEE Cher  CANADIAN Cans  GOTHIC Goth
""".split()
SCRIPTS = dict(zip(_PAIRS[::2], _PAIRS[1::2]))


def read_archive(path: Path) -> Iterator[tuple[str, Lines]]:
    """Yield (name, lines) of each edition in a zip archive, in order of name. Raises zipfile's errors."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        names = [name for name in names if not Path(name).name.startswith(".")]
        for name in tqdm(names, desc="reading Bibles", unit="edition", leave=False, disable=None):
            yield name, _lines(name, archive.read(name))  # as a whole: only at its end is its CRC-32 checked


def _lines(name: str, data: bytes) -> Lines:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is not UTF-8 (0x{data[error.start]:02x})"
        raise UserError(f"{name}: {byte}; convert it with iconv") from None
    for number, line in enumerate(text.split("\n"), 1):  # \n alone ends a line, as in corpus.read_lines
        yield number, line.rstrip("\r")


def join(
    labels: Labels, editions: Iterable[tuple[str, Lines]], is_tolerant: bool
) -> tuple[dict[str, Verses], dict[str, str]]:
    """Find the labelled verses in editions (name, lines): language -> verses, and name -> why it is left out.

    If a language has several editions, the one with most labelled verses counts, or the first of several such
    (the authors' script takes the longest). A wrong line raises UserError; if `is_tolerant`, its edition is
    left out instead.
    """
    wanted = {id for split in SPLITS for id, _ in labels[split]}
    found, left_out = {}, {}
    for name, lines in editions:
        try:
            header, verses = read_edition(name, lines, wanted)
            language = language_of(name, header, verses.values()) if verses else ""
        except UserError as error:
            if not is_tolerant:
                raise
            left_out[Path(name).name] = str(error)
            continue
        if not verses:
            left_out[Path(name).name] = "it has none of the labelled verses"
        elif len(verses) > len(found.get(language, {})):
            found[language] = verses
    return found, left_out


def read_edition(
    name: str, lines: Lines, wanted: Collection[str] | None = None
) -> tuple[dict[str, str], Verses]:
    """Read an edition: its header, keys in lower case, and its `wanted` verses with a text, tabs as spaces.
    None: all verses.

    Raises UserError for a line that does not begin with a verse id, and for an id that comes twice.
    """
    header, verses, seen = {}, {}, set()
    for number, line in lines:
        if line.startswith("#"):  # verses that are commented out, too
            key, _, value = line[1:].partition(":")
            header.setdefault(key.strip().lower(), value.strip())
        elif line.strip():
            # An id whose tab an editor stripped is a verse without a text; to the authors' script, too.
            id, _, text = line.partition("\t")
            if not re.fullmatch("[0-9]{8}", id):
                found = f"{name}: line {number} begins with {id[:30]!r}"
                raise UserError(f"{found}, expected a verse id of 8 digits and a tab")
            if id in seen:
                found = f"{name}: line {number} has the verse id {id}"
                raise UserError(f"{found} for the second time; keep one of the two")
            seen.add(id)
            if (wanted is None or id in wanted) and text.strip():
                verses[id] = text.replace("\t", " ")
    return header, verses


def language_of(name: str, header: Mapping[str, str], texts: Iterable[str]) -> str:
    """Tell `<ISO 639-3>_<ISO 15924>` of an edition.

    If the file's name begins with both, as in `swh_Latn.txt`, that counts. Otherwise the language stands in
    the header or in the name, and the script in the header; if not, it is that of most letters in `texts`.
    Raises UserError if one of the two is not to be found.
    """
    file = re.match("([a-z]{3})(_[A-Z][a-z]{3})?(?![A-Za-z])", Path(name).name)
    if file and file[2]:
        return file[0]
    language = re.fullmatch("[a-z]{3}", header.get("closest iso 639-3", "")) or file
    if not language:
        advice = "let the file's name begin with it, as in swh_Latn.txt"
        raise UserError(f"{name}: its language is not to be found; {advice}")
    script = header.get("iso 15924", "")
    if not re.fullmatch("[A-Z][a-z]{3}", script):
        scripts: Counter[str] = Counter()
        for char, count in Counter("".join(texts)).items():
            if char.isalpha():
                scripts[SCRIPTS.get(unicodedata.name(char, "?").split()[0], "")] += count
        script = max(scripts, key=scripts.__getitem__, default="")
    if not script:
        advice = f"let the file's name tell it, as in {language[0]}_Latn.txt"
        raise UserError(f"{name}: its script is not to be found; {advice}")
    return f"{language[0]}_{script}"


def write_languages(
    labels: Labels, found: dict[str, Verses], out: Path, min_verses: int
) -> tuple[list[str], dict[str, str]]:
    """Write or replace a folder for each language that `join` found, verses in the order of the English rows.

    Returns the languages written, and language -> why, if one was not.
    """
    written, left_out = [], {}
    for language, verses in sorted(found.items()):
        splits = {split: [row for row in labels[split] if row[0] in verses] for split in SPLITS}
        if len(verses) < min_verses:
            left_out[language] = f"it has {len(verses):,} labelled verses, fewer than {min_verses:,}"
        elif empty := [split for split in SPLITS if not splits[split]]:
            left_out[language] = f"it has no verse of the {' and the '.join(empty)} split"
        else:
            with atomic_directory(out / language, replace=True) as folder:
                for split, rows in splits.items():
                    text = "".join(f"{id}\t{label}\t{verses[id]}\n" for id, label in rows)
                    (folder / f"{language}_{split}.tsv").write_bytes(text.encode())
            written.append(language)
    return written, left_out
