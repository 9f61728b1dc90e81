"""Bible editions in Taxi1500's layout: verse ids carry the labels of English verses to other languages.

An edition is a text file in the format of the Parallel Bible Corpus (Mayer & Cysouw 2014); Taxi1500's free
corpus is a part of it. A verse id has two digits for the book, three for the chapter and three for the verse:

    # language_name:        Swahili
    # closest ISO 639-3:    swh
    # ISO 15924:            Latn
    40001001	Yesu Kristo alikuwa mzawa wa Daudi, mzawa wa Abrahamu. …
"""

from __future__ import annotations

import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from mala.cli import UserError
from mala.storage.files import atomic_directory

SPLITS = ("train", "dev", "test")
MIN_VERSES = 900  # labelled verses that a language needs, as published
Labels = Mapping[str, list[tuple[str, str]]]  # split -> (verse id, label) of the English rows, in order
Lines = Iterator[tuple[int, str]]  # (line number from 1, line without its end)
Verses = dict[str, str]  # id -> text

# The first word of a letter's Unicode name -> its script in ISO 15924.
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
    """Yield (name, lines) of each edition in a zip archive, sorted by name. A damaged archive is deleted, and
    raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
            names = [name for name in names if not Path(name).name.startswith(".")]
            for name in tqdm(names, desc="reading Bibles", unit="edition", leave=False, disable=None):
                yield name, _lines(name, archive.read(name))  # whole: zipfile checks the CRC-32 at the end
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # zipfile: a wrong byte
        path.unlink()
        raise UserError(
            f"{path}: was damaged ({error}) and has been deleted; run the command again"
        ) from None


def _lines(name: str, data: bytes) -> Lines:
    """Decode an edition and yield its lines. Raises UserError if it is not UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is not UTF-8 (0x{data[error.start]:02x})"
        raise UserError(f"{name}: {byte}; convert the file with iconv") from None
    for number, line in enumerate(text.split("\n"), 1):  # only \n ends a line, as in `read_lines`
        yield number, line.rstrip("\r")


def join(
    labels: Labels, editions: Iterable[tuple[str, Lines]], is_tolerant: bool
) -> tuple[dict[str, Verses], dict[str, str]]:
    """Find the labelled verses in `editions`, pairs (name, lines).

    Return language -> its verses, and name of an edition left out -> reason. If a language has several
    editions, the one with the most labelled verses is used, and the first of these in a tie (the authors'
    script uses the longest edition). A malformed line raises UserError; if `is_tolerant`, its edition is left
    out instead.
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
    """Read an edition. Return its header, with keys in lower case, and the text of its `wanted` verses.

    If `wanted` is None, all verses are returned. Verses without text are skipped; tabs in a text become
    spaces. Raises UserError for a line that does not begin with a verse id, and for an id that occurs twice.
    """
    header, verses, seen = {}, {}, set()
    for number, line in lines:
        if line.startswith("#"):  # the header, or a verse that is commented out
            key, _, value = line[1:].partition(":")
            header.setdefault(key.strip().lower(), value.strip())
        elif line.strip():
            # An id without a tab (some editors strip it) is a verse without text, as in the authors' script.
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
    """Return the language of an edition as `<ISO 639-3>_<ISO 15924>`.

    A file name that begins with both, such as `swh_Latn.txt`, decides. Otherwise the language comes from the
    header, or else from the file name, and the script from the header, or else from most letters in `texts`.
    Raises UserError if language or script cannot be found.
    """
    file = re.match("([a-z]{3})(_[A-Z][a-z]{3})?(?![A-Za-z])", Path(name).name)
    if file and file[2]:
        return file[0]
    language = re.fullmatch("[a-z]{3}", header.get("closest iso 639-3", "")) or file
    if not language:
        advice = "begin the file's name with it, as in swh_Latn.txt"
        raise UserError(f"{name}: found no language; {advice}")
    script = header.get("iso 15924", "")
    if not re.fullmatch("[A-Z][a-z]{3}", script):
        scripts: Counter[str] = Counter()
        for char, count in Counter("".join(texts)).items():
            if char.isalpha():
                scripts[SCRIPTS.get(unicodedata.name(char, "?").split()[0], "")] += count
        script = max(scripts, key=scripts.__getitem__, default="")
    if not script:
        advice = f"add it to the file's name, as in {language[0]}_Latn.txt"
        raise UserError(f"{name}: found no script; {advice}")
    return f"{language[0]}_{script}"


def write_languages(
    labels: Labels, found: dict[str, Verses], out: Path, min_verses: int
) -> tuple[list[str], dict[str, str]]:
    """Write or replace a folder for each language that `join` found. Verses keep the English rows' order.

    Return the languages written, and language left out -> reason.
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
