"""Make optax optimizers and learning rate schedules from an ``OptimConfig``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from transformer_jax.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Makes a learning rate schedule: a linear warmup to the peak, then the configured decay.

    The schedule ``noam`` (Vaswani et al., 2017, equation 3) is scaled so that its peak is
    ``peak_lr``. The schedule ``wsd`` (Hu et al., 2024) stays at the peak, and decays linearly over
    the last ``decay_fraction`` of the steps.

    Args:
      config: the settings of the optimizer.
      steps: the number of steps of the run.
      peak: the peak learning rate; ``None`` for ``config.peak_lr``.

    Returns:
      A function from the number of a step, starting at 0, to the learning rate.
    """
    peak = config.peak_lr if peak is None else peak
    warmup, end = config.warmup_steps, config.end_lr * peak
    after = max(steps - warmup, 1)
    if config.schedule == "noam":
        decay: optax.Schedule = lambda step: peak * (warmup / (warmup + 1 + step)) ** 0.5
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
    # Step 0 has 1/warmup of the peak and not 0, so that the first step already changes the weights.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), decay], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Makes an optimizer that clips gradients by their global norm and applies weight decay.

    Weight decay applies to matrices and embeddings only. ``sgd`` adds it to the gradient (L2
    regularisation); all other optimizers add it to the update (Loshchilov and Hutter, 2019).

    With ``adamw``, the updates of a parameter that stores a factor of its learning rate, as those of a
    model with ``mup`` do, are multiplied by this factor. Weight decay is not.

    ``muon`` (Jordan et al., 2024) orthogonalises the updates of the hidden matrices, with the
    learning rate ``muon_lr``. AdamW updates embeddings, norms and biases, with ``peak_lr``.

    Args:
      config: the settings of the optimizer.
      steps: the number of steps of the run, for the learning rate schedule.

    Returns:
      An optax transformation.
    """
    rate = make_schedule(config, steps)
    decay = (optax.masked(_layered_decay(config), decay_mask) if config.layer_weight_decay else
             optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    # With either decay, the state has the structure of that of optax.adamw, so that a branch of a run
    # can start from its checkpoint.
    adamw = optax.chain(_with_own_rates(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)), decay,
                        optax.scale_by_learning_rate(rate))
    if config.name == "adamw":
        chain = adamw
    elif config.name == "lion":
        chain = optax.lion(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
    elif config.name == "adafactor":
        # The weight_decay_rate of optax.adafactor is not multiplied by the learning rate. This
        # chain gives weight_decay the same meaning as for the other optimizers.
        chain = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False, min_dim_size_to_factor=32),
            optax.add_decayed_weights(-config.weight_decay, mask=decay_mask),
            optax.scale_by_schedule(rate))
    elif config.name == "sgd":
        chain = optax.chain(optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
                            optax.sgd(rate, momentum=config.beta1, nesterov=True))
    else:
        # The muon of optax includes an AdamW, but that would also decay biases and norms.
        muon = optax.contrib.muon(make_schedule(config, steps, config.muon_lr), weight_decay=config.weight_decay,
                                  muon_weight_dimension_numbers=_muon_dimensions)
        chain = optax.partition({True: muon, False: adamw}, _is_hidden_matrix)
    return chain if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), chain)


def _with_own_rates(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Multiplies the updates of each parameter by the factor of its learning rate."""

    def scaled(variable: Any) -> Any:
        rate = getattr(variable, "rate", 1.0)  # only a parameter with another factor stores it
        return variable if rate == 1.0 else jax.tree.map(lambda update: rate * update, variable)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transformation.update(updates, state, params)
        return jax.tree.map(scaled, updates, is_leaf=lambda node: isinstance(node, nnx.Variable)), state

    return optax.GradientTransformation(transformation.init, update)


def _layered_decay(config: OptimConfig) -> optax.GradientTransformation:
    """Adds to the updates the weights times the weight decay of their layer."""

    def decayed(update: jax.Array, weight: jax.Array) -> jax.Array:
        factor: Any = config.weight_decay
        if weight.ndim == 3:  # the matrices of the layers are stacked as [L, in, out]
            if weight.shape[0] != len(config.layer_weight_decay):
                raise ValueError(f"optim.layer_weight_decay has {len(config.layer_weight_decay)} numbers; expected one "
                                 f"for each of the {weight.shape[0]} layers")
            factor = jnp.asarray(config.layer_weight_decay, weight.dtype)[:, None, None]
        return update + factor * weight

    return optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params))


def _by_parameter(function, params: Any) -> Any:
    """Replaces the value of every parameter by ``function(parameter)``."""
    return jax.tree.map(lambda p: p.replace(function(p)), params, is_leaf=lambda p: isinstance(p, nnx.Variable))


def decay_mask(params: Any) -> Any:
    """Returns True for every parameter with at least two named axes: matrices and embeddings."""
    return _by_parameter(lambda p: len(p.axes) >= 2, params)


def _is_hidden_matrix(params: Any) -> Any:
    """Returns True for the matrices of the layers, which are stacked as ``[L, in, out]``, and for
    those of experts ``[L, E, in, out]``."""
    return _by_parameter(lambda p: len(p.axes) >= 2 and p.ndim == len(p.axes) + 1, params)


def _muon_dimensions(params: Any) -> Any:
    """Returns the input and output dimensions of every matrix that muon updates."""
    # optax removes the leaves of the parameters that AdamW updates; these have no dimensions.
    return _by_parameter(lambda p: optax.contrib.MuonDimensionNumbers(-2, -1) if jax.tree.leaves(p) else None, params)
