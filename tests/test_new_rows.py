"""Test mala.words.new_rows.

Initialisations are compared with their definitions or transformers, checkpoint folders with models in memory.
"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config

import mala.words.new_rows
from mala.cli import UserError
from mala.model import Llama
from mala.scoring import nll_by_language
from mala.storage.config_json import to_config_json
from mala.storage.corpus import Corpus
from mala.storage.files import atomic_directory, write_json
from mala.storage.weights import INDEX, read_weights, write_weights
from mala.vocab import count_words, sample, train_pieces
from mala.words.merges_and_scores import merge
from mala.words.new_rows import FITS, INITS, count_tokens, extend_checkpoint, extend_model, extended_matrix
from mala.words.tokenizer import Tokenizer
from tools.known_models import init_weights

TINY = ROOT / "assets/tiny-llama"
CORPUS = Corpus(ROOT / "assets/demo/sib200")
DEMO = CORPUS.load("train")


@pytest.fixture(scope="module")
def base():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def merged(base):
    new = Tokenizer(train_pieces(count_words(sample(DEMO, 0.3, 0)), 3000))
    return Tokenizer(merge(base, new), "merged.model")


def matrices(model):
    return model.model["embed_tokens"].weight, model.lm_head.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtokens_is_the_mean_of_the_segments(base, merged, dtype):
    model, old = Llama.from_pretrained(TINY, dtype), Llama.from_pretrained(TINY, dtype)
    extend_model(model, base, merged)
    assert model.config.vocab_size == len(merged) == model.lm_head.weight.shape[0]
    segments = base.segment(merged.pieces[len(base) :])
    for new_matrix, old_matrix in zip(matrices(model), matrices(old)):
        assert torch.equal(new_matrix[: len(base)], old_matrix) and new_matrix.dtype == dtype
        for row, ids in list(zip(new_matrix[len(base) :], segments))[::50]:
            expected = torch.stack([old_matrix[i].double() for i in ids]).mean(0).to(dtype)
            assert torch.allclose(
                row.double(), expected.double(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
            )
    tokens = torch.tensor([base.encode("The river flows to the lake.", bos=True)])
    assert torch.allclose(model(tokens)[..., : len(base)].float(), old(tokens).float(), atol=1e-5)


def test_chunks_do_not_show(base, merged, monkeypatch):
    old = Llama.from_pretrained(TINY, torch.float32).lm_head.weight.detach()
    segments = base.segment(merged.pieces[len(base) :])
    whole = extended_matrix(old, len(old), segments, "subtokens", 0.02, 0)
    monkeypatch.setattr(mala.words.new_rows, "CHUNK", 7)
    assert torch.equal(extended_matrix(old, len(old), segments, "subtokens", 0.02, 0), whole)


@pytest.mark.parametrize("init", ["normal", "mean"])
def test_random_rows_have_the_stated_distribution(init):
    """Compare mean and covariance with transformers' own `resize_token_embeddings`.

    Another seed gives other rows.
    """
    import transformers

    old = (
        torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
        @ torch.diag(torch.linspace(0.1, 2, 16))
        + 0.3
    )
    config = transformers.LlamaConfig(vocab_size=500, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=1, tie_word_embeddings=False)  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs.lm_head.weight.copy_(old)
    theirs.resize_token_embeddings(20_500, mean_resizing=init == "mean")
    expected, found = (
        theirs.lm_head.weight[500:].detach().double(),
        extended_matrix(old, 500, [[0]] * 20_000, init, 0.02, 2),
    )
    assert torch.equal(found[:500], old)
    rows = found[500:].double()
    scale = math.sqrt(1e-9) if init == "mean" else 1.0  # scale of the noise around the mean
    error = 5 * expected.std(0) / math.sqrt(20_000) * math.sqrt(2)
    # float32 rounds the mean of 500 rows with a relative error of about 1e-7, as large as the noise of 1e-9.
    assert ((rows.mean(0) - expected.mean(0)).abs() < error + 1e-6).all()
    assert torch.allclose(rows.std(0) / scale, expected.std(0) / scale, rtol=0.05)
    difference = torch.cov(rows.T) / scale**2 - torch.cov(expected.T) / scale**2
    assert difference.norm() < 0.06 * (torch.cov(expected.T) / scale**2).norm()
    assert torch.equal(
        extended_matrix(old, 500, [[0]] * 9, init, 0.02, 2),
        extended_matrix(old, 500, [[0]] * 9, init, 0.02, 2),
    )
    assert not torch.equal(extended_matrix(old, 500, [[0]] * 9, init, 0.02, 4)[500:], found[500:509])


def test_mean_of_fewer_rows_than_columns_is_finite():
    matrix = extended_matrix(torch.randn(4, 64), 4, [[0]] * 10, "mean", 0.02, 0)
    assert torch.allclose(matrix[4:], matrix[:4].mean(0).expand(10, -1), atol=1e-3)


def test_calibrated_expects_each_piece_as_often_as_the_text_holds_it(base, merged):
    model, plain = Llama.from_pretrained(TINY, torch.float32), Llama.from_pretrained(TINY, torch.float32)
    drawn = list(sample(DEMO, 0.3, 0))
    extend_model(model, base, merged, "calibrated", seed=0, drawn=drawn)
    extend_model(plain, base, merged, "subtokens")
    assert torch.equal(model.model["embed_tokens"].weight, plain.model["embed_tokens"].weight)
    assert torch.equal(model.lm_head.weight[: len(base)], plain.lm_head.weight[: len(base)])
    encoded = [(merged.encode(text, bos=True), times) for text, times in drawn]
    counts = torch.ones(len(merged))
    for ids, times in encoded:
        counts.index_add_(0, torch.tensor(ids[1:]), torch.full((len(ids) - 1,), float(times)))
    frequency = counts / counts.sum()

    def divergence(model):
        """Return the new pieces' part of the Kullback-Leibler divergence of the text's frequencies from the
        model's mean probabilities."""
        with torch.no_grad():
            states = torch.cat([model.hidden_states(torch.tensor([ids]))[0] for ids, _ in encoded[::3]])
            probability = model.lm_head(states).softmax(-1).mean(0)
        return (frequency * (frequency / probability).log())[len(base) :].sum().item()

    assert divergence(model) < 0.1 * divergence(plain)
    test = {language: texts[:3] for language, texts in CORPUS.load("test").items()}
    bits = {
        name: nll_by_language(m, merged, test, "")["macro"]["bits_per_byte"]
        for name, m in (("c", model), ("s", plain))
    }
    assert bits["c"] < 0.95 * bits["s"]  # on text to which it was not fitted


