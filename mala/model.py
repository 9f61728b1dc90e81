"""The LLaMA model, for training and scoring.

Notable features:
- RMSNorm before attention and before the MLP, rotary positions, SwiGLU; biases only if the config asks
- grouped-query attention: each of K key/value heads serves H / K query heads
- rotary scaling `linear` and `llama3`, as transformers 4 or 5 writes it in config.json
- `forward` computes the loss, so the caller never holds the logits of a training step
- mixed dtypes: blocks compute in the frozen weights' dtype; trained weights are float32, cast when used

Parameters are named as in checkpoint files: `model.layers.0.self_attn.q_proj.weight`, `lm_head.weight`.
Shapes: B batch, T tokens, S cached tokens, D hidden size, H query heads, K key/value heads, V vocabulary.
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

from mala.cross_entropy import linear_cross_entropy, token_nll
from mala.storage.config_json import check_config, read_config, to_config_json
from mala.storage.files import write_json
from mala.storage.weights import MAX_SHARD_BYTES, load_weights, write_weights

MaybeTensor = Tensor | None
MaybePair = tuple[Tensor, Tensor] | None


@dataclass
class LlamaConfig:
    """The architecture of a model. The fields are named as in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: num_attention_heads
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
        """Read `config.json`. Raises UserError if it describes a model that this file does not implement."""
        return read_config(Path(directory) / "config.json", cls)


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Return the angle in radians per position of each pair of a head's dimensions: (head_dim / 2,) float32.

    RoFormer (arXiv 2104.09864), section 3.2: theta_i = base^(-2i / head_dim). `linear` scaling divides every
    angle by the factor. `llama3` scaling divides the slow ones, which make at most low_freq_factor turns in
    the original context. It keeps those that make at least high_freq_factor turns, and interpolates between.
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
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: keep the angle; 0: divide it
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions (i, i + head_dim / 2), Hugging Face's pairing, by its angle. It computes
    in float32 and rounds once. x: (B, heads, T, head_dim). cos, sin: (T, head_dim / 2) float32, or
    (B, 1, T, head_dim / 2) if the rows of the batch have different positions."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def document_mask(tokens: Tensor, bos_id: int, dtype: torch.dtype) -> Tensor:
    """Return what to add to attention scores, 0 or -inf, so that a token sees its document up to itself:
    (B, 1, T, T). `bos_id` begins documents in `tokens` (B, T). Rotary positions need no restart."""
    document = (tokens == bos_id).cumsum(1)  # (B, T), the number of each token's document
    is_seen = (document[:, None, :, None] == document[:, None, None, :]).tril()
    return torch.zeros(is_seen.shape, dtype=dtype, device=tokens.device).masked_fill_(~is_seen, -torch.inf)


class KVCache:
    """The keys and values of the tokens read so far, in every layer, so that none is computed twice."""

    def __init__(self, model: "Llama", batch_size: int, max_tokens: int):
        shape = (batch_size, model.config.num_key_value_heads, max_tokens, model.config.head_dim)
        options = {"dtype": model.compute_dtype, "device": model.lm_head.weight.device}
        self.keys = [torch.empty(shape, **options) for _ in model.model["layers"]]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length, self.max_tokens = 0, max_tokens  # S and its upper limit

    def extend(self, T: int) -> list[tuple[Tensor, Tensor]]:
        """Make room for T tokens. Return keys and values (B, K, S+T, head_dim) by layer, the last T unset."""
        end = self.length + T
        if end > self.max_tokens:
            raise ValueError(f"the cache has room for {self.max_tokens} tokens, but {end} were given")
        self.length = end
        return [(keys[:, :, :end], values[:, :, :end]) for keys, values in zip(self.keys, self.values)]


class Embedding(nn.Embedding):
    """An embedding matrix (V, D). With `into_grad`, backward adds gradients only to the looked-up rows of
    `weight.grad`. PyTorch would allocate a second (V, D) matrix for them and add all of it."""

    def __init__(self, V: int, D: int):
        super().__init__(V, D)
        self.register_module("token_adapter", None)  # TrainedRows of mala/lora.py, if only some rows train

    def forward(self, tokens: Tensor, into_grad: bool = False) -> Tensor:
        lookup = _Lookup.apply if into_grad and self.weight.requires_grad else F.embedding
        x = lookup(tokens, self.weight)
        return x if self.token_adapter is None else self.token_adapter(x, tokens)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.tokens, ctx.weight = tokens, weight
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        if gradient.is_cuda:  # Trap: index_put_ adds in a fixed order only on CUDA, index_add_ only on a CPU
            ctx.weight.grad.index_put_((ctx.tokens,), gradient, accumulate=True)
        else:
            ctx.weight.grad.index_add_(0, ctx.tokens.flatten(), gradient.flatten(0, -2))
        return None, None


class Linear(nn.Linear):
    """nn.Linear that casts its weight to the input's dtype, because a weight that trains is float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """RMS normalisation, x / sqrt(mean(x²) + eps) * weight (arXiv 1910.07467, eq. 4): (…, D) -> (…, D)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)  # the only rounding


