"""Extend a LLaMA vocabulary with the words of new languages: learn pieces, merge them in, give each a row to start from.

    python -m mala.vocab train  --data CORPUS --size 250000 --out new.model
    python -m mala.vocab merge  --base tokenizer.model --new new.model --out merged.model
    python -m mala.vocab merge  --method continue --base tokenizer.model --data CORPUS --size 16000 --out merged.model
    python -m mala.vocab report --base tokenizer.model --new merged.model --data CORPUS
    python -m mala.vocab extend --model BASE --tokenizer merged.model --out DIR

This file holds the first two steps. What they bring is measured in mala/report.py, the rows of new pieces are in
mala/extend.py, and how `continue` learns is in mala/bpe.py.

A `tokenizer.model` is a serialized protobuf message `ModelProto { repeated SentencePiece pieces = 1; ... }` with
`SentencePiece { string piece = 1; float score = 2; Type type = 3; }` (sentencepiece_model.proto). Two serialized messages
put end to end are one message: repeated fields are joined, single ones take the later value. So a merge appends bytes.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from mala.bpe import learn_pieces
from mala.checkpoint import atomic_file, write_json
from mala.cli import ArgumentParser, UserError, choose_device, run
from mala.corpus import Corpus, language_shares
from mala.extend import INITS, extend_checkpoint
from mala.plots import draw_fertility
from mala.report import compare, print_report
from mala.tokenizer import WORD_START, Tokenizer

MAX_WORDS = 10_000_000  # distinct words that are counted at a time: about 2 GB; to learn from so many takes several times that
MAX_LINE = 4192  # bytes; SentencePiece drops longer lines, unless it is told otherwise


def sample(documents: Mapping[str, Collection[str]], alpha: float, seed: int, draws: int | None = None
           ) -> Iterator[tuple[str, int]]:  # fmt: skip
    """(document, how often it is drawn) for each document that is drawn.

    There are about `draws` draws, by default as many as documents, and a language's share of them is proportional to
    n^alpha, n its number of documents. A language that falls short of its share is repeated, one beyond it is cut to a
    random choice. However often a document is drawn it is read once, so a corpus may be larger than memory.
    """
    sizes = [len(texts) for texts in documents.values()]
    counts = np.ceil(language_shares(sizes, alpha) * (draws or sum(sizes))).astype(int).tolist()
    rng = np.random.default_rng(seed)
    for texts, count in zip(documents.values(), counts):
        times, wanted = divmod(count, len(texts))
        for left, text in zip(range(len(texts), 0, -1), texts):
            if not times and not wanted:
                break
            # Selection sampling: `wanted` of the `left` documents to come (Knuth, TAOCP 3.4.2, algorithm S).
            chosen = rng.random() * left < wanted
            wanted -= chosen
            if times + chosen:
                yield text, times + int(chosen)


def count_words(drawn: Iterable[tuple[str, int]], published: bool = False) -> Counter[str]:
    """word -> how often it occurs in the documents (text, times drawn). Words stand between spaces; their counts are all
    that BPE learns from.

    `published`: words as SentencePiece normalises them by default (nmt_nfkc), of lines of at most 4,192 bytes; otherwise
    as they stand, which is what LLaMA's tokenizer sees. Where there are more than MAX_WORDS, the rarer half is forgotten.
    """
    normalize = str
    if published:
        plain = {"add_dummy_prefix": False, "escape_whitespaces": False, "remove_extra_whitespaces": False}
        normalize = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", **plain).normalize
    words: Counter[str] = Counter()
    for text, times in drawn:
        for line in text.splitlines():  # SentencePiece learns from single lines
            if published and len(line.encode()) > MAX_LINE:
                continue
            # A tab ends the word in what SentencePiece is given below; ▅ it keeps to itself, and drops what holds it.
            for word in normalize(line).replace("\t", " ").replace("▅", " ").split(" "):
                words[word] += times
        if len(words) > MAX_WORDS:
            words = Counter(dict(words.most_common(MAX_WORDS // 2)))
    words.pop("", None)
    return words


def train_pieces(words: Counter[str], size: int, published: bool = False, standalone: bool = False) -> bytes:
    """Learn a SentencePiece BPE model of `size` pieces; returns the serialized ModelProto.

    The settings are LLaMA 2's, so that the pieces match text as the base tokenizer normalises it (that is, not at all);
    those of `published` are SentencePiece's defaults, as MaLA-500 had them. Pieces to be merged into a base cover every
    character, and the base falls back to bytes; a tokenizer that stands alone spells rare ones in bytes, as LLaMA 2's does.
    """
    settings = {} if published else {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
        "split_digits": True, "character_coverage": 0.99995 if standalone else 1.0, "byte_fallback": standalone,
        "max_sentence_length": 2**30,
    }  # fmt: skip
    if not words:
        raise UserError(f"cannot learn {size} pieces from this corpus: it holds no words")
    if size < 4:
        raise UserError(f"cannot learn {size} pieces: <unk>, <s> and </s> are 3 of them; ask for more")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in words.items()),
            input_format="tsv",
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            minloglevel=2,
            **settings,
        )
    except (RuntimeError, ValueError) as error:
        reason = f"SentencePiece says: {str(error).strip()}"
        if most := re.search(r"<= (\d+)", str(error)):
            reason = f"it yields {most[1]}; ask for as many"
        elif least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            reason = f"its characters alone are {least[1]}; ask for more"
        raise UserError(f"cannot learn {size} pieces from this corpus: {reason}") from None
    return model.getvalue()


def merge(base: Tokenizer, new: Tokenizer) -> bytes:
    """The base's pieces, ids and scores unchanged; then each piece of `new` that the base lacks, with its score.

    Control, unknown and byte pieces of `new` are left out: those of a LLaMA tokenizer stay the base's. This is MaLA-500's
    procedure; it leaves pieces that no text produces, which `continue_merges` does not. Raises UserError where one of the
    two is no BPE model: their scores say in which order to merge, a Unigram model's are log-probabilities.
    """
    for tokenizer in (base, new):
        check_bpe(tokenizer)
    known = set(base.pieces)
    return append_pieces(base, {piece: score for piece, score in new.scores().items() if piece not in known})


def check_bpe(tokenizer: Tokenizer) -> None:
    if tokenizer.model_type != "bpe":
        raise UserError(f"{tokenizer.name}: a {tokenizer.model_type} model, expected a BPE model, which LLaMA's is")


def append_pieces(base: Tokenizer, scores: dict[str, float]) -> bytes:
    """The base's ModelProto with further pieces, in order, each of type NORMAL (the default, so not written)."""
    model = bytearray(base.model)
    for piece, score in scores.items():
        text = piece.encode()
        message = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
        model += b"\x0a" + _varint(len(message)) + message
    return bytes(model)


