"""Test mala.words.byte_level: extend a tokenizer.json. Oracles: tokenizers, transformers, PEFT, a naive learner."""

import json
import pickle
import random
import shutil
import sys
from collections import Counter

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, SHARED, needs_shared, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

import mala.data
import train
from mala.cli import UserError
from mala.data import file_digests, open_streams, tokenise
from mala.model import Llama
from mala.running.distributed import World
from mala.scoring import nll_by_language
from mala.storage.corpus import Corpus
from mala.storage.model_by_name import load_model
from mala.storage.peft_adapter import merge_checkpoint
from mala.vocab import count_words, sample
from mala.words.byte_level import ALPHABET, MAX_BYTES, JsonTokenizer, Pairs, load_tokenizer, to_text
from mala.words.further_merges import continue_merges, learn
from mala.words.merges_and_scores import merge
from mala.words.tokenizer import Tokenizer
from tools import vocab_commands
from tools.fertility import fertility_report, measure, unreachable
from tools.known_models import init_weights

TINY = ROOT / "assets/tiny-llama"
DEMO = Corpus(ROOT / "assets/demo/sib200").load("train")
TEXTS = [text for texts in DEMO.values() for text in texts]
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501 fmt: skip


def in_bytes(text):
    return "".join({byte: character for character, byte in ALPHABET.items()}[byte] for byte in text.encode())


def save_base(folder, kind, size=600):
    """Save a tiny byte-level BPE learnt from English, of LLaMA 3's or SmolLM2's kind. LLaMA 3's cuts by its own
    pattern, takes words that are pieces whole, lists all merges of a piece, and has special tokens outside the
    vocabulary. SmolLM2's separates digits, and its vocabulary begins with the special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    special = ["<|endoftext|>", "<|im_start|>"]
    if kind == "llama3":
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=list(ALPHABET),
                                  special_tokens=[] if kind == "llama3" else special)  # fmt: skip
    tokenizer.train_from_iterator(DEMO["eng_Latn"], trainer)
    content = json.loads(tokenizer.to_str())
    if kind == "llama3":
        ids = content["model"]["vocab"]
        cuts = [(piece[:at], piece[at:]) for piece in sorted(ids, key=ids.get) for at in range(1, len(piece))]
        content["model"] |= {"ignore_merges": True, "merges": [cut for cut in cuts if ids.keys() >= set(cut)]}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.add_special_tokens(
            [AddedToken(name, normalized=False) for name in ["<|begin|>", "<|end|>"]]
        )
        content = json.loads(tokenizer.to_str())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    return content


def save_model(folder, kind, begins=True):
    """Save a tiny checkpoint with such a tokenizer, as on the hub."""
    save_base(folder, kind)
    tokenizer = load_tokenizer(folder)
    begin = tokenizer.fast.token_to_id("<|begin|>" if kind == "llama3" else "<|endoftext|>")
    config = tiny_config(
        vocab_size=len(tokenizer), tie_word_embeddings=kind != "llama3", max_position_embeddings=256
    )
    config.bos_token_id = begin if begins else None
    llama = Llama(config)
    init_weights(llama, 0)
    llama.save_pretrained(folder)
    if kind == "smollm2":  # as on the hub; it changes how transformers 5 treats digits
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return folder


KINDS = pytest.mark.parametrize("kind", ["llama3", "smollm2"])


def encode_word(word, content):
    """Encode by BPE's definition: repeatedly merge the pair that comes first in the list, leftmost first."""
    ranks = {tuple(pair): rank for rank, pair in reversed(list(enumerate(content["merges"])))}
    if content["ignore_merges"] and word in content["vocab"]:
        return [word]
    symbols = list(word)
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
        if not found:
            return symbols
        i = min(found)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]


def learn_naively(words, content, size):
    """Learn by the definition of `learn`, without sharing a line with it: before each merge, encode all words from
    their bytes and count all pairs anew."""
    content = {**content, "vocab": dict(content["vocab"]), "merges": list(content["merges"])}
    learnt = []
    while len(learnt) < size:
        savings = Counter()
        for word, times in words.items():
            symbols = encode_word(word, content)
            for left, right in zip(symbols, symbols[1:]):
                if left + right not in content["vocab"] and len(left + right) <= MAX_BYTES:
                    savings[left, right] += times
        pair = min(savings, key=lambda pair: (-savings[pair], pair), default=None)
        if pair is None or savings[pair] < 2:
            break
        learnt.append(pair)
        content["vocab"]["".join(pair)] = len(content["vocab"])
        content["merges"].append(pair)
    return learnt


