"""SIB-200 and Taxi1500: how their files lie, what is asked, and which examples are shown first.

    python -m mala.tasks download sib200|taxi1500 [--langs a,b,…]             the published files, to data/<benchmark>
    python -m mala.tasks build-taxi1500 --labels DIR --verses FILE…           Taxi1500 for languages of your own

Another benchmark is another small class in TASKS. The protocol is MaLA-500's published one (docs/evaluation.md).
"""

from __future__ import annotations

import re
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mala.bible import MIN_VERSES, SPLITS, Labels, Verses, join, read_archive, write_languages
from mala.cli import ArgumentParser, UserError, run, words
from mala.corpus import LANGUAGE, check_languages, read_lines, read_tsv
from mala.fetch import File, download_all, list_files


@dataclass(frozen=True)
class Row:
    id: str
    label: str
    text: str


@dataclass(frozen=True)
class Example:
    """A row to be labelled: `context` is what the model reads, `shots` are row numbers in the train split, from 0."""

    id: str
    context: str
    label: str
    shots: list[int]


class Task:
    """A benchmark in which a text has one of a few labels. A subclass says what is particular to it."""

    file: str  # of a language and a split, below the benchmark's folder
    header: list[str] | None = None  # the first line of a file, where it has one
    labels: list[str]  # in the published order: of labels with equal scores the first is taken
    prompt: str  # before the label

    def __init__(self, root: Path):
        self.root = root
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder; expected {root / self.path('swh_Latn', 'test')} and its like")

    def path(self, language: str, split: str) -> Path:
        return Path(self.file.format(language=language, split=split))

    def languages(self, chosen: tuple[str, ...] = ()) -> list[str]:
        """The languages that have a folder, in order, or those of them that are `chosen`."""
        found = sorted(entry.name for entry in self.root.iterdir() if LANGUAGE.fullmatch(entry.name) and entry.is_dir())
        if not found:
            raise UserError(f"{self.root}: no language here; expected {self.root / self.path('swh_Latn', 'test')} and its like")
        return check_languages(self.root, found, chosen)

    def rows(self, language: str, split: str) -> list[Row]:
        """The rows of a split, texts as they stand. Raises UserError for a missing or empty file and for a wrong line."""
        file = self.root / self.path(language, split)
        if not file.is_file():
            raise UserError(f"{file}: there is no such file; the {split} split of {language} is expected there")
        lines = read_tsv(file)
        if self.header:
            number, cells = next(lines, (1, None))
            if cells != self.header:
                found = "an empty file" if cells is None else " ".join(cells)[:80]
                raise UserError(f"{file}: line {number} is {found!r}, expected the header {' '.join(self.header)!r}")
        rows, ids = [], {}
        for number, (id, label, text) in lines:
            if ids.setdefault(id, number) != number:
                raise UserError(f"{file}: line {number} has the id {id!r} of line {ids[id]}; every row needs its own")
            if label not in self.labels:
                raise UserError(f"{file}: line {number} has the label {label!r}, expected one of {', '.join(self.labels)}")
            rows.append(Row(id, label, text))
        if not rows:
            raise UserError(f"{file}: the {split} split of {language} has no rows; mend the file, or leave {language} out")
        return rows

    def examples(self, language: str, split: str = "test", shots: int = 3, seed: int = 1234) -> list[Example]:
        """The examples of a language in the published order."""
        train = self.rows(language, "train") if shots else []
        rows = self.rows(language, split)
        if len(train) < shots:
            file = self.root / self.path(language, "train")
            raise UserError(f"{file}: {len(train)} rows, too few for {shots} shots; lower --shots, or leave {language} out")
        examples = []
        rng = np.random.default_rng(seed)
        for index in rng.permutation(len(rows)):
            row = rows[index]
            chosen = draw_shots(rng, train, row, shots)
            shown = [f"{self.prompt.format(text=train[i].text)} {train[i].label}" for i in chosen]
            examples.append(Example(row.id, "\n".join([*shown, self.prompt.format(text=row.text)]), row.label, chosen))
        return examples


class SIB200(Task):
    """Topics of sentences in 205 languages (arXiv 2309.07445): 701 / 99 / 204 rows a language."""

    file = "{language}/{split}.tsv"
    header = ["index_id", "category", "text"]
    labels = ["science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"]
    prompt = 'The topic of the news "{text}" is'


