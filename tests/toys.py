"""Toy models that tests share: small, seeded, float32, in eval mode.

llama, gpt_oss, gemma2, gemma3   transformers' classes with random weights
planted                          a sink and a retrieval head that can be lost, and the answer with them
nanogpt, gated, sliced_table, shared_values   plain modules on scaled_dot_product_attention
convolution                      a causal filter of each channel behind the last attention
centred_convolution, running_sum, pairs   what has to be refused; spelt_out: attention by hand
byte_tokenizer   for the models of 256 words
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _sizes(layers: int, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": query_heads * head_dim,
        "intermediate_size": 4 * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def llama(layers: int = 4, query_heads: int = 4, kv_heads: int = 2, head_dim: int = 16, seed: int = 0, **config: object) -> nn.Module:
    """A random Llama of transformers: GQA, rotary positions, 256 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**_sizes(layers, query_heads, kv_heads, head_dim), **config})).eval()


def gpt_oss(window: int = 8, seed: int = 0) -> nn.Module:
    """gpt-oss: learnt sinks at every head, a sliding layer and a full one, experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    config = GptOssConfig(
        **{**_sizes(2, 4, 2, 16), "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": window, "rope_scaling": None},
        layer_types=["sliding_attention", "full_attention"],
    )
    model = _louder(GptOssForCausalLM(config).eval())
    model.set_experts_implementation("batched_mm")  # the default sorts tokens by expert, which is refused
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    return model


def gemma2(window: int = 8, seed: int = 0) -> nn.Module:
    """Gemma 2: capped attention logits, a sliding layer and a full one, a scale that is not head_dim ** -0.5."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(seed)
    config = Gemma2Config(
        **{**_sizes(2, 4, 2, 16), "sliding_window": window, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 2},
        layer_types=["sliding_attention", "full_attention"],
    )
    model = _louder(Gemma2ForCausalLM(config).eval())
    model.set_attn_implementation("eager")  # transformers 5.17 chooses "sdpa", which leaves the cap out
    return model


def gemma3(window: int = 8, seed: int = 0) -> nn.Module:
    """Gemma 3: two sliding layers for each full one, normalised queries and keys, two rotary bases."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        **{**_sizes(3, 4, 2, 16), "sliding_window": window},
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    return _louder(Gemma3ForCausalLM(config).eval())


def lfm2(layer_types: str = "caacc", seed: int = 0, **config: object) -> nn.Module:
    """LFM2: causal short convolutions ("c") and attentions ("a") in turn.  Its default tiny config has no convolution (trap 42)."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(seed)
    kinds = ["conv" if letter == "c" else "full_attention" for letter in layer_types]
    sizes = {**_sizes(len(kinds), 4, 2, 16), "conv_L_cache": 4, "conv_bias": True, "block_auto_adjust_ff_dim": False}
    return _louder(Lfm2ForCausalLM(Lfm2Config(**{**sizes, "layer_types": kinds, **config})).eval())


def byte_tokenizer() -> Any:
    """A tokenizer of transformers for 256 words: bytes of UTF-8, 0 for padding, which is on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=letters[0], eos_token=letters[1], padding_side="left")


def _louder(model: nn.Module) -> nn.Module:
    """Random weights of 0.02 make attention nearly uniform; ten times that lets soft caps and windows matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.mul_(10)
    return model


