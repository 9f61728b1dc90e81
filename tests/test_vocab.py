"""mala.vocab: merging against SentencePiece's own protobuf classes, new rows against a plain loop."""

import sys

import pytest
import sentencepiece
import torch
from conftest import ROOT, SHARED, needs_shared
from sentencepiece import sentencepiece_model_pb2 as pb2

from mala.cli import UserError
from mala.data import Corpus
from mala.model import Llama
from mala.tokenizer import Tokenizer
from mala.vocab import continue_merges, extend_model, main, merge, sample, save_extended, segment, train_pieces

TINY = ROOT / "assets/tiny-llama"
DEMO = Corpus(ROOT / "assets/demo/sib200").load("train")


@pytest.fixture(scope="module")
def base():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def new():
    return Tokenizer(train_pieces(sample(DEMO, 0.3, 0), 3000), "new.model")


def merge_by_protobuf(base: bytes, new: bytes) -> pb2.ModelProto:
    """MaLA-500's procedure: parse both, append every piece that is not there yet."""
    merged, added = pb2.ModelProto.FromString(base), pb2.ModelProto.FromString(new)
    known = {piece.piece for piece in merged.pieces}
    for piece in added.pieces:
        if piece.piece not in known and piece.type == pb2.ModelProto.SentencePiece.NORMAL:
            merged.pieces.add(piece=piece.piece, score=piece.score)
    return merged


def same(ours: bytes, theirs: pb2.ModelProto):
    parsed = pb2.ModelProto.FromString(ours)
    assert [(p.piece, p.score, p.type) for p in parsed.pieces] == [(p.piece, p.score, p.type) for p in theirs.pieces]
    assert parsed.trainer_spec == theirs.trainer_spec and parsed.normalizer_spec == theirs.normalizer_spec


def test_merge_equals_the_protobuf_procedure(base, new):
    merged = merge(base, new)
    same(merged, merge_by_protobuf(base.model, new.model))
    assert len(Tokenizer(merged)) > len(base) + 2000
    assert Tokenizer(merged).pieces[: len(base)] == base.pieces


@needs_shared
def test_merge_into_the_official_model(new):
    official = Tokenizer.from_pretrained(SHARED / "llama2")
    merged = merge(official, new)
    same(merged, merge_by_protobuf(official.model, new.model))
    assert Tokenizer(merged).pieces[:32000] == official.pieces


def test_merging_twice_adds_nothing(base, new):
    merged = Tokenizer(merge(base, new))
    assert merge(merged, new) == merged.model


def test_new_pieces_shorten_text_and_lose_nothing(base, new):
    merged = Tokenizer(merge(base, new))
    for language, documents in DEMO.items():
        before = sum(map(len, base.encode_batch(documents)))
        ids = merged.encode_batch(documents)
        assert sum(map(len, ids)) < before * (1.05 if language == "eng_Latn" else 0.8), language
        assert [merged.decode(row) for row in ids] == documents


def test_training_is_deterministic_and_learns_text_as_it_stands(new):
    assert train_pieces(sample(DEMO, 0.3, 0), 3000) == new.model
    proto = pb2.ModelProto.FromString(new.model)
    assert proto.normalizer_spec.name == "identity" and proto.trainer_spec.character_coverage == 1.0
    long = Tokenizer(train_pieces(["ab " * 5000, "cd"], 12))  # a line beyond SentencePiece's own limit is not dropped
    assert "▁ab" in long.pieces
    odd = Tokenizer(train_pieces(["ab ab\ncd cd", "▅ ef ef"], 18))  # lines of one document, SentencePiece's own character
    assert not any("\n" in piece for piece in odd.pieces) and {"▁ab", "▁cd", "▁ef"} <= set(odd.pieces)


def test_alpha_sampling_shares():
    documents = {"aaa_Latn": [f"a{i}" for i in range(10)], "bbb_Latn": [f"b{i}" for i in range(990)]}
    for alpha in (0.0, 0.3, 1.0):
        drawn = list(sample(documents, alpha, seed=0))
        share = sum(text[0] == "a" for text in drawn) / len(drawn)
        assert share == pytest.approx(10**alpha / (10**alpha + 990**alpha), abs=0.01)
        assert {text for text in drawn if text[0] == "a"} == set(documents["aaa_Latn"])


