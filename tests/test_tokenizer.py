"""Test mala.words.tokenizer. It is a thin wrapper; the oracle is transformers' LlamaTokenizer."""

import pickle
import shutil
import sys

import pytest
from conftest import ROOT, SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from mala.cli import UserError
from mala.words.byte_level import load_tokenizer
from mala.words.tokenizer import Tokenizer, message_fields

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
    assert {base.processor.id_to_piece(i) for i in base.byte_ids} == {
        f"<0x{byte:02X}>" for byte in range(256)
    }


@given(st.lists(st.tuples(st.integers(1, 200), st.one_of(st.integers(0, 2**63), st.binary()))))
def test_message_fields_read_what_protobuf_writes(expected):
    def varint(value):
        return bytes([*(value >> shift & 127 | 128 for shift in range(0, max(value.bit_length() - 7, 0), 7)),
                      value >> max(0, (value.bit_length() - 1) // 7 * 7)])  # fmt: skip

    message = b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
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
    for content in (
        b"",
        b"not a model",
        whole[:1000],
        whole[:pieces_end],
        whole[: pieces_end + 9],
        whole[:-1],
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(
            UserError, match=r"tokenizer\.model: truncated or not a SentencePiece model \([\d,]+ bytes\)"
        ):
            Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="2,048 pieces, but the model has 2,000 rows"):
        Tokenizer.from_pretrained(TINY).check_fits(2000)


PLAIN = Tokenizer.from_pretrained(TINY)


def test_a_tokenizer_goes_to_another_process():
    copy = pickle.loads(pickle.dumps(PLAIN))
    assert copy.encode("one two ጤና", bos=True) == PLAIN.encode("one two ጤና", bos=True)


def test_a_tokenizer_json_gives_transformers_ids(tmp_path):
    import transformers
    from test_evaluate import save_byte_level

    texts = [
        line
        for file in sorted((ROOT / "assets/demo/sib200").glob("*/train.tsv"))
        for line in file.read_text().splitlines()
    ]
    save_byte_level(tmp_path, texts[:100])
    ours = load_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(ours) == 600 and ours.bos_id == 0
    for text in [*texts[::40], "", " travel", "a\nb  c", "😀\u200d"]:
        expected = theirs.encode(text, add_special_tokens=False, truncation=False, padding=False)
        assert ours.encode(text) == expected and ours.decode(expected) == text
        assert ours.encode_batch([text, "x"], bos=True) == [[0, *expected], [0, *ours.encode("x")]]
    assert len(ours.encode(" ".join(texts[:50]))) > 1000  # the file asks for truncation at 16
    assert 0 not in ours.encode("<|begin|>")  # it is text, not the control token
    ours.check_fits(600)
    with pytest.raises(UserError, match=r"tokenizer\.json: 600 pieces, but the model has 599 rows"):
        ours.check_fits(599)


def test_what_begins_a_text_and_errors_of_a_tokenizer_json(tmp_path, monkeypatch, capsys):
    from test_evaluate import save_byte_level

    save_byte_level(tmp_path, ["a b c"], 260)
    for name, content, expected in [
        ("tokenizer_config.json", '{"bos_token": "<|end|>"}', 1),
        ("tokenizer_config.json", '{"bos_token": null}', None),
        ("config.json", '{"bos_token_id": 99999}', None),
        ("config.json", '{"bos_token_id": true}', None),
        ("config.json", '{"bos_token_id": 7}', 7),
    ]:
        (tmp_path / name).write_text(content)
        tokenizer = load_tokenizer(tmp_path)
        begin = [] if expected is None else [expected]
        assert tokenizer.bos_id == expected and tokenizer.encode("a", bos=True) == begin + tokenizer.encode(
            "a"
        )
        assert tokenizer.encode_batch(["a", ""], bos=True) == [begin + tokenizer.encode("a"), begin]
        assert ("names a token that begins a text; documents" in capsys.readouterr().err) == (not begin)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: truncated or not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        UserError, match=r"tokenizer\.json: reading it requires tokenizers: pip install tokenizers"
    ):
        load_tokenizer(tmp_path)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    assert type(load_tokenizer(tmp_path)) is Tokenizer  # it takes precedence over tokenizer.json
