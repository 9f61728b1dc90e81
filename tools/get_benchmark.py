"""Download the benchmarks that evaluate.py measures.

    python -m tools.get_benchmark NAME [--langs a,b,…]                        download a benchmark
    python -m tools.get_benchmark build-taxi1500 --labels DIR --verses FILE…  build Taxi1500 from your Bibles

NAME is sib200, taxi1500, belebele, xcopa, xstorycloze, masakhanews or afrisenti. For `--bench nll` it is
flores200 or pbc. The files are written to data/NAME, where evaluate.py looks for a benchmark, or to --out.
"""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

from mala.benchmarks.tasks import Taxi1500
from mala.cli import REQUIRED, UserError, option, parse_command, run
from mala.storage.corpus import LANGUAGE, check_languages
from mala.storage.corpus_formats import read_lines
from mala.storage.files import atomic_file
from tools.bible import (
    MIN_VERSES,
    SPLITS,
    Labels,
    Verses,
    join,
    language_of,
    read_archive,
    read_edition,
    write_languages,
)
from tools.fetch import File, download_all, list_files
from tools.more_tasks import ALL_TASKS

HUB, GITHUB = "https://huggingface.co", "https://api.github.com"
BIBLES = "https://cis.lmu.de/~yehao/data/Taxi1500-c_v3.0.zip"  # 786 MB, 1,384 editions
FLORES = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"
# Size in bytes, and the SHA-256 that several public projects give.
FLORES_FILE = (25_585_843, "b8b0b76783024b85797e5cc75064eb83fc5288b41e9654dabc7be6ae944011f6")
# Benchmark -> (dataset on the hub, folder in it). XCOPA is a repository on GitHub instead.
SOURCES = {
    "belebele": ("facebook/belebele", "data/"),
    "xcopa": ("cambridgeltl/xcopa", "data/"),
    "xstorycloze": ("juletxara/xstory_cloze", ""),
    "masakhanews": ("masakhane/masakhanews", "data/"),
    "afrisenti": ("masakhane/afrisenti", "data/"),
}
Outcome = tuple[list[str], dict[str, str]]  # languages written; language or file left out -> reason


@dataclass
class BuildTaxi1500Settings:
    """Build Taxi1500 for the languages of your own Bible editions."""

    labels: Path = option(REQUIRED, "folder with the English labels, eng_{train,dev,test}.tsv")
    verses: tuple[str, ...] = option(
        REQUIRED, "Bible editions named after their language; lines are `id, tab, verse` (tools/bible.py)"
    )
    out: Path = option(Path("data/taxi1500"), "folder to write to")
    min_verses: int = option(MIN_VERSES, "leave out a language with fewer labelled verses")

    bench = "taxi1500"

    def run(self) -> Outcome:
        return build_taxi1500(self.labels, map(Path, self.verses), self.out, self.min_verses)


# Name -> the end of its help, "Download …".
DOWNLOADS = {
    "sib200": "SIB-200.",
    "taxi1500": "Taxi1500: its English labels and the free Bible editions, 786 MB.",
    **{name: f"{ALL_TASKS[name].__name__}." for name in SOURCES},
    "flores200": "FLORES-200, 26 MB.",
    "pbc": "the free editions of the Parallel Bible Corpus, 786 MB.",
}


def settings_of(name: str) -> type:
    """Return the settings class of the command that downloads `name`, one of DOWNLOADS."""
    fields = [
        ("langs", tuple[str, ...], option((), "get only these languages, such as swh_Latn")),
        ("out", Path, option(Path("data") / name, "folder to write to")),
    ]
    bench = name if name in ALL_TASKS else "nll"
    inside = {"bench": bench, "run": lambda self: download(name, self.out, self.langs)}
    return make_dataclass(
        f"{name}_settings", fields, namespace={**inside, "__doc__": f"Download {DOWNLOADS[name]}"}
    )


COMMANDS = {name: settings_of(name) for name in DOWNLOADS} | {"build-taxi1500": BuildTaxi1500Settings}


def download(name: str, out: Path, languages: Collection[str]) -> Outcome:
    """Download one of DOWNLOADS: all of it, or only `languages`."""
    if name in SOURCES:
        return download_published(name, out, languages)
    own = {"sib200": download_sib200, "taxi1500": download_taxi1500, "flores200": download_flores}
    return (own | {"pbc": download_pbc})[name](out, languages)


