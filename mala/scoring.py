"""What a model makes of text: the NLL of documents, and the log-likelihood of labels after a context.

Both are sums of the tokens' NLL, each in float32, and neither ever holds the logits of a batch.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mala.benchmarks.results import Prediction, best_label, summarise, with_macro
from mala.benchmarks.tasks import Example
from mala.cli import UserError
from mala.cross_entropy import CHUNK_BYTES
from mala.model import KVCache, Llama
from mala.running.distributed import World
from mala.words.tokenizer import Tokenizer

# Tokens of a batch at most. A CPU then keeps in its caches what lies between two products. A GPU is busy with
# so many for longer than the host needs for the next; more would mostly be filling up to the longest row.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
MAX_LENGTH = 2048  # tokens that a model reads before a label, in the published protocol
ALONE = World()
Encoded = list[tuple[list[int], list[list[int]]]]  # (context, its continuations) of each example, in tokens
# What is predicted in a row of tokens: the number of a sum, the place of the token before, the token.
Row = tuple[list[int], list[tuple[int, int, int]]]
Tree = tuple[Row, Row, list[int]]  # the stem; all branches, and to which each of their tokens belongs


def batch_tokens(model: Llama) -> int:
    """BATCH_TOKENS, on a GPU the largest power of two up to them that its free memory takes: a little more or
    less of it then seldom changes the batches, and with them how results are rounded."""
    c, weight, size = model.config, model.lm_head.weight, model.compute_dtype.itemsize
    if not weight.is_cuda:
        return BATCH_TOKENS["cpu"]
    free = torch.cuda.mem_get_info(weight.device)[0] - CHUNK_BYTES["cuda"] - weight.numel() * size
    free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    # Some logits and a head that is cast do not count. A token takes: keys and values in all layers, and the
    # most that is held within a block, some of it in float32.
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    block = 4 * c.intermediate_size + 12 * max(c.hidden_size, c.num_attention_heads * c.head_dim)
    tokens = min(BATCH_TOKENS["cuda"], 0.8 * free / ((cache + block) * size))
    return 2 ** int(math.log2(max(1, tokens)))


def batches(widths: list[int], tokens: int, batch_size: int | None = None) -> list[list[int]]:
    """Deal sequences out to batches by number: `batch_size` each, or as many as `tokens` allow. The longest
    come first, so that no later batch needs more memory."""
    order = sorted(range(len(widths)), key=lambda number: (widths[number], number))
    dealt = []
    while order:
        room = batch_size or max(1, tokens // widths[order[-1]])
        dealt.append([order.pop() for _ in range(min(len(order), room))])
    return dealt


def fill_up(rows: list[list[int]], device: torch.device) -> Tensor:
    """Rows as one tensor (B, T) int64, the shorter ones filled up on the right, where no token looks. From
    pinned memory a GPU fetches it when it comes to it, and the host does not wait."""
    width, is_pinned = max(map(len, rows)), device.type == "cuda"
    filled = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, pin_memory=is_pinned).to(device, non_blocking=True)


def launch(model: Llama, rows: list[Row], **order: Any) -> tuple[list[int], Tensor]:
    """Start a pass. Of all that it predicts the numbers of the sums, and the NLL (N,) in nats, on the device.
    order: for `Llama.hidden_states`."""
    tokens = fill_up([tokens for tokens, _ in rows], model.lm_head.weight.device)  # (B, T)
    T, predicted = tokens.shape[1], [(b, *one) for b, (_, of_row) in enumerate(rows) for one in of_row]
    places, targets = [b * T + place for b, _, place, _ in predicted], [token for *_, token in predicted]
    places, targets = fill_up([places, targets], tokens.device)  # (N,) each
    return [number for _, number, _, _ in predicted], model(tokens, targets, places, **order)


@torch.no_grad()
def add_up(
    model: Llama,
    start: Callable[[Llama, list], tuple[list[int], Tensor]],
    parts: list,
    widths: list[int],
    sums: int,
    texts: int,
    world: World,
    batch_size: int | None = None,
    advance: Callable = lambda done: None,
) -> list[float]:
    """Deal parts, of so many tokens, out to batches, `start` these as `launch` does, and add up their NLL.
    Processes with a sharded model take turns with the batches, and all get all sums. `advance` is told how
    many of the texts are started. No result is read before all are: a GPU never waits for the host."""
    was_training, device = model.training, model.lm_head.weight.device
    model.eval()
    dealt, started = batches(widths, world.from_main(lambda: batch_tokens(model)), batch_size), []
    for turn in range(world.rank, len(dealt) + world.rank, world.size):
        # A sharded model computes only when all processes do: one without a batch left repeats the last.
        result = start(model, [parts[number] for number in dealt[min(turn, len(dealt) - 1)]])
        if turn < len(dealt):
            started.append(result)
            advance(len(dealt[turn]) / len(parts) * texts)
    totals = torch.zeros(sums, dtype=torch.float64)
    for numbers, nll in started:  # on the CPU, in order: a GPU's own sums may come in any
        totals.index_add_(0, torch.tensor(numbers), nll.cpu().double())
    model.train(was_training)
    return world.sum(totals.to(device)).tolist()


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


def documents_nll(
    model: Llama, tokenizer: Tokenizer, documents: list[str], world: World = ALONE, **how: Any
) -> tuple[list[float], list[int]]:
    """−Σ ln p over all tokens of each document after its first, `<s>`, in nats, and how many these are. One
    longer than the model's context is read in `windows`. how: batch_size and advance, for `add_up`."""
    encoded, rows = tokenizer.encode_batch(documents, bos=True), []
    for number, ids in enumerate(encoded):
        for start, first, end in windows(len(ids), model.config.max_position_embeddings):
            predicted = [(number, place - 1 - start, ids[place]) for place in range(first, end)]
            rows.append((ids[start : end - 1], predicted))
    sizes = ([len(tokens) for tokens, _ in rows], len(documents), len(documents))
    return add_up(model, launch, rows, *sizes, world, **how), [max(0, len(ids) - 1) for ids in encoded]


