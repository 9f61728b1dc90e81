"""What a training run takes, before it is started: `train.py --dry-run`."""

import math
import os
from dataclasses import dataclass
from itertools import islice

import torch

from mala.cli import choose_device
from mala.lora import add_lora, parameter_report
from mala.model import Llama, LlamaConfig
from mala.running.flops import flops_per_token
from mala.running.settings import Settings
from mala.storage.corpus import Corpus
from mala.words.tokenizer import Tokenizer
from tools.gpus import peak_flops
from tools.memory_plan import memory_plan
from tools.tables import print_table

GPU_SIZES = (16, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GB


@dataclass
class Sizes:
    """Tokens a block; blocks a step, of all processes; blocks a forward pass, of each; processes; steps."""

    seq_len: int
    batch_size: int
    micro_batch_size: int
    processes: int
    steps: int


def dry_run(settings: Settings) -> None:
    """Print the vocabulary, the corpus, the memory and, on a known GPU, the time of a run.

    Nothing is written. No weights need be there yet, nor the GPU for which --device cuda plans.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size = settings.micro_batch(processes)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    device, dtype = choose_device(settings.device, settings.dtype, is_plan=True)
    tokenizer = Tokenizer.from_pretrained(settings.model)
    model, corpus_tokens = planned_model(settings, tokenizer, dtype), print_corpus(settings, tokenizer)
    steps = math.ceil(settings.epochs * corpus_tokens / (settings.batch_size * settings.seq_len))
    sizes = Sizes(settings.seq_len, settings.batch_size, micro_batch_size, processes, settings.steps or steps)
    print_plan(model, sizes, device)
    if device == "cuda" and torch.cuda.is_available():
        print_time(model, sizes, torch.cuda.get_device_name())


def planned_model(settings: Settings, tokenizer: Tokenizer, dtype: torch.dtype) -> Llama:
    """The model as it will train, on `meta`; prints how many rows it will have. tokenizer: the base's."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_pretrained(settings.model)).to(dtype)
        tokenizer.check_fits(model.config.vocab_size)
        if settings.extend_vocab:
            size = len(tokenizer) + settings.extend_vocab
            matrix = torch.empty(size, model.config.hidden_size, dtype=dtype)
            model.replace_vocabulary(matrix, matrix)
            more = (
                "" if settings.vocab_method == "continue" else ", at most: fewer if the base has some of them"
            )
            print(f"vocabulary: {len(tokenizer):,} pieces + {settings.extend_vocab:,} = {size:,}{more}")
        add_lora(model, settings.lora())
    model.gradient_checkpointing = settings.gradient_checkpointing
    return model


def print_corpus(settings: Settings, tokenizer: Tokenizer) -> int:
    """Print what there is to train on; returns about how many tokens of the base's tokenizer it has."""
    documents = Corpus.from_settings(settings).stream("train")
    tokens = 0
    for texts in documents.values():
        first = list(islice(texts, 100))
        tokens += round(sum(map(len, tokenizer.encode_batch(first, bos=True))) / len(first) * len(texts))
    count = f"{len(documents)} languages, {sum(map(len, documents.values())):,} documents to train on"
    more = ", those of the extended one are fewer" if settings.extend_vocab else ""
    about = f"about {tokens:,} tokens of the base tokenizer (from 100 documents a language)"
    print(f"{settings.data}: {count}, {about}{more}")
    return tokens


def print_plan(model: Llama, sizes: Sizes, device_type: str) -> None:
    """Print what a run takes."""
    batch, micro, blocks = sizes.batch_size, sizes.micro_batch_size, sizes.steps * sizes.batch_size
    accumulates = batch > micro * sizes.processes
    parts = memory_plan(model, sizes.seq_len, micro, accumulates, sizes.processes, device_type)
    needed = sum(size for *_, size in parts)
    print(f"{parameter_report(model)}; {flops_per_token(model, sizes.seq_len):,} FLOPs a token")
    devices = f"each of {sizes.processes} devices" if sizes.processes > 1 else "one device"
    step = f"a step: {batch:,} blocks of {sizes.seq_len:,} tokens, {micro:,} at a time on {devices}"
    print(f"{step}; {sizes.steps:,} steps: {blocks:,} blocks, {blocks * sizes.seq_len:,} tokens")
    rows = [(part, how, f"{size / 1e9:.2f}") for part, how, size in [*parts, ("total", "", needed)]]
    print_table(("memory of a device at the worst stage", "bytes", "GB"), rows)
    if device_type == "cuda":
        fits = [f"fits a GPU of {size} GB or more" for size in GPU_SIZES if needed <= size * 1e9]
        remedy = "take more processes, gradient_checkpointing, a smaller micro_batch_size or seq_len"
        print(fits[0] if fits else f"fits no GPU of up to {GPU_SIZES[-1]} GB: {remedy}")


def print_time(model: Llama, sizes: Sizes, gpu: str) -> None:
    """Print how long a run takes at half the peak of a GPU, if its name, which PyTorch gives, is known."""
    if peak := peak_flops(gpu):
        flops = sizes.steps * sizes.batch_size * sizes.seq_len * flops_per_token(model, sizes.seq_len)
        hours = flops / (peak / 2 * sizes.processes) / 3600
        print(f"at half of the peak of {gpu}, {peak / 1e12:,.0f} TFLOP/s: {hours:,.2f} hours")
