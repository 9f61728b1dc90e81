"""mala.tokenizer: a wrapper, so few tests; the oracle is transformers' LlamaTokenizer."""

import pytest
from conftest import ROOT, SHARED, needs_shared

from mala.cli import UserError
from mala.tokenizer import Tokenizer

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
    for content in (b"", b"not a model", whole[:1000]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
            Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="2,048 pieces, but the model has 2,000 rows"):
        Tokenizer.from_pretrained(TINY).check_fits(2000)
