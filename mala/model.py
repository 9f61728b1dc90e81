"""LLaMA, for training and scoring, in the Hugging Face layout of weights.

Notable features:
- RMSNorm before each half of a block, rotary positions, SwiGLU, no biases unless the config asks for them
- grouped-query attention: K key/value heads serve H query heads
- rotary scaling `linear` and `llama3`, in the spelling of transformers 4 and in that of transformers 5
- the loss is taken inside `forward`: a caller never holds the logits of a training step
- mixed dtypes: the frozen weights' dtype is computed in; float32 embeddings, head and LoRA are cast where they are used

Parameter names are those of the checkpoint files: `model.layers.0.self_attn.q_proj.weight`, `lm_head.weight`, ...
Shapes: B batch, T tokens, S tokens already in the cache, D hidden size, H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from mala import checkpoint
from mala.cli import UserError
from mala.cross_entropy import IGNORE_INDEX, linear_cross_entropy, token_nll


@dataclass
class LlamaConfig:
    """The architecture, under the names of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, field)
            if value is None and field in ("num_key_value_heads", "head_dim"):
                continue
            if type(value) is not int or value < 1:
                raise UserError(f"{field} is {value!r}, expected a positive whole number")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}, and there is no head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, expected an even number: rotary positions turn pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        for field in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, field)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UserError(f"{field} is {value!r}, expected a positive number")
        for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(getattr(self, field)) is not bool:
                raise UserError(f"{field} is {getattr(self, field)!r}, expected true or false")
        _check_rope_scaling(self.rope_scaling)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LlamaConfig:
        """Read `config.json`. Raises UserError where it does not describe a LLaMA that this file computes."""
        path = Path(directory) / "config.json"
        values = checkpoint.read_json(path)
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """From what `config.json` holds, in the spelling of transformers 4 or 5. Raises UserError as above."""
        # Keys that would change the mathematics, with the only values that are computed here.
        computed = {"model_type": "llama", "hidden_act": "silu", "attention_dropout": 0, "quantization_config": None}
        for key, expected in computed.items():
            if values.get(key, expected) != expected:
                raise UserError(f"{key} is {values[key]!r}, expected {expected!r}: only plain LLaMA is implemented")
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise UserError(f"there is no {name!r}; expected the config.json of a LLaMA")
        kept = {name: value for name, value in values.items() if name in known}
        # transformers 5 writes one dict for both rotary settings; transformers 4 wrote "type" before "rope_type".
        rope = values.get("rope_parameters") or kept.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise UserError(f"the rotary settings are {rope!r}, expected an object")
        rope = dict(rope)
        kept["rope_theta"] = rope.pop("rope_theta", kept.get("rope_theta", 10000.0))
        rope_type = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        kept["rope_scaling"] = None if rope_type == "default" else {"rope_type": rope_type, **rope}
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds, in the spelling of transformers 4, which transformers 5 reads too."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                **dataclasses.asdict(self)}  # fmt: skip