def download_sib200(out: Path, languages: Collection[str] = (), hub: str = HUB) -> Outcome:
    """Download SIB-200 as published (the dataset Davlan/sib200): all of it, or only `languages`.

    Raises UserError for a language that the dataset lacks.
    """
    found: dict[str, dict[Path, File]] = {}
    for path, file in list_files(f"{hub}/api/datasets/Davlan/sib200/tree/main/data?recursive=true").items():
        if match := re.fullmatch(rf"data/({LANGUAGE.pattern})/({'|'.join(SPLITS)})\.tsv", path):
            url = f"{hub}/datasets/Davlan/sib200/resolve/main/{path}"
            found.setdefault(match[1], {})[out / match[1] / f"{match[2]}.tsv"] = replace(file, url=url)
    chosen = check_languages(Path("Davlan/sib200"), sorted(found), tuple(languages))
    complete = [language for language in chosen if len(found[language]) == len(SPLITS)]
    download_all({path: file for language in complete for path, file in found[language].items()})
    missing = [language for language in chosen if language not in complete]
    return complete, dict.fromkeys(missing, "not all of its splits are published")


def download_published(
    name: str, out: Path, languages: Collection[str] = (), hub: str = HUB, github: str = GITHUB
) -> Outcome:
    """Download one of SOURCES as published: all of it, or only `languages`.

    Every published split is downloaded; a language without a test split is reported as left out. Raises
    UserError for a language that the benchmark lacks.
    """
    task, (owner, folder) = ALL_TASKS[name], SOURCES[name]
    chosen = check_languages(Path(owner), sorted(task.names), tuple(languages)) if task.names else []
    if name == "xcopa":
        listings = [f"{github}/repos/{owner}/contents/{folder}{task.names[language]}" for language in chosen]
    else:
        listings = [f"{hub}/api/datasets/{owner}/tree/main/{folder.strip('/')}?recursive=true"]
    listed = {path: file for listing in listings for path, file in list_files(listing).items()}
    if not task.names:
        stems = (Path(path).name.split(".")[0] for path in listed)
        chosen = check_languages(Path(owner), sorted(filter(LANGUAGE.fullmatch, stems)), tuple(languages))
    files, written = {}, []
    for language in chosen:
        for split in task.splits.values():
            path = task.file.format(language=task.names.get(language, language), split=split)
            if file := listed.get(folder + path):
                url = file.url or f"{hub}/datasets/{owner}/resolve/main/{folder}{path}"
                files[out / path] = replace(file, url=url)
                written += [language] if split == task.splits["test"] else []
    download_all(files)
    missing = [language for language in chosen if language not in written]
    return written, dict.fromkeys(missing, "its test split is not published")


def download_flores(out: Path, languages: Collection[str] = (), url: str = FLORES) -> Outcome:
    """Download FLORES-200 and unpack its sentences. languages: as in `download_sib200`."""
    archive = out / f".{url.rsplit('/', 1)[-1]}"
    size, checksum = FLORES_FILE
    download_all({archive: File(url, size, checksum)})
    written = set()
    with tarfile.open(archive) as packed:
        names = {}  # language -> its files in the archive
        for name in packed.getnames():
            if match := re.search(rf"flores200_dataset/(dev|devtest)/({LANGUAGE.pattern})\.\1$", name):
                names.setdefault(match[2], []).append(name)
        for language in check_languages(archive, sorted(names), tuple(languages)):
            for name in names[language]:
                path = out / name[name.index("flores200_dataset/") :]
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path, "wb") as file:
                    file.write(packed.extractfile(name).read())
            written.add(language)
    archive.unlink()
    return sorted(written), {}


def download_pbc(out: Path, languages: Collection[str] = (), corpus: str = BIBLES) -> Outcome:
    """Download the free editions of the Parallel Bible Corpus, which Taxi1500 publishes as its corpus.

    The other editions are not public: ask the corpus's authors (Mayer & Cysouw 2014) for them. languages: as
    in `download_sib200`.
    """
    archive = out / f".{corpus.rsplit('/', 1)[-1]}"
    download_all({archive: File(corpus)})
    editions, left_out = {}, {}
    for name, lines in read_archive(archive):
        numbered = list(lines)
        try:
            header, verses = read_edition(name, iter(numbered))
            language = language_of(name, header, verses.values())
        except UserError as error:
            left_out[Path(name).name] = str(error)
            continue
        editions.setdefault(language, []).append(Path(name).name)
        if not languages or language in languages:
            with atomic_file(out / Path(name).name) as file:
                file.writelines(f"{line}\n" for _, line in numbered)
    written = check_languages(archive, sorted(editions), tuple(languages))
    archive.unlink()
    return written, {} if languages else left_out


