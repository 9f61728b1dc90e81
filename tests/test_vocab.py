"""Test mala.vocab.

Learning is compared with SentencePiece fed with plain sentences, merging with SentencePiece's protobuf classes.
"""

import io
import sys

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb2

import mala.storage.corpus
import mala.vocab
from mala.cli import UserError
from mala.model import Llama
from mala.storage.corpus import Corpus
from mala.vocab import count_words, published_words, sample, train_pieces
from mala.words.further_merges import continue_merges
from mala.words.merges_and_scores import merge
from mala.words.tokenizer import Tokenizer
from tools.vocab_commands import main

TINY = ROOT / "assets/tiny-llama"
DEMO = Corpus(ROOT / "assets/demo/sib200").load("train")
WORDS = count_words(sample(DEMO, 0.3, 0))


@pytest.fixture(scope="module")
def base():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def new():
    return Tokenizer(train_pieces(WORDS, 3000), "new.model")


def merge_by_protobuf(base: bytes, new: bytes) -> pb2.ModelProto:
    """Merge as MaLA-500 did.

    Parse both models and append each piece that is missing, except unknown, control and byte pieces.
    """
    kinds = pb2.ModelProto.SentencePiece
    merged, added = pb2.ModelProto.FromString(base), pb2.ModelProto.FromString(new)
    known = {piece.piece for piece in merged.pieces}
    for piece in added.pieces:
        if piece.piece not in known and piece.type not in (kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE):
            merged.pieces.add(piece=piece.piece, score=piece.score)
    return merged


def same(ours: bytes, theirs: pb2.ModelProto):
    parsed = pb2.ModelProto.FromString(ours)
    assert [(p.piece, p.score, p.type) for p in parsed.pieces] == [
        (p.piece, p.score, p.type) for p in theirs.pieces
    ]
    assert parsed.trainer_spec == theirs.trainer_spec and parsed.normalizer_spec == theirs.normalizer_spec


def test_merge_equals_the_protobuf_procedure(base, new, capsys):
    merged = merge(base, new, published=True)
    same(merged, merge_by_protobuf(base.model, new.model))
    assert len(Tokenizer(merged)) > len(base) + 2000
    assert Tokenizer(merged).pieces[: len(base)] == base.pieces
    assert merge(Tokenizer(merged), new) == merged  # merging twice adds nothing
    apart = pb2.ModelProto.FromString(merge(base, new))
    scores = [piece.score for piece in apart.pieces[len(base) :]]
    assert len(set(scores)) == len(scores) and not set(scores) & set(base.scores().values())
    ranked = [piece.score for piece in pb2.ModelProto.FromString(merged).pieces[len(base) :]]
    assert sorted(range(len(scores)), key=lambda i: -scores[i]) == sorted(
        range(len(scores)), key=lambda i: -ranked[i]
    )
    odd = pb2.ModelProto.FromString(new.model)
    for number, kind in enumerate(("UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")):
        if kind not in ("UNKNOWN", "BYTE"):  # a model has one <unk>, and 256 bytes or none
            odd.pieces.add(piece=f"<{kind}>", score=-number, type=getattr(pb2.ModelProto.SentencePiece, kind))
    assert merge(base, Tokenizer(odd.SerializeToString(), "odd.model")) == merge(base, new)
    told = "odd.model: left out 2 pieces that are user-defined or unused: '<UNUSED>', '<USER_DEFINED>'"
    assert told in capsys.readouterr().err


@needs_shared
@pytest.mark.parametrize("size", [1_000, 16_000, 100_000])
def test_merge_into_the_official_model(size, shared_words):
    official, new = Tokenizer.from_pretrained(SHARED / "llama2"), Tokenizer(train_pieces(shared_words, size))
    assert len(new) == size
    merged = merge(official, new, published=True)
    same(merged, merge_by_protobuf(official.model, new.model))
    assert Tokenizer(merged).pieces[:32000] == official.pieces


@pytest.fixture(scope="module")
def shared_words():
    return count_words(sample(Corpus(SHARED / "bible").stream("train"), 0.3, 0))


