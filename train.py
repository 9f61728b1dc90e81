"""Adapt a LLaMA checkpoint to the languages of a corpus, as MaLA-500 did (arXiv 2401.13303).

    python train.py                       the defaults, as in configs/demo.toml: a tiny LLaMA, on a CPU
    python train.py --config configs/mala500.toml --model DIR --data DIR --out DIR
    torchrun --nproc-per-node 8 train.py --config ...          the same on eight GPUs

The script extends the vocabulary, adds LoRA to the attention layers, and trains LoRA together with all of
embed_tokens and lm_head. It writes to --out: adapter/ (in PEFT's format, with its tokenizer), base/ (the
checkpoint with the extended vocabulary), nll.json (the NLL of held-out text per
language, before and after), metrics.jsonl and checkpoints/. With --train all it writes model/, a plain
checkpoint, instead of adapter/. If a run is killed, the same command continues from its last checkpoint.
"""

import gc
import math
import shutil
import time
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from mala import lora
from mala.cli import UserError, choose_device, parse
from mala.cli import run as run_main
from mala.data import Batches, read_ahead
from mala.generate import generate, stream
from mala.model import Llama, document_mask
from mala.running import distributed
from mala.running.distributed import World
from mala.running.prepare import open_corpora, open_tokens, prepare
from mala.running.settings import RESULT, Settings
from mala.scoring import nll_by_language
from mala.storage import training_checkpoint
from mala.storage.corpus import Corpus
from mala.storage.files import atomic_directory, read_json, write_json
from mala.storage.model_by_name import find_folder, load_model
from mala.storage.peft_adapter import adapter_tensors, save_adapter
from mala.storage.tokenizer_files import added_tokens, copy_tokenizer
from mala.storage.weights import fill_weights, read_tensors, read_weights
from mala.words.byte_level import load_tokenizer
from mala.words.tokenizer import Tokenizer
from tools import pictures
from tools.adamw8bit import AdamW8bit
from tools.dry_run import dry_run, warn_of_warmup
from tools.gpus import flops_per_token, peak_flops
from tools.memory_plan import recomputed_blocks
from tools.run_log import RunLog, peak_memory
from tools.tables import counted, print_nll


def main() -> None:
    settings = parse(Settings, __doc__.split("\n\n")[0])
    settings.model = str(find_folder(settings.model, with_weights=not settings.dry_run))
    if settings.dry_run:
        return dry_run(settings)
    device, dtype = choose_device(settings.device, settings.dtype)
    try:
        with distributed.start(device) as world, ExitStack() as locks:
            train(settings, world, dtype, locks)
    except torch.OutOfMemoryError as error:
        full = f"the GPU's memory is full ({str(error).partition('. ')[0]})"
        remedy = "lower --micro-batch-size, or add --gradient-checkpointing on or --moments 8bit"
        raise UserError(f"{full}; --dry-run shows what uses it; {remedy}") from None


