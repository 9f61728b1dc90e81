"""The settings of train.py: each is a flag, a key of a recipe in configs/, and a line of --help."""

import importlib.util
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mala.cli import UserError, check_folder, check_ranges, option
from mala.lora import LoRAConfig, add_lora, saved_module_of, train_all
from mala.model import Llama
from mala.storage.adapter_config import SAVEABLE
from mala.storage.corpus_formats import Reading
from mala.words.new_rows import INITS

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CHECKPOINTING = ("auto", "on", "off")  # auto: as many of the blocks as must be for the memory there is
OF_LORA = "r lora_alpha lora_dropout use_rslora target_modules modules_to_save".split()  # not for `all`
RESULT = {"lora": "adapter", "all": "model"}  # what `train` leaves in --out
METHODS = ("continue", "union")  # further merges on the base's own, or pieces learnt apart, as MaLA-500


@dataclass
class Settings(Reading):
    config: str | None = option(None, "a recipe, TOML: keys as the flags here, with underscores")
    model: str = option(str(ASSETS / "tiny-llama"), "the base checkpoint: a folder, or a name on the hub")
    data: str = option(str(ASSETS / "demo/sib200"), "the corpus, a folder with one entry per language")
    out: str = option("out/demo", "where the results go")
    resume: str = option("auto", "auto: from the newest checkpoint; never: anew; or a checkpoint's folder")
    tokens: str | None = option(None, "where token files go, for runs to share; default: tokens/ in --out")
    dry_run: bool = option(False, "print what would run, and what it would take, and write nothing")
    langs: tuple[str, ...] = option((), "train on these languages of the corpus only")
    held_out: float = option(0.2, "last share of each language to measure, if it has no test split")
    max_held_out: int = option(1000, "at most this many of them a language")
    replay: str | None = option(None, "text in what the base knows, to mix in: a second corpus, as --data")
    replay_share: float = option(0.0, "its share of the tokens of every step, say 0.1")
    base_langs: tuple[str, ...] = option(("eng_Latn",), "what the base knows, shown apart; --replay's, too")

    train: str = option("lora", "LoRA and --modules-to-save, or all weights, as EMMA-500", ("lora", "all"))
    train_rows: str = option("all", "new: of --modules-to-save the rows of new pieces only", ("all", "new"))
    extend_vocab: int = option(4000, "learn this many pieces and add what the tokenizer lacks; 0: none")
    vocab_method: str = option("continue", "further merges, or pieces learnt apart", choices=METHODS)
    init: str = option("subtokens", "how new rows start, see mala/words/new_rows.py", choices=tuple(INITS))
    r: int = option(8, "LoRA rank")
    lora_alpha: float = option(32.0, "LoRA scale, divided by the rank")
    lora_dropout: float = option(0.1, "dropout before LoRA's A")
    use_rslora: bool = option(False, "divide the scale by the rank's square root instead")
    target_modules: tuple[str, ...] = option(("q_proj", "v_proj"), "the layers that get LoRA, or all-linear")
    modules_to_save: tuple[str, ...] = option(("embed_tokens", "lm_head"), "the modules that train whole")

    epochs: float = option(12.0, "passes over the corpus's tokens")
    steps: int | None = option(None, "optimizer steps; if given, they count and not the epochs")
    seq_len: int = option(128, "tokens a block")
    batch_size: int = option(16, "blocks an optimizer step")
    micro_batch_size: int | None = option(None, "blocks a forward pass, the rest accumulates; default: all")
    attend: str = option("block", "how far back a token sees in a block", ("block", "document"))
    lr: float = option(5e-3, "highest learning rate")
    embedding_lr: float | None = option(None, "that of embed_tokens; default: --lr")
    head_lr: float | None = option(None, "that of lm_head; default: --embedding-lr")
    warmup_embeddings: int = option(0, "steps, the first, in which embed_tokens and lm_head train alone")
    warmup_steps: int = option(20, "linear warm-up of all rates; then they fall, to 0 after the last step")
    schedule: str = option("linear", "how the rates fall", ("linear", "cosine"))
    weight_decay: float = option(0.1, "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    alpha: float = option(0.3, "languages are drawn by n^alpha, n what --sample-by counts")
    sample_by: str = option("documents", "what n counts in training", ("documents", "bytes", "tokens"))
    weights: tuple[str, ...] | None = option(None, "eng_Latn=2,…: times n^alpha; not for the vocabulary")
    seed: int = option(0, "decides, with settings and corpus, every bit of the result on one machine")

    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    save_every: int = option(50, "steps between two checkpoints")
    keep: int = option(2, "the newest checkpoints that are kept")
    eval_every: int | None = option(None, "steps between measurements of held-out text on the way")
    eval_documents: int = option(50, "at most this many documents of each language then")
    samples: tuple[str, ...] = option((), "languages: show then how the model continues a text of each")
    tensorboard: bool = option(False, "write to tensorboard/ in --out, too (pip install tensorboard)")

    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "auto: bfloat16 on a GPU", choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: str = option("auto", "recompute blocks in the backward pass", CHECKPOINTING)
    moments: str = option("float32", "AdamW's two moments; 8bit: a byte an element each", ("float32", "8bit"))
    compile: str = option("auto", "torch.compile; auto: on a GPU", choices=("auto", "on", "off"))

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
            expected = "a number between 0 and 1 with --replay, and none without it"
            raise UserError(f"replay_share is {self.replay_share}, expected {expected}")
        if self.steps and self.steps * self.batch_size > 2**31:
            blocks = f"{self.steps:,} steps of {self.batch_size:,} blocks"
            raise UserError(f"{blocks} are more than the 2^31 that can be planned")
        for folder in (self.out, self.tokens or self.out):
            check_folder(folder)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard takes the package tensorboard: pip install tensorboard")
        for source in (self.model, self.data, self.replay or self.data):
            if Path(self.out).resolve() in (Path(source) / "inside").resolve().parents:
                lies = f"{source}: lies in --out {self.out}"
                raise UserError(f"{lies}, whose results are replaced; name another --out")

    def _check_what_trains(self) -> None:
        if self.train_rows == "new" and not (self.extend_vocab and self.modules_to_save):
            none = "extend_vocab is 0" if self.modules_to_save else "modules_to_save is empty"
            raise UserError(f"train_rows is new, but {none}, so no new rows train; give --train-rows all")
        if self.train == "all" and self.train_rows == "new":
            raise UserError("train is all and train_rows is new; expected only one of the two")
        if self.train == "lora" and self.warmup_embeddings and not self.modules_to_save:
            raise UserError("warmup_embeddings takes modules_to_save, which is empty: nothing would train")
        for rate, module in (("embedding_lr", "embed_tokens"), ("head_lr", "lm_head")):
            if self.train == "lora" and getattr(self, rate) and module not in self.modules_to_save:
                raise UserError(f"{rate} is given, but modules_to_save lacks {module}, so it does not train")
        if self.samples and not self.eval_every:
            raise UserError("samples are shown at every --eval-every, which is not given; give it, too")

    def language_weights(self) -> dict[str, float]:
        """language -> its weight. Raises UserError for an entry that is none, or the second of a language."""
        weights = {}
        for entry in self.weights or ():
            language, _, number = entry.partition("=")
            weight = float(number) if number.replace(".", "", 1).isdecimal() else 0.0
            if not 0 < weight < 1e6 or language in weights:
                expected = "expected one positive number a language: eng_Latn=2.5"
                raise UserError(f"weights has {entry!r}, {expected}")
            weights[language] = weight
        return weights

    def lora(self) -> LoRAConfig:
        return LoRAConfig(**{name: getattr(self, name) for name in OF_LORA})

    def choose_trained(self, model: Llama, old_rows: int) -> None:
        """Freeze what does not train, make float32 what does. old_rows: the base's, which are not new."""
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
        """Name -> parameter to AdamW's groups, of which each has its learning rate, relative to `lr`."""
        embedding_lr = self.embedding_lr or self.lr
        rates = {"embed_tokens": embedding_lr, "lm_head": self.head_lr or embedding_lr}
        groups = defaultdict(list)
        for name, parameter in trained.items():
            groups[rates.get(saved_module_of(name), self.lr)].append(parameter)
        return [{"params": params, "relative_lr": rate / self.lr} for rate, params in groups.items()]

    def is_compiled(self, device: str) -> bool:
        return self.compile == "on" or self.compile == "auto" and device != "cpu"

    def micro_batch(self, processes: int) -> int:
        """Blocks a forward pass of each process."""
        size = self.micro_batch_size or max(1, self.batch_size // processes)
        if self.batch_size % (size * processes):
            times = f" x {processes} processes" if processes > 1 else ""
            multiple = f"micro_batch_size {size}{times}"
            raise UserError(f"batch_size {self.batch_size} is not a multiple of {multiple}")
        return size
