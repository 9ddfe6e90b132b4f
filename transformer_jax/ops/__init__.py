"""The mathematics of transformers as pure functions on arrays, without modules or parameters."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.ops.attention import attend, attention_weights
    from transformer_jax.ops.kernels import Kernel, register_kernel
    from transformer_jax.ops.losses import cross_entropy, linear_cross_entropy
    from transformer_jax.ops.masks import AttentionMask
    from transformer_jax.ops.positions import (
        LinearBias,
        OffsetBias,
        PositionBias,
        alibi_slopes,
        sinusoidal,
    )
    from transformer_jax.ops.rotations import rotary, rotary_angles
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AttentionMask", "Kernel", "LinearBias", "OffsetBias", "PositionBias", "alibi_slopes", "attend",
    "attention_weights", "cross_entropy", "linear_cross_entropy", "register_kernel", "rotary", "rotary_angles",
    "sinusoidal",
]
