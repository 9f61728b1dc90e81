"""Compare mala.lora and mala.storage.peft_adapter with PEFT."""

import dataclasses
import json
import re
import sys

import peft
import pytest
import torch
import transformers
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from mala.cli import UserError
from mala.lora import LoRAConfig, add_lora, merge_lora, parameter_report, trainable_parameters
from mala.model import Llama, LlamaConfig
from mala.storage.peft_adapter import load_adapter, merge_checkpoint, save_adapter
from tools.known_models import init_weights
from tools.merge_command import main

MALA = LoRAConfig(r=8, lora_alpha=32, lora_dropout=0.0)


def checkpoint(folder, **changes):
    """Write a random checkpoint and return its folder."""
    model = Llama(tiny_config(**changes))
    init_weights(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 10.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base")


@pytest.fixture
def tokens():
    return torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(1))


def peft_model(base, config: LoRAConfig = MALA, **changes):
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **changes}))


def train(model, tokens, steps=5, lr=1e-2, share=None):
    """Train a few steps, so that B is not zero, and return the losses. share=1 trains as train.py does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        x, y = tokens[step % 2 :: 2, :-1], tokens[step % 2 :: 2, 1:]
        if isinstance(model, Llama):
            loss = model(x, targets=y, share=share)
        else:
            loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_adapter_saved_here_loads_in_peft(base, tokens, tmp_path):
    model = Llama.from_pretrained(base)
    add_lora(model, MALA)
    train(model, tokens)
    model.eval()
    save_adapter(model, tmp_path / "adapter", base=str(base))
    reference = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    untouched = reference(tokens).logits
    reference = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert (reference(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert (untouched - model(tokens)).abs().max() > 0.1


def test_an_adapter_saved_by_peft_loads_here(base, tokens, tmp_path):
    reference = peft_model(base)
    train(reference, tokens)
    reference.save_pretrained(tmp_path / "adapter")
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path / "adapter")
    model.eval()
    assert (reference(tokens).logits - model(tokens)).abs().max() < 1e-4


def test_the_file_holds_the_keys_and_shapes_that_peft_writes(base, tokens, tmp_path):
    peft_model(base).save_pretrained(tmp_path / "theirs")
    model = Llama.from_pretrained(base)
    add_lora(model, MALA)
    save_adapter(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }


def copy_start(model, reference):
    """Start A where PEFT's starts. Return pairs of our trained parameters and PEFT's."""
    theirs = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    pairs = []
    for name, parameter in trainable_parameters(model).items():
        module, _, leaf = name.rpartition(".")
        theirs_name = {"weight": f"{module}.modules_to_save.default.weight"}.get(
            leaf, f"{name}.default.weight"
        )
        pairs.append((parameter, theirs["base_model.model." + theirs_name]))
        if leaf == "lora_A":
            parameter.data.copy_(pairs[-1][1].data)
    assert len(pairs) == len(theirs)
    return pairs


def test_training_is_pefts_training(base, tokens):
    """With the same start, batches and optimiser, every loss and the trained parameters are equal."""
    model, reference = Llama.from_pretrained(base), peft_model(base)
    add_lora(model, MALA)
    pairs = copy_start(model, reference)
    assert len(pairs) == 2 * 2 * 2 + 2
    ours, theirs = train(model, tokens, steps=50, lr=1e-3), train(reference, tokens, steps=50, lr=1e-3)
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-4 and ours[-1] < ours[0] - 0.5
    assert max((a - b).abs().max() for a, b in pairs) < 1e-4


def test_dropout_has_pefts_distribution(base, tokens):
    """Draw often from one layer with one input, and compare mean and covariance of the output."""
    config = LoRAConfig(lora_dropout=0.3, modules_to_save=())
    model, reference = Llama.from_pretrained(base), peft_model(base, config)
    add_lora(model, config)
    ours = model.model["layers"][0].self_attn.q_proj
    theirs = reference.base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    torch.nn.init.normal_(ours.lora_B)
    with torch.no_grad():
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        x = torch.randn(32).expand(20_000, 32)
        ours.train(), theirs.train()
        a, b = ours(x).double(), theirs(x).double()
    scale = a.std(0) / 20_000**0.5
    assert ((a.mean(0) - b.mean(0)).abs() < 6 * scale).all()
    # Dropout does not change the mean.
    assert ((a.mean(0) - ours.eval()(x[:1]).double()).abs() < 6 * scale).all()
    assert (torch.cov(a.T) - torch.cov(b.T)).norm() < 0.05 * torch.cov(b.T).norm()
    assert not torch.equal(a, b)


def test_only_the_adapter_trains_and_in_float32(base, tokens):
    model = Llama.from_pretrained(base, dtype=torch.bfloat16)
    add_lora(model, LoRAConfig())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert set(trainable_parameters(model)) == {
        *(f"model.layers.{i}.self_attn.{m}.lora_{x}" for i in range(2) for m in ("q_proj", "v_proj") for x in "AB"),
        "model.embed_tokens.weight", "lm_head.weight"}  # fmt: skip
    assert all(p.dtype == torch.float32 for p in trainable_parameters(model).values())
    losses = train(model, tokens, steps=30)
    assert losses[-1] < losses[0] - 1
    assert all(
        torch.equal(p, frozen[n]) and p.dtype == torch.bfloat16
        for n, p in model.named_parameters()
        if n in frozen
    )


def test_a_new_adapter_changes_nothing_and_dropout_only_training(base, tokens):
    model = Llama.from_pretrained(base)
    expected = model(tokens)
    add_lora(model, LoRAConfig(lora_dropout=0.5))
    assert torch.equal(model(tokens), expected)
    train(model, tokens)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(dtype, base, tokens, tmp_path):
    model = Llama.from_pretrained(base, dtype)
    add_lora(model, MALA)
    train(model, tokens)
    model.eval()
    expected = model(tokens)
    adapted = model.model["layers"][1].self_attn.v_proj
    merge_lora(model)
    layer = model.model["layers"][1].self_attn.v_proj
    assert type(layer) is torch.nn.Linear and layer.weight.dtype == dtype
    if dtype == torch.float32:
        assert (model(tokens) - expected).abs().max() < 1e-4
        model.save_pretrained(tmp_path / "merged")
        reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert (reference(tokens).logits - expected).abs().max() < 1e-4
    else:  # the exact sum is rounded once
        exact = adapted.weight.double() + 4 * adapted.lora_B.double() @ adapted.lora_A.double()
        assert ((layer.weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_command_merge_writes_a_plain_checkpoint(dtype, base, tokens, tmp_path, monkeypatch, capsys):
    Llama.from_pretrained(base, dtype).save_pretrained(tmp_path / "base")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    reference.resize_token_embeddings(130)
    reference = peft.get_peft_model(reference, peft.LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"]))  # fmt: skip
    train(reference, tokens)
    reference.eval().save_pretrained(tmp_path / "adapter")
    (tmp_path / "base/tokenizer.json").write_text('{"old": 1}')
    (tmp_path / "adapter/tokenizer.json").write_text('{"new": 1}')
    arguments = ["mala.lora", "merge"]
    for flag, folder in (("--model", "base"), ("--adapter", "adapter"), ("--out", "out")):
        arguments += [flag, str(tmp_path / folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    assert "merged" in capsys.readouterr().out and "new" in (tmp_path / "out/tokenizer.json").read_text()
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in merged.parameters()} == {
        dtype
    } and merged.config.vocab_size == 130
    difference = (merged.float()(tokens + 30).logits - reference(tokens + 30).logits).abs()
    assert (
        difference.max() < 1e-4
        if dtype == torch.float32
        else difference.mean() < 0.05 * reference(tokens).logits.std()
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="out: the output folder exists"):
        main()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "other")])
    with pytest.raises(UserError, match="there is no 'r'"):
        main()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_published_adapter_stands_on_a_base_of_the_old_vocabulary(tmp_path):
    """Load MaLA-500's adapter_config.json with narrower tensors: 260,164 rows over a base of 32,000."""
    model = Llama(
        tiny_config(
            vocab_size=32_000,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    init_weights(model, 0)
    published = {
        "auto_mapping": None, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 32, "lora_dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head"], "peft_type": "LORA", "r": 8,
        "revision": None, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(published))
    tensors = {
        f"base_model.model.{name}.weight": torch.randn(260_164, 8)
        for name in ("model.embed_tokens", "lm_head")
    }
    for layer in range(2):
        for target in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors |= {
                f"{name}.lora_A.weight": torch.randn(8, 8),
                f"{name}.lora_B.weight": torch.randn(8, 8),
            }
    torch.save(tensors, tmp_path / "adapter_model.bin")
    load_adapter(model, tmp_path)
    assert model.config.vocab_size == 260_164 == len(model.lm_head.weight)
    loss = model.eval()(torch.tensor([[1, 40_000, 260_163]]), targets=torch.tensor([[40_000, 260_163, 2]]))
    assert 0 < loss.item() < 100
    query = model.model["layers"][0].self_attn.q_proj
    assert (query.scaling, query.dropout) == (4, 0.1)
    assert torch.equal(
        query.lora_B, tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    )


def test_the_share_that_trains_is_mala500s():
    """LLaMA 2 7B with 260,164 pieces trains 2.1 billion of 10.7 billion parameters.

    That is PEFT's count, which includes frozen copies.
    """
    with torch.device("meta"):
        model = Llama(LlamaConfig(260_164, 4096, 11008, 32, 32))
        add_lora(model, LoRAConfig())
    trained = 2 * 260_164 * 4096 + 32 * 2 * 8 * (4096 + 4096)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_report(model) == f"training {trained:,} of {total:,} parameters ({trained / total:.1%})"
    assert round(trained / 1e9, 1) == 2.1 and round((total + 2 * 260_164 * 4096) / 1e9, 1) == 10.7


def test_an_adapter_over_a_longer_vocabulary_resizes_its_base(base, tokens, tmp_path):
    reference = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference.resize_token_embeddings(130)
    reference = peft.get_peft_model(reference, peft.LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"]))  # fmt: skip
    tokens = torch.cat([tokens, tokens + 30], dim=1)
    train(reference, tokens)
    reference.eval().save_pretrained(tmp_path / "adapter")
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path / "adapter")
    model.eval()
    assert model.config.vocab_size == 130
    assert (model(tokens) - reference(tokens).logits).abs().max() < 1e-4


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "every layer by name": dict(r=4, lora_alpha=16, target_modules=EVERY, modules_to_save=()),
    "all-linear": dict(target_modules="all-linear", modules_to_save=()),
    "all-linear and the head": dict(target_modules="all-linear"),
    "regular expression": dict(target_modules=r".*\.0\.self_attn\.(q|o)_proj"),
    "one block": dict(layers_to_transform=(1,)),
    "blocks": dict(layers_to_transform=(0, 7), layers_pattern=("h", "lay.*"), target_modules=EVERY),
    "blocks, but a full name": dict(
        layers_to_transform=(1,), target_modules=("q_proj", "model.layers.0.self_attn.k_proj")
    ),
    "excluded": dict(target_modules=EVERY, exclude_modules=("q_proj", "0.mlp.up_proj", "self_attn")),
    "excluded of some blocks": dict(
        target_modules=EVERY, exclude_modules=r".*(up|v)_proj", layers_to_transform=(1,)
    ),
    "all-linear, excluded": dict(target_modules="all-linear", exclude_modules=r".*\.0\..*"),
    "an expression, excluded": dict(target_modules=r".*_proj", exclude_modules=("mlp.up_proj",)),
    "part of a path": dict(
        target_modules=("1.self_attn.q_proj", "mlp.up_proj", "model.layers.0.self_attn.v_proj")
    ),
    "rslora": dict(use_rslora=True),
    "ranks": dict(rank_pattern={"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 5, "q_proj": 2}),
    "alphas": dict(
        alpha_pattern={r"model\.layers\.0\..*": 5, "v_proj": 64.0}, use_rslora=True, rank_pattern={"proj": 7}
    ),
    "head only": dict(modules_to_save=("lm_head",)),
    "embeddings only": dict(modules_to_save=("embed_tokens",), target_modules=("v_proj",)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_goes_both_ways(kind, base, tokens, tmp_path):
    config = LoRAConfig(**{"lora_dropout": 0.0, **KINDS[kind]})
    reference = peft_model(base, config)
    train(reference, tokens)
    reference.eval().save_pretrained(tmp_path / "theirs")
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path / "theirs")
    assert (model.eval()(tokens) - reference(tokens).logits).abs().max() < 1e-4
    train(model.train(), tokens)
    save_adapter(model.eval(), tmp_path / "ours", base=str(base))
    again = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    assert (again(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert (again(tokens).logits - reference(tokens).logits).abs().max() > 0.01
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert len({tuple(sorted((k, v.shape, v.dtype) for k, v in file.items())) for file in files}) == 1
    fresh = Llama.from_pretrained(base)
    add_lora(fresh, config)
    assert {k: v.shape for k, v in trainable_parameters(fresh).items()} == {
        k: v.shape for k, v in trainable_parameters(model).items()}  # fmt: skip


@pytest.mark.parametrize("layers, pattern", [(1, None), (0, "layers"), ([1], ["h", "layers"]), ([], "layers"),
                                             ([0], ""), ([0, 1], []), ([1], "model.layers")])  # fmt: skip
def test_the_blocks_are_those_that_peft_takes(layers, pattern, base, tokens, tmp_path):
    """PEFT also accepts a single number or pattern instead of a list."""
    changes = dict(layers_to_transform=layers, layers_pattern=pattern, exclude_modules=["0.mlp.up_proj"])
    reference = peft_model(base, LoRAConfig(lora_dropout=0.0, target_modules=EVERY), **changes)
    train(reference, tokens)
    reference.eval().save_pretrained(tmp_path)
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path)
    ours = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert ours == set(reference.targeted_module_names)
    assert (model.eval()(tokens) - reference(tokens).logits).abs().max() < 1e-4


HARMLESS = {
    "transposed": dict(fan_in_fan_out=True),
    "biases": dict(bias="all"),
    "biases of its layers": dict(bias="lora_only"),
    "mica": dict(init_lora_weights="mica"),
    "saved, so no target": dict(target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_no_computation_here_is_taken(case, base, tokens, tmp_path):
    reference = peft_model(base, **HARMLESS[case])
    train(reference, tokens)
    reference.eval().save_pretrained(tmp_path)
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path)
    assert (model.eval()(tokens) - reference(tokens).logits).abs().max() < 1e-4


RENAMED = {
    "as it was in memory": lambda name: name.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
    "another adapter's name": lambda name: name.replace("lora_A.", "lora_A.my-task_1.").replace(
        "lora_B.", "lora_B.my-task_1."
    ),
    "saved whole": lambda name: re.sub(r"(embed_tokens|lm_head)", r"\1.modules_to_save", name),
    "saved whole, with a name": lambda name: re.sub(
        r"(embed_tokens|lm_head)", r"\1.modules_to_save.default", name
    ),
}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("spelling", RENAMED)
def test_all_that_peft_has_called_its_tensors(spelling, file, base, tokens, tmp_path):
    reference = peft_model(base)
    train(reference, tokens)
    reference.eval().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    renamed = {RENAMED[spelling](name): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    # Some versions of PEFT also saved the weights from before training.
    for name in ("model.embed_tokens", "lm_head"):
        renamed[f"base_model.model.{name}.original_module.weight"] = torch.zeros(100, 32)
    save = save_file if file.endswith("safetensors") else torch.save
    save(renamed, tmp_path / file)
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path)
    assert (model.eval()(tokens) - reference(tokens).logits).abs().max() < 1e-4


def test_embeddings_that_an_adapter_holds_but_does_not_train(base, tokens, tmp_path):
    """PEFT saves them if the vocabulary was resized, even if modules_to_save does not name them."""
    reference = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference.resize_token_embeddings(130)
    reference = peft.get_peft_model(
        reference, peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    )
    train(reference, tokens + 30)
    reference.eval().save_pretrained(tmp_path, save_embedding_layers=True)
    model = Llama.from_pretrained(base, dtype=torch.float32)
    load_adapter(model, tmp_path)
    assert (model.eval()(tokens + 30) - reference(tokens + 30).logits).abs().max() < 1e-4
    assert not any(name.endswith("weight") for name in trainable_parameters(model))


@pytest.mark.parametrize("whole", [("embed_tokens", "lm_head"), ("lm_head",), ("embed_tokens",), ()])
def test_a_tied_model_that_peft_untied_has_two_matrices_here(whole, tmp_path, tokens):
    model = Llama(tiny_config(tie_word_embeddings=True))
    init_weights(model, 0)
    model.save_pretrained(tmp_path / "base")
    reference = peft_model(tmp_path / "base", LoRAConfig(lora_dropout=0.0, modules_to_save=whole))
    train(reference, tokens)
    reference.eval().save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    assert (model.eval()(tokens) - reference(tokens).logits).abs().max() < 1e-4
    assert model.config.tie_word_embeddings == (whole == ())
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (merged(tokens).logits - reference(tokens).logits).abs().max() < 1e-4
    with pytest.raises(UserError, match="name both or neither"):
        add_lora(Llama.from_pretrained(tmp_path / "base"), LoRAConfig(modules_to_save=("lm_head",)))


@pytest.mark.parametrize("save_embedding_layers", [False, True])
@pytest.mark.parametrize("whole", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"], []])
@pytest.mark.parametrize("is_tied", [False, True])
def test_what_peft_ties_is_one_matrix_here(is_tied, whole, save_embedding_layers, tmp_path, tokens):
    """With PEFT's `ensure_weight_tying` the config names only embed_tokens, but the file holds both, equal."""
    model = Llama(tiny_config(tie_word_embeddings=is_tied))
    init_weights(model, 0)
    model.save_pretrained(tmp_path / "base")
    config = LoRAConfig(lora_dropout=0.0, modules_to_save=())
    reference = peft_model(tmp_path / "base", config, modules_to_save=whole, ensure_weight_tying=True)
    train(reference, tokens)
    expected = reference.eval()(tokens).logits
    reference.save_pretrained(tmp_path / "theirs", save_embedding_layers=save_embedding_layers)
    load_adapter(model, tmp_path / "theirs")
    assert (model.eval()(tokens) - expected).abs().max() < 1e-4
    assert model.config.tie_word_embeddings == is_tied
    save_adapter(model, tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    assert (again(tokens).logits - expected).abs().max() < 1e-4
    train(model.train(), tokens)  # when training goes on, one matrix stays one
    assert (model.lm_head.weight is model.model["embed_tokens"].weight) == is_tied
    merge_lora(model)
    again = Llama.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    merge_lora(again)
    assert (again(tokens) - expected).abs().max() < 1e-4


def test_recomputation_draws_the_same_dropout(base, tokens):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Llama.from_pretrained(base)
        add_lora(model, LoRAConfig(lora_dropout=0.5))
        torch.nn.init.normal_(model.model["layers"][0].self_attn.q_proj.lora_B)
        model.recomputed_blocks = 2 * recompute
        model(tokens, targets=tokens).backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_tied_model_stays_tied(tmp_path, tokens):
    model = Llama(tiny_config(tie_word_embeddings=True))
    init_weights(model, 0)
    model.save_pretrained(tmp_path / "base")
    add_lora(model, MALA)
    assert model.lm_head.weight is model.model["embed_tokens"].weight and model.lm_head.weight.requires_grad
    train(model, tokens)
    save_adapter(model, tmp_path / "adapter")
    again = Llama.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert again.lm_head.weight is again.model["embed_tokens"].weight
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))


def spoil(adapter, config=None, tensors=None):
    if config:
        values = json.loads((adapter / "adapter_config.json").read_text())
        values.update(config)
        (adapter / "adapter_config.json").write_text(json.dumps(values))
    if tensors:
        file = adapter / "adapter_model.safetensors"
        loaded = load_file(file)
        tensors(loaded)
        save_file(loaded, file)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {
    "rank": (dict(config={"r": 4}), r"lora_A\.weight is torch\.float32 \(8, 32\), expected floating point \(4, 32\)"),
    "missing": (dict(tensors=lambda t: t.pop(A0)), r"there is no .*q_proj\.lora_A"),
    "extra": (dict(tensors=lambda t: t.update(x=torch.ones(1))), r"there is an extra 'x'"),
    "width": (dict(tensors=lambda t: t.update({A0: torch.ones(8, 33)})), r"\(8, 33\), expected floating point \(8, 32\)"),
    "dora": (dict(config={"use_dora": True}), r"adapter_config\.json: use_dora is True, which is not implemented"),
    "alpha": (dict(config={"lora_alpha": "32"}), r"adapter_config\.json: lora_alpha is '32'"),
    "names": (dict(config={"target_modules": ["q_proj", 3]}), r"adapter_config\.json: target_modules"),
    "pissa": (dict(config={"init_lora_weights": "pissa"}), r"init_lora_weights is 'pissa'"),
    "head": (dict(config={"target_modules": ["lm_head"]}), r"target_modules is \('lm_head',\), which matches no layer"),
    "head as LoRA": (dict(config={"target_modules": ["lm_head"], "modules_to_save": []}), r"matches lm_head; expected only"),
    "whole": (dict(config={"modules_to_save": ["down_proj"]}), r"modules_to_save names 'down_proj'"),
    "kind": (dict(config={"peft_type": "IA3"}), r"peft_type is 'IA3'"),
    "trained bias": (dict(config={"bias": "all"}, tensors=lambda t: t.update({A0[:-13] + "bias": torch.ones(32)})),
                     r"there is an extra 'base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.bias'"),
    "variant": (dict(config={"kasa_config": {}}), r"kasa_config is \{\}, which is not implemented"),
    "module": (dict(config={"target_modules": ["query"]}), r"target_modules names 'query', expected layers such as"),
    "nan": (dict(tensors=lambda t: t[A0].view(-1)[3:4].fill_(float("nan"))), r"q_proj\.lora_A\.weight holds NaN or infinity"),
    "infinite": (dict(tensors=lambda t: t["base_model.model.lm_head.weight"][5].fill_(float("inf"))), r"lm_head\.weight holds"),
    "integers": (dict(tensors=lambda t: t.update({A0: torch.ones(8, 32).int()})), r"torch\.int32 \(8, 32\), expected floating"),
    "scalar": (dict(tensors=lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(())})), r"\(\), expected"),
    "no targets": (dict(config={"target_modules": None}), r"there is no 'target_modules'"),
    "no rank": (dict(config={"r": None}), r"there is no 'r'"),
    "huge rank": (dict(config={"r": 10**30}), r"the LoRA rank r is 1000.*, expected a whole number from 1 to 65,536"),
    "huge alpha": (dict(config={"lora_alpha": 10**400}), r"lora_alpha is 1000"),
    "flags within": (dict(config={"rank_pattern": {"(?i)Q_PROJ": 4}}), r"is not a valid regular expression"),
    "no expression": (dict(config={"target_modules": "q_proj("}), r"adapter_config\.json: 'q_proj\(' is not a valid regular expression"),
    "no match": (dict(config={"target_modules": "query_.*"}), r"target_modules is 'query_\.\*', which matches no layer"),
    "head by match": (dict(config={"target_modules": ".*", "modules_to_save": []}), r"matches model\.embed_tokens; expected"),
    "future": (dict(config={"use_new_trick": True}), r"use_new_trick is True, which is not implemented"),
    "layers": (dict(config={"layers_to_transform": [1]}), r"there is an extra '.*layers\.0\.self_attn\.q_proj\.lora_A"),
    "excluded": (dict(config={"exclude_modules": ["v_proj"]}), r"there is an extra '.*v_proj\.lora_A"),
    "no block": (dict(config={"layers_to_transform": 2}), r"matches no layer that layers_to_transform and exclude_modules allow"),
    "negative block": (dict(config={"layers_to_transform": [0, -1]}), r"layers_to_transform is \(0, -1\), expected layer numbers"),
    "true block": (dict(config={"layers_to_transform": True}), r"layers_to_transform is \(True,\), expected layer numbers"),
    "blocks as text": (dict(config={"layers_to_transform": "1"}), r"layers_to_transform is '1', expected a list or int"),
    "blocks of an expression": (dict(config={"layers_to_transform": [1], "target_modules": ".*q_proj"}),
                                r"layers_to_transform is \(1,\), layers_pattern None, target_modules '\.\*q_proj'; expected"),
    "pattern alone": (dict(config={"layers_pattern": "layers"}), r"layers_pattern \('layers',\).*; expected layer numbers"),
    "no part": (dict(config={"layers_to_transform": 1, "layers_pattern": "(h"}), r"is not a valid regular expression"),
    "all excluded": (dict(config={"exclude_modules": "(.*_proj"}), r"'\(\.\*_proj' is not a valid regular expression"),
    "none left": (dict(config={"exclude_modules": ".*_proj"}), r"no layer that layers_to_transform and exclude_modules allow"),
    "pattern": (dict(config={"rank_pattern": {"q_proj": 0}}), r"the LoRA rank r is 0"),
    "patterns": (dict(config={"alpha_pattern": ["q_proj"]}), r"alpha_pattern is \['q_proj'\], expected a dict"),
    "pattern's rank": (dict(config={"rank_pattern": {"q_proj": 4}}), r"\(8, 32\), expected floating point \(4, 32\)"),
    "one matrix": (dict(tensors=lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(99, 32)})), r"lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_adapter_is_one_sentence_and_leaves_the_model_as_it_was(case, base, tokens, tmp_path):
    model = Llama.from_pretrained(base)
    add_lora(model, MALA)
    save_adapter(model, tmp_path / "adapter")
    changes, message = BAD[case]
    spoil(tmp_path / "adapter", **changes)
    model = Llama.from_pretrained(base)
    expected, names = model(tokens), [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert torch.equal(model(tokens), expected) and [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_loaded_is_what_is_saved(base, tokens, tmp_path):
    """That includes embeddings that the adapter has brought but does not train."""
    reference = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference.resize_token_embeddings(130)
    reference = peft.get_peft_model(reference, peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj"]))
    train(reference, tokens + 30)
    reference.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    model, again = Llama.from_pretrained(base), Llama.from_pretrained(base)
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again.eval()(tokens + 30), model.eval()(tokens + 30))


def test_merging_twice_and_saving_what_is_merged_are_refused(base, tokens, tmp_path):
    model = Llama.from_pretrained(base)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge_lora(model)
    add_lora(model, MALA)
    merge_lora(model)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge_lora(model)
    with pytest.raises(
        UserError, match="no adapter to save; a merged adapter is part of the model's weights"
    ):
        save_adapter(model, tmp_path / "adapter")
    add_lora(model, MALA)  # after a merge another adapter may follow
    save_adapter(model, tmp_path / "adapter")


def test_merge_brings_the_bases_files_and_wants_a_tokenizer_for_more_words(base, tmp_path):
    (base / "generation_config.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    for rows in (100, 130):
        model = Llama.from_pretrained(base)
        if rows > 100:
            model.replace_vocabulary(torch.randn(rows, 32), torch.randn(rows, 32))
        add_lora(model, MALA)
        save_adapter(model, tmp_path / f"adapter{rows}")
    merge_checkpoint(base, tmp_path / "adapter100", tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 0
    with pytest.raises(
        UserError, match=r"there is no tokenizer, but the adapter has 130 rows and its base 100"
    ):
        merge_checkpoint(base, tmp_path / "adapter130", tmp_path / "long")
    (tmp_path / "adapter130/tokenizer.model").write_bytes(b"new words")
    with pytest.raises(
        UserError, match=r"adapter130/tokenizer.model: truncated or not a SentencePiece model"
    ):
        merge_checkpoint(base, tmp_path / "adapter130", tmp_path / "long")
    (tmp_path / "adapter130/tokenizer.model").unlink()
    (tmp_path / "adapter130/tokenizer.json").write_text('{"new": "words"}')
    merge_checkpoint(base, tmp_path / "adapter130", tmp_path / "long")
    files = {file.name for file in (tmp_path / "long").iterdir()}
    assert files == {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert "new" in (tmp_path / "long/tokenizer.json").read_text()
    with torch.no_grad():
        model = Llama.from_pretrained(base)
        model.model["layers"][0].mlp.up_proj.weight[0, 0] = float("inf")
        model.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        merge_checkpoint(tmp_path / "broken", tmp_path / "adapter100", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_pickle_that_is_more_than_tensors_is_not_loaded(base, tmp_path):
    model = Llama.from_pretrained(base)
    add_lora(model, MALA)
    save_adapter(model, tmp_path)
    whole = tmp_path / "whole.bin"
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), whole)
    (tmp_path / "adapter_model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"x": Trap()}, tmp_path / "trap.bin")
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    contents = [(tmp_path / "trap.bin").read_bytes(), b"", b"text", whole.read_bytes()[:5000]]
    for content, message in [*((c, "truncated, or not only tensors") for c in contents),
                             ((tmp_path / "list.bin").read_bytes(), "found a list, expected a dict of tensors")]:  # fmt: skip
        (tmp_path / "adapter_model.bin").write_bytes(content)
        with pytest.raises(UserError, match=rf"adapter_model\.bin: {message}"):
            load_adapter(Llama.from_pretrained(base), tmp_path)
    assert not (tmp_path / "sprung").exists()
