"""What test_distributed.py starts with torchrun: a sharded model beside the whole one.

Prints "equal" at the end.
"""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mala.lora import LoRAConfig, add_lora, trainable_parameters  # noqa: E402
from mala.model import Llama, LlamaConfig  # noqa: E402
from mala.running import distributed  # noqa: E402
from mala.scoring import documents_nll  # noqa: E402
from mala.words.tokenizer import Tokenizer  # noqa: E402

TOKENIZER = Tokenizer.from_pretrained(Path(__file__).resolve().parent.parent / "assets/tiny-llama")


def make(tied: bool, recompute: bool, dtype: torch.dtype) -> Llama:
    # 2,049 rows, and 3 of rank: nothing divides evenly among the processes.
    model = Llama(LlamaConfig(vocab_size=2049, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64))  # fmt: skip
    model.init_weights(0)
    model.to(dtype)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=3, lora_dropout=0.1))
    model.gradient_checkpointing = recompute
    return model.train()


def step(
    model: Llama, rank: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of 8 rows in micro-batches of 2, of which each process has its share."""
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

        # Scoring shares the documents out, also an odd number of batches, and trains on afterwards.
        expected, counts = documents_nll(alone, TOKENIZER, documents)
        nll, sharded_counts = documents_nll(sharded, TOKENIZER, documents, world)
        torch.testing.assert_close(torch.tensor(nll), torch.tensor(expected), rtol=1e-3, atol=1e-3)
        assert counts == sharded_counts
        step(sharded, world.rank, world.size, dtype)

        # Gathered and filled in again, every bit is the same.
        gathered = distributed.gather(parts, world)
        assert (len(gathered) == len(parts)) if world.is_main else not gathered
        gathered = world.from_main(lambda gathered=gathered: gathered)
        for name, parameter in parts.items():
            before = parameter.to_local().clone()
            parameter.detach().to_local().zero_()
            distributed.fill(parameter, gathered[name])
            assert torch.equal(parameter.to_local(), before), name
    raise_at = world.sum(torch.tensor(float(world.rank)))
    assert raise_at.item() == sum(range(world.size))


if __name__ == "__main__":
    main()
