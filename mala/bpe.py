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
import unicodedata
from collections import Counter, defaultdict
from functools import cache

from tqdm import tqdm

from mala.tokenizer import WORD_START

MAX_PIECE = 16  # characters, SentencePiece's own limit


def learn_pieces(words: dict[str, int], symbols: dict[str, list[str]], known: dict[str, float], size: int) -> list[str]:
    """The next `size` pieces of a BPE, in order; fewer where the text yields no more.

    words: word -> how often it occurs. symbols: word -> the base's segmentation of it, a character that is no piece
    standing for the bytes that it falls back to. known: piece -> score; a higher score merges first.

    A new piece is the pair of neighbouring pieces, or the character that is no piece yet, which saves the most tokens.
    The savings are counted once and then updated where a new piece changes a word (Sennrich et al., arXiv 1508.07909).
    """
    scores = dict(known)
    counts, state = list(words.values()), [symbols[word] for word in words]
    savings: Counter[str] = Counter()  # candidate -> tokens that it would save
    places: defaultdict[str, set[int]] = defaultdict(set)  # candidate -> words that may hold it
    for word in range(len(state)):
        for candidate, tokens in _candidates(state[word], scores):
            savings[candidate] += tokens * counts[word]
            places[candidate].add(word)
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
            if -tokens < 2:  # seen once: no regularity of a language
                break
            learnt.append(piece)
            bar.update()
            affected = places.pop(piece)
            before = [_candidates(state[word], scores) for word in affected]
            scores[piece] = lowest - len(learnt)
            risen = set()
            for word, old in zip(affected, before):
                state[word] = merge_symbols(state[word], scores)
                for candidate, saved in old:
                    savings[candidate] -= saved * counts[word]
                for candidate, saved in _candidates(state[word], scores):
                    savings[candidate] += saved * counts[word]
                    places[candidate].add(word)
                    risen.add(candidate)
            for candidate in risen:
                heapq.heappush(heap, (-savings[candidate], candidate))
            del savings[piece]
    return learnt


def merge_symbols(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """BPE as SentencePiece encodes: again and again merge the neighbours whose union has the highest score, leftmost first."""
    symbols = list(symbols)
    while True:
        best, at = None, -1
        for i in range(len(symbols) - 1):
            score = scores.get(symbols[i] + symbols[i + 1])
            if score is not None and (best is None or score > best):
                best, at = score, i
        if best is None:
            return symbols
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


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
    """Whether a piece may hold both: letters with letters, signs with the same kind of signs, never digits.

    LLaMA splits numbers into digits, and SentencePiece learns no piece across scripts or across a word's end.
    """
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
