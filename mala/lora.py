"""LoRA (arXiv 2106.09685): train a low-rank update of chosen matrices, W + (alpha/r) B A, and leave W as it is.

MaLA-500 also trains the embeddings and the head whole (`modules_to_save`), since the rows of new words start from little.
On disk an adapter is PEFT's: `adapter_config.json` and `adapter_model.safetensors`, with PEFT's key names.
Shapes: R rank, D_in and D_out the width of a layer's input and output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mala import checkpoint
from mala.cli import UserError
from mala.model import Llama

PREFIX = "base_model.model."  # what PEFT puts before a module's own name
WHOLE = ("embed_tokens", "lm_head")  # what may train whole


@dataclass
class LoRAConfig:
    """The settings of an adapter, under the names of `adapter_config.json`. The defaults are MaLA-500's."""

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ("embed_tokens", "lm_head")

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise UserError(f"the LoRA rank r is {self.r!r}, expected a positive whole number")
        if type(self.lora_alpha) not in (int, float):
            raise UserError(f"lora_alpha is {self.lora_alpha!r}, expected a number")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout!r}, expected a number from 0 to below 1")
        for names in (self.target_modules, self.modules_to_save):
            if not all(isinstance(name, str) for name in names):
                raise UserError(f"target_modules and modules_to_save hold {names!r}, expected names")
        if not self.target_modules and not self.modules_to_save:
            raise UserError("target_modules and modules_to_save are both empty: nothing would train")
        for name in self.modules_to_save:
            if name not in WHOLE:
                raise UserError(
                    f"modules_to_save names {name!r}, expected some of {', '.join(WHOLE)}: nothing else trains whole"
                )


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha/r) B A dropout(x), with A (R, D_in) and B (D_out, R) trained in float32.

    A starts Kaiming-uniform, as nn.Linear and PEFT do, and B at zero, so that training starts from the base model.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        nn.Module.__init__(self)  # not nn.Linear's: the weight and the bias are taken over, not made anew
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = config.lora_dropout
        self.scaling = config.lora_alpha / config.r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = F.dropout(x, self.dropout, self.training)  # (B, T, D_in)
        update = F.linear(update, self.lora_A.to(x.dtype))  # (B, T, R)
        update = F.linear(update, self.lora_B.to(x.dtype))  # (B, T, D_out)
        return F.linear(x, self.weight, self.bias) + self.scaling * update

    def delta(self) -> torch.Tensor:
        """What the adapter adds to W: (D_out, D_in) float32."""
        return self.scaling * (self.lora_B @ self.lora_A)


def find_targets(model: Llama, config: LoRAConfig) -> list[str]:
    """The full names of the linear layers that get LoRA: those whose last part is in `target_modules`.

    Raises UserError for a name that no layer of the model's blocks has, and where the model cannot train as configured.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("the model has an adapter already; merge it first")
    linear = [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    known = {name.rpartition(".")[2] for name in linear}
    for wanted in config.target_modules:
        if wanted not in known:
            raise UserError(f"target_modules names {wanted!r}, expected some of {', '.join(sorted(known))}")
    if model.config.tie_word_embeddings and len(config.modules_to_save) == 1:
        raise UserError(
            f"modules_to_save names {config.modules_to_save[0]} alone, but the model's embed_tokens and lm_head are one "
            f"matrix; name both or neither"
        )
    return [name for name in linear if name.rpartition(".")[2] in config.target_modules]


def saved_modules(model: Llama, config: LoRAConfig) -> dict[str, nn.Module]:
    """Name -> module, for those that train whole."""
    modules = {"model.embed_tokens": model.model["embed_tokens"], "lm_head": model.lm_head}
    return {name: module for name, module in modules.items() if name.rpartition(".")[2] in config.modules_to_save}


def add_lora(model: Llama, config: LoRAConfig) -> None:
    """Freeze the model, put a LoRALinear in place of every target, and make `modules_to_save` train whole, in float32."""
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(model.get_submodule(name), config))
    for module in saved_modules(model, config).values():  # a copy: the weights may still be a map of the checkpoint's file
        module.weight = nn.Parameter(module.weight.detach().float().clone())
    model.tie_weights()
    model.lora_config = config


def trainable_parameters(model: Llama) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merge_lora(model: Llama) -> None:
    """Add every update to its weight, in float32 then cast, and leave plain linear layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            weight = (module.weight.float() + module.delta()).to(module.weight.dtype)
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                linear.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)


