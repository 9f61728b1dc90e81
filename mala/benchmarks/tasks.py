"""Read SIB-200 and Taxi1500, and build their prompts by MaLA-500's protocol (see docs/evaluation.md)."""

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mala.cli import UserError
from mala.storage.corpus import LANGUAGE, check_languages
from mala.storage.corpus_formats import SIB200_HEADER, read_tsv

Row = namedtuple("Row", ["id", "label", "text", "choices"])  # label is one of choices


@dataclass(frozen=True)
class Example:
    """A row to label. The model scores each of `choices` after the prompt `context`; one of them is `label`.
    `shots` are row numbers in the train split, from 0."""

    id: str
    context: str
    label: str
    shots: list[int]
    choices: list[str]


class Task:
    """A benchmark that gives each text one of a few labels. To add one, list a subclass in TASKS."""

    file: str  # a pattern with {language} and {split}, below the benchmark's folder
    header: list[str] | None = None  # first line of a file that is CSV with tabs; None: plain lines
    labels: list[str]  # in the published order: if scores are equal, the first label wins
    prompt: str  # the text before the label
    shots, seed, protocol = 3, 1234, "published"  # defaults, if the settings give none

    def __init__(self, root: Path):
        self.root = root
        self.layout = f"files such as {self.path('swh_Latn', 'test')}"  # for error messages
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder; expected {self.layout}")

    def path(self, language: str, split: str) -> Path:
        return self.root / self.file.format(language=language, split=split)

    def languages(self, chosen: tuple[str, ...] = ()) -> list[str]:
        """Return the languages that have a folder, sorted; if `chosen` is given, only those."""
        folders = (entry.name for entry in self.root.iterdir() if entry.is_dir())
        found = sorted(filter(LANGUAGE.fullmatch, folders))
        if not found:
            raise UserError(f"{self.root}: no language here; expected {self.layout}")
        return check_languages(self.root, found, chosen)

    def rows(self, language: str, split: str) -> list[Row]:
        """Return the rows of a split, texts unchanged. Raises UserError for a missing or malformed file."""
        file = self.path(language, split)
        if not file.is_file():
            raise UserError(f"{file}: there is no such file; expected the {split} split of {language}")
        lines = read_tsv(file, self.header)
        if self.header:
            number, cells = next(lines, (1, ["an empty file"]))
            if cells != self.header:
                found, expected = " ".join(cells)[:80], " ".join(self.header)
                raise UserError(f"{file}: line {number} is {found!r}, expected the header {expected!r}")
        rows, ids = [], {}
        for number, (id, label, text) in lines:
            where = f"{file}: line {number}"
            if ids.setdefault(id, number) != number:
                raise UserError(f"{where} has the same id as line {ids[id]}, {id!r}; every row needs its own")
            if label not in self.labels:
                raise UserError(f"{where} has the label {label!r}, expected one of {', '.join(self.labels)}")
            rows.append(Row(id, label, text, self.labels))
        if not rows:
            raise UserError(f"{file}: the {split} split of {language} has no rows; leave the language out")
        return rows

    def train_rows(self, language: str, shots: int) -> list[Row]:
        """Return the rows that shots are drawn from. Raises UserError if there are too few."""
        train = self.rows(language, "train") if shots else []
        if len(train) < shots:
            found = f"{self.path(language, 'train')}: {len(train)} rows"
            raise UserError(f"{found}, too few for {shots} shots; lower --shots, or leave {language} out")
        return train

    def examples(self, language: str, split: str = "test", shots: int = 3, seed: int = 1234) -> list[Example]:
        """Return the examples of a language in the published order."""
        train, rows = self.train_rows(language, shots), self.rows(language, split)
        examples, rng = [], np.random.default_rng(seed)
        for index in rng.permutation(len(rows)):
            row = rows[index]
            chosen = draw_shots(rng, train, row, shots)
            shown = [f"{self.prompt.format(text=train[i].text)} {train[i].label}" for i in chosen]
            context = "\n".join([*shown, self.prompt.format(text=row.text)])
            examples.append(Example(row.id, context, row.label, chosen, row.choices))
        return examples


def draw_shots(rng: np.random.Generator, train: list, row: Any, shots: int) -> list[int]:
    """Return the train rows to show before `row`: the first `shots` drawn that differ from it; a second draw
    may repeat some. Trap: the published loop stops only when it gets one index too many, so it has usually
    begun another draw. That draw advances `rng`, which changes the shots of all later rows."""
    if shots and all(other == row for other in train):
        raise UserError(f"row {row.id}: all train rows are equal to it; add others, or use --shots 0")
    chosen: list[int] = []
    while shots:  # with shots it ends by `return`
        for index in rng.choice(len(train), size=shots, replace=False, shuffle=True).tolist():
            if len(chosen) == shots:
                return chosen
            if train[index] != row:
                chosen.append(index)
    return chosen


class SIB200(Task):
    """Topics of sentences in 205 languages (arXiv 2309.07445): 701 / 99 / 204 rows per language."""

    file = "{language}/{split}.tsv"
    header = SIB200_HEADER
    labels = ["science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"]
    prompt = 'The topic of the news "{text}" is'


class Taxi1500(Task):
    """Topics of Bible verses in over 1,500 languages (arXiv 2305.08487): up to 860 / 106 / 111 rows."""

    file = "{language}/{language}_{split}.tsv"
    labels = ["Recommendation", "Faith", "Description", "Sin", "Grace", "Violence"]
    prompt = 'The topic of the verse "{text}" is'


TASKS: dict[str, type[Task]] = {"sib200": SIB200, "taxi1500": Taxi1500}
