"""LoRA (arXiv 2106.09685): train a low-rank update of chosen matrices, W + (alpha/r) B A, with W frozen.

    python -m mala.lora merge --model BASE --adapter DIR --out DIR       writes a plain checkpoint

MaLA-500 also trains the whole embeddings and head (`modules_to_save`), because the rows of new pieces start
with little knowledge. mala/storage/peft_adapter.py reads and writes adapters. Shapes: B batch, T tokens,
R rank, D_in and D_out the widths of a layer's input and output.
"""

import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mala.cli import UserError, run
from mala.model import Llama
from mala.running.distributed import fill
from mala.storage.adapter_config import BLOCK, ENDS_WITH, SAVEABLE, check_lora_config


@dataclass
class LoRAConfig:
    """The settings of an adapter, named as in `adapter_config.json`. The defaults are MaLA-500's.

    - target_modules, exclude_modules: the layers that get LoRA, and exceptions. Ends of layer names, such as
      `q_proj` or `layers.0.self_attn.q_proj`, or a string: a regular expression, or for targets `all-linear`.
    - layers_to_transform: numbers of blocks. Only their layers, and those named in full, get LoRA.
    - layers_pattern: regular expressions for what precedes the block's number in a layer's name.
    - rank_pattern, alpha_pattern: regular expression for the end of a layer's name -> its r or lora_alpha.
    - trainable_token_indices: embed_tokens (also for a tied head) or lm_head -> its only rows that train.
    """

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ("embed_tokens", "lm_head")
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    trainable_token_indices: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.target_modules == ("all-linear",):  # as the command line passes it
            self.target_modules = "all-linear"
        check_lora_config(self)

    def targets(self, name: str) -> bool:
        """Return whether layer `name` gets LoRA. Follows PEFT's `check_target_module_exists`."""
        wanted, blocks = self.target_modules, self.layers_to_transform
        if is_named(name, self.exclude_modules or ()):
            return False
        if not blocks or name in wanted:  # a layer named in full may be in any block
            return wanted == "all-linear" or is_named(name, wanted)
        numbers = (re.match(BLOCK.format(part), name) for part in self.layers_pattern or [r"[^.]*"])
        number = next(filter(None, numbers), None)
        return is_named(name, wanted) and number is not None and int(number["idx"] or -1) in blocks

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Return layer `name`'s rank R and scaling: alpha/R, or alpha/√R for rsLoRA (arXiv 2312.03732)."""

        def setting(patterns: dict, default: float) -> float:
            matching = (own for pattern, own in patterns.items() if re.match(ENDS_WITH.format(pattern), name))
            return next(matching, default)

        r = setting(self.rank_pattern, self.r)
        alpha = setting(self.alpha_pattern, self.lora_alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def is_named(name: str, wanted: tuple[str, ...] | str) -> bool:
    """Return whether `name` matches the regular expression `wanted`, or ends in one of the names `wanted`."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted)


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update, y = W x + b + scaling · B A dropout(x).

    x (B, T, D_in) ──┬───────────── W (D_out, D_in), b ───────────────┬── + ──> y (B, T, D_out)
                     │              frozen, compute dtype             │
                     └─ dropout ── A (R, D_in) ── B (D_out, R) ── · ──┘
                                   trained, float32             scaling
    """

    def __init__(self, linear: nn.Linear, r: int, scaling: float, dropout: float):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device))
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        update = F.dropout(x, self.dropout, self.training)  # (B, T, D_in)
        update = F.linear(update, self.lora_A.to(x.dtype))  # (B, T, R)
        update = F.linear(update, self.lora_B.to(x.dtype))  # (B, T, D_out)
        return F.linear(x, self.weight, self.bias) + self.scaling * update

    def merged(self) -> nn.Linear:
        """Return a plain layer with weight W + scaling · B A, added in float32 and rounded to W's dtype."""
        with torch.device("meta"):  # the weight is set below
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        weight = self.weight.float() + self.scaling * (self.lora_B @ self.lora_A)
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


