"""LLaMA, for training and scoring, in the Hugging Face layout of weights.

Notable features:
- RMSNorm before each half of a block, rotary positions, SwiGLU, no biases unless the config asks for them
- grouped-query attention: K key/value heads serve H query heads
- rotary scaling `linear` and `llama3`, in the spelling of transformers 4 and in that of transformers 5
- the loss is taken inside `forward`: a caller never holds the logits of a training step
- mixed dtypes: blocks compute in the frozen weights' dtype; what trains is float32, and cast to it

Parameters have the names of the checkpoint files: `model.layers.0.self_attn.q_proj.weight`, `lm_head.weight`.
Shapes: B batch, T tokens, S tokens in the cache, D hidden size, H query heads, K key/value heads, V
vocabulary.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mala.cross_entropy import IGNORE_INDEX, linear_cross_entropy, token_nll
from mala.storage.config_json import check_config, read_config, to_config_json
from mala.storage.files import write_json
from mala.storage.weights import MAX_SHARD_BYTES, load_weights, write_weights

MaybeTensor = Tensor | None


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
        check_config(self)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LlamaConfig":
        """Read `config.json`. Raises UserError if it describes no LLaMA that this file computes."""
        return read_config(Path(directory) / "config.json", cls)

    @classmethod
    def named(cls, name: str, **changes: Any) -> "LlamaConfig":
        """One of the models in NAMED, with `changes` such as another `vocab_size`."""
        return cls(**{**NAMED[name], **changes})


NAMED = {
    "llama-2-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                       num_attention_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-3.2-1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
                         rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
                         rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
                         bos_token_id=128000, eos_token_id=128001),
    "tinyllama-1.1b": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                           num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5),
    "demo": dict(vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                 num_attention_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5),  # assets/tiny-llama
}  # fmt: skip


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """The angle, in radians per position, of each pair of a head's dimensions: (head_dim / 2,) float32.

    RoFormer (arXiv 2104.09864), section 3.2: theta_i = base^(-2i / head_dim). `linear` divides every angle by
    the factor; `llama3` only the slow ones, which complete no turn within the original context, with a ramp
    between.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, kept; 0: a slow one, divided
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of dimensions (i, i + head_dim/2), the Hugging Face halves, by its angle. x: (B, heads,
    T, head_dim). cos, sin: (T, head_dim / 2) float32, or (B, 1, T, head_dim / 2) where the positions of the
    rows differ. The product is taken in float32 and rounded once."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens that a model has seen, for all layers: not to be made again."""

    def __init__(self, model: "Llama", batch_size: int, max_tokens: int):
        config, like = model.config, model.model["layers"][0].self_attn.k_proj.weight  # its dtype and device
        shape = (batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
        shape = (config.num_hidden_layers, *shape)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0  # tokens seen, S; `Llama.forward` moves it on after the last layer
        self.max_tokens = max_tokens

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, head_dim) of new tokens; return a layer's so far (B, K, S+T, head_dim)."""
        end = self.length + k.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens, {end} were given")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight (arXiv 1910.07467, eq. 4), rounded once: (…, D) -> (…, D)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, H query and K key/value heads (arXiv 2305.13245): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.H, self.K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.layer = config.head_dim, layer
        D, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(D, self.H * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.K * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.K * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.H * self.head_dim, D, bias=bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: MaybeTensor = None, cache: KVCache | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.head_dim).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_proj(x).view(B, T, self.K, self.head_dim).transpose(1, 2)  # (B, K, T, head_dim)
        v = self.v_proj(x).view(B, T, self.K, self.head_dim).transpose(1, 2)  # (B, K, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S+T, head_dim)
        is_causal = mask is None and k.shape[2] == T  # else a single new token sees all that the cache holds
        is_gqa = self.K != self.H
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_gqa)
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

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), and to that + mlp(norm of it): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: MaybeTensor = None, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only transformer. `requires_grad` and dtypes of its parameters are the caller's to set."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # else the backward pass recomputes blocks from their inputs
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the frozen weights, in which a block computes."""
        return self.model["layers"][0].mlp.down_proj.weight.dtype

    def tie_weights(self) -> None:
        """One matrix for the embeddings and the head, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def replace_vocabulary(self, embed_tokens: Tensor, lm_head: Tensor) -> None:
        """Take other matrices, both (V, D), with another number of rows V; of tied ones the first."""
        for module, weight in ((self.model["embed_tokens"], embed_tokens), (self.lm_head, lm_head)):
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        self.model["embed_tokens"].num_embeddings = self.lm_head.out_features = len(embed_tokens)
        self.config = dataclasses.replace(self.config, vocab_size=len(embed_tokens))
        self.tie_weights()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, initializer_range²) for every matrix, zero biases; norms stay 1: to train from scratch."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, self.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: MaybeTensor = None,
        mask: MaybeTensor = None,
    ) -> Tensor:
        """tokens (B, T) int64 -> (B, T, D): what `lm_head` reads, after the last norm. By default token t
        comes after tokens 0 .. t - 1, and after those in the cache. `positions` (B, T) and `mask` (B, 1, T,
        T) bool, true if a token (row) sees another (column), make a row a tree, not a line (and no cache)."""
        T, S, device = tokens.shape[1], cache.length if cache is not None else 0, tokens.device
        x = self.model["embed_tokens"](tokens).to(self.compute_dtype)  # (B, T, D)
        if mask is None and S and T > 1:
            # Trap: SDPA's `is_causal` aligns the triangle to the top left, which is wrong once the cache
            # holds S > 0 tokens. New token t, at position S + t, sees positions 0 .. S + t.
            mask = torch.ones(T, S + T, dtype=torch.bool, device=device).tril(S)
        if positions is None:
            positions = torch.arange(S, S + T, device=device)
        angles = positions[..., None].float() * rotary_frequencies(self.config, device)  # (…, T, head_dim/2)
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

    def forward(
        self,
        tokens: Tensor,
        targets: MaybeTensor = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T) int64, in the compute dtype.

        Given `targets` (B, T) int64, it is the mean NLL in nats per target instead. targets[b, t] is the
        token *after* tokens[b, t], so the caller has shifted them; -100 is left out. With `reduction` "none"
        it is the NLL of every target, (B, T) float32, 0 if one is left out, without gradients.
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
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> "Llama":
        """Load a checkpoint folder; `dtype=None` keeps each tensor's own. The model is built on `meta`,
        without memory, and then filled tensor by tensor. With `device="meta"` it stays there, and only names,
        shapes and dtypes are read. Raises UserError if weights and config do not fit."""
        with torch.device("meta"):
            model = cls(LlamaConfig.from_pretrained(directory))
        load_weights(model, Path(directory), dtype, device)
        return model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write `config.json` and the weights in each parameter's dtype, for us and for transformers."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_weights(directory, dict(self.named_parameters()), max_shard_bytes)
        dtype = str(self.compute_dtype).removeprefix("torch.")
        write_json(directory / "config.json", {**to_config_json(self.config), "torch_dtype": dtype})
