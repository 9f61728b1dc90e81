"""mala.lora against PEFT."""

import json

import peft
import pytest
import torch
import transformers
from conftest import tiny_config

from mala.cli import UserError
from mala.lora import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter, trainable_parameters
from mala.model import Llama

MALA = LoRAConfig(r=8, lora_alpha=32, lora_dropout=0.0)


@pytest.fixture
def base(tmp_path):
    """A random checkpoint on disk."""
    model = Llama(tiny_config())
    model.init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 10.0)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tokens():
    return torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(1))


def peft_model(base, config: LoRAConfig = MALA):
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.get_peft_model(model, peft.LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, task_type="CAUSAL_LM",
        target_modules=list(config.target_modules), modules_to_save=list(config.modules_to_save)))  # fmt: skip


def train(model, tokens, steps=5, lr=1e-2):
    """A few steps, so that B is not zero. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        x, y = tokens[step % 2 :: 2, :-1], tokens[step % 2 :: 2, 1:]
        if isinstance(model, Llama):
            loss = model(x, targets=y)
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
    from safetensors.torch import load_file

    peft_model(base).save_pretrained(tmp_path / "theirs")
    model = Llama.from_pretrained(base)
    add_lora(model, MALA)
    save_adapter(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


def test_training_is_pefts_training(base, tokens):
    """The same start, batches and optimiser: every loss, and what comes out."""
    reference = peft_model(base)
    model = Llama.from_pretrained(base)
    add_lora(model, MALA)
    theirs = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    ours = trainable_parameters(model)
    pairs = []
    for name, parameter in ours.items():
        module, _, leaf = name.rpartition(".")
        theirs_name = {"weight": f"{module}.modules_to_save.default.weight"}.get(leaf, f"{name}.default.weight")
        pairs.append((parameter, theirs["base_model.model." + theirs_name]))
        if leaf == "lora_A":
            parameter.data.copy_(pairs[-1][1].data)
    assert len(pairs) == len(theirs) == 2 * 2 * 2 + 2
    ours_losses, their_losses = train(model, tokens, steps=20), train(reference, tokens, steps=20)
    assert max(abs(a - b) for a, b in zip(ours_losses, their_losses)) < 1e-4
    assert max((a - b).abs().max() for a, b in pairs) < 1e-4


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
    assert all(torch.equal(p, frozen[n]) and p.dtype == torch.bfloat16 for n, p in model.named_parameters() if n in frozen)


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


def test_merge(base, tokens, tmp_path):
    model = Llama.from_pretrained(base)
    add_lora(model, MALA)
    train(model, tokens)
    model.eval()
    expected = model(tokens)
    merge_lora(model)
    assert (model(tokens) - expected).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "merged")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (reference(tokens).logits - expected).abs().max() < 1e-4


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


def test_lora_on_all_linear_layers_of_a_block(base, tokens, tmp_path):
    everything = LoRAConfig(4, 16, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), ())
    reference = peft_model(base, everything)
    train(reference, tokens)
    reference.save_pretrained(tmp_path / "adapter")
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path / "adapter")
    assert (model.eval()(tokens) - reference(tokens).logits).abs().max() < 1e-4
    assert not any(name.endswith("weight") for name in trainable_parameters(model))


def test_peft_unties_a_tied_model_and_that_is_refused(tmp_path, tokens):
    model = Llama(tiny_config(tie_word_embeddings=True))
    model.init_weights(0)
    model.save_pretrained(tmp_path / "base")
    reference = peft_model(tmp_path / "base")
    train(reference, tokens)
    reference.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="embed_tokens and lm_head differ"):
        load_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="name both or neither"):
        add_lora(model, LoRAConfig(modules_to_save=("lm_head",)))


def test_recomputation_draws_the_same_dropout(base, tokens):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Llama.from_pretrained(base)
        add_lora(model, LoRAConfig(lora_dropout=0.5))
        torch.nn.init.normal_(model.model["layers"][0].self_attn.q_proj.lora_B)
        model.gradient_checkpointing = recompute
        model(tokens, targets=tokens).backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_tied_model_stays_tied(tmp_path, tokens):
    model = Llama(tiny_config(tie_word_embeddings=True))
    model.init_weights(0)
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
    from safetensors.torch import load_file, save_file

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
    "dora": (dict(config={"use_dora": True}), r"use_dora is True"),
    "alpha": (dict(config={"lora_alpha": "32"}), r"adapter_config\.json: lora_alpha is '32'"),
    "names": (dict(config={"target_modules": ["q_proj", 3]}), r"adapter_config\.json: target_modules"),
    "pissa": (dict(config={"init_lora_weights": "pissa"}), r"init_lora_weights is 'pissa'"),
    "head": (dict(config={"target_modules": ["lm_head"]}), r"target_modules names 'lm_head'"),
    "whole": (dict(config={"modules_to_save": ["down_proj"]}), r"modules_to_save names 'down_proj'"),
    "kind": (dict(config={"peft_type": "IA3"}), r"peft_type is 'IA3'"),
    "bias": (dict(config={"bias": "all"}), r"bias is 'all'"),
    "module": (dict(config={"target_modules": ["query"]}), r"target_modules names 'query', expected some of"),
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