def _check_rope_scaling(scaling: dict[str, Any] | None) -> None:
    if scaling is None:
        return
    needed = {
        "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    }
    rope_type = scaling.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in needed:
        raise UserError(f"rope_type is {rope_type!r}, expected default, linear or llama3")
    for key in needed[rope_type]:
        if type(scaling.get(key)) not in (int, float) or not scaling[key] > 0:
            raise UserError(f"{key} of the {rope_type} rotary scaling is {scaling.get(key)!r}, expected a positive number")


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """The angle, in radians per position, by which each pair of a head's dimensions turns: (head_dim / 2,) float32.

    RoFormer (arXiv 2104.09864), section 3.2: theta_i = base^(-2i / head_dim). `linear` divides every angle by the factor;
    `llama3` only the slow ones, which did not complete a turn within the original context, with a ramp between.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, kept; 0: a slow one, divided
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of dimensions (i, i + head_dim/2), the Hugging Face halves, by its angle.

    x: (B, heads, T, head_dim). cos, sin: (T, head_dim / 2) float32, or (B, 1, T, head_dim / 2) where the positions of the rows
    differ. The product is taken in float32 and rounded once.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens that a model has seen, for all layers: what incremental decoding need not redo."""

    def __init__(self, model: Llama, batch_size: int, max_tokens: int):
        config, like = model.config, model.model["layers"][0].self_attn.k_proj.weight  # its dtype and device
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0  # tokens seen, S; `Llama.forward` moves it on after the last layer
        self.max_tokens = max_tokens

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k and v (B, K, T, head_dim) of the new tokens; return all of the layer's so far (B, K, S+T, head_dim)."""
        end = self.length + k.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens, {end} were given")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight (arXiv 1910.07467, eq. 4), in float32, rounded once: (…, D) -> (…, D)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, K key/value heads for H query heads (arXiv 2305.13245): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.H, self.K, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer = layer
        D, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(D, self.H * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.K * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.K * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.H * self.head_dim, D, bias=bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None = None,
                cache: KVCache | None = None) -> torch.Tensor:  # fmt: skip
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.head_dim).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_proj(x).view(B, T, self.K, self.head_dim).transpose(1, 2)  # (B, K, T, head_dim)
        v = self.v_proj(x).view(B, T, self.K, self.head_dim).transpose(1, 2)  # (B, K, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S+T, head_dim)
        is_causal = mask is None and k.shape[2] == T  # without either a single new token sees all that the cache holds
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=self.K != self.H)
        y = y.transpose(1, 2).reshape(B, T, self.H * self.head_dim)  # heads side by side again
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202), down(silu(gate(x)) * up(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), and to that + mlp(norm of it): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None = None,
                cache: KVCache | None = None) -> torch.Tensor:  # fmt: skip
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only transformer. `requires_grad` and dtypes of its parameters are the caller's to set."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep only each block's input for the backward pass, compute the rest again
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One matrix for the embeddings and the head, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def replace_vocabulary(self, embed_tokens: torch.Tensor, lm_head: torch.Tensor) -> None:
        """Take other matrices, both (V, D), for another number of words V. Where the two are tied the first is taken."""
        for module, weight in ((self.model["embed_tokens"], embed_tokens), (self.lm_head, lm_head)):
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        self.model["embed_tokens"].num_embeddings = self.lm_head.out_features = len(embed_tokens)
        self.config = dataclasses.replace(self.config, vocab_size=len(embed_tokens))
        self.tie_weights()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, initializer_range²) for every matrix, zero biases, unit norms: where training from scratch begins."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, self.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    def hidden_states(self, tokens: torch.Tensor, cache: KVCache | None = None, positions: torch.Tensor | None = None,
                      mask: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """tokens (B, T) int64 -> (B, T, D): what `lm_head` reads, after the last norm.

        By default token t comes after tokens 0 .. t - 1, and after those in the cache. `positions` (B, T) and `mask`
        (B, 1, T, T) bool, true where a token (row) sees another (column), make a tree of a row instead of a line.
        """
        T, S, device = tokens.shape[1], cache.length if cache is not None else 0, tokens.device
        compute_dtype = self.model["layers"][0].mlp.down_proj.weight.dtype
        x = self.model["embed_tokens"](tokens).to(compute_dtype)  # (B, T, D)
        if mask is None and S and T > 1:
            # Trap: SDPA's `is_causal` aligns the triangle to the top left, which is wrong once the cache holds S > 0 tokens.
            # New token t, at position S + t, sees positions 0 .. S + t.
            mask = torch.ones(T, S + T, dtype=torch.bool, device=device).tril(S)
        if positions is None:
            positions = torch.arange(S, S + T, device=device)
        angles = positions[..., None].float() * rotary_frequencies(self.config, device)  # (T, head_dim / 2)
        if angles.ndim == 3:
            angles = angles[:, None]  # (B, T, head_dim / 2) -> (B, 1, T, head_dim / 2), for all heads
        cos, sin = angles.cos(), angles.sin()
        for block in self.model["layers"]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recompute(block, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return self.model["norm"](x)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None,
                reduction: str = "mean") -> torch.Tensor:  # fmt: skip
        """Logits (B, T, V) of the token after each of `tokens` (B, T) int64, in the compute dtype;

        or, given `targets` (B, T) int64, the mean NLL in nats per target. targets[b, t] is the token that comes *after*
        tokens[b, t], so the caller has shifted them; -100 is left out. With `reduction` "none" it is the NLL of every target,
        (B, T) float32, 0 where one is left out, and without gradients.
        """
        x = self.hidden_states(tokens, cache)
        if targets is None:
            return F.linear(x, self.lm_head.weight.to(x.dtype))
        if reduction == "mean":
            # (B, T, D) -> (N, D), (B, T) -> (N,)
            return linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        counted = targets != IGNORE_INDEX  # (B, T)
        losses = torch.zeros(targets.shape, device=x.device)  # (B, T)
        losses[counted] = token_nll(x[counted], self.lm_head.weight, targets[counted])
        return losses

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None,
                        device: torch.device | str = "cpu") -> Llama:  # fmt: skip
        """Load a checkpoint folder; `dtype=None` keeps each tensor's own.

        The model is built on `meta`, without memory; each tensor is then mapped from its file, cast and moved alone. With
        `device="meta"` it stays there, and only names, shapes and dtypes of the files are read.
        Raises UserError where a tensor is missing, left over, of another shape or not floating point.
        """
        directory = Path(directory)
        with torch.device("meta"):
            model = cls(LlamaConfig.from_pretrained(directory))
        missing = {name: parameter.shape for name, parameter in model.named_parameters()}
        tied_head = None
        for name, tensor in checkpoint.read_weights(directory):
            if name.endswith("rotary_emb.inv_freq"):  # a buffer that old exports hold; it follows from the config
                continue
            if name == "lm_head.weight" and model.config.tie_word_embeddings:  # old exports hold the one matrix twice
                tied_head = tensor.to(device=device, dtype=dtype)
                continue
            if name not in missing:
                raise UserError(f"{directory}: the weights hold {name!r}, which the LLaMA of config.json does not have")
            if tensor.shape != missing[name] or not tensor.is_floating_point():
                raise UserError(
                    f"{directory}: {name} is {_describe(tensor)}, expected floating point "
                    f"{tuple(missing[name])} by config.json; the two are not of one checkpoint"
                )
            del missing[name]
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
        if missing:
            raise UserError(f"{directory}: the weights lack {len(missing)} tensors, the first is {next(iter(missing))!r}")
        model.tie_weights()
        if tied_head is not None and not tied_head.is_meta and not torch.equal(tied_head, model.lm_head.weight):
            raise UserError(
                f"{directory}: lm_head.weight is not embed_tokens, which config.json says it is (tie_word_embeddings)"
            )
        return model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES) -> None:
        """Write `config.json` and the weights as they are now, in each parameter's dtype, for us and for transformers."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(directory, dict(self.named_parameters()), max_shard_bytes)
        dtype = str(self.model["layers"][0].mlp.down_proj.weight.dtype).removeprefix("torch.")
        checkpoint.write_json(directory / "config.json", {**self.config.to_dict(), "torch_dtype": dtype})


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
