"""Test that every program gives the same ids with a tokenizer that we write, and that its files stay together."""

import heapq
import io
import json
import re
import shutil
import sys

import peft
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from conftest import ROOT, SHARED, needs_shared, tiny_config

import train
from mala.cli import UserError
from mala.lora import LoRAConfig, add_lora
from mala.model import Llama
from mala.running.distributed import World
from mala.storage.corpus import Corpus
from mala.storage.model_by_name import load_model
from mala.storage.peft_adapter import merge_checkpoint, save_adapter
from mala.storage.tokenizer_files import copy_tokenizer
from mala.vocab import count_words, sample, train_pieces
from mala.words.byte_level import JsonTokenizer, load_tokenizer
from mala.words.further_merges import continue_merges
from mala.words.merges_and_scores import merge
from mala.words.new_rows import extend_checkpoint
from mala.words.tokenizer import Tokenizer
from tools.known_models import init_weights

TINY = ROOT / "assets/tiny-llama"
DEMO = Corpus(ROOT / "assets/demo/sib200").load("train")
METHODS = ("continue", "union")


def special(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": False,
            "rstrip": False, "single_word": False}  # fmt: skip


# The files of Meta's LLaMA 2 on the hub.
COMPANIONS = {
    "tokenizer_config.json": {
        "add_bos_token": True, "add_eos_token": False, "bos_token": special("<s>"), "eos_token": special("</s>"),
        "unk_token": special("<unk>"), "clean_up_tokenization_spaces": False, "legacy": False, "pad_token": None,
        "model_max_length": 1000000000000000019884624838656, "padding_side": "right", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer"},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip


def make_base(folder, model, companions=COMPANIONS, rows=0):
    """Save a tiny checkpoint with the tokenizer `model` and its usual companion files."""
    llama = Llama(tiny_config(vocab_size=rows or len(Tokenizer(model))))
    init_weights(llama, 0)
    llama.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in companions.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def make_merged(base, words, size, method):
    if method == "continue":
        return Tokenizer(continue_merges(base, words, size))
    return Tokenizer(merge(base, Tokenizer(train_pieces(words, size))))


def check_readers(folder, texts):
    """Check that SentencePiece, AutoTokenizer of transformers, tokenizers and our code read the folder alike."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = processor.encode(texts, add_bos=True, num_threads=-1)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert auto(texts, return_attention_mask=False)["input_ids"] == expected
    # transformers uses `tokenizers` itself, so of very many texts a sample is enough here.
    few = slice(None, None, 1 + len(texts) // 50_000)
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [encoding.ids for encoding in fast.encode_batch(texts[few])] == expected[few]
    assert load_tokenizer(folder).encode_batch(texts[few], bos=True) == expected[few]
    some = expected[:: max(1, len(expected) // 200)]
    assert [auto.decode(ids, skip_special_tokens=True) for ids in some] == processor.decode(some)
    assert fast.get_vocab_size() == len(auto) == processor.get_piece_size()


def llama_cpp(model, text):
    """Encode by llama.cpp's rules for a SentencePiece vocabulary (src/llama-vocab.cpp, llm_tokenizer_spm_session):
    neighbours whose union is a piece merge, the highest score first, the leftmost of equals first."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    other = (processor.is_byte, processor.is_control, processor.is_unknown)
    normal = [i for i in ids.values() if not any(is_kind(i) for is_kind in other)]
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in normal}
    symbols = dict(enumerate("▁" + text.replace(" ", "▁")))
    after, before = {i: i + 1 for i in symbols}, {i: i - 1 for i in symbols}
    heap = []

    def offer(left):
        right = after.get(left)
        if left in symbols and right in symbols and (union := symbols[left] + symbols[right]) in scores:
            heapq.heappush(heap, (-scores[union], left, right, union))

    for i in list(symbols):
        offer(i)
    while heap:
        _, left, right, union = heapq.heappop(heap)
        if symbols.get(left, "") + symbols.get(right, "") != union or after[left] != right:
            continue
        symbols[left] = union
        del symbols[right]
        after[left] = after[right]
        before[after[right]] = left
        offer(left)
        offer(before[left])
    in_ids = (
        [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        for symbol in symbols.values()
    )
    return [i for symbol in in_ids for i in symbol]


@pytest.fixture(scope="module")
def shared_words():
    return count_words(sample(Corpus(SHARED / "bible").stream("train"), 0.3, 0, draws=20_000))


@pytest.fixture(scope="module")
def shared_texts():
    files = [*sorted((SHARED / "udhr").iterdir()), *sorted((SHARED / "bible").iterdir())]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert len(lines) > 190_000
    return lines


@needs_shared
@pytest.mark.parametrize("method", METHODS)
def test_every_reader_gives_the_same_ids_on_real_text(method, shared_words, shared_texts, tmp_path):
    """Check the folders that extend, save_adapter and merge_checkpoint write, over LLaMA 2's tokenizer with its
    usual companion files. This takes an eighth of all lines; benchmarks/readers.py takes all."""
    base = make_base(tmp_path / "base", (SHARED / "llama2/tokenizer.model").read_bytes())
    merged = make_merged(Tokenizer.from_pretrained(base), shared_words, 4000, method)
    extend_checkpoint(base, merged, tmp_path / "extended", "subtokens", 0)
    check_readers(tmp_path / "extended", shared_texts[::16])
    for text in shared_texts[::997]:
        assert llama_cpp(merged.model, text) == merged.encode(text)

    written = json.loads((tmp_path / "extended/tokenizer_config.json").read_text())
    kept = {key: value for key, value in COMPANIONS["tokenizer_config.json"].items() if key != "legacy"}
    assert written == {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    model = Llama.from_pretrained(tmp_path / "extended")
    add_lora(model, LoRAConfig())
    save_adapter(model, tmp_path / "adapter")
    copy_tokenizer(tmp_path / "extended", tmp_path / "adapter", len(merged))
    merge_checkpoint(tmp_path / "extended", tmp_path / "adapter", tmp_path / "merged")
    for folder in ("adapter", "merged"):
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "extended" / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_transformers_and_peft_give_the_nll_of_the_run(method, tmp_path, monkeypatch):
    """One language of each script. AutoTokenizer loads the adapter's tokenizer, PEFT loads the weights."""
    languages = ",".join({language.split("_")[1]: language for language in DEMO}.values())
    argv = ["train.py", "--out", str(tmp_path / "run"), "--steps", "8", "--vocab-method", method]
    argv += ["--langs", languages, "--extend-vocab", "2000"]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    out = tmp_path / "run"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, out / "adapter").eval()
    ours = json.loads((out / "nll.json").read_text())["after"]["languages"]
    held_out = Corpus(out / "held_out", held_out=1.0).load("test")
    assert ours.keys() == held_out.keys() and len(ours) == 13
    for language, texts in held_out.items():
        nats = 0.0
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                nats += model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
        assert nats / len(texts) == pytest.approx(ours[language]["nll_per_document"], rel=1e-4), language


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_what_train_leaves_is_read_alike(method, tmp_path, monkeypatch):
    """none: --extend-vocab 0, over a base that has neither tokenizer.json nor tokenizer_config.json."""
    extend = (
        ["--extend-vocab", "0"] if method == "none" else ["--extend-vocab", "300", "--vocab-method", method]
    )
    argv = [
        "train.py",
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "2",
        "--langs",
        "swh_Latn,amh_Ethi",
        *extend,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    texts = [text for texts in DEMO.values() for text in texts]
    folders = ["adapter", "checkpoints/step-2"] + (["base"] if method != "none" else [])
    base = tmp_path / "run/base" if method != "none" else TINY
    merge_checkpoint(base, tmp_path / "run/adapter", tmp_path / "run/merged")
    for folder in [*folders, "merged"]:
        check_readers(tmp_path / "run" / folder, texts)


SENTENCEPIECE_DEFAULTS = {}  # NFKC; a run of spaces becomes one
SPACES_ONLY = {"normalization_rule_name": "identity"}


def default_model(size=1500, **settings):
    model = io.BytesIO()
    texts = [text for texts in DEMO.values() for text in texts]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
        character_coverage=0.999, minloglevel=2, **settings)  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("settings", [SENTENCEPIECE_DEFAULTS, SPACES_ONLY], ids=["nfkc", "spaces"])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_normalises(settings, method, tmp_path, capsys):
    """OpenLLaMA's first tokenizer has SentencePiece's defaults, for example. New pieces are segmented as text is.
    With `continue` they can all occur; a union leaves out pieces that the normaliser changes."""
    folder = make_base(tmp_path / "base", default_model(**settings), {})
    base = Tokenizer.from_pretrained(folder)
    lines = ["  two  spaces ", "ﬁve ﬁsh", "ｆｕｌｌ ｗｉｄｔｈ", "خانه\u200cها و می\u200cروم", "a\u00a0b"]
    texts = [text for texts in DEMO.values() for text in texts] + lines
    words = count_words([(text, 2) for text in texts])
    if method == "continue":
        merged = Tokenizer(continue_merges(base, words, 400))
    else:
        merged = Tokenizer(merge(base, Tokenizer(train_pieces(words, 1500), "new.model")))
        assert ("new.model: left out" in capsys.readouterr().err) == (settings == SENTENCEPIECE_DEFAULTS)
    new = merged.pieces[len(base) :]
    for piece, segment in zip(new, base.segment(new)):
        text = piece.replace("▁", " ") if piece.startswith("▁") else f"x{piece}"
        read = base.encode(text) if piece.startswith("▁") else None
        assert read is None or segment == read, piece
    if method == "continue":
        normalised = [base.processor.normalize(text) for text in texts]
        assert all(any(piece in text for text in normalised) for piece in new)
    extend_checkpoint(folder, merged, tmp_path / "out", "subtokens", 0)
    check_readers(tmp_path / "out", texts)


def test_a_piece_is_segmented_as_text_or_else_by_its_bytes():
    """SentencePiece's NFKC turns U+200C into a space and drops U+0001. A merged model may hold either."""
    base = Tokenizer(default_model(), "nfkc.model")
    assert base.encode("\u200c") == base.encode("\x01") == []
    joiner, control, word = base.segment(["\u200c", "\x01", "▁and"])
    assert joiner == [base.pieces.index("▁")] and word == base.encode("and")
    assert [base.pieces[i] for i in control] == ["<0x01>"]


def test_user_defined_symbols_of_the_base_stay_whole():
    base = Tokenizer(default_model(user_defined_symbols=["<sep>"], normalization_rule_name="identity"))
    words = count_words([("moja<sep>mbili tatu<sep> tatu tatu", 9)])
    merged = Tokenizer(continue_merges(base, words, 1))
    assert all("sep" not in piece for piece in merged.pieces[len(base) :])
    assert base.pieces.index("<sep>") in merged.encode("moja<sep>mbili")


def chat(folder, first, names=("<|im_start|>", "<|im_end|>")):
    (folder / "added_tokens.json").write_text(json.dumps({name: first + i for i, name in enumerate(names)}))


def test_a_tokenizer_travels_whole(tmp_path):
    """Merge an adapter that adds chat tokens, one over a base that has them, and one with other tokens than its base."""
    tiny = Tokenizer.from_pretrained(TINY)
    words = count_words((text, 1) for text in DEMO["swh_Latn"])
    longer = Tokenizer(continue_merges(tiny, words, 50))

    def adapter_over(base, name, rows):
        model = Llama.from_pretrained(base)
        width = model.config.hidden_size
        model.replace_vocabulary(torch.randn(rows, width), torch.randn(rows, width))
        add_lora(model, LoRAConfig())
        save_adapter(model, tmp_path / name)
        return tmp_path / name

    plain = make_base(tmp_path / "plain", tiny.model)
    brings = adapter_over(plain, "brings", len(longer) + 2)
    (brings / "tokenizer.model").write_bytes(longer.model)
    chat(brings, len(longer))
    merge_checkpoint(plain, brings, tmp_path / "a")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert auto.convert_tokens_to_ids("<|im_end|>") == len(longer) + 1 and len(auto) == len(longer) + 2
    assert auto("Habari")["input_ids"] == longer.encode("Habari", bos=True)

    has_chat = make_base(tmp_path / "chat", tiny.model, rows=len(tiny) + 2)
    chat(has_chat, len(tiny))
    same = adapter_over(has_chat, "same", len(tiny) + 2)  # it has no tokenizer, so the base's is copied whole
    merge_checkpoint(has_chat, same, tmp_path / "b")
    assert json.loads((tmp_path / "b/added_tokens.json").read_text()) == json.loads(
        (has_chat / "added_tokens.json").read_text()
    )
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "b")) == len(tiny) + 2

    longer_one = adapter_over(has_chat, "longer", len(longer))  # none of the base's outdated files are copied
    (longer_one / "tokenizer.model").write_bytes(longer.model)
    merge_checkpoint(has_chat, longer_one, tmp_path / "c")
    assert not (tmp_path / "c/added_tokens.json").exists()
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    assert len(auto) == len(longer) == Llama.from_pretrained(tmp_path / "c").config.vocab_size

    # transformers 5 saves only tokenizer.json. The adapter's is used, both here and in the merge.
    only_json = adapter_over(plain, "json", len(longer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "c" / name, only_json / name)
    merge_checkpoint(plain, only_json, tmp_path / "d")
    assert not (tmp_path / "d/tokenizer.model").exists()
    _, tokenizer = load_model(plain, only_json, torch.float32, World())
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.encode("Habari") == longer.encode("Habari")

    for wrong, told in (
        ("beyond", "<|im_end|>' is token"),
        ("other", "is '<pad>', but added_tokens.json has"),
    ):
        bad = adapter_over(plain, wrong, len(longer) + 2)
        (bad / "tokenizer.model").write_bytes(longer.model)
        chat(bad, len(longer) + (wrong == "beyond"))
        if wrong == "other":
            decoder = {"added_tokens_decoder": {str(len(longer)): {"content": "<pad>"}}}
            (bad / "tokenizer_config.json").write_text(json.dumps(decoder))
        with pytest.raises(UserError, match=re.escape(told)):
            merge_checkpoint(plain, bad, tmp_path / "e")
        assert not (tmp_path / "e").exists()


def test_a_tokenizer_is_judged_by_its_content(tmp_path):
    """LLaMA 3's `tokenizer.model` is a tiktoken file, not a SentencePiece model."""
    tiktoken = b"IQ== 0\nIg== 1\nIw== 2\n"
    (tmp_path / "tokenizer.model").write_bytes(tiktoken)
    with pytest.raises(UserError, match="a tiktoken file like LLaMA 3's, .* or tokenizer.json;"):
        load_tokenizer(tmp_path)
    base = make_base(tmp_path / "made", Tokenizer.from_pretrained(TINY).model)
    (tmp_path / "copy").mkdir()
    copy_tokenizer(base, tmp_path / "copy", len(Tokenizer.from_pretrained(TINY)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "copy" / name, tmp_path / name)
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)
    assert load_tokenizer(tmp_path).encode("Habari", bos=True) == load_tokenizer(TINY).encode(
        "Habari", bos=True
    )


def test_tokens_beyond_the_tokenizer_are_no_text():
    """A model may have more rows than its tokenizer has pieces, and may draw such an id."""
    tiny = Tokenizer.from_pretrained(TINY)
    assert tiny.decode([*tiny.encode("Habari"), len(tiny) + 3]) == "Habari"
