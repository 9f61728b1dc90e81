"""LoRA (arXiv 2106.09685): train a low-rank update of chosen matrices, W + (alpha/r) B A, and leave W as it is.

    python -m mala.lora merge --model BASE --adapter DIR --out DIR       a plain checkpoint, for any program that runs LLaMA

MaLA-500 also trains the embeddings and the head whole (`modules_to_save`), since the rows of new words start from little.
On disk an adapter is PEFT's: `adapter_config.json` and `adapter_model.safetensors`, with PEFT's key names.
Shapes: R rank, D_in and D_out the width of a layer's input and output.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mala import checkpoint
from mala.cli import ArgumentParser, UserError, run
from mala.model import Llama

WHOLE = ("embed_tokens", "lm_head")  # what may train whole
_ENDS_WITH = r"(.*\.)?({})$"  # as PEFT compares a pattern: with a whole name, or with its end after a dot


@dataclass
class LoRAConfig:
    """The settings of an adapter, under the names of `adapter_config.json`. The defaults are MaLA-500's.

    target_modules: ends of the layers' names, such as `q_proj` or `layers.0.self_attn.q_proj`; or, as one string,
    `all-linear`, or a regular expression that matches whole names. rank_pattern and alpha_pattern: regular expression that
    matches the end of a layer's name -> its own r or lora_alpha; the first that matches counts.
    """

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ("embed_tokens", "lm_head")
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if type(r) is not int or not 1 <= r <= 2**16:
                raise UserError(f"the LoRA rank r is {r!r}, expected a whole number from 1 to 65,536")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if type(alpha) not in (int, float) or not -1e30 < alpha < 1e30:
                raise UserError(f"lora_alpha is {alpha!r}, expected a number")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout!r}, expected a number from 0 to below 1")
        if type(self.use_rslora) is not bool:
            raise UserError(f"use_rslora is {self.use_rslora!r}, expected true or false")
        if isinstance(self.target_modules, tuple) and len(self.target_modules) == 1 and self.target_modules[0] == "all-linear":
            self.target_modules = "all-linear"
        for names in (self.target_modules, self.modules_to_save):
            if not all(isinstance(name, str) for name in names):
                raise UserError(f"target_modules and modules_to_save hold {names!r}, expected names")
        if not self.target_modules and not self.modules_to_save:
            raise UserError("target_modules and modules_to_save are both empty: nothing would train")
        for name in self.modules_to_save:
            if name not in WHOLE:
                raise UserError(f"modules_to_save names {name!r}, expected some of {', '.join(WHOLE)}: no other trains whole")
        patterns = [_ENDS_WITH.format(pattern) for pattern in (*self.rank_pattern, *self.alpha_pattern)]
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            patterns.append(self.target_modules)
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression: {error}") from None

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """R of the layer `name`, and what its update is multiplied by: alpha/R, or alpha/√R (rsLoRA, arXiv 2312.03732)."""

        def setting(patterns: dict, default: float) -> float:
            return next((value for pattern, value in patterns.items() if re.match(_ENDS_WITH.format(pattern), name)), default)

        r = setting(self.rank_pattern, self.r)
        alpha = setting(self.alpha_pattern, self.lora_alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


class LoRALinear(nn.Linear):
    """y = W x + b + scaling · B A dropout(x), with A (R, D_in) and B (D_out, R) trained in float32, W and b frozen.

    A starts Kaiming-uniform, as nn.Linear and PEFT do, and B at zero, so that training starts from the base model.
    """

    def __init__(self, linear: nn.Linear, r: int, scaling: float, dropout: float):
        nn.Module.__init__(self)  # not nn.Linear's: the weight and the bias are taken over, not made anew
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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


def find_targets(model: Llama, config: LoRAConfig) -> list[str]:
    """The full names of the linear layers that get LoRA: those of the model's blocks that `target_modules` names.

    Raises UserError for a name that no such layer has, and where the model cannot train as configured.
    """
    check_bare(model)
    if model.config.tie_word_embeddings and len(config.modules_to_save) == 1:
        raise UserError(f"modules_to_save names {config.modules_to_save[0]} alone, but here embed_tokens and lm_head are one "
                        "matrix; name both or neither")  # fmt: skip
    linear = [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    wanted = config.target_modules
    if wanted == "all-linear":
        return linear
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    if isinstance(wanted, str):
        for name, module in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head")):
            if module not in config.modules_to_save and re.fullmatch(wanted, name):
                raise UserError(f"target_modules, {wanted!r}, matches {name}, expected only layers of the blocks: {known}")
        found = [name for name in linear if re.fullmatch(wanted, name)]
        if not found:
            raise UserError(f"target_modules, {wanted!r}, matches no layer, expected some of {known}")
        return found
    for end in wanted:
        if not any(f".{name}".endswith(f".{end}") for name in linear):
            raise UserError(f"target_modules names {end!r}, expected some of {known}")
    return [name for name in linear if any(f".{name}".endswith(f".{end}") for end in wanted)]


def check_bare(model: Llama) -> None:
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("the model has an adapter already; merge it first")


def saved_modules(model: Llama, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Full name -> module, for `embed_tokens` and `lm_head` where `names` has them."""
    modules = {"model.embed_tokens": model.model["embed_tokens"], "lm_head": model.lm_head}
    return {name: module for name, module in modules.items() if name.rpartition(".")[2] in names}