def _varint(value: int) -> bytes:
    """Protobuf's base-128 integer: seven bits a byte, the lowest first, the top bit says that more follow."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def continue_merges(base: Tokenizer, words: Counter[str], size: int) -> bytes:
    """`merge --method continue`: `size` pieces learnt on top of the base's own merges (see mala/bpe.py).

    Each is scored below every base piece and below the one before. Raises UserError where the base is no BPE model, and
    where the text yields fewer pieces.
    """
    check_bpe(base)
    if len(base.byte_ids) < 256:
        raise UserError(f"{base.name}: has no byte pieces, expected 256, in which LLaMA's tokenizer spells unknown characters")
    counts = {WORD_START + word: count for word, count in words.items()}
    known = base.scores()
    symbols = {word: _symbols(base, word, ids) for word, ids in zip(counts, base.segment(list(counts)))}
    pieces = learn_pieces(counts, symbols, known, size)
    if len(pieces) < size:
        raise UserError(f"cannot learn {size} pieces from this corpus: it yields {len(pieces)}; ask for as many")
    score, scores = np.float32(min(known.values())), {}
    for piece in pieces:
        # Trap: LLaMA 2 scores its runs of spaces -1e9, and there float32 goes in steps of 64: -1e9 - 1 is -1e9.
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        scores[piece] = float(score)
    return append_pieces(base, scores)


def _symbols(base: Tokenizer, word: str, ids: list[int]) -> list[str]:
    """The pieces of a word's segmentation, with a character that falls back to bytes as one symbol: to the merges it is one."""
    symbols, at, left = [], 0, iter(ids)
    for i in left:
        if i in base.byte_ids:
            symbols.append(word[at : at + 1])
            for _ in symbols[-1].encode()[1:]:
                next(left, None)
        else:
            symbols.append(base.pieces[i])
        at += len(symbols[-1])
    if "".join(symbols) != word:
        raise UserError(f"{base.name}: reads {word!r} as {''.join(symbols)!r}; continue takes a base that does not normalise")
    return symbols


def check_numbers(args: Namespace) -> None:
    for name, least, most in (("size", 1, 2**30), ("documents", 1, 2**40), ("seed", 0, 2**32 - 1), ("alpha", 0, 10)):
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name} is {value}, expected a number from {least:,} to {most:,}")


def read_words(args: Namespace) -> Counter[str]:
    """The word counts of a command line's corpus: --data, --held-out, --alpha, --documents, --seed."""
    documents = Corpus(args.data, held_out=args.held_out).stream("train")
    drawn = sample(documents, args.alpha, args.seed, args.documents)
    words = count_words(tqdm(drawn, desc="counting words", unit="document", leave=False, disable=None), args.published)
    print(f"learning {args.size:,} pieces from {len(words):,} distinct words of {len(documents)} languages", file=sys.stderr)
    return words


