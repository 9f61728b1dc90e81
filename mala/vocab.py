"""Extend a LLaMA vocabulary with the words of new languages: learn pieces, merge them in, give each a row to start from.

    python -m mala.vocab train  --data CORPUS --size 250000 --out new.model
    python -m mala.vocab merge  --base tokenizer.model --new new.model --out merged.model
    python -m mala.vocab merge  --method continue --base tokenizer.model --data CORPUS --size 16000 --out merged.model
    python -m mala.vocab extend --model BASE --tokenizer merged.model --out DIR

A `tokenizer.model` is a serialized protobuf message `ModelProto { repeated SentencePiece pieces = 1; ... }` with
`SentencePiece { string piece = 1; float score = 2; Type type = 3; }` (sentencepiece_model.proto). Two serialized messages
put end to end are one message: repeated fields are joined, single ones take the later value. So a merge appends bytes.
"""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

from mala.bpe import WORD_START, learn_pieces, merge_symbols
from mala.checkpoint import atomic_directory, atomic_file
from mala.cli import ArgumentParser, UserError, run
from mala.data import Corpus, language_shares
from mala.model import Llama
from mala.tokenizer import Tokenizer


def sample(documents: dict[str, list[str]], alpha: float, seed: int) -> Iterator[str]:
    """As many documents as there are, but each language's share proportional to n^alpha, n its number of documents.

    A language that falls short of its share is repeated, one beyond it is cut to a random choice.
    """
    sizes = [len(texts) for texts in documents.values()]
    counts = np.ceil(language_shares(sizes, alpha) * sum(sizes)).astype(int)
    rng = np.random.default_rng(seed)
    for texts, count in zip(documents.values(), counts):
        for _ in range(count // len(texts)):
            yield from texts
        for index in sorted(rng.choice(len(texts), size=count % len(texts), replace=False)):
            yield texts[index]


def train_pieces(documents: Iterable[str], size: int, standalone: bool = False) -> bytes:
    """Learn a SentencePiece BPE model of `size` pieces; returns the serialized ModelProto.

    The settings are LLaMA 2's, so that the pieces match text as the base tokenizer normalises it (that is, not at all).
    Pieces to be merged into a base cover every character, and the base falls back to bytes; a tokenizer that stands alone
    spells rare characters in bytes, as LLaMA 2's does.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # A document may hold several lines, SentencePiece learns from single ones; ▅ it keeps to itself, and drops
            # every line that holds it.
            sentence_iterator=(line.replace("▅", " ") for text in documents for line in text.splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            character_coverage=0.99995 if standalone else 1.0,
            byte_fallback=standalone,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2**30,  # bytes; longer lines would be dropped in silence, by default beyond 4,192
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        raise UserError(f"cannot learn {size} pieces from this corpus: {reason}") from None
    return model.getvalue()


def merge(base: Tokenizer, new: Tokenizer) -> bytes:
    """The base's pieces, ids and scores unchanged; then each piece of `new` that the base lacks, with its score.

    Control, unknown and byte pieces of `new` are left out: those of a LLaMA tokenizer stay the base's. This is MaLA-500's
    procedure; it leaves pieces that no text produces, which `continue_merges` does not.
    """
    known = set(base.pieces)
    return append_pieces(base, {piece: score for piece, score in new.scores().items() if piece not in known})


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


def continue_merges(base: Tokenizer, documents: Iterable[str], size: int) -> bytes:
    """`merge --method continue`: at most `size` pieces learnt on top of the base's own merges (see mala/bpe.py).

    Each is scored below every base piece and below the one before. Raises UserError where the base is no BPE model, and
    where the text yields fewer pieces.
    """
    counts = Counter(WORD_START + word for text in documents for word in text.split(" ") if word)
    known = base.scores()
    symbols = {}
    for word, ids in zip(counts, segment(base, list(counts))):
        # To the merges a character that falls back to bytes is one symbol: it becomes bytes only after them.
        symbols[word] = merge_symbols(list(word), known)
        encoded = [base.processor.id_to_piece(i) for i in ids]
        if [piece for piece in encoded if piece in known] != [symbol for symbol in symbols[word] if symbol in known]:
            raise UserError(f"{base.name}: segments {word!r} otherwise than its scores say; continue takes a BPE model as base")
    pieces = learn_pieces(counts, symbols, known, size)
    if len(pieces) < size:
        raise UserError(f"cannot learn {size} pieces from this corpus: it yields {len(pieces)}; ask for as many")
    score, scores = np.float32(min(known.values())), {}
    for piece in pieces:
        # Trap: LLaMA 2 scores its runs of spaces -1e9, and there float32 goes in steps of 64: -1e9 - 1 is -1e9.
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        scores[piece] = float(score)
    return append_pieces(base, scores)


def segment(base: Tokenizer, pieces: list[str]) -> list[list[int]]:
    """The base's own segmentation of each piece's text, `▁` being the space that it stands for; never empty.

    The base would put a word start before every text; here it must not, since a piece may begin within a word. Field 3 of
    a ModelProto is its NormalizerSpec and field 3 of that is `add_dummy_prefix`: appended, the last value (0) counts.
    """
    bare = Tokenizer(base.model + b"\x1a\x02\x18\x00", base.name)
    segments = bare.encode_batch([piece.replace(WORD_START, " ") for piece in pieces])
    if not all(segments):
        raise UserError(f"{base.name}: drops characters (its normalisation is not LLaMA's), so pieces have no segmentation")
    return segments


@torch.no_grad()
def extend_model(model: Llama, base: Tokenizer, merged: Tokenizer) -> None:
    """Give `embed_tokens` and `lm_head` a row for every piece that `merged` adds to `base`.

    A new row is the mean of the base rows of the piece's base segmentation (`--init subtokens`): what the base model, which
    had to read and write the piece in these parts, knows of it. The mean is taken in float32.
    Raises UserError where `base` does not fit the model or `merged` does not begin with all of `base`.
    """
    base.check_fits(model.config.vocab_size)
    if merged.pieces[: len(base)] != base.pieces:
        raise UserError(f"{merged.name}: does not begin with the pieces of {base.name}; extend the model's own tokenizer")
    segments = segment(base, merged.pieces[len(base) :])
    ids = torch.tensor([token for tokens in segments for token in tokens], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(tokens) for tokens in segments)], dtype=torch.int64).cumsum(0)[:-1]

    def extended(matrix: torch.Tensor) -> torch.Tensor:
        old = matrix[: len(base)]  # (V_base, D): a checkpoint may hold rows beyond its tokenizer, to pad its shape
        rows = F.embedding_bag(ids.to(old.device), old.float(), offsets.to(old.device), mode="mean")  # (V_new, D)
        return torch.cat([old, rows.to(old.dtype)])

    model.replace_vocabulary(extended(model.model["embed_tokens"].weight), extended(model.lm_head.weight))


def save_extended(model: Llama, tokenizer: Tokenizer, directory: Path, replace: bool = False) -> None:
    """A checkpoint folder with its tokenizer, whole or not at all."""
    with atomic_directory(directory, replace) as temporary:
        model.save_pretrained(temporary)
        (temporary / "tokenizer.model").write_bytes(tokenizer.model)


def main() -> None:
    parser = ArgumentParser(prog="python -m mala.vocab", description="Extend a LLaMA vocabulary.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="learn a SentencePiece BPE model from a corpus")
    command.add_argument("--data", required=True, help="a corpus folder; its train split is read")
    command.add_argument("--size", type=int, required=True, help="number of pieces")
    command.add_argument("--alpha", type=float, default=0.3, help="languages are sampled by n^alpha [0.3]")
    command.add_argument("--held-out", type=float, default=0.2, help="last share of each language that is not read [0.2]")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, required=True, help="the model file to write")

    command = commands.add_parser("merge", help="add pieces to a base model")
    command.add_argument("--base", required=True, help="tokenizer.model of the checkpoint, or its folder")
    method = "union: the pieces of --new, as MaLA-500 did; continue: further merges, learnt on --data [union]"
    command.add_argument("--method", choices=["union", "continue"], default="union", help=method)
    command.add_argument("--new", help="union: the model whose pieces are added")
    command.add_argument("--data", help="continue: a corpus folder; its train split is read")
    command.add_argument("--size", type=int, help="continue: number of pieces to add")
    command.add_argument("--alpha", type=float, default=0.3, help="continue: languages are sampled by n^alpha [0.3]")
    command.add_argument("--held-out", type=float, default=0.2, help="continue: last share of each language not read [0.2]")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, required=True, help="the model file to write")

    command = commands.add_parser("extend", help="resize a checkpoint to a merged vocabulary")
    command.add_argument("--model", required=True, help="the checkpoint folder")
    command.add_argument("--tokenizer", required=True, help="the merged model file")
    command.add_argument("--init", choices=["subtokens"], default="subtokens", help="how new rows start [subtokens]")
    command.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")

    args = parser.parse_args()
    if args.command == "train":
        if args.size < 1 or args.seed < 0 or args.alpha < 0:
            raise UserError("--size is a positive number, --seed and --alpha are 0 or more")
        documents = Corpus(args.data, held_out=args.held_out).load("train")
        with atomic_file(args.out, "wb") as file:  # opened first: a wrong path is found before hours of learning
            model = train_pieces(sample(documents, args.alpha, args.seed), args.size)
            file.write(model)
        print(f"{args.out}: {len(Tokenizer(model)):,} pieces from {len(documents)} languages")
    elif args.command == "merge":
        base = Tokenizer.from_pretrained(args.base)
        if args.method == "union":
            if not args.new or args.data or args.size:
                raise UserError("--method union takes --new, and neither --data nor --size")
            merged = merge(base, Tokenizer.from_pretrained(args.new))
        else:
            if not args.data or not args.size or args.size < 1 or args.new:
                raise UserError("--method continue takes --data and a positive --size, and no --new")
            documents = Corpus(args.data, held_out=args.held_out).load("train")
            merged = continue_merges(base, sample(documents, args.alpha, args.seed), args.size)
        with atomic_file(args.out, "wb") as file:
            file.write(merged)
        print(f"{args.out}: {len(base):,} pieces -> {len(Tokenizer(merged)):,}")
    else:
        if args.out.exists():
            raise UserError(f"{args.out}: the output folder exists; name another or remove it first")
        base, merged = Tokenizer.from_pretrained(args.model), Tokenizer.from_pretrained(args.tokenizer)
        model = Llama.from_pretrained(args.model)
        extend_model(model, base, merged)
        save_extended(model, merged, args.out)
        print(f"{args.out}: {len(base):,} rows -> {len(merged):,}")


if __name__ == "__main__":
    run(main)
