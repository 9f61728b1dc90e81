"""The documents of `evaluate.py --bench nll`, and those bytes by which parallel texts are normalised.

Two collections of parallel texts are read as they are downloaded, all others are a corpus:

    flores200_dataset/dev/swh_Latn.dev, devtest/swh_Latn.devtest    FLORES-200: a sentence a line, the same
    swh-x-bible-….txt, swh_….ebible.txt                             the Parallel Bible Corpus: verses with ids

Of several Bible editions in a language that with most verses counts, of several such the first by name; and
of all verses those that every measured language has.
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

ENGLISH = "eng_Latn"  # its bytes count for the two collections, if it is there and no other is asked for
FLORES = {"dev": "dev", "test": "devtest"}  # our splits -> theirs
HEAD = 400  # lines of an edition that tell its language and script
Choose = Callable[[list[str]], list[str]]  # of the languages that are there those to measure
Documents = dict[str, list[str]]  # of each language
Found = tuple[Documents, list[str], str | None]  # and which to measure, and whose bytes count


def read_documents(settings: Any, data: Path, choose: Choose) -> tuple[Documents, dict[str, Any]]:
    """The documents to measure, and, if they are parallel, what results.json says of it: `parallel_to`, a
    language, and `parallel_bytes`, the UTF-8 bytes of its documents. Raises UserError if there is no such
    language, or texts are not parallel: of other numbers."""
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
    """None if this is no FLORES-200."""
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
    """None if here are no editions of the Parallel Bible Corpus."""
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
    """Does the first line that is no comment begin with a verse id?"""
    lines = (line for _, line in islice(read_lines(file, BadLines(file, skip=True)), HEAD))
    line = next((line for line in lines if not line.startswith("#")), "")
    return re.match("[0-9]{8}\t", line) is not None


def check_settings(settings: Any, what: str, splits: Any) -> None:
    for name in ("held_out", "max_held_out", "text_field", "skip_bad_lines"):
        if getattr(settings, name) != getattr(type(settings), name):  # its default
            raise UserError(f"--{name.replace('_', '-')} changes nothing in {what}; leave it out")
    if settings.split not in splits:
        raise UserError(f"{what} has the splits {', '.join(splits)}, expected --split {settings.split}")


def with_one_more(
    settings: Any, data: Path, chosen: list[str], found: list[str]
) -> tuple[list[str], str | None]:
    """The chosen languages with that whose bytes count, and that. Raises UserError if it is not there, or one
    that --langs names."""
    to = settings.parallel_to or (ENGLISH if ENGLISH in found else None)
    for language in filter(None, (to, *settings.langs)):
        if language not in found:
            raise UserError(f"{data}: there is no language {language!r}; it holds {some(found)}")
    return sorted({*chosen, to} - {None}), to


def count_bytes(data: Path, documents: Documents, to: str) -> int:
    """UTF-8 bytes of the documents of the language `to`. Raises UserError if others have more or fewer."""
    expected = len(documents[to])
    for language, texts in documents.items():
        if len(texts) != expected:
            found = f"{data}: {language} has {len(texts):,} documents, and {to} {expected:,}"
            raise UserError(f"{found}; --parallel-to takes parallel texts: leave it out, or {language}")
    return sum(len(text.encode()) for text in documents[to])
