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

from mala.cross_entropy import linear_cross_entropy, token_nll
from mala.storage.config_json import check_config, read_config, to_config_json
from mala.storage.files import write_json
from mala.storage.weights import MAX_SHARD_BYTES, load_weights, write_weights

MaybeTensor = Tensor | None
MaybePair = tuple[Tensor, Tensor] | None


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


def document_mask(tokens: Tensor, bos_id: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores (B, 1, T, T) if it stays in its document, which `bos_id` begins in
    the packed `tokens` (B, T): 0 or -inf. Positions go on counting: rotary ones tell distances only."""
    document = (tokens == bos_id).cumsum(1)  # (B, T), the number of each token's
    is_seen = (document[:, None, :, None] == document[:, None, None, :]).tril()
    return torch.zeros(is_seen.shape, dtype=dtype, device=tokens.device).masked_fill_(~is_seen, -torch.inf)


class KVCache:
    """Keys and values of the tokens that a model has seen, for all layers: not to be made again."""

    def __init__(self, model: "Llama", batch_size: int, max_tokens: int):
        shape = (batch_size, model.config.num_key_value_heads, max_tokens, model.config.head_dim)
        options = {"dtype": model.compute_dtype, "device": model.lm_head.weight.device}
        self.keys = [torch.empty(shape, **options) for _ in model.model["layers"]]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length, self.max_tokens = 0, max_tokens  # tokens seen, S, and how many there may be

    def extend(self, T: int) -> list[tuple[Tensor, Tensor]]:
        """Make room for T tokens: each layer's keys and values (B, K, S+T, head_dim), the last T to write."""
        end = self.length + T
        if end > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens, {end} were given")
        self.length = end
        return [(keys[:, :, :end], values[:, :, :end]) for keys, values in zip(self.keys, self.values)]


class Embedding(nn.Embedding):
    """Rows of a matrix (V, D). With `into_grad` their gradients are added to the rows of `weight.grad` alone,
    where PyTorch would make a second (V, D) and add all of it."""

    def forward(self, tokens: Tensor, into_grad: bool = False) -> Tensor:
        lookup = _Lookup.apply if into_grad and self.weight.requires_grad else F.embedding
        x, rows = lookup(tokens, self.weight), getattr(self, "token_adapter", None)
        return x if rows is None else rows(x, tokens)  # if only some train: TrainedRows in mala/lora.py


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.tokens, ctx.weight = tokens, weight
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        if gradient.is_cuda:  # Trap: only there index_put_ adds in order, and index_add_ only on a CPU
            ctx.weight.grad.index_put_((ctx.tokens,), gradient, accumulate=True)
        else:
            ctx.weight.grad.index_add_(0, ctx.tokens.flatten(), gradient.flatten(0, -2))
        return None, None


class Linear(nn.Linear):
    """nn.Linear in the dtype of its input: a weight that trains is float32, and cast here."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


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
        # A single new token sees all that the cache holds. (A compiler's T > 1 is no bool, but can be asked.)
        is_causal = True if mask is None and T > 1 else False
        is_gqa = self.K != self.H
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_gqa)
        y = y.transpose(1, 2).reshape(B, T, self.H * self.head_dim)  # heads side by side again
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202), down(silu(gate(x)) * up(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), and to that + mlp(norm of it): (B, T, D) -> (B, T, D)."""

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
    """A decoder-only transformer. `requires_grad` and dtypes of its parameters are the caller's to set."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.recomputed_blocks = 0  # of the first so many the backward pass has the inputs, no more
        self.computes_in: torch.dtype | None = None  # if all weights train, which are float32 then
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which a block computes: that of the frozen weights, if there are any."""
        return self.computes_in or self.model["layers"][0].mlp.down_proj.weight.dtype

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

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: MaybeTensor = None,
        mask: MaybeTensor = None,
        into_grad: bool = False,
    ) -> Tensor:
        """tokens (B, T) int64 -> (B, T, D), what `lm_head` reads. By default token t comes after tokens 0 ..
        t - 1, and after the S in the cache. Another order is told by `positions` (B, T) and `mask` (B, 1, T,
        S+T), true if a token (row) sees another (column), or what is added to its score."""
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
        """Logits (B, T, V) of the token after each of `tokens` (B, T) int64, in the compute dtype.

        Given `targets` (B, T) int64, it is the mean NLL in nats per target instead. targets[b, t] is the
        token *after* tokens[b, t], so the caller has shifted them; -100 is left out. With `places` (N,) it is
        the NLL of each of `targets` (N,), float32, without gradients; target n comes after token t of row b
        if places[n] is b·T + t. `share` is that of a micro-batch in its step, see `linear_cross_entropy`; for
        training as train.py does it. order: cache, positions and mask, for `hidden_states`.
        """
        x = self.hidden_states(tokens, into_grad=share is not None, **order)  # (B, T, D)
        rows = getattr(self.lm_head, "token_adapter", None)
        if rows is not None:
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
        """Load a checkpoint folder, see `load_weights`; `dtype=None` keeps each tensor's own. On "meta" only
        names, shapes and dtypes are read. Raises UserError if weights and config do not fit."""
        with torch.device("meta"):
            model = cls(LlamaConfig.from_pretrained(directory))
        load_weights(model, Path(directory), dtype, device)
        return model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write `config.json` and the weights in each parameter's dtype, for us and for transformers."""
        directory = Path(directory)
        write_weights(directory, dict(self.named_parameters()), max_shard_bytes)
        dtype = str(self.compute_dtype).removeprefix("torch.")
        write_json(directory / "config.json", {**to_config_json(self.config), "torch_dtype": dtype})
