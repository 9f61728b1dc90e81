"""What a model makes of text: the negative log-likelihood of documents, and the log-likelihood of labels after a context.

Both are sums over tokens, in float32, and neither ever holds the logits of a batch. Sequences of like length share a batch;
what fills up a row stands to its right, where no token looks.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mala.cli import UserError
from mala.cross_entropy import IGNORE_INDEX, token_nll
from mala.distributed import World
from mala.model import Llama
from mala.results import Prediction, best_label, summarise, with_macro
from mala.tasks import Example
from mala.tokenizer import Tokenizer

# Tokens of a batch. On a CPU what lies between two matrix products then stays in its caches; a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
MAX_LENGTH = 2048  # tokens that a model reads before a label, in the published protocol
ALONE = World()
Encoded = list[tuple[list[int], list[list[int]]]]  # (context, its continuations) of each example, in tokens
Advance = Callable[[float], object]  # moves a progress bar on by so many documents or examples


def ignore(done: float) -> None:
    pass


def batches(widths: list[int], device: torch.device, batch_size: int | None = None) -> list[list[int]]:
    """Deal sequences of these widths out to batches, as their numbers: `batch_size` a batch, or as many as hold BATCH_TOKENS.

    The longest come first, so that no later batch needs more memory.
    """
    order = sorted(range(len(widths)), key=lambda number: (widths[number], number))
    dealt = []
    while order:
        room = batch_size or max(1, BATCH_TOKENS[device.type] // widths[order[-1]])
        dealt.append([order.pop() for _ in range(min(len(order), room))])
    return dealt


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
def documents_nll(model: Llama, tokenizer: Tokenizer, documents: list[str], world: World = ALONE,
                  batch_size: int | None = None, advance: Advance = ignore) -> tuple[list[float], list[int]]:  # fmt: skip
    """−Σ ln p over all tokens of each document after `<s>`, in nats, and how many tokens these are.

    Documents longer than the model's context are read in `windows`. Several processes with a sharded model take turns with the
    batches, and all of them get all figures. `advance` is told how many documents are done, in parts where they are long.
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
    dealt = batches([end - start - 1 for _, start, _, end in jobs], device, batch_size)
    nll = [0.0] * len(documents)
    for turn in range(world.rank, len(dealt) + world.rank, world.size):
        # A sharded model computes only when all processes do: one that is left without a batch repeats the last.
        batch = [jobs[number] for number in dealt[min(turn, len(dealt) - 1)]]
        width = batch[0][3] - batch[0][1] - 1
        tokens = torch.zeros(len(batch), width, dtype=torch.int64)  # (B, T)
        targets = torch.full((len(batch), width), IGNORE_INDEX)  # (B, T)
        for row, (document, start, first, end) in enumerate(batch):
            ids = torch.tensor(encoded[document][start:end])
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, first - start - 1 : len(ids) - 1] = ids[first - start :]
        losses = model(tokens.to(device), targets=targets.to(device), reduction="none").sum(1)  # (B,)
        if turn < len(dealt):
            for (document, *_), loss in zip(batch, losses.tolist()):  # in order: a GPU's own sums may come in any
                nll[document] += loss
            advance(len(batch) / len(jobs) * len(documents))
    model.train(was_training)
    total = world.sum(torch.tensor(nll, dtype=torch.float64, device=device))
    return total.tolist(), [len(ids) - 1 for ids in encoded]


@dataclass
class Tree:
    """A context, and continuations that branch off its end: each sees the context and itself, at the positions that it would
    have right after the context. So one pass gives what one pass for every continuation would."""

    context: list[int]
    continuations: dict[tuple[int, int], list[int]]  # (number of the example, number of the continuation) -> its tokens

    @property
    def width(self) -> int:
        """Tokens to read: all but the last of each continuation, after which nothing is predicted."""
        return len(self.context) + sum(len(ids) - 1 for ids in self.continuations.values())


def trees(encoded: Encoded, max_length: int) -> list[Tree]:
    """The published cut of every context: before its last token a model reads at most `max_length`, the last ones.

    Where a context must be cut, longer continuations leave less of it, so that only those of one length share a tree.
    """
    grown = []
    for example, (context, continuations) in enumerate(encoded):
        longest = max(map(len, continuations))
        if longest > max_length:
            raise UserError(f"a label takes {longest} tokens, and the model reads {max_length}; use one with a longer context")
        is_cut = len(context) + longest - 1 > max_length
        groups = defaultdict(dict)
        for number, ids in enumerate(continuations):
            groups[len(ids) if is_cut else longest][example, number] = ids
        grown += [Tree(context[-(max_length + 1 - length) :], group) for length, group in groups.items()]
    return grown


