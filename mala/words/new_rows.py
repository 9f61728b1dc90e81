"""Rows for new pieces: resize a checkpoint's `embed_tokens` and `lm_head` to a merged vocabulary.

INITS lists the initialisations (`--init`). Each yields the new rows, chunk by chunk. It takes the base's rows
(V_base, D) in float32, the base's segmentation of the new pieces, and `std`, the config's initializer_range.
Shapes: V_base and V rows before and after, D hidden size, N positions of text.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

from mala.cli import UserError
from mala.model import Llama, LlamaConfig
from mala.storage.files import atomic_directory
from mala.storage.tokenizer_files import copy_companions, write_extended
from mala.storage.weights import WEIGHTS, read_tensors, weight_files, write_index, write_tensors
from mala.words.byte_level import load_tokenizer
from mala.words.tokenizer import Tokenizer

MATRICES = EMBED_TOKENS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 4096  # rows made at a time, so that float32 copies stay small
Segments = list[list[int]]  # the base tokens of each new piece
Text = Iterable[tuple[str, int]]  # (document, times drawn)
Where = tuple[str, torch.dtype]  # the device and the dtype to compute in
CPU: Where = ("cpu", torch.float32)


def normal(base: Tensor, chunks: Iterable[Segments], std: float, generator: Generator) -> Iterator[Tensor]:
    """Draw from N(0, initializer_range²), as transformers' `resize_token_embeddings` did for MaLA-500.
    Trap: a trained model's logits lie far below 0. These rows' logits lie near 0, so new pieces dominate the
    softmax (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021)."""
    for segments in chunks:
        yield std * torch.randn(len(segments), base.shape[1], generator=generator, device=base.device)


def mean(base: Tensor, chunks: Iterable[Segments], std: float, generator: Generator) -> Iterator[Tensor]:
    """Draw from N(μ, 1e-9 Σ), with the base rows' μ and Σ: Hewitt's remedy, transformers' `mean_resizing`."""
    center = base.mean(0)  # (D,)
    covariance = (base - center).T @ (base - center) / len(base)  # (D, D)
    variances, directions = torch.linalg.eigh(covariance)
    root = directions * (1e-9 * variances.clamp(min=0)).sqrt()  # root @ root.T = 1e-9 Σ, even if singular
    for segments in chunks:
        noise = torch.randn(len(segments), len(center), generator=generator, device=base.device)
        yield center + noise @ root.T


def subtokens(base: Tensor, chunks: Iterable[Segments], std: float, generator: Generator) -> Iterator[Tensor]:
    """Average the rows of a piece's base tokens. The base has read and written the piece as these tokens, so
    their rows hold what it knows of the piece (Gee et al., "Fast Vocabulary Transfer", EMNLP 2022)."""
    for segments in chunks:
        ids = torch.tensor([token for tokens in segments for token in tokens], device=base.device)
        starts = torch.tensor([0, *map(len, segments[:-1])], device=base.device).cumsum(0)
        yield F.embedding_bag(ids, base, starts, mode="mean")


@torch.no_grad()
def calibrate(model: Llama, tokenizer: Tokenizer, first: int, drawn: Text, seed: int) -> None:
    """Shift the head's rows from `first` on so that each piece's mean probability is its share of a text.

    A bias b_v per piece would do that, but LLaMA's head has none. However, all hidden states h share a large
    part. If m is their mean and u = m / |m|², then u·h is about 1 everywhere, so w_v + b_v u has the logits
    of w_v plus about b_v. Iterative scaling finds b_v: it starts from 0 and adds log frequency_v - log mean
    probability_v (Darroch & Ratcliff 1972). Frequencies come from all of `drawn`, h from a sample of it.
    """
    positions, rounds = 4096, 5
    weight, device = model.lm_head.weight, model.lm_head.weight.device
    counts, texts = count_tokens(tokenizer, drawn, seed, keep=positions)  # each has a token: they suffice
    frequency = torch.from_numpy(counts + 1).float().to(device)  # + 1 avoids the logarithm of 0
    frequency /= frequency.sum()

    states, times = [], []
    for text, count in texts:
        if len(times) >= positions:
            break
        ids = tokenizer.encode(text, bos=True)[: model.config.max_position_embeddings]
        states.append(model.hidden_states(torch.tensor([ids], device=device))[0].float())  # (T, D)
        times += [count] * len(ids)
    hidden = torch.cat(states)  # (N, D)
    share = torch.tensor(times, dtype=torch.float32, device=device)  # (N,), the weight of each position
    share /= share.sum()
    common = share @ hidden
    u = common / common.square().sum()  # (D,)
    bias = torch.zeros(len(weight), device=device)  # (V,), 0 for the old rows
    for _ in range(rounds):
        probability = torch.zeros_like(bias)
        for h, part in zip(hidden.split(256), share.split(256)):
            logits = F.linear(h.to(weight.dtype), weight).float() + torch.outer(h @ u, bias)  # (256, V)
            probability += part @ logits.softmax(-1)
        bias[first:] += (frequency / probability.clamp(min=1e-30))[first:].log()
    for rows, b in zip(weight[first:].split(CHUNK), bias[first:].split(CHUNK)):
        rows.copy_(rows.float() + torch.outer(b, u))


