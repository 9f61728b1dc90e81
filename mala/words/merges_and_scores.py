"""SentencePiece's BPE: pieces have scores, and the neighbours whose union has the highest are merged first.

`merge` makes a union of two models, as MaLA-500. Some of its pieces no text produces: to build one, an
intermediate piece is needed that a merge of the other model has used up. `Unions` is how further merges are
learnt instead (further_merges.py).
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
Scores = dict[str, float]  # piece -> score; the higher is merged first


def merge(base: Tokenizer, new: Tokenizer, published: bool = False) -> bytes:
    """`merge --method union`, as MaLA-500: the base's model, then each NORMAL piece of `new` that it lacks,
    with its score. What the base's normaliser changes is left out: no text holds it. Unless `published`, no
    new piece has another's score: readers would rank them differently. Raises UserError for no BPE model."""
    if isinstance(base, JsonTokenizer):
        found = "a tokenizer.json, to which a union would add tokens that no text encodes to"
        raise UserError(f"{base.name}: {found}; learn further merges instead: --method continue")
    base.check_bpe()
    new.check_bpe()
    known = set(base.pieces)
    scores = {piece: score for piece, score in new.scores().items() if piece not in known}
    symbols = {piece for piece, kind in zip(new.pieces, new.types) if kind in (4, 5)}
    normal = base.normalise([piece.replace(WORD_START, " ") for piece in scores])
    changed = {piece for piece, text in zip(scores, normal) if piece != text}
    reasons = {"user-defined or unused": symbols - known, f"{base.name} normalises them away": changed}
    for reason, pieces in reasons.items():
        if pieces:
            some = ", ".join(map(repr, sorted(pieces)[:3]))
            print(f"{new.name}: left out {len(pieces):,} pieces, {reason}: {some}", file=sys.stderr)
    scores = {piece: score for piece, score in scores.items() if piece not in symbols | changed}
    return append_pieces(base, scores if published else distinct(scores, set(base.scores().values())))


def distinct(scores: Scores, taken: set[float]) -> Scores:
    """The scores, each a little lower where it was `taken`, so that the order of unequal ones stays."""
    found: Scores = {}
    for piece, score in scores.items():
        while score in taken:
            score = lower(score, 2**-10)
        taken.add(score)
        found[piece] = score
    return found


def lower(score: float, step: float) -> float:
    """Trap: LLaMA 2 scores its runs of spaces -1e9, where float32 goes in steps of 64: -1e9 - 1 is -1e9."""
    return float(min(np.float32(score - step), np.nextafter(np.float32(score), np.float32(-np.inf))))


def sentence_symbols(base: Tokenizer, words: Counter[str]) -> Iterator[tuple[list[str], int]]:
    """(segmentation by the base, how often) for each word of a text. Raises UserError for a base without the
    bytes that spell characters which are no pieces."""
    if len(base.byte_ids) < 256:
        raise UserError(f"{base.name}: has no byte pieces, expected 256, for characters that are no pieces")
    counts: Counter[str] = Counter()
    for text, count in zip(base.normalise(list(words)), words.values()):
        for word in text.split(WORD_START):  # a normaliser may make spaces of characters
            counts[WORD_START + word] += count if word else 0
    for word, ids in zip(counts, base.segment(list(counts))):
        if all(base.types[id] != 4 for id in ids):  # user-defined symbols are cut out: nothing merges there
            yield _symbols(base, word, ids), counts[word]


def _symbols(base: Tokenizer, word: str, ids: list[int]) -> list[str]:
    """The pieces of a word's segmentation; a character that falls back to bytes is one symbol."""
    symbols = []
    for in_bytes, group in groupby(ids, base.byte_ids.__contains__):
        pieces = [base.pieces[i] for i in group]
        if in_bytes:  # <0xE1> <0x8C> <0xA4> is one character
            pieces = bytes.fromhex("".join(piece[3:5] for piece in pieces)).decode(errors="replace")
        symbols += pieces
    if (read := "".join(symbols)) != word:
        raise UserError(f"{base.name}: reads {word!r} as {read!r}; expected the word, from pieces and bytes")
    return symbols


class Unions:
    """How SentencePiece merges: neighbours whose union is a piece, the highest first. scores: the base's."""

    takes_words = False  # each is put together from its characters

    def __init__(self, scores: Scores):
        self.scores, self.lowest = dict(scores), min(scores.values())

    def joinable(self, left: str, right: str) -> bool:
        """Whether a piece may hold both: letters with letters, signs with signs, never digits, which LLaMA
        keeps apart; and nothing across the beginning of a word."""
        kinds = _kinds(left.removeprefix(WORD_START)) | _kinds(right)
        return WORD_START not in right and kinds in ({"letter"}, {"sign"})

    def candidates(self, symbols: Sequence[str]) -> Iterator[tuple[str, int]]:
        """(new piece, tokens that it saves) for each place in a fragment: a character saves all its bytes but
        one, a pair of pieces one token: readers rebuild the merges from pieces."""
        for symbol in symbols:
            if symbol not in self.scores:
                yield symbol, len(symbol.encode()) - 1
        for left, right in zip(symbols, symbols[1:]):
            if left in self.scores and right in self.scores and len(left) + len(right) <= MAX_PIECE:
                yield left + right, 1

    def learn(self, piece: str) -> None:
        self.lowest -= 1  # only an order, see `append_unions`
        self.scores[piece] = self.lowest

    def merge(self, symbols: Sequence[str], piece: str) -> list[str]:
        """Encode on symbols in which nothing could be merged until `piece` came. It has the lowest score, so
        only where it arises can more be merged, and that comes before it arises elsewhere."""
        symbols, scores, i = list(symbols), self.scores, 0
        while i < len(symbols) - 1:
            if symbols[i] + symbols[i + 1] != piece:
                i += 1
                continue
            pairs = [i]
            while pairs:
                i = max(pairs, key=lambda at: scores[symbols[at] + symbols[at + 1]])  # the left of equal ones
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
                pairs = [at for at in (i - 1, i) if 0 <= at < len(symbols) - 1]
                pairs = [at for at in pairs if symbols[at] + symbols[at + 1] in scores]
        return symbols


@cache
def _kinds(symbol: str) -> set[str]:
    """Of the characters in a symbol; the joiners U+200C and U+200D shape the letters of many scripts."""
    kinds = {"L": "letter", "M": "letter", "N": "digit"}
    return {kinds.get("L" if c in "\u200c\u200d" else unicodedata.category(c)[0], "sign") for c in symbol}


def append_unions(base: Tokenizer, pieces: list[str]) -> bytes:
    """The base's model and further pieces, each with a lower score than all before it."""
    score, scores = min(base.scores().values()), {}
    for piece in pieces:
        scores[piece] = score = lower(score, 1)
    return append_pieces(base, scores)