@needs_shared
@pytest.mark.parametrize("method", ["union", "continue"])
def test_a_merged_tokenizer_round_trips_on_real_text_and_old_text_keeps_its_ids(method):
    """Encode every second line of udhr, bible and sib200.

    After `continue`, text that is encoded without new pieces must be encoded as before. In a union, a new piece
    can be an intermediate step towards an old one and change the base's merges. There, only text that contains
    no new piece, even as a part of a word, counts as old.
    """
    official = Tokenizer.from_pretrained(SHARED / "llama2")
    words = count_words(sample(Corpus(SHARED / "udhr").stream("train"), 0.3, 0))
    if method == "union":
        merged = Tokenizer(merge(official, Tokenizer(train_pieces(words, 8_000))))
    else:
        merged = Tokenizer(continue_merges(official, words, 4_000))
    added = set(merged.pieces[len(official) :])

    def is_old(text: str, ids: list[int]) -> bool:
        if method == "continue" or max(ids, default=0) >= len(official):
            return max(ids, default=0) < len(official)
        text = "▁" + text.replace(" ", "▁")
        return not any(text[i : i + length] in added for i in range(len(text)) for length in range(1, 17))

    lines = unchanged = 0
    for file in sorted(
        [*SHARED.glob("udhr/*.txt"), *SHARED.glob("bible/*.txt"), *SHARED.glob("sib200/*/*.tsv")]
    ):
        texts = file.read_text(encoding="utf-8").split("\n")[::2]
        encoded = merged.encode_batch(texts)
        assert merged.processor.decode(encoded) == texts, file
        lines += len(texts)
        old = [(ids, text) for ids, text in zip(encoded, texts) if text and is_old(text, ids)]
        assert [ids for ids, _ in old] == official.encode_batch([text for _, text in old]), file
        unchanged += len(old)
    assert lines > 100_000 and unchanged > 2_500


def test_new_pieces_shorten_text_and_lose_nothing(base, new):
    merged = Tokenizer(merge(base, new))
    for language, documents in DEMO.items():
        before = sum(map(len, base.encode_batch(documents)))
        ids = merged.encode_batch(documents)
        assert sum(map(len, ids)) < before * (1.05 if language == "eng_Latn" else 0.8), language
        assert [merged.decode(row) for row in ids] == documents


LLAMA = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
             split_digits=True, max_sentence_length=2**30)  # fmt: skip


@pytest.mark.parametrize(
    "ours, theirs",
    [({}, dict(LLAMA, character_coverage=1.0)), ({"published": True}, {}),
     ({"standalone": True}, dict(LLAMA, character_coverage=0.99995, byte_fallback=True))],
)  # fmt: skip
def test_learning_from_word_counts_is_learning_from_the_sentences(ours, theirs):
    """For each set of settings, give SentencePiece the sentences themselves, as often as they are drawn."""
    published = ours.get("published", False)
    words = published_words if published else Tokenizer.words
    drawn = [
        *sample(DEMO, 0.3, 0),
        *((text, 3) for text in ["ﬁrst ½ １２３ Å\u00a0B", "long " * 900, "x1y22 क्\u200dष 𝒳"]),
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.rstrip() for text, times in drawn for _ in range(times)),
        model_writer=model, model_type="bpe", vocab_size=2500, minloglevel=2, **theirs)  # fmt: skip
    expected = pb2.ModelProto.FromString(model.getvalue())
    found = pb2.ModelProto.FromString(train_pieces(count_words(drawn, words), 2500, **ours))
    assert [(p.piece, p.score, p.type) for p in found.pieces] == [
        (p.piece, p.score, p.type) for p in expected.pieces
    ]
    assert found.normalizer_spec == expected.normalizer_spec
    assert found.normalizer_spec.name == ("nmt_nfkc" if published else "identity")
    assert found.trainer_spec.character_coverage == expected.trainer_spec.character_coverage
    assert any("ﬁ" in p.piece for p in found.pieces) != published  # NFKC rewrites it


def test_words_are_what_stands_between_spaces():
    drawn = [("  two  spaces\ttab\r\nline two ▅x", 2), ("two\u2028a\u00a0b", 1)]
    assert count_words(drawn) == {"two": 5, "spaces": 2, "tab": 2, "line": 2, "x": 2, "a\u00a0b": 1}
    long = "é" * 2097  # 4,194 bytes: SentencePiece would drop the line
    drawn = [(f"{long}\n{long[:-1]}", 1), ("ｘ", 1)]
    assert count_words(drawn, published_words) == {long[:-1]: 1, "x": 1}
    assert count_words([(long, 1)]) == {long: 1}


def test_learning_is_deterministic_and_keeps_long_lines(new):
    assert train_pieces(count_words(sample(DEMO, 0.3, 0)), 3000) == new.model
    assert train_pieces(dict(sorted(WORDS.items())), 3000) == new.model  # the order of words does not matter
    long = Tokenizer(train_pieces(count_words([("ab " * 5000, 1), ("cd", 1)]), 12))
    assert "▁ab" in long.pieces