class Attention(nn.Module):
    """Causal grouped-query self-attention (arXiv 2305.13245): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.H, self.K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, D, bias = config.head_dim, config.hidden_size, config.attention_bias
        self.q_proj = Linear(D, self.H * self.head_dim, bias=bias)
        self.k_proj = Linear(D, self.K * self.head_dim, bias=bias)
        self.v_proj = Linear(D, self.K * self.head_dim, bias=bias)
        self.o_proj = Linear(self.H * self.head_dim, D, bias=bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: MaybeTensor = None, cached: MaybePair = None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.head_dim).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_proj(x).view(B, T, self.K, self.head_dim).transpose(1, 2)  # (B, K, T, head_dim)
        v = self.v_proj(x).view(B, T, self.K, self.head_dim).transpose(1, 2)  # (B, K, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cached is not None:
            cached[0][:, :, -T:], cached[1][:, :, -T:] = k, v
            k, v = cached  # (B, K, S+T, head_dim) each
        # A single new token sees the whole cache. (`if … else` makes a bool: compiled, T > 1 is symbolic.)
        is_causal = True if mask is None and T > 1 else False
        is_gqa = self.K != self.H
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_gqa)
        y = y.transpose(1, 2).reshape(B, T, self.H * self.head_dim)  # concatenate the heads
        return self.o_proj(y)


class MLP(nn.Module):
    """The SwiGLU MLP (arXiv 2002.05202), down(silu(gate(x)) * up(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A Transformer block, x + attention(norm(x)) and then x + mlp(norm(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: MaybeTensor = None, cached: MaybePair = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only Transformer. The caller sets the dtypes and `requires_grad` of its parameters."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.recomputed_blocks = 0  # how many blocks, from the first on, use gradient checkpointing
        self.computes_in: torch.dtype | None = None  # set if every weight trains and is float32
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.register_module("token_adapter", None)
        self.lora_config, self.lora_saved = None, ()  # set by `add_lora`
        self.tie_weights()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which blocks compute: `computes_in`, or else the dtype of the frozen weights."""
        return self.computes_in or self.model["layers"][0].mlp.down_proj.weight.dtype

    def tie_weights(self) -> None:
        """Make `embed_tokens` and `lm_head` share one matrix if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def replace_vocabulary(self, embed_tokens: Tensor, lm_head: Tensor) -> None:
        """Replace both matrices by others, (V, D) each. In a tied model `embed_tokens` serves as both."""
        for module, weight in ((self.model["embed_tokens"], embed_tokens), (self.lm_head, lm_head)):
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        self.model["embed_tokens"].num_embeddings = self.lm_head.out_features = len(embed_tokens)
        self.config = dataclasses.replace(self.config, vocab_size=len(embed_tokens))
        self.tie_weights()

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: MaybeTensor = None,
        mask: MaybeTensor = None,
        into_grad: bool = False,
    ) -> Tensor:
        """Return the vectors (B, T, D) that `lm_head` reads. `tokens` is (B, T) int64, and by default they
        continue the S cached tokens in order. For another order give `positions` (B, T) and `mask` (B, 1, T,
        S+T): either boolean, true where a row sees a column, or float, added to the attention scores."""
        T, S, device = tokens.shape[1], cache.length if cache is not None else 0, tokens.device
        x = self.model["embed_tokens"](tokens, into_grad).to(self.compute_dtype)  # (B, T, D)
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
        cached = cache.extend(T) if cache is not None else [None] * self.config.num_hidden_layers
        for layer, block in enumerate(self.model["layers"]):
            if layer < self.recomputed_blocks and torch.is_grad_enabled():
                x = recompute(block, x, cos, sin, mask, cached[layer], use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cached[layer])
        return self.model["norm"](x)

    def forward(
        self,
        tokens: Tensor,
        targets: MaybeTensor = None,
        places: MaybeTensor = None,
        share: float | None = None,
        **order: Any,
    ) -> Tensor:
        """Return logits (B, T, V) for the token after each of `tokens` (B, T) int64, in the compute dtype.

        - targets: (B, T) int64. Return the mean NLL in nats per target instead of logits. targets[b, t] is
          the token *after* tokens[b, t], so the caller shifts them; -100 is left out.
        - places: (N,) int64. Return the NLL of each of N targets instead, (N,) float32, without gradients.
          Then `targets` is (N,), and targets[n] comes after token t of row b if places[n] is b·T + t.
        - share: the micro-batch's share of its training step, see `linear_cross_entropy`.
        - order: cache, positions and mask, see `hidden_states`.
        """
        x = self.hidden_states(tokens, into_grad=share is not None, **order)  # (B, T, D)
        if (rows := self.lm_head.token_adapter) is not None:
            rows.put_into(self.lm_head.weight)
        if targets is None:
            return F.linear(x, self.lm_head.weight.to(x.dtype))
        x = x.flatten(0, 1)  # (B, T, D) -> (B·T, D)
        if places is not None:
            return token_nll(x[places], self.lm_head.weight, targets)
        only = None if rows is None else (rows.trainable_tokens_delta, rows.index)
        return linear_cross_entropy(x, self.lm_head.weight, targets.flatten(), share=share, only=only)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> "Llama":
        """Load a checkpoint folder, see `load_weights`. dtype None keeps each tensor's own. On the device
        "meta" only names, shapes and dtypes are read. Raises UserError if weights and config do not fit."""
        with torch.device("meta"):
            model = cls(LlamaConfig.from_pretrained(directory))
        load_weights(model, Path(directory), dtype, device)
        return model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write `config.json` and the weights, each in its own dtype, in the format of transformers."""
        directory = Path(directory)
        write_weights(directory, dict(self.named_parameters()), max_shard_bytes)
        dtype = str(self.compute_dtype).removeprefix("torch.")
        write_json(directory / "config.json", {**to_config_json(self.config), "torch_dtype": dtype})