def download_taxi1500(
    out: Path, languages: Collection[str] = (), github: str = GITHUB, corpus: str = BIBLES
) -> Outcome:
    """Download Taxi1500's English labels and the free Bible editions, and join them by verse id.

    An edition with a malformed line is left out. The archive of editions has no published checksum, but each
    file in it has one, which is checked when the file is read. The archive is deleted after a successful
    build or if it is damaged; otherwise it is kept for the next try. languages: as in `download_sib200`.
    """
    labels, english = fetch_labels(github)
    archive = out / f".{corpus.rsplit('/', 1)[-1]}"
    found, left_out = {}, {}
    takes_editions = set(languages) != {"eng_Latn"}
    if takes_editions:
        download_all({archive: File(corpus)})
        found, left_out = join(labels, read_archive(archive), is_tolerant=True)
    found["eng_Latn"] = english
    chosen = check_languages(archive, sorted(found), tuple(languages))
    if languages:  # do not report files of other languages
        codes = tuple(language[:3] for language in chosen)
        left_out = {name: why for name, why in left_out.items() if name.startswith(codes)}
    found = {language: found[language] for language in chosen}
    written, too_small = write_languages(labels, found, out, MIN_VERSES)
    if written and takes_editions:
        archive.unlink()
        print(f"{archive}: deleted after use; further languages will need another download")
    return written, left_out | too_small


def fetch_labels(github: str) -> tuple[Labels, Verses]:
    """Download the published labels and read them. Raises UserError if one of their files is gone."""
    listing = f"{github}/repos/cisnlp/Taxi1500/contents/eng_data"
    files = list_files(listing)
    names = [f"eng_{split}.tsv" for split in SPLITS]
    if missing := [name for name in names if f"eng_data/{name}" not in files]:
        raise UserError(
            f"{listing}: found no {missing[0]}; look in a browser where Taxi1500's labels are now"
        )
    with tempfile.TemporaryDirectory() as folder:
        download_all({Path(folder, name): files[f"eng_data/{name}"] for name in names})
        return read_labels(Path(folder))


def build_taxi1500(labels: Path, verses: Iterable[Path], out: Path, min_verses: int = MIN_VERSES) -> Outcome:
    """Build Taxi1500 for the languages of `verses`, files with Bible editions.

    - labels: a folder in the layout that `read_labels` describes.
    - verses: files in the format that tools/bible.py describes.
    - min_verses: a language with fewer labelled verses is left out.

    Raises UserError for a malformed line, and if an English edition would overwrite the labels.
    """
    rows, _ = read_labels(labels)
    editions = [(str(file), read_lines(file)) for file in sorted(verses, key=lambda file: file.name)]
    found, left_out = join(rows, editions, is_tolerant=False)
    english = out / "eng_Latn"
    if "eng_Latn" in found and english.resolve() in (labels.resolve(), (labels / "eng_Latn").resolve()):
        raise UserError(
            f"{english}: holds the labels, and an English edition would replace it; name another --out"
        )
    written, too_small = write_languages(rows, found, out, min_verses)
    return written, left_out | too_small


def read_labels(labels: Path) -> tuple[Labels, Verses]:
    """Read the English rows: their ids and labels in the published order, and their verses.

    The files are named `eng_train.tsv`, as published, or `eng_Latn_train.tsv`. They are in the folder or in
    its subfolder `eng_Latn/`. Raises UserError if they are missing or malformed.
    """
    task = Taxi1500(labels)
    for stem in ("eng", "eng_Latn", "eng_Latn/eng", "eng_Latn/eng_Latn"):
        task.file = stem + "_{split}.tsv"
        if task.path("eng_Latn", "train").is_file():
            rows = {split: task.rows("eng_Latn", split) for split in SPLITS}
            ids = {split: [(row.id, row.label) for row in rows[split]] for split in SPLITS}
            return ids, {row.id: row.text for split in SPLITS for row in rows[split]}
    raise UserError(
        f"{labels}: has no English labels, expected eng_{{train,dev,test}}.tsv or eng_Latn_{{train,dev,test}}"
        ".tsv; download them with `python -m tools.get_benchmark taxi1500 --langs eng_Latn`"
    )


def main() -> None:
    settings = parse_command("python -m tools.get_benchmark", COMMANDS)
    written, left_out = settings.run()
    for name, why in sorted(left_out.items()):
        print(f"left out {name}: {why}")
    out = settings.out
    if not written:
        raise UserError(f"{out}: no language could be written; choose other languages or files")
    print(f"{out}: wrote {len(written):,} languages: {', '.join(written)}")
    data = "" if out == type(settings).out and settings.bench != "nll" else f" --data {out}"
    print(f"evaluate: python evaluate.py --bench {settings.bench}{data}")


if __name__ == "__main__":
    run(main)