class Planted(nn.Module):
    """One layer whose attention is written by hand: what it forgets, it answers wrongly.

    Words: START; NOISE; fact(i, c) "name i has code c"; ask(i) "name i?"; code(c), the answers; the rest is filler.
    KV head 0 retrieves: ask(i) looks for fact(i, .), whose value is code(c)'s logit.
    KV head 1 is held by a sink: every word looks for START, whose value takes NOISE's logit away.
    So ask(i) is answered by code(c) if both are remembered, by NOISE without the sink, by anything else without the fact.
    """

    NAMES = CODES = 8
    START, NOISE, WORDS, HEAD_DIM = 0, 1, 128, 16
    FILLER = 2 + 8 * 8 + 8 + 8

    def __init__(self, queries_per_kv: int = 2) -> None:
        super().__init__()
        self.query_heads, self.kv_heads = 2 * queries_per_kv, 2
        width = self.HEAD_DIM
        # one row a word; columns: KV head, then head_dim
        query, key, value = (torch.zeros(self.WORDS, 2, width) for _ in range(3))
        read = torch.zeros(2, width, self.WORDS)
        for name in range(self.NAMES):
            query[self.ask(name), 0, name] = 40.0
            for code in range(self.CODES):
                key[self.fact(name, code), 0, name] = 1.0
                value[self.fact(name, code), 0, code] = 1.0
        for code in range(self.CODES):
            read[0, code, self.code(code)] = 10.0
        query[:, 1, 0] = 40.0
        key[self.START, 1, 0] = 1.0
        value[self.START, 1, 0] = 1.0
        read[1, 0, self.NOISE] = -20.0
        per_query = [torch.repeat_interleave(rows, queries_per_kv, dim=dim) for rows, dim in ((query, 1), (read / queries_per_kv, 0))]
        self.query = nn.Embedding.from_pretrained(per_query[0].flatten(1))
        self.key = nn.Embedding.from_pretrained(key.flatten(1))
        self.value = nn.Embedding.from_pretrained(value.flatten(1))
        self.read = nn.Linear(self.query_heads * width, self.WORDS)
        with torch.no_grad():
            self.read.weight.copy_(per_query[1].flatten(0, 1).T)
            self.read.bias.zero_()
            self.read.bias[self.NOISE] = 20.0

    def forward(self, ids: Tensor) -> Tensor:
        query, key, value = (
            table(ids).unflatten(2, (heads, self.HEAD_DIM)).transpose(1, 2)
            for table, heads in ((self.query, self.query_heads), (self.key, 2), (self.value, 2))
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True)
        return self.read(out.transpose(1, 2).flatten(2))

    @classmethod
    def fact(cls, name: int, code: int) -> int:
        return 2 + name * cls.CODES + code

    @classmethod
    def ask(cls, name: int) -> int:
        return 2 + cls.NAMES * cls.CODES + name

    @classmethod
    def code(cls, code: int) -> int:
        return 2 + cls.NAMES * cls.CODES + cls.NAMES + code

    @classmethod
    def question(cls, name: int, code: int, before: int, after: int, seed: int = 0) -> Tensor:
        """START, filler, fact(name, code), filler, ask(name): ids [before + after + 3]."""
        filler = torch.randint(cls.FILLER, cls.WORDS, (before + after,), generator=torch.Generator().manual_seed(seed))
        edges = [torch.tensor([word]) for word in (cls.START, cls.fact(name, code), cls.ask(name))]
        return torch.cat([edges[0], filler[:before], edges[1], filler[before:], edges[2]])


def planted(queries_per_kv: int = 2) -> Planted:
    return Planted(queries_per_kv).eval()


