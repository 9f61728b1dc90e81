"""Score text with a model: the NLL of documents, and the log-likelihood of labels after a context.

Both are sums of float32 token NLLs. Neither ever holds the logits of a whole batch.
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

# Most tokens in a batch. 1,024 keep what is passed between two matrix products in a CPU's caches. With 8,192
# a GPU computes for longer than the host takes to prepare the next batch; more would mostly be padding.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
MAX_LENGTH = 2048  # most tokens that a model reads, in the published protocol
ALONE = World()
Encoded = list[tuple[list[int], list[list[int]]]]  # each example's context and continuations, as tokens
# Tokens to read, and the predictions: (number of the sum it adds to, index of the token before, token).
Query = tuple[list[int], list[tuple[int, int, int]]]
Tree = tuple[Query, Query, list[int]]  # the stem, the branches, and the branch of each of their tokens


def batch_tokens(model: Llama) -> int:
    """Return BATCH_TOKENS, or on a GPU the largest power of two that fits its free memory, if that is less.
    With powers of two, small changes of the free memory seldom change the batches, and thus the rounding."""
    c, weight, size = model.config, model.lm_head.weight, model.compute_dtype.itemsize
    if not weight.is_cuda:
        return BATCH_TOKENS["cpu"]
    free = torch.cuda.mem_get_info(weight.device)[0] - CHUNK_BYTES["cuda"] - weight.numel() * size
    free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    # `free` leaves room for some logits and a cast copy of the head. A token takes its keys and values in all
    # layers, and the most that a block holds at a time, some of it in float32.
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    block = 4 * c.intermediate_size + 12 * max(c.hidden_size, c.num_attention_heads * c.head_dim)
    tokens = min(BATCH_TOKENS["cuda"], 0.8 * free / ((cache + block) * size))
    return 2 ** int(math.log2(max(1, tokens)))


def batches(widths: list[int], tokens: int, batch_size: int | None = None) -> list[list[int]]:
    """Return batches of sequence numbers: `batch_size` in each, or as many as fit in `tokens` tokens. The
    longest sequences come first, so no later batch needs more memory. widths: the sequences' lengths."""
    order = sorted(range(len(widths)), key=lambda number: (widths[number], number))
    dealt = []
    while order:
        room = batch_size or max(1, tokens // widths[order[-1]])
        dealt.append([order.pop() for _ in range(min(len(order), room))])
    return dealt


def pad(rows: list[list[int]], device: torch.device) -> Tensor:
    """Return the rows as one tensor (B, T) int64, padded on the right, where no token looks. A GPU fetches it
    from pinned memory asynchronously, so the host does not wait."""
    width, is_pinned = max(map(len, rows)), device.type == "cuda"
    filled = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, pin_memory=is_pinned).to(device, non_blocking=True)


def launch(model: Llama, rows: list[Query], **order: Any) -> tuple[list[int], Tensor]:
    """Start a forward pass that makes N predictions. Return for each the number of its sum, and its NLL in
    nats, (N,), left on the device. order: for `Llama.hidden_states`."""
    tokens = pad([tokens for tokens, _ in rows], model.lm_head.weight.device)  # (B, T)
    T, predicted = tokens.shape[1], [(b, *one) for b, (_, of_row) in enumerate(rows) for one in of_row]
    places, targets = [b * T + place for b, _, place, _ in predicted], [token for *_, token in predicted]
    places, targets = pad([places, targets], tokens.device)  # (N,) each
    return [number for _, number, _, _ in predicted], model(tokens, targets, places, **order)


