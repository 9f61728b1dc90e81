"""Test the bundled assets and the recipes.

Assets: layouts, sizes, parallel rows, and no held-out sentence in the training data.
"""

import importlib
import json
import sys
import unicodedata
from collections import Counter

import pytest
from conftest import ROOT

from mala.cli import parse
from mala.model import Llama
from mala.words.tokenizer import Tokenizer

DEMO = ROOT / "assets/demo"
TOPICS = ["science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"]
LABELS = ["Recommendation", "Faith", "Description", "Sin", "Grace", "Violence"]
SCRIPTS = {"Latn": "LATIN", "Ethi": "ETHIOPIC", "Cyrl": "CYRILLIC", "Deva": "DEVANAGARI", "Beng": "BENGALI",
           "Gujr": "GUJARATI", "Sinh": "SINHALA", "Khmr": "KHMER", "Mymr": "MYANMAR", "Geor": "GEORGIAN",
           "Armn": "ARMENIAN", "Arab": "ARABIC", "Hebr": "HEBREW"}  # fmt: skip


def rows(file):
    return [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]


def check_text(language, texts):
    for text in texts:
        assert unicodedata.is_normalized("NFC", text) and text == text.strip()
        assert all(unicodedata.name(c).startswith(SCRIPTS[language[4:]]) for c in text if c.isalpha()), text


def test_sib200_sample():
    languages = sorted(folder.name for folder in (DEMO / "sib200").iterdir())
    assert len(languages) >= 20 and len({language[4:] for language in languages}) >= 8
    for language in languages:
        splits = {split: rows(DEMO / "sib200" / language / f"{split}.tsv") for split in ("train", "test")}
        for split, each in (("train", 5), ("test", 2)):
            header, *body = splits[split]
            assert header == ["index_id", "category", "text"]
            assert Counter(topic for _, topic, _ in body) == dict.fromkeys(TOPICS, each)
            english = rows(DEMO / "sib200/eng_Latn" / f"{split}.tsv")
            assert [row[:2] for row in splits[split]] == [row[:2] for row in english]  # parallel
        texts = [row[2] for split in splits.values() for row in split[1:]]
        assert len(set(texts)) == 49
        check_text(language, texts)


def test_taxi1500_sample():
    languages = sorted(folder.name for folder in (DEMO / "taxi1500").iterdir())
    assert len(languages) == 6
    for language in languages:
        texts = []
        for split, each in (("train", 3), ("test", 2)):
            body = rows(DEMO / "taxi1500" / language / f"{language}_{split}.tsv")
            english = rows(DEMO / "taxi1500/eng_Latn" / f"eng_Latn_{split}.tsv")
            assert Counter(label for _, label, _ in body) == dict.fromkeys(LABELS, each)
            assert [row[:2] for row in body] == [row[:2] for row in english]
            texts += [row[2] for row in body]
        assert len(set(texts)) == 30
        check_text(language, texts)


def test_the_tiny_llama_is_an_official_checkpoint_of_at_most_4_mb():
    folder = ROOT / "assets/tiny-llama"
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    tokenizer = Tokenizer.from_pretrained(folder)
    assert len(tokenizer) == Llama.from_pretrained(folder).config.vocab_size
    assert sum(map(tokenizer.processor.is_byte, range(len(tokenizer)))) == 256
    assert [tokenizer.processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs").iterdir()))
def test_recipes_fill_the_settings_of_train(recipe, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    train = importlib.import_module("train")
    filled = parse(train.Settings, "", ["--config", str(ROOT / "configs" / recipe)])
    assert filled != train.Settings()
    if recipe == "mala500.toml":  # as published
        assert (filled.extend_vocab, filled.r, filled.lora_alpha, filled.lora_dropout) == (
            250_000,
            8,
            32,
            0.1,
        )
        assert (filled.target_modules, filled.modules_to_save) == (
            ("q_proj", "v_proj"),
            ("embed_tokens", "lm_head"),
        )
        assert (filled.seq_len, filled.batch_size, filled.micro_batch_size, filled.epochs) == (4096, 8, 1, 3)
        assert (filled.lr, filled.weight_decay, filled.alpha, filled.dtype) == (3e-4, 0.1, 0.3, "bfloat16")
    sys.modules.pop("train", None)
