"""The commands of `python -m mala.vocab`: their settings, their messages and the files that they write."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mala.cli import REQUIRED, UserError, choose_device, option, parse_command
from mala.storage.corpus import Corpus
from mala.storage.corpus_formats import Reading
from mala.storage.files import atomic_directory, atomic_file, write_json
from mala.storage.tokenizer_files import write_extended
from mala.vocab import WordsOf, count_words, published_words, sample, train_pieces
from mala.words.byte_level import JsonTokenizer, load_tokenizer
from mala.words.further_merges import continue_merges
from mala.words.merges_and_scores import merge
from mala.words.new_rows import FITS, INITS, extend_checkpoint
from mala.words.tokenizer import Tokenizer
from tools import fertility, pictures

SIZES, SEEDS = (1, 2**40), (0, 2**32 - 1)  # limits of settings


@dataclass
class Learning(Reading):
    """The settings of `train` and `merge --method continue` for learning pieces from a corpus."""

    data: str = option(REQUIRED, "a corpus folder; only its train split is read")
    size: int = option(REQUIRED, "number of pieces to learn", limits=SIZES)
    alpha: float = option(0.3, "sample languages in proportion to n^alpha, n: documents", limits=(0, 10))
    documents: int | None = option(None, "documents to draw; default: as many as there are", limits=SIZES)
    held_out: float = option(0.2, "share of each language not to read: the last, at most 1,000 documents")
    seed: int = option(0, "seed of the draw of documents", limits=SEEDS)

    def words(self, words_of: WordsOf) -> Counter[str]:
        documents = Corpus.from_settings(self).stream("train")
        drawn = sample(documents, self.alpha, self.seed, self.documents)
        bar = tqdm(drawn, "counting words", unit="document", leave=False, disable=None)
        words = count_words(bar, words_of)
        found = f"{len(words):,} distinct words in {len(documents)} languages"
        print(f"learning {self.size:,} pieces from {found}", file=sys.stderr)
        return words


@dataclass
class Train(Learning):
    """Learn a SentencePiece BPE model from a corpus."""

    published: bool = option(False, "use SentencePiece's defaults, as MaLA-500: NFKC, 99.95% of characters")
    out: str = option(REQUIRED, "the model file to write")

    def run(self) -> None:
        with atomic_file(Path(self.out), "wb") as file:  # opened first, because learning may take hours
            words = self.words(published_words if self.published else Tokenizer.words)
            file.write(train_pieces(words, self.size, self.published))
        print(f"{self.out}: {len(Tokenizer.from_pretrained(self.out)):,} pieces")


@dataclass
class Merge(Learning):
    """Add pieces to a base model: further merges (continue), or the pieces of a new model (union)."""

    base: str = option(REQUIRED, "the checkpoint's tokenizer, or its folder")
    method: str = option("continue", "further merges, or the pieces of --new", choices=("continue", "union"))
    new: str | None = option(None, "union: the model whose pieces to add")
    data: str | None = option(None, "continue: a corpus folder; only its train split is read")
    size: int | None = option(None, "continue: number of pieces to learn", limits=SIZES)
    published: bool = option(False, "union: keep all scores, even equal ones, as MaLA-500")
    out: str = option(REQUIRED, "the model file to write; a folder if the base has a tokenizer.json")

    def run(self) -> None:
        base, is_union = load_tokenizer(Path(self.base)), self.method == "union"
        base.check_bpe()
        if is_union and (not self.new or self.data or self.size is not None):
            raise UserError("--method union takes --new, and neither --data nor --size")
        if not is_union and (not self.data or self.size is None or self.new or self.published):
            raise UserError("--method continue takes --data and --size, but not --new or --published")
        if isinstance(base, JsonTokenizer) and not is_union:
            with atomic_directory(Path(self.out)) as folder:  # opened first, as above
                merged = JsonTokenizer(continue_merges(base, self.words(base.words), self.size), base.name)
                write_extended(Path(base.name).parent, base, merged, folder)
        else:
            with atomic_file(Path(self.out), "wb") as file:
                if is_union:
                    file.write(merge(base, Tokenizer.from_pretrained(self.new), self.published))
                else:
                    file.write(continue_merges(base, self.words(base.words), self.size))
        print(f"{self.out}: {len(base):,} pieces -> {len(load_tokenizer(Path(self.out))):,}")


@dataclass
class Report(Reading):
    """Compare a tokenizer and its extension on a corpus, language by language."""

    base: str = option(REQUIRED, "a tokenizer.model, a tokenizer.json or their folder")
    new: str = option(REQUIRED, "the extended tokenizer, also a file or folder")
    data: str = option(REQUIRED, "a corpus folder")
    split: str = option("test", "split to measure", choices=("train", "dev", "test"))
    held_out: float = option(1.0, "without splits, the last share of each language to measure; 1: all")
    json: str | None = option(None, "JSON file to write all figures to")
    plot: str | None = option(None, "picture file for fertility before and after; needs matplotlib")

    def run(self) -> None:
        base, new = load_tokenizer(Path(self.base)), load_tokenizer(Path(self.new))
        report = fertility.fertility_report(base, new, Corpus.from_settings(self).stream(self.split))
        fertility.print_report(report)
        if self.json:
            write_json(Path(self.json), report)
        if self.plot:
            pictures.draw_fertility(report, Path(self.plot))


@dataclass
class Extend(Reading):
    """Resize a checkpoint to a merged vocabulary."""

    model: str = option(REQUIRED, "the checkpoint folder")
    tokenizer: str = option(REQUIRED, "the merged tokenizer: a model file or a folder")
    out: str = option(REQUIRED, "the checkpoint folder to write")
    init: str = option("subtokens", "how new rows start, see docs/vocabulary.md", choices=tuple(INITS))
    seed: int = option(0, "seed of the random initialisations", limits=SEEDS)
    data: str | None = option(None, "calibrated: a corpus folder; only its train split is read")
    held_out: float = option(0.2, "calibrated: share of each language not to read, from its end")
    device: str = option("auto", "calibrated: where to compute", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        if (self.init in FITS) != bool(self.data):
            raise UserError(f"--init {', '.join(FITS)} needs --data, and no other --init takes it")

    def run(self) -> None:
        merged, drawn = load_tokenizer(Path(self.tokenizer)), ()
        if self.data:
            documents = Corpus.from_settings(self).stream("train")
            drawn = sample(documents, alpha=0.3, seed=self.seed)
        where = choose_device(self.device, "auto")
        extend_checkpoint(Path(self.model), merged, Path(self.out), self.init, self.seed, drawn, where)
        print(f"{self.out}: {len(load_tokenizer(Path(self.model))):,} rows -> {len(merged):,}")


COMMANDS = {"train": Train, "merge": Merge, "report": Report, "extend": Extend}


def main() -> None:
    parse_command("python -m mala.vocab", COMMANDS).run()