def test_tied_embeddings_stay_tied_and_padding_rows_are_replaced(base, merged, tmp_path):
    for init in INITS:
        model = Llama(tiny_config(vocab_size=len(base) + 16, tie_word_embeddings=True))
        init_weights(model, 0)
        (tmp_path / init).mkdir()
        model.save_pretrained(tmp_path / init / "base")
        (tmp_path / init / "base/tokenizer.model").write_bytes(base.model)
        drawn = [(text, 1) for text in DEMO["swh_Latn"]]
        extend_model(model, base, merged, init, 0, drawn)
        assert model.lm_head.weight is model.model["embed_tokens"].weight and len(
            model.lm_head.weight
        ) == len(merged)
        model.save_pretrained(tmp_path / init / "out")
        (tmp_path / init / "out/tokenizer.model").write_bytes(merged.model)
        assert len(Tokenizer.from_pretrained(tmp_path / init / "out")) == len(merged)
        extend_checkpoint(tmp_path / init / "base", merged, tmp_path / init / "files", init, 0, drawn)
        for folder in ("out", "files"):
            loaded = Llama.from_pretrained(tmp_path / init / folder)
            assert loaded.config.tie_word_embeddings and torch.equal(
                loaded.lm_head.weight, model.lm_head.weight
            )
            assert "lm_head.weight" not in dict(read_weights(tmp_path / init / folder))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shards", [1, 6])
