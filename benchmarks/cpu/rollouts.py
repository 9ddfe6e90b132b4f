"""The log probabilities of a sampler beside those of a trainer; run by ``python -m benchmarks
rollouts``.

``tj.generate`` draws tokens one after the other, with a cache, and returns the log probability of
each. A trainer computes them again in one pass over the whole text. Reinforcement learning assumes
that both are equal; the ratio of the probabilities shows how far they are.
"""

from __future__ import annotations

import jax
import numpy as np

import transformer_jax as tj
from transformer_jax.models.functional import make_model

_CONFIGS = {
    "0.8M": tj.presets.get("nanogpt-char-cpu").replace(max_len=256, num_layers=4, model_dim=128),
    "GPT-2 124M": tj.presets.get("gpt2-small"),
    "Llama of 4 layers x 256": tj.ModelConfig(vocab_size=4096, max_len=256, num_layers=4, num_heads=8, num_kv_heads=2,
                                              model_dim=256, positions="rope", norm="rmsnorm", activation="swiglu"),
}
_ROWS, _PROMPT, _NEW = 16, 16, 64


def rollouts() -> list[dict]:
    """Samples texts with random weights, and computes their log probabilities again.

    Returns:
      For each model and type, the largest and the mean absolute difference of the log probabilities
      in nats, and the range of the ratios of the probabilities.
    """
    return [_compare(name, dtype) for name in _CONFIGS for dtype in ("float32", "bfloat16")]


def _compare(name: str, dtype: str) -> dict:
    """Measures one model in one type."""
    config = _CONFIGS[name].replace(dtype=dtype, init_std=0.08)
    model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(1, config.vocab_size, (_ROWS, _PROMPT)).tolist()
    result = tj.generate(model, prompts, key=jax.random.key(1), max_new_tokens=_NEW, end_ids=[])
    tokens = np.array([[*prompt, *new] for prompt, new in zip(prompts, result.tokens, strict=True)])
    log_p = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens[:, :-1]).logits))(model, tokens)
    trained = np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], -1)[:, _PROMPT - 1:, 0]
    difference = trained - np.asarray(result.logprobs)
    return {"model": name, "dtype": dtype, "tokens": str(difference.size),
            "largest difference": float(np.abs(difference).max()),
            "mean difference": float(np.abs(difference).mean()),
            "lowest ratio": float(np.exp(difference.min())), "highest ratio": float(np.exp(difference.max()))}