def small_base(pairs, ignore_merges):
    """Make a BPE of bytes with these merges, separate digits, and a special token after the vocabulary."""
    pieces = [*ALPHABET, *dict.fromkeys(left + right for left, right in pairs)]
    ids = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, list(pairs), ignore_merges=ignore_merges))
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>"])
    return JsonTokenizer(tokenizer.to_str().encode())


@st.composite
def base_merges(draw):
    """Draw merges whose halves are already known. Some make the same piece from other halves."""
    known, pairs = [*in_bytes(" abcdጤ")], []
    for _ in range(draw(st.integers(0, 8))):
        pair = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if pair not in pairs and len("".join(pair)) <= 6:
            pairs.append(pair)
            known.append("".join(pair))
    return pairs


@given(
    pairs=base_merges(),
    ignore_merges=st.booleans(),
    texts=st.lists(st.text(" abcdጤና1.", min_size=1, max_size=14), min_size=1, max_size=8),
    size=st.integers(1, 20),
)
@settings(deadline=None, max_examples=200)
def test_merges_are_those_of_the_naive_learner_and_of_tokenizers(pairs, ignore_merges, texts, size):
    base = small_base(pairs, ignore_merges)
    words = count_words([(text, 2) for text in texts], base.words)
    content = json.loads(base.model)["model"]
    symbols = [
        ([base.pieces[id] for id in ids], words[word]) for word, ids in zip(words, base.segment(list(words)))
    ]
    learnt = learn(symbols, Pairs(base.pieces, ignore_merges), size)
    assert learnt == learn_naively(words, content, size)
    extended = JsonTokenizer(continue_merges(base, words, len(learnt)))
    extended.check_extends(base)
    assert len(extended) == len(base) + len(learnt) and unreachable(extended) == unreachable(base)
    after = json.loads(extended.model)["model"]
    for text in texts:
        ids = extended.encode(text)
        pieces = [piece for word in base.words(text) for piece in encode_word(word, after)]
        assert [extended.pieces[id] for id in ids] == pieces and extended.decode(ids) == text
        if max(ids) < len(base):
            assert ids == base.encode(text)


@KINDS
def test_every_new_token_occurs_and_old_text_stays(kind, tmp_path):
    content = save_base(tmp_path, kind)
    base = load_tokenizer(tmp_path)
    words = count_words(sample(DEMO, 0.3, 0), base.words)
    extended = JsonTokenizer(continue_merges(base, words, 1500))
    after = json.loads(extended.model)
    old, new = content["model"], after["model"]
    assert content | {"model": None} == after | {"model": None}  # nothing else changes
    assert old | {"vocab": None, "merges": None} == new | {"vocab": None, "merges": None}
    assert new["merges"][: len(old["merges"])] == [list(pair) for pair in old["merges"]]
    assert len(new["merges"]) == len(old["merges"]) + 1500 and old["vocab"].items() <= new["vocab"].items()
    for token in content["added_tokens"]:  # inside or outside the vocabulary
        assert extended.fast.token_to_id(token["content"]) == token["id"]
        assert token["content"] not in extended.fast.encode(token["content"]).tokens  # in a text it is text
    assert unreachable(extended) == unreachable(base) == []
    ids, before = extended.encode_batch(TEXTS), base.encode_batch(TEXTS)
    assert [extended.decode(row) for row in ids] == TEXTS
    assert sum(map(len, ids)) < 0.6 * sum(map(len, before))
    assert any(
        id in extended.byte_ids for row in ids for id in row if id >= len(base)
    )  # ends within a character
    for row, other in zip(ids, before):
        assert max(row) >= len(base) or row == other


def test_what_the_checks_find(tmp_path):
    """The report and the tests above detect an unreachable piece, a whole or partial one, and a changed id."""
    content = save_base(tmp_path / "smollm2", "smollm2")
    whole, part = "qxz" + in_bytes(" "), in_bytes("ጤ") + in_bytes("ጤ")[:1]
    content["model"]["vocab"] |= {whole: 600, part: 601}
    dead = JsonTokenizer(json.dumps(content).encode())
    assert unreachable(dead) == [whole, part] and 601 in dead.byte_ids and 600 not in dead.byte_ids
    content = save_base(tmp_path / "llama3", "llama3")
    content["model"]["vocab"][whole] = 602
    with pytest.raises(UserError, match="does not begin with the pieces of"):
        JsonTokenizer(json.dumps(content).encode()).check_extends(load_tokenizer(tmp_path / "llama3"))


