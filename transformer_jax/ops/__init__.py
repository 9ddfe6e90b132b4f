"""Mathematics as pure functions on arrays; no modules, no parameters."""

from transformer_jax.ops.attention import attend, attention_weights
from transformer_jax.ops.losses import cross_entropy, linear_cross_entropy
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import LinearBias, alibi_slopes, rotary, rotary_angles, sinusoidal

__all__ = ["AttentionMask", "LinearBias", "alibi_slopes", "attend", "attention_weights", "cross_entropy",
           "linear_cross_entropy", "rotary", "rotary_angles", "sinusoidal"]
