"""Test what trains and how: new rows only, all weights, learning rates, attention within documents."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from conftest import tiny_config
from safetensors.torch import load_file
from test_lora import checkpoint, train
from test_train import SHORT, refuse, succeed

from mala.cli import UserError
from mala.cross_entropy import linear_cross_entropy
from mala.lora import LoRAConfig, add_lora, merge_lora, train_all, trainable_parameters
from mala.model import Llama, document_mask
from mala.running.settings import RESULT, Settings
from mala.storage.peft_adapter import load_adapter, save_adapter


@pytest.fixture
def tokens():
    return torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(1))


# ---- Only new rows

ROWS = {
    "untied": (False, {"embed_tokens": [90, 91, 92], "lm_head": [90, 91, 92, 93]}),
    "tied": (True, {"embed_tokens": list(range(60, 100))}),
    "tied, anywhere": (True, [7, 3, 44]),
    "embed_tokens alone": (False, [7, 3, 44]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_train_as_in_peft_and_files_go_both_ways(kind, tokens, tmp_path):
    is_tied, rows = ROWS[kind]
    base = checkpoint(tmp_path / "base", tie_word_embeddings=is_tied)
    reference = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=rows, task_type="CAUSAL_LM"
    )
    reference = peft.get_peft_model(reference, config)
    reference.save_pretrained(tmp_path / "start")
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path / "start")

    ours, theirs = train(model, tokens, 4, share=1.0), train(reference, tokens, 4)
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[3] < ours[1]
    save_adapter(model, tmp_path / "ours", str(base))
    reference.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert any("trainable_tokens_delta" in name for name in a) and not any(
        "embed_tokens.w" in name for name in a
    )

    loaded = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = loaded(tokens).logits
        assert torch.allclose(model.eval()(tokens), expected, atol=1e-5)
        merge_lora(model)
        assert torch.allclose(model(tokens), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, expected, atol=1e-5)


@pytest.mark.parametrize("is_tied, rows", [
    (True, {"embed_tokens": [5, 6], "lm_head": [5, 6]}), (True, {"model.embed_tokens": [5, 6]}),
    (False, {"model.embed_tokens": [8], "lm_head": [9, 2]}),
])  # fmt: skip
def test_all_spellings_of_peft_load(is_tied, rows, tokens, tmp_path):
    base = checkpoint(tmp_path / "base", tie_word_embeddings=is_tied)
    reference = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=rows, task_type="CAUSAL_LM"
    )
    reference = peft.get_peft_model(reference, config)
    train(reference, tokens, 2)
    reference.save_pretrained(tmp_path / "adapter")
    model = Llama.from_pretrained(base)
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(model.eval()(tokens), reference.eval()(tokens).logits, atol=1e-5)


def test_an_adapter_without_rows_says_nothing_of_them(tmp_path):
    model = Llama(tiny_config())
    add_lora(model, LoRAConfig())
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"] is None


@pytest.mark.parametrize("index", [slice(60, 100), [3, 77, 20]])
@pytest.mark.parametrize("share", [None, 0.5])
def test_the_gradient_of_some_rows_is_a_part_of_the_whole(index, share, monkeypatch):
    monkeypatch.setattr("mala.cross_entropy.CHUNK_BYTES", {"cpu": 4 * 100 * 16})  # several chunks
    hidden, weight = torch.randn(50, 8), torch.randn(100, 8)
    targets = torch.randint(100, (50,))
    whole, rows = weight.clone().requires_grad_(), weight[index].clone().requires_grad_()
    for trained, only in ((whole, None), (rows, (rows, index))):
        loss = linear_cross_entropy(
            hidden, trained if only is None else weight, targets, share=share, only=only
        )
        loss.backward()
    assert torch.allclose(rows.grad, whole.grad[index], atol=1e-6) and rows.grad.abs().sum() > 0


WRONG_ROWS = {
    "beyond": ({"embed_tokens": [5, 100]}, "names row 100, but embed_tokens has 100"),
    "twice": ({"embed_tokens": [5, 5]}, "expected a list of distinct row numbers"),
    "none": ({"lm_head": []}, "expected a list of distinct row numbers"),
    "other": ({"q_proj": [1]}, "names 'q_proj', expected embed_tokens or lm_head"),
}


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_wrong_rows_are_one_sentence(kind):
    rows, sentence = WRONG_ROWS[kind]
    with pytest.raises(UserError, match=sentence):
        add_lora(Llama(tiny_config()), LoRAConfig(modules_to_save=(), trainable_token_indices=rows))


def test_rows_are_not_saved_whole_too_and_a_tied_head_is_no_other_matrix():
    with pytest.raises(UserError, match="not already in modules_to_save"):
        LoRAConfig(trainable_token_indices={"lm_head": [1]})
    rows = LoRAConfig(modules_to_save=(), trainable_token_indices={"lm_head": [1]})
    with pytest.raises(UserError, match="names lm_head, but the model is tied; name embed_tokens"):
        add_lora(Llama(tiny_config(tie_word_embeddings=True)), rows)


# ---- All weights


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_training_all_weights_is_transformers_full_fine_tuning(changes, tokens, tmp_path):
    base = checkpoint(tmp_path / "base", **changes)
    model, reference = Llama.from_pretrained(base), transformers.LlamaForCausalLM.from_pretrained(base)
    train_all(model)
    assert trainable_parameters(model).keys() == dict(model.named_parameters()).keys()
    ours, theirs = train(model, tokens, 4, share=1.0), train(reference.float(), tokens, 4)
    assert ours == pytest.approx(theirs, abs=1e-4) and ours[-1] < ours[0]
    expected = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, expected[name], atol=2e-4), name


def test_all_weights_train_in_float32_and_are_computed_in_bfloat16(tokens, tmp_path):
    model = Llama.from_pretrained(checkpoint(tmp_path / "base"), torch.bfloat16)
    train_all(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model(tokens).dtype == model.hidden_states(tokens).dtype == torch.bfloat16
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = reference(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    for name, theirs in reference.named_parameters():
        ours = model.get_parameter(name).grad
        assert ours.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.grad.flatten(), 0) > 0.99, name


def read(folder):
    """Return name -> bytes of every file that a resumed run must reproduce."""
    files = [file for file in folder.rglob("*") if file.is_file() and "step-6" in file.parts]
    files += [folder / "nll.json", *(folder / "model").glob("*"), *(folder / "adapter").glob("*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


KINDS = {
    "all": ["--train", "all", "--schedule", "cosine", "--attend", "document", "--moments", "8bit"],
    "new": ["--train-rows", "new", "--embedding-lr", "1e-3", "--head-lr", "2e-3"],
    "stages": ["--warmup-embeddings", "4", "--attend", "document"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_ends_with_the_same_bits(kind, tmp_path):
    run = [*SHORT, "--save-every", "3", *KINDS[kind], "--out", tmp_path / "out"]
    succeed("train.py", *run)
    expected = read(tmp_path / "out")
    assert any(name.startswith("model" if kind == "all" else "adapter") for name in expected)
    for name in ("checkpoints/step-6", "model", "adapter"):
        shutil.rmtree(tmp_path / "out" / name, ignore_errors=True)
    succeed("train.py", *run)
    assert read(tmp_path / "out") == expected


def test_the_checkpoint_of_all_weights_loads_in_transformers_and_evaluate_finds_it(tmp_path):
    succeed("train.py", *SHORT, "--train", "all", "--out", tmp_path / "out")
    after = json.loads((tmp_path / "out/nll.json").read_text())["after"]
    assert not (tmp_path / "out/adapter").exists()
    data = ["--data", tmp_path / "out/held_out"]
    succeed("evaluate.py", *data, "--model", tmp_path / "out", "--out", tmp_path / "nll")
    found = json.loads((tmp_path / "nll/results.json").read_text())
    assert found["model"] == str(tmp_path / "out/model") and found["adapter"] is None
    # The checkpoint has the base's dtype, bfloat16.
    assert found["macro"]["nll_per_document"] == pytest.approx(after["macro"]["nll_per_document"], rel=1e-3)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/model")
    line = (tmp_path / "out/held_out/swh_Latn.jsonl").read_text().splitlines()[0]
    ids = torch.tensor([tokenizer(json.loads(line)["text"]).input_ids])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        ours = Llama.from_pretrained(tmp_path / "out/model", torch.float32)(ids[:, :-1], targets=ids[:, 1:])
    assert ours.item() * (ids.numel() - 1) == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.parametrize("first, then", [("lora", "all"), ("all", "lora")])
def test_a_finished_result_is_not_replaced_by_one_of_another_kind(first, then, tmp_path, monkeypatch):
    run = [*SHORT, "--out", tmp_path / "out", "--train"]
    succeed("train.py", *run, first)
    shutil.rmtree(tmp_path / "out/checkpoints")  # large, and no longer needed
    assert f"had train {first}, this one has {then}" in refuse("train.py", [*run, then], monkeypatch)
    assert (tmp_path / "out" / RESULT[first]).is_dir()


def test_all_weights_need_no_settings_of_lora(tmp_path):
    run = [*SHORT, "--train", "all", "--out", tmp_path / "out"]
    succeed("train.py", *run, "--target-modules", "", "--modules-to-save", "")
    assert "this run is finished" in succeed("train.py", *run, "--r", "64")


def test_new_rows_train_alone_in_a_run(tmp_path):
    out = tmp_path / "out"
    succeed("train.py", *SHORT, "--train-rows", "new", "--out", out)
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    base = load_file(out / "base/model.safetensors")
    old = load_file("assets/tiny-llama/model.safetensors")["model.embed_tokens.weight"]
    new = len(base["model.embed_tokens.weight"]) - len(old)
    of_rows = {name: tensor for name, tensor in adapter.items() if "lora" not in name}
    assert new > 100 and all(len(tensor) == new for tensor in of_rows.values())
    moments = load_file(out / "checkpoints/step-6/optimizer.safetensors")
    assert not any(name.endswith("weight") for name in moments)
    assert {len(tensor) for name, tensor in moments.items() if "trainable_tokens_delta" in name} == {new}
    model = transformers.LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, out / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "adapter")
    nll = json.loads((out / "nll.json").read_text())["after"]["languages"]["swh_Latn"]
    total = 0.0
    for line in (out / "held_out/swh_Latn.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"]).input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    assert total / nll["documents"] == pytest.approx(nll["nll_per_document"], rel=1e-5)


# ---- Learning rates and stages


def test_the_cosine_is_transformers(monkeypatch):
    from train import learning_rate

    settings = Settings(lr=4e-5, warmup_steps=5, schedule="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-5)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, 5, 40)
    for step in range(40):
        # transformers' warm-up starts with a step at rate 0; ours ends with a step at the full rate.
        expected = theirs.get_last_lr()[0] if step >= 5 else 4e-5 * (step + 1) / 5
        assert learning_rate(step, 40, settings) == pytest.approx(expected, rel=1e-6, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_every_module_has_its_rate():
    model = Llama(tiny_config())
    settings = Settings(lr=1e-3, embedding_lr=1e-4, head_lr=5e-4)
    settings.choose_trained(model, 100)
    rates = {}
    for group in settings.parameter_groups(trainable_parameters(model)):
        rates |= {id(parameter): group["relative_lr"] for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in trainable_parameters(model).items()}
    assert found.pop("model.embed_tokens.weight") == pytest.approx(0.1)
    assert found.pop("lm_head.weight") == pytest.approx(0.5)
    assert set(found.values()) == {1.0}
    alone = Settings(lr=1e-3, embedding_lr=1e-4).parameter_groups(trainable_parameters(model))
    assert sorted(len(group["params"]) for group in alone) == [2, 8]  # lm_head gets the rate of embed_tokens


def test_embeddings_train_alone_at_first(tmp_path):
    run = [*SHORT, "--save-every", "2", "--keep", "9", "--warmup-embeddings", "2", "--out", tmp_path / "out"]
    succeed("train.py", *run)
    steps = [load_file(tmp_path / f"out/checkpoints/step-{n}/adapter_model.safetensors") for n in (2, 4)]
    of_b = [[tensor.abs().max() for name, tensor in step.items() if "lora_B" in name] for step in steps]
    assert max(of_b[0]) == 0 and min(of_b[1]) > 0
    name = "base_model.model.model.embed_tokens.weight"
    assert not torch.equal(steps[0][name], load_file(tmp_path / "out/base/model.safetensors")[name[17:]])


# ---- Attention within documents


@pytest.mark.parametrize("recomputed", [0, 2])
def test_attention_stays_in_its_document_as_if_each_were_read_alone(recomputed, tmp_path):
    base = checkpoint(tmp_path / "base")
    model = Llama.from_pretrained(base)
    train_all(model)
    model.recomputed_blocks = recomputed
    reference = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    documents = [torch.randint(3, 100, (length,)) for length in (5, 1, 9, 14)]
    documents = [torch.cat([torch.tensor([1]), text]) for text in documents]
    documents[0] = documents[0][1:]  # a sequence seldom begins with a document
    packed = torch.cat(documents)[None]
    mask = document_mask(packed, 1, torch.float32)
    logits = model(packed, mask=mask)[0]
    expected = torch.cat([reference(text[None]).logits[0] for text in documents])
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(model(packed)[0], expected, atol=1e-2)  # it looks back farther

    targets = torch.randint(100, packed.shape)
    model(packed, targets=targets, mask=mask, share=1.0).backward()
    torch.nn.functional.cross_entropy(expected, targets[0]).backward()
    for name, theirs in reference.named_parameters():
        assert torch.allclose(model.get_parameter(name).grad, theirs.grad, atol=1e-5), name


# ---- Printed output


def test_without_a_terminal_each_logged_step_is_a_line_and_samples_are_shown(tmp_path):
    run = [*SHORT, "--eval-every", "4", "--samples", "swh_Latn,amh_Ethi", "--out", tmp_path / "out"]
    printed = succeed("train.py", *run).splitlines()
    lines = [line for line in printed if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 6" for n in (2, 4, 6)]
    for line in lines:
        assert all(part in line for part in ("loss ", "lr ", "tokens/s", " GB", " left")), line
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [set(line.get("samples", ())) for line in metrics] == [set(), {"swh_Latn", "amh_Ethi"}, set()]
    text = metrics[1]["samples"]["swh_Latn"]
    assert all(" …" in sample and sample.partition(" …")[0] for sample in metrics[1]["samples"].values())
    first = json.loads((tmp_path / "out/held_out/swh_Latn.jsonl").read_text().splitlines()[0])["text"]
    assert " …" in text and first.startswith(text.partition(" …")[0]) and f"swh_Latn: {text}" in printed


WRONG = {
    "train_rows is new, but extend_vocab is 0": ["--train-rows", "new", "--extend-vocab", "0"],
    "train is all, which trains all rows": ["--train-rows", "new", "--train", "all"],
    "warmup_embeddings needs modules_to_save, which is empty": [
        "--warmup-embeddings",
        "2",
        "--modules-to-save",
        "",
    ],
    "samples are shown at every --eval-every, which is not set": ["--samples", "swh_Latn"],
    "samples names xxx_Latn; expected some of": ["--samples", "xxx_Latn", "--eval-every", "2"],
    "samples names eng_Latn; expected some of": ["--samples", "eng_Latn", "--eval-every", "2"],
    "weights names eng_Latn; expected some of": ["--weights", "eng_Latn=2"],
    "embedding_lr is -1.0, expected a positive number": ["--embedding-lr", "-1"],
    "head_lr is given, but modules_to_save lacks lm_head": [
        "--head-lr",
        "1",
        "--modules-to-save",
        "embed_tokens",
    ],
    "invalid choice: 'some'": ["--train", "some"],
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_setting_is_one_sentence(sentence, tmp_path, monkeypatch):
    args = [*SHORT, *WRONG[sentence], "--out", tmp_path / "out"]
    assert sentence in refuse("train.py", args, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_what_the_model_does_not_have_is_refused(tmp_path, monkeypatch):
    shutil.copytree("assets/tiny-llama", tmp_path / "tied")
    config = json.loads((tmp_path / "tied/config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    args = ["--model", tmp_path / "tied", "--head-lr", "1e-3", "--out", tmp_path / "out"]
    if not config.get("tie_word_embeddings"):
        from mala.storage.weights import read_weights, write_weights

        weights = {name: tensor.clone() for name, tensor in read_weights(tmp_path / "tied")}
        weights.pop("lm_head.weight")
        write_weights(tmp_path / "tied", weights)
    assert "head_lr is given, but lm_head is tied to embed_tokens" in refuse("train.py", args, monkeypatch)
