"""Merge pieces into a BPE model, each with its score: the higher of two scores is merged first.

`merge` makes a union of two models. Some of its pieces no text produces: to build one, an intermediate piece
is needed that a merge of the other model has used up. `continue_merges` segments text as the base does, and
then merges neighbours further ("Teaching Old Tokenizers New Words", arXiv 2512.03989, for byte-level BPE).
Each new piece scores below all before it, so an encoder does what it did before, and then the new merges.

Why every new piece is reachable: when it is learnt, its two halves stand side by side in a word, each the
outcome of merges that stayed within it. Alone between characters that merge with nothing, the same merges
happen in the same order, and then the new one; no later piece has anything left to merge there.
"""

import heapq
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby

import numpy as np
from tqdm import tqdm

from mala.cli import UserError
from mala.words.tokenizer import WORD_START, Tokenizer, append_pieces

MAX_PIECE = 16  # characters, SentencePiece's own limit
MAX_FRAGMENT = 64  # symbols
Scores = dict[str, float]  # piece -> score; the higher is merged first


def merge(base: Tokenizer, new: Tokenizer, published: bool = False) -> bytes:
    """`merge --method union`, as MaLA-500: the base's model, then each NORMAL piece of `new` that it lacks,
    with its score. What the base's normaliser changes is left out: no text holds it. Unless `published`, no
    new piece has another's score: readers would rank them differently. Raises UserError for no BPE model."""
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


def continue_merges(base: Tokenizer, words: Counter[str], size: int) -> bytes:
    """`merge --method continue`: the base's model, then `size` pieces learnt on top of its own merges, each
    with a lower score. Raises UserError for no BPE model with bytes, and if the text yields fewer pieces."""
    base.check_bpe()
    if len(base.byte_ids) < 256:
        raise UserError(f"{base.name}: has no byte pieces, expected 256, for characters that are no pieces")
    counts: Counter[str] = Counter()
    for text, count in zip(base.normalise(list(words)), words.values()):
        for word in text.split(WORD_START):  # a normaliser may make spaces of characters
            counts[WORD_START + word] += count if word else 0
    known, symbols = base.scores(), {}
    for word, ids in zip(counts, base.segment(list(counts))):
        if all(base.types[id] != 4 for id in ids):  # user-defined symbols are cut out: nothing merges there
            symbols[word] = _symbols(base, word, ids)
    pieces = learn_pieces(counts, symbols, known, size)
    if (found := len(pieces)) < size:
        raise UserError(f"cannot learn {size} pieces from this corpus: it yields {found}; ask for as many")
    score, scores = min(known.values()), {}
    for piece in pieces:
        scores[piece] = score = lower(score, 1)
    return append_pieces(base, scores)


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