class Taxi1500(Task):
    """Topics of Bible verses in more than 1,500 languages (arXiv 2305.08487): 860 / 106 / 111 rows a language, or fewer."""

    file = "{language}/{language}_{split}.tsv"
    labels = ["Recommendation", "Faith", "Description", "Sin", "Grace", "Violence"]
    prompt = 'The topic of the verse "{text}" is'


TASKS: dict[str, type[Task]] = {"sib200": SIB200, "taxi1500": Taxi1500}


def draw_shots(rng: np.random.Generator, train: list[Row], row: Row, shots: int) -> list[int]:
    """The train rows that are shown before `row`: the first `shots` of successive draws that are not the row itself.

    Trap: the published loop sees that it has enough only when it is handed one index more, so that it has mostly begun another
    draw by then. That draw moves `rng` on, and with it the shots of all later rows.
    """
    if shots and all(other == row for other in train):
        raise UserError(f"row {row.id}: every train row is this very row, so that there is none to show before it")
    chosen: list[int] = []
    for index in _successive_draws(rng, len(train), shots):
        if len(chosen) == shots:
            break
        if train[index] != row:
            chosen.append(index)
    return chosen


def _successive_draws(rng: np.random.Generator, rows: int, size: int) -> Iterator[int]:
    while size:
        yield from rng.choice(rows, size=size, replace=False, shuffle=True).tolist()


HUB, GITHUB = "https://huggingface.co", "https://api.github.com"
BIBLES = "https://cis.lmu.de/~yehao/data/Taxi1500-c_v3.0.zip"  # 786 MB, 1,384 editions
Outcome = tuple[list[str], dict[str, str]]  # the languages written; a language or a file that was left out -> why


def download_sib200(out: Path, languages: Collection[str] = (), hub: str = HUB) -> Outcome:
    """SIB-200 as published, the dataset Davlan/sib200; of `languages` only, where they are given. Raises UserError for one that
    the dataset lacks."""
    found: dict[str, dict[Path, File]] = {}
    for path, file in list_files(f"{hub}/api/datasets/Davlan/sib200/tree/main/data?recursive=true").items():
        if match := re.fullmatch(rf"data/({LANGUAGE.pattern})/({'|'.join(SPLITS)})\.tsv", path):
            url = f"{hub}/datasets/Davlan/sib200/resolve/main/{path}"
            found.setdefault(match[1], {})[out / match[1] / f"{match[2]}.tsv"] = replace(file, url=url)
    chosen = check_languages(Path("Davlan/sib200"), sorted(found), tuple(languages))
    whole = [language for language in chosen if len(found[language]) == len(SPLITS)]
    download_all({path: file for language in whole for path, file in found[language].items()})
    return whole, {language: "not all of its splits are published" for language in chosen if language not in whole}


def download_taxi1500(out: Path, languages: Collection[str] = (), github: str = GITHUB, corpus: str = BIBLES) -> Outcome:
    """Taxi1500: the English labels and verses as published, and the free Bible editions, joined to the labels by verse id.

    An edition with a wrong line is left out. The archive of editions has no published checksum, but its members have: each that
    is read is checked. It stays while the build fails, and is deleted afterwards. languages: as in `download_sib200`.
    """
    listing = f"{github}/repos/cisnlp/Taxi1500/contents/eng_data"
    files = list_files(listing)
    names = [f"eng_{split}.tsv" for split in SPLITS]
    if missing := [name for name in names if f"eng_data/{name}" not in files]:
        raise UserError(f"{listing}: there is no {missing[0]}; see in a browser where the labels of Taxi1500 are now")
    with tempfile.TemporaryDirectory() as folder:
        download_all({Path(folder, name): files[f"eng_data/{name}"] for name in names})
        labels, english = read_labels(Path(folder))

    archive = out / f".{corpus.rsplit('/', 1)[-1]}"
    found, left_out = {}, {}
    takes_editions = set(languages) != {"eng_Latn"}
    if takes_editions:
        download_all({archive: File(corpus)})
        try:
            found, left_out = join(labels, read_archive(archive), is_tolerant=True)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # whatever zipfile raises for a wrong byte
            archive.unlink()
            raise UserError(f"{archive}: damaged ({error}) and deleted; give the command again to fetch it anew") from None
    found["eng_Latn"] = english
    chosen = check_languages(archive, sorted(found), tuple(languages))
    codes = tuple(language[:3] for language in chosen)
    left_out = {name: why for name, why in left_out.items() if not languages or name.startswith(codes)}
    written, too_small = write_languages(labels, {language: found[language] for language in chosen}, out, MIN_VERSES)
    if written and takes_editions:
        archive.unlink()
        print(f"{archive}: deleted, as all of it is read; for further languages it is downloaded again")
    return written, left_out | too_small


