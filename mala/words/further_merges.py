"""Learn further merges on top of a base BPE: `merge --method continue`.

The base segments the text, then neighbouring pieces are merged further ("Teaching Old Tokenizers New Words",
arXiv 2512.03989). New merges come after all old ones, so an encoder first does what it did before. This
learner serves SentencePiece models and tokenizer.json files. They differ in what may be merged and how it is
written: see `Scored` in merges_and_scores.py and `Pairs` in byte_level.py.

Every new piece is reachable. When it is learnt, its two halves are neighbours in a word, and each half arose
by merges inside itself. If the piece stands between characters that merge with nothing, an encoder repeats
these merges in the same order, then joins the halves. Later merges find nothing left to merge there.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from mala.cli import UserError
from mala.words.byte_level import JsonTokenizer, Pair, Pairs, append_pairs
from mala.words.merges_and_scores import Scored, append_scored, word_symbols
from mala.words.tokenizer import Tokenizer

MAX_FRAGMENT = 64  # symbols


def continue_merges(base: Tokenizer, words: Counter[str], size: int) -> bytes:
    """Return the base's file with `size` more pieces. words: counts of the words that `base.words` yields.
    Raises UserError if the base cannot be extended or the text yields fewer pieces."""
    base.check_bpe()
    if isinstance(base, JsonTokenizer):
        rules, append = Pairs(base.pieces, base.fast.model.ignore_merges), append_pairs
        symbols = ([base.pieces[id] for id in ids] for ids in base.segment(list(words)))
        learnt = learn(zip(symbols, words.values()), rules, size)
    else:
        rules, append = Scored(base.scores()), append_scored
        learnt = learn(word_symbols(base, words), rules, size)
    if (found := len(learnt)) < size:
        raise UserError(f"cannot learn {size} pieces, the text yields {found}; lower --extend-vocab (--size)")
    return append(base, learnt)


def learn(words: Iterable[tuple[Sequence[str], int]], rules: Scored | Pairs, size: int) -> list[str | Pair]:
    """Return the next `size` merges of a BPE, in order, or fewer if the text yields no more.

    words: (segmentation by the base, number of occurrences) of each word. The next merge is the candidate of
    `rules` that saves the most tokens; a tie goes to the first by text. Savings are counted once. After each
    merge, they are updated only in the word fragments that it changes (Sennrich et al., arXiv 1508.07909).
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for symbols, times in words:
        for fragment in _fragments(symbols, rules):
            counts[fragment] += times
    fragments, times = list(counts), list(counts.values())
    whole = {"".join(fragment): at for at, fragment in enumerate(fragments)} if rules.takes_words else {}
    savings: defaultdict[str | Pair, int] = defaultdict(int)  # candidate -> tokens that it would save
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
            if -tokens != savings[merge]:  # outdated: push it again with what it saves now
                if savings[merge] > 0:
                    heapq.heappush(heap, (-savings[merge], merge))
                continue
            if -tokens < 2:  # saves a single token in all: not a pattern of the language
                break
            changed, grown = places.pop(merge), set()
            if piece in whole:  # with `ignore_merges`, a word that is a piece is taken whole
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
                    if piece in candidate:  # its text, or a half: only these can save more than before
                        places[candidate].add(place)
                        grown.add(candidate)
            for candidate in grown:
                heapq.heappush(heap, (-savings[candidate], candidate))
            bar.update()
    return list(learnt.values())


def _fragments(symbols: Sequence[str], rules: Scored | Pairs) -> Iterator[tuple[str, ...]]:
    """Cut a word where no new piece can cross: in a fragment all neighbours are joinable, also after merges.
    In Chinese or Thai a "word" may be a whole line, so a fragment ends after MAX_FRAGMENT symbols. Such a cut
    loses only the pair across it, and shorter fragments repeat more often, which saves time."""
    start = 0
    for end in range(1, len(symbols) + 1):
        is_cut = end == len(symbols) or end - start == MAX_FRAGMENT
        if is_cut or not rules.joinable(symbols[end - 1], symbols[end]):
            yield tuple(symbols[start:end])
            start = end
