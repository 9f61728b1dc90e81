"""Continue a BPE tokenizer: learn new pieces on top of those it has, so that every new piece can occur.

A union of two BPE models leaves pieces that no text produces: to build one, an intermediate piece is needed that a merge
of the other model has used up. Here text is first segmented as the base does it, and only then are neighbours merged
further ("Teaching Old Tokenizers New Words", arXiv 2512.03989, does this for byte-level BPE). Each new piece has a lower
score than all before it, so an encoder does everything it did before, and the new merges after that, in the order learnt.

Why every new piece is reachable: when it is learnt, its two halves stand side by side in a word, each the outcome of merges
that stayed within it. Alone between characters that merge with nothing, the same merges happen in the same order, and then
the new one; no later piece has anything left to merge there.
"""

from __future__ import annotations

import heapq
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache

from tqdm import tqdm

from mala.tokenizer import WORD_START

MAX_PIECE = 16  # characters, SentencePiece's own limit
MAX_FRAGMENT = 64  # symbols


def learn_pieces(words: dict[str, int], symbols: dict[str, list[str]], known: dict[str, float], size: int) -> list[str]:
    """The next `size` pieces of a BPE, in order; fewer where the text yields no more.

    words: word -> how often it occurs. symbols: word -> the base's segmentation of it, a character that is no piece
    standing for the bytes that it falls back to. known: piece -> score; a higher score merges first.

    A new piece is the pair of neighbouring pieces, or the character that is no piece yet, which saves the most tokens.
    The savings are counted once and then updated where a new piece changes the text (Sennrich et al., arXiv 1508.07909).
    """
    scores = dict(known)
    fragments: Counter[tuple[str, ...]] = Counter()
    for word, count in words.items():
        for fragment in _fragments(symbols[word]):
            fragments[fragment] += count
    state, counts = list(map(list, fragments)), list(fragments.values())
    savings: Counter[str] = Counter()  # candidate -> tokens that it would save
    places: defaultdict[str, set[int]] = defaultdict(set)  # candidate -> fragments that may hold it
    for place, fragment in enumerate(state):
        for candidate, tokens in _candidates(fragment, scores):
            savings[candidate] += tokens * counts[place]
            places[candidate].add(place)
    # Highest savings first, then by text. An entry is checked against `savings` when it comes up: it may be of yesterday.
    heap = [(-tokens, candidate) for candidate, tokens in savings.items()]
    heapq.heapify(heap)

    learnt: list[str] = []
    lowest = min(known.values())
    with tqdm(total=size, desc="learning pieces", unit="piece", leave=False, disable=None) as bar:
        while heap and len(learnt) < size:
            tokens, piece = heapq.heappop(heap)
            if -tokens != savings[piece]:
                if savings[piece] > 0:
                    heapq.heappush(heap, (-savings[piece], piece))
                continue
            if -tokens < 2:  # a pair seen once: no regularity of a language
                break
            learnt.append(piece)
            bar.update()
            scores[piece] = lowest - len(learnt)
            change: Counter[str] = Counter()
            for place in places.pop(piece):
                old, new = state[place], merge_piece(state[place], piece, scores)
                state[place] = new
                lost, won = _changes(old, new, piece, scores)
                for candidate, saved in lost:
                    change[candidate] -= saved * counts[place]
                for candidate, saved in won:
                    change[candidate] += saved * counts[place]
                    places[candidate].add(place)
            del change[piece], savings[piece]
            for candidate, saved in change.items():
                savings[candidate] += saved
                if saved > 0:
                    heapq.heappush(heap, (-savings[candidate], candidate))
    return learnt


def _fragments(symbols: list[str]) -> Iterator[tuple[str, ...]]:
    """Cut a word where no new piece can lie across. What stands between two spaces may be a whole line, in Chinese or Thai;
    its parts are short and many of them alike. One of more than MAX_FRAGMENT symbols is cut on, at the cost of a pair."""
    start = 0
    for end in range(1, len(symbols) + 1):
        if end == len(symbols) or end - start == MAX_FRAGMENT or not joinable(symbols[end - 1], symbols[end]):
            yield tuple(symbols[start:end])
            start = end


def merge_piece(symbols: list[str], piece: str, scores: dict[str, float]) -> list[str]:
    """BPE as SentencePiece encodes, again and again the neighbours whose union has the highest score, leftmost first; but where
    nothing could be merged until `piece`, with the lowest score of all, came. Only at its places is there something to do,
    and what it brings about there has a higher score, so it comes first."""
    symbols, i = list(symbols), 0
    while i < len(symbols) - 1:
        if len(symbols[i]) + len(symbols[i + 1]) != len(piece) or symbols[i] + symbols[i + 1] != piece:
            i += 1
            continue
        symbols[i : i + 2] = [piece]
        while True:
            pairs = [at for at in (i - 1, i) if 0 <= at < len(symbols) - 1]
            pairs = [at for at in pairs if scores.get(symbols[at] + symbols[at + 1], -math.inf) > scores[piece]]
            if not pairs:
                break
            i = max(pairs, key=lambda at: (scores[symbols[at] + symbols[at + 1]], -at))
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


def _changes(old: list[str], new: list[str], piece: str, scores: dict[str, float]) -> tuple[list, list]:
    """The candidates that a fragment has lost and won with `piece`, as `_candidates` gives them, and some on both sides."""
    if old == new:  # `piece` is a character, now free to join its neighbours; or it is here no more
        lefts = sorted({left for i, symbol in enumerate(new) if symbol == piece for left in (i - 1, i)} - {-1, len(new) - 1})
        return [], [pair for i in lefts for pair in _candidates(new[i : i + 2], scores) if pair[0] == new[i] + new[i + 1]]
    # Where the two differ, and one symbol on either side.
    shorter = min(len(old), len(new))
    start = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    end = next((i for i in range(shorter - start) if old[-1 - i] != new[-1 - i]), shorter - start)
    start, end = max(start - 1, 0), max(end - 1, 0)
    return _candidates(old[start : len(old) - end], scores), _candidates(new[start : len(new) - end], scores)


def _candidates(symbols: list[str], scores: dict[str, float]) -> list[tuple[str, int]]:
    """(new piece, tokens that it saves) for each place in a word: a pair saves one, a character all its bytes but one."""
    found = []
    previous, usable = "", False
    for symbol in symbols:
        if symbol not in scores:
            found.append((symbol, len(symbol.encode()) - 1))
            usable = False
            continue
        # Both halves must be pieces: transformers rebuilds the list of merges from the pieces, and finds only such.
        if usable and len(previous) + len(symbol) <= MAX_PIECE and joinable(previous, symbol):
            found.append((previous + symbol, 1))
        previous, usable = symbol, True
    return found


def joinable(left: str, right: str) -> bool:
    """Whether a piece may hold both: letters with letters, signs with signs, never digits, which LLaMA keeps apart; and
    nothing across the beginning of a word."""
    if WORD_START in right:
        return False
    kinds = _kinds(left.removeprefix(WORD_START)) | _kinds(right)
    return len(kinds) == 1 and "digit" not in kinds


@cache
def _kinds(symbol: str) -> frozenset[str]:
    return frozenset(_kind(character) for character in symbol)


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LM" or character in "\u200c\u200d":  # the joiners shape letters of many scripts
        return "letter"
    return "digit" if category[0] == "N" else "sign"