def test_the_words_counted_stay_within_bounds(monkeypatch):
    """Keep the frequent words of a long stream of new words."""
    monkeypatch.setattr(mala.vocab, "MAX_WORDS", 100)

    def stream():
        for i in range(5000):
            yield f"often {i} also{'' if i % 2 else ' again'}", 1

    words = count_words(stream())
    assert len(words) <= 100 and words["often"] == words["also"] == 5000 and words["again"] == 2500


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), alpha=st.floats(0, 1), draws=st.integers(1, 200),
       seed=st.integers(0, 9))  # fmt: skip
@settings(deadline=None)
def test_sampling_draws_each_languages_share(sizes, alpha, draws, seed):
    documents = {f"{i}": [f"{i} {j}" for j in range(size)] for i, size in enumerate(sizes)}
    drawn = dict(sample(documents, alpha, seed, draws))
    assert drawn == dict(sample(documents, alpha, seed, draws))
    shares = np.array(sizes) ** alpha / (np.array(sizes) ** alpha).sum()
    for i, share in enumerate(shares):
        times = [drawn.get(text, 0) for text in documents[str(i)]]
        assert share * draws - 1e-6 <= sum(times) <= share * draws + 1 + 1e-6  # rounded up
        assert max(times) - min(times) <= 1  # all equally often, except for a random choice


def test_sampling_is_uniform_over_the_documents_of_a_language():
    counts = np.zeros(10)
    for seed in range(2000):
        for text, times in sample({"a": [str(i) for i in range(10)]}, 1.0, seed, draws=3):
            counts[int(text)] += times
    assert counts.sum() == 6000 and abs(counts - 600).max() < 5 * (600 * 0.7) ** 0.5


def test_sampling_reads_a_document_once_and_only_when_its_turn_comes(tmp_path, monkeypatch):
    (tmp_path / "aaa_Latn.txt").write_text("a\n" * 1000)
    (tmp_path / "bbb_Latn.txt").write_text("b\n" * 10)
    documents = Corpus(tmp_path, held_out=0).stream("train")
    assert {language: len(texts) for language, texts in documents.items()} == {
        "aaa_Latn": 1000,
        "bbb_Latn": 10,
    }
    reads = []
    monkeypatch.setattr(
        mala.storage.corpus,
        "read_documents",
        lambda file, reading: (reads.append(text) or text for text in "xyz" * 400),
    )
    drawn = sample(documents, 0.3, 0)
    next(drawn)
    assert len(reads) < 100  # it read the next document, not the file
    list(drawn)
    assert len(reads) <= 1010


def test_errors(base, new):
    with pytest.raises(UserError, match=r"cannot learn 100000 pieces .*too high.*<= \d+"):
        train_pieces(WORDS, 100_000)
    with pytest.raises(UserError, match=r"cannot learn 10 pieces .*required_chars\. 10 vs \d+"):
        train_pieces(WORDS, 10)
    with pytest.raises(UserError, match="cannot learn 3 pieces: <unk>, <s> and </s> are 3 of them"):
        train_pieces(WORDS, 3)
    with pytest.raises(UserError, match="it holds no words"):
        train_pieces(count_words([(" ▅ \t", 1)]), 100)
    no_bytes = Tokenizer(train_pieces(WORDS, 2500), "no_bytes.model")
    with pytest.raises(UserError, match="no_bytes.model: has no byte pieces, expected 256"):
        continue_merges(no_bytes, WORDS, 10)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DEMO["eng_Latn"] * 20), model_writer=model,
                                             vocab_size=120, model_type="unigram", minloglevel=2)  # fmt: skip
    unigram = Tokenizer(model.getvalue(), "unigram.model")
    for call in (
        lambda: merge(unigram, new),
        lambda: merge(base, unigram),
        lambda: continue_merges(unigram, WORDS, 10),
    ):
        with pytest.raises(UserError, match="unigram.model: a unigram model, expected a BPE model"):
            call()


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["mala.vocab", *map(str, args)])
    main()


