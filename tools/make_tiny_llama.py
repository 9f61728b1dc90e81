"""Make `assets/tiny-llama`: a real LLaMA checkpoint, small enough to commit, trained only on English.

    python -m tools.make_tiny_llama [--out DIR]

It is trained on the language reference that comes with every Python, `pydoc_data.topics`, and on the demo's
English training sentences. The seed is fixed, but the text changes with the version of Python. The committed
checkpoint was made with Python 3.11.
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tqdm import trange

from mala.cli import option, parse, run
from mala.data import Batches, Stream
from mala.model import Llama, LlamaConfig
from mala.storage.corpus import read_documents
from mala.storage.files import atomic_directory
from mala.vocab import count_words, train_pieces
from mala.words.tokenizer import Tokenizer
from tools.known_models import init_weights

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SEED, STEPS, BATCH_SIZE, SEQ_LEN, LR, WARMUP = 0, 150, 8, 512, 3e-3, 30
VOCAB_SIZE = 2048
CONFIG = dict(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)


@dataclass
class Settings:
    out: Path = option(ASSETS / "tiny-llama", "folder to write to; an existing one is replaced")


def read_text() -> list[str]:
    """Return the paragraphs of the language reference, shuffled with 20 copies of the demo's sentences."""
    paragraphs = [" ".join(part.split()) for key in sorted(topics) for part in topics[key].split("\n\n")]
    paragraphs = [paragraph for paragraph in paragraphs if len(paragraph) > 20]
    sentences = list(read_documents(ASSETS / "demo/sib200/eng_Latn/train.tsv"))
    documents = paragraphs + 20 * sentences
    random.Random(SEED).shuffle(documents)
    return documents


def main() -> None:
    out = parse(Settings, __doc__.partition("\n")[0]).out
    start = time.perf_counter()

    documents = read_text()
    words = count_words((document, 1) for document in documents)
    tokenizer = Tokenizer(train_pieces(words, VOCAB_SIZE, standalone=True))
    tokens = np.concatenate([np.array(tokenizer.encode(text, bos=True), np.uint16) for text in documents])
    print(f"{len(documents):,} documents, {len(tokens):,} tokens")

    model = Llama(LlamaConfig(vocab_size=len(tokenizer), **CONFIG))
    init_weights(model, SEED)
    streams = {"eng_Latn": Stream([tokens], len(documents))}
    batches = Batches(streams, SEQ_LEN, BATCH_SIZE, STEPS, alpha=1, seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in (bar := trange(STEPS)):
        scale = min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = LR * scale
        inputs, targets = batches[step]
        loss = model(inputs, targets=targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    with atomic_directory(out, replace=True) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        (temporary / "tokenizer.model").write_bytes(tokenizer.model)
    size = sum(file.stat().st_size for file in out.iterdir())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {parameters:,} parameters, {size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run(main)
