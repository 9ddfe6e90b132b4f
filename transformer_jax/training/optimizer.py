"""optax chains and learning rate schedules from an OptimConfig."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib
from flax import nnx

from transformer_jax.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate by step: linear warmup to ``peak_lr``, then the named decay.

    ``noam`` (Vaswani et al., 2017, equation 3) is scaled so that it peaks at ``peak_lr``; ``wsd``
    (Hu et al., 2024) stays at the peak and decays linearly over the last ``decay_fraction`` of the steps.

    Args:
      config: the optimizer's settings.
      steps: length of the run.
      peak: another peak than ``config.peak_lr``.
    """
    peak = config.peak_lr if peak is None else peak
    warmup, end = config.warmup_steps, config.end_lr * peak
    after = max(steps - warmup, 1)
    if config.schedule == "noam":
        def decay(step):
            return peak * (warmup / (step + warmup)) ** 0.5
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, alpha=config.end_lr)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, end, after)
    elif config.schedule == "wsd":
        decay_steps = max(int(config.decay_fraction * steps), 1)
        decay = optax.linear_schedule(peak, end, decay_steps, transition_begin=max(after - decay_steps, 0))
    else:
        decay = optax.constant_schedule(peak)
    if warmup == 0:
        return decay
    # The first step already learns: step 0 has 1/warmup of the peak.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), decay], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer with decay on matrices and embeddings only.

    ``muon`` (Jordan et al., 2024) orthogonalises the updates of the hidden matrices, at ``muon_lr``, and leaves
    embeddings, norms and biases to AdamW at ``peak_lr``.
    """
    rate = make_schedule(config, steps)
    if config.name == "adamw":
        chain = optax.adamw(rate, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay,
                            mask=decay_mask)
    elif config.name == "lion":
        chain = optax.lion(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
    elif config.name == "adafactor":
        # optax subtracts weight_decay_rate itself, not times the learning rate; keep the meaning of the others.
        chain = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False, min_dim_size_to_factor=32),
            optax.add_decayed_weights(-config.weight_decay, mask=decay_mask),
            optax.scale_by_schedule(rate))
    elif config.name == "sgd":
        chain = optax.chain(optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
                            optax.sgd(rate, momentum=config.beta1, nesterov=True))
    else:
        chain = optax.contrib.muon(
            make_schedule(config, steps, config.muon_lr), adam_learning_rate=rate, adam_b1=config.beta1,
            adam_b2=config.beta2, weight_decay=config.weight_decay, adam_weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask, muon_weight_dimension_numbers=_muon_dimensions)
    return chain if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), chain)


def _by_parameter(function, params: Any) -> Any:
    return jax.tree.map(lambda p: p.replace(function(p)), params, is_leaf=lambda p: isinstance(p, nnx.Variable))


def decay_mask(params: Any) -> Any:
    """True for matrices and embeddings: parameters with two named axes."""
    return _by_parameter(lambda p: len(p.axes) >= 2, params)


def _muon_dimensions(params: Any) -> Any:
    def dimensions(p: nnx.Variable) -> optax.contrib.MuonDimensionNumbers | None:
        # optax hands in trees with the leaves of the other group masked out: no leaf, no dimensions.
        stacked_matrix = any(len(p.axes) == 2 and leaf.ndim == 3 for leaf in jax.tree.leaves(p))
        return optax.contrib.MuonDimensionNumbers(-2, -1) if stacked_matrix else None

    return _by_parameter(dimensions, params)