def test_the_command_line_from_corpus_to_checkpoint(base, new, tmp_path, monkeypatch, capsys):
    data = ROOT / "assets/demo/sib200"
    call(monkeypatch, "train", "--data", data, "--size", 3000, "--out", tmp_path / "new.model")
    assert (tmp_path / "new.model").read_bytes() == new.model
    call(
        monkeypatch,
        "merge",
        "--method",
        "union",
        "--base",
        TINY,
        "--new",
        tmp_path / "new.model",
        "--out",
        tmp_path / "merged.model",
    )
    assert (tmp_path / "merged.model").read_bytes() == merge(base, new)
    call(
        monkeypatch,
        "extend",
        "--model",
        TINY,
        "--tokenizer",
        tmp_path / "merged.model",
        "--out",
        tmp_path / "extended",
    )
    assert Tokenizer.from_pretrained(tmp_path / "extended").model == merge(base, new)
    assert Llama.from_pretrained(tmp_path / "extended").config.vocab_size == len(Tokenizer(merge(base, new)))
    capsys.readouterr()
    figures, picture = tmp_path / "report.json", tmp_path / "report.png"
    call(monkeypatch, "report", "--base", TINY, "--new", tmp_path / "merged.model", "--data", data, "--json", figures,
         "--plot", picture)  # fmt: skip
    assert "swh_Latn" in capsys.readouterr().out and figures.exists() and picture.read_bytes()[1:4] == b"PNG"
    call(monkeypatch, "train", "--data", data, "--size", 2500, "--documents", 900, "--published",
         "--out", tmp_path / "new.model")  # fmt: skip
    published = pb2.ModelProto.FromString((tmp_path / "new.model").read_bytes())
    assert published.normalizer_spec.name == "nmt_nfkc" and len(published.pieces) == 2500
    call(monkeypatch, "merge", "--base", TINY, "--data", data, "--size", 500,
         "--out", tmp_path / "merged.model")  # fmt: skip
    assert (tmp_path / "merged.model").read_bytes() == continue_merges(base, WORDS, 500)


def test_wrong_command_lines_leave_nothing(base, new, tmp_path, monkeypatch):
    data, tmp = ROOT / "assets/demo/sib200", tmp_path / "work"
    tmp.mkdir()
    (tmp / "new.model").write_bytes(new.model)
    (tmp / "cut.model").write_bytes(new.model[:9999])
    (tmp / "merged.model").write_bytes(merge(base, new))
    (tmp / "there").mkdir()
    (tmp / "empty").mkdir()
    (tmp / "empty/swh_Latn.txt").write_text("\n \n")
    before = sorted(tmp.rglob("*"))
    mistakes = {
        "--method union takes --new": ["merge", "--method", "union", "--base", TINY],
        "and neither --data nor --size": ["merge", "--method", "union", "--base", TINY, "--new", tmp / "new.model", "--size", 3],
        "--method continue takes --data": ["merge", "--base", TINY, "--new", tmp / "new.model"],
        "but not --new or --published": ["merge", "--base", TINY, "--data", data, "--size", 9, "--published"],
        r"cut\.model: truncated or not a SentencePiece model": ["merge", "--base", tmp / "cut.model", "--data", data, "--size", 9],
        "arguments are required: --size": ["train", "--data", data],
        "size is 0, expected a number from 1": ["train", "--data", data, "--size", 0],
        "documents is 0, expected a number from 1": ["train", "--data", data, "--size", 100, "--documents", 0],
        "alpha is nan, expected": ["train", "--data", data, "--size", 100, "--alpha", "nan"],
        "seed is -1, expected": ["train", "--data", data, "--size", 100, "--seed", -1],
        "seed is 4294967296, expected": ["extend", "--model", TINY, "--tokenizer", tmp / "merged.model", "--seed", 2**32],
        "no language has a document": ["train", "--data", tmp / "empty", "--size", 100],
        r"cannot learn 1000000 pieces, the text yields \d+": [
            "merge", "--method", "continue", "--base", TINY, "--data", data, "--size", 1_000_000],
        r"cannot learn 1000000 pieces.*SentencePiece says: Vocabulary size too high.*<= \d+": ["train", "--data", data, "--size", 1_000_000],
        "does not begin with the pieces of": ["extend", "--model", TINY, "--tokenizer", tmp / "new.model"],
        "adds no piece to": ["extend", "--model", TINY, "--tokenizer", TINY],
        "--init calibrated needs --data, and no other --init takes it": ["extend", "--model", TINY, "--tokenizer", tmp / "merged.model",
                                                          "--init", "calibrated"],
    }  # fmt: skip
    for message, arguments in mistakes.items():
        with pytest.raises(UserError, match=message):
            call(monkeypatch, *arguments, "--out", tmp / "out")
    with pytest.raises(UserError, match="there: the output folder exists"):
        call(
            monkeypatch,
            "extend",
            "--model",
            TINY,
            "--tokenizer",
            tmp / "merged.model",
            "--out",
            tmp / "there",
        )
    with pytest.raises(UserError, match="there: found a folder, expected the name of a file"):
        call(monkeypatch, "merge", "--base", TINY, "--data", data, "--size", 9, "--out", tmp / "there")
    with pytest.raises(UserError, match="does not begin with the pieces of"):
        call(
            monkeypatch,
            "report",
            "--base",
            TINY,
            "--new",
            tmp / "new.model",
            "--data",
            data,
            "--json",
            tmp / "out",
        )
    assert sorted(tmp.rglob("*")) == before
