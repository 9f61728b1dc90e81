"""Adapt a LLaMA checkpoint to the languages of a corpus, as MaLA-500 did (arXiv 2401.13303).

    python train.py                                            the bundled tiny LLaMA, on the bundled corpus, on a CPU
    python train.py --config configs/mala500.toml --model DIR --data DIR --out DIR

The vocabulary is extended, LoRA is added to the attention, and it is trained together with the whole embeddings and head.
The result is left in --out: adapter/ (PEFT's format, with its tokenizer.model), base/ (the checkpoint with the extended
vocabulary, which the adapter needs), nll.json (per language, on held-out text, before and after) and metrics.jsonl.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from mala.checkpoint import atomic_directory, write_json
from mala.cli import UserError, choose_device, option, parse, print_table, run
from mala.data import Batches, Corpus, pack
from mala.extend import INITS, extend_model, save_extended
from mala.lora import LoRAConfig, add_lora, find_targets, parameter_report, save_adapter, trainable_parameters
from mala.model import Llama
from mala.scoring import nll_by_language
from mala.tokenizer import Tokenizer
from mala.vocab import continue_merges, count_words, merge, sample, train_pieces

ROOT = Path(__file__).resolve().parent


@dataclass
class Settings:
    config: str | None = option(None, "a recipe, TOML: keys as the flags here, with underscores")
    model: str = option(str(ROOT / "assets/tiny-llama"), "the base checkpoint, a folder as the Hugging Face hub holds it")
    data: str = option(str(ROOT / "assets/demo/sib200"), "the corpus, a folder with one entry per language")
    out: str = option("out/demo", "where the results go; those of an earlier run are replaced")
    langs: tuple[str, ...] = option((), "train on these languages of the corpus only")
    held_out: float = option(0.2, "last share of each language's documents kept for measuring, where there is no test split")
    max_held_out: int = option(1000, "at most this many of them a language")

    extend_vocab: int = option(4000, "learn this many pieces and add those that the tokenizer lacks; 0: keep the vocabulary")
    vocab_method: str = option("union", "union: learn a model of that size and add what is new, as MaLA-500; continue: add "
                               "that many further merges", choices=("union", "continue"))  # fmt: skip
    init: str = option("subtokens", "how the rows of new pieces start, see mala/extend.py", choices=tuple(INITS))
    r: int = option(8, "LoRA rank")
    lora_alpha: float = option(32.0, "LoRA scale, divided by the rank")
    lora_dropout: float = option(0.1, "dropout before LoRA's A")
    use_rslora: bool = option(False, "divide the scale by the rank's square root instead")
    target_modules: tuple[str, ...] = option(("q_proj", "v_proj"), "the linear layers that get LoRA, or all-linear")
    modules_to_save: tuple[str, ...] = option(("embed_tokens", "lm_head"), "the modules that train whole")

    epochs: float = option(12.0, "passes over the corpus's tokens")
    steps: int | None = option(None, "optimizer steps; where given, they count and not the epochs")
    seq_len: int = option(128, "tokens a block")
    batch_size: int = option(16, "blocks an optimizer step")
    micro_batch_size: int | None = option(None, "blocks a forward pass; the rest of a step is accumulated; default: all")
    lr: float = option(5e-3, "highest learning rate")
    warmup_steps: int = option(20, "linear warm-up; then the rate falls linearly, to 0 after the last step")
    weight_decay: float = option(0.1, "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    alpha: float = option(0.3, "languages are drawn by n^alpha, n their number of documents")
    seed: int = option(0, "decides, with the steps and the corpus, every bit of the result on one machine")
    log_every: int = option(10, "steps between two lines of metrics.jsonl")

    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the frozen weights and the computation; auto: float32 on a CPU, else bfloat16",
                        choices=("auto", "float32", "bfloat16"))  # fmt: skip
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory")

    def __post_init__(self) -> None:
        positive = ("steps", "seq_len", "batch_size", "micro_batch_size", "lr", "log_every", "max_grad_norm", "epochs")
        for name in positive:
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("extend_vocab", "warmup_steps", "weight_decay", "alpha", "max_held_out", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(f"{name} is {getattr(self, name)}, expected a number from 0 to below 2^32")
        if self.micro_batch_size is None:
            self.micro_batch_size = self.batch_size
        if self.batch_size % self.micro_batch_size:
            raise UserError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        for source in (self.model, self.data):
            if Path(self.out).resolve() in (Path(source) / "inside").resolve().parents:
                raise UserError(f"{source}: lies in --out {self.out}, whose results are replaced; name another --out")


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then linear decay: `lr` at step `warmup_steps`, 0 just after the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    return settings.lr * (steps - step) / max(1, steps - settings.warmup_steps)


def main() -> None:
    settings = parse(Settings, __doc__.split("\n\n")[0])
    started = time.perf_counter()
    out = Path(settings.out)
    device, dtype = choose_device(settings.device, settings.dtype)

    # The base checkpoint, the corpus, and what would be learnt: a mistake in these is found before anything is written.
    base, base_tokenizer = Path(settings.model), Tokenizer.from_pretrained(settings.model)
    model = Llama.from_pretrained(base, dtype, device)
    base_tokenizer.check_fits(model.config.vocab_size)
    lora = LoRAConfig(settings.r, settings.lora_alpha, settings.lora_dropout, settings.target_modules, settings.modules_to_save,
                      settings.use_rslora)  # fmt: skip
    find_targets(model, lora)
    corpus = Corpus(settings.data, settings.langs, settings.held_out, settings.max_held_out)
    train_documents, test_documents = corpus.load("train"), corpus.load("test")
    tokenizer = base_tokenizer
    if settings.extend_vocab:
        words = count_words(sample(train_documents, settings.alpha, settings.seed))
        if settings.vocab_method == "union":
            tokenizer = Tokenizer(merge(base_tokenizer, Tokenizer(train_pieces(words, settings.extend_vocab))))
        else:
            tokenizer = Tokenizer(continue_merges(base_tokenizer, words, settings.extend_vocab))

    streams = {
        language: (len(documents), pack(tokenizer, documents))
        for language, documents in tqdm(train_documents.items(), desc="packing", leave=False, disable=None)
    }
    corpus_tokens = sum(len(tokens) for _, tokens in streams.values())
    steps = settings.steps or math.ceil(settings.epochs * corpus_tokens / (settings.batch_size * settings.seq_len))
    batches = Batches(streams, settings.seq_len, settings.batch_size, steps, settings.alpha, settings.seed)

    # How well the checkpoint predicts the held-out text as it comes, with its own tokenizer.
    clear(out)
    before = nll_by_language(model, base_tokenizer, test_documents, "NLL before")

    # A row in embed_tokens and lm_head for each new piece.
    if settings.extend_vocab:
        drawn = sample(train_documents, settings.alpha, settings.seed)
        extend_model(model, base_tokenizer, tokenizer, settings.init, settings.seed, drawn)
        base = out / "base"
        save_extended(model, tokenizer, base)

    # LoRA, and the parameters that train: A, B and the modules saved whole.
    torch.manual_seed(settings.seed)  # for A, which starts at random
    add_lora(model, lora)
    model.gradient_checkpointing = settings.gradient_checkpointing
    trainable = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(trainable, weight_decay=settings.weight_decay, fused=True)
    print(f"{len(base_tokenizer):,} pieces -> {len(tokenizer):,}; {len(streams)} languages, {corpus_tokens:,} tokens; "
          f"{parameter_report(model)}")  # fmt: skip

    # Training.
    model.train()
    progress = tqdm(range(steps), desc="training", unit="step", disable=None)
    with open(out / "metrics.jsonl", "w", encoding="utf-8", buffering=1) as metrics:
        logged_at, logged_loss = time.perf_counter(), 0.0
        for step in progress:
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout depends on the step alone, not on what ran before
            lr = learning_rate(step, steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr

            tokens, targets, languages = batches[step]  # (B, T), (B, T)
            step_loss = 0.0
            for x, y in zip(tokens.split(settings.micro_batch_size), targets.split(settings.micro_batch_size)):
                # Every micro-batch has as many targets, so the mean of its means is the mean of the batch.
                loss = model(x.to(device), targets=y.to(device)) * len(x) / len(tokens)
                loss.backward()
                step_loss += loss.item()
            grad_norm = clip_grad_norm_(trainable, settings.max_grad_norm).item()
            if not math.isfinite(step_loss) or not math.isfinite(grad_norm):
                raise UserError(f"step {step + 1}: the loss is {step_loss} and the gradient's norm {grad_norm} "
                                f"(languages {', '.join(sorted(set(languages)))}); lower --lr")  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()

            logged_loss += step_loss
            if (step + 1) % settings.log_every == 0 or step + 1 == steps:
                since = step % settings.log_every + 1  # steps since the last line
                now = time.perf_counter()
                speed = since * tokens.numel() / (now - logged_at)
                line = {"step": step + 1, "tokens": (step + 1) * tokens.numel(), "loss": logged_loss / since, "lr": lr,
                        "grad_norm": grad_norm, "tokens_per_second": speed}  # fmt: skip
                metrics.write(json.dumps(line) + "\n")
                progress.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_second=f"{speed:,.0f}")
                logged_at, logged_loss = now, 0.0

    # What came of it.
    after = nll_by_language(model, tokenizer, test_documents, "NLL after")
    with atomic_directory(out / "adapter", replace=True) as adapter:
        save_adapter(model, adapter, base=str(base))
        (adapter / "tokenizer.model").write_bytes(tokenizer.model)
    write_json(out / "nll.json", {"before": before, "after": after})
    report(before, after)
    print(f"{out}: {steps} steps, {time.perf_counter() - started:.0f} s, peak memory {peak_memory(device):.2f} GB")


def clear(out: Path) -> None:
    """Make the output folder, and take away what an earlier run left, so that a killed run leaves no mixture of the two."""
    if out.is_dir() and any(out.iterdir()) and not (out / "metrics.jsonl").exists():
        raise UserError(f"{out}: the folder holds something that is no result of train.py; name an empty or a new --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").touch()  # fails now, not after an hour, where nothing can be written
    (out / "nll.json").unlink(missing_ok=True)
    for name in ("adapter", "base"):
        shutil.rmtree(out / name, ignore_errors=True)


def report(before: dict, after: dict) -> None:
    """A table of languages, best first, and one line of summary."""

    def change(language: str) -> float:
        return after["languages"][language]["nll_per_document"] / before["languages"][language]["nll_per_document"] - 1

    languages = sorted(before["languages"], key=change)
    shown = languages if len(languages) <= 40 else languages[:10] + languages[-10:]
    rows = [
        (language, f"{b['documents']}", f"{b['nll_per_document']:.1f}", f"{a['nll_per_document']:.1f}",
         f"{change(language):+.1%}", f"{b['bits_per_byte']:.2f}", f"{a['bits_per_byte']:.2f}")
        for language in shown
        for b, a in [(before["languages"][language], after["languages"][language])]
    ]  # fmt: skip
    print_table(("language", "documents", "NLL before", "after", "change", "bits/byte before", "after"), rows)
    if len(shown) < len(languages):
        print(f"(the 10 most and the 10 least improved of {len(languages)}; all in nll.json)")
    b, a = before["macro"], after["macro"]
    improved = sum(change(language) < 0 for language in languages)
    print(f"held-out NLL, nats a document, mean of {len(languages)} languages: {b['nll_per_document']:.1f} -> "
          f"{a['nll_per_document']:.1f} ({a['nll_per_document'] / b['nll_per_document'] - 1:+.1%}), bits per byte "
          f"{b['bits_per_byte']:.2f} -> {a['bits_per_byte']:.2f}; improved: {improved} of {len(languages)}")  # fmt: skip


def peak_memory(device: str) -> float:
    """In GB: of the GPU where there is one, else the resident memory of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows, which no other part needs to know

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    run(main)
