"""A corpus of many languages: its folder layout, and which documents are held out.

A corpus is a folder with one entry per language, named `<ISO 639-3>_<ISO 15924>`: a file `swh_Latn.txt`, or a
folder `swh_Latn/` of files, in the formats of corpus_formats.py. Published corpora load as downloaded:

    swh_Latn/train/data-00000-of-00002.arrow    Glot500-c; only shards that state.json names are read
    data/swh_Latn/train/000_00000.parquet       FineWeb-2
    swh_Latn/train.jsonl, validation.jsonl      the MaLA corpus
    v1.0/swh-Latn/swh-Latn_0.parquet            GlotCC

A file belongs to a split if its name, or its folder's name, says so. If no name does, the last documents are
held out. If a test split is missing, the validation split replaces it.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mala.cli import UserError
from mala.storage.corpus_formats import READERS, Reading, format_of, read_documents, say_once
from mala.storage.files import read_json

LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
SPLITS = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
# `train.tsv`, `swh_Latn_test.jsonl.gz`, and the shards of a hub: `validation-00000-of-00001.parquet`
SPLIT_NAME = re.compile(rf"(?:.*[_-])?({'|'.join(SPLITS)})(?:[_-]\d+)?(-of-\d+)?(-[0-9a-f]{{16}})?(\..*)?")
# Other files in a corpus folder, which hold no documents.
BESIDE = re.compile(r"[._].*|(README|LICENSE).*|.*\.(crc|lock)|(state|dataset_(info|infos|dict))\.json")
OTHER = f"not a corpus format ({' '.join(READERS)}, text formats also with .gz)"
Files = dict[Path, str | None]  # each file of a language -> its split, if it has one
progress = partial(tqdm, unit="language", leave=False, disable=None)


class Documents:
    """A range of the documents in some corpus files. Every pass reads the files anew, so they may be larger
    than memory. part: takes the number of documents, returns the range's start and end, as in a slice."""

    def __init__(self, corpus: "Corpus", files: list[Path], part: Callable[[int], tuple[int, int]]):
        self.files, self.part, self.counts, self.reading = files, part, corpus.counts, corpus.reading

    def bounds(self) -> tuple[int, int]:
        for file in self.files:
            if file not in self.counts:
                self.counts[file] = sum(1 for _ in read_documents(file, self.reading))
        return self.part(sum(self.counts[file] for file in self.files))

    def __len__(self) -> int:
        return len(range(*self.bounds()))

    def __iter__(self) -> Iterator[str]:
        texts = (read_documents(file, self.reading) for file in self.files)
        return islice(chain.from_iterable(texts), *self.bounds())


@dataclass(eq=False)
class Corpus:
    """The documents of a corpus folder, by language and split. If a language has no split except train, the
    last `held_out` share of its documents, at most `max_held_out` of them, is its test split. The rest is its
    train split. With a share of 1, all documents are the test split."""

    root: str | Path
    languages: Sequence[str] = ()  # default: all
    held_out: float = 0.2
    max_held_out: int = 1000
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        if not 0 <= self.held_out <= 1:
            raise UserError(f"held_out is {self.held_out}, expected a share from 0 to 1")
        self.root = _folder_of_languages(Path(self.root))
        files = _find_files(self.root)
        self.languages = check_languages(self.root, list(files), self.languages)
        self.files: dict[str, Files] = {language: files[language] for language in self.languages}
        self.counts: dict[Path, int] = {}  # documents of each file, counted on first use
        self._say_what_is_test()

    @classmethod
    def from_settings(cls, settings: Any, data: Path | None = None) -> "Corpus":
        """Open the corpus that a command's settings describe. data: a folder to use instead of theirs."""
        reading = Reading(settings.text_field, settings.skip_bad_lines)
        languages, most = getattr(settings, "langs", ()), getattr(settings, "max_held_out", 1000)
        return cls(data or settings.data, languages, settings.held_out, most, reading)

    def documents(self, language: str, split: str) -> Documents:
        """Return a language's documents in a split ("train", "dev" or "test"). There may be none."""
        files = self.files[language]
        splits = set(files.values())
        if None in splits and len(splits) > 1:
            odd = next(file for file, its_split in files.items() if its_split is None)
            raise UserError(f"{odd}: in no split, unlike other files; put all files in splits, or none")
        if splits <= {None, "train"}:
            return Documents(self, list(files), partial(self._part, split))
        wanted = split if split in splits or split != "test" else "dev"
        of_split = [file for file, its_split in files.items() if its_split == wanted]
        return Documents(self, of_split, lambda total: (0, total))

    def _part(self, split: str, total: int) -> tuple[int, int]:
        """Return where a split begins and ends among `total` documents, if file names do not tell."""
        held_out = total if self.held_out == 1 else min(int(total * self.held_out), self.max_held_out)
        return {"train": (0, total - held_out), "dev": (0, 0), "test": (total - held_out, total)}[split]

    def _say_what_is_test(self) -> None:
        lacking = defaultdict(list)
        for language, files in self.files.items():
            is_train = "dev" not in files.values()
            if not {"test", None} & set(files.values()) and (self.held_out or not is_train):
                instead = f"the last {self.held_out:.0%} of train" if is_train else "the validation split"
                lacking[instead].append(language)
        for instead, languages in lacking.items():
            say_once(f"{self.root}: no test split in {some(languages)}; using {instead} instead")

    def stream(self, split: str) -> dict[str, Documents]:
        """Return language -> documents, for each language that has some. Raises UserError if none has."""
        parts = {language: self.documents(language, split) for language in self.languages}
        found = {name: part for name, part in progress(parts.items(), f"counting {split}") if len(part)}
        if not found:
            empty = f"no language has a document for its {split} split (held_out is {self.held_out})"
            raise UserError(f"{self.root}: {empty}; in a .txt each line is a document: add more of them")
        return found

    def load(self, split: str) -> dict[str, list[str]]:
        """Read `stream` into memory."""
        return {name: list(part) for name, part in progress(self.stream(split).items(), f"reading {split}")}