class TrainedRows(nn.Module):
    """The rows `ids` of a frozen (V, D) matrix, which train: (n, D) float32, as their gradients and moments.
    PEFT named the parameter a delta, but its rows replace those of the matrix."""

    def __init__(self, weight: Tensor, ids: list[int]):
        super().__init__()
        first, last = ids[0], ids[-1] + 1
        self.index = slice(first, last) if ids == list(range(first, last)) else ids  # a slice spares copies
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[ids].to(torch.float32))
        self.V = len(weight)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return x (B, T, D), frozen rows of `tokens` (B, T), with the trained rows in place of theirs."""
        n = len(self.trainable_tokens_delta)
        number = torch.full((self.V,), -1, device=tokens.device)  # id -> its trained row, or -1
        number[self.index] = torch.arange(n, device=tokens.device)
        at = number[tokens]
        rows = F.embedding(at.clamp(min=0), self.trainable_tokens_delta)
        return torch.where((at >= 0)[..., None], rows.to(x.dtype), x)

    @torch.no_grad()
    def put_into(self, weight: Tensor) -> None:
        """Copy the trained rows into the whole matrix (V, D)."""
        weight.detach()[self.index] = self.trainable_tokens_delta.to(weight.dtype)


def train_all(model: Llama) -> None:
    """Let all weights train in float32, like EMMA-500 (arXiv 2409.17892). Blocks compute in the old dtype."""
    model.computes_in = model.compute_dtype
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.detach().to(torch.float32, copy=True)))
    model.tie_weights()


def add_lora(model: Llama, config: LoRAConfig) -> None:
    """Freeze the model and replace every target by a LoRALinear. Let `modules_to_save` train whole, and the
    rows `trainable_token_indices` of other modules, in float32. Raises UserError, see `find_targets`."""
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for name in targets:
        layer = LoRALinear(model.get_submodule(name), *config.rank_and_scaling(name), config.lora_dropout)
        model.set_submodule(name, layer)
    start_lora(model)
    # Copy the weight: it may still be memory-mapped from the checkpoint's file.
    for module in saved_modules(model, config.modules_to_save).values():
        module.weight = nn.Parameter(module.weight.detach().to(torch.float32, copy=True))
    model.tie_weights()
    for name, module in saved_modules(model, tuple(config.trainable_token_indices)).items():
        module.token_adapter = TrainedRows(module.weight, config.trainable_token_indices[name.split(".")[-1]])
    if config.trainable_token_indices and model.config.tie_word_embeddings:
        model.lm_head.token_adapter = model.model["embed_tokens"].token_adapter
    model.lora_config = config
    model.lora_saved = config.modules_to_save  # the modules that `save_adapter` writes whole


def start_lora(model: Llama) -> None:
    """Draw A Kaiming-uniform, as PEFT does, and set B to zero, so training starts from the base model.
    Each process draws the whole A, even if it keeps a shard, so their number does not change the bits."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            A = torch.empty(module.lora_A.shape, device=module.lora_A.device)
            fill(module.lora_A, nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
            module.lora_B.detach().zero_()


@torch.no_grad()
def merge_lora(model: Llama) -> None:
    """Replace every LoRALinear by a plain layer that includes its update. Then the model has no adapter."""
    if not model.lora_config:
        raise UserError("the model has no adapter to merge")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    for module in (model.model["embed_tokens"], model.lm_head):
        if rows := module.token_adapter:
            rows.put_into(module.weight)
            module.token_adapter = None
    model.lora_config = None


def find_targets(model: Llama, config: LoRAConfig) -> list[str]:
    """Return the full names of the layers that get LoRA, all of them linear layers of the blocks. Raises
    UserError if `target_modules` names anything else, and if the model cannot train as configured."""
    if model.lora_config:
        raise UserError("the model already has an adapter; merge it first")
    if model.config.tie_word_embeddings and len(config.modules_to_save) == 1:
        alone = f"modules_to_save names only {config.modules_to_save[0]}"
        raise UserError(f"{alone}, but this model ties embed_tokens and lm_head; name both or neither")
    for name, ids in config.trainable_token_indices.items():
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise UserError("trainable_token_indices names lm_head, but the model is tied; name embed_tokens")
        if max(ids) >= model.config.vocab_size:
            found = f"row {max(ids):,}, but {name} has {model.config.vocab_size:,} rows"
            raise UserError(f"trainable_token_indices names {found}; use the base it was trained on")
    modules = model.model.named_modules(prefix="model")
    linear = [name for name, module in modules if isinstance(module, nn.Linear)]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    wanted = config.target_modules
    for end in () if isinstance(wanted, str) else wanted:
        if not any(is_named(name, (end,)) for name in (*linear, *saved_modules(model, SAVEABLE))):
            raise UserError(f"target_modules names {end!r}, expected layers such as {known}")
    for name in saved_modules(model, tuple(set(SAVEABLE) - set(config.modules_to_save))):
        if wanted != "all-linear" and config.targets(name):
            expected = f"expected only layers of the blocks: {known}"
            raise UserError(f"target_modules is {wanted!r}, which matches {name}; {expected}")
    found = [name for name in linear if config.targets(name)]
    if wanted and not found:
        chosen = config.layers_to_transform or config.exclude_modules
        left = " that layers_to_transform and exclude_modules allow" if chosen else ""
        raise UserError(f"target_modules is {wanted!r}, which matches no layer{left}; choose from {known}")
    return found


def saved_modules(model: Llama, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return full name -> module for `embed_tokens` and `lm_head`, if they are in `names`."""
    modules = {"model.embed_tokens": model.model["embed_tokens"], "lm_head": model.lm_head}
    return {name: module for name, module in modules.items() if name.rpartition(".")[2] in names}


def saved_module_of(parameter: str) -> str | None:
    """Return which of `embed_tokens` and `lm_head` the parameter belongs to, or None."""
    return next((name for name in SAVEABLE if name in parameter.split(".")), None)


def trainable_parameters(model: Llama) -> dict[str, nn.Parameter]:
    """Return name -> parameter for all parameters that train. Each is float32."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_report(model: Llama) -> str:
    """Return how many parameters train, out of how many, as a phrase. For MaLA-500 PEFT counts 2.1 of 10
    billion, because it also keeps frozen originals of embed_tokens and lm_head; here there are none."""
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"training {trained:,} of {total:,} parameters ({trained / total:.1%})"


if __name__ == "__main__":
    from tools.merge_command import main

    run(main)