def train(settings: Settings, world: World, dtype: torch.dtype, locks: ExitStack) -> None:
    """Set up the run, train, and write the result. `step` counts from 0, `done` from 1."""
    started = time.perf_counter()
    run = Run(settings, world, dtype, locks)
    if run.is_finished:
        if world.is_main:
            print_nll(**run.nll, known=run.known)
            print(f"{run.out}: this run is finished; for a new one, name another --out or add --resume never")
        return
    model, optimizer, steps, log = run.model, run.optimizer, run.steps, run.log
    micro_batch_size = settings.micro_batch(world.size)
    loaded = read_ahead(lambda step: run.batches.share(step, world.rank, world.size), range(run.done, steps))
    model.train()
    with distributed.catch_signals() as signals, closing(log):
        for step in range(run.done, steps):
            lr = learning_rate(step, steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["relative_lr"]

            began = time.perf_counter()
            batch = next(loaded)
            waited = time.perf_counter() - began
            tokens, targets = (part.to(world.device) for part in batch)  # (B / processes, T) each
            loss = torch.zeros((), dtype=torch.float64, device=world.device)
            for row in range(0, len(tokens), micro_batch_size):
                rows = slice(row, row + micro_batch_size)
                x, y = tokens[rows], targets[rows]
                torch.manual_seed(dropout_seed(settings.seed, step, world.rank * len(tokens) + row))
                distributed.sync_gradients(model, rows.stop == len(tokens))
                mask = None
                if settings.attend == "document":
                    mask = document_mask(x, run.tokenizer.bos_id, model.compute_dtype)
                # Each loss is multiplied by its share; their sum is the mean. FSDP2 averages over processes.
                part = model(x, targets=y, share=len(x) / len(tokens), mask=mask)
                part.backward()
                loss += part.detach()
            for parameter in run.late if step < settings.warmup_embeddings else ():
                parameter.grad = None  # AdamW skips a parameter without a gradient
            grad_norm = clip_grad_norm_(run.trained.values(), settings.max_grad_norm)
            grad_norm = distributed.unsharded(grad_norm).item()
            # A signal to one process stops all of them, after the same step.
            shared = torch.stack([loss / world.size, torch.full_like(loss, len(signals))])
            loss, stop = world.sum(shared).tolist()
            run.check_finite(step, loss, grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            done, measured, samples = step + 1, None, {}
            log.add(loss, waited)
            if settings.eval_every and done % settings.eval_every == 0:
                with log.paused():
                    measured = run.measure(f"NLL at step {done}", settings.eval_documents)
                    samples = run.continue_texts()
            if done % settings.log_every == 0 or done == steps or measured:
                log.write(done, measured, samples, lr=lr, grad_norm=grad_norm)
            if done % settings.save_every == 0 or done == steps or stop:
                with log.paused():
                    log.flush()
                    run.save(done)
            if stop and done < steps:
                if world.is_main:
                    again = "the same command" + ("" if settings.resume == "auto" else " with --resume auto")
                    stopped = f"stopped after step {done} of {steps}, with a checkpoint"
                    print(f"{run.out}: {stopped}; {again} continues from it")
                return
    run.finish(started)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Return the rate: linear warm-up to `lr`, then linear or cosine decay to 0 just after the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    left = (steps - step) / max(1, steps - settings.warmup_steps)  # from 1 down to just above 0
    if settings.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return settings.lr * left


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Return the seed for one micro-batch. It depends only on the run's seed, the step and the first row, so
    any number of processes drops the same values if their micro-batches are equally large."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0])


class Run:
    """A training run. It sets up the model and data, measures held-out text, and saves checkpoints."""

    def __init__(self, settings: Settings, world: World, dtype: torch.dtype, locks: ExitStack):
        """Check the input, prepare missing files, and load the model and, to resume, a checkpoint."""
        self.settings, self.world, self.out = settings, world, Path(settings.out)
        base_tokenizer, corpora = check_input(settings, world, dtype)
        work = partial(prepare, settings, corpora, world.device, dtype, locks)
        checkpoint, self.identity = world.from_main(work)
        self.base = self.out / "base" if settings.extend_vocab else Path(settings.model)
        self.tokenizer = load_tokenizer(self.base)
        self.test_documents = Corpus(self.out / "held_out", held_out=1.0).load("test")
        if missing := sorted({*settings.samples} - self.test_documents.keys()):
            raise UserError(f"samples names {missing[0]}, which has no held-out text; leave it out")
        streams, *replay = open_tokens(settings, corpora)
        corpus_tokens, step_tokens = sum(map(len, streams.values())), settings.batch_size * settings.seq_len
        self.steps = settings.steps or math.ceil(settings.epochs * corpus_tokens / step_tokens)
        of_batch = (settings.seq_len, settings.batch_size, self.steps, settings.alpha, settings.seed)
        replayed = {f"{language} (replay)": stream for part in replay for language, stream in part.items()}
        self.batches = Batches(streams | replayed, *of_batch)
        self.known = {*settings.base_langs}.union(*replay)  # the base's languages, reported separately

        state = training_checkpoint.read_state(checkpoint) if checkpoint else {"step": 0}
        self.done = state["step"]  # steps that earlier runs completed
        if self.done > self.steps:
            found = f"has {self.done} steps, but this run only {self.steps}"
            raise UserError(f"{checkpoint}: {found}; name another --out, or raise --steps")
        file = self.out / "nll.json"
        self.nll = world.from_main(lambda: read_json(file) if file.exists() else {})
        self.is_finished = "after" in self.nll and (checkpoint is None or self.done == self.steps)
        if self.is_finished:
            return
        if "before" not in self.nll:  # the original checkpoint, with its own tokenizer
            model, _ = load_model(Path(settings.model), None, dtype, world, shard="on")
            documents = self.test_documents
            self.nll["before"] = nll_by_language(model, base_tokenizer, documents, "NLL before", world)
            del model
            gc.collect()  # a sharded model has reference cycles
        if world.is_main:
            write_json(file, {"before": self.nll["before"]})

        # Parameters that train are float32: LoRA and the saved modules, or all. The others have --dtype.
        self.model = model = Llama.from_pretrained(self.base, dtype, "meta")  # no memory until it is sharded
        settings.choose_trained(model, len(base_tokenizer))
        model.recomputed_blocks = world.from_main(partial(recomputed_blocks, model, settings, world))
        summary, flops = lora.parameter_report(model), flops_per_token(model, settings.seq_len)
        self.is_compiled = settings.is_compiled(world.device)
        if self.is_compiled:
            for block in model.model["layers"]:
                block.compile()
        distributed.shard(model, world)
        fill_weights(model, self.base)
        torch.manual_seed(settings.seed)  # LoRA's A starts at random
        lora.start_lora(model)
        self.trained = lora.trainable_parameters(model)  # name in the model -> parameter
        self.late = [weight for name, weight in self.trained.items() if not lora.saved_module_of(name)]
        adamw = AdamW8bit if settings.moments == "8bit" else torch.optim.AdamW
        groups = settings.parameter_groups(self.trained)
        self.optimizer = adamw(groups, settings.lr, weight_decay=settings.weight_decay, fused=True)
        if checkpoint:
            self.load(checkpoint)
        if world.is_main:
            sizes = f"{len(base_tokenizer):,} pieces -> {len(self.tokenizer):,}"
            print(f"{sizes}; {counted(streams, 'language')}, {corpus_tokens:,} tokens; {summary}")
            warn_of_warmup(settings, self.steps)
            if first := model.recomputed_blocks:
                print(f"gradient checkpointing for the first {first} of {len(model.model['layers'])} blocks")
            if checkpoint:
                print(f"{checkpoint}: continuing after step {self.done} of {self.steps}")
        peak = peak_flops(torch.cuda.get_device_name()) if world.device != "cpu" else 0
        self.log = RunLog(self.out, state, self.steps, step_tokens, flops * step_tokens, peak, world)
        if settings.tensorboard:
            self.log.open_tensorboard()

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise UserError if the loss or the gradient is not finite, before it spoils the weights."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        languages = ", ".join(sorted(set(self.batches.languages_of(step))))
        saved = training_checkpoint.checkpoints(self.out / "checkpoints")
        found = f"the loss is {loss} and the gradient norm is {grad_norm} (languages: {languages})"
        go_on = f" and continue from {saved[-1]}" if saved else ""
        raise UserError(f"step {step + 1}: {found}; lower --lr{go_on}")

    def measure(self, description: str, documents: int | None = None) -> dict[str, dict]:
        """Measure the NLL of held-out text, on all or at most `documents` documents per language."""
        few = {language: texts[:documents] for language, texts in self.test_documents.items()}
        with self.eager():
            return nll_by_language(self.model, self.tokenizer, few, description, self.world)

    def eager(self) -> AbstractContextManager:
        """Return a context without compiled blocks, which would be recompiled for every text length."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def continue_texts(self, tokens: int = 40) -> dict[str, str]:
        """Continue a held-out text of each language in --samples greedily, by at most `tokens` tokens. Return
        language -> text. The prompt is the first half of the text, also of at most `tokens` tokens."""
        texts = {}
        self.model.eval()
        tokens = min(tokens, self.model.config.max_position_embeddings // 2)
        for language in self.settings.samples:
            ids = self.tokenizer.encode(self.test_documents[language][0], bos=True)
            ids = ids[: max(1, min(len(ids) // 2, tokens))]
            with self.eager():
                new = generate(self.model, ids, tokens, temperature=0, ends=[self.tokenizer.bos_id])
                said = "".join(stream(self.tokenizer, ids, new))
                texts[language] = f"{self.tokenizer.decode(ids)} …{said}"
        self.model.train()
        return texts

    def save(self, done: int) -> None:
        """Write checkpoints/step-N/ and delete the oldest checkpoints, except the one that --resume names."""
        folder, asked_for = self.out / "checkpoints", Path(self.settings.resume).resolve()
        moments = {}  # with --moments 8bit also their scales
        for name, weight in self.trained.items():
            of_weight = self.optimizer.state[weight].items()
            moments |= {f"{moment}.{name}": tensor for moment, tensor in of_weight if moment != "step"}
        state = {**self.log.state, "step": done, "identity": self.identity}
        place = atomic_directory(folder / f"step-{done}", replace=True)
        # Only the main process writes. In the others the folder is None: they only send their shards.
        with place if self.world.is_main else nullcontext() as checkpoint:
            self.save_trained(checkpoint, torch.float32)
            training_checkpoint.write_state(checkpoint, moments, state)
        if self.world.is_main:
            for old in training_checkpoint.checkpoints(folder)[: -self.settings.keep]:
                if old.resolve() != asked_for:  # the same command names it again
                    shutil.rmtree(old)
        self.world.wait()  # until the main process has written, however long that takes

    def load(self, checkpoint: Path) -> None:
        """Load the trained parameters and the optimizer's state from a checkpoint that `save` wrote."""
        adapter = adapter_tensors(self.model, self.model.lora_saved) if self.model.lora_config else {}
        for name, tensor in read_tensors(training_checkpoint.trained_file(checkpoint)):
            distributed.fill((adapter or self.trained)[name], tensor)
        for name, tensor in read_tensors(checkpoint / training_checkpoint.OPTIMIZER):
            moment, _, name = name.partition(".")
            weight = self.trained[name]
            # AdamW keeps the step count of each parameter as a float32 tensor on its device.
            state, like = self.optimizer.state[weight], weight.detach()
            late = 0 if lora.saved_module_of(name) else self.settings.warmup_embeddings
            state["step"] = torch.tensor(float(self.done - late), device=weight.device)
            like = like[:, : tensor.shape[1]] if like.ndim == 2 else like  # 8-bit scales have fewer columns
            state[moment] = torch.zeros_like(like, dtype=tensor.dtype)
            distributed.fill(state[moment], tensor)

    def save_trained(self, folder: Path | None, dtype: torch.dtype) -> None:
        """Write the adapter, or with --train all a checkpoint in `dtype`, and its tokenizer."""
        distributed.reshard(self.model)
        if self.model.lora_config:
            save_adapter(self.model, folder, str(self.base))
        else:
            training_checkpoint.save_checkpoint(self.model, folder, self.base, dtype)
        if folder is not None:
            copy_tokenizer(self.base, folder, self.model.config.vocab_size)

    def finish(self, started: float) -> None:
        """Measure held-out text again. Write adapter/ or model/, then the pictures, then nll.json."""
        self.nll["after"] = self.measure("NLL after")
        place = atomic_directory(self.out / RESULT[self.settings.train], replace=True)
        with place if self.world.is_main else nullcontext() as folder:
            self.save_trained(folder, next(read_weights(self.base))[1].dtype)
        self.world.wait()  # until the main process has all shards
        if self.world.is_main:
            if pictures.is_available():
                pictures.draw_run(self.out, **self.nll)
            write_json(self.out / "nll.json", self.nll)  # marks the run as finished
            print_nll(**self.nll, known=self.known)
            memory = f"peak memory {peak_memory(self.world.device) / 1e9:.2f} GB"
            print(f"{self.out}: {self.steps} steps, {time.perf_counter() - started:.0f} s, {memory}")


def check_input(settings: Settings, world: World, dtype: torch.dtype) -> tuple[Tokenizer, dict[str, Corpus]]:
    """Check settings, base and corpora before any work. Return the base's tokenizer and the corpora."""
    settings.micro_batch(world.size)
    tokenizer = load_tokenizer(Path(settings.model))
    shapes = Llama.from_pretrained(settings.model, dtype, "meta")
    tokenizer.check_fits(shapes.config.vocab_size)
    if settings.extend_vocab:
        tokenizer.check_bpe()
    rows = len(tokenizer) if settings.extend_vocab else shapes.config.vocab_size
    added_tokens(Path(settings.model), len(tokenizer), rows)
    settings.check_model(shapes, tokenizer)
    return tokenizer, open_corpora(settings)


if __name__ == "__main__":
    run_main(main)
