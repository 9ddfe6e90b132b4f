"""Linear probes: what can be read from activations, with cross-validation, a control task and
confidence intervals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, Shaped

from transformer_jax.inspection.parts import check_count

_MOST_STEPS, _TOLERANCE = 300, 1e-5


@dataclasses.dataclass(frozen=True)
class Probed:
    """How well a linear probe predicts labels of examples that it was not fitted to.

    Attributes:
      accuracy: the fraction of examples that are predicted right, each by the probe of the fold that
        left it out.
      interval: a 95 % confidence interval of the accuracy (Wilson, 1927), as if the examples were
        independent.
      control_accuracy: the accuracy of the same probe for random labels; NaN without a control task.
      majority: the fraction of examples that have the most frequent label.
      weights: the weights of the probe that is fitted to all examples, ``[D, C]``.
      bias: its bias, ``[C]``.
      features: the indices of the features that it reads, by their rank, ``[k]``; ``None`` if it
        reads all.
    """

    accuracy: float
    interval: tuple[float, float]
    control_accuracy: float
    majority: float
    weights: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, " C"]
    features: Int[np.ndarray, " k"] | None

    @property
    def selectivity(self) -> float:
        """The accuracy minus that of the control task (Hewitt and Liang, 2019)."""
        return self.accuracy - self.control_accuracy


def probe(features_ND: Float[Array | np.ndarray, "N D"], labels_N: Shaped[np.ndarray, " N"], *, folds: int = 5,
          l2: float = 1.0, k: int | None = None, types_N: Shaped[np.ndarray, " N"] | None = None,
          seed: int = 0) -> Probed:
    """Fits a logistic regression to labels, and measures it by cross-validation.

    The features are standardized with the mean and the deviation of the examples that the probe is
    fitted to. All folds share one compiled program.

    Source: Alain and Bengio (2016); the control task: Hewitt and Liang (2019); k-sparse probes:
    Gurnee et al. (2023).

    Args:
      features_ND: the activations of N examples.
      labels_N: their labels, of any type.
      folds: the number of parts of the examples; each is predicted by a probe that is fitted to the
        others.
      l2: the weight of half the squared norm of the weights, beside the sum of the losses, as 1 / C
        in scikit-learn.
      k: the probe reads only the k features whose mean differs most between one label and the other
        labels. They are chosen anew in every fold. ``None`` reads all features.
      types_N: the type of each example, such as the id of its token. The control task gives each
        type a random label, which a probe can learn only by memorizing types.
      seed: the seed of the folds and of the control task.

    Returns:
      The accuracy and the probe.

    Raises:
      ValueError: if the numbers of features and labels differ, if there are fewer than two labels,
        or if ``folds`` or ``k`` is out of range.
    """
    features_ND, labels_N = np.asarray(features_ND, np.float32), np.asarray(labels_N)
    if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
        raise ValueError(f"features have shape {features_ND.shape} and labels {labels_N.shape}; expected [N, D] and "
                         "[N]")
    names, classes_N = np.unique(labels_N, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all labels are {names[0]!r}; a probe needs at least two different labels")
    N, D = features_ND.shape
    check_count("folds", folds, N)
    if folds < 2:
        raise ValueError("folds=1; expected at least 2, so that each example is left out once")
    if k is not None:
        check_count("k", k, D)
    rng = np.random.default_rng(seed)
    fold_N = rng.permutation(N) % folds
    fitted_to = np.stack([*(fold_N != fold for fold in range(folds)), np.ones(N, bool)])
    arguments = (jnp.asarray(features_ND), jnp.asarray(fitted_to, jnp.float32), jnp.float32(l2))

    def accuracy(classes_N: np.ndarray) -> tuple[float, Any]:
        weights, bias, chosen = jax.device_get(_fit_folds(*arguments, jnp.asarray(classes_N), len(names), k))
        scores_NC = np.einsum("nd,ndc->nc", features_ND, weights[fold_N]) + bias[fold_N]
        return float((scores_NC.argmax(-1) == classes_N).mean()), (weights[-1], bias[-1], chosen[-1])

    right, (weights, bias, chosen) = accuracy(classes_N)
    control = float("nan")
    if types_N is not None:
        _, type_N = np.unique(np.asarray(types_N), return_inverse=True)
        control, _ = accuracy(rng.choice(classes_N, type_N.max() + 1)[type_N])
    return Probed(right, wilson_interval(right, N), control, float(np.bincount(classes_N).max() / N), weights, bias,
                  None if k is None else chosen)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _fit_folds(features_ND, fitted_to_FN, l2, classes_N, num_classes, k) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fits one probe for each row of ``fitted_to_FN``, which has 1 for the examples to fit to."""
    targets_NC = jax.nn.one_hot(classes_N, num_classes)
    D = features_ND.shape[1]

    def fit(included_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean_D = included_N @ features_ND / included_N.sum()
        deviation_D = jnp.sqrt(included_N @ (features_ND - mean_D) ** 2 / included_N.sum())
        scale_D = jnp.where(deviation_D > 0, 1 / jnp.maximum(deviation_D, 1e-30), 0.0)
        x_ND = (features_ND - mean_D) * scale_D
        chosen, read_D = jnp.arange(D), jnp.ones(D)
        if k is not None:
            inside_NC, outside_NC = (t * included_N[:, None] for t in (targets_NC, 1 - targets_NC))
            difference_DC = (x_ND.T @ inside_NC / jnp.maximum(inside_NC.sum(0), 1)
                             - x_ND.T @ outside_NC / jnp.maximum(outside_NC.sum(0), 1))
            chosen = jax.lax.top_k(jnp.abs(difference_DC).max(-1), k)[1]
            read_D = jnp.zeros(D).at[chosen].set(1.0)

        def loss(parameters: tuple[jax.Array, jax.Array]) -> jax.Array:
            weights_DC, bias_C = parameters
            losses_N = optax.softmax_cross_entropy(x_ND @ (weights_DC * read_D[:, None]) + bias_C, targets_NC)
            return included_N @ losses_N + l2 / 2 * jnp.square(weights_DC).sum()

        weights_DC, bias_C = _minimized(loss, (jnp.zeros((D, num_classes)), jnp.zeros(num_classes)))
        weights_DC = weights_DC * (read_D * scale_D)[:, None]
        return weights_DC, bias_C - mean_D @ weights_DC, chosen

    return jax.lax.map(fit, fitted_to_FN)


def _minimized(loss: Any, start: Any) -> Any:
    """Returns the parameters at the minimum of a loss, found by L-BFGS."""
    optimizer, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def is_far(carry: Any) -> jax.Array:
        _, state, step = carry
        return (step == 0) | ((step < _MOST_STEPS) & (optax.tree.norm(optax.tree.get(state, "grad")) > _TOLERANCE))

    def move(carry: Any) -> Any:
        parameters, state, step = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = optimizer.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(parameters, updates), state, step + 1

    return jax.lax.while_loop(is_far, move, (start, optimizer.init(start), 0))[0]


def wilson_interval(accuracy: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Computes a confidence interval of a fraction.

    Source: Wilson (1927).

    Args:
      accuracy: the fraction.
      count: of how many independent examples it is the fraction.
      z: the quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
      The lower and the upper bound.
    """
    center = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (accuracy * (1 - accuracy) / count + z**2 / (4 * count**2)) ** 0.5
    return center - half, center + half
