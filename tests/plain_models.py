"""Three language models as people write them, with no thought of kvcompile: no import of it, no argument for it.

NanoGPT        its own arange, fused qkv, attention by hand: scores, a buffer of ones as mask, softmax, dropout
AlibiMQA       ALiBi, one key and value head for all queries, a mask made in forward
ParallelBlock  attention and MLP side by side from one fused projection, partial rotary positions, a window in every other layer
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(0.1)
        self.n_head = heads
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, block_size)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, vocabulary: int = 80, width: int = 48, heads: int = 4, layers: int = 2, block_size: int = 128) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([Block(width, heads, block_size) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class AlibiMQA(nn.Module):
    def __init__(self, vocabulary: int = 80, width: int = 48, heads: int = 6) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(vocabulary, width), heads
        self.q, self.kv, self.o = nn.Linear(width, width), nn.Linear(width, 2 * width // heads), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, heads + 1).float())

    def forward(self, ids: Tensor) -> Tensor:
        batch, tokens = ids.shape
        x = self.embed(ids)
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        where = torch.arange(tokens)
        bias = (where[None] - where[:, None]).clamp(max=0) * self.slopes[:, None, None]
        scores = q @ k[:, None].transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
        scores = scores + torch.full((tokens, tokens), -1e9).triu(1)
        attended = scores.softmax(-1) @ v[:, None]
        x = x + self.o(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return self.head(x + self.mlp(x))


class ParallelBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.norm, self.heads, self.window, self.dim = nn.LayerNorm(width), heads, window, width // heads
        self.fused = nn.Linear(width, 3 * width + 2 * width)
        self.out = nn.Linear(width + 2 * width, width)

    def rotate(self, x: Tensor, where: Tensor) -> Tensor:
        half = self.dim // 4  # half of the head is rotated, the rest is not
        angle = where[:, None] * 100.0 ** -(torch.arange(half) / half)
        one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin(), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v, gate = self.fused(self.norm(x)).split([width, width, width, 2 * width], -1)
        q, k, v = (each.view(batch, tokens, self.heads, self.dim).transpose(1, 2) for each in (q, k, v))
        where = torch.arange(tokens)
        distance = where[:, None] - where[None]
        mask = (distance >= 0) & (distance < self.window) if self.window else distance >= 0
        y = F.scaled_dot_product_attention(self.rotate(q, where), self.rotate(k, where), v, attn_mask=mask)
        return x + self.out(torch.cat([y.transpose(1, 2).reshape(batch, tokens, width), F.gelu(gate)], -1))


class ParallelFused(nn.Module):
    def __init__(self, vocabulary: int = 80, width: int = 64, heads: int = 4, windows: tuple[int, ...] = (0, 9)) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([ParallelBlock(width, heads, window) for window in windows])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
