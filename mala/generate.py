"""Continue a text, token by token: `python -m mala.generate --prompt "…" [--model …] [--adapter …]`.

The prompt is read in one pass, which fills the key/value cache; each later pass reads the token drawn last.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mala.cli import UserError, choose_device, option, parse, run
from mala.model import KVCache, Llama
from mala.running.distributed import World
from mala.storage.model_by_name import ModelSettings, find_model, load_model
from mala.words.tokenizer import Tokenizer


@dataclass
class Settings(ModelSettings):
    prompt: str = option("The topic of the news", "the text to continue")
    max_tokens: int = option(60, "how many tokens at most")
    temperature: float = option(0.8, "below 1 likely tokens become likelier; 0: always the likeliest")
    top_p: float = option(0.95, "draw among the likeliest tokens that together have this probability")
    seed: int = option(0, "of the draws")

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            given = f"max_tokens is {self.max_tokens}, temperature {self.temperature}, top_p {self.top_p}"
            raise UserError(f"{given}; expected a number from 1 on, one from 0 on, and one above 0 up to 1")


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token from logits (V,): of softmax(logits / temperature), cut to its nucleus (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.float().cpu() / temperature, dim=0)
    p, order = p.sort(descending=True, stable=True)  # (V,) each
    nucleus = p.cumsum(0) - p < top_p  # less than top_p lies before a token: the likeliest is always kept
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
    """Yield up to `max_tokens` tokens after a prompt's `ids`, and stop before one that ends a text: one of
    `ends` or of the config's `eos_token_id`. Raises UserError if they do not fit the model's context."""
    room, total = model.config.max_position_embeddings, len(ids) + max_tokens
    if total > room:
        found = f"a prompt of {len(ids)} tokens and {max_tokens} new ones are more than the model's context"
        raise UserError(f"{found} of {room}; shorten the prompt or lower --max-tokens")
    eos = model.config.eos_token_id
    ends = {*ends, *(eos if isinstance(eos, list) else [eos])}
    generator = torch.Generator().manual_seed(seed)
    device, cache = model.lm_head.weight.device, KVCache(model, 1, total)
    for _ in range(max_tokens):
        x = model.hidden_states(torch.tensor([ids], device=device), cache)[0, -1]  # (D,)
        token = draw(model.lm_head.weight.to(x.dtype) @ x, temperature, top_p, generator)
        if token in ends:
            return
        yield token
        ids = [token]  # what is not in the cache


def stream(tokenizer: Tokenizer, ids: list, new: Iterator[int]) -> Iterator[str]:
    """The text of new tokens; a character of several byte tokens is held back until it is whole."""
    ids, shown = list(ids), tokenizer.decode(ids)
    for token in new:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def main() -> None:
    settings = parse(Settings, __doc__.split("\n\n")[0])
    device, dtype = choose_device(settings.device, settings.dtype)
    model, tokenizer = load_model(*find_model(settings.model, settings.adapter), dtype, World(device=device))
    ids = tokenizer.encode(settings.prompt, bos=True)
    if not ids:
        raise UserError("the prompt is empty, and no token of this model begins a text; give a prompt")
    print(settings.prompt, end="", flush=True)
    drawing = settings.max_tokens, settings.temperature, settings.top_p, settings.seed
    new = generate(model, ids, *drawing, ends=[tokenizer.bos_id])  # in training `<s>` parts two documents
    for text in stream(tokenizer, ids, new):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