@torch.no_grad()
def loglikelihoods(model: Llama, encoded: Encoded, max_length: int = MAX_LENGTH, batch_size: int | None = None,
                   advance: Advance = ignore) -> list[list[float]]:  # fmt: skip
    """Σ ln p of the tokens of every continuation after its context, in nats.

    Only the positions that predict a token of a continuation meet `lm_head`. `advance` is told how many examples are done.
    """
    device = model.lm_head.weight.device
    results = [[0.0] * len(continuations) for _, continuations in encoded]
    grown = trees(encoded, min(max_length, model.config.max_position_embeddings))
    for numbers in batches([tree.width for tree in grown], device, batch_size):
        batch = [grown[number] for number in numbers]
        tokens = torch.zeros(len(batch), batch[0].width, dtype=torch.int64)  # (B, T), as the next two
        positions, branches = torch.zeros_like(tokens), torch.zeros_like(tokens)  # branch 0 is the context, seen by all
        rows, columns, targets = [], [], []  # the token in this row and column predicts this target
        for row, tree in enumerate(batch):
            length = end = len(tree.context)
            tokens[row, :length] = torch.tensor(tree.context)
            positions[row, :length] = torch.arange(length)
            for branch, ids in enumerate(tree.continuations.values(), 1):
                start, end = end, end + len(ids) - 1
                tokens[row, start:end] = torch.tensor(ids[:-1], dtype=torch.int64)
                positions[row, start:end] = torch.arange(length, length + end - start)
                branches[row, start:end] = branch
                rows += [row] * len(ids)
                columns += [length - 1, *range(start, end)]
                targets += ids
        branches = branches.to(device)
        seen, seeing = branches[:, None, :], branches[:, :, None]
        mask = ((seen == 0) | (seen == seeing)).tril()  # (B, T, T)
        x = model.hidden_states(tokens.to(device), positions=positions.to(device), mask=mask[:, None])  # (B, T, D)
        nll = token_nll(x[rows, columns], model.lm_head.weight, torch.tensor(targets, device=device)).cpu()  # (N,)
        done = [(place, len(ids)) for tree in batch for place, ids in tree.continuations.items()]
        for ((example, number), _), losses in zip(done, nll.split([length for _, length in done])):
            results[example][number] = -losses.sum().item()
        advance(len(batch) / len(grown) * len(encoded))
    return results


def encode_published(tokenizer: Tokenizer, examples: list[Example], labels: list[str]) -> Encoded:
    """The context, and one continuation a label, of each example as published: no `<s>`, context and label encoded apart."""
    continuations = [tokenizer.encode(f" {label}") for label in labels]
    contexts = tokenizer.encode_batch([example.context for example in examples])
    return [(context, continuations) for context in contexts]


def encode_natural(tokenizer: Tokenizer, examples: list[Example], labels: list[str]) -> Encoded:
    """The same as a model meets text in training: after `<s>`, context and label encoded as one text.

    What all labels of an example have in common is its context.
    """
    encoded = []
    for example in examples:
        context, *texts = tokenizer.encode_batch(
            [example.context, *(f"{example.context} {label}" for label in labels)], bos=True
        )
        shared = len(os.path.commonprefix([context, *texts]))  # it takes lists, too
        encoded.append((context[:shared], [ids[shared:] for ids in texts]))
    return encoded


PROTOCOLS = {"published": encode_published, "natural": encode_natural}


def predict_documents(model: Llama, tokenizer: Tokenizer, language: str, documents: list[str], world: World = ALONE,
                      batch_size: int | None = None, advance: Advance = ignore) -> list[Prediction]:  # fmt: skip
    """One prediction a document, as mala/results.py describes it. Raises UserError where a figure is no number."""
    nll, tokens = documents_nll(model, tokenizer, documents, world, batch_size, advance)
    if not any(tokens):
        raise UserError(f"{language}: {tokenizer.name} makes no tokens of its text; leave it out")
    _check_finite(language, nll)
    return [{"lang": language, "id": number, "nll": document_nll, "tokens": document_tokens, "bytes": len(text.encode())}
            for number, (text, document_nll, document_tokens) in enumerate(zip(documents, nll, tokens))]  # fmt: skip


def _check_finite(language: str, figures: list[float]) -> None:
    for number, figure in enumerate(figures):
        if not math.isfinite(figure):
            raise UserError(f"{language}: a log-likelihood of text {number} is {figure}; the weights are damaged, or their "
                            "numbers too large for the dtype: try --dtype float32")  # fmt: skip


def predict_labels(model: Llama, tokenizer: Tokenizer, language: str, examples: list[Example], labels: list[str], seed: int,
                   protocol: str = "published", batch_size: int | None = None, advance: Advance = ignore
                   ) -> list[Prediction]:  # fmt: skip
    """One prediction an example, as mala/results.py describes it. Raises UserError where a figure is no number."""
    encoded = PROTOCOLS[protocol](tokenizer, examples, labels)
    max_length = MAX_LENGTH if protocol == "published" else model.config.max_position_embeddings
    predictions, scored = [], loglikelihoods(model, encoded, max_length, batch_size, advance)
    _check_finite(language, [sum(scores) for scores in scored])
    for example, scores in zip(examples, scored):
        prediction = {"lang": language, "id": example.id, "seed": seed, "shots": example.shots, "label": example.label,
                      "prediction": "", "loglikelihoods": dict(zip(labels, scores))}  # fmt: skip
        predictions.append({**prediction, "prediction": best_label(prediction)})
    return predictions


def nll_by_language(model: Llama, tokenizer: Tokenizer, documents: dict[str, list[str]], description: str,
                    world: World = ALONE) -> dict[str, dict]:  # fmt: skip
    """language -> documents to the figures of every language and their macro-average."""
    hidden = None if world.is_main else True  # None: where there is a terminal to show it on
    bar = tqdm(documents.items(), desc=description, unit="language", leave=False, disable=hidden)
    return with_macro(
        {language: summarise(predict_documents(model, tokenizer, language, texts, world)) for language, texts in bar}
    )
