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
    (Hu et al., 2024) stays at the peak and decays linearly over the last ``decay_fraction`` of the
    steps.

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
            return peak * (warmup / (warmup + 1 + step)) ** 0.5
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, alpha=config.end_lr)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, end, after)
    elif config.schedule == "wsd":
        decay_steps = min(max(int(config.decay_fraction * steps), 1), after)
        decay = optax.linear_schedule(peak, end, decay_steps, transition_begin=after - decay_steps)
    else:
        decay = optax.constant_schedule(peak)
    if warmup == 0:
        return decay
    # The first step already learns: step 0 has 1/warmup of the peak.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), decay], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer with decay on matrices and embeddings only.

    ``muon`` (Jordan et al., 2024) orthogonalises the updates of the hidden matrices, at
    ``muon_lr``, and leaves embeddings, norms and biases to AdamW at ``peak_lr``. The decay of
    ``sgd`` is added to the gradient (L2), that of all others to the update (Loshchilov and Hutter,
    2019).
    """
    rate = make_schedule(config, steps)
    adamw = optax.adamw(rate, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay,
                        mask=decay_mask)
    if config.name == "adamw":
        chain = adamw
    elif config.name == "lion":
        chain = optax.lion(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
    elif config.name == "adafactor":
        # optax subtracts weight_decay_rate itself, not times the learning rate; keep the meaning of
        # the others.
        chain = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False, min_dim_size_to_factor=32),
            optax.add_decayed_weights(-config.weight_decay, mask=decay_mask),
            optax.scale_by_schedule(rate))
    elif config.name == "sgd":
        chain = optax.chain(optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
                            optax.sgd(rate, momentum=config.beta1, nesterov=True))
    else:
        # optax's muon has an AdamW of its own, which would decay biases and norms too.
        muon = optax.contrib.muon(make_schedule(config, steps, config.muon_lr), weight_decay=config.weight_decay,
                                  muon_weight_dimension_numbers=_muon_dimensions)
        chain = optax.partition({True: muon, False: adamw}, _is_hidden_matrix)
    return chain if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), chain)


def _by_parameter(function, params: Any) -> Any:
    return jax.tree.map(lambda p: p.replace(function(p)), params, is_leaf=lambda p: isinstance(p, nnx.Variable))


def decay_mask(params: Any) -> Any:
    """True for matrices and embeddings: parameters with two named axes."""
    return _by_parameter(lambda p: len(p.axes) >= 2, params)


def _is_hidden_matrix(params: Any) -> Any:
    """True for the stacked matrices [L, in, out] of the layers."""
    return _by_parameter(lambda p: len(p.axes) == 2 and p.ndim == 3, params)


def _muon_dimensions(params: Any) -> Any:
    # The parameters of AdamW are masked out here: no leaf, no dimensions.
    return _by_parameter(lambda p: optax.contrib.MuonDimensionNumbers(-2, -1) if jax.tree.leaves(p) else None, params)
