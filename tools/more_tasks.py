"""Benchmarks beyond the paper's two, each as its files are published, and EMMA-500's prompt for those two.

Their questions are the language model evaluation harness's (lm-eval 0.4.13): Belebele, XCOPA and XStoryCloze
as it asks them, MasakhaNEWS and AfriSenti by the first of AfroBench's prompts. docs/evaluation.md tells what
is checked, and against what.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from mala.benchmarks.tasks import SIB200, TASKS, Example, Row, Task, Taxi1500
from mala.cli import UserError
from mala.scoring import PROTOCOLS, Encoded
from mala.storage.corpus import LANGUAGE, check_languages
from mala.storage.corpus_formats import read_lines
from mala.words.tokenizer import Tokenizer

Cells = dict[str, str]  # the column of a file -> what a row has there
Question = tuple[str, list[str], int]  # the text before the answer, the choices, which is right, from 0


def pairs(words: str) -> dict[str, str]:
    """`sw swh_Latn en eng_Latn` -> {"swh_Latn": "sw", "eng_Latn": "en"}"""
    listed = words.split()
    return dict(zip(listed[1::2], listed[::2]))


class Published(Task):
    """A benchmark with a file for each language and split. A subclass says what a row of it asks."""

    file: str  # below the benchmark's folder, or below the folder data/ there
    splits = {"train": "train", "dev": "dev", "test": "test"}  # ours -> theirs
    names: dict[str, str] = {}  # our language -> theirs; {}: theirs are like ours
    columns: list[str]  # those that `ask` needs
    by_place = False  # columns are told by their place, not by the header
    prompt = "{text}"
    shots, protocol = 0, "natural"

    def __init__(self, root: Path):
        super().__init__(root / "data" if (root / "data").is_dir() else root)

    def ask(self, row: Cells, language: str) -> Question:
        """What a row asks. A KeyError, ValueError or IndexError says that it is no row of this benchmark."""
        raise NotImplementedError

    def path(self, language: str, split: str) -> Path:
        if split not in self.splits:
            remedy = "leave --shots out" if split == "train" else "give another --split"
            found = f"{type(self).__name__} has the splits {', '.join(self.splits)}"
            raise UserError(f"{self.root}: {found}, expected {split}; {remedy}")
        name = self.names.get(language, language)
        return self.root / self.file.format(language=name, split=self.splits[split])

    def languages(self, chosen: tuple[str, ...] = ()) -> list[str]:
        alike = (entry.name.split(".")[0] for entry in self.root.iterdir())
        names = self.names or filter(LANGUAGE.fullmatch, alike)
        found = sorted(name for name in names if self.path(name, "test").is_file())
        if not found:
            raise UserError(f"{self.root}: no language here; expected {self.layout}")
        return check_languages(self.root, found, chosen)

    def rows(self, language: str, split: str) -> list[Row]:
        file, rows = self.path(language, split), []
        if not file.is_file():
            raise UserError(f"{file}: there is no such file; expected the {split} split of {language}")
        for line, cells in read_json_lines(file) if file.suffix == ".jsonl" else self.read_table(file):
            try:
                text, choices, right = self.ask(cells, language)
                if not all(choices):
                    raise ValueError("an empty choice")
                rows.append(Row(str(len(rows)), choices[range(len(choices))[right]], text, choices))
            except (KeyError, ValueError, IndexError, AttributeError, TypeError):
                expected = f"a row of {type(self).__name__}: {', '.join(self.columns)}"
                found = ", ".join(f"{key}: {value}"[:30] for key, value in list(cells.items())[:8])
                raise UserError(f"{file}: line {line} is {found}; expected {expected}") from None
        if not rows:
            raise UserError(f"{file}: the {split} split of {language} has no rows; leave the language out")
        return rows

    def read_table(self, file: Path) -> Iterator[tuple[int, Cells]]:
        """(line, cells) of the rows of a CSV with tabs below a header, read as pandas reads it."""
        rows = csv.reader((line for _, line in read_lines(file, is_csv=True)), delimiter="\t")
        header = next(rows, [])
        if missing := [name for name in self.columns if not self.by_place and name not in header]:
            found = f"{file}: the header is {' '.join(header)[:80]!r}"
            raise UserError(f"{found}, expected {', '.join(missing)} in it; download the file again")
        header = self.columns if self.by_place else header
        try:
            for cells in rows:
                if cells:
                    yield rows.line_num, dict(zip(header, cells))
        except csv.Error as error:  # a quote that is not closed takes in the rest of the file
            found = f"{file}: line {rows.line_num} is no CSV with tabs ({error})"
            raise UserError(f"{found}; download the file again") from None


def read_json_lines(file: Path) -> Iterator[tuple[int, Cells]]:
    for number, line in read_lines(file):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is no JSON object; download the file again")
        yield number, row


def one_of(labels: list[str], label: str) -> tuple[list[str], int]:
    return labels, labels.index(label.strip())


class Belebele(Published):
    """Questions on a passage, four answers each, in 122 languages (arXiv 2308.16884): 900 a language."""

    file, splits = "{language}.jsonl", {"test": "test"}
    columns = ["flores_passage", "question", *(f"mc_answer{i}" for i in range(1, 5)), "correct_answer_num"]

    def ask(self, row: Cells, language: str) -> Question:
        answers = [f"{letter}: {row[f'mc_answer{i}']}" for i, letter in enumerate("ABCD", 1)]
        lines = [f"P: {row['flores_passage']}", f"Q: {row['question'].strip()}", *answers, "Answer:"]
        return "\n".join(lines), list("ABCD"), ["1", "2", "3", "4"].index(str(row["correct_answer_num"]))


class XCOPA(Published):
    """Which is the cause, or the effect? In 11 languages (arXiv 2005.00333): 100 dev and 500 test rows."""

    file, splits = "{language}/{split}.{language}.jsonl", {"dev": "val", "test": "test"}
    columns = ["premise", "choice1", "choice2", "question", "label"]
    names = pairs("et est_Latn ht hat_Latn id ind_Latn it ita_Latn qu quz_Latn sw swh_Latn ta tam_Taml "
                  "th tha_Thai tr tur_Latn vi vie_Latn zh zho_Hans")  # fmt: skip
    because = {  # the words for `because` and `therefore`
        "et": ("sest", "seetõttu"), "ht": ("poukisa", "donk sa"), "id": ("karena", "maka"),
        "it": ("perché", "quindi"), "qu": ("imataq", "chaymi"), "sw": ("kwa sababu", "kwa hiyo"),
        "ta": ("காரணமாக", "எனவே"), "th": ("เพราะ", "ดังนั้น"), "tr": ("çünkü", "bu yüzden"),
        "vi": ("bởi vì", "vì vậy"), "zh": ("因为", "所以"),
    }  # fmt: skip

    def ask(self, row: Cells, language: str) -> Question:
        word = self.because[self.names[language]][("cause", "effect").index(row["question"])]
        choices = [row[key][0].lower() + row[key][1:] for key in ("choice1", "choice2")]
        return f"{row['premise'].strip()[:-1]} {word}", choices, (0, 1).index(row["label"])


class XStoryCloze(Published):
    """Which sentence ends the story? In 11 languages (arXiv 2112.10668): 360 train and 1,511 test rows."""

    file = "spring2016.val.{language}.tsv.split_20_80_{split}.tsv"
    splits = {"train": "train", "test": "eval"}
    columns = ["id", "1", "2", "3", "4", "ending 1", "ending 2", "right ending"]
    by_place = True  # the header's names differ from copy to copy
    names = pairs("ar arb_Arab en eng_Latn es spa_Latn eu eus_Latn hi hin_Deva id ind_Latn my mya_Mymr "
                  "ru rus_Cyrl sw swh_Latn te tel_Telu zh zho_Hans")  # fmt: skip

    def ask(self, row: Cells, language: str) -> Question:
        endings = [row["ending 1"].lstrip(), row["ending 2"].lstrip()]
        return " ".join(row[i].lstrip() for i in "1234"), endings, ("1", "2").index(row["right ending"])


class MasakhaNEWS(Published):
    """Topics of news in 16 languages of Africa (arXiv 2304.09972), told from their headlines."""

    file, columns = "{language}/{split}.tsv", ["category", "headline"]
    labels = ["business", "entertainment", "health", "politics", "religion", "sports", "technology"]
    names = pairs("amh amh_Ethi eng eng_Latn fra fra_Latn hau hau_Latn ibo ibo_Latn lin lin_Latn "
                  "lug lug_Latn orm gaz_Latn pcm pcm_Latn run run_Latn sna sna_Latn som som_Latn "
                  "swa swh_Latn tir tir_Ethi xho xho_Latn yor yor_Latn")  # fmt: skip

    def ask(self, row: Cells, language: str) -> Question:
        topics = "technology, business, politics, sports, health, entertainment, or religion"
        text = f"what category does the text: '{row['headline']}' belong to: \n\n"
        return f"Given the categories {topics}; {text}", *one_of(self.labels, row["category"])


class AfriSenti(Published):
    """Sentiment of tweets in 14 languages of Africa, and English (arXiv 2302.08956)."""

    file, columns = "{language}/{split}.tsv", ["tweet", "label"]
    labels = ["negative", "positive", "neutral"]
    names = pairs("amh amh_Ethi arq arq_Arab ary ary_Arab eng eng_Latn hau hau_Latn ibo ibo_Latn "
                  "kin kin_Latn orm gaz_Latn pcm pcm_Latn por por_Latn swa swh_Latn tir tir_Ethi "
                  "tso tso_Latn twi twi_Latn yor yor_Latn")  # fmt: skip

    def ask(self, row: Cells, language: str) -> Question:
        asked = "have a Neutral, Positive or Negative sentiment? Labels only"
        return f'Does this statement; "{row["tweet"]}" {asked}', *one_of(self.labels, row["label"])


class Emma(Task):
    """A benchmark of the paper as EMMA-500 asks it (arXiv 2409.17892; `evaluation/` of MaLA-LM/emma-500)."""

    question: str  # for `prompt` where the answer is asked for
    longest: int | None = None  # tokens of a context: the rest, with the question, is cut off its end
    seed, protocol = 42, "emma"

    def examples(self, language: str, split: str = "test", shots: int = 3, seed: int = 42) -> list[Example]:
        train, rows = self.train_rows(language, shots), self.rows(language, split)
        seeds, examples = random.Random(seed), []
        # Of equal scores theirs takes the label that comes last in the alphabet: labels can end alike.
        labels = sorted(self.labels, reverse=True)
        for row in rows:  # in the file's order: shots are drawn as pandas' DataFrame.sample draws them
            draw = np.random.RandomState(seeds.randint(0, 1000))
            chosen = draw.choice(len(train), size=shots, replace=False).tolist() if shots else []
            shown = "\n".join(f"{self.prompt.format(text=train[i].text)} {train[i].label}" for i in chosen)
            asked = f"{shown}\n{self.question.format(text=row.text)}\n"
            context = f"Topic Classification: {', '.join(self.labels)}.\n\n{asked}"
            examples.append(Example(row.id, context, row.label, chosen, labels))
        # The files are sorted by label: --limit would measure one of them.
        return [examples[i] for i in np.random.default_rng(seed).permutation(len(rows))]


class EmmaSIB200(Emma, SIB200):
    question = SIB200.prompt


class EmmaTaxi1500(Emma, Taxi1500):
    question = 'The label of "{text}" is'
    longest = 2048

    def rows(self, language: str, split: str) -> list[Row]:
        """Trap: they read the raw file as CSV. Quotes around a verse are dropped, and so are a verse that
        goes on after its quotes, and those after one whose quotes do not close."""
        super().rows(language, split)  # for its errors
        lines = (line for _, line in read_lines(self.path(language, split), is_csv=True))
        kept, rows, cells = [], csv.reader(lines, delimiter="\t", strict=True), []
        while cells is not None:
            try:
                cells = next(rows, None)
            except csv.Error:
                continue
            if cells is not None and len(cells) == 3:
                kept.append(Row(*cells, self.labels))
        if not kept:
            raise UserError(
                f"{self.path(language, split)}: no row can be read as CSV; leave the language out"
            )
        return kept


def encode_emma(tokenizer: Tokenizer, examples: list[Example], longest: int | None = None) -> Encoded:
    """`<s>` first; of a label the last token only, which is compared right after the context."""
    contexts = tokenizer.encode_batch([example.context for example in examples], bos=True)
    last = {label: tokenizer.encode(f" {label}")[-1:] for label in examples[0].choices}
    return [(ids[:longest], [last[label] for label in one.choices]) for ids, one in zip(contexts, examples)]


ALL_TASKS: dict[str, type[Task]] = TASKS | {
    "belebele": Belebele,
    "xcopa": XCOPA,
    "xstorycloze": XStoryCloze,
    "masakhanews": MasakhaNEWS,
    "afrisenti": AfriSenti,
}
EMMA: dict[str, type[Emma]] = {"sib200": EmmaSIB200, "taxi1500": EmmaTaxi1500}


def find_task(bench: str, protocol: str | None) -> type[Task]:
    """The class of a benchmark. Raises UserError for a protocol that it does not have."""
    if protocol == "emma" and bench not in EMMA:
        raise UserError(f"--protocol emma is for {' and '.join(EMMA)}, not for {bench}; leave it out")
    return EMMA[bench] if protocol == "emma" else ALL_TASKS[bench]


def find_encoding(bench: str, protocol: str) -> Callable[[Tokenizer, list[Example]], Encoded]:
    return partial(encode_emma, longest=EMMA[bench].longest) if protocol == "emma" else PROTOCOLS[protocol]
