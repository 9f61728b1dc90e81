"""Adapt a LLaMA checkpoint to the languages of a corpus, as MaLA-500 did (arXiv 2401.13303).

    python train.py                       the defaults, as in configs/demo.toml: the bundled tiny LLaMA and corpus, on a CPU
    python train.py --config configs/mala500.toml --model DIR --data DIR --out DIR
    torchrun --nproc-per-node 8 train.py --config ...          the same on eight GPUs

The vocabulary is extended, LoRA is added to the attention, and it is trained together with the whole embeddings and head.
The result is left in --out: adapter/ (PEFT's format, with its tokenizer.model), base/ (the checkpoint with the extended
vocabulary, which the adapter needs), nll.json (per language, on held-out text, before and after), metrics.jsonl and
checkpoints/. A run that was killed goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from mala import distributed, plan, plots
from mala.checkpoint import (
    ADAPTER,
    OPTIMIZER,
    atomic_directory,
    checkpoints,
    read_json,
    read_state,
    read_tensors,
    write_json,
    write_training_state,
)
from mala.cli import UserError, check_folder, choose_device, option, parse, print_table, run
from mala.corpus import Corpus
from mala.data import Batches, open_streams, read_ahead
from mala.distributed import World, catch_signals, whole
from mala.extend import INITS
from mala.load import find
from mala.log import RunLog, peak_memory
from mala.lora import LoRAConfig, adapter_tensors, add_lora, find_targets, parameter_report, save_adapter, trainable_parameters
from mala.model import Llama
from mala.prepare import prepare
from mala.scoring import nll_by_language
from mala.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter


@dataclass
class Settings:
    config: str | None = option(None, "a recipe, TOML: keys as the flags here, with underscores")
    model: str = option(str(ROOT / "assets/tiny-llama"), "the base checkpoint: a folder as the Hugging Face hub holds it, or "
                        "a name there")  # fmt: skip
    data: str = option(str(ROOT / "assets/demo/sib200"), "the corpus, a folder with one entry per language")
    out: str = option("out/demo", "where the results go")
    resume: str = option("auto", "auto: go on from the newest whole checkpoint in --out; never: start over and replace what is "
                         "there; or a checkpoint's folder")  # fmt: skip
    tokens: str | None = option(None, "where the token files go, for runs of one tokenizer to share; default: tokens/ in --out")
    dry_run: bool = option(False, "print what would run, and what it would take, and write nothing")
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
    micro_batch_size: int | None = option(None, "blocks a forward pass, the rest is accumulated; default: all of a process")
    lr: float = option(5e-3, "highest learning rate")
    warmup_steps: int = option(20, "linear warm-up; then the rate falls linearly, to 0 after the last step")
    weight_decay: float = option(0.1, "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    alpha: float = option(0.3, "languages are drawn by n^alpha, n their number of documents")
    seed: int = option(0, "decides, with the other settings and the corpus, every bit of the result on one machine")

    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    save_every: int = option(50, "steps between two checkpoints")
    keep: int = option(2, "the newest checkpoints that are kept")
    eval_every: int | None = option(None, "steps between two measurements of held-out text; default: only before and after")
    eval_documents: int = option(50, "at most this many documents of each language then")
    tensorboard: bool = option(False, "write to tensorboard/ in --out, too (pip install tensorboard)")

    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the frozen weights and the computation; auto: float32 on a CPU, else bfloat16",
                        choices=("auto", "float32", "bfloat16"))  # fmt: skip
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory")
    compile: str = option("auto", "torch.compile for every block; auto: on a GPU", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        positive = ("steps", "seq_len", "batch_size", "micro_batch_size", "lr", "log_every", "save_every", "keep", "eval_every",
                    "eval_documents", "max_grad_norm", "epochs")  # fmt: skip
        for name in positive:
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("extend_vocab", "warmup_steps", "weight_decay", "alpha", "max_held_out", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(f"{name} is {getattr(self, name)}, expected a number from 0 to below 2^32")
        if self.steps and self.steps * self.batch_size > 2**31:
            raise UserError(f"{self.steps:,} steps of {self.batch_size:,} blocks are more than the 2^31 that can be planned")
        for folder in (self.out, self.tokens or self.out):
            check_folder(folder)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard takes the package tensorboard: pip install tensorboard")
        for source in (self.model, self.data):
            if Path(self.out).resolve() in (Path(source) / "inside").resolve().parents:
                raise UserError(f"{source}: lies in --out {self.out}, whose results are replaced; name another --out")

    def lora(self) -> LoRAConfig:
        return LoRAConfig(
            self.r, self.lora_alpha, self.lora_dropout, self.target_modules, self.modules_to_save, self.use_rslora
        )

    def micro_batch(self, processes: int) -> int:
        """Blocks a forward pass of each process."""
        size = self.micro_batch_size or max(1, self.batch_size // processes)
        if self.batch_size % (size * processes):
            raise UserError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {size}"
                            + (f" x {processes} processes" if processes > 1 else ""))  # fmt: skip
        return size


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then linear decay: `lr` at step `warmup_steps`, 0 just after the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    return settings.lr * (steps - step) / max(1, steps - settings.warmup_steps)


def main() -> None:
    settings = parse(Settings, __doc__.split("\n\n")[0])
    settings.model = str(find(settings.model, with_weights=not settings.dry_run))
    if settings.dry_run:
        return plan.dry_run(settings)
    device, dtype = choose_device(settings.device, settings.dtype)
    try:
        with distributed.start(device) as world, contextlib.ExitStack() as locks:
            train(settings, world, dtype, locks)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full ({str(error).partition('. ')[0]}); --dry-run shows what takes it, a lower "
                        "--micro-batch-size or --seq-len, or --gradient-checkpointing, less") from None  # fmt: skip


def train(settings: Settings, world: World, dtype: torch.dtype, locks: contextlib.ExitStack) -> None:
    started = time.perf_counter()
    out = Path(settings.out)
    micro_batch_size = settings.micro_batch(world.size)

    # A mistake in the checkpoint or in the corpus is found before anything is written. On `meta` no weight is read.
    base, base_tokenizer = Path(settings.model), Tokenizer.from_pretrained(settings.model)
    shapes = Llama.from_pretrained(base, dtype, "meta")
    base_tokenizer.check_fits(shapes.config.vocab_size)
    if settings.seq_len > (longest := shapes.config.max_position_embeddings):
        raise UserError(f"seq_len is {settings.seq_len}, but {base} reads {longest} tokens at most (max_position_embeddings)")
    find_targets(shapes, settings.lora())
    corpus = Corpus(settings.data, settings.langs, settings.held_out, settings.max_held_out)
    peak_flops = plan.peak_flops(torch.cuda.get_device_name()) if world.device != "cpu" else None

    # Vocabulary, extended checkpoint, held-out documents and token files, where they are not there yet.
    resumed_from, identity = world.from_main(lambda: prepare(settings, corpus, world.device, dtype, locks))
    if settings.extend_vocab:
        base = out / "base"
    tokenizer = Tokenizer.from_pretrained(base)
    test_documents = Corpus(out / "held_out", held_out=1.0).load("test")
    streams = open_streams(corpus, Path(settings.tokens or out / "tokens"), tokenizer.bos_id)
    corpus_tokens = sum(map(len, streams.values()))
    tokens_a_step = settings.batch_size * settings.seq_len
    steps = settings.steps or math.ceil(settings.epochs * corpus_tokens / tokens_a_step)
    batches = Batches(streams, settings.seq_len, settings.batch_size, steps, settings.alpha, settings.seed)

    # How well the checkpoint predicts the held-out text as it comes, with its own tokenizer.
    state = read_state(resumed_from) if resumed_from else {"step": 0}
    done = state["step"]
    if done > steps:
        raise UserError(f"{resumed_from}: has {done} steps, this run only {steps}; name another --out or more --steps")
    nll = world.from_main(lambda: read_json(out / "nll.json") if (out / "nll.json").exists() else {})
    if "after" in nll and (resumed_from is None or done == steps):
        if world.is_main:
            report(nll["before"], nll["after"])
            print(f"{out}: this run is finished; another --out, or --resume never, starts a new one")
        return
    if "before" not in nll:
        model = Llama.from_pretrained(settings.model, dtype, world.device)
        nll = {"before": nll_by_language(model, base_tokenizer, test_documents, "NLL before", world)}
        del model
    if world.is_main:
        write_json(out / "nll.json", {"before": nll["before"]})

    # LoRA, and the parameters that train, in float32: A, B and the modules saved whole. The others are frozen, in --dtype.
    model = Llama.from_pretrained(base, dtype, world.device)
    torch.manual_seed(settings.seed)  # for A, which starts at random
    add_lora(model, settings.lora())
    model.gradient_checkpointing = settings.gradient_checkpointing
    summary = parameter_report(model)
    flops = plan.flops_per_token(model, settings.seq_len)
    is_compiled = settings.compile == "on" or settings.compile == "auto" and world.device != "cpu"
    if is_compiled:
        for block in model.model["layers"]:
            block.compile()
    distributed.shard(model, world)
    trained, adapter = trainable_parameters(model), adapter_tensors(model, model.lora_whole)
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=settings.weight_decay, fused=True)
    if resumed_from:
        load_checkpoint(resumed_from, done, adapter, trained, optimizer)
    if world.is_main:
        print(f"{len(base_tokenizer):,} pieces -> {len(tokenizer):,}; {len(streams)} languages, {corpus_tokens:,} tokens; "
              f"{summary}")  # fmt: skip
        if resumed_from:
            print(f"{resumed_from}: going on after step {done} of {steps}")

    def save_to(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_adapter(model, folder, str(base), tensors)
        (folder / "tokenizer.model").write_bytes(tokenizer.model)

    def save(step: int) -> None:
        tensors = distributed.gather(adapter, world)
        moments = {f"{moment}.{name}": optimizer.state[parameter][moment]
                   for name, parameter in trained.items() for moment in MOMENTS}  # fmt: skip
        moments = distributed.gather(moments, world)
        if world.is_main:
            with atomic_directory(out / "checkpoints" / f"step-{step}", replace=True) as folder:
                save_to(folder, tensors)
                write_training_state(folder, moments, {**log.state, "step": step, "identity": identity})
            for old in checkpoints(out / "checkpoints")[: -settings.keep]:
                if old.resolve() != Path(settings.resume).resolve():  # which the same command, given again, asks for
                    shutil.rmtree(old)
        world.wait()  # for the main process, however long the writing takes

    def measure(documents: dict[str, list[str]], description: str) -> dict[str, dict]:
        # Documents have all lengths, and a block would be compiled anew for each.
        with torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
            return nll_by_language(model, tokenizer, documents, description, world)

    # Training.
    log = RunLog(out, state, steps, tokens_a_step, flops * tokens_a_step, peak_flops and peak_flops * world.size, world.device,
                 world.is_main, settings.tensorboard)  # fmt: skip
    few_documents = {language: texts[: settings.eval_documents] for language, texts in test_documents.items()}
    model.train()
    loaded = read_ahead(lambda step: batches.share(step, world.rank, world.size), range(done, steps))
    with catch_signals() as signals, contextlib.closing(log):
        for step in range(done, steps):
            lr = learning_rate(step, steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr

            began = time.perf_counter()
            tokens, targets = next(loaded)  # (B / processes, T) each
            waited = time.perf_counter() - began
            step_loss = torch.zeros((), dtype=torch.float64, device=world.device)
            for row in range(0, len(tokens), micro_batch_size):
                x, y = tokens[row : row + micro_batch_size], targets[row : row + micro_batch_size]
                torch.manual_seed(dropout_seed(settings.seed, step, world.rank * len(tokens) + row))
                distributed.sync_gradients(model, row + micro_batch_size == len(tokens))
                # Micro-batches are equally large: the mean of their means is that of the batch. FSDP2 averages over processes.
                loss = model(x.to(world.device), targets=y.to(world.device)) * len(x) / len(tokens)
                loss.backward()
                step_loss += loss.detach()
            grad_norm = whole(clip_grad_norm_(trained.values(), settings.max_grad_norm)).item()
            # One process's signal stops them all, after the same step.
            shared = torch.stack([step_loss / world.size, torch.full_like(step_loss, len(signals))])
            step_loss, stop = world.sum(shared).tolist()
            if not math.isfinite(step_loss) or not math.isfinite(grad_norm):
                languages = ", ".join(sorted(set(batches.languages_of(step))))
                saved = checkpoints(out / "checkpoints")
                raise UserError(f"step {step + 1}: the loss is {step_loss} and the gradient's norm {grad_norm} (languages "
                                f"{languages}); lower --lr" + (f" and go on from {saved[-1]}" if saved else ""))  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()

            step += 1
            log.add(step_loss, waited)
            measured = None
            if settings.eval_every and step % settings.eval_every == 0:
                with log.paused():
                    measured = measure(few_documents, f"NLL at step {step}")
            if step % settings.log_every == 0 or step == steps or measured:
                log.write(step, measured, lr=lr, grad_norm=grad_norm)
            if step % settings.save_every == 0 or step == steps or stop:
                with log.paused():
                    log.flush()
                    save(step)
            if stop and step < steps:
                if world.is_main:
                    again = "the same command" if settings.resume == "auto" else "the same command with --resume auto"
                    print(f"{out}: stopped after step {step} of {steps}, with a checkpoint; {again} goes on there")
                return

    # What came of it.
    before, after = nll["before"], measure(test_documents, "NLL after")
    tensors = distributed.gather(adapter, world)
    if world.is_main:
        with atomic_directory(out / "adapter", replace=True) as folder:
            save_to(folder, tensors)
        if plots.is_available():
            plots.draw_run(out, before, after)
        write_json(out / "nll.json", {"before": before, "after": after})  # the last file: with it the run is finished
        report(before, after)
        print(f"{out}: {steps} steps, {time.perf_counter() - started:.0f} s, "
              f"peak memory {peak_memory(world.device) / 1e9:.2f} GB")  # fmt: skip


def load_checkpoint(folder: Path, done: int, adapter: dict[str, torch.Tensor], trained: dict[str, torch.Tensor],
                    optimizer: torch.optim.Optimizer) -> None:  # fmt: skip
    """Fill the trained parameters and the optimizer's state from a checkpoint, of `done` steps."""
    for name, tensor in read_tensors(folder / ADAPTER):
        distributed.fill(adapter[name], tensor)
    moments = dict(read_tensors(folder / OPTIMIZER))
    for name, parameter in trained.items():
        # The optimizer counts its steps in float32, on the parameter's device.
        of_parameter = {"step": torch.tensor(float(done), device=parameter.device)}
        for moment in MOMENTS:
            of_parameter[moment] = torch.zeros_like(parameter)
            distributed.fill(of_parameter[moment], moments[f"{moment}.{name}"])
        optimizer.state[parameter] = of_parameter


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Of the micro-batch that begins at a row of a step's batch, whatever ran before and whichever process it is: runs of any
    number of processes drop the same values where their micro-batches are equally large."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0])