def test_segments_are_the_pieces_own_text(base):
    pieces = ["▁mountain", "mountain", "▁", "▁▁x", "a▁b"]
    for piece, ids in zip(pieces, segment(base, pieces)):
        assert "".join(base.processor.id_to_piece(i) for i in ids) == piece
    health = [f"<0x{byte:02X}>" for byte in "ጤና".encode()]
    for piece, expected in (("ጤና", health), ("▁ጤና", ["▁", *health])):
        assert [base.processor.id_to_piece(i) for i in segment(base, [piece])[0]] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_their_segments(base, new, dtype):
    merged = Tokenizer(merge(base, new))
    model, old = Llama.from_pretrained(TINY, dtype), Llama.from_pretrained(TINY, dtype)
    extend_model(model, base, merged)
    assert model.config.vocab_size == len(merged) == model.lm_head.weight.shape[0]
    segments = segment(base, merged.pieces[len(base) :])
    for get in (lambda m: m.model["embed_tokens"].weight, lambda m: m.lm_head.weight):
        assert torch.equal(get(model)[: len(base)], get(old)) and get(model).dtype == dtype
        for row, ids in list(zip(get(model)[len(base) :], segments))[::50]:
            expected = torch.stack([get(old)[i].double() for i in ids]).mean(0).to(dtype)
            assert torch.allclose(row.double(), expected.double(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    tokens = torch.tensor([base.encode("The river flows to the lake.", bos=True)])
    assert torch.allclose(model(tokens)[..., : len(base)].float(), old(tokens).float(), atol=1e-5)


def test_tied_embeddings_stay_tied_and_padding_rows_are_replaced(base, new, tmp_path):
    from conftest import tiny_config

    merged = Tokenizer(merge(base, new))
    model = Llama(tiny_config(vocab_size=len(base) + 16, tie_word_embeddings=True))
    extend_model(model, base, merged)
    assert model.lm_head.weight is model.model["embed_tokens"].weight and len(model.lm_head.weight) == len(merged)
    save_extended(model, merged, tmp_path / "out")
    assert len(Tokenizer.from_pretrained(tmp_path / "out")) == Llama.from_pretrained(tmp_path / "out").config.vocab_size


def test_errors(base, new, tmp_path):
    with pytest.raises(UserError, match=r"cannot learn 100000 pieces from this corpus: .*<= \d+"):
        train_pieces(DEMO["swh_Latn"], 100_000)
    with pytest.raises(UserError, match="cannot learn 10 pieces"):
        train_pieces(DEMO["swh_Latn"], 10)
    model = Llama.from_pretrained(TINY)
    with pytest.raises(UserError, match="new.model: does not begin with the pieces of"):
        extend_model(model, base, new)
    with pytest.raises(UserError, match="pieces, but the model has 2,048 rows"):
        extend_model(model, Tokenizer(merge(base, new)), Tokenizer(merge(base, new)))
    assert model.config.vocab_size == 2048
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="the output folder exists"):
        save_extended(model, base, tmp_path / "there")


def test_a_merged_model_loads_in_sentencepiece_and_transformers(base, new, tmp_path):
    import transformers

    (tmp_path / "tokenizer.model").write_bytes(merge(base, new))
    ours = Tokenizer.from_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.get_piece_size() == len(ours)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=True)
    # Not their ids: transformers 5 rebuilds the merges and, where a base piece and a new one share a score, orders them
    # otherwise than SentencePiece does.
    assert theirs.convert_ids_to_tokens(range(len(ours))) == ours.pieces


def test_the_command_line_from_corpus_to_checkpoint(base, new, tmp_path, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["mala.vocab", *map(str, args)])
        main()

    data = ROOT / "assets/demo/sib200"
    call("train", "--data", data, "--size", 3000, "--out", tmp_path / "new.model")
    assert (tmp_path / "new.model").read_bytes() == new.model
    call("merge", "--base", TINY, "--new", tmp_path / "new.model", "--out", tmp_path / "merged.model")
    assert (tmp_path / "merged.model").read_bytes() == merge(base, new)
    call("extend", "--model", TINY, "--tokenizer", tmp_path / "merged.model", "--out", tmp_path / "extended")
    model = Llama.from_pretrained(TINY)
    extend_model(model, base, Tokenizer(merge(base, new)))
    extended = Llama.from_pretrained(tmp_path / "extended")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), extended.parameters()))
    assert Tokenizer.from_pretrained(tmp_path / "extended").model == merge(base, new)
    call("merge", "--method", "continue", "--base", TINY, "--data", data, "--size", 500, "--out", tmp_path / "merged.model")
    assert (tmp_path / "merged.model").read_bytes() == continue_merges(base, sample(DEMO, 0.3, 0), 500)
    for wrong in (
        ["--method", "continue", "--new", tmp_path / "new.model"],
        [],
        ["--new", tmp_path / "new.model", "--size", 3],
    ):
        with pytest.raises(UserError, match="--method"):
            call("merge", "--base", TINY, *wrong, "--out", tmp_path / "other.model")
    with pytest.raises(UserError, match="extended: the output folder exists"):
        call("extend", "--model", TINY, "--tokenizer", tmp_path / "merged.model", "--out", tmp_path / "extended")
    with pytest.raises(UserError, match="--size"):
        call("train", "--data", data, "--out", tmp_path / "other.model")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["extended", "merged.model", "new.model"]