def main() -> None:
    parser = ArgumentParser(prog="python -m mala.vocab", description="Extend a LLaMA vocabulary.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, help: str) -> ArgumentParser:
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")

    def add_corpus(command: ArgumentParser, required: bool, prefix: str = "") -> None:
        command.add_argument("--data", required=required, help=prefix + "a corpus folder; its train split is read")
        command.add_argument("--size", type=int, required=required, help=prefix + "number of pieces to learn")
        command.add_argument("--alpha", type=float, default=0.3, help=prefix + "languages are sampled by n^alpha [0.3]")
        command.add_argument("--documents", type=int, help=prefix + "how many documents to draw [as many as the corpus has]")
        command.add_argument("--held-out", type=float, default=0.2,
                             help=prefix + "last share of each language, at most 1,000 documents, not read [0.2]")  # fmt: skip
        command.add_argument("--seed", type=int, default=0, help=prefix + "decides which documents are drawn [0]")

    command = add_command("train", "learn a SentencePiece BPE model from a corpus")
    add_corpus(command, required=True)
    command.add_argument("--published", action="store_true",
                         help="SentencePiece's defaults, as MaLA-500 had them: NFKC, 99.95%% of characters")  # fmt: skip
    command.add_argument("--out", type=Path, required=True, help="the model file to write")

    command = add_command("merge", "add pieces to a base model")
    command.add_argument("--base", required=True, help="tokenizer.model of the checkpoint, or its folder")
    method = "union: the pieces of --new, as MaLA-500 did; continue: further merges, learnt on --data [union]"
    command.add_argument("--method", choices=["union", "continue"], default="union", help=method)
    command.add_argument("--new", help="union: the model whose pieces are added")
    add_corpus(command, required=False, prefix="continue: ")
    command.set_defaults(published=False)
    command.add_argument("--out", type=Path, required=True, help="the model file to write")

    command = add_command("report", "compare a tokenizer and its extension on a corpus, language by language")
    command.add_argument("--base", required=True, help="a tokenizer.model, or its folder")
    command.add_argument("--new", required=True, help="the same, extended")
    command.add_argument("--data", required=True, help="a corpus folder")
    command.add_argument("--split", choices=["train", "dev", "test"], default="test", help="what of it is measured [test]")
    command.add_argument("--held-out", type=float, default=1.0,
                         help="its last share, where the corpus has no splits; 1: all of it is the test split [1]")  # fmt: skip
    command.add_argument("--json", type=Path, help="a file for all figures")
    command.add_argument("--plot", type=Path, help="a picture of fertility before and after; takes matplotlib")

    command = add_command("extend", "resize a checkpoint to a merged vocabulary")
    command.add_argument("--model", required=True, help="the checkpoint folder")
    command.add_argument("--tokenizer", required=True, help="the merged model file")
    command.add_argument(
        "--init", choices=INITS, default="subtokens", help="how new rows start, see docs/vocabulary.md [subtokens]"
    )
    command.add_argument("--seed", type=int, default=0, help="of the random initialisations [0]")
    command.add_argument("--data", help="calibrated: a corpus folder; its train split is read")
    command.add_argument("--held-out", type=float, default=0.2,
                         help="calibrated: last share of each language that is not read [0.2]")  # fmt: skip
    command.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="calibrated: where to compute [auto]"
    )
    command.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")

    args = parser.parse_args()
    {"train": run_train, "merge": run_merge, "report": run_report, "extend": run_extend}[args.command](args)


def run_train(args: Namespace) -> None:
    check_numbers(args)
    with atomic_file(args.out, "wb") as file:  # opened first: a wrong path is found before hours of learning
        model = train_pieces(read_words(args), args.size, args.published)
        file.write(model)
    print(f"{args.out}: {len(Tokenizer(model)):,} pieces")


def run_merge(args: Namespace) -> None:
    base = Tokenizer.from_pretrained(args.base)
    if args.method == "union":
        if not args.new or args.data or args.size is not None:
            raise UserError("--method union takes --new, and neither --data nor --size")
        merged = merge(base, Tokenizer.from_pretrained(args.new))
        with atomic_file(args.out, "wb") as file:
            file.write(merged)
    else:
        if not args.data or args.size is None or args.new:
            raise UserError("--method continue takes --data and --size, and no --new")
        check_bpe(base)
        check_numbers(args)
        with atomic_file(args.out, "wb") as file:
            merged = continue_merges(base, read_words(args), args.size)
            file.write(merged)
    print(f"{args.out}: {len(base):,} pieces -> {len(Tokenizer(merged)):,}")


def run_report(args: Namespace) -> None:
    base, new = Tokenizer.from_pretrained(args.base), Tokenizer.from_pretrained(args.new)
    report = compare(base, new, Corpus(args.data, held_out=args.held_out).stream(args.split))
    print_report(report)
    if args.json:
        write_json(args.json, report)
    if args.plot:
        draw_fertility(report, args.plot)


def run_extend(args: Namespace) -> None:
    if (args.init == "calibrated") != bool(args.data):
        raise UserError("--init calibrated, and only that, takes --data")
    check_numbers(args)
    merged = Tokenizer.from_pretrained(args.tokenizer)
    drawn = None
    if args.data:
        drawn = sample(Corpus(args.data, held_out=args.held_out).stream("train"), alpha=0.3, seed=args.seed)
    extend_checkpoint(Path(args.model), merged, args.out, args.init, args.seed, drawn, *choose_device(args.device, "auto"))
    print(f"{args.out}: {len(Tokenizer.from_pretrained(args.model)):,} rows -> {len(merged):,}")


if __name__ == "__main__":
    run(main)
