"""LoRA (arXiv 2106.09685): train a low-rank update of chosen matrices, W + (alpha/r) B A, and leave W as it
is.

    python -m mala.lora merge --model BASE --adapter DIR --out DIR       a plain checkpoint, for any program

MaLA-500 also trains the embeddings and the head whole (`modules_to_save`), since the rows of new pieces start
from little. How an adapter lies on disk is in mala/storage/peft_adapter.py. Shapes: B batch, T tokens, R
rank, D_in and D_out the width of a layer's input and output.
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
    """The settings of an adapter, under the names of `adapter_config.json`. The defaults are MaLA-500's.

    - target_modules: ends of layers' names, such as `q_proj` or `layers.0.self_attn.q_proj`; or one string,
      `all-linear` or a regular expression that matches full names.
    - layers_to_transform: the only blocks where ends of names count; their numbers follow the first of
      `layers_pattern` (regular expressions) in a name. exclude_modules: layers named so get no LoRA.
    - rank_pattern, alpha_pattern: a regular expression for the end of layers' names -> their r or lora_alpha.
    - trainable_token_indices: embed_tokens or lm_head -> the only rows of it that train. Of a matrix that is
      both, embed_tokens alone is named.
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
        if self.target_modules == ("all-linear",):  # as a command line gives it
            self.target_modules = "all-linear"
        check_lora_config(self)

    def targets(self, name: str) -> bool:
        """Whether the layer `name` gets LoRA, by the rule of PEFT's `check_target_module_exists`."""
        wanted, blocks = self.target_modules, self.layers_to_transform
        if is_named(name, self.exclude_modules or ()):
            return False
        if not blocks or name in wanted:  # a full name needs no block
            return wanted == "all-linear" or is_named(name, wanted)
        numbers = (re.match(BLOCK.format(part), name) for part in self.layers_pattern or [r"[^.]*"])
        number = next(filter(None, numbers), None)
        return is_named(name, wanted) and number is not None and int(number["idx"] or -1) in blocks

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """R of the layer `name`, and its update's factor: alpha/R, or alpha/√R (rsLoRA, arXiv 2312.03732)."""

        def setting(patterns: dict, default: float) -> float:
            matching = (own for pattern, own in patterns.items() if re.match(ENDS_WITH.format(pattern), name))
            return next(matching, default)

        r = setting(self.rank_pattern, self.r)
        alpha = setting(self.alpha_pattern, self.lora_alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def is_named(name: str, wanted: tuple[str, ...] | str) -> bool:
    """Whether a regular expression matches a full name, or one of some names is its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted)


class LoRALinear(nn.Linear):
    """y = W x + b + scaling · B A dropout(x):

    x (B, T, D_in) ──┬───────────── W (D_out, D_in), b ───────────────┬── + ──> y (B, T, D_out)
                     │              frozen, compute dtype             │
                     └─ dropout ── A (R, D_in) ── B (D_out, R) ── · ──┘
                                   trained, float32             scaling
    """

    def __init__(self, linear: nn.Linear, r: int, scaling: float, dropout: float):
        nn.Module.__init__(self)  # not nn.Linear's: the weight and the bias are taken over, not made anew
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
        """A plain layer with W + scaling · B A: the sum in float32, then rounded to W's dtype."""
        with torch.device("meta"):  # its weight is set below
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        weight = self.weight.float() + self.scaling * (self.lora_B @ self.lora_A)
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


class TrainedRows(nn.Module):
    """Rows `ids` of a frozen matrix (V, D) that train: (n, D) float32, as are their gradients and moments.
    PEFT calls them a delta, but they take the place of the rows."""

    def __init__(self, weight: Tensor, ids: list[int]):
        super().__init__()
        first, last = ids[0], ids[-1] + 1
        self.index = slice(first, last) if ids == list(range(first, last)) else ids  # of rows in a row a view
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[ids].to(torch.float32))
        self.V = len(weight)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, T, D), looked up in the frozen matrix, with the trained rows for those of `tokens` (B, T)."""
        n = len(self.trainable_tokens_delta)
        number = torch.full((self.V,), -1, device=tokens.device)  # of each token's row, -1 if it is frozen
        number[self.index] = torch.arange(n, device=tokens.device)
        at = number[tokens]
        rows = F.embedding(at.clamp(min=0), self.trainable_tokens_delta)
        return torch.where((at >= 0)[..., None], rows.to(x.dtype), x)

    @torch.no_grad()
    def put_into(self, weight: Tensor) -> None:
        weight.detach()[self.index] = self.trainable_tokens_delta.to(weight.dtype)


def train_all(model: Llama) -> None:
    """Train every weight, as EMMA-500 did (arXiv 2409.17892): float32, cast to the dtype that it had."""
    model.computes_in = model.compute_dtype
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.detach().to(torch.float32, copy=True)))
    model.tie_weights()


def add_lora(model: Llama, config: LoRAConfig) -> None:
    """Freeze the model, replace every target by a LoRALinear, and train in float32 `modules_to_save` whole,
    or the rows of `trainable_token_indices`."""
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for name in targets:
        layer = LoRALinear(model.get_submodule(name), *config.rank_and_scaling(name), config.lora_dropout)
        model.set_submodule(name, layer)
    start_lora(model)
    # A copy: the weights may still be a map of the checkpoint's file.
    for module in saved_modules(model, config.modules_to_save).values():
        module.weight = nn.Parameter(module.weight.detach().to(torch.float32, copy=True))
    model.tie_weights()
    for name, module in saved_modules(model, tuple(config.trainable_token_indices)).items():
        module.token_adapter = TrainedRows(module.weight, config.trainable_token_indices[name.split(".")[-1]])
    if config.trainable_token_indices and model.config.tie_word_embeddings:
        model.lm_head.token_adapter = model.model["embed_tokens"].token_adapter
    model.lora_config = config
    model.lora_saved = config.modules_to_save  # the modules that an adapter of this model holds whole


def start_lora(model: Llama) -> None:
    """A starts Kaiming-uniform, as nn.Linear and PEFT do, and B at zero: training starts from the base model.
    A is drawn whole where only a part is kept: any number of processes start from the same bits."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            A = torch.empty(module.lora_A.shape, device=module.lora_A.device)
            fill(module.lora_A, nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
            module.lora_B.detach().zero_()


@torch.no_grad()
def merge_lora(model: Llama) -> None:
    """Put a plain layer with the sum in place of every LoRALinear. The model has no adapter from then on."""
    if not has_adapter(model):
        raise UserError("the model has no adapter to merge")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    for module in (model.model["embed_tokens"], model.lm_head):
        if rows := getattr(module, "token_adapter", None):
            rows.put_into(module.weight)
            module.token_adapter = None
    model.lora_config = None


def has_adapter(model: Llama) -> bool:
    return getattr(model, "lora_config", None) is not None


def find_targets(model: Llama, config: LoRAConfig) -> list[str]:
    """The full names of the layers that get LoRA: the linear ones of the blocks that `target_modules` names.
    Raises UserError for a name that no such layer has, and if the model cannot train as configured."""
    if has_adapter(model):
        raise UserError("the model has an adapter already; merge it first")
    if model.config.tie_word_embeddings and len(config.modules_to_save) == 1:
        alone = f"modules_to_save names {config.modules_to_save[0]} alone"
        raise UserError(f"{alone}, but here embed_tokens and lm_head are one matrix; name both or neither")
    for name, ids in config.trainable_token_indices.items():
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise UserError("trainable_token_indices names lm_head, but here that is embed_tokens; name this")
        if max(ids) >= model.config.vocab_size:
            found = f"row {max(ids):,}, but {name} has {model.config.vocab_size:,}"
            raise UserError(f"trainable_token_indices names {found}; the base is another than in training")
    modules = model.model.named_modules(prefix="model")
    linear = [name for name, module in modules if isinstance(module, nn.Linear)]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    wanted = config.target_modules
    for end in () if isinstance(wanted, str) else wanted:
        if not any(is_named(name, (end,)) for name in (*linear, *saved_modules(model, SAVEABLE))):
            raise UserError(f"target_modules names {end!r}, expected some of {known}")
    for name in saved_modules(model, tuple(set(SAVEABLE) - set(config.modules_to_save))):
        if wanted != "all-linear" and config.targets(name):
            expected = f"expected only layers of the blocks: {known}"
            raise UserError(f"target_modules, {wanted!r}, matches {name}, {expected}")
    found = [name for name in linear if config.targets(name)]
    if wanted and not found:
        chosen = config.layers_to_transform or config.exclude_modules
        left = " that layers_to_transform and exclude_modules leave" if chosen else ""
        raise UserError(f"target_modules, {wanted!r}, matches no layer{left}, expected some of {known}")
    return found


def saved_modules(model: Llama, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Full name -> module, for those of `embed_tokens` and `lm_head` that are in `names`."""
    modules = {"model.embed_tokens": model.model["embed_tokens"], "lm_head": model.lm_head}
    return {name: module for name, module in modules.items() if name.rpartition(".")[2] in names}


def saved_module_of(parameter: str) -> str | None:
    """Which of `embed_tokens` and `lm_head` a parameter of that name belongs to."""
    return next((name for name in SAVEABLE if name in parameter.split(".")), None)


def trainable_parameters(model: Llama) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all that train; each is float32."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_report(model: Llama) -> str:
    """How many parameters train, of how many. PEFT's count for MaLA-500, 2.1 of 10 billion, holds the frozen
    originals of embed_tokens and lm_head, too, which it keeps beside the trained copies; here there is one of
    each."""
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"training {trained:,} of {total:,} parameters ({trained / total:.1%})"


if __name__ == "__main__":
    from tools.merge_command import main

    run(main)
