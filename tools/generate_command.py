"""The command `python -m mala.generate`. It prints the text while the model generates it."""

from dataclasses import dataclass

import mala.generate
from mala.cli import UserError, choose_device, option, parse
from mala.running.distributed import World
from mala.storage.model_by_name import load_model
from tools.model_settings import ModelSettings, find_model


@dataclass
class Settings(ModelSettings):
    prompt: str = option("The topic of the news", "the text to continue")
    max_tokens: int = option(60, "largest number of new tokens")
    temperature: float = option(0.8, "below 1, likely tokens become likelier; 0: always take the likeliest")
    top_p: float = option(0.95, "draw only from the likeliest tokens with this total probability")
    seed: int = option(0, "seed of the draws")

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            given = f"max_tokens is {self.max_tokens}, temperature {self.temperature}, top_p {self.top_p}"
            raise UserError(f"{given}; expected max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1")


def main() -> None:
    settings = parse(Settings, mala.generate.__doc__.split("\n\n")[0])
    device, dtype = choose_device(settings.device, settings.dtype)
    model, tokenizer = load_model(*find_model(settings.model, settings.adapter), dtype, World(device=device))
    ids = tokenizer.encode(settings.prompt, bos=True)
    if not ids:
        raise UserError("the prompt is empty, and this model has no token that begins a text; give a prompt")
    print(settings.prompt, end="", flush=True)
    drawing = settings.max_tokens, settings.temperature, settings.top_p, settings.seed
    ends = [tokenizer.bos_id]  # in training `<s>` separates documents, so it ends a text
    new = mala.generate.generate(model, ids, *drawing, ends=ends)
    for text in mala.generate.stream(tokenizer, ids, new):
        print(text, end="", flush=True)
    print()