def tree(context: list[int], continuations: dict[int, list[int]]) -> Tree:
    """A context c and continuations that branch off it: here a of four tokens, b of three, both begin with s.

    The *stem*, the context and what all continuations begin with, is read in a first pass, as any text; a
    second one reads the branches. A token sees those marked in its line, the stem and its own branch, and
    stands at the position that it would have without the other branches. So every prediction is what a pass
    for each continuation would give. The last token of one is not read: nothing is predicted after it.

        pass  token  position   sees  c0 c1  s   a1 a2   b1   and predicts
        1     c0     0                x
        1     c1     1                x  x                    s of a, s of b
        1     s      2                x  x   x                a1, b1
        2     a1     3                x  x   x   x            a2
        2     a2     4                x  x   x   x  x         a3
        2     b1     3                x  x   x           x    b2
    """
    shared = os.path.commonprefix([ids[:-1] for ids in continuations.values()])  # it takes lists, too
    cut, of_stem, of_branches, tokens, owners = len(shared), [], [], [], []
    for number, ids in continuations.items():
        of_stem += [(number, place, id) for place, id in enumerate(ids[: cut + 1], len(context) - 1)]
        of_branches += [(number, place, id) for place, id in enumerate(ids[cut + 1 :], len(tokens))]
        tokens += ids[cut:-1]
        owners += [number] * len(ids[cut:-1])
    # Without a branch a filler is read: another row of the batch, or another process, may have one.
    return (context + shared, of_stem), (tokens or [0], of_branches), owners or [0]


def trees(encoded: Encoded, max_length: int) -> list[Tree]:
    """The published cut: a model reads `max_length` tokens before a label's last one at most, the nearest. If
    a context must be cut, a longer continuation leaves it less, and only those of one length share a tree."""
    grown, numbers = [], itertools.count()
    for context, continuations in encoded:
        longest = max(map(len, continuations))
        if longest > max_length:
            found = f"a label takes {longest} tokens, and the model reads {max_length}"
            raise UserError(f"{found}; use one with a longer context")
        is_cut = len(context) + longest - 1 > max_length
        groups = defaultdict(dict)
        for ids in continuations:
            groups[len(ids) if is_cut else longest][next(numbers)] = ids
        grown += [tree(context[-(max_length + 1 - length) :], group) for length, group in groups.items()]
    return grown


