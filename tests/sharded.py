"""Compare a sharded model with a whole one. test_distributed.py starts this script with torchrun.

Prints "equal" at the end.
"""

import itertools
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mala.lora import LoRAConfig, add_lora, merge_lora, start_lora, trainable_parameters  # noqa: E402
from mala.model import Llama, LlamaConfig  # noqa: E402
from mala.running import distributed  # noqa: E402
from mala.scoring import documents_nll, loglikelihoods  # noqa: E402
from mala.storage.model_by_name import load_model  # noqa: E402
from mala.storage.peft_adapter import load_adapter, save_adapter  # noqa: E402
from mala.storage.weights import fill_weights  # noqa: E402
from mala.words.tokenizer import Tokenizer  # noqa: E402
from tools.known_models import init_weights  # noqa: E402

TOKENIZER = Tokenizer.from_pretrained(Path(__file__).resolve().parent.parent / "assets/tiny-llama")


def make(tied: bool, recompute: bool, dtype: torch.dtype) -> Llama:
    # 2,049 rows and LoRA rank 3: nothing divides evenly among the processes.
    model = Llama(LlamaConfig(vocab_size=2049, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64))  # fmt: skip
    init_weights(model, 0)
    model.to(dtype)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=3, lora_dropout=0.1))
    model.recomputed_blocks = 2 * recompute
    return model.train()


def step(
    model: Llama, rank: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and gradients of this process's share of 8 rows, in micro-batches of 2."""
    tokens = torch.randint(2049, (8, 17), generator=torch.Generator().manual_seed(1)).chunk(size)[rank]
    total = torch.zeros(())
    for row in range(0, len(tokens), 2):
        torch.manual_seed(rank * len(tokens) + row)
        distributed.sync_gradients(model, row + 2 == len(tokens))
        loss = model(tokens[row : row + 2, :-1], targets=tokens[row : row + 2, 1:]) * 2 / len(tokens)
        loss.backward()
        total += loss.detach()
    return total, {
        name: distributed.unsharded(parameter.grad) for name, parameter in trainable_parameters(model).items()
    }


def main() -> None:
    with distributed.start("cpu") as world:
        check(world)
    print("equal" if world.is_main else "", flush=True)


def check(world: distributed.World) -> None:
    documents = ["one", "two words", "and a rather long document that goes on " * 5, "x"] * 3
    assert world.from_main(lambda: {"rank": world.rank}) == {"rank": 0}
    for tied, recompute, dtype in itertools.product(
        (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        tolerance = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-4)
        alone, sharded = make(tied, recompute, dtype), make(tied, recompute, dtype)
        distributed.shard(sharded, world)
        parts = trainable_parameters(sharded)
        loss, gradients = step(alone, 0, 1, dtype)
        part, whole = step(sharded, world.rank, world.size, dtype)
        torch.testing.assert_close(world.sum(part) / world.size, loss, **tolerance)
        assert whole.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(whole[name], gradient, **tolerance)

        # Scoring divides the documents, also if the number of batches is odd. The model can train afterwards.
        expected, counts = documents_nll(alone, TOKENIZER, documents)
        nll, sharded_counts = documents_nll(sharded, TOKENIZER, documents, world)
        torch.testing.assert_close(torch.tensor(nll), torch.tensor(expected), rtol=1e-3, atol=1e-3)
        assert counts == sharded_counts
        step(sharded, world.rank, world.size, dtype)

        # Gathering the parameters and filling them in again changes no bit.
        gathered = {name: torch.cat([*distributed.parts(one)]) for name, one in parts.items()}
        for name, parameter in parts.items():
            before = parameter.to_local().clone()
            parameter.detach().to_local().zero_()
            distributed.fill(parameter, gathered[name])
            assert torch.equal(parameter.to_local(), before), name
    check_few_shot(world, sharded, alone)
    check_loading(world, Path(sys.argv[1]))
    raise_at = world.sum(torch.tensor(float(world.rank)))
    assert raise_at.item() == sum(range(world.size))


def check_few_shot(world: distributed.World, sharded: Llama, alone: Llama) -> None:
    """Check few-shot scoring if some batches need two passes and the batches do not divide evenly."""
    for labels in ([[5], [6]], [[5], [6, 7, 8]], [[5, 6], [5, 7], [9]]):
        encoded = [([number] * (3 + 7 * number), labels) for number in range(1, 6)]
        expected = loglikelihoods(alone, encoded, max_length=40, batch_size=2)
        found = loglikelihoods(sharded, encoded, max_length=40, batch_size=2, world=world)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-2, atol=2e-2)


def whole(model: Llama) -> dict[str, torch.Tensor]:
    return {name: torch.cat([*distributed.parts(one)]) for name, one in model.named_parameters()}


def check_loading(world: distributed.World, folder: Path) -> None:
    """Check that sharded loading gives the same bits as one process, also for LoRA's random A."""
    for tied, rows, dtype in itertools.product((False, True), (2049, 2053), (torch.float32, torch.bfloat16)):
        base, adapter = folder / f"base {tied} {rows} {dtype}", folder / f"adapter {tied} {rows} {dtype}"
        if world.is_main:
            model = make(tied, False, torch.float16)
            merge_lora(model)
            model.half().save_pretrained(base)
            (base / "tokenizer.model").write_bytes(TOKENIZER.model)
            model.replace_vocabulary(*torch.randn(1 if tied else 2, rows, 32).expand(2, -1, -1))
            add_lora(model, LoRAConfig(r=3))
            save_adapter(model, adapter)
        world.wait()
        alone = Llama.from_pretrained(base, dtype)
        load_adapter(alone, adapter)
        sharded, _ = load_model(base, adapter, dtype, world, shard="on")
        expected, found = dict(alone.named_parameters()), whole(sharded)
        assert found.keys() == expected.keys() and isinstance(sharded, FSDPModule)
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype and torch.equal(found[name], tensor), name
        # A sharded model is written with the same bytes as a whole one.
        save_adapter(sharded, folder / "gathered" if world.is_main else None)
        for file in ("adapter_model.safetensors", "adapter_config.json") if world.is_main else ():
            assert (folder / "gathered" / file).read_bytes() == (adapter / file).read_bytes()

        alone, sharded = (Llama.from_pretrained(base, dtype, device) for device in ("cpu", "meta"))
        torch.manual_seed(3)
        add_lora(alone, LoRAConfig(r=3))
        add_lora(sharded, LoRAConfig(r=3))
        distributed.shard(sharded, world)
        fill_weights(sharded, base)
        torch.manual_seed(3)
        start_lora(sharded)
        for name, tensor in whole(sharded).items():
            assert torch.equal(alone.get_parameter(name), tensor), name


if __name__ == "__main__":
    main()
