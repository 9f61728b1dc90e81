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
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout!r}, expected a number from 0 to below 1")


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


def find_modules(model: Llama, config: LoRAConfig) -> tuple[list[str], list[str]]:
    """The full names of the linear layers that get LoRA and of the modules that train whole.

    A module is meant if the last part of its name is listed. Raises UserError for a listed name that no module has.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    embedding = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    found = []
    for key, names in (("target_modules", linear), ("modules_to_save", linear + embedding)):
        known = {name.rpartition(".")[2] for name in names}
        for wanted in getattr(config, key):
            if wanted not in known:
                raise UserError(f"{key} names {wanted!r}, expected some of {', '.join(sorted(known))}")
        found.append([name for name in names if name.rpartition(".")[2] in getattr(config, key)])
    if both := set(found[0]) & set(found[1]):
        raise UserError(f"{min(both)!r} is both in target_modules and in modules_to_save, expected in one of them")
    return found[0], found[1]


def add_lora(model: Llama, config: LoRAConfig) -> None:
    """Freeze the model, put a LoRALinear in place of every target, and make `modules_to_save` train whole, in float32."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("the model has an adapter already; merge it first")
    targets, saved = find_modules(model, config)
    model.requires_grad_(False)
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(model.get_submodule(name), config))
    for name in saved:  # a copy: the weights of a checkpoint may still be a map of its file
        module = model.get_submodule(name)
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
        elif name.rpartition(".")[2] in model.lora_config.modules_to_save:
            tensors[f"{PREFIX}{name}.weight"] = module.weight
    return tensors


def save_adapter(model: Llama, directory: str | Path, base: str = "") -> None:
    """Write the adapter in PEFT's format. `base` is where its base model lies, for whoever loads it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # A tied head is written too, as a copy of its own: safetensors refuses two names for one memory.
    seen: set[int] = set()
    tensors = {}
    for name, tensor in adapter_tensors(model).items():
        tensors[name] = tensor.detach().clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
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
    file = directory / "adapter_model.safetensors"
    tensors = _plain_names(checkpoint.read_tensors(file))

    # Fit the adapter to a copy of the model's shape, which takes no memory, before the model itself is touched.
    with torch.device("meta"):
        plan = Llama(model.config)
        add_lora(plan, config)
    rows = {len(t) for name, t in tensors.items() if name.removesuffix(".weight").endswith(("embed_tokens", "lm_head"))}
    expected = adapter_tensors(plan)
    odd = sorted(tensors.keys() ^ expected.keys())
    if odd:
        found, wanted = ("an extra", "none") if odd[0] in tensors else ("no", "one")
        raise UserError(f"{file}: {len(odd)} tensors differ from the model's: there is {found} {odd[0]!r}, expected {wanted}")
    for name, tensor in tensors.items():
        shape = list(expected[name].shape)
        if len(rows) == 1 and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            shape[0] = min(rows)
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise UserError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating point {tuple(shape)}")
    resized = rows and rows != {model.config.vocab_size}
    if resized and set(config.modules_to_save) != {"embed_tokens", "lm_head"}:
        raise UserError(f"{file}: {min(rows)} rows for a base of {model.config.vocab_size}, without both matrices")

    add_lora(model, config)
    if resized:
        model.config = dataclasses.replace(model.config, vocab_size=min(rows))
        for module in (model.model["embed_tokens"], model.lm_head):
            module.weight = nn.Parameter(module.weight.new_empty(min(rows), model.config.hidden_size))
        model.model["embed_tokens"].num_embeddings = model.lm_head.out_features = min(rows)
        model.tie_weights()
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
        "exclude_modules": (None, []),
    }  # fmt: skip
    for key, accepted in computed.items():
        if key in values and values[key] not in (None, *accepted):
            raise UserError(f"{path}: {key} is {values[key]!r}, expected {accepted[0]!r}: nothing else is implemented")
    try:
        targets, saved = values["target_modules"], values.get("modules_to_save") or []
        if not isinstance(targets, list) or not isinstance(saved, list):
            raise UserError(f"{path}: target_modules is {targets!r} and modules_to_save {saved!r}, expected lists of names")
        return LoRAConfig(values["r"], values["lora_alpha"], values.get("lora_dropout", 0.0),
                          tuple(sorted(targets)), tuple(sorted(saved)))  # fmt: skip
    except KeyError as error:
        raise UserError(f"{path}: there is no {error}; expected the adapter_config.json of a LoRA adapter") from None
