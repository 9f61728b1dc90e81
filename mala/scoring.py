"""What a model makes of text: the NLL of documents, and the log-likelihood of labels after a context.

Both are sums over tokens, in float32, and neither ever holds the logits of a batch.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mala.benchmarks.measurement import Measurement
from mala.benchmarks.results import Prediction, best_label, summarise, with_macro
from mala.benchmarks.tasks import Example
from mala.cli import UserError
from mala.cross_entropy import IGNORE_INDEX, token_nll
from mala.model import Llama
from mala.running.distributed import World
from mala.words.tokenizer import Tokenizer

# Tokens of a batch. A CPU then keeps in its caches what lies between two products; a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
MAX_LENGTH = 2048  # tokens that a model reads before a label, in the published protocol
ALONE = World()
Encoded = list[tuple[list[int], list[list[int]]]]  # (context, its continuations) of each example, in tokens


def batches(widths: list[int], device: torch.device, batch_size: int | None = None) -> list[list[int]]:
    """Deal sequences out to batches by number: `batch_size` each, or as many as BATCH_TOKENS allow. The
    longest come first, so that no later batch needs more memory."""
    order = sorted(range(len(widths)), key=lambda number: (widths[number], number))
    dealt = []
    while order:
        room = batch_size or max(1, BATCH_TOKENS[device.type] // widths[order[-1]])
        dealt.append([order.pop() for _ in range(min(len(order), room))])
    return dealt


def fill_up(rows: list[list[int]], device: torch.device, filler: int = 0) -> Tensor:
    """Rows as one tensor (B, T) int64, the shorter ones filled up on the right, where no token looks."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Cut a document of `length` tokens into windows (start, first, end): the model reads tokens[start : end
    - 1], at most `context`, and its predictions of tokens[first : end] count: all but `<s>`, each once. A
    window moves on by half the context, so that it predicts every token from at least so many before it."""
    start, first = 0, 1
    while first < length:
        end = min(start + context + 1, length)
        yield start, first, end
        first = end
        start = end - 1 - context // 2


@torch.no_grad()
def documents_nll(
    model: Llama,
    tokenizer: Tokenizer,
    documents: list[str],
    world: World = ALONE,
    batch_size: int | None = None,
    advance: Callable = lambda done: None,
) -> tuple[list[float], list[int]]:
    """−Σ ln p over all tokens of each document after `<s>`, in nats, and how many these are. One longer than
    the model's context is read in `windows`. Processes with a sharded model take turns with the batches, and
    all get all figures. `advance` is told how many documents are done, in parts if they are long."""
    was_training, device = model.training, model.lm_head.weight.device
    model.eval()
    encoded, cut = tokenizer.encode_batch(documents, bos=True), []
    for number, ids in enumerate(encoded):
        for start, first, end in windows(len(ids), model.config.max_position_embeddings):
            targets = [IGNORE_INDEX] * (first - 1 - start) + ids[first:end]
            cut.append((number, ids[start : end - 1], targets))
    dealt = batches([len(inputs) for _, inputs, _ in cut], device, batch_size)
    nll = [0.0] * len(documents)
    for turn in range(world.rank, len(dealt) + world.rank, world.size):
        # A sharded model computes only when all processes do: one without a batch left repeats the last.
        numbers, inputs, targets = zip(*(cut[index] for index in dealt[min(turn, len(dealt) - 1)]))
        tokens, targets = fill_up(inputs, device), fill_up(targets, device, IGNORE_INDEX)  # (B, T) each
        losses = model(tokens, targets=targets, reduction="none").sum(1)  # (B,)
        if turn < len(dealt):
            for number, loss in zip(numbers, losses.tolist()):  # in order: a GPU's own sums may come in any
                nll[number] += loss
            advance(len(numbers) / len(cut) * len(documents))
    model.train(was_training)
    total = world.sum(torch.tensor(nll, dtype=torch.float64, device=device))
    return total.tolist(), [len(ids) - 1 for ids in encoded]


@dataclass
class Tree:
    """A context c and continuations that branch off its end, here a of three tokens and b of two, in one row.

    A token sees those marked in its line, its context and its own branch, and stands at the position that it
    would have without the other branches. So one pass gives what a pass for each continuation would.

        token  position   sees  c0 c1 c2   a0 a1   b0   and predicts
        c0     0                x
        c1     1                x  x
        c2     2                x  x  x                 a0, b0
        a0     3                x  x  x    x            a1
        a1     4                x  x  x    x  x         a2
        b0     3                x  x  x            x    b1
    """

    context: list[int]
    continuations: dict[tuple[int, int], list[int]]  # (number of the example, of the continuation) -> tokens

    @property
    def width(self) -> int:
        """Tokens to read: all but the last of each continuation, after which nothing is predicted."""
        return len(self.context) + sum(len(ids) - 1 for ids in self.continuations.values())

    def row(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Of its tokens: ids, positions, branches (0 is the context); and which of them predict, in order."""
        length = len(self.context)
        tokens, positions, branches, predicting = [*self.context], [*range(length)], [0] * length, []
        for branch, ids in enumerate(self.continuations.values(), 1):
            predicting += [length - 1, *range(len(tokens), len(tokens) + len(ids) - 1)]
            tokens += ids[:-1]
            positions += range(length, length + len(ids) - 1)
            branches += [branch] * (len(ids) - 1)
        return tokens, positions, branches, predicting