def build_taxi1500(labels: Path, verses: Iterable[Path], out: Path, min_verses: int = MIN_VERSES) -> Outcome:
    """Taxi1500 for the languages of Bible editions: `verses`, files that `mala.bible.read_edition` and `language_of` describe.

    labels: a folder that `read_labels` describes. A language with fewer than `min_verses` labelled verses is left out. Raises
    UserError for a wrong line.
    """
    rows, _ = read_labels(labels)
    editions = [(str(file), read_lines(file)) for file in sorted(verses, key=lambda file: file.name)]
    found, left_out = join(rows, editions, is_tolerant=False)
    if "eng_Latn" in found and (out / "eng_Latn").resolve() in (labels.resolve(), (labels / "eng_Latn").resolve()):
        raise UserError(f"{out / 'eng_Latn'}: holds the labels, and an English edition would replace it; name another --out")
    written, too_small = write_languages(rows, found, out, min_verses)
    return written, left_out | too_small


def read_labels(labels: Path) -> tuple[Labels, Verses]:
    """The ids and labels of the English rows, in the published order, and their verses. The files are `eng_train.tsv`, as
    published, or `eng_Latn_train.tsv`, in the folder or in `eng_Latn/`. Raises UserError where they are missing or wrong."""
    task = Taxi1500(labels)
    for file in ("eng_{split}.tsv", "eng_Latn_{split}.tsv", "eng_Latn/eng_{split}.tsv", "eng_Latn/eng_Latn_{split}.tsv"):
        task.file = file
        if (labels / task.path("eng_Latn", "train")).is_file():
            rows = {split: task.rows("eng_Latn", split) for split in SPLITS}
            ids = {split: [(row.id, row.label) for row in rows[split]] for split in SPLITS}
            return ids, {row.id: row.text for split in SPLITS for row in rows[split]}
    raise UserError(f"{labels}: no English labels, expected eng_{{train,dev,test}}.tsv or eng_Latn_{{train,dev,test}}.tsv; "
                    "`python -m mala.tasks download taxi1500 --langs eng_Latn` fetches them")  # fmt: skip


def main() -> None:
    parser = ArgumentParser(prog="python -m mala.tasks", description="Get the benchmarks SIB-200 and Taxi1500.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("download", help="fetch a benchmark")
    command.add_argument("bench", choices=["sib200", "taxi1500"], help="taxi1500 takes 786 MB, the Bibles that are free")
    command.add_argument("--langs", type=words(), default=[], metavar="A,B,…", help="these languages only, such as swh_Latn")
    command.add_argument("--out", type=Path, help="the folder to write to [data/<benchmark>]")

    command = commands.add_parser("build-taxi1500", help="make Taxi1500 for the languages of Bible editions that you have")
    command.add_argument("--labels", type=Path, required=True, help="a folder with the English eng_{train,dev,test}.tsv")
    command.add_argument("--verses", type=Path, required=True, nargs="+", metavar="FILE",
                         help="lines `id, tab, verse` as in the Parallel Bible Corpus; named for its language")  # fmt: skip
    command.add_argument("--out", type=Path, help="the folder to write to [data/taxi1500]")
    command.add_argument("--min-verses", type=int, default=MIN_VERSES, metavar="N",
                         help=f"a language with fewer labelled verses is left out [{MIN_VERSES}, as published]")  # fmt: skip
    command.set_defaults(bench="taxi1500")

    args = parser.parse_args()
    usual = Path("data") / args.bench
    out = args.out or usual
    if args.command == "build-taxi1500":
        written, left_out = build_taxi1500(args.labels, args.verses, out, args.min_verses)
    else:
        written, left_out = {"sib200": download_sib200, "taxi1500": download_taxi1500}[args.bench](out, args.langs)
    for name, why in sorted(left_out.items()):
        print(f"left out {name}: {why}")
    if not written:
        raise UserError(f"{out}: no language could be written; try other languages or files")
    print(f"{out}: wrote {len(written):,} languages: {', '.join(written)}")
    print(f"evaluate: python evaluate.py --bench {args.bench}" + ("" if out == usual else f" --data {out}"))


if __name__ == "__main__":
    run(main)
