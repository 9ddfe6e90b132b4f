"""The peer of the benchmarks: a GPT in ordinary eager PyTorch, in the style of nanoGPT (extra ``bench``)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from transformer_jax.config import ModelConfig, OptimConfig


class SelfAttention(nn.Module):
    """Causal attention by PyTorch's fused kernel, one matrix for queries, keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim, bias=config.use_bias)
        self.output = nn.Linear(config.model_dim, config.model_dim, bias=config.use_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2)
                   for part in self.qkv(x).split(width, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim, bias=config.use_bias)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.model_dim, bias=config.use_bias)
        self.up = nn.Linear(config.model_dim, config.mlp_dim, bias=config.use_bias)
        self.down = nn.Linear(config.mlp_dim, config.model_dim, bias=config.use_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class TorchGPT(nn.Module):
    """Pre-norm, learned positions, exact GELU, tied embeddings: the shape of ``nanogpt-char-*``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.model_dim)
        self.position = nn.Embedding(config.max_len, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.model_dim, bias=config.use_bias)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                into_stream = name.endswith(("output.weight", "down.weight"))
                scale = 1 / math.sqrt(2 * config.num_layers) if into_stream else 1.0
                nn.init.normal_(parameter, std=config.init_std * scale)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.token.weight)
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def make_optimizer(model: TorchGPT, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices and embeddings only."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": config.weight_decay},
                              {"params": others, "weight_decay": 0.0}],
                             lr=config.peak_lr, betas=(config.beta1, config.beta2), eps=config.epsilon)


def train_step(model: TorchGPT, optimizer: torch.optim.Optimizer, clip_norm: float, rate: float, tokens: torch.Tensor,
               targets: torch.Tensor) -> float:
    """One update; the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