def learn_pieces(words: dict[str, int], symbols: dict[str, list[str]], known: Scores, size: int) -> list[str]:
    """The next `size` pieces of a BPE, in order; fewer if the text yields no more. words: word -> how often.
    symbols: word -> its segmentation by `_symbols`. known: the base's pieces.

    A new piece is the pair of neighbouring pieces, or the character that is no piece yet, which saves the
    most tokens; of several such, the first by text. The savings are counted once, and after that only in the
    fragments of words that a new piece changes (Sennrich et al., arXiv 1508.07909).
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for word, parts in symbols.items():
        for fragment in _fragments(parts):
            counts[fragment] += words[word]
    fragments: list[Sequence[str]] = list(counts)
    times, scores, lowest = list(counts.values()), dict(known), min(known.values())
    savings: defaultdict[str, int] = defaultdict(int)  # candidate -> the tokens that it would save
    places: defaultdict[str, set[int]] = defaultdict(set)  # candidate -> the fragments that may hold it
    for place, fragment in enumerate(fragments):
        for candidate, tokens in _candidates(fragment, scores):
            savings[candidate] += tokens * times[place]
            places[candidate].add(place)
    heap = [(-tokens, candidate) for candidate, tokens in savings.items()]
    heapq.heapify(heap)

    learnt: list[str] = []
    with tqdm(total=size, desc="learning pieces", unit="piece", leave=False, disable=None) as bar:
        while heap and len(learnt) < size:
            tokens, piece = heapq.heappop(heap)
            if -tokens != savings[piece]:  # it saves less by now: an entry is not changed before it comes up
                if savings[piece] > 0:
                    heapq.heappush(heap, (-savings[piece], piece))
                continue
            if -tokens < 2:  # a pair seen once: no regularity of a language
                break
            changed, grown = places.pop(piece), set()
            for place in changed:
                for candidate, tokens in _candidates(fragments[place], scores):
                    savings[candidate] -= tokens * times[place]
            learnt.append(piece)
            scores[piece] = lowest - len(learnt)  # only an order, see `continue_merges`
            for place in changed:
                fragments[place] = merge_piece(fragments[place], piece, scores)
                for candidate, tokens in _candidates(fragments[place], scores):
                    savings[candidate] += tokens * times[place]
                    if piece in candidate:  # no other candidate can save more than before
                        places[candidate].add(place)
                        grown.add(candidate)
            for candidate in grown:
                heapq.heappush(heap, (-savings[candidate], candidate))
            bar.update()
    return learnt


def _fragments(symbols: list[str]) -> Iterator[tuple[str, ...]]:
    """Cut a word where no new piece can lie across: in a fragment all neighbours are joinable, and stay so. A
    "word" of Chinese or Thai may be a whole line: parts of it are alike, and long ones cost a pair a cut."""
    start = 0
    for end in range(1, len(symbols) + 1):
        if end == len(symbols) or end - start == MAX_FRAGMENT or not joinable(symbols[end - 1], symbols[end]):
            yield tuple(symbols[start:end])
            start = end


def merge_piece(symbols: Sequence[str], piece: str, scores: Scores) -> list[str]:
    """Encode on, as SentencePiece does, symbols in which nothing could be merged until `piece` came. BPE
    merges again and again the neighbours whose union has the highest score, leftmost first. `piece` has the
    lowest, so only where it arises can more be merged, and that comes before it arises elsewhere."""
    symbols, i = list(symbols), 0
    while i < len(symbols) - 1:
        if symbols[i] + symbols[i + 1] != piece:
            i += 1
            continue
        pairs = [i]
        while pairs:
            i = max(pairs, key=lambda at: scores[symbols[at] + symbols[at + 1]])  # the left one of equal ones
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            pairs = [at for at in (i - 1, i) if 0 <= at < len(symbols) - 1]
            pairs = [at for at in pairs if symbols[at] + symbols[at + 1] in scores]
    return symbols


def _candidates(symbols: Sequence[str], scores: Scores) -> list[tuple[str, int]]:
    """(new piece, tokens that it saves) for each place in a fragment: a character saves all its bytes but
    one, a pair one token. Both its halves are pieces, since transformers rebuilds the merges from pieces."""
    characters = [(symbol, len(symbol.encode()) - 1) for symbol in symbols if symbol not in scores]
    pairs = zip(symbols, symbols[1:])
    pairs = [a + b for a, b in pairs if a in scores and b in scores and len(a) + len(b) <= MAX_PIECE]
    return characters + [(pair, 1) for pair in pairs]


def joinable(left: str, right: str) -> bool:
    """Whether a piece may hold both: letters with letters, signs with signs, never digits, which LLaMA keeps
    apart; and nothing across the beginning of a word."""
    kinds = _kinds(left.removeprefix(WORD_START)) | _kinds(right)
    return WORD_START not in right and kinds in ({"letter"}, {"sign"})


@cache
def _kinds(symbol: str) -> set[str]:
    """Of the characters in a symbol; the joiners U+200C and U+200D shape the letters of many scripts."""
    kinds = {"L": "letter", "M": "letter", "N": "digit"}
    return {kinds.get("L" if c in "\u200c\u200d" else unicodedata.category(c)[0], "sign") for c in symbol}