def count_tokens(tokenizer: Tokenizer, drawn: Text, seed: int, keep: int) -> tuple[np.ndarray, list]:
    """Return each piece's count in a text, (V,) float64, and `keep` of its documents in random order."""
    counts, kept, rng = np.zeros(len(tokenizer)), [], np.random.default_rng(seed)
    documents = enumerate(drawn)
    while batch := list(islice(documents, 1000)):
        encoded = tokenizer.encode_batch([text for _, (text, _) in batch])
        for (number, document), ids in zip(batch, encoded):
            np.add.at(counts, ids, document[1])
            # Reservoir sampling: all documents so far are equally likely to be kept (Knuth, TAOCP 3.4.2).
            place = number if number < keep else int(rng.integers(number + 1))
            if place < keep:
                kept[place : place + 1] = [document]
    return counts, [kept[i] for i in rng.permutation(len(kept))]


INITS = {
    "normal": normal,  # random, as in an untrained model: MaLA-500's code did this
    "mean": mean,  # the mean of all base rows, plus tiny noise: transformers does this now
    "subtokens": subtokens,  # the mean of the rows of the piece's base tokens: the default
    "calibrated": subtokens,  # the same, but then the head's rows are fitted to a text
}
FITS = {"calibrated": calibrate}  # initialisation -> how it fits the head's rows to a text


def extended_matrix(old: Tensor, V_base: int, segments: Segments, init: str, std: float, seed: int) -> Tensor:
    """Return `old`, (V_base or more, D), with a row for each of `segments`: (V, D), same dtype. The new rows
    are computed in float32. Old rows beyond V_base only pad the matrix and are dropped."""
    generator = Generator(old.device).manual_seed(seed)
    base = old[:V_base].float()
    if not base.isfinite().all():
        raise UserError("the checkpoint's embed_tokens or lm_head holds NaN or infinity; fix or replace it")
    matrix = old.new_empty(V_base + len(segments), old.shape[1])
    matrix[:V_base] = old[:V_base]
    chunks = (segments[start : start + CHUNK] for start in range(0, len(segments), CHUNK))
    for new, rows in zip(matrix[V_base:].split(CHUNK), INITS[init](base, chunks, std, generator)):
        new.copy_(rows)
    return matrix


def segment_new(config: LlamaConfig, base: Tokenizer, merged: Tokenizer) -> Segments:
    """Return the base tokens of each piece that `merged` adds to `base`, the tokenizer of `config`'s model.
    Raises UserError if `base` does not fit the model or `merged` does not begin with all of `base`."""
    base.check_fits(config.vocab_size)
    merged.check_extends(base)
    return base.segment(merged.pieces[len(base) :]) if len(merged) > len(base) else []


@torch.no_grad()
def extend_model(
    model: Llama, base: Tokenizer, merged: Tokenizer, init: str = "subtokens", seed: int = 0, drawn: Text = ()
) -> None:
    """Give `embed_tokens` and `lm_head` a row for each piece that `merged` adds to the model's tokenizer,
    `base`. drawn: a text for the initialisations in FITS. Raises UserError as `segment_new` does."""
    segments, config = segment_new(model.config, base, merged), model.config
    options = (len(base), segments, init, config.initializer_range)
    # Different seeds, so that a random row differs between the two matrices.
    embed_tokens = lm_head = extended_matrix(model.get_parameter(EMBED_TOKENS), *options, 2 * seed)
    if not config.tie_word_embeddings:
        lm_head = extended_matrix(model.get_parameter(LM_HEAD), *options, 2 * seed + 1)
    model.replace_vocabulary(embed_tokens, lm_head)
    if init in FITS and segments:
        FITS[init](model, merged, len(base), drawn, seed)


def extend_checkpoint(
    source: Path, merged: Tokenizer, out: Path, init: str, seed: int, drawn: Text = (), where: Where = CPU
) -> None:
    """Extend the checkpoint folder `source` into a new one, `out`, which appears when complete. A matrix is
    made when it is written. Only an `init` in FITS loads the model. Raises UserError if `out`
    exists, if `source` is not such a checkpoint, and as `extend_model` does."""
    config = Llama.from_pretrained(source, device="meta").config  # raises if weights do not match the config
    base, shards = load_tokenizer(source), weight_files(source)
    with atomic_directory(out) as temporary:
        segments = segment_new(config, base, merged)
        if not segments:
            raise UserError(f"{merged.name}: adds no piece to {base.name}; nothing to extend")
        copy_companions(source, temporary)
        write_extended(source, base, merged, temporary)
        fitted = {}
        if init in FITS:
            device, dtype = where
            model = Llama.from_pretrained(source, dtype, device)
            extend_model(model, base, merged, init, seed, drawn)
            fitted = {name: model.get_parameter(name).detach() for name in MATRICES}
            del model

        def make(name: str) -> Tensor:
            (_, old), *_ = read_tensors(file, [name])  # a new memory map, freed with `old`
            if name not in MATRICES:
                return old
            name = EMBED_TOKENS if config.tie_word_embeddings else name
            if fitted:
                return fitted[name].to("cpu", old.dtype)
            options = (len(base), segments, init, config.initializer_range)
            return extended_matrix(old, *options, 2 * seed + (name == LM_HEAD))

        for file in tqdm(shards, desc="copying", unit="file", leave=False, disable=None):
            tensors = {name: tensor.to("meta") for name, tensor in read_tensors(file)}
            for name in tensors.keys() & {*MATRICES}:
                tensors[name] = tensors[name].new_empty(len(merged), config.hidden_size)
            write_tensors(temporary / file.name, tensors, make)
        if shards != [source / WEIGHTS]:
            write_index(temporary, [temporary / file.name for file in shards])
