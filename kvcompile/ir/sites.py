"""Sites, the places where tokens meet: attentions and causal short convolutions, with every fact a kernel or a store needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the model.

    index:          position among the model's attentions in execution order; `layers:` in a spec counts these.
    path:           the module that owns it, `model.layers.3.self_attn`.
    scale:          factor on q.k before softmax.
    sliding_window: the model's own window: position p sees (p - sliding_window, p]; None when it has none.
    soft_cap:       logits become soft_cap * tanh(logits / soft_cap); None when the model has none.
    learnt_sinks:   one learnt logit a query head joins the softmax's denominator (gpt-oss).
    chunk_tokens:   position p sees only positions from p // chunk_tokens * chunk_tokens on; None: no such chunks.
    slopes:         one number a query head: slope * (key position - query position) joins the logit (ALiBi); () for none.
    chosen_tokens:  of the keys that it sees otherwise, a query sees so many that the model chooses (ir/choose_keys.py); None: all.
    compared:       numbers at the end of a key, counted in head_dim, that are there for this choice alone.
    dtype:          the dtype of query, key and value, as torch names it: "bfloat16".
    """

    index: int
    path: str
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    dtype: str
    sliding_window: int | None = None
    soft_cap: float | None = None
    learnt_sinks: bool = False
    chunk_tokens: int | None = None
    slopes: tuple[float, ...] = ()
    chosen_tokens: int | None = None
    compared: int = 0

    def __post_init__(self) -> None:
        assert len(self.slopes) in (0, self.query_heads)
        assert self.query_heads % self.kv_heads == 0, f"{self.path}: {self.query_heads} query heads over {self.kv_heads} KV heads"

    @property
    def queries_per_kv(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def own_window(self) -> int | None:
        """Tokens that the model itself ever looks back, the query's own included; None when nothing bounds them."""
        return min((bound for bound in (self.sliding_window, self.chunk_tokens) if bound), default=None)


@dataclass(frozen=True)
class ConvolutionSite:
    """One causal short convolution of the model, a filter for each channel, as hybrids of gated convolutions and attention have.

    index: position among the model's convolutions in execution order; attentions are counted apart.
    path:  the module that owns it, `model.layers.0.conv`.
    taps:  inputs that an output depends on, its own token's included; a session keeps the last taps - 1.
    dtype: the dtype of the input, as torch names it: "bfloat16".
    """

    index: int
    path: str
    channels: int
    taps: int
    dtype: str

    def __post_init__(self) -> None:
        assert self.channels >= 1 and self.taps >= 1, self