def test_older_files_and_tokens_that_are_cut_out(tmp_path):
    """Older files write merges as "a b". Nothing is merged across an added token that is not special."""
    content = save_base(tmp_path, "smollm2")
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["added_tokens"].append({"id": 600, "content": "moja", "special": False, "single_word": False,
                                    "lstrip": False, "rstrip": False, "normalized": False})  # fmt: skip
    base = JsonTokenizer(json.dumps(content).encode())
    assert 600 in base.encode("xmojax") and list(base.words("a mojab")) == ["a", "Ġ", "b"]
    extended = JsonTokenizer(continue_merges(base, count_words([("moja mbili, pamoja", 9)], base.words), 4))
    assert json.loads(extended.model)["model"]["merges"][-1].count(" ") == 1
    assert not any("moja" in piece for piece in extended.pieces[601:]) and unreachable(extended) == []
    assert base.segment(["Ġmbili", "ጤና"])[1] == base.encode("ጤና")  # as other tools add it: text, not bytes
    assert to_text("Ġmbili") == " mbili" and to_text("ጤና") == "ጤና" and to_text(in_bytes("ጤ")[:2]) is None


@needs_shared
def test_llama_3_extended_gives_transformers_ids(tmp_path, capsys):
    """Take some lines of all 282 languages of the Declaration. benchmarks/readers.py takes all lines."""
    argv = [
        "vocab",
        "merge",
        "--base",
        str(SHARED / "llama3"),
        "--data",
        str(SHARED / "udhr"),
        "--size",
        "1000",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--documents", "3000", "--out", str(tmp_path / "out")])
        vocab_commands.main()
    assert "128,256 pieces -> 129,256" in capsys.readouterr().out
    base, extended = load_tokenizer(SHARED / "llama3"), load_tokenizer(tmp_path / "out")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    files = sorted((SHARED / "udhr").glob("*.txt"))
    lines = [line for file in files for line in file.read_text().splitlines()[::20]]
    ids, before = extended.encode_batch(lines), base.encode_batch(lines)
    assert ids == auto(lines, add_special_tokens=False)["input_ids"]
    assert [extended.decode(row) for row in ids] == lines == auto.batch_decode(ids)
    assert all(max(row) >= 128256 or row == other for row, other in zip(ids, before))
    assert sum(map(len, ids)) < 0.85 * sum(map(len, before))
    assert set(unreachable(extended)) <= set(base.pieces)
    assert extended.bos_id == auto.bos_token_id == 128000 and len(auto) == 129256
    assert [extended.pieces[128000 + i] for i in range(256)] == base.pieces[128000:]
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 129256
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["eos_token"] == "<|end_of_text|>"


def bad(folder, **changes):
    content = save_base(folder, "llama3")
    model = content["model"] | changes.pop("model", {})
    return json.dumps(content | changes | {"model": model})


UNIGRAM = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]},
}
WORDPIECE = {"version": "1.0", "added_tokens": [], "model": {
    "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
    "vocab": {"a": 0}}}  # fmt: skip


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda folder: json.dumps(UNIGRAM), "has a Unigram model, expected a byte-level BPE"),
        (lambda folder: json.dumps(WORDPIECE), "has a WordPiece model, expected a byte-level BPE"),
        (lambda folder: bad(folder, pre_tokenizer=None), "has no ByteLevel step in its pre_tokenizer"),
        (lambda folder: bad(folder, normalizer={"type": "NFC"}), r"has a normalizer \(NFC\)"),
        (lambda folder: bad(folder, model={"dropout": 0.1}), "has dropout 0.1"),
        (lambda folder: bad(folder, model={"end_of_word_suffix": "</w>"}), "has end_of_word_suffix '</w>'"),
        (lambda folder: bad(folder)[:-200], "truncated or not a tokenizer.json"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_extended(make, expected, tmp_path, monkeypatch):
    """Further merges and training raise a one-sentence error and leave no files."""
    save_model(tmp_path / "base", "llama3")
    (tmp_path / "base/tokenizer.json").write_text(make(tmp_path / "base"))
    merge_argv = [
        "vocab",
        "merge",
        "--base",
        str(tmp_path / "base"),
        "--data",
        str(ROOT / "assets/demo/sib200"),
    ]
    train_argv = ["train.py", "--model", str(tmp_path / "base"), "--extend-vocab", "9", "--seq-len", "64"]
    for main, argv in [(vocab_commands.main, [*merge_argv, "--size", "9"]), (train.main, train_argv)]:
        monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "out")])
        with pytest.raises(UserError, match=rf"tokenizer\.json: .*{expected}"):
            main()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [None, {}, {"bos_token": None, "tokenizer_class": "GPT2Tokenizer"}])
