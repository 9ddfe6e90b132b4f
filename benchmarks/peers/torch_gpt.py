"""The PyTorch side of the benchmarks: a GPT in eager PyTorch, in the style of nanoGPT (extra
``bench``).

python -m benchmarks.peers.torch_gpt input.txt    runs nanoGPT's CPU recipe: 2,000 steps, then the validation loss
"""

from __future__ import annotations

import math
import pathlib
import sys

import torch
from torch import nn
from torch.nn import functional

from transformer_jax import presets
from transformer_jax.config import ModelConfig, OptimConfig


class SelfAttention(nn.Module):
    """Causal attention with PyTorch's fused kernel, and one matrix for queries, keys and values."""

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
    """A pre-norm Transformer block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim, bias=config.use_bias)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.model_dim, bias=config.use_bias)
        self.up = nn.Linear(config.model_dim, config.mlp_dim, bias=config.use_bias)
        self.down = nn.Linear(config.mlp_dim, config.model_dim, bias=config.use_bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate=self.approximate))


class TorchGPT(nn.Module):
    """A GPT with pre-norm, learned positions, GELU and tied embeddings, like ``nanogpt-char-*`` and
    ``gpt2-*``."""

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
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.token.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


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


def main(path: str) -> None:
    """Trains on random windows of the first nine tenths of a text and evaluates on the whole last
    tenth."""
    text = pathlib.Path(path).read_text()
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([numbers[character] for character in text])
    cut = int(0.9 * len(tokens))
    config = presets.get("nanogpt-char-cpu").replace(vocab_size=len(characters))
    optim = OptimConfig(peak_lr=1e-3, beta2=0.99, weight_decay=0.1)
    torch.manual_seed(1337)
    model = TorchGPT(config)
    optimizer = make_optimizer(model, optim)
    steps, batch_size, length = 2000, 12, config.max_len
    for step in range(steps):
        starts = torch.randint(cut - length - 1, (batch_size,))
        windows = torch.stack([tokens[start:start + length + 1] for start in starts])
        warmup, progress = (step + 1) / 100, (step - 100) / (steps - 100)
        rate = warmup if warmup < 1 else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        train_step(model, optimizer, 1.0, optim.peak_lr * rate, windows[:, :-1], windows[:, 1:])
    held_out = tokens[cut:]
    count = (len(held_out) - 1) // length
    inputs = held_out[:count * length].view(count, length)
    targets = held_out[1:count * length + 1].view(count, length)
    with torch.no_grad():
        losses = [model(x, y).item() * len(x) for x, y in zip(inputs.split(128), targets.split(128), strict=True)]
    print(f"validation loss {sum(losses) / count:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
