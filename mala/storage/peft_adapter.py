"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors` with PEFT's key names. Our adapters
load in PEFT, and PEFT's adapters load here, including MaLA-500's published one."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from mala.cli import UserError
from mala.lora import LoRAConfig, LoRALinear, TrainedRows, add_lora, merge_lora, saved_modules
from mala.model import Llama, LlamaConfig
from mala.running.distributed import fill
from mala.storage.adapter_config import SAVEABLE, read_adapter_config
from mala.storage.files import atomic_directory, read_json, write_json
from mala.storage.tokenizer_files import copy_companions, copy_tokenizer, holds_tokenizer
from mala.storage.weights import Tensors, read_bin, read_tensors, write_tensors

PREFIX = "base_model.model."  # PEFT puts this before each module name
EMBED_TOKENS, LM_HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"


def adapter_tensors(model: Llama, saved: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Return the parameters that an adapter holds, keyed by PEFT's names: every A and B, the rows that train
    without the rest of their matrix, and the modules in `saved`."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
        if isinstance(module, TrainedRows):
            tensors[f"{PREFIX}{name}.trainable_tokens_delta"] = module.trainable_tokens_delta
    for name, module in saved_modules(model, saved).items():
        tensors[f"{PREFIX}{name}.weight"] = module.weight
    return tensors


def save_adapter(model: Llama, directory: str | Path | None, base: str = "") -> None:
    """Write the adapter in PEFT's format. Raises UserError if the model has none. base: the base's path or
    hub name, for the config. With directory=None a process only adds its part, see `write_tensors`."""
    if not model.lora_config:
        raise UserError("the model has no adapter to save; a merged adapter is part of the model's weights")
    tensors = adapter_tensors(model, model.lora_saved)  # a tied matrix twice, as PEFT does
    write_tensors(directory and Path(directory) / "adapter_model.safetensors", tensors)
    if directory is None:
        return
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    config = {**asdict(model.lora_config), **settings, "base_model_name_or_path": base}
    config["trainable_token_indices"] = config["trainable_token_indices"] or None  # PEFT writes null, not {}
    write_json(Path(directory) / "adapter_config.json", config)


@torch.no_grad()
def load_adapter(model: Llama, directory: str | Path) -> None:
    """Load an adapter into `model`. If it does not fit, raise UserError and leave `model` unchanged.

    - If the adapter has more rows of embed_tokens and lm_head than the base, as MaLA-500's, the model grows.
    - If it saves a matrix without training it (PEFT's `save_embedding_layers`), that replaces the base's one.
    - If the base ties the two matrices and the adapter has them untied, the model becomes untied, as in PEFT.
    """
    directory = Path(directory)
    config = read_adapter_config(directory, LoRAConfig)
    rows = config.trainable_token_indices
    if model.config.tie_word_embeddings and rows.get("lm_head") == rows.get("embed_tokens"):
        rows.pop("lm_head", None)  # PEFT names the tied matrix twice
    if model.lora_config:
        raise UserError(f"{directory}: the model has an adapter already; merge that first")
    file, tensors = _read_adapter(directory)
    whole = {name: tensors[key] for name, key in zip(SAVEABLE, (EMBED_TOKENS, LM_HEAD)) if key in tensors}
    saved = tuple({*config.modules_to_save, *whole})
    rows, is_tied = model.config.vocab_size, model.config.tie_word_embeddings
    if len(whole) == 2:
        rows = max(rows, *whole["embed_tokens"].shape[:1])
    if whole:
        is_tied = is_tied and len(whole) == 2 and torch.equal(*whole.values())
    if is_tied and config.modules_to_save:  # PEFT's ensure_weight_tying may name only one
        config = replace(config, modules_to_save=SAVEABLE)
    fitted = replace(model.config, vocab_size=rows, tie_word_embeddings=is_tied)
    _check_fits(fitted, config, saved, file, tensors)

    model.config = fitted
    if whole:
        # add_lora later makes float32 copies of matrices that train. The others get the base's dtype.
        matrices = []
        for name, module in zip(SAVEABLE, saved_modules(model, SAVEABLE).values()):
            new = whole.get(name, module.weight)
            dtype = new.dtype if name in config.modules_to_save else module.weight.dtype
            matrices.append(new.to(module.weight.device, dtype))
        model.replace_vocabulary(*matrices)
    add_lora(model, config)
    model.lora_saved = saved
    fill_adapter(model, directory)


def fill_adapter(model: Llama, directory: Path) -> None:
    """Load an adapter's values into a model that has its LoRA layers. A process fills only its own shard."""
    _, tensors = _read_adapter(directory)
    for name, parameter in adapter_tensors(model, model.lora_saved).items():
        fill(parameter, tensors[name])


def _check_fits(base: LlamaConfig, lora: LoRAConfig, saved: tuple, file: Path, tensors: Tensors) -> None:
    """Raise UserError if a tensor does not fit the model, which is planned on `meta` without memory."""
    with torch.device("meta"):
        plan = Llama(base)
        try:
            add_lora(plan, lora)
        except UserError as error:
            raise UserError(f"{file.with_name('adapter_config.json')}: {error}") from None
    expected = adapter_tensors(plan, saved)
    if odd := sorted(tensors.keys() ^ expected.keys()):
        found = f"{'an extra' if odd[0] in tensors else 'no'} {odd[0]!r}"
        raise UserError(f"{file}: {len(odd)} tensors differ from this model's; for example, there is {found}")
    for name, tensor in tensors.items():
        found, shape = f"{file}: {name}", tuple(expected[name].shape)
        if tensor.shape != shape or not tensor.is_floating_point():
            found += f" is {tensor.dtype} {tuple(tensor.shape)}"
            raise UserError(f"{found}, expected floating point {shape}")
        if not all(rows.isfinite().all() for rows in tensor.split(4096)):  # in parts, because isfinite copies
            raise UserError(f"{found} holds NaN or infinity, expected finite numbers; its training diverged")


def _read_adapter(directory: Path) -> tuple[Path, Tensors]:
    """Return an adapter's tensor file, and its tensors under the shortest of PEFT's names. PEFT may add the
    bracketed parts: `…lora_A[.default].weight`, `lm_head[.modules_to_save[.default]].weight`. If both forms
    occur, the longer one is the trained matrix. `original_module` is the untrained one and is skipped."""
    file = directory / "adapter_model.safetensors"
    if not file.exists() and (directory / "adapter_model.bin").exists():
        file = directory / "adapter_model.bin"
    plain, trained = {}, {}
    for name, tensor in read_tensors(file) if file.suffix == ".safetensors" else read_bin(file):
        name = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", name)
        saved = re.sub(r"\.modules_to_save(\.[^.]+)?\.weight$", ".weight", name)
        if saved != name:
            trained[saved] = tensor
        elif ".original_module." not in name:
            plain[name] = tensor
    return file, {**plain, **trained}


def merge_checkpoint(base: Path, adapter: Path, out: Path) -> None:
    """Write `base` with `adapter` merged as a plain checkpoint, in the base's dtype, with its other files.
    The tokenizer is the adapter's if it has one, else the base's. Raises UserError if `out` exists, if the
    adapter has more rows than the base but no tokenizer, and as `load_adapter` does."""
    with atomic_directory(out) as temporary:
        model = Llama.from_pretrained(base)
        dtype, rows = model.lm_head.weight.dtype, model.config.vocab_size
        load_adapter(model, adapter)
        config = model.config
        if config.vocab_size > rows and not holds_tokenizer(adapter):
            found = f"the adapter has {config.vocab_size:,} rows and its base {rows:,}"
            raise UserError(f"{adapter}: there is no tokenizer, but {found}; add its training tokenizer")
        copy_companions(base, temporary)
        copy_tokenizer(adapter if holds_tokenizer(adapter) else base, temporary, config.vocab_size)
        merge_lora(model)
        for module in saved_modules(model, SAVEABLE).values():
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{base} + {adapter}: {name} holds NaN or infinity, expected finite numbers")
        model.save_pretrained(temporary)
        # Keep the base's config.json: it has settings for transformers that this code does not read.
        own = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
        write_json(temporary / "config.json", {**read_json(base / "config.json"), **own})
