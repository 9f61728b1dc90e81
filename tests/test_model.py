"""Compare mala.model with transformers, and test its cache, sharded files, memory and error messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, SHARED, tiny_config
from safetensors.torch import load_file, save_file

from mala.cli import UserError
from mala.model import Embedding, KVCache, Llama, LlamaConfig
from mala.storage.config_json import fields_of, read_config
from mala.storage.weights import INDEX, WEIGHTS
from tools.known_models import NAMED, init_weights, named

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip

# Changes to the config that transformers writes. With `spelling` 4 the rotary settings are rewritten as
# transformers 4 wrote them.
CONFIGS = {
    "multi-head": dict(num_key_value_heads=4),
    "grouped-query": dict(),
    "multi-query": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "head_dim": dict(head_dim=24),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "rope_theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "rope_theta-4": dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, spelling=4),
    "linear-5": dict(rope_parameters={**LINEAR, "rope_theta": 10000.0}),
    "linear-4": dict(rope_parameters={**LINEAR, "rope_theta": 10000.0}, spelling=4),
    "llama3-5": dict(rope_parameters={**LLAMA3, "rope_theta": 500000.0}),
    "llama3-4": dict(rope_parameters={**LLAMA3, "rope_theta": 500000.0}, spelling=4),
    "sharded": dict(shard="60KB"),
    "all-at-once": dict(head_dim=24, attention_bias=True, tie_word_embeddings=True, shard="60KB",
                        rope_parameters={**LLAMA3, "rope_theta": 500000.0}),
}  # fmt: skip


def make_reference(path: Path, spelling: int = 5, shard: str = "5GB", dtype=torch.float32, **changes):
    """Save a random transformers LLaMA to `path` and return it.

    Norms and biases are random, too, because at 1 and 0 they would hide errors.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2), **changes}
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    reference = reference.to(dtype).eval()
    reference.save_pretrained(path, max_shard_size=shard)
    if spelling == 4:
        values = json.loads((path / "config.json").read_text())
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        (path / "config.json").write_text(json.dumps(values))
    return reference


