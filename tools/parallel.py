"""Read the documents of `evaluate.py --bench nll`, and the number of bytes that normalises parallel texts.

Two collections of parallel texts are read as downloaded. Everything else is read as a corpus:

    flores200_dataset/dev/swh_Latn.dev, devtest/swh_Latn.devtest    FLORES-200: a sentence per line, parallel
    swh-x-bible-….txt, swh_….ebible.txt                             the Parallel Bible Corpus: verses with ids

If a language has several Bible editions, the one with the most verses is used, or the first of these by name.
Only the verses that all measured languages have are used.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.corpus import LANGUAGE, Corpus, some
from mala.storage.corpus_formats import BadLines, read_lines, say_once
from tools.bible import language_of, read_edition

ENGLISH = "eng_Latn"  # the two collections are normalised by its bytes by default
FLORES = {"dev": "dev", "test": "devtest"}  # our splits -> theirs
HEAD = 400  # lines that are read to find an edition's language and script
Choose = Callable[[list[str]], list[str]]  # narrows the languages found to those to measure
Documents = dict[str, list[str]]  # language -> documents
Found = tuple[Documents, list[str], str | None]  # and languages to measure, and whose bytes count


def read_documents(settings: Any, data: Path, choose: Choose) -> tuple[Documents, dict[str, Any]]:
    """Read the documents to measure. For parallel texts also return fields of results.json: `parallel_to`,
    the language whose bytes count, and `parallel_bytes`, the UTF-8 bytes of its documents. Raises UserError
    if that language is missing, or if languages have different numbers of documents."""
    found = read_flores(settings, data, choose) or read_bibles(settings, data, choose)
    documents, measured, to = found or read_corpus(settings, data, choose)
    documents = {language: texts[: settings.limit] for language, texts in documents.items()}
    of_texts = {"parallel_to": to, "parallel_bytes": count_bytes(data, documents, to)} if to else {}
    documents = {language: texts for language, texts in documents.items() if language in measured}
    return documents, of_texts


def read_corpus(settings: Any, data: Path, choose: Choose) -> Found:
    corpus = Corpus.from_settings(settings, data)
    corpus.languages = choose(corpus.languages)
    documents = corpus.stream(settings.split)
    if empty := ", ".join(sorted(set(settings.langs) - documents.keys())):
        raise UserError(f"{data}: {empty} has no document in its {settings.split} split; leave it out")
    if (to := settings.parallel_to) and to not in documents:
        other = Corpus(data, [to], settings.held_out, settings.max_held_out, corpus.reading)
        documents |= other.stream(settings.split)
    documents = {name: list(islice(texts, settings.limit)) for name, texts in documents.items()}
    return documents, corpus.languages, to


def read_flores(settings: Any, data: Path, choose: Choose) -> Found | None:
    """Read FLORES-200. Return None if `data` does not hold it."""
    for folder in (data, data / "flores200_dataset"):
        if not any(folder.glob("dev*/*_*.dev*")):
            continue
        check_settings(settings, "FLORES-200", FLORES)
        split = folder / FLORES[settings.split]
        files = {file.stem: file for file in sorted(split.glob("*")) if LANGUAGE.fullmatch(file.stem)}
        chosen = choose(list(files))
        languages, to = with_one_more(settings, folder, chosen, list(files))
        return {name: [line for _, line in read_lines(files[name])] for name in languages}, chosen, to
    return None


def read_bibles(settings: Any, data: Path, choose: Choose) -> Found | None:
    """Read the Parallel Bible Corpus. Return None if `data` holds no edition of it."""
    files, editions, found = sorted(data.glob("*.txt")), defaultdict(list), {}
    if not files or not is_edition(files[0]):
        return None
    check_settings(settings, "a Bible edition", ["test"])
    for file in files:
        try:
            header, verses = read_edition(str(file), islice(read_lines(file), HEAD))
            editions[language_of(file.name, header, verses.values())].append(file)
        except UserError as error:
            say_once(f"skipped an edition: {error}")
    chosen = choose(sorted(editions))
    languages, to = with_one_more(settings, data, chosen, sorted(editions))
    for language in languages:
        read = (read_edition(str(file), read_lines(file))[1] for file in editions[language])
        found[language] = max(read, key=len)
    shared = sorted(set.intersection(*map(set, found.values())))
    if not shared:
        fewest = min(languages, key=lambda language: len(found[language]))
        few = f"no verse is in all of {some(languages)}; {fewest} has the fewest, {len(found[fewest]):,}"
        raise UserError(f"{data}: {few}; leave languages out with --langs")
    return {language: [verses[id] for id in shared] for language, verses in found.items()}, chosen, to


def is_edition(file: Path) -> bool:
    """Return whether the first line that is not a comment begins with a verse id."""
    lines = (line for _, line in islice(read_lines(file, BadLines(file, skip=True)), HEAD))
    line = next((line for line in lines if not line.startswith("#")), "")
    return re.match("[0-9]{8}\t", line) is not None


def check_settings(settings: Any, what: str, splits: Any) -> None:
    for name in ("held_out", "max_held_out", "text_field", "skip_bad_lines"):
        if getattr(settings, name) != getattr(type(settings), name):  # its default
            raise UserError(f"--{name.replace('_', '-')} has no effect on {what}; leave it out")
    if settings.split not in splits:
        raise UserError(f"{what} has no split {settings.split}, expected --split {' or '.join(splits)}")


def with_one_more(
    settings: Any, data: Path, chosen: list[str], found: list[str]
) -> tuple[list[str], str | None]:
    """Return the chosen languages plus the one whose bytes count, and that one. Raises UserError if this or
    a language of --langs is missing."""
    to = settings.parallel_to or (ENGLISH if ENGLISH in found else None)
    for language in filter(None, (to, *settings.langs)):
        if language not in found:
            raise UserError(f"{data}: there is no language {language!r}; it holds {some(found)}")
    return sorted({*chosen, to} - {None}), to


def count_bytes(data: Path, documents: Documents, to: str) -> int:
    """Count the UTF-8 bytes of `to`'s documents. Raises UserError if a language has more or fewer of them."""
    expected = len(documents[to])
    for language, texts in documents.items():
        if len(texts) != expected:
            found = f"{data}: {language} has {len(texts):,} documents, and {to} {expected:,}"
            raise UserError(f"{found}; --parallel-to needs parallel texts: leave it or {language} out")
    return sum(len(text.encode()) for text in documents[to])
