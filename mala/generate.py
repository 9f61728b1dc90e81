"""Continue a text, token by token: `python -m mala.generate --prompt "…" [--model …] [--adapter …]`.

One pass reads the prompt and fills the key/value cache. Each later pass reads only the token drawn last.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from mala.cli import UserError, run
from mala.model import KVCache, Llama
from mala.words.tokenizer import Tokenizer


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token of the top-p nucleus (arXiv 1904.09751) of softmax(logits / temperature). logits: (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.float().cpu() / temperature, dim=0)
    p, order = p.sort(descending=True, stable=True)  # (V,) each
    nucleus = p.cumsum(0) - p < top_p  # tokens before it sum to less than top_p, so the first stays
    return int(order[torch.multinomial(p * nucleus, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Llama,
    ids: list,
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    ends: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens after the prompt `ids`, and stop before one of `ends` or the config's
    `eos_token_id`. Raises UserError if the prompt and the new tokens do not fit the model's context."""
    room, total = model.config.max_position_embeddings, len(ids) + max_tokens
    if total > room:
        found = f"a prompt of {len(ids)} tokens and {max_tokens} new tokens exceed the model's context"
        raise UserError(f"{found} of {room}; shorten the prompt or lower --max-tokens")
    eos = model.config.eos_token_id
    ends = {*ends, *(eos if isinstance(eos, list) else [eos])}
    generator = torch.Generator().manual_seed(seed)
    device, cache = model.lm_head.weight.device, KVCache(model, 1, total)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids], device=device), cache=cache)[0, -1]  # (V,)
        token = draw(logits, temperature, top_p, generator)
        if token in ends:
            return
        yield token
        ids = [token]  # the cache holds all others


def stream(tokenizer: Tokenizer, ids: list, new: Iterator[int]) -> Iterator[str]:
    """Yield the text of new tokens. Hold back a character of several byte tokens until it is complete."""
    ids, shown = list(ids), tokenizer.decode(ids)
    for token in new:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


if __name__ == "__main__":
    from tools.generate_command import main

    run(main)
