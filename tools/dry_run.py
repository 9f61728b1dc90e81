"""Print what a training run needs, without starting it: `train.py --dry-run`."""

import math
import os
import sys
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import torch

from mala.cli import choose_device
from mala.lora import parameter_report
from mala.model import Llama, LlamaConfig
from mala.running.distributed import World
from mala.running.prepare import open_corpora
from mala.running.settings import Settings
from mala.words.byte_level import load_tokenizer
from mala.words.tokenizer import Tokenizer
from tools.gpus import flops_per_token, peak_flops
from tools.memory_plan import memory_plan, recomputed_blocks, room, step_of
from tools.tables import counted, print_table

# Advertised GB -> the GiB that PyTorch finds on the smallest such card. The driver keeps a part of each.
GPU_SIZES = {16: 14.6, 24: 22.0, 32: 31.3, 40: 39.3, 48: 44.3, 80: 79.0, 96: 93.0, 141: 139.0, 192: 178.0}


def dry_run(settings: Settings) -> None:
    """Print the vocabulary, the corpus and the memory of a run, and on a known GPU its time.

    It writes nothing. It needs no weights, and --device cuda needs no GPU.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings.micro_batch(processes)  # raises the same UserError in every process
    if int(os.environ.get("RANK", "0")) > 0:
        return
    device, dtype = choose_device(settings.device, settings.dtype, is_plan=True)
    tokenizer = load_tokenizer(Path(settings.model))
    model, corpus_tokens = planned_model(settings, tokenizer, dtype), print_corpus(settings, tokenizer)
    steps = math.ceil(settings.epochs * corpus_tokens / (settings.batch_size * settings.seq_len))
    print_plan(model, settings, settings.steps or steps, World(size=processes, device=device))


def planned_model(settings: Settings, tokenizer: Tokenizer, dtype: torch.dtype) -> Llama:
    """Return the model as it will train, on `meta`; print its number of rows. tokenizer: the base's."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_pretrained(settings.model)).to(dtype)
        tokenizer.check_fits(model.config.vocab_size)
        if settings.extend_vocab:
            tokenizer.check_bpe()
            size = len(tokenizer) + settings.extend_vocab
            matrix = torch.empty(size, model.config.hidden_size, dtype=dtype)
            model.replace_vocabulary(matrix, matrix)
            more = (
                "" if settings.vocab_method == "continue" else " at most, fewer if the base already has some"
            )
            print(f"vocabulary: {len(tokenizer):,} pieces + {settings.extend_vocab:,} = {size:,}{more}")
        settings.check_model(model, tokenizer)
        settings.choose_trained(model, len(tokenizer))
    return model


def warn_of_warmup(settings: Settings, steps: int) -> None:
    """Print a warning if a run is so short that the learning rate never reaches `lr`."""
    if steps < settings.warmup_steps:  # the last step of the warm-up has the full rate
        short = f"the warm-up takes {settings.warmup_steps} steps, but the run has only {steps}"
        short += f", so the learning rate never reaches {settings.lr:g}"
        remedy = "lower --batch-size or --warmup-steps, or see configs/small-corpus.toml"
        print(f"warning: {short}; {remedy}", file=sys.stderr)


def print_corpus(settings: Settings, tokenizer: Tokenizer) -> int:
    """Print what a run trains on. Return about how many tokens the base's tokenizer makes of it."""
    of_corpora = {}
    for name, corpus in open_corpora(settings).items():
        documents, tokens = corpus.stream("train"), 0
        for texts in documents.values():
            first = list(islice(texts, 100))
            tokens += round(sum(map(len, tokenizer.encode_batch(first, bos=True))) / len(first) * len(texts))
        total = sum(map(len, documents.values()))
        count = f"{counted(documents, 'language')}, {total:,} documents to train on"
        more = "; the extended tokenizer makes fewer" if settings.extend_vocab else ""
        about = f"about {tokens:,} tokens of the base tokenizer (estimated from 100 documents per language)"
        share = f"replay, {settings.replay_share:.3g} of the tokens of a step: " if name else ""
        print(f"{settings.replay if name else settings.data}: {share}{count}, {about}{more}")
        of_corpora[name] = tokens
    return of_corpora[""]


def print_plan(model: Llama, settings: Settings, steps: int, world: World) -> None:
    """Print what a run of `steps` steps takes in each process, and how large a GPU it needs."""
    print(f"{parameter_report(model)}; {flops_per_token(model, settings.seq_len):,} FLOPs per token")
    devices = f"each of {world.size} devices" if world.size > 1 else "one device"
    at_a_time = f"{settings.micro_batch(world.size):,} at a time on {devices}"
    step = f"a step: {settings.batch_size:,} sequences of {settings.seq_len:,} tokens, {at_a_time}"
    blocks = steps * settings.batch_size
    most = "" if settings.steps or not settings.extend_vocab else "at most "
    print(f"{step}; {most}{steps:,} steps: {blocks:,} sequences, {blocks * settings.seq_len:,} tokens")
    warn_of_warmup(settings, steps)
    is_here = world.device == "cuda" and torch.cuda.is_available()
    free = room(world.device) if is_here else math.inf  # unknown for a GPU of another machine
    model.recomputed_blocks = recomputed_blocks(model, settings, world, free)
    parts = memory_plan(model, step_of(settings, world.size, world.device))
    rows = [(part, how, f"{size / 1e9:.2f}") for part, how, size in parts]
    total = ("total", "", f"{sum(size for *_, size in parts) / 1e9:.2f}")
    print_table(("memory of a device at the worst stage", "bytes", "GB"), [*rows, total])
    if world.device == "cuda":
        print_choices(model, settings, world, free)
    if is_here:
        print_time(
            model, blocks * settings.seq_len, settings.seq_len, world.size, torch.cuda.get_device_name()
        )


def print_choices(model: Llama, settings: Settings, world: World, free: float) -> None:
    """Print what a step takes with each combination of the settings that save memory, and where it fits."""
    rows, is_here = [], math.isfinite(free)
    for moments, checkpointing in product(("float32", "8bit"), ("off", "on")):
        chosen = replace(settings, moments=moments, gradient_checkpointing=checkpointing)
        model.recomputed_blocks = recomputed_blocks(model, chosen, world, free)
        needed = sum(size for *_, size in memory_plan(model, step_of(chosen, world.size, world.device)))
        enough = (f"{size} GB or more" for size, gib in GPU_SIZES.items() if needed <= gib * 2**30)
        setting = f"--moments {moments} --gradient-checkpointing {checkpointing}"
        here = ["yes" if needed <= free else "no"] if is_here else []
        rows.append((setting, f"{needed / 1e9:.2f}", next(enough, "none"), *here))
    here = [f"fits this GPU, {free / 1e9:.1f} GB"] if is_here else []
    print_table(("settings", "GB", "fits a GPU of", *here), rows)


def print_time(model: Llama, tokens: int, seq_len: int, processes: int, gpu: str) -> None:
    """Print how long a run takes at half the peak of the GPU that PyTorch calls `gpu`, if that is known."""
    if peak := peak_flops(gpu):
        hours = tokens * flops_per_token(model, seq_len) / (peak / 2 * processes) / 3600
        print(f"at half the peak of {gpu} ({peak / 1e12:,.0f} TFLOP/s): {hours:,.2f} hours")
