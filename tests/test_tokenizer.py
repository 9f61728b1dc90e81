"""mala.tokenizer: a wrapper, so few tests; the oracle is transformers' LlamaTokenizer."""

import pytest
from conftest import ROOT, SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from mala.cli import UserError
from mala.tokenizer import Tokenizer, message_fields

TINY = ROOT / "assets/tiny-llama"


def test_encode_decode():
    tokenizer = Tokenizer.from_pretrained(TINY)
    texts = ["The river flows.", "  two  spaces ", "ጤና", "", "<s> is text here"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_id not in ids
        assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.encode_batch(texts, bos=True) == [tokenizer.encode(text, bos=True) for text in texts]
    assert len(tokenizer) == len(tokenizer.pieces) == 2048 and tokenizer.pieces[1] == "<s>"


def test_segments_are_the_pieces_own_text():
    base = Tokenizer.from_pretrained(TINY)
    pieces = ["▁mountain", "mountain", "▁", "▁▁x", "a▁b"]
    for piece, ids in zip(pieces, base.segment(pieces)):
        assert "".join(base.processor.id_to_piece(i) for i in ids) == piece
    health = [f"<0x{byte:02X}>" for byte in "ጤና".encode()]
    for piece, expected in (("ጤና", health), ("▁ጤና", ["▁", *health])):
        assert [base.processor.id_to_piece(i) for i in base.segment([piece])[0]] == expected
    assert {base.processor.id_to_piece(i) for i in base.byte_ids} == {f"<0x{byte:02X}>" for byte in range(256)}


@given(st.lists(st.tuples(st.integers(1, 200), st.one_of(st.integers(0, 2**63), st.binary()))))
def test_message_fields_read_what_protobuf_writes(expected):
    def varint(value):
        return bytes([*(value >> shift & 127 | 128 for shift in range(0, max(value.bit_length() - 7, 0), 7)),
                      value >> max(0, (value.bit_length() - 1) // 7 * 7)])  # fmt: skip

    message = b"".join(
        varint(number << 3) + varint(value) if isinstance(value, int) else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in expected
    )
    assert list(message_fields(message)) == expected
    if message:
        with pytest.raises(ValueError, match="ends within"):
            list(message_fields(message[:-1]))


@needs_shared
def test_the_official_model_gives_transformers_ids():
    import transformers

    ours = Tokenizer.from_pretrained(SHARED / "llama2")
    theirs = transformers.LlamaTokenizer.from_pretrained(SHARED / "llama2", legacy=True, add_bos_token=False)
    for line in (SHARED / "udhr" / "amh_Ethi.txt").read_text(encoding="utf-8").splitlines()[:20]:
        assert ours.encode(line) == theirs(line).input_ids


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.model: there is no such file"):
        Tokenizer.from_pretrained(tmp_path)
    whole = (TINY / "tokenizer.model").read_bytes()
    pieces_end = sum(2 + len(value) for number, value in message_fields(whole) if number == 1)
    for content in (b"", b"not a model", whole[:1000], whole[:pieces_end], whole[: pieces_end + 9], whole[:-1]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.model: truncated or no SentencePiece model \([\d,]+ bytes\)"):
            Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="2,048 pieces, but the model has 2,000 rows"):
        Tokenizer.from_pretrained(TINY).check_fits(2000)
