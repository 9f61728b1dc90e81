"""Test mala.words.merges_and_scores against SentencePiece's encoder, transformers and a naive learner.

The naive learner counts everything anew before each piece.
"""

import unicodedata
from collections import Counter

import pytest
from conftest import ROOT, SHARED, needs_shared
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mala.cli import UserError
from mala.storage.corpus import Corpus
from mala.vocab import count_words, sample, train_pieces
from mala.words.further_merges import continue_merges, learn
from mala.words.merges_and_scores import Scored, merge
from mala.words.tokenizer import Tokenizer, append_pieces
from tools.fertility import unreachable

BASE = Tokenizer.from_pretrained(ROOT / "assets/tiny-llama")
KNOWN = BASE.scores()
DEMO = Corpus(ROOT / "assets/demo/sib200").load("train")


def merge_symbols(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """Encode by BPE as SentencePiece does.

    Repeatedly merge the neighbours whose union has the highest score, leftmost first.
    """
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


def may_be_a_piece(text: str) -> bool:
    """Return whether a learner may make this piece: at most 16 characters, either signs, or letters with their
    marks and joiners. A digit is never merged, and a word start can only come first."""
    kinds = {"L" if c in "\u200c\u200d" else unicodedata.category(c)[0] for c in text.removeprefix("▁")}
    return (
        "▁" not in text[1:]
        and len(text) <= 16
        and "N" not in kinds
        and (kinds <= {"L", "M"} or not kinds & {"L", "M"})
    )


def learn_naively(words: dict[str, int], known: dict[str, float], size: int) -> list[str]:
    """Learn by the definition of `learn`, without sharing a line with it.

    Before each piece, segment every word from its characters and count the savings of all candidates anew. The
    next piece is the one that saves the most tokens; a tie goes to the first by text. It must save at least 2.
    """
    scores, learnt = dict(known), []
    while len(learnt) < size:
        savings = Counter()
        for word, count in words.items():
            segments = merge_symbols(list(word), scores)
            for symbol in segments:
                if symbol not in scores:  # spelled in bytes
                    savings[symbol] += (len(symbol.encode()) - 1) * count
            for left, right in zip(segments, segments[1:]):
                if left in scores and right in scores and may_be_a_piece(left + right):
                    savings[left + right] += count
        piece = min(savings, key=lambda piece: (-savings[piece], piece), default=None)
        if piece is None or savings[piece] < 2:
            break
        learnt.append(piece)
        scores[piece] = min(known.values()) - len(learnt)
    return learnt


text = st.text("abcdeéጤና .…1▁\u0301\u200d", min_size=1, max_size=12)
unknown = st.text("abcdጤ", min_size=3, max_size=5).filter(lambda text: text not in KNOWN)


@given(
    texts=st.lists(text, min_size=1, max_size=8),
    dead=st.lists(unknown, unique=True, max_size=4),
    size=st.integers(1, 20),
)
@example(texts=["ጤና" * 20] * 2, dead=[], size=60)  # pieces of the maximum length
@example(texts=["xqaж"] * 2, dead=[], size=3)  # "aж" and "ж" save equally, but only "ж" can be a piece yet
@settings(deadline=None, max_examples=100)
def test_pieces_are_those_of_the_naive_learner_and_all_can_occur(texts, dead, size):
    """dead: pieces of the base whose parts are mostly no pieces, so only a new piece makes them reachable."""
    base = Tokenizer(append_pieces(BASE, {piece: -1.0 - i for i, piece in enumerate(dead)}))
    known = base.scores()
    words = Counter("▁" + word for text in texts for word in text.split(" ") if word)
    symbols = [(merge_symbols(list(word), known), times) for word, times in words.items()]
    pieces = learn(symbols, Scored(known), size)
    assert pieces == learn_naively(words, known, size)
    merged = Tokenizer(
        append_pieces(base, {piece: min(known.values()) - i for i, piece in enumerate(pieces, 1)})
    )
    for i, piece in enumerate(pieces, len(base)):
        text = "\n" + piece.replace("▁", " ")  # a newline is a byte in this model and merges with nothing
        assert i in merged.encode(text), piece
    for text in texts:  # SentencePiece encodes as merge_symbols does
        word = "▁" + text.split(" ")[0]
        pieces_of_word = [
            s if s in merged.scores() else None for s in merge_symbols(list(word), merged.scores())
        ]
        encoded = [merged.processor.id_to_piece(i) for i in merged.segment([word])[0]]
        assert [p for p in encoded if not p.startswith("<0x")] == [p for p in pieces_of_word if p]


@given(
    text=st.text(alphabet="abcdeé", min_size=1, max_size=30),
    new=st.lists(st.text(alphabet="abcde", min_size=2, max_size=4)),
)
@settings(deadline=None, max_examples=200)
def test_merging_one_more_piece_is_merging_anew(text, new):
    """Compare Scored.merge, which looks only at places of the piece, with merge_symbols, which starts from
    the characters."""
    scores = {character: 0.0 for character in "abcde"} | {"ab": -1.0, "cd": -2.0, "abcd": -3.0}
    symbols = merge_symbols(list(text), scores)
    for number, piece in enumerate(dict.fromkeys(new), 4):
        if piece not in scores and any(piece == a + b for a in scores for b in scores):
            scores[piece] = -float(number)
            symbols = Scored(scores).merge(symbols, piece)
            assert symbols == merge_symbols(list(text), scores)


def test_text_without_spaces_is_learnt_in_fragments():
    """A line of Chinese is one word."""
    parts = ["银行", "银行家", "中国", "中国银行", "国家"]
    line = "，".join(parts * 3) + "。"
    together = continue_merges(BASE, count_words([(line, 2)]), 10)
    assert {"银行", "中国"} <= set(Tokenizer(together).pieces[len(BASE) :])
    # Words longer than MAX_FRAGMENT are cut into fragments.
    long = learn([(list("ab" * 500), 2)], Scored({"a": 0.0, "b": 0.0}), 5)
    assert long[0] == "ab" and len(long[-1]) == 16


def test_continue_leaves_no_unreachable_piece_and_fewer_tokens_than_the_union():
    words = count_words(sample(DEMO, 0.3, 0))
    union = Tokenizer(merge(BASE, Tokenizer(train_pieces(words, 3000))))
    continued = Tokenizer(continue_merges(BASE, words, len(union) - len(BASE)))
    assert len(continued) == len(union) and continued.pieces[: len(BASE)] == BASE.pieces
    assert unreachable(continued) == [] != unreachable(union)
    scores = [continued.processor.get_score(i) for i in range(len(BASE), len(continued))]
    assert scores == [min(KNOWN.values()) - i for i in range(1, len(scores) + 1)]

    def tokens_per_word(tokenizer):
        rates = [sum(map(len, tokenizer.encode_batch(d))) / len(" ".join(d).split()) for d in DEMO.values()]
        return sum(rates) / len(rates)

    assert tokens_per_word(continued) <= tokens_per_word(union)
    for documents in DEMO.values():
        assert [continued.decode(row) for row in continued.encode_batch(documents)] == documents


@needs_shared
def test_continue_on_the_official_model_gives_transformers_ids(tmp_path):
    """Unlike in a union, no two pieces share a score, so transformers' list of merges has only one order."""
    import transformers

    official = Tokenizer.from_pretrained(SHARED / "llama2")
    corpus = Corpus(
        SHARED / "udhr", languages=("amh_Ethi", "ewe_Latn", "guj_Gujr", "swh_Latn", "tat_Cyrl"), held_out=0
    )
    documents = corpus.load("train")
    merged = continue_merges(official, count_words(sample(documents, 0.3, 0)), 1000)
    assert unreachable(Tokenizer(merged)) == []
    scores = list(Tokenizer(merged).scores().values())
    assert all(a > b for a, b in zip(scores[-1000:], scores[-999:])) and scores[-1000] < min(scores[:-1000])
    (tmp_path / "tokenizer.model").write_bytes(merged)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=True, add_bos_token=False)
    ours = Tokenizer(merged)
    for texts in documents.values():
        for text in texts:
            assert ours.encode(text) == theirs(text).input_ids
            assert ours.decode(ours.encode(text)) == text


def test_old_text_keeps_its_ids_where_no_new_piece_is_needed():
    merged = Tokenizer(continue_merges(BASE, count_words((text, 1) for text in DEMO["amh_Ethi"]), 200))
    assert [merged.encode(text) for text in DEMO["eng_Latn"]] == [
        BASE.encode(text) for text in DEMO["eng_Latn"]
    ]


def test_a_corpus_that_yields_fewer_pieces():
    with pytest.raises(UserError, match=r"the text yields \d+; lower --extend-vocab"):
        continue_merges(BASE, count_words([("moja mbili", 3)]), 10_000)