@pytest.fixture
def tokens():
    return torch.randint(0, 100, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name, tmp_path, tokens):
    reference = make_reference(tmp_path, **CONFIGS[name])
    assert (tmp_path / INDEX).exists() == ("shard" in CONFIGS[name])
    model = Llama.from_pretrained(tmp_path)
    expected = reference(tokens)
    assert (model(tokens) - expected.logits).abs().max() < 1e-4

    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    targets[0, 10:13] = -100
    loss = model(tokens, targets=targets)
    expected = torch.nn.functional.cross_entropy(expected.logits.flatten(0, 1), targets.flatten())
    assert abs(loss - expected) < 1e-5
    loss.backward()
    expected.backward()
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, parameter in theirs.items():
        error = (ours[key].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, key


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_we_write(name, tmp_path, tokens):
    make_reference(tmp_path / "theirs", **CONFIGS[name])
    model = Llama.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", max_shard_bytes=60_000 if "shard" in CONFIGS[name] else 10**9)
    again, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (again(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert torch.equal(Llama.from_pretrained(tmp_path / "ours")(tokens), model(tokens))


def test_bfloat16_is_no_farther_from_float32_than_transformers(tmp_path, tokens):
    """Average over all configurations, because a single one has a random share of lucky roundings."""
    ours = theirs = 0.0
    for name, changes in CONFIGS.items():
        reference = make_reference(tmp_path / name, dtype=torch.bfloat16, **changes)
        low = reference(tokens).logits.float()
        exact = reference.float()(tokens).logits  # the same rounded weights, computed in float32
        ours += (Llama.from_pretrained(tmp_path / name)(tokens).float() - exact).square().mean().item()
        theirs += (low - exact).square().mean().item()
    assert theirs > 0
    assert ours <= theirs


def test_dtypes(tmp_path, tokens):
    make_reference(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = Llama.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model(tokens).dtype == dtype
        assert model(tokens, targets=tokens).dtype == torch.float32
        model.save_pretrained(tmp_path / str(dtype))
        assert next(Llama.from_pretrained(tmp_path / str(dtype)).parameters()).dtype == dtype
        saved = json.loads((tmp_path / str(dtype) / "config.json").read_text())
        assert saved["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", ["grouped-query", "multi-head", "llama3-5"])
@pytest.mark.parametrize("steps", [[50], [1] * 50, [20, 30], [20, 1, 9, 20]])
def test_incremental_passes_agree_with_the_full_one(name, steps, tmp_path, tokens):
    make_reference(tmp_path, **CONFIGS[name])
    model = Llama.from_pretrained(tmp_path)
    cache = KVCache(model, batch_size=2, max_tokens=50)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(steps, dim=1)]
        assert cache.length == 50
        assert (torch.cat(parts, dim=1) - model(tokens)).abs().max() < 1e-4
        with pytest.raises(ValueError, match="room for 50 tokens, but 51"):
            model(tokens[:, :1], cache=cache)


def test_the_cache_takes_the_models_dtype(tmp_path, tokens):
    make_reference(tmp_path)
    model = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cache = KVCache(model, batch_size=2, max_tokens=50)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(25, dim=1)]
        # Both round the same exact value, so their errors are of the same size.
        exact = Llama.from_pretrained(tmp_path)(tokens)
        error = (model(tokens).float() - exact).square().mean()
        assert (torch.cat(parts, dim=1).float() - exact).square().mean() < 2 * error


def test_gradient_checkpointing_changes_nothing(tmp_path, tokens):
    make_reference(tmp_path)
    gradients = []
    for recompute in (False, True):
        model = Llama.from_pretrained(tmp_path)
        model.recomputed_blocks = 2 * recompute
        model(tokens, targets=tokens).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [(), ("embed_tokens",), ("lm_head",)])
def test_shares_of_a_step_give_its_gradients(tied, frozen, tokens):
    model = Llama(tiny_config(tie_word_embeddings=tied))
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = [tokens[:1], tokens[1:2]]
    expected = torch.autograd.grad(sum(model(row, targets=row) / 2 for row in rows), wanted)
    for row in rows:
        model(row, targets=row, share=0.5).backward()
    assert all(torch.allclose(a.grad, b, atol=1e-7) for a, b in zip(wanted, expected))
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_a_loss_without_targets_is_zero_and_has_no_gradient(tmp_path, tokens):
    model = Llama(tiny_config())
    loss = model(tokens, targets=torch.full_like(tokens, -100))
    loss.backward()
    assert loss.item() == 0 and model.lm_head.weight.grad.abs().max() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype, copies", [("float32", 0.0), ("bfloat16", 0.5)])
def test_loading_holds_no_second_copy(dtype, copies, tmp_path):
    """Measure anonymous memory, which does not include the memory-mapped file. In the file's own dtype the
    weights take none (even in a forward pass). In another dtype the cast weights take it once."""
    config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
                         num_attention_heads=8)  # fmt: skip
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    init_weights(model, 0)
    model.save_pretrained(tmp_path, max_shard_bytes=10**8)
    size = sum(parameter.nbytes for parameter in model.parameters())
    code = f"""if True:
        import threading, time, torch
        from mala.model import Embedding, Llama
        def held():
            return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
        torch.ones(8, 1024) @ torch.ones(1024, 1024)  # the thread pool and its buffers
        before, peak, done = held(), 0, False
        def watch():
            global peak
            while not done:
                peak = max(peak, held())
                time.sleep(0.001)
        watcher = threading.Thread(target=watch)
        watcher.start()
        model = Llama.from_pretrained({str(tmp_path)!r}, dtype=torch.{dtype})
        if torch.{dtype} == torch.float32:
            with torch.no_grad():
                model(torch.zeros(1, 8, dtype=torch.int64))
        done = True
        watcher.join()
        print(peak - before)
    """
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert int(printed) < (copies + 0.25) * size, f"held {int(printed) / size:.2f} of the file"


def test_changing_a_loaded_weight_leaves_the_file_alone(tmp_path, tokens):
    make_reference(tmp_path)
    model = Llama.from_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_old_exports_hold_rotary_buffers_which_are_skipped(tmp_path, tokens):
    reference = make_reference(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / WEIGHTS)
    assert (Llama.from_pretrained(tmp_path)(tokens) - reference(tokens).logits).abs().max() < 1e-4


def spoil_config(**changes):
    def spoil(path: Path):
        values = json.loads((path / "config.json").read_text())
        values.update(changes)
        (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "REMOVE"}))

    return spoil


def spoil_weights(change):
    def spoil(path: Path):
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return spoil


