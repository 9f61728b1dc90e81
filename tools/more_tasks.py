"""Benchmarks beyond the paper's two, read from their published files, and EMMA-500's prompts for those two.

The prompts are those of the language model evaluation harness (lm-eval 0.4.13). Belebele, XCOPA and
XStoryCloze have its own prompts; MasakhaNEWS and AfriSenti have the first of AfroBench's prompts.
docs/evaluation.md says what has been checked, and against what.
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

Cells = dict[str, str]  # column of a file -> content of a row
Question = tuple[str, list[str], int]  # text before the answer, choices, index of the right one from 0


def pairs(words: str) -> dict[str, str]:
    """Parse `sw swh_Latn en eng_Latn` into {"swh_Latn": "sw", "eng_Latn": "en"}."""
    listed = words.split()
    return dict(zip(listed[1::2], listed[::2]))


class Published(Task):
    """A benchmark with a file for each language and split. A subclass turns a row into a question."""

    file: str  # path in the benchmark's folder, or in its data/
    splits = {"train": "train", "dev": "dev", "test": "test"}  # our name -> theirs
    names: dict[str, str] = {}  # our language code -> theirs; {}: they are the same
    columns: list[str]  # the columns that `ask` needs
    by_place = False  # find columns by their position, not by the header
    prompt = "{text}"
    shots, protocol = 0, "natural"

    def __init__(self, root: Path):
        super().__init__(root / "data" if (root / "data").is_dir() else root)

    def ask(self, row: Cells, language: str) -> Question:
        """Return the question of a row. Raises KeyError, ValueError or IndexError if the row is malformed."""
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
        """Yield (line number, cells) of a CSV file with tabs and a header, as pandas reads it."""
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
        except csv.Error as error:  # an unclosed quote swallows the rest of the file
            found = f"{file}: line {rows.line_num} is not CSV with tabs ({error})"
            raise UserError(f"{found}; download the file again") from None


def read_json_lines(file: Path) -> Iterator[tuple[int, Cells]]:
    for number, line in read_lines(file):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is not a JSON object; download the file again")
        yield number, row


def one_of(labels: list[str], label: str) -> tuple[list[str], int]:
    return labels, labels.index(label.strip())


class Belebele(Published):
    """Questions about a passage, four answers each, 122 languages (arXiv 2308.16884): 900 per language."""

    file, splits = "{language}.jsonl", {"test": "test"}
    columns = ["flores_passage", "question", *(f"mc_answer{i}" for i in range(1, 5)), "correct_answer_num"]

    def ask(self, row: Cells, language: str) -> Question:
        answers = [f"{letter}: {row[f'mc_answer{i}']}" for i, letter in enumerate("ABCD", 1)]
        lines = [f"P: {row['flores_passage']}", f"Q: {row['question'].strip()}", *answers, "Answer:"]
        return "\n".join(lines), list("ABCD"), ["1", "2", "3", "4"].index(str(row["correct_answer_num"]))


class XCOPA(Published):
    """Choice of the likelier cause or effect, 11 languages (arXiv 2005.00333): 100 dev and 500 test rows."""

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
    """Choice of a story's last sentence, 11 languages (arXiv 2112.10668): 360 train and 1,511 test rows."""

    file = "spring2016.val.{language}.tsv.split_20_80_{split}.tsv"
    splits = {"train": "train", "test": "eval"}
    columns = ["id", "1", "2", "3", "4", "ending 1", "ending 2", "right ending"]
    by_place = True  # the header's names differ between copies
    names = pairs("ar arb_Arab en eng_Latn es spa_Latn eu eus_Latn hi hin_Deva id ind_Latn my mya_Mymr "
                  "ru rus_Cyrl sw swh_Latn te tel_Telu zh zho_Hans")  # fmt: skip

    def ask(self, row: Cells, language: str) -> Question:
        endings = [row["ending 1"].lstrip(), row["ending 2"].lstrip()]
        return " ".join(row[i].lstrip() for i in "1234"), endings, ("1", "2").index(row["right ending"])


class MasakhaNEWS(Published):
    """Topics of news, predicted from headlines, in 16 languages used in Africa (arXiv 2304.09972)."""

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
    """Sentiment of tweets in English and 14 other languages used in Africa (arXiv 2302.08956)."""

    file, columns = "{language}/{split}.tsv", ["tweet", "label"]
    labels = ["negative", "positive", "neutral"]
    names = pairs("amh amh_Ethi arq arq_Arab ary ary_Arab eng eng_Latn hau hau_Latn ibo ibo_Latn "
                  "kin kin_Latn orm gaz_Latn pcm pcm_Latn por por_Latn swa swh_Latn tir tir_Ethi "
                  "tso tso_Latn twi twi_Latn yor yor_Latn")  # fmt: skip

    def ask(self, row: Cells, language: str) -> Question:
        asked = "have a Neutral, Positive or Negative sentiment? Labels only"
        return f'Does this statement; "{row["tweet"]}" {asked}', *one_of(self.labels, row["label"])


class Emma(Task):
    """A benchmark of the paper in EMMA-500's protocol (arXiv 2409.17892, MaLA-LM/emma-500 `evaluation/`)."""

    question: str  # asks for the answer; `prompt` is for the shots
    longest: int | None = None  # most tokens of a context: its end, with the question, is cut off
    seed, protocol = 42, "emma"

    def examples(self, language: str, split: str = "test", shots: int = 3, seed: int = 42) -> list[Example]:
        train, rows = self.train_rows(language, shots), self.rows(language, split)
        seeds, examples = random.Random(seed), []
        # Labels that end in the same token have equal scores. EMMA-500 then takes the alphabetically last.
        labels = sorted(self.labels, reverse=True)
        for row in rows:  # the file's order decides each row's seed; pandas' DataFrame.sample draws like this
            draw = np.random.RandomState(seeds.randint(0, 1000))
            chosen = draw.choice(len(train), size=shots, replace=False).tolist() if shots else []
            shown = "\n".join(f"{self.prompt.format(text=train[i].text)} {train[i].label}" for i in chosen)
            asked = f"{shown}\n{self.question.format(text=row.text)}\n"
            context = f"Topic Classification: {', '.join(self.labels)}.\n\n{asked}"
            examples.append(Example(row.id, context, row.label, chosen, labels))
        # The files are sorted by label: without this --limit would measure only one label.
        return [examples[i] for i in np.random.default_rng(seed).permutation(len(rows))]


class EmmaSIB200(Emma, SIB200):
    question = SIB200.prompt


class EmmaTaxi1500(Emma, Taxi1500):
    question = 'The label of "{text}" is'
    longest = 2048

    def rows(self, language: str, split: str) -> list[Row]:
        """Return the rows as EMMA-500 reads them. Trap: it reads the raw file as CSV, so it drops the quotes
        around a verse, a verse that goes on after its quotes, and the verses after an unclosed quote."""
        super().rows(language, split)  # raises the usual errors
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
    """Encode contexts after `<s>`, and only the last token of a label, which is scored after the context."""
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
    """Return the class of a benchmark. Raises UserError if it lacks the protocol."""
    if protocol == "emma" and bench not in EMMA:
        raise UserError(f"--protocol emma is for {' and '.join(EMMA)}, not for {bench}; leave it out")
    return EMMA[bench] if protocol == "emma" else ALL_TASKS[bench]


def find_encoding(bench: str, protocol: str) -> Callable[[Tokenizer, list[Example]], Encoded]:
    """Return the function that encodes examples for a protocol."""
    return partial(encode_emma, longest=EMMA[bench].longest) if protocol == "emma" else PROTOCOLS[protocol]