def test_an_adapter_without_new_tokens_knows_what_begins_a_text(own, tmp_path):
    """This holds for transformers too, even if only the base's config.json says so, which the adapter lacks."""
    folder = save_model(tmp_path / "base", "smollm2")
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    if own is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
    base = load_tokenizer(folder)
    assert base.bos_id == json.loads((folder / "config.json").read_text())["bos_token_id"]
    argv = ["--extend-vocab", "0", "--steps", "1", "--eval-every", "9", "--max-held-out", "3"]
    run_train(tmp_path / "out", folder, *argv)
    adapter = tmp_path / "out/adapter"
    auto = transformers.AutoTokenizer.from_pretrained(adapter)
    assert load_tokenizer(adapter).bos_id == auto.bos_token_id == base.bos_id
    for text in ("Watu 1948 wote, wamezaliwa", "ሰዎች"):
        assert auto.encode(text, add_special_tokens=False) == base.encode(text)
    documents = {"swh_Latn": (ROOT / "assets/demo/sib200/swh_Latn/test.tsv").read_text().splitlines()[1:]}
    model, tokenizer = load_model(folder, adapter, torch.float32, World())
    found = nll_by_language(model, tokenizer, documents, "")["languages"]["swh_Latn"]
    assert found["tokens"] == sum(len(base.encode(text)) for text in documents["swh_Latn"])  # the first too