class _NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class NanoGPT(nn.Module):
    """What people write by hand: a table of positions read by its own arange, LayerNorm, GELU, SDPA."""

    def __init__(self, layers: int, rows: int, width: int, heads: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(64, width), nn.Embedding(rows, width)
        self.blocks = nn.ModuleList(_NanoBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def nanogpt(layers: int = 2, rows: int = 64, width: int = 32, heads: int = 2, seed: int = 0) -> NanoGPT:
    torch.manual_seed(seed)
    return NanoGPT(layers, rows, width, heads).eval()


class _GatedBlock(nn.Module):
    """Attention and a gated product; `up_first` swaps the order in which two weights are used, not what is computed."""

    def __init__(self, width: int, inner: int, up_first: bool) -> None:
        super().__init__()
        self.up_first = up_first
        self.qkv, self.gate = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, inner, bias=False)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        if self.up_first:
            up = self.up(x)
            gate = self.gate(x)
        else:
            gate = self.gate(x)
            up = self.up(x)
        return x + self.down(F.silu(gate) * up)


class Gated(nn.Module):
    """Layers alike but for `inner` widths and the order in which their weights are used."""

    def __init__(self, inner: tuple[int, ...], up_first: tuple[bool, ...], width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(_GatedBlock(width, size, first) for size, first in zip(inner, up_first, strict=True))
        self.head = nn.Linear(width, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gated(inner: tuple[int, ...] = (16, 16, 16), up_first: tuple[bool, ...] | None = None, seed: int = 0) -> Gated:
    torch.manual_seed(seed)
    return Gated(inner, up_first or (False,) * len(inner)).eval()


class Mixed(nn.Module):
    """One attention, and `mix` of what it attended to: another way from token to token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(32, width), nn.Linear(width, 32)

    def mix(self, x: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.mix(x))


class Convolution(Mixed):
    """A causal convolution, as in Mamba, LFM2, Canon layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.conv = nn.Conv1d(width, width, 3, groups=width, padding=2)

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[:, :, :-2].transpose(1, 2)


class CentredConvolution(Convolution):
    """A convolution that looks at the token behind too."""

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[:, :, 1:-1].transpose(1, 2)


class RunningSum(Mixed):
    """The mean of all tokens so far."""

    def mix(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class SpeltOut(Mixed):
    """softmax(q k) v written out, with its own causal mask."""

    def mix(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return torch.softmax((x @ x.transpose(1, 2)).masked_fill(hidden, -torch.inf), dim=-1) @ x


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return Convolution().eval()


def centred_convolution() -> nn.Module:
    torch.manual_seed(0)
    return CentredConvolution().eval()


def running_sum() -> nn.Module:
    torch.manual_seed(0)
    return RunningSum().eval()


class Pairs(Mixed):
    """Every pair of tokens compared, without a softmax: linear attention as it is written for training."""

    def mix(self, x: Tensor) -> Tensor:
        return x + (x @ x.transpose(1, 2)).tril() @ x


def pairs() -> nn.Module:
    torch.manual_seed(0)
    return Pairs().eval()


def spelt_out() -> nn.Module:
    torch.manual_seed(0)
    return SpeltOut().eval()


class SlicedTable(Mixed):
    """Positions as tutorials add them: the first rows of a fixed table, `table[:, :tokens]`."""

    ROWS = 60

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.register_buffer("table", torch.randn(1, self.ROWS, width))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.table[:, : ids.shape[1]]
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        return self.head(x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2))


class SharedValues(nn.Module):
    """Two layers that read the same keys and values; in the first, queries are the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.key, self.query, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        key, value = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in (self.key(x), x))
        x = x + F.scaled_dot_product_attention(key, key, value, is_causal=True).transpose(1, 2).flatten(2)
        query = self.query(x).unflatten(2, (2, -1)).transpose(1, 2)
        return self.head(x + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))


def sliced_table() -> nn.Module:
    torch.manual_seed(0)
    return SlicedTable().eval()


def shared_values() -> nn.Module:
    torch.manual_seed(0)
    return SharedValues().eval()


class Sliced(nn.Module):
    """Linear layers that read part of another one's result or have a weight that lies in columns, and keys that are kept turned."""

    def __init__(self, vocabulary: int = 256, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(vocabulary, width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.up, self.middle, self.head = nn.Linear(width, 2 * width), nn.Linear(width, width), nn.Linear(width, vocabulary)
        self.middle.weight = nn.Parameter(self.middle.weight.detach().t().contiguous().t())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        shape = (*ids.shape, self.heads, -1)
        query, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.value))
        key = self.key(x).view(shape).permute(0, 2, 3, 1).contiguous().transpose(2, 3)
        x = x + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(x.shape)
        _, second = self.up(x).chunk(2, -1)
        return self.head(x + self.middle(second))


def sliced(seed: int = 0) -> Sliced:
    torch.manual_seed(seed)
    return Sliced().eval()
