"""SentencePiece's BPE: pieces have scores, and the neighbours whose union scores highest merge first.

`merge` makes the union of two models, as MaLA-500 did. Trap: some pieces of a union never occur. On the way
to such a piece, a merge of the other model uses up one of its parts. `Scored` holds the rules for learning
further merges instead (further_merges.py).
"""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby

import numpy as np

from mala.cli import UserError
from mala.words.byte_level import JsonTokenizer
from mala.words.tokenizer import WORD_START, Tokenizer, append_pieces

MAX_PIECE = 16  # characters, SentencePiece's own limit
Scores = dict[str, float]  # piece -> score; higher scores merge first


def merge(base: Tokenizer, new: Tokenizer, published: bool = False) -> bytes:
    """Return the base's model plus each NORMAL piece of `new` that it lacks, with its score, as MaLA-500 did.
    Pieces that the base's normaliser changes are left out: they never occur. Unless `published`, equal scores
    are made distinct: readers break ties differently. Raises UserError for models that are not BPE."""
    if isinstance(base, JsonTokenizer):
        found = "a byte-level BPE, to which a union would add pieces that no text produces"
        raise UserError(f"{base.name}: {found}; learn further merges instead: --method continue")
    base.check_bpe()
    new.check_bpe()
    known = set(base.pieces)
    scores = {piece: score for piece, score in new.scores().items() if piece not in known}
    symbols = {piece for piece, kind in zip(new.pieces, new.types) if kind in (4, 5)}
    normal = base.normalise([piece.replace(WORD_START, " ") for piece in scores])
    changed = {piece for piece, text in zip(scores, normal) if piece != text}
    reasons = {"are user-defined or unused": symbols - known, f"{base.name} normalises away": changed}
    for reason, pieces in reasons.items():
        if pieces:
            some = ", ".join(map(repr, sorted(pieces)[:3]))
            print(f"{new.name}: left out {len(pieces):,} pieces that {reason}: {some}", file=sys.stderr)
    scores = {piece: score for piece, score in scores.items() if piece not in symbols | changed}
    return append_pieces(base, scores if published else distinct(scores, set(base.scores().values())))


def distinct(scores: Scores, taken: set[float]) -> Scores:
    """Return the scores, a little lower where they are `taken`, to which all are added. Scores that are whole
    numbers, as those of SentencePiece are, keep their order."""
    found: Scores = {}
    for piece, score in scores.items():
        while score in taken:
            score = lower(score, 2**-10)
        taken.add(score)
        found[piece] = score
    return found


def lower(score: float, step: float) -> float:
    """Lower a score by `step`, but at least to the next float32. Trap: LLaMA 2 gives its runs of spaces the
    score -1e9, and float32 has steps of 64 there: -1e9 - 1 is -1e9."""
    return float(min(np.float32(score - step), np.nextafter(np.float32(score), np.float32(-np.inf))))


def word_symbols(base: Tokenizer, words: Counter[str]) -> Iterator[tuple[list[str], int]]:
    """Yield (segmentation by the base, count) of each word. Raises UserError if `base` lacks byte pieces."""
    if len(base.byte_ids) < 256:
        raise UserError(f"{base.name}: has no byte pieces, expected 256 to spell unknown characters")
    counts: Counter[str] = Counter()
    for text, count in zip(base.normalise(list(words)), words.values()):
        for word in text.split(WORD_START):  # a normaliser may turn characters into spaces
            counts[WORD_START + word] += count if word else 0
    for word, ids in zip(counts, base.segment(list(counts))):
        if all(base.types[id] != 4 for id in ids):  # user-defined symbols never merge: skip the word
            yield _symbols(base, word, ids), counts[word]


def _symbols(base: Tokenizer, word: str, ids: list[int]) -> list[str]:
    """Return the pieces of a word's segmentation. A character spelled in bytes becomes one symbol."""
    symbols = []
    for in_bytes, group in groupby(ids, base.byte_ids.__contains__):
        pieces = [base.pieces[i] for i in group]
        if in_bytes:  # <0xE1> <0x8C> <0xA4> is one character
            pieces = bytes.fromhex("".join(piece[3:5] for piece in pieces)).decode(errors="replace")
        symbols += pieces  # of a text in bytes: its characters
    if (read := "".join(symbols)) != word:
        raise UserError(f"{base.name}: segments {word!r} as {read!r}, expected tokens that spell the word")
    return symbols


class Scored:
    """SentencePiece's rules: neighbours whose union is a piece merge, highest first. scores: the base's."""

    takes_words = False  # a word is always built from its characters

    def __init__(self, scores: Scores):
        self.scores, self.lowest = dict(scores), min(scores.values())

    def joinable(self, left: str, right: str) -> bool:
        """Return whether one piece may hold both: letters with letters, or signs with signs. LLaMA keeps
        digits apart, so they never join. Nothing joins across the beginning of a word."""
        kinds = _kinds(left.removeprefix(WORD_START)) | _kinds(right)
        return WORD_START not in right and kinds in ({"letter"}, {"sign"})

    def candidates(self, symbols: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Yield (new piece, tokens that it saves) for each place in a fragment. A character saves all its
        bytes except one, a pair one token. Readers rebuild merges from pieces: both halves must be pieces."""
        for symbol in symbols:
            if symbol not in self.scores:
                yield symbol, len(symbol.encode()) - 1
        for left, right in zip(symbols, symbols[1:]):
            if left in self.scores and right in self.scores and len(left) + len(right) <= MAX_PIECE:
                yield left + right, 1

    def learn(self, piece: str) -> None:
        self.lowest -= 1  # only the order matters, see `append_scored`
        self.scores[piece] = self.lowest

    def merge(self, symbols: Sequence[str], piece: str) -> list[str]:
        """Merge `piece` in symbols that all earlier merges have been applied to. `piece` scores lowest: where
        it arises it may merge on with its neighbours, and these merges come before it arises elsewhere."""
        symbols, scores, i = list(symbols), self.scores, 0
        while i < len(symbols) - 1:
            if symbols[i] + symbols[i + 1] != piece:
                i += 1
                continue
            pairs = [i]
            while pairs:
                i = max(pairs, key=lambda at: scores[symbols[at] + symbols[at + 1]])  # the leftmost of equals
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
                pairs = [at for at in (i - 1, i) if 0 <= at < len(symbols) - 1]
                pairs = [at for at in pairs if symbols[at] + symbols[at + 1] in scores]
        return symbols


@cache
def _kinds(symbol: str) -> set[str]:
    """Return the kinds of a symbol's characters. U+200C and U+200D, which shape letters, count as letters."""
    kinds = {"L": "letter", "M": "letter", "N": "digit"}
    return {kinds.get("L" if c in "\u200c\u200d" else unicodedata.category(c)[0], "sign") for c in symbol}


def append_scored(base: Tokenizer, pieces: list[str]) -> bytes:
    """Return the base's model with further pieces, each with a lower score than all before it."""
    score, scores = min(base.scores().values()), {}
    for piece in pieces:
        scores[piece] = score = lower(score, 1)
    return append_pieces(base, scores)