def test_other_mistakes(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "base", "llama3")
    base = load_tokenizer(folder)
    with pytest.raises(
        UserError, match="a union would add pieces that no text produces; .*--method continue"
    ):
        merge(base, Tokenizer.from_pretrained(TINY))
    with pytest.raises(UserError, match=r"the text yields \d+; lower --extend-vocab"):
        continue_merges(base, count_words([("moja mbili", 3)], base.words), 10_000)
    with pytest.raises(UserError, match="602 pieces, but the model has 601 rows"):
        base.check_fits(601)
    (folder / "added_tokens.json").write_text('{"<|more|>": 602}')  # the id of the first new piece
    monkeypatch.setattr(sys, "argv", ["vocab", "merge", "--base", str(folder), "--size", "9", "--data",
                                      str(ROOT / "assets/demo/sib200"), "--out", str(tmp_path / "out")])  # fmt: skip
    with pytest.raises(
        UserError, match=r"added_tokens\.json: '<\|more\|>' is token 602, but the model has only 602"
    ):
        vocab_commands.main()
    assert not (tmp_path / "out").exists()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(
        UserError, match=r"tiktoken file .*download the hub's tokenizer\.json, or convert this file as docs"
    ):
        load_tokenizer(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        JsonTokenizer(base.model)


def run_train(out, model, *argv):
    given = ["--langs", "swh_Latn,amh_Ethi", "--extend-vocab", "200", "--seq-len", "64", "--batch-size", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--model", str(model), "--out", str(out), *given, *argv])
        train.main()


@pytest.mark.parametrize("kind, begins", [("llama3", True), ("smollm2", True), ("smollm2", False)])
def test_train_resume_and_what_transformers_and_peft_make_of_it(kind, begins, tmp_path, capsys):
    """Train from a checkpoint with a tokenizer.json to nll.json. A resumed run leaves the same bytes."""
    model = save_model(tmp_path / "model", kind, begins)
    argv = [
        "--steps",
        "6",
        "--warmup-steps",
        "0",
        "--lr",
        "1e-3",
        "--save-every",
        "4",
        "--init",
        "calibrated",
    ]
    for out in ("whole", "parts"):
        run_train(tmp_path / out, model, *argv)
    shutil.rmtree(tmp_path / "parts/checkpoints/step-6")  # as after a kill in the fifth step
    shutil.rmtree(tmp_path / "parts/adapter")
    (tmp_path / "parts/nll.json").unlink()
    run_train(tmp_path / "parts", model, *argv)
    assert "continuing after step 4 of 6" in capsys.readouterr().out
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    weights = "adapter/adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    load_tokenizer(whole / "base").bos_id  # noqa: B018
    assert ("names a token that begins a text" in capsys.readouterr().err) != begins
    extended = load_tokenizer(whole / "adapter")
    assert len(extended) == len(load_tokenizer(model)) + 200
    assert extended.model == load_tokenizer(whole / "base").model
    auto = transformers.AutoTokenizer.from_pretrained(whole / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, whole / "adapter").eval()
    merge_checkpoint(whole / "base", whole / "adapter", tmp_path / "merged")
    assert load_tokenizer(tmp_path / "merged").model == extended.model
    begin = [extended.bos_id] if begins else []
    ours = json.loads((whole / "nll.json").read_text())["after"]["languages"]
    for language, texts in Corpus(whole / "held_out", held_out=1.0).load("test").items():
        nats = 0.0
        for text in texts:
            ids = torch.tensor([begin + auto(text, add_special_tokens=False)["input_ids"]])
            assert ids[0].tolist() == extended.encode(text, bos=True)
            with torch.no_grad():  # these texts fit in the model's context of 256 tokens
                nats += theirs(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        assert nats / len(texts) == pytest.approx(ours[language]["nll_per_document"], rel=1e-4), language


@KINDS
def test_rows_start_from_the_bases_tokens(kind, tmp_path):
    """Check tied and untied matrices, and a piece that ends within a character."""
    model = save_model(tmp_path / "model", kind)
    base = load_tokenizer(model)
    merged = JsonTokenizer(
        continue_merges(base, count_words(sample(DEMO, 0.3, 0), base.words), 300), base.name
    )
    old = Llama.from_pretrained(model)
    for init in ("normal", "mean", "subtokens", "calibrated"):
        (tmp_path / "merged").mkdir(exist_ok=True)
        (tmp_path / "merged/tokenizer.json").write_bytes(merged.model)
        data = ["--data", str(ROOT / "assets/demo/sib200")] if init == "calibrated" else []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["vocab", "extend", "--model", str(model), "--tokenizer",
                                        str(tmp_path / "merged"), "--init", init, "--device", "cpu", *data,
                                        "--out", str(tmp_path / init)])  # fmt: skip
            vocab_commands.main()
        new = Llama.from_pretrained(tmp_path / init)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows, before = new.get_parameter(name), old.get_parameter(name)
            assert (
                torch.equal(rows[: len(base)], before)
                and len(rows) == len(base) + 300 == new.config.vocab_size
            )
            if init != "subtokens":
                continue
            ends_within = next(i for i in range(len(base), len(merged)) if i in merged.byte_ids)
            for id in (len(base), ends_within, len(merged) - 1):
                parts = encode_word(merged.pieces[id], json.loads(base.model)["model"])
                mean = before[[base.pieces.index(part) for part in parts]].mean(0)
                assert torch.allclose(rows[id], mean, atol=1e-6)
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / init)
        assert auto(TEXTS, add_special_tokens=False)["input_ids"] == merged.encode_batch(TEXTS)


@KINDS
def test_the_report(kind, tmp_path):
    """Count the shares by hand: a token is a byte or a part of a character if its bytes are not text."""
    save_base(tmp_path, kind)
    base = load_tokenizer(tmp_path)
    extended = JsonTokenizer(continue_merges(base, count_words(sample(DEMO, 0.3, 0), base.words), 400))
    report = fertility_report(base, extended, {"amh_Ethi": DEMO["amh_Ethi"]})
    for side, tokenizer in (("base", base), ("new", extended)):
        ids = [id for text in DEMO["amh_Ethi"] for id in tokenizer.encode(text)]
        broken = sum("\ufffd" in decoders.ByteLevel().decode([tokenizer.pieces[id]]) for id in ids)
        found = report["languages"]["amh_Ethi"][side]
        assert found["byte_share"] == broken / len(ids) > 0 == found["unk_share"]
        assert found == measure(tokenizer, "amh_Ethi", DEMO["amh_Ethi"])
    assert report["pieces"]["unreachable_added"] == 0 and report["pieces"]["added"] == 400


@pytest.mark.parametrize("begins", [True, False])
def test_token_files_keep_held_out_documents_out(begins, tmp_path, monkeypatch, capfd):
    """Document borders are known even if no token begins a document. Two processes, forked from one that has
    encoded on all cores, neither hang nor warn."""
    model = save_model(tmp_path / "model", "smollm2", begins)
    tokenizer, rng = load_tokenizer(model), random.Random(0)
    texts = [" ".join(rng.choices(TEXTS[0].split(), k=rng.randint(1, 9))) for _ in range(40)]
    (tmp_path / "corpus").mkdir()
    for language in ("swh_Latn", "amh_Ethi"):
        (tmp_path / f"corpus/{language}.txt").write_text("\n".join(texts))
    corpus = Corpus(tmp_path / "corpus", held_out=0.2)
    expected = sum(tokenizer.encode_batch(corpus.load("train")["swh_Latn"], bos=True), [])
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")
    monkeypatch.setattr(mala.data, "POOL_BYTES", 0)
    files = [file for files in corpus.files.values() for file in files]
    tokenise(corpus, tokenizer, file_digests(files, {}), tmp_path / "tokens")
    for stream in open_streams(corpus, tmp_path / "tokens").values():
        assert stream.take(0, len(stream)).tolist() == expected and stream.documents == 32
    assert "forked" not in capfd.readouterr().err