def report(before: dict, after: dict) -> None:
    """A table of languages, best first, and one line of summary."""

    def change(language: str) -> float:
        return after["languages"][language]["nll_per_document"] / before["languages"][language]["nll_per_document"] - 1

    languages = sorted(before["languages"], key=change)
    rows = [
        (language, f"{b['documents']}", f"{b['nll_per_document']:.1f}", f"{a['nll_per_document']:.1f}",
         f"{change(language):+.1%}", f"{b['bits_per_byte']:.2f}", f"{a['bits_per_byte']:.2f}")
        for language in languages
        for b, a in [(before["languages"][language], after["languages"][language])]
    ]  # fmt: skip
    print_table(("language", "documents", "NLL before", "after", "change", "bits/byte before", "after"), rows)
    b, a = before["macro"], after["macro"]
    improved = sum(change(language) < 0 for language in languages)
    print(f"held-out NLL, nats a document, mean of {len(languages)} languages: {b['nll_per_document']:.1f} -> "
          f"{a['nll_per_document']:.1f} ({a['nll_per_document'] / b['nll_per_document'] - 1:+.1%}), bits per byte "
          f"{b['bits_per_byte']:.2f} -> {a['bits_per_byte']:.2f}; improved: {improved} of {len(languages)}")  # fmt: skip


if __name__ == "__main__":
    run(main)