def trees(encoded: Encoded, max_length: int) -> list[Tree]:
    """The published cut: a model reads `max_length` tokens before a label's last one at most, the nearest. If
    a context must be cut, a longer continuation leaves it less, and only those of one length share a tree."""
    grown = []
    for example, (context, continuations) in enumerate(encoded):
        longest = max(map(len, continuations))
        if longest > max_length:
            found = f"a label takes {longest} tokens, and the model reads {max_length}"
            raise UserError(f"{found}; use one with a longer context")
        is_cut = len(context) + longest - 1 > max_length
        groups = defaultdict(dict)
        for number, ids in enumerate(continuations):
            groups[len(ids) if is_cut else longest][example, number] = ids
        grown += [Tree(context[-(max_length + 1 - length) :], group) for length, group in groups.items()]
    return grown


@torch.no_grad()
def loglikelihoods(
    model: Llama,
    encoded: Encoded,
    max_length: int = MAX_LENGTH,
    batch_size: int | None = None,
    advance: Callable = lambda done: None,
) -> list[list[float]]:
    """Σ ln p of the tokens of every continuation after its context, in nats. Only the positions that predict
    a continuation's token meet `lm_head`. `advance` is told how many examples are done."""
    device = model.lm_head.weight.device
    results = [[0.0] * len(continuations) for _, continuations in encoded]
    grown = trees(encoded, min(max_length, model.config.max_position_embeddings))
    for numbers in batches([tree.width for tree in grown], device, batch_size):
        batch = [grown[number] for number in numbers]
        *rows, predicting = zip(*(tree.row() for tree in batch))
        tokens, positions, branches = (fill_up(of_trees, device) for of_trees in rows)  # (B, T) each
        seen, seeing = branches[:, None, :], branches[:, :, None]
        mask = ((seen == 0) | (seen == seeing)).tril()  # (B, T, T)
        x = model.hidden_states(tokens, positions=positions, mask=mask[:, None])  # (B, T, D)
        x = torch.cat([of_tree[columns] for of_tree, columns in zip(x, predicting)])  # (N, D)
        places, scored = zip(*(item for tree in batch for item in tree.continuations.items()))
        targets = torch.tensor([token for ids in scored for token in ids], device=device)
        nll = token_nll(x, model.lm_head.weight, targets).cpu()  # (N,)
        for (example, number), losses in zip(places, nll.split([len(ids) for ids in scored])):
            results[example][number] = -losses.sum().item()
        advance(len(batch) / len(grown) * len(encoded))
    return results


def encode_published(tokenizer: Tokenizer, examples: list[Example], labels: list[str]) -> Encoded:
    """As published: no `<s>`, and the context and each label encoded apart."""
    continuations = [tokenizer.encode(f" {label}") for label in labels]
    contexts = tokenizer.encode_batch([example.context for example in examples])
    return [(context, continuations) for context in contexts]


def encode_natural(tokenizer: Tokenizer, examples: list[Example], labels: list[str]) -> Encoded:
    """As in training: after `<s>`, context and label encoded as one. What all labels share is the context."""
    encoded = []
    for example in examples:
        texts = [example.context, *(f"{example.context} {label}" for label in labels)]
        context, *answered = tokenizer.encode_batch(texts, bos=True)
        shared = len(os.path.commonprefix([context, *answered]))  # it takes lists, too
        encoded.append((context[:shared], [ids[shared:] for ids in answered]))
    return encoded


PROTOCOLS = {"published": encode_published, "natural": encode_natural}


def predict_documents(model: Llama, tokenizer: Tokenizer, one: Measurement, **how: Any) -> list[Prediction]:
    """One prediction a document. how: for `documents_nll`. Raises UserError if a figure is no number."""
    nll, tokens = documents_nll(model, tokenizer, one.texts, **how)
    if not any(tokens):
        raise UserError(f"{one.language}: {tokenizer.name} makes no tokens of its text; leave it out")
    _check_finite(one.language, nll)
    return [
        {"lang": one.language, "id": number, "nll": nats, "tokens": count, "bytes": len(text.encode())}
        for number, (text, nats, count) in enumerate(zip(one.texts, nll, tokens))
    ]


def predict_labels(
    model: Llama, tokenizer: Tokenizer, one: Measurement, labels: list[str], protocol: str, **how: Any
) -> list[Prediction]:
    """One prediction an example. how: for `loglikelihoods`. Raises UserError if a figure is no number."""
    encoded = PROTOCOLS[protocol](tokenizer, one.texts, labels)
    max_length = MAX_LENGTH if protocol == "published" else model.config.max_position_embeddings
    scored = loglikelihoods(model, encoded, max_length, **how)
    _check_finite(one.language, [sum(scores) for scores in scored])
    predictions = []
    for example, scores in zip(one.texts, scored):
        question = {"lang": one.language, "id": example.id, "seed": one.seed, "shots": example.shots}
        answer = {"loglikelihoods": dict(zip(labels, scores))}
        predictions.append({**question, "label": example.label, "prediction": best_label(answer), **answer})
    return predictions


def _check_finite(language: str, figures: list[float]) -> None:
    for number, figure in enumerate(figures):
        if not math.isfinite(figure):
            reason = "damaged weights, or numbers too large for the dtype: try --dtype float32"
            raise UserError(f"{language}: a log-likelihood of text {number} is {figure}; {reason}")


def nll_by_language(
    model: Llama, tokenizer: Tokenizer, documents: dict[str, list[str]], title: str, world: World = ALONE
) -> dict[str, Any]:
    """language -> documents to the figures of every language and their macro-average."""
    figures = {}
    for language, texts in tqdm(documents.items(), title, unit="language", leave=False, disable=world.no_bar):
        one = Measurement(language, texts)
        figures[language] = summarise(predict_documents(model, tokenizer, one, world=world))
    return with_macro(figures)
