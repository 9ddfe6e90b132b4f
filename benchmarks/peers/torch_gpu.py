"""The PyTorch side of the GPU benchmark: workers that answer with seconds (extra ``bench``)."""

from __future__ import annotations

import torch

from benchmarks.peers.torch_gpt import TorchGPT
from benchmarks.timing import timed
from transformer_jax.config import ModelConfig


def training(pipe, config: ModelConfig, batch_size: int, steps: int) -> None:
    """Worker that answers each message with the seconds of a training step in bfloat16, with a
    compiled model, fused attention and fused AdamW."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = TorchGPT(config).cuda()
    compiled = torch.compile(model)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=6e-4, betas=(0.9, 0.95), fused=True)
    tokens, targets = (torch.randint(config.vocab_size, (batch_size, config.max_len), device="cuda") for _ in range(2))

    def some_steps():
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    while pipe.recv():
        pipe.send(timed(some_steps) / steps)


def generation(pipe, config: ModelConfig) -> None:
    """Worker that receives a number of new tokens and answers with the seconds of their greedy
    generation by Hugging Face, in bfloat16 with batch size 1."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.model_dim, n_layer=config.num_layers,
        n_head=config.num_heads, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval().to("cuda", torch.bfloat16)
    prompt = torch.randint(1, config.vocab_size, (1, 8), device="cuda")

    def generate(new_tokens: int):
        with torch.no_grad():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                           min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        torch.cuda.synchronize()

    while new_tokens := pipe.recv():
        pipe.send(timed(lambda: generate(new_tokens)))