def test_a_checkpoint_folder_is_extended_as_the_model_is(init, shards, base, merged, tmp_path):
    import transformers

    source, out = tmp_path / "source", tmp_path / "out"
    model = Llama.from_pretrained(TINY)
    model.save_pretrained(source, max_shard_bytes=10**9 if shards == 1 else 600_000)
    files = {"tokenizer.model": base.model, "generation_config.json": b"{}", "LICENSE.txt": b"yours", "tokenizer.json": b"{}",
             "pytorch_model.bin": b"pickle", ".hidden": b"x"}  # fmt: skip
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "original").mkdir()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "transformers_version": "4.31.0", "pad_token_id": None})
    )
    if shards > 1:
        index = json.loads((source / INDEX).read_text())
        index["metadata"]["total_parameters"] = sum(p.numel() for p in model.parameters())
        (source / INDEX).write_text(json.dumps(index))
    assert (len(list(source.glob("*.safetensors"))) > 3) == (shards > 1)

    drawn = list(sample(DEMO, 0.3, 0))[:50]
    extend_checkpoint(source, merged, out, init, 3, drawn)
    expected = Llama.from_pretrained(TINY, torch.float32 if init in FITS else None)
    extend_model(expected, base, merged, init, 3, drawn)
    extended = Llama.from_pretrained(out)
    for (name, ours), theirs in zip(extended.named_parameters(), expected.parameters()):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.to(torch.bfloat16)), name
    written = json.loads((out / "config.json").read_text())
    assert written == {
        **config,
        "transformers_version": "4.31.0",
        "pad_token_id": None,
        "vocab_size": len(merged),
    }
    kept = {"config.json", "tokenizer.model", "generation_config.json", "LICENSE.txt", ".hidden"}
    kept |= {"tokenizer.json", "tokenizer_config.json"}
    names = {file.name for file in out.iterdir()}
    assert {name for name in names if ".safetensors" not in name} == kept
    unchanged = [f for f in source.glob("*.safetensors") if f.read_bytes() == (out / f.name).read_bytes()]
    assert bool(unchanged) == (shards > 1)
    if shards > 1:
        metadata = json.loads((out / INDEX).read_text())["metadata"]
        assert metadata["total_size"] == sum(tensor.nbytes for _, tensor in read_weights(out))
        assert metadata["total_parameters"] == sum(parameter.numel() for parameter in extended.parameters())
    theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.tensor([merged.encode(DEMO["swh_Latn"][0], bos=True)])
    assert max(tokens[0]) >= len(base)
    with torch.no_grad():
        assert torch.allclose(
            theirs(tokens).logits, Llama.from_pretrained(out, torch.float32)(tokens), atol=1e-4
        )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc for the memory")