@torch.no_grad()
def add_up(
    model: Llama,
    start: Callable[[Llama, list], tuple[list[int], Tensor]],  # starts the passes for a batch, like `launch`
    parts: list,  # rows or trees
    widths: list[int],  # tokens of each part
    sums: int,  # number of sums
    texts: int,  # number of texts, for `advance`
    world: World,
    batch_size: int | None = None,
    advance: Callable = lambda done: None,  # is told how many more texts are started
) -> list[float]:
    """Score `parts` in batches and return the sums of their NLL, in nats. Processes with a sharded model take
    turns with the batches; each gets all sums. Results are read last, so a GPU never waits for the host."""
    was_training, device = model.training, model.lm_head.weight.device
    model.eval()
    dealt, started = batches(widths, world.from_main(lambda: batch_tokens(model)), batch_size), []
    for turn in range(world.rank, len(dealt) + world.rank, world.size):  # equally many turns for each process
        # A sharded model needs all processes to compute: one that has no batch left repeats the last.
        result = start(model, [parts[number] for number in dealt[min(turn, len(dealt) - 1)]])
        if turn < len(dealt):
            started.append(result)
            advance(len(dealt[turn]) / len(parts) * texts)
    totals = torch.zeros(sums, dtype=torch.float64)
    for numbers, nll in started:  # on the CPU, because a GPU adds in no fixed order
        totals.index_add_(0, torch.tensor(numbers), nll.cpu().double())
    model.train(was_training)
    return world.sum(totals.to(device)).tolist()


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows (start, first, end) of a document of `length` tokens. For each window the model reads
    tokens[start : end - 1], at most `context`, and its predictions of tokens[first : end] count: each token
    except `<s>` once. After the first window, every prediction sees at least half a context of tokens."""
    start, first = 0, 1
    while first < length:
        end = min(start + context + 1, length)
        yield start, first, end
        first = end
        start = end - 1 - context // 2


def documents_nll(
    model: Llama, tokenizer: Tokenizer, documents: list[str], world: World = ALONE, **how: Any
) -> tuple[list[float], list[int]]:
    """Return each document's NLL, −Σ ln p of the tokens after its `<s>`, in nats, and the number of these.
    A document longer than the model's context is read in `windows`. how: batch_size, advance of `add_up`."""
    encoded, rows = tokenizer.encode_batch(documents, bos=True), []
    for number, ids in enumerate(encoded):
        for start, first, end in windows(len(ids), model.config.max_position_embeddings):
            predicted = [(number, place - 1 - start, ids[place]) for place in range(first, end)]
            rows.append((ids[start : end - 1], predicted))
    sizes = ([len(tokens) for tokens, _ in rows], len(documents), len(documents))
    return add_up(model, launch, rows, *sizes, world, **how), [max(0, len(ids) - 1) for ids in encoded]


def tree(context: list[int], continuations: dict[int, list[int]]) -> Tree:
    """Return the stem and the branches of a context and its continuations, for two forward passes.

    Here c0 c1 is a context with the continuations s a1 a2 a3 and s b1 b2. Pass 1 reads the *stem*, c0 c1 s,
    like any text. Pass 2 reads the *branches*. A token sees the stem and its own branch. Its position ignores
    the other branches. So each prediction is what a pass for each continuation would give. A continuation's
    last token is not read: nothing is predicted after it.

        pass  token  position   sees  c0 c1  s   a1 a2   b1   and predicts
        1     c0     0                x
        1     c1     1                x  x                    s of a, s of b
        1     s      2                x  x   x                a1, b1
        2     a1     3                x  x   x   x            a2
        2     a2     4                x  x   x   x  x         a3
        2     b1     3                x  x   x           x    b2
    """
    shared = os.path.commonprefix([ids[:-1] for ids in continuations.values()])  # works on lists
    cut, of_stem, of_branches, tokens, owners = len(shared), [], [], [], []
    for number, ids in continuations.items():
        of_stem += [(number, place, id) for place, id in enumerate(ids[: cut + 1], len(context) - 1)]
        of_branches += [(number, place, id) for place, id in enumerate(ids[cut + 1 :], len(tokens))]
        tokens += ids[cut:-1]
        owners += [number] * len(ids[cut:-1])
    # A tree without branches reads a filler, because other rows, or other processes, may have branches.
    return (context + shared, of_stem), (tokens or [0], of_branches), owners or [0]


def trees(encoded: Encoded, max_length: int) -> list[Tree]:
    """Build the trees, with contexts cut as published: the model reads at most the `max_length` tokens before
    a label's last one. A longer label leaves less of a cut context, so only labels of one length share it."""
    grown, numbers = [], itertools.count()
    for context, continuations in encoded:
        longest = max(map(len, continuations))
        if longest > max_length:
            found = f"a label takes {longest} tokens, but the model reads at most {max_length}"
            raise UserError(f"{found}; use a model with a longer context")
        is_cut = len(context) + longest - 1 > max_length
        groups = defaultdict(dict)
        for ids in continuations:
            groups[len(ids) if is_cut else longest][next(numbers)] = ids
        grown += [tree(context[-(max_length + 1 - length) :], group) for length, group in groups.items()]
    return grown