def script_of(language: str) -> str:
    """Return a language's script: `swh_Latn` -> `Latn`."""
    return language.partition("_")[2]


def check_languages(root: Path, found: list[str], chosen: Sequence[str]) -> list[str]:
    """Return the `chosen` languages, sorted; all `found`, if none. Raises UserError if one was not found."""
    for language in chosen:
        if language not in found:
            raise UserError(f"{root}: there is no language {language!r}; it holds {some(found)}")
    return sorted(set(chosen)) if chosen else found


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def language_shares(sizes: Sequence[float], alpha: float, weights: Sequence[float] | float = 1) -> np.ndarray:
    """Return each language's probability, proportional to weight · n^alpha: (languages,) float64. The size n
    counts documents, as in MaLA-500, or bytes or tokens, which depend less on line breaks. alpha 1 draws
    languages in proportion to size, alpha 0 all equally often; MaLA-500's 0.3 favours small ones."""
    shares = np.array(sizes, dtype=np.float64) ** alpha * np.array(weights, dtype=np.float64)
    return shares / shares.sum()


def _folder_of_languages(root: Path) -> Path:
    """Return the folder of languages: `root` or a folder in it, such as FineWeb-2's data/, GlotCC's v1.0/."""
    if not root.is_dir():
        found = "a file" if root.exists() else "there is no such folder"
        raise UserError(f"{root}: {found}; expected the folder of a corpus, which has one entry per language")
    if any(map(_language_of, _visible(root))):
        return root
    if (language := _language_of(root.resolve())) and _files_of(root, None, defaultdict(list)):
        raise UserError(f"{root}: one language's folder; give the folder above it, with --langs {language}")
    inner = [one for one in _visible(root) if one.is_dir() and any(map(_language_of, _visible(one)))]
    if len(inner) > 1:
        names = some([folder.name for folder in inner])
        raise UserError(f"{root}: the folders {names} hold languages, expected only one; give one of them")
    return inner[0] if inner else root


def _find_files(root: Path) -> dict[str, Files]:
    """Return language -> its files, both sorted by name. Other entries are skipped and named on stderr."""
    found, skipped = {}, defaultdict(list)  # skipped: reason -> entries
    for entry in _visible(root):
        language = _language_of(entry)
        if not language:
            skipped["not named for a language, such as swh_Latn"].append(entry)
        elif files := _files_of(entry, None, skipped):
            if language in found:
                raise UserError(f"{root}: {language} has two entries, one is {entry.name}; remove one")
            found[language] = files
    names = {why: [str(entry.relative_to(root)) for entry in entries] for why, entries in skipped.items()}
    said = [f"skipped {some(of_reason)}: {why}" for why, of_reason in names.items()]
    if not found:
        expected = "expected entries such as swh_Latn.txt or swh_Latn/"
        raise UserError("; ".join([f"{root}: not a corpus", *said, expected]))
    for line in said:
        say_once(f"{root}: {line}")
    return found


def _files_of(entry: Path, split: str | None, skipped: dict[str, list[Path]]) -> Files:
    """Return the corpus files of a language's entry, or of a folder in it that is named for a split."""
    if not entry.is_dir():
        if format_of(entry) in READERS:
            return {entry: split or _split_of(entry.name)}
        skipped[OTHER].append(entry)
        return {}
    if shards := _named_shards(entry):
        return {entry / name: split or _split_of(name) for name in shards}
    files, inside = {}, _visible(entry)
    if not inside:
        skipped["a folder without a corpus file"].append(entry)
    for one in inside:
        of_folder = _split_of(one.name) if one.is_dir() else None
        if one.is_dir() and (split or not of_folder):
            skipped["only files in <language>/ and <language>/<split>/ are read"].append(one)
        else:
            files |= _files_of(one, split or of_folder, skipped)
    return files


def _named_shards(folder: Path) -> list[str]:
    """Return the names of the valid Arrow files that `datasets` left in a folder; others are stale.
    `save_to_disk` lists them in state.json. In a cache of `datasets`, they follow from dataset_info.json."""
    state, info = folder / "state.json", folder / "dataset_info.json"
    source = state if state.exists() else info
    content = read_json(source) if source.exists() else {}
    try:
        names = [shard["filename"] for shard in content.get("_data_files") or ()]
        for split, about in (content.get("splits") or {}).items():
            stem, count = f"{about.get('dataset_name')}-{split}", len(about.get("shard_lengths") or ())
            names += [f"{stem}-{i:05}-of-{count:05}.arrow" for i in range(count)] or [f"{stem}.arrow"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{source}: does not name shards as `datasets` does; download it again") from None
    missing = [name for name in names if not (folder / name).exists()]
    if source == info and missing == names:
        return []  # folders of other formats may hold this file too
    if missing:
        named = f"there is no such file, but {source.name} names it"
        raise UserError(f"{folder / missing[0]}: {named}; download it again")
    return names


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not BESIDE.fullmatch(entry.name))


def _language_of(entry: Path) -> str | None:
    """Return an entry's language, or None: `swh_Latn.txt`, `swh-Latn/` -> `swh_Latn`."""
    name = entry.name.split(".")[0].replace("-", "_")
    return name if LANGUAGE.fullmatch(name) else None


def _split_of(name: str) -> str | None:
    found = SPLIT_NAME.fullmatch(name)
    return SPLITS[found[1]] if found else None