BAD = {
    "no config": (lambda path: (path / "config.json").unlink(), r"config\.json: there is no such file"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), r"config\.json: not a JSON file"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), r"found a JSON list"),
    "no hidden_size": (spoil_config(hidden_size="REMOVE"), r"config\.json: there is no 'hidden_size'"),
    "hidden_size is text": (spoil_config(hidden_size="64"), r"hidden_size is '64', expected a positive whole number"),
    "another architecture": (spoil_config(model_type="gpt2"), r"model_type is 'gpt2', expected 'llama'"),
    "another activation": (spoil_config(hidden_act="gelu"), r"hidden_act is 'gelu'"),
    "quantised": (spoil_config(quantization_config={"bits": 4}), r"quantization_config is"),
    "heads": (spoil_config(num_key_value_heads=3), r"not a multiple of num_key_value_heads 3"),
    "flag": (spoil_config(attention_bias="yes"), r"attention_bias is 'yes', expected true or false"),
    "rope type": (spoil_config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), r"rope_type is 'yarn'"),
    "rope factor": (spoil_config(rope_parameters={"rope_type": "linear"}), r"factor of the linear rotary scaling"),
    "rope type list": (spoil_config(rope_parameters={"rope_type": ["linear"]}), r"rope_type is \['linear'\]"),
    "rope list": (spoil_config(rope_parameters=[1]), r"the rotary settings are \[1\]"),
    "another width": (spoil_config(intermediate_size=100), r"mlp\.\w+\.weight is float32 \(.*config\.json"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), r"model\.safetensors: there is no such file"),
    "truncated": (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100]), r"truncated"),
    "empty": (lambda path: (path / WEIGHTS).write_bytes(b""), r"truncated"),
    "missing tensor": (spoil_weights(lambda t: t.pop("model.norm.weight")), r"lack 1 tensors.*'model\.norm\.weight'"),
    "extra tensor": (spoil_weights(lambda t: t.update(extra=torch.ones(1))), r"hold 'extra'"),
    "untied": (spoil_config(tie_word_embeddings=True), r"lm_head\.weight and embed_tokens differ"),
    "integers": (spoil_weights(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})), r"int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_in_one_sentence(case, tmp_path):
    make_reference(tmp_path)
    spoil, message = BAD[case]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Llama.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_truncated_shard_is_named(tmp_path):
    make_reference(tmp_path, shard="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{shard.name}: truncated"):
        Llama.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: there is no such file, but {INDEX} names it"):
        Llama.from_pretrained(tmp_path)
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 61234\n")
    with pytest.raises(UserError, match=rf"{shard.name}: found a Git LFS pointer, .*run `git lfs pull`"):
        Llama.from_pretrained(tmp_path)
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    name = next(iter(load_file(first)))
    shard.write_bytes(whole)
    save_file({**load_file(shard), name: torch.ones(1)}, shard)
    with pytest.raises(UserError, match=f"{shard.name}: holds '{name}', as {first.name} does"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match="no 'weight_map'"):
        Llama.from_pretrained(tmp_path)


def from_dict(values):
    return LlamaConfig(**fields_of(values, LlamaConfig))


def test_named_models_are_the_published_ones():
    """Compare with the published config.json files. The next test has those of LLaMA 2 7B and 3.1 8B."""
    files = {"demo": ROOT / "assets/tiny-llama/config.json"}
    if SHARED.exists():
        files["llama-3.2-1b"] = SHARED / "llama3/config.json"
    for name, file in files.items():
        assert named(name) == read_config(file, LlamaConfig), name
    sizes = {"llama-2-7b": 6_738_415_616, "llama-3.2-1b": 1_235_814_400, "tinyllama-1.1b": 1_100_048_384}
    assert NAMED.keys() == sizes.keys() | {"demo"}
    for name, size in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in Llama(named(name)).parameters()) == size, name


def test_configs_of_the_hub_load(tmp_path):
    """Load the published config.json of LLaMA 2 7B and LLaMA 3.1 8B (only the keys of the architecture)."""
    llama2 = from_dict({"model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "vocab_size": 32000,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None, "pretraining_tp": 1})  # fmt: skip
    assert (llama2.head_dim, llama2.rope_theta, llama2.rope_scaling) == (128, 10000.0, None)
    llama3 = from_dict({"model_type": "llama", "hidden_size": 4096, "vocab_size": 128256,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "eos_token_id": [128001, 128008]})  # fmt: skip
    assert llama3.rope_scaling["factor"] == 8.0 and llama3.num_key_value_heads == 8
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(llama2).parameters()) == 6_738_415_616
        assert sum(p.numel() for p in Llama(llama3).parameters()) == 8_030_261_248


def test_the_gradient_of_a_lookup_has_the_same_bits_with_several_threads():
    """Tokens repeat, so the gradients of a row are added up. Their order must not depend on threads."""
    torch.manual_seed(0)
    embedding, tokens = Embedding(2000, 96), torch.randint(0, 40, (8, 256))
    gradient, found = torch.randn(8, 256, 96), []
    threads = torch.get_num_threads()
    try:
        for count in (1, *[2] * 20):
            torch.set_num_threads(count)
            embedding.weight.grad = None
            embedding(tokens, into_grad=True).backward(gradient)
            found.append(embedding.weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)
