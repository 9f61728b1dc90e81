"""Further merges on top of a BPE: `merge --method continue`.

Text is segmented as the base does, and then neighbours are merged further ("Teaching Old Tokenizers New
Words", arXiv 2512.03989). Each new merge comes after all before it, so an encoder does what it did before,
and then the new merges. The learner is one; what may be merged, and how it is written, differs between a
SentencePiece model (`Unions` in merges_and_scores.py) and a tokenizer.json (`Pairs` in byte_level.py).

Why every new piece is reachable: when it is learnt, its two halves stand side by side in a word, each the
outcome of merges that stayed within it. Alone between characters that merge with nothing, the same merges
happen in the same order, and then the new one; no later piece has anything left to merge there.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from mala.cli import UserError
from mala.words.byte_level import JsonTokenizer, Pair, Pairs, append_pairs
from mala.words.merges_and_scores import Unions, append_unions, sentence_symbols
from mala.words.tokenizer import Tokenizer

MAX_FRAGMENT = 64  # symbols


def continue_merges(base: Tokenizer, words: Counter[str], size: int) -> bytes:
    """The base's file with `size` more pieces, learnt from `words`, which are what `base.words` gives. Raises
    UserError for a base that cannot be extended so, and if the text yields fewer pieces."""
    base.check_bpe()
    if isinstance(base, JsonTokenizer):
        rules, append = Pairs(base.pieces, base.fast.model.ignore_merges), append_pairs
        symbols = ([base.pieces[id] for id in ids] for ids in base.segment(list(words)))
        learnt = learn(zip(symbols, words.values()), rules, size)
    else:
        rules, append = Unions(base.scores()), append_unions
        learnt = learn(sentence_symbols(base, words), rules, size)
    if (found := len(learnt)) < size:
        raise UserError(f"cannot learn {size} pieces from this corpus: it yields {found}; ask for as many")
    return append(base, learnt)


def learn(words: Iterable[tuple[Sequence[str], int]], rules: Unions | Pairs, size: int) -> list[str | Pair]:
    """The next `size` merges of a BPE, in order; fewer if the text yields no more. words: (segmentation by
    the base, how often it occurs) of each.

    Of the candidates that `rules` sees the next is the one that saves the most tokens; of several such, the
    first by text. The savings are counted once, and after that only in the fragments of words that a merge
    changes (Sennrich et al., arXiv 1508.07909).
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for symbols, times in words:
        for fragment in _fragments(symbols, rules):
            counts[fragment] += times
    fragments, times = list(counts), list(counts.values())
    whole = {"".join(fragment): at for at, fragment in enumerate(fragments)} if rules.takes_words else {}
    savings: defaultdict[str | Pair, int] = defaultdict(int)  # candidate -> the tokens that it would save
    places: defaultdict[str | Pair, set[int]] = defaultdict(set)  # candidate -> fragments that may hold it
    for place, fragment in enumerate(fragments):
        for candidate, tokens in rules.candidates(fragment):
            savings[candidate] += tokens * times[place]
            places[candidate].add(place)
    heap = [(-tokens, candidate) for candidate, tokens in savings.items()]
    heapq.heapify(heap)

    learnt: dict[str, str | Pair] = {}  # piece -> the merge that makes it
    with tqdm(total=size, desc="learning pieces", unit="piece", leave=False, disable=None) as bar:
        while heap and len(learnt) < size:
            tokens, merge = heapq.heappop(heap)
            piece = "".join(merge)
            if -tokens != savings[merge]:  # it saves less by now: an entry is not changed before it comes up
                if savings[merge] > 0:
                    heapq.heappush(heap, (-savings[merge], merge))
                continue
            if -tokens < 2:  # a pair seen once: no regularity of a language
                break
            if piece in learnt:  # from another pair
                continue
            changed, grown = places.pop(merge), set()
            if piece in whole:
                changed.add(whole[piece])
            for place in changed:
                for candidate, tokens in rules.candidates(fragments[place]):
                    savings[candidate] -= tokens * times[place]
            learnt[piece] = merge
            rules.learn(merge)
            for place in changed:
                fragments[place] = rules.merge(fragments[place], merge)
                for candidate, tokens in rules.candidates(fragments[place]):
                    savings[candidate] += tokens * times[place]
                    if piece in candidate:  # no other candidate can save more than before
                        places[candidate].add(place)
                        grown.add(candidate)
            for candidate in grown:
                heapq.heappush(heap, (-savings[candidate], candidate))
            bar.update()
    return list(learnt.values())


def _fragments(symbols: Sequence[str], rules: Unions | Pairs) -> Iterator[tuple[str, ...]]:
    """Cut a word where no new piece can lie across: in a fragment all neighbours are joinable, and stay so. A
    "word" of Chinese or Thai may be a whole line: parts of it are alike, and long ones cost a pair a cut."""
    start = 0
    for end in range(1, len(symbols) + 1):
        is_cut = end == len(symbols) or end - start == MAX_FRAGMENT
        if is_cut or not rules.joinable(symbols[end - 1], symbols[end]):
            yield tuple(symbols[start:end])
            start = end
