"""The settings of train.py. Each is a flag, a key of the recipes in configs/, and a line of --help."""

import importlib.util
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mala.cli import UserError, check_folder, check_ranges, option
from mala.lora import LoRAConfig, add_lora, find_targets, saved_module_of, train_all
from mala.model import Llama
from mala.storage.adapter_config import SAVEABLE
from mala.storage.corpus_formats import Reading
from mala.words.new_rows import INITS
from mala.words.tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CHECKPOINTING = ("auto", "on", "off")  # auto: recompute only as many blocks as memory requires
OF_LORA = "r lora_alpha lora_dropout use_rslora target_modules modules_to_save".split()  # for --train lora
RESULT = {"lora": "adapter", "all": "model"}  # --train -> the folder of the result in --out
METHODS = ("continue", "union")  # see --vocab-method; MaLA-500 used union


@dataclass
class Settings(Reading):
    config: str | None = option(None, "a TOML recipe; its keys are these flags, with underscores")
    model: str = option(str(ASSETS / "tiny-llama"), "the base checkpoint: a folder or a name on the hub")
    data: str = option(str(ASSETS / "demo/sib200"), "the corpus: a folder with one entry per language")
    out: str = option("out/demo", "folder for the results")
    resume: str = option("auto", "auto: newest checkpoint; never: start over; or a checkpoint's folder")
    tokens: str | None = option(None, "folder for token files; runs can share it; default: tokens/ in --out")
    dry_run: bool = option(False, "print the plan and the memory it needs, and write nothing")
    langs: tuple[str, ...] = option((), "train only on these languages of the corpus")
    held_out: float = option(0.2, "if a language has no test split, hold out this last share of it")
    max_held_out: int = option(1000, "hold out at most this many documents per language")
    replay: str | None = option(None, "a second corpus to mix in, in languages that the base knows")
    replay_share: float = option(0.0, "--replay's share of the tokens of a step, such as 0.1")
    base_langs: tuple[str, ...] = option(("eng_Latn",), "report these languages, and --replay's, separately")

    train: str = option("lora", "LoRA and --modules-to-save, or all weights (EMMA-500)", ("lora", "all"))
    train_rows: str = option("all", "new: train only the new rows of --modules-to-save", ("all", "new"))
    extend_vocab: int = option(4000, "learn this many pieces and add the missing ones; 0: none")
    vocab_method: str = option("continue", "continue the base's merges, or learn pieces separately", METHODS)
    init: str = option("subtokens", "initialisation of new rows, see mala/words/new_rows.py", tuple(INITS))
    r: int = option(8, "LoRA rank")
    lora_alpha: float = option(32.0, "the LoRA update is scaled by lora_alpha / r")
    lora_dropout: float = option(0.1, "dropout on LoRA's input")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")
    target_modules: tuple[str, ...] = option(("q_proj", "v_proj"), "layers that get LoRA, or all-linear")
    modules_to_save: tuple[str, ...] = option(("embed_tokens", "lm_head"), "modules to train in full")

    epochs: float = option(12.0, "number of passes over the corpus")
    steps: int | None = option(None, "number of optimizer steps, instead of --epochs")
    seq_len: int = option(128, "tokens per sequence")
    batch_size: int = option(16, "sequences per optimizer step")
    micro_batch_size: int | None = option(None, "sequences per forward pass and process; default: all")
    attend: str = option("block", "block: a token attends across document borders", ("block", "document"))
    lr: float = option(5e-3, "peak learning rate")
    embedding_lr: float | None = option(None, "peak learning rate of embed_tokens; default: --lr")
    head_lr: float | None = option(None, "peak learning rate of lm_head; default: --embedding-lr")
    warmup_embeddings: int = option(0, "number of first steps that train only embed_tokens and lm_head")
    warmup_steps: int = option(20, "steps of linear warm-up, before the learning rates decay to 0")
    schedule: str = option("linear", "shape of the learning-rate decay", ("linear", "cosine"))
    weight_decay: float = option(0.1, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm")
    alpha: float = option(0.3, "draw languages in proportion to n^alpha; n: see --sample-by")
    sample_by: str = option("documents", "what n counts in training", ("documents", "bytes", "tokens"))
    weights: tuple[str, ...] | None = option(None, "eng_Latn=2,…: factors of n^alpha, but only in training")
    seed: int = option(0, "random seed; it fixes every bit of the result on one machine")

    log_every: int = option(10, "steps between lines of metrics.jsonl")
    save_every: int = option(50, "steps between checkpoints")
    keep: int = option(2, "number of newest checkpoints to keep")
    eval_every: int | None = option(None, "steps between NLL measurements; default: only before and after")
    eval_documents: int = option(50, "at most this many documents per language at --eval-every")
    samples: tuple[str, ...] = option((), "at --eval-every, continue a text of each of these languages")
    tensorboard: bool = option(False, "also log to tensorboard/ in --out (pip install tensorboard)")

    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "auto: bfloat16 on a GPU, float32 on a CPU", ("auto", "float32", "bfloat16"))
    gradient_checkpointing: str = option("auto", "recompute activations; auto: to fit memory", CHECKPOINTING)
    moments: str = option("float32", "AdamW's two moments; 8bit: 1 byte per element", ("float32", "8bit"))
    compile: str = option("auto", "use torch.compile; auto: on a GPU", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        positive = """steps seq_len batch_size micro_batch_size lr log_every save_every keep eval_every
            eval_documents max_grad_norm epochs embedding_lr head_lr"""
        for name in positive.split():
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, expected a positive number")
        from_zero = "extend_vocab warmup_steps warmup_embeddings weight_decay alpha max_held_out seed"
        check_ranges(self, {name: (0, 2**32 - 1) for name in from_zero.split()})
        self._check_what_trains()
        if not (0 < self.replay_share < 1 if self.replay else self.replay_share == 0):
            raise UserError(f"replay_share is {self.replay_share}, expected e.g. 0.1 with --replay, else 0")
        if self.steps and self.steps * self.batch_size > 2**31:
            blocks = f"{self.steps:,} steps of {self.batch_size:,} sequences"
            raise UserError(f"{blocks} are more than the limit of 2^31 sequences; lower --steps")
        for folder in (self.out, self.tokens or self.out):
            check_folder(folder)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")
        for source in (self.model, self.data, self.replay or self.data):
            if Path(self.out).resolve() in (Path(source) / "inside").resolve().parents:
                lies = f"{source}: is inside --out {self.out}"
                raise UserError(f"{lies}, which this run overwrites; name another --out")

    def _check_what_trains(self) -> None:
        if self.train_rows == "new" and not (self.extend_vocab and self.modules_to_save):
            none = "extend_vocab is 0" if self.modules_to_save else "modules_to_save is empty"
            raise UserError(f"train_rows is new, but {none}, so no new rows train; use --train-rows all")
        if self.train == "all" and self.train_rows == "new":
            raise UserError("train is all, which trains all rows, but train_rows is new; use only one")
        if self.train == "lora" and self.warmup_embeddings and not self.modules_to_save:
            raise UserError("warmup_embeddings needs modules_to_save, which is empty: nothing would train")
        for rate, module in (("embedding_lr", "embed_tokens"), ("head_lr", "lm_head")):
            if self.train == "lora" and getattr(self, rate) and module not in self.modules_to_save:
                raise UserError(f"{rate} is given, but modules_to_save lacks {module}, so it does not train")
        if self.samples and not self.eval_every:
            raise UserError("samples are shown at every --eval-every, which is not set; set it, too")

    def check_model(self, model: Llama, tokenizer: Tokenizer) -> None:
        """Raise UserError if a model, which may be on "meta", cannot train with these settings."""
        if self.seq_len > (longest := model.config.max_position_embeddings):
            raise UserError(f"seq_len is {self.seq_len}, but the base reads at most {longest}; lower it")
        if self.train == "lora":
            find_targets(model, self.lora())
        if self.head_lr and model.config.tie_word_embeddings:
            raise UserError("head_lr is given, but lm_head is tied to embed_tokens; give only --embedding-lr")
        if self.attend == "document" and tokenizer.bos_id is None:
            raise UserError(f"{tokenizer.name}: has no token that begins a document; use --attend block")

    def language_weights(self) -> dict[str, float]:
        """Return language -> weight. Raises UserError for a malformed entry, or a language named twice."""
        weights = {}
        for entry in self.weights or ():
            language, _, number = entry.partition("=")
            weight = float(number) if number.replace(".", "", 1).isdecimal() else 0.0
            if not 0 < weight < 1e6 or language in weights:
                expected = "expected one positive number per language, such as eng_Latn=2.5"
                raise UserError(f"weights has {entry!r}, {expected}")
            weights[language] = weight
        return weights

    def lora(self) -> LoRAConfig:
        return LoRAConfig(**{name: getattr(self, name) for name in OF_LORA})

    def choose_trained(self, model: Llama, old_rows: int) -> None:
        """Freeze the parameters that do not train; make the others float32. old_rows: rows of the base."""
        if self.train == "all":
            return train_all(model)
        config = self.lora()
        if self.train_rows == "new":
            new = list(range(old_rows, model.config.vocab_size))
            names = SAVEABLE[:1] if model.config.tie_word_embeddings else config.modules_to_save
            rows = {name: new for name in names}
            config = replace(config, modules_to_save=(), trainable_token_indices=rows)
        add_lora(model, config)

    def parameter_groups(self, trained: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Group parameters (name -> parameter) for AdamW by learning rate, given relative to `lr`."""
        embedding_lr = self.embedding_lr or self.lr
        rates = {"embed_tokens": embedding_lr, "lm_head": self.head_lr or embedding_lr}
        groups = defaultdict(list)
        for name, parameter in trained.items():
            groups[rates.get(saved_module_of(name), self.lr)].append(parameter)
        return [{"params": params, "relative_lr": rate / self.lr} for rate, params in groups.items()]

    def is_compiled(self, device: str) -> bool:
        return self.compile == "on" or self.compile == "auto" and device != "cpu"

    def micro_batch(self, processes: int) -> int:
        """Return the micro-batch size of each process. Raises UserError if it does not divide the batch."""
        size = self.micro_batch_size or max(1, self.batch_size // processes)
        if self.batch_size % (size * processes):
            times = f" x {processes} processes" if processes > 1 else ""
            multiple = f"micro_batch_size {size}{times}"
            raise UserError(f"batch_size {self.batch_size} is not a multiple of {multiple}")
        return size