def loglikelihoods(
    model: Llama, encoded: Encoded, max_length: int = MAX_LENGTH, world: World = ALONE, **how: Any
) -> list[list[float]]:
    """Return Σ ln p, in nats, of every continuation's tokens after its context. `lm_head` reads only the
    positions that predict such a token. how: batch_size and advance, for `add_up`."""
    device = model.lm_head.weight.device
    grown = trees(encoded, min(max_length, model.config.max_position_embeddings))
    widths = [len(stem) + len(tokens) for (stem, _), (tokens, _), _ in grown]
    has_branches = any(predicted for _, (_, predicted), _ in grown)  # the same in all processes

    def start(model: Llama, batch: list[Tree]) -> tuple[list[int], Tensor]:
        stems, branches, owners = zip(*batch)
        if not has_branches:
            return launch(model, stems)
        lengths, owners = [len(tokens) for tokens, _ in stems], pad(owners, device)  # (B, T)
        B, T, S = *owners.shape, max(lengths)
        cache = KVCache(model, B, S + T)
        numbers, nll = launch(model, stems, cache=cache)
        lengths = pad([lengths], device).view(B, 1, 1)
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
    """Encode as published: without `<s>`, and the context and each choice separately."""
    choices = {choice for example in examples for choice in example.choices}
    ids = {choice: tokenizer.encode(f" {choice}") for choice in choices}
    contexts = tokenizer.encode_batch([example.context for example in examples])
    return [(context, [ids[choice] for choice in one.choices]) for context, one in zip(contexts, examples)]


def encode_natural(tokenizer: Tokenizer, examples: list[Example]) -> Encoded:
    """Encode as in training: after `<s>`, and context and choice as one text. The tokens that all choices
    share are the context, except white space at its end, which belongs to the choices."""
    encoded = []
    for example in examples:
        texts = [example.context.rstrip(), *(f"{example.context} {choice}" for choice in example.choices)]
        context, *answered = tokenizer.encode_batch(texts, bos=True)
        shared = len(os.path.commonprefix([context, *answered]))  # works on lists
        encoded.append((context[:shared], [ids[shared:] for ids in answered]))
    return encoded


PROTOCOLS = {"published": encode_published, "natural": encode_natural}


def predict_documents(
    model: Llama, tokenizer: Tokenizer, language: str, texts: list[str], **how: Any
) -> list[Prediction]:
    """Return a prediction per document. how: for `documents_nll`. Raises UserError if NLLs are not finite."""
    nll, tokens = documents_nll(model, tokenizer, texts, **how)
    if not any(tokens):
        raise UserError(f"{language}: {tokenizer.name} yields no tokens for its text; leave it out")
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
    """Return a prediction per example. seed: the seed of their shots. encode: one of PROTOCOLS, or a similar
    function. how: for `loglikelihoods`. Raises UserError if a log-likelihood is not finite."""
    encoded = encode(tokenizer, examples)
    max_length = MAX_LENGTH if encode is encode_published else model.config.max_position_embeddings
    scored = loglikelihoods(model, encoded, max_length, **how)
    _check_finite(language, [sum(scores) for scores in scored])
    predictions = []
    for example, (_, continuations), scores in zip(examples, encoded, scored):
        question = {"lang": language, "id": example.id, "seed": seed, "shots": example.shots}
        # Choices with the same tokens get the same score, although their products may be rounded differently.
        tokens = list(map(tuple, continuations))
        score_of = dict(zip(tokens, scores))
        answer = {"loglikelihoods": dict(zip(example.choices, map(score_of.get, tokens)))}
        predictions.append({**question, "label": example.label, "prediction": best_label(answer), **answer})
    return predictions


def _check_finite(language: str, figures: list[float]) -> None:
    for number, figure in enumerate(figures):
        if not math.isfinite(figure):
            reason = "weights are damaged, or numbers too large for the dtype: try --dtype float32"
            raise UserError(f"{language}: the log-likelihood of text {number} is {figure}; {reason}")


def nll_by_language(
    model: Llama, tokenizer: Tokenizer, documents: dict[str, list[str]], title: str, world: World = ALONE
) -> dict[str, Any]:
    """Return the figures of every language and their macro-average. documents: language -> texts."""
    figures = {}
    for language, texts in tqdm(documents.items(), title, unit="language", leave=False, disable=world.no_bar):
        figures[language] = summarise(predict_documents(model, tokenizer, language, texts, world=world))
    return with_macro(figures)
