"""Rows for new pieces: `embed_tokens` and `lm_head` of a checkpoint, resized to a merged vocabulary.

Four initialisations (`--init`), from the base's rows and the base's own segmentation of each new piece:

- `normal`      random, as large as an untrained model's: what MaLA-500's code did
- `mean`        the mean of all base rows: what transformers does now
- `subtokens`   the mean of the rows of the piece's segmentation (the default)
- `calibrated`  `subtokens`, and the head shifted so that the model expects each new piece as often as a corpus holds it

Shapes: V_base and V rows before and after, V_new = V - V_base, D hidden size, N positions of text.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from mala.checkpoint import (
    INDEX,
    WEIGHTS,
    atomic_directory,
    copy_companions,
    read_json,
    read_tensors,
    rewrite_tensors,
    weight_files,
    write_json,
)
from mala.cli import UserError
from mala.model import Llama, LlamaConfig
from mala.tokenizer import Tokenizer

EMBED_TOKENS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 4096  # rows made at a time: what is float32 stays small beside the matrix
Segments = list[list[int]]  # the base tokens of each new piece


def normal(base: torch.Tensor, std: float, generator: torch.Generator) -> Callable[[Segments], torch.Tensor]:
    """N(0, initializer_range²), as transformers' `resize_token_embeddings` drew new rows when MaLA-500 was trained.

    Trap: a trained model's logits lie far below 0, and such a row's logit near 0: the new pieces take over the softmax
    (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).
    """
    return lambda segments: std * torch.randn(len(segments), base.shape[1], generator=generator, device=base.device)


def mean(base: torch.Tensor, std: float, generator: torch.Generator) -> Callable[[Segments], torch.Tensor]:
    """N(μ, 1e-9 Σ), μ and Σ the mean and covariance of the base rows: Hewitt's remedy, transformers' `mean_resizing`."""
    center = base.mean(0)  # (D,)
    covariance = (base - center).T @ (base - center) / len(base)  # (D, D)
    variances, directions = torch.linalg.eigh(covariance)
    root = directions * (1e-9 * variances.clamp(min=0)).sqrt()  # root @ root.T = 1e-9 Σ, also where Σ is singular

    def rows(segments: Segments) -> torch.Tensor:
        return center + torch.randn(len(segments), len(center), generator=generator, device=base.device) @ root.T

    return rows


def subtokens(base: torch.Tensor, std: float, generator: torch.Generator) -> Callable[[Segments], torch.Tensor]:
    """The mean of the rows of the piece's base tokens: what the base, which had to read and write the piece in these parts,
    knows of it (Gee et al., "Fast Vocabulary Transfer", EMNLP 2022)."""

    def rows(segments: Segments) -> torch.Tensor:
        ids = torch.tensor([token for tokens in segments for token in tokens], device=base.device)
        starts = torch.tensor([0, *map(len, segments[:-1])], device=base.device).cumsum(0)
        return F.embedding_bag(ids, base, starts, mode="mean")

    return rows


INITS = {"normal": normal, "mean": mean, "subtokens": subtokens, "calibrated": subtokens}


def extended_matrix(old: torch.Tensor, segments: Segments, init: str, std: float, seed: int) -> torch.Tensor:
    """old (V_base, D) -> (V, D) of the same dtype: the old rows, then a new one for each of `segments`, made in float32."""
    generator = torch.Generator(old.device).manual_seed(seed)
    base = old.float()
    if not base.isfinite().all():
        raise UserError("embed_tokens or lm_head of the checkpoint holds NaN or infinity; new rows cannot come of that")
    rows = INITS[init](base, std, generator)
    matrix = old.new_empty(len(old) + len(segments), old.shape[1])
    matrix[: len(old)] = old
    for start in range(0, len(segments), CHUNK):
        chunk = segments[start : start + CHUNK]
        matrix[len(old) + start : len(old) + start + len(chunk)] = rows(chunk)
    return matrix


def segment_new(config: LlamaConfig, base: Tokenizer, merged: Tokenizer) -> Segments:
    """The base tokens of each piece that `merged` adds to `base`, the tokenizer of the model that `config` describes.

    Raises UserError where `base` does not fit the model or `merged` does not begin with all of `base`.
    """
    base.check_fits(config.vocab_size)
    if merged.pieces[: len(base)] != base.pieces:
        raise UserError(f"{merged.name}: does not begin with the pieces of {base.name}; extend the model's own tokenizer")
    return base.segment(merged.pieces[len(base) :]) if len(merged) > len(base) else []


@torch.no_grad()
def extend_model(model: Llama, base: Tokenizer, merged: Tokenizer, init: str = "subtokens", seed: int = 0,
                 drawn: Iterable[tuple[str, int]] = ()) -> None:  # fmt: skip
    """Give `embed_tokens` and `lm_head` a row for every piece that `merged` adds to `base`, the model's tokenizer.

    drawn: (document, times), the text that `calibrated` fits. Rows of the checkpoint beyond `base`, which pad its shape, go.
    Raises UserError where the three do not fit one another.
    """
    segments = segment_new(model.config, base, merged)
    std = model.config.initializer_range
    weights = [model.model["embed_tokens"].weight, model.lm_head.weight]
    if model.config.tie_word_embeddings:
        weights.pop()
    # Each with its own seed, so that a row of the embeddings is not the same row of the head.
    matrices = [extended_matrix(weight[: len(base)], segments, init, std, 2 * seed + i) for i, weight in enumerate(weights)]
    model.replace_vocabulary(matrices[0], matrices[-1])
    if init == "calibrated" and segments:
        calibrate(model, merged, len(base), drawn, seed)


@torch.no_grad()
def calibrate(model: Llama, tokenizer: Tokenizer, first: int, drawn: Iterable[tuple[str, int]], seed: int,
              positions: int = 4096, rounds: int = 5) -> None:  # fmt: skip
    """Shift the head's rows from `first` on so that each piece's mean probability is its share of a text's tokens.

    A bias per piece would do that (start at the logarithm of its frequency, and training need not learn it first), but
    LLaMA's head has none. Its hidden states h have a large common part, though: with m their mean and u = m / |m|², u·h is
    about 1 everywhere, so w_v + b_v u has the logits of w_v, plus about b_v. The b_v are found by iterative scaling: from 0,
    b_v += log frequency_v - log mean probability_v (Darroch & Ratcliff 1972).

    drawn: (document, times), at least one; the frequencies come from all of it, the hidden states from about `positions` of
    its tokens. Both count a document as often as it is drawn.
    """
    device, weight = model.lm_head.weight.device, model.lm_head.weight
    counts, texts = count_tokens(tokenizer, drawn, np.random.default_rng(seed), keep=positions)
    frequency = torch.from_numpy(counts + 1).float().to(device)  # once more than seen: no logarithm of 0
    frequency /= frequency.sum()

    states, times = [], []
    for text, text_times in texts:
        if sum(map(len, states)) >= positions:
            break
        ids = tokenizer.encode(text, bos=True)[: model.config.max_position_embeddings]
        states.append(model.hidden_states(torch.tensor([ids], device=device))[0].float())  # (T, D)
        times += [text_times] * len(ids)
    hidden = torch.cat(states)  # (N, D)
    share = torch.tensor(times, dtype=torch.float32, device=device)  # (N,), of each position in a mean
    share /= share.sum()
    common = share @ hidden
    u = common / common.square().sum()  # (D,)
    bias = torch.zeros(len(weight), device=device)  # (V,), 0 for the old rows
    for _ in range(rounds):
        probability = torch.zeros(len(weight), device=device)  # (V,)
        for chunk, chunk_share in zip(hidden.split(256), share.split(256)):
            logits = F.linear(chunk.to(weight.dtype), weight).float() + torch.outer(chunk @ u, bias)  # (256, V)
            probability += chunk_share @ logits.softmax(-1)
        bias[first:] += (frequency / probability.clamp(min=1e-30))[first:].log()
    for start in range(first, len(weight), CHUNK):
        rows = weight[start : start + CHUNK]
        rows.copy_(rows.float() + torch.outer(bias[start : start + CHUNK], u))


def count_tokens(tokenizer: Tokenizer, drawn: Iterable[tuple[str, int]], rng: np.random.Generator, keep: int
                 ) -> tuple[np.ndarray, list[tuple[str, int]]]:  # fmt: skip
    """How often each token occurs in the documents (text, times), (V,) float64, and `keep` of these in random order."""
    counts = np.zeros(len(tokenizer))
    kept: list[tuple[str, int]] = []
    documents = enumerate(drawn)
    while batch := list(islice(documents, 1000)):
        for ids, (number, document) in zip(tokenizer.encode_batch([text for _, (text, _) in batch]), batch):
            np.add.at(counts, ids, document[1])
            # Reservoir sampling: each document so far is among those kept with the same probability (Knuth, TAOCP 3.4.2).
            place = number if number < keep else int(rng.integers(number + 1))
            kept[place : place + 1] = [document] if place < keep else kept[place : place + 1]
    return counts, [kept[i] for i in rng.permutation(len(kept))]


def extend_checkpoint(source: Path, merged: Tokenizer, out: Path, init: str, seed: int,
                      drawn: Iterable[tuple[str, int]] = (), device: str = "cpu",
                      dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    """`extend_model` from one checkpoint folder to another, which appears when it is whole.

    Only the two matrices are ever in memory, each while its shard is written; all else is copied as bytes. `calibrated` runs
    the model: it is loaded, on `device` in `dtype`, and its two matrices are then written as those of the others.
    Raises UserError where `out` exists, and as `extend_model` does.
    """
    config, base = LlamaConfig.from_pretrained(source), Tokenizer.from_pretrained(source)
    shards = weight_files(source)
    check_added_tokens(source, base)
    with atomic_directory(out) as temporary:
        segments = segment_new(config, base, merged)
        if not segments:
            raise UserError(f"{merged.name}: adds no piece to {base.name}; nothing to extend")
        found = {name for shard in shards for name, _ in read_tensors(shard, (EMBED_TOKENS, LM_HEAD))}
        for name in (EMBED_TOKENS,) if config.tie_word_embeddings else (EMBED_TOKENS, LM_HEAD):
            if name not in found:
                raise UserError(f"{source}: the weights lack {name}; expected the checkpoint of a LLaMA")
        calibrated = {}
        if init == "calibrated":
            model = Llama.from_pretrained(source, dtype, device)
            extend_model(model, base, merged, init, seed, drawn)
            calibrated = {EMBED_TOKENS: model.model["embed_tokens"].weight, LM_HEAD: model.lm_head.weight}
            del model

        def extended(name: str, old: torch.Tensor) -> torch.Tensor:
            if old.shape != (config.vocab_size, config.hidden_size) or not old.is_floating_point():
                raise UserError(f"{source}: {name} is {old.dtype} {tuple(old.shape)}, expected floating point "
                                f"({config.vocab_size}, {config.hidden_size}) by config.json")  # fmt: skip
            if calibrated:
                return calibrated[name].detach().to("cpu", old.dtype)
            own_seed = 2 * seed + (name == LM_HEAD and not config.tie_word_embeddings)
            return extended_matrix(old[: len(base)], segments, init, config.initializer_range, own_seed)

        copy_companions(source, temporary, with_vocabulary=False)
        new_bytes = new_values = 0
        for file in tqdm(shards, desc="copying", unit="file", leave=False, disable=None):
            old = dict(read_tensors(file, (EMBED_TOKENS, LM_HEAD)))
            if not old:
                shutil.copyfile(file, temporary / file.name)
                continue
            more = sum((len(merged) - len(tensor)) * config.hidden_size for tensor in old.values())
            new_values, new_bytes = new_values + more, new_bytes + more * next(iter(old.values())).itemsize
            # The new matrices have no name here: they are gone before those of the next shard are made.
            rewrite_tensors(file, temporary / file.name, {name: extended(name, tensor) for name, tensor in old.items()})
        if shards != [source / WEIGHTS]:
            index = read_json(source / INDEX)
            metadata = index["metadata"] if isinstance(index.get("metadata"), dict) else {}
            for key, more in (("total_size", new_bytes), ("total_parameters", new_values)):
                if isinstance(metadata.get(key), int | float):
                    metadata[key] += more
            write_json(temporary / INDEX, index)
        write_json(temporary / "config.json", {**read_json(source / "config.json"), "vocab_size": len(merged)})
        (temporary / "tokenizer.model").write_bytes(merged.model)


def check_added_tokens(source: Path, base: Tokenizer) -> None:
    """Raise UserError where transformers' files name tokens after the last of `tokenizer.model`: their ids are taken now."""
    for name, key in (("added_tokens.json", None), ("tokenizer_config.json", "added_tokens_decoder")):
        if not (source / name).exists():
            continue
        values = read_json(source / name)
        table = values if key is None else values.get(key) or {}
        ids = table.values() if key is None else table
        beyond = [int(i) for i in ids if str(i).isdigit() and int(i) >= len(base)]
        if beyond:
            raise UserError(
                f"{source / name}: adds token {min(beyond)} after the {len(base):,} of {base.name}, where the new pieces go; "
                f"take it out of this file if the model can do without it"
            )