def add_lora(model: Llama, config: LoRAConfig) -> None:
    """Freeze the model, put a LoRALinear in place of every target, and make `modules_to_save` train whole, in float32."""
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for name in targets:
        layer = LoRALinear(model.get_submodule(name), *config.rank_and_scaling(name), config.lora_dropout)
        replace_module(model, name, layer)
    # A copy: the weights may still be a map of the checkpoint's file.
    for module in saved_modules(model, config.modules_to_save).values():
        module.weight = nn.Parameter(module.weight.detach().float().clone())
    model.tie_weights()
    model.lora_config = config
    model.lora_whole = config.modules_to_save  # what an adapter of this model holds whole
    model.unmerged = {}


def replace_module(model: Llama, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def trainable_parameters(model: Llama) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all that train; each is float32."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_report(model: Llama) -> str:
    """How many parameters train, of how many. (PEFT's count for MaLA-500, 2.1 of 10 billion, holds the frozen originals of
    embed_tokens and lm_head, too, which it keeps beside the trained copies; here there is one of each.)"""
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"training {trained:,} of {total:,} parameters ({trained / total:.1%})"


@torch.no_grad()
def merge_lora(model: Llama) -> None:
    """Put a plain layer with the sum in place of every LoRALinear; these are kept in `model.unmerged`, base weights and all."""
    if model.unmerged:
        raise UserError("the model's adapter is merged already")
    model.unmerged = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, module in model.unmerged.items():
        replace_module(model, name, module.merged())


def unmerge_lora(model: Llama) -> None:
    """Undo `merge_lora`: the base weights are the very tensors that they were, not a difference, which would be rounded."""
    if not model.unmerged:
        raise UserError("the model has no merged adapter")
    for name, module in model.unmerged.items():
        replace_module(model, name, module)
    model.unmerged = {}


# The files of PEFT.

PREFIX = "base_model.model."  # what PEFT puts before a module's own name
# Settings of `adapter_config.json` that do not change what an adapter computes. All others must be off.
HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
            "megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
            "qalora_group_size", "ensure_weight_tying", "layers_pattern"}  # fmt: skip
# Other ways to start A and B also change the base's weights, which the adapter then goes with.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def adapter_tensors(model: Llama, whole: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """PEFT's name -> parameter, for all that an adapter holds: every A and B, and the modules that `whole` names."""
    tensors: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
    for name, module in saved_modules(model, whole).items():
        tensors[f"{PREFIX}{name}.weight"] = module.weight
    return tensors


