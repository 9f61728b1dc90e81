"""mala.scoring against transformers' loss, and its windows against one long pass."""

import math

import pytest
import torch
import transformers
from conftest import ROOT, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from mala import scoring
from mala.corpus import Corpus
from mala.model import Llama
from mala.scoring import documents_nll, nll_by_language, windows
from mala.tokenizer import Tokenizer

TINY = ROOT / "assets/tiny-llama"
TOKENIZER = Tokenizer.from_pretrained(TINY)
DEMO = Corpus(ROOT / "assets/demo/sib200").load("test")


@given(length=st.integers(1, 500), context=st.integers(1, 60))
def test_windows_predict_every_token_once_from_enough_context(length, context):
    predicted = []
    for start, first, end in windows(length, context):
        assert 0 <= start < first < end <= length and end - 1 - start <= context
        assert start == 0 or first - start > context // 2
        predicted += range(first, end)
    assert predicted == list(range(1, length))


def test_documents_equal_transformers_loss(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 300)  # several batches, of several rows
    documents = [text for language in ("eng_Latn", "swh_Latn", "amh_Ethi") for text in DEMO[language][:6]] + ["a"]
    model = Llama.from_pretrained(TINY, dtype=torch.float32)
    reference = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    nll, counts = documents_nll(model, TOKENIZER, documents)
    for text, ours, count in zip(documents, nll, counts):
        ids = torch.tensor([TOKENIZER.encode(text, bos=True)])
        assert count == ids.shape[1] - 1
        assert ours == pytest.approx(reference(ids, labels=ids).loss.item() * count, rel=1e-4)


def test_a_long_document_is_the_sum_of_its_windows_and_one_pass_where_it_fits():
    model = Llama(tiny_config(vocab_size=2048, max_position_embeddings=20))
    model.init_weights(0)
    text = " ".join(DEMO["eng_Latn"])
    ids = torch.tensor(TOKENIZER.encode(text, bos=True))
    assert len(ids) > 100
    expected = 0.0
    for start, first, end in windows(len(ids), 20):
        logits = model(ids[None, start : end - 1])[0].float()
        expected += torch.nn.functional.cross_entropy(logits[first - start - 1 :], ids[first:end], reduction="sum").item()
    assert documents_nll(model, TOKENIZER, [text])[0][0] == pytest.approx(expected, rel=1e-5)
    model.config.max_position_embeddings = len(ids)
    whole = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    assert documents_nll(model, TOKENIZER, [text])[0][0] == pytest.approx(whole, rel=1e-5)


def test_figures():
    model = Llama.from_pretrained(TINY, dtype=torch.float32).train()
    documents = {language: DEMO[language][:3] for language in ("swh_Latn", "amh_Ethi")}
    result = nll_by_language(model, TOKENIZER, documents, "")
    assert model.training
    for language, texts in documents.items():
        figures = result["languages"][language]
        total = sum(documents_nll(model, TOKENIZER, texts)[0])
        assert figures["documents"] == 3 and figures["bytes"] == len("".join(texts).encode())
        assert figures["tokens"] == sum(len(TOKENIZER.encode(text)) for text in texts)
        assert figures["nll_per_document"] == pytest.approx(total / 3)
        assert figures["bits_per_byte"] == pytest.approx(total / figures["bytes"] / math.log(2))
    for key, value in result["macro"].items():
        assert value == pytest.approx(sum(result["languages"][language][key] for language in documents) / 2)