def test_only_the_two_matrices_are_in_memory(base, merged, tmp_path):
    """Extend a checkpoint of 0.5 GB in three files, one of which has neither matrix."""
    config = tiny_config(vocab_size=len(base), hidden_size=1024, intermediate_size=8192, num_hidden_layers=9)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    (tmp_path / "base").mkdir()
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    write_weights(tmp_path / "base", weights, max_shard_bytes=200 * 10**6)
    write_json(tmp_path / "base/config.json", to_config_json(config))
    (tmp_path / "base/tokenizer.model").write_bytes(base.model)
    (tmp_path / "merged.model").write_bytes(merged.model)
    code = f"""if True:
        import re
        from pathlib import Path
        from mala.model import Llama
        from mala.words.new_rows import extend_checkpoint
        from mala.words.tokenizer import Tokenizer
        merged = Tokenizer.from_pretrained({str(tmp_path / "merged.model")!r})
        def memory(key):  # kB; not ru_maxrss, which a process inherits from its parent
            return int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
        Llama.from_pretrained({str(TINY)!r}, device="meta")  # makes PyTorch load 80 MB of itself
        before = memory("VmRSS")
        extend_checkpoint(Path({str(tmp_path / "base")!r}), merged, Path({str(tmp_path / "out")!r}), "subtokens", 0)
        print(memory("VmHWM") - before)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) > 450e6
    two_matrices = 2 * len(merged) * 1024 * 2
    assert int(done.stdout) * 1024 < two_matrices + 60e6, done.stdout  # 22 MB, plus PyTorch's own memory


@pytest.mark.parametrize("init", INITS)
def test_an_old_export_keeps_its_dtypes_and_what_it_holds_twice(init, base, merged, tmp_path):
    """The export has the tied matrix under both names, a buffer that is recomputed, and norms of another dtype."""
    config = tiny_config(vocab_size=len(base) + 8, tie_word_embeddings=True)
    model = Llama(config)
    init_weights(model, 0)
    weights = {
        name: tensor.detach().to(torch.float32 if "norm" in name else torch.bfloat16)
        for name, tensor in model.named_parameters()
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4, dtype=torch.float64)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_weights(source, weights)
    write_json(source / "config.json", to_config_json(config))
    (source / "tokenizer.model").write_bytes(base.model)
    extend_checkpoint(source, merged, out, init, 0, [(text, 1) for text in DEMO["swh_Latn"]])
    found = dict(read_weights(out))
    assert {name: one.dtype for name, one in found.items()} == {n: one.dtype for n, one in weights.items()}
    first, second = found.pop("model.embed_tokens.weight"), found.pop("lm_head.weight")
    assert torch.equal(first, second) and len(first) == len(merged)
    assert torch.equal(first[: len(base)], weights["lm_head.weight"][: len(base)])
    assert all(torch.equal(one, weights[name]) for name, one in found.items())


def test_calibrated_counts_a_document_as_often_as_it_is_drawn(base, merged):
    """Draw 26 English documents once and 3 Amharic ones 40 times.

    The model must expect Amharic pieces as often as the drawn text holds them.
    """
    drawn = [(text, 1) for text in DEMO["eng_Latn"][:26]] + [(text, 40) for text in DEMO["amh_Ethi"][:3]]
    model = Llama.from_pretrained(TINY, torch.float32)
    extend_model(model, base, merged, "calibrated", 0, iter(drawn))
    tokens = [(merged.encode(text, bos=True), times) for text, times in drawn]
    with torch.no_grad():
        means = [times * model(torch.tensor([ids]))[0].softmax(-1).sum(0) for ids, times in tokens]
    expected = sum(means) / sum(times * len(ids) for ids, times in tokens)
    ethiopic = [i for i in range(len(base), len(merged)) if any("ሀ" <= c <= "፿" for c in merged.pieces[i])]
    counts = torch.ones(len(merged))
    for ids, times in tokens:
        for i in ids[1:]:
            counts[i] += times
    assert expected[ethiopic].sum().item() == pytest.approx(
        (counts[ethiopic].sum() / counts.sum()).item(), rel=0.1
    )


def test_count_tokens_holds_no_more_than_it_keeps(base):
    times = [1 + i % 3 for i in range(3500)]
    counts, kept = count_tokens(base, ((f"{i}", t) for i, t in enumerate(times)), seed=0, keep=100)
    slow = np.zeros(len(base))
    for i, t in enumerate(times):
        for token in base.encode(f"{i}"):
            slow[token] += t
    assert np.array_equal(counts, slow) and len(kept) == 100 == len(set(kept))
    assert 1200 < np.mean([int(text) for text, _ in kept]) < 2300 and all(
        times[int(text)] == t for text, t in kept
    )


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_added_tokens_behind_the_tokenizer_are_not_taken_for_padding(place, base, merged, tmp_path):
    model = Llama(tiny_config(vocab_size=len(base) + 1))
    init_weights(model, 0)
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source/tokenizer.model").write_bytes(base.model)
    added = (
        {"<|chat|>": len(base)}
        if place == "added_tokens.json"
        else {"added_tokens_decoder": {"0": {}, str(len(base)): {"content": "<|chat|>"}}}
        if place == "tokenizer_config.json"
        else {"added_tokens": [{"id": len(base), "content": "<|chat|>"}]}
    )
    (tmp_path / "source" / place).write_text(json.dumps(added))
    with pytest.raises(
        UserError, match=rf"{place}: '<.chat.>' is token 2,048, but the model has only 2,048 rows"
    ):
        extend_checkpoint(tmp_path / "source", merged, tmp_path / "out", "subtokens", 0)
    (tmp_path / "source" / place).write_text("{}")
    extend_checkpoint(tmp_path / "source", merged, tmp_path / "out", "subtokens", 0)


def test_an_odd_index_and_a_base_that_holds_nan(base, merged, tmp_path):
    source, model = tmp_path / "source", Llama.from_pretrained(TINY)
    model.save_pretrained(source)
    (source / "tokenizer.model").write_bytes(base.model)
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    index = {"weight_map": {name: "model-00001-of-00001.safetensors" for name, _ in model.named_parameters()}}
    for number, metadata in enumerate((None, {"total_size": 7}, {"total_size": "7"})):
        write_json(source / INDEX, {**index, "metadata": metadata})
        extend_checkpoint(source, merged, tmp_path / str(number), "subtokens", 0)
        written = json.loads((tmp_path / str(number) / INDEX).read_text())
        size = sum(tensor.nbytes for _, tensor in read_weights(tmp_path / str(number)))
        assert written["metadata"] == {"total_size": size, "total_parameters": size // 2}
    write_json(source / INDEX, {"weight_map": {"lm_head.weight": "w/b.safetensors"}})
    with pytest.raises(
        UserError, match=r"names the file 'w/b\.safetensors', expected a file in the same folder"
    ):
        extend_checkpoint(source, merged, tmp_path / "out", "subtokens", 0)
    (source / INDEX).unlink()
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        extend_checkpoint(source, merged, tmp_path / "out", "mean", 0)
    assert not (tmp_path / "out").exists()


def test_the_index_of_the_copy_is_that_of_its_shards(base, merged, tmp_path):
    source, norm = tmp_path / "source", "model.norm.weight"
    Llama.from_pretrained(TINY).save_pretrained(source, max_shard_bytes=600_000)
    (source / "tokenizer.model").write_bytes(base.model)
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    place = weight_map[norm]
    other = next(shard for shard in shards if shard != place)
    forgetful = {name: shard for name, shard in weight_map.items() if name != norm}
    without = {name: shard for name, shard in weight_map.items() if shard != place}
    cases = [
        (without, "source: the weights lack"),
        ({**weight_map, norm: "model-9.safetensors"}, "model-9.safetensors: there is no such file, but"),
    ]
    for changed, message in cases:
        write_json(source / INDEX, {"weight_map": changed})
        with pytest.raises(UserError, match=message):
            extend_checkpoint(source, merged, tmp_path / "out", "subtokens", 0)
        assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    # LLaMA 2's index names buffers that are recomputed. Its shards may lack them.
    buffer = {**weight_map, "model.rotary_emb.inv_freq": place}
    for number, odd in enumerate((weight_map, buffer, {**weight_map, norm: other}, forgetful)):
        write_json(source / INDEX, {"weight_map": odd})
        extend_checkpoint(source, merged, tmp_path / str(number), "subtokens", 0)
        assert json.loads((tmp_path / str(number) / INDEX).read_text())["weight_map"] == weight_map


def test_errors_leave_the_model_and_the_disk_as_they_were(base, merged, tmp_path, monkeypatch):
    new = Tokenizer(train_pieces(count_words(sample(DEMO, 0.3, 0)), 3000), "new.model")
    model = Llama.from_pretrained(TINY)
    with pytest.raises(UserError, match="new.model: does not begin with the pieces of"):
        extend_model(model, base, new)
    with pytest.raises(UserError, match="pieces, but the model has 2,048 rows"):
        extend_model(model, merged, merged)
    assert model.config.vocab_size == 2048

    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="the output folder exists"), atomic_directory(tmp_path / "there"):
        pass
    with pytest.raises(UserError, match="the output folder exists"):
        extend_checkpoint(TINY, merged, tmp_path / "there", "subtokens", 0)
    source = tmp_path / "source"
    model.save_pretrained(source)
    (source / "tokenizer.model").write_bytes(base.model)
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"new\.model: does not begin with the pieces of .*source/tokenizer\.model"
    ):
        extend_checkpoint(source, new, out, "subtokens", 0)
    with pytest.raises(UserError, match=r"adds no piece to .*nothing to extend"):
        extend_checkpoint(source, base, out, "subtokens", 0)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # a crash in the middle
        patch.setattr(mala.words.new_rows, "write_tensors", fail)
        with pytest.raises(KeyboardInterrupt):
            extend_checkpoint(source, merged, out, "subtokens", 0)
    weights = dict(read_weights(source))
    head = weights.pop("lm_head.weight")
    for found, message in (
        (None, r"source: the weights lack 1 tensors, the first is 'lm_head\.weight'"),
        (head[:5].clone(), r"lm_head\.weight is bfloat16 \(5, 128\), expected floating point \(2048, 128\)"),
        (head.int(), r"lm_head\.weight is int32"),
    ):
        write_weights(source, {**weights, **({} if found is None else {"lm_head.weight": found})})
        with pytest.raises(UserError, match=message):
            extend_checkpoint(source, merged, out, "subtokens", 0)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated"):
        extend_checkpoint(source, merged, out, "subtokens", 0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "there"]