def loglikelihoods(
    model: Llama, encoded: Encoded, max_length: int = MAX_LENGTH, world: World = ALONE, **how: Any
) -> list[list[float]]:
    """Σ ln p of the tokens of every continuation after its context, in nats. Only the positions that predict
    a continuation's token meet `lm_head`. how: batch_size and advance, for `add_up`."""
    device = model.lm_head.weight.device
    grown = trees(encoded, min(max_length, model.config.max_position_embeddings))
    widths = [len(stem) + len(tokens) for (stem, _), (tokens, _), _ in grown]
    has_branches = any(predicted for _, (_, predicted), _ in grown)  # the same at all processes

    def start(model: Llama, batch: list[Tree]) -> tuple[list[int], Tensor]:
        stems, branches, owners = zip(*batch)
        if not has_branches:
            return launch(model, stems)
        lengths, owners = [len(tokens) for tokens, _ in stems], fill_up(owners, device)  # (B, T)
        B, T, S = *owners.shape, max(lengths)
        cache = KVCache(model, B, S + T)
        numbers, nll = launch(model, stems, cache=cache)
        lengths = fill_up([lengths], device).view(B, 1, 1)
        in_stem = torch.arange(S, device=device) < lengths  # (B, 1, S)
        in_branch = (owners[:, :, None] == owners[:, None, :]).tril()  # (B, T, T)
        positions = lengths[:, 0] + in_branch.sum(2) - 1  # (B, T)
        mask = torch.cat([in_stem.expand(-1, T, -1), in_branch], 2)[:, None]  # (B, 1, T, S+T)
        more, nll_of_more = launch(model, branches, cache=cache, positions=positions, mask=mask)
        return numbers + more, torch.cat([nll, nll_of_more])

    sizes = (widths, sum(len(labels) for _, labels in encoded), len(encoded))
    nll = iter(add_up(model, start, grown, *sizes, world, **how))
    return [[-next(nll) for _ in labels] for _, labels in encoded]


def encode_published(tokenizer: Tokenizer, examples: list[Example]) -> Encoded:
    """As published: no `<s>`, and the context and each choice encoded apart."""
    choices = {choice for example in examples for choice in example.choices}
    ids = {choice: tokenizer.encode(f" {choice}") for choice in choices}
    contexts = tokenizer.encode_batch([example.context for example in examples])
    return [(context, [ids[choice] for choice in one.choices]) for context, one in zip(contexts, examples)]


def encode_natural(tokenizer: Tokenizer, examples: list[Example]) -> Encoded:
    """As in training: after `<s>`, context and choice encoded as one. What all of them share is the context,
    but for white space at its end, which belongs to the choices."""
    encoded = []
    for example in examples:
        texts = [example.context.rstrip(), *(f"{example.context} {choice}" for choice in example.choices)]
        context, *answered = tokenizer.encode_batch(texts, bos=True)
        shared = len(os.path.commonprefix([context, *answered]))  # it takes lists, too
        encoded.append((context[:shared], [ids[shared:] for ids in answered]))
    return encoded


PROTOCOLS = {"published": encode_published, "natural": encode_natural}


def predict_documents(
    model: Llama, tokenizer: Tokenizer, language: str, texts: list[str], **how: Any
) -> list[Prediction]:
    """One prediction a document. how: for `documents_nll`. Raises UserError if a figure is no number."""
    nll, tokens = documents_nll(model, tokenizer, texts, **how)
    if not any(tokens):
        raise UserError(f"{language}: {tokenizer.name} makes no tokens of its text; leave it out")
    _check_finite(language, nll)
    return [
        {"lang": language, "id": number, "nll": nats, "tokens": count, "bytes": len(text.encode())}
        for number, (text, nats, count) in enumerate(zip(texts, nll, tokens))
    ]


def predict_labels(
    model: Llama,
    tokenizer: Tokenizer,
    language: str,
    examples: list[Example],
    seed: int,
    encode: Callable[[Tokenizer, list[Example]], Encoded],
    **how: Any,
) -> list[Prediction]:
    """One prediction an example. seed: of their shots. encode: of PROTOCOLS, or like them. how: for
    `loglikelihoods`. Raises UserError if a figure is no number."""
    encoded = encode(tokenizer, examples)
    max_length = MAX_LENGTH if encode is encode_published else model.config.max_position_embeddings
    scored = loglikelihoods(model, encoded, max_length, **how)
    _check_finite(language, [sum(scores) for scores in scored])
    predictions = []
    for example, (_, continuations), scores in zip(examples, encoded, scored):
        question = {"lang": language, "id": example.id, "seed": seed, "shots": example.shots}
        # Choices of the same tokens are equal, however their rows of a matrix product were rounded.
        tokens = list(map(tuple, continuations))
        score_of = dict(zip(tokens, scores))
        answer = {"loglikelihoods": dict(zip(example.choices, map(score_of.get, tokens)))}
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
        figures[language] = summarise(predict_documents(model, tokenizer, language, texts, world=world))
    return with_macro(figures)