def save_adapter(model: Llama, directory: str | Path, base: str = "", tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter in PEFT's format. `base` is where its base model lies, for whoever loads it; `tensors` are those of
    `adapter_tensors`, where they had to be gathered from several processes."""
    if model.unmerged:
        raise UserError("the model's adapter is merged into its weights; unmerge it first")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach() for name, tensor in (tensors or adapter_tensors(model, model.lora_whole)).items()}
    if model.config.tie_word_embeddings and f"{PREFIX}lm_head.weight" in tensors:
        # Written twice, as PEFT does: safetensors refuses two names for one memory.
        tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}lm_head.weight"].clone()
    checkpoint.write_tensors(directory / "adapter_model.safetensors", tensors)
    checkpoint.write_json(directory / "adapter_config.json", {
        **dataclasses.asdict(model.lora_config), "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none",
        "base_model_name_or_path": base, "inference_mode": True,
    })  # fmt: skip


@torch.no_grad()
def load_adapter(model: Llama, directory: str | Path) -> None:
    """Put the adapter in `directory` on `model`, which is left as it was if the two do not fit (UserError).

    - An adapter that holds more rows of embed_tokens and lm_head than the base, as MaLA-500's, brings its vocabulary along.
    - Where it holds one of them without training it (PEFT's `save_embedding_layers`), that replaces the base's.
    - Where they are one matrix in the base and two in the adapter, the model's are two from then on, as they are in PEFT.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    file, tensors = _read_adapter(directory)
    embed_tokens, lm_head = (tensors.get(f"{PREFIX}{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    whole = tuple(name for name, tensor in zip(WHOLE, (embed_tokens, lm_head)) if tensor is not None)
    tied = model.config.tie_word_embeddings and (not whole or len(whole) == 2 and torch.equal(embed_tokens, lm_head))

    # Fit the adapter to a plan of the model, which takes no memory, before the model itself is touched.
    rows = max(model.config.vocab_size, embed_tokens.shape[0] if len(whole) == 2 and embed_tokens.ndim == 2 else 0)
    with torch.device("meta"):
        plan = Llama(dataclasses.replace(model.config, vocab_size=rows, tie_word_embeddings=tied))
        try:
            add_lora(plan, config)
            check_bare(model)
        except UserError as error:
            raise UserError(f"{directory}: {error}") from None
    expected = adapter_tensors(plan, (*config.modules_to_save, *whole))
    if odd := sorted(tensors.keys() ^ expected.keys()):
        found = f"{'an extra' if odd[0] in tensors else 'no'} {odd[0]!r}"
        raise UserError(f"{file}: {len(odd)} tensors differ from those expected for this model: there is {found}")
    for name, tensor in tensors.items():
        shape = tuple(expected[name].shape)
        if tensor.shape != shape or not tensor.is_floating_point():
            raise UserError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating point {shape}")
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds NaN or infinity, expected numbers; the training that wrote it diverged")

    model.config = dataclasses.replace(model.config, tie_word_embeddings=tied)
    if whole:
        # add_lora makes float32 copies of those that train; the others take the base's dtype.
        model.replace_vocabulary(*(
            old if new is None else new.to(old.device, new.dtype if name in config.modules_to_save else old.dtype)
            for name, new, old in (("embed_tokens", embed_tokens, model.model["embed_tokens"].weight),
                                   ("lm_head", lm_head, model.lm_head.weight))
        ))  # fmt: skip
    add_lora(model, config)
    model.lora_whole = tuple({*config.modules_to_save, *whole})
    for name, parameter in adapter_tensors(model, ()).items():
        parameter.copy_(tensors[name])


def _read_adapter(directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of an adapter's tensors, and the tensors under the plainest of the names that PEFT has given them.

    Over the years it has written `…lora_A.weight` and, with the adapter's name, `…lora_A.default.weight`; a module saved
    whole as `lm_head.weight` and as `lm_head.modules_to_save.weight` or `lm_head.modules_to_save.default.weight`, over a
    resized base as both, and beside it as it was before training, as `lm_head.original_module.weight`, which is left out.
    """
    file = directory / "adapter_model.safetensors"
    if not file.exists() and (directory / "adapter_model.bin").exists():
        file = directory / "adapter_model.bin"
    plain, trained = {}, {}
    for name, tensor in checkpoint.read_tensors(file) if file.suffix == ".safetensors" else checkpoint.read_bin(file):
        name = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", name)
        whole = re.sub(r"\.modules_to_save(\.[^.]+)?\.weight$", ".weight", name)
        if whole != name:
            trained[whole] = tensor
        elif ".original_module." not in name:
            plain[name] = tensor
    return file, {**plain, **trained}


def read_adapter_config(directory: Path) -> LoRAConfig:
    """`adapter_config.json`. What would change the mathematics and is not implemented is refused by name (UserError)."""
    path = directory / "adapter_config.json"
    values = checkpoint.read_json(path)
    fields = {field.name for field in dataclasses.fields(LoRAConfig)}
    for key, accepted in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("init_lora_weights", HARMLESS_STARTS)):
        value = values.pop(key, accepted[0])
        if value not in accepted:
            known = " or ".join(repr(one) for one in accepted if one is not None)
            raise UserError(f"{path}: {key} is {value!r}, expected {known}: nothing else is implemented")
    for key, value in values.items():
        if key not in HARMLESS | fields and value not in (None, False, [], {}, ""):
            raise UserError(f"{path}: {key} is {value!r}, which is not implemented; only plain LoRA is")
    for key in ("r", "lora_alpha", "target_modules"):
        if values.get(key) is None:
            raise UserError(f"{path}: there is no {key!r}; expected the adapter_config.json of a LoRA adapter")
    given = {"lora_dropout": 0.0, "modules_to_save": []}
    given |= {key: value for key, value in values.items() if key in fields and value is not None}
    for key, kinds in (("target_modules", (list, str)), ("modules_to_save", (list,)), ("rank_pattern", (dict,)),
                       ("alpha_pattern", (dict,))):  # fmt: skip
        if not isinstance(given.get(key, kinds[0]()), kinds):
            raise UserError(f"{path}: {key} is {given[key]!r}, expected a {' or '.join(kind.__name__ for kind in kinds)}")
    if isinstance(given["target_modules"], list):
        given["target_modules"] = tuple(given["target_modules"])
    given["modules_to_save"] = tuple(str(name).removeprefix("model.") for name in given["modules_to_save"])
    try:
        return LoRAConfig(**given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def merge_checkpoint(base: Path, adapter: Path, out: Path) -> None:
    """Write a plain checkpoint of `base` with `adapter` merged into it, in the base's dtype.

    The base's other files come along; the adapter's tokenizer takes the place of the base's. Raises UserError where `out`
    exists, where no tokenizer goes with a longer vocabulary, and as `load_adapter` does.
    """
    with checkpoint.atomic_directory(out) as temporary:
        model = Llama.from_pretrained(base)
        dtype, vocab_size = model.lm_head.weight.dtype, model.config.vocab_size
        load_adapter(model, adapter)
        brings_tokenizer = (adapter / "tokenizer.model").exists()
        if model.config.vocab_size > vocab_size and not brings_tokenizer:
            raise UserError(f"{adapter}: there is no tokenizer.model, but the adapter has {model.config.vocab_size:,} rows and "
                            f"its base {vocab_size:,}; put the tokenizer that it was trained with there")  # fmt: skip
        merge_lora(model)
        model.unmerged = {}
        for module in saved_modules(model, WHOLE).values():
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{base} + {adapter}: {name} holds NaN or infinity, expected numbers")
        model.save_pretrained(temporary)
        checkpoint.copy_companions(base, temporary, with_vocabulary=not brings_tokenizer)
        if brings_tokenizer:
            shutil.copyfile(adapter / "tokenizer.model", temporary / "tokenizer.model")
        kept = checkpoint.read_json(base / "config.json")  # with what transformers keeps there and this code does not need
        own = {"vocab_size": model.config.vocab_size, "tie_word_embeddings": model.config.tie_word_embeddings}
        checkpoint.write_json(temporary / "config.json", {**kept, **own})


def main() -> None:
    parser = ArgumentParser(prog="python -m mala.lora", description="LoRA adapters in PEFT's format.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="write a plain checkpoint, with the adapter merged into its base")
    command.add_argument("--model", type=Path, required=True, help="the base checkpoint's folder")
    command.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    command.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    args = parser.parse_args()
    merge_checkpoint(args.model, args.adapter, args.out)
    print(f"{args.out}: {args.model} + {args.adapter}, merged")


if __name__ == "__main__":
    run(main)