def adapter_tensors(model: Llama) -> dict[str, nn.Parameter]:
    """PEFT's name -> parameter, for all that an adapter holds."""
    tensors: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
    for name, module in saved_modules(model, model.lora_config).items():
        tensors[f"{PREFIX}{name}.weight"] = module.weight
    return tensors


def save_adapter(model: Llama, directory: str | Path, base: str = "") -> None:
    """Write the adapter in PEFT's format. `base` is where its base model lies, for whoever loads it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}
    if model.config.tie_word_embeddings and f"{PREFIX}lm_head.weight" in tensors:
        # Written twice, as PEFT does: safetensors refuses two names for one memory.
        tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}lm_head.weight"].clone()
    checkpoint.write_tensors(directory / "adapter_model.safetensors", tensors)
    config = {**dataclasses.asdict(model.lora_config), "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none",
              "base_model_name_or_path": base, "inference_mode": True}  # fmt: skip
    checkpoint.write_json(directory / "adapter_config.json", config)


def load_adapter(model: Llama, directory: str | Path) -> None:
    """Put the adapter in `directory` on `model`, which is left as it was if the two do not fit (UserError).

    An adapter that holds more rows of embed_tokens and lm_head than the base, as MaLA-500's, brings its vocabulary along.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    try:
        find_targets(model, config)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    file = directory / "adapter_model.safetensors"
    tensors = _plain_names(checkpoint.read_tensors(file))

    # Fit the adapter to a plan of the model, which takes no memory, before the model itself is touched.
    with torch.device("meta"):
        plan = Llama(model.config)
        embed_tokens, lm_head = (tensors.get(f"{PREFIX}{name}.weight") for name in ("model.embed_tokens", "lm_head"))
        longer = None not in (embed_tokens, lm_head) and len(embed_tokens) > model.config.vocab_size
        if longer:
            shape = (len(embed_tokens), model.config.hidden_size)
            plan.replace_vocabulary(torch.empty(shape), torch.empty(shape))
        add_lora(plan, config)
    expected = adapter_tensors(plan)
    if odd := sorted(tensors.keys() ^ expected.keys()):
        found, wanted = ("an extra", "none") if odd[0] in tensors else ("no", "one")
        raise UserError(f"{file}: {len(odd)} tensors differ from the model's: there is {found} {odd[0]!r}, expected {wanted}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise UserError(
                f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating point {tuple(expected[name].shape)}"
            )
    if model.config.tie_word_embeddings and lm_head is not None and not torch.equal(embed_tokens, lm_head):
        raise UserError(
            f"{file}: embed_tokens and lm_head differ, but in the base model they are one matrix, and stay one here"
        )

    if longer:
        weight = model.lm_head.weight
        model.replace_vocabulary(weight.new_empty(shape), weight.new_empty(shape))  # filled below
    add_lora(model, config)
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            parameter.copy_(tensors[name])


def _plain_names(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """PEFT's name -> tensor. Over a resized base PEFT writes a module saved whole three times: under its plain name, again
    after `modules_to_save.`, and as it was before training, after `original_module.`, which is left out."""
    plain = {}
    for name, tensor in tensors:
        if ".original_module." not in name:
            plain[name.replace(".modules_to_save.", ".")] = tensor
    return plain


def read_adapter_config(directory: Path) -> LoRAConfig:
    """`adapter_config.json`. What would change the mathematics and is not implemented is refused by name."""
    path = directory / "adapter_config.json"
    values = checkpoint.read_json(path)
    computed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,),
        "fan_in_fan_out": (False,), "rank_pattern": ({},), "alpha_pattern": ({},), "lora_bias": (False,),
        "layers_to_transform": (None,), "layer_replication": (None,), "trainable_token_indices": (None,),
        "target_parameters": (None, []), "alora_invocation_tokens": (None,), "use_qalora": (False,),
        "exclude_modules": (None, []), "init_lora_weights": (True, False, "gaussian"),
    }  # fmt: skip
    for key, accepted in computed.items():
        if key in values and values[key] not in (None, *accepted):
            raise UserError(f"{path}: {key} is {values[key]!r}, expected {accepted[0]!r}: nothing else is implemented")
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in values:
            raise UserError(f"{path}: there is no {key!r}; expected the adapter_config.json of a LoRA adapter")
    targets, saved = values["target_modules"], values.get("modules_to_save") or []
    if not isinstance(targets, list) or not isinstance(saved, list):
        raise UserError(f"{path}: target_modules is {targets!r} and modules_to_save {saved!r}, expected lists of names")
    try:
        return LoRAConfig(values["r"], values["lora_alpha"], values.get("lora_dropout", 0.0), tuple(targets), tuple(saved))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
