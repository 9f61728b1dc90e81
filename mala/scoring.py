"""Negative log-likelihood of documents, the measure by which MaLA-500 compares models across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from tqdm import tqdm

from mala.cross_entropy import IGNORE_INDEX
from mala.distributed import World
from mala.model import Llama
from mala.tokenizer import Tokenizer

BATCH_TOKENS = 4096
ALONE = World()


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Cut a document of `length` tokens, `<s>` the first, into windows of at most `context` input tokens.

    Yields (start, first, end): the model reads tokens[start : end - 1] and its predictions of tokens[first : end] count.
    Together these cover tokens 1 … length - 1, each once. A window moves on by half the context, so that after the first
    window a token is predicted from at least half a context before it.
    """
    start, first = 0, 1
    while first < length:
        end = min(start + context + 1, length)
        yield start, first, end
        first = end
        start = end - 1 - context // 2


@torch.no_grad()
def documents_nll(model: Llama, tokenizer: Tokenizer, documents: list[str], world: World = ALONE
                  ) -> tuple[list[float], list[int]]:  # fmt: skip
    """−Σ ln p over all tokens of each document after `<s>`, in nats, and how many tokens these are.

    Softmax and sums are float32. Windows of like length share a batch of at most 4,096 tokens (one row, where a single
    window is longer); what fills up a row stands to its right, where causal attention never looks. Several processes take
    turns with the batches, and all of them get all figures.
    """
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    encoded = tokenizer.encode_batch(documents, bos=True)
    jobs = [
        (document, *window)
        for document, ids in enumerate(encoded)
        for window in windows(len(ids), model.config.max_position_embeddings)
    ]
    jobs.sort(key=lambda job: (job[3] - job[1], job))  # by window length
    batches = []
    while jobs:
        width = jobs[-1][3] - jobs[-1][1] - 1  # the longest comes last: no batch needs more memory than the first
        batches.append([jobs.pop() for _ in range(min(len(jobs), max(1, BATCH_TOKENS // width)))])
    nll = torch.zeros(len(documents), dtype=torch.float64, device=device)
    for turn in range(world.rank, len(batches) + world.rank, world.size):
        # A sharded model computes only when all processes do: one that is left without a batch repeats the last.
        batch = batches[min(turn, len(batches) - 1)]
        width = batch[0][3] - batch[0][1] - 1
        tokens = torch.zeros(len(batch), width, dtype=torch.int64)  # (B, T)
        targets = torch.full((len(batch), width), IGNORE_INDEX)  # (B, T)
        for row, (document, start, first, end) in enumerate(batch):
            ids = torch.tensor(encoded[document][start:end])
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, first - start - 1 : len(ids) - 1] = ids[first - start :]
        losses = model(tokens.to(device), targets=targets.to(device), reduction="none").sum(1)  # (B,)
        if turn < len(batches):
            nll.index_add_(0, torch.tensor([document for document, *_ in batch], device=device), losses.double())
    model.train(was_training)
    return world.sum(nll).tolist(), [len(ids) - 1 for ids in encoded]


def summarise(documents: list[str], nll: list[float], tokens: list[int]) -> dict[str, float]:
    """One language's figures: documents, tokens, bytes (UTF-8), nll_per_document and nll_per_token (nats), bits_per_byte."""
    size = sum(len(text.encode()) for text in documents)
    return {
        "documents": len(documents),
        "tokens": sum(tokens),
        "bytes": size,
        "nll_per_document": sum(nll) / len(documents),
        "nll_per_token": sum(nll) / sum(tokens),
        "bits_per_byte": sum(nll) / size / math.log(2),
    }


def with_macro(languages: dict[str, dict[str, float]]) -> dict[str, dict]:
    """`{"languages": ..., "macro": ...}`: the macro-average gives every language the same weight."""
    keys = ("nll_per_document", "nll_per_token", "bits_per_byte")
    macro = {key: sum(figures[key] for figures in languages.values()) / len(languages) for key in keys}
    return {"languages": languages, "macro": macro}


def nll_by_language(model: Llama, tokenizer: Tokenizer, documents: dict[str, list[str]], description: str,
                    world: World = ALONE) -> dict[str, dict]:  # fmt: skip
    """language -> documents to the figures of every language and their macro-average."""
    hidden = None if world.is_main else True  # None: where there is a terminal to show it on
    bar = tqdm(documents.items(), desc=description, unit="language", leave=False, disable=hidden)
    return with_macro({language: summarise(texts, *documents_nll(model, tokenizer, texts, world)) for language, texts in bar})
