"""The loss of ELECTRA: restore masked tokens, and find the tokens that were restored wrongly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from transformer_jax.models.electra import Electra
from transformer_jax.ops.losses import cross_entropy
from transformer_jax.training.objectives import masked_logits
from transformer_jax.training.step import Batch, Sums

# The noise of the drawn tokens in an evaluation, which is the same for every model.
_EVALUATION_SEED = 0


def replaced_token_loss(model: Electra, batch: Batch, key: jax.Array | None = None) -> Sums:
    """Computes the loss of ELECTRA (Clark et al., 2020, section 2), in nats.

    It is the mean loss of the generator at masked tokens, plus ``config.discriminator_weight``
    times the mean loss of the discriminator at all tokens. No gradient flows through the drawing of
    tokens.

    Args:
      model: the generator and the discriminator.
      batch: the arrays of ``masked_token_loss``.
      key: a PRNG key, which switches dropout on. Without one, tokens are drawn with fixed noise.

    Returns:
      The sum of the losses, the number of masked tokens, and a dict of further sums, whose means
      are ``generator_loss``, ``generator_accuracy`` (of the drawn tokens), and of the
      discriminator ``discriminator_loss``, ``replaced`` (the fraction of replaced tokens),
      ``found`` (the fraction of tokens that are replaced and recognised) and ``accused`` (the
      fraction of tokens that are taken for replaced).
    """
    generator_key, draw_key, discriminator_key = (
        (None, jax.random.key(_EVALUATION_SEED), None) if key is None else jax.random.split(key, 3))
    targets_BP, weights_BP = batch["masked_targets"], batch["masked_weights"]
    logits_BPV = masked_logits(model.generator, batch, generator_key)
    restored = (cross_entropy(logits_BPV, targets_BP) * weights_BP).sum()
    drawn_BP = jax.random.categorical(draw_key, jax.lax.stop_gradient(logits_BPV))
    tokens_BT, is_replaced_BT = replaced_tokens(batch, drawn_BP)
    odds_BT = model(tokens_BT, segment_ids_BT=batch["segment_ids"], key=discriminator_key).logits[..., 0]
    is_token_BT = batch["segment_ids"] != 0
    losses_BT = jax.nn.softplus(jnp.where(is_replaced_BT, -odds_BT, odds_BT))
    num_masked, num_tokens = weights_BP.sum(), jnp.maximum(is_token_BT.sum(), 1)

    def of_tokens(values_BT: jax.Array) -> jax.Array:
        """Returns the mean over all tokens times the number of masked tokens: their weights are
        those of the masked tokens."""
        return (values_BT * is_token_BT).sum() / num_tokens * num_masked

    found = of_tokens(losses_BT)
    return restored + model.config.discriminator_weight * found, num_masked, {
        "generator_loss": restored, "generator_accuracy": ((drawn_BP == targets_BP) * weights_BP).sum(),
        "discriminator_loss": found, "replaced": of_tokens(is_replaced_BT),
        "found": of_tokens(is_replaced_BT & (odds_BT > 0)), "accused": of_tokens(odds_BT > 0)}


def replaced_tokens(batch: Batch, drawn_BP: Int[Array, "B P"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Puts drawn tokens in the places of the masked tokens.

    Args:
      batch: ``tokens`` with masks, ``masked_positions``, ``masked_targets`` and
        ``masked_weights``.
      drawn_BP: the tokens to put at ``masked_positions``.

    Returns:
      The tokens, and which of them differ from the tokens before masking.
    """
    rows_B1 = jnp.arange(drawn_BP.shape[0])[:, None]
    # A place without weight is unused; its position beyond the row drops the update.
    positions_BP = jnp.where(batch["masked_weights"] > 0, batch["masked_positions"], batch["tokens"].shape[1])

    def with_tokens(tokens_BP: jax.Array) -> jax.Array:
        return batch["tokens"].at[rows_B1, positions_BP].set(tokens_BP, mode="drop")

    tokens_BT = with_tokens(drawn_BP)
    return tokens_BT, tokens_BT != with_tokens(batch["masked_targets"])


def discriminator_scores(means: dict[str, float]) -> dict[str, float]:
    """Computes how good a discriminator is from the means of ``replaced_token_loss``.

    Args:
      means: ``replaced``, ``found`` and ``accused``, each a fraction of all tokens.

    Returns:
      ``accuracy``; ``trivial_accuracy``, that of never taking a token for replaced; and
      ``precision``, ``recall`` and ``f1`` of replaced tokens.
    """
    replaced, found, accused = (means[name] for name in ("replaced", "found", "accused"))
    return {"accuracy": 1.0 - replaced - accused + 2.0 * found, "trivial_accuracy": 1.0 - replaced,
            "precision": found / accused if accused else 0.0, "recall": found / replaced if replaced else 0.0,
            "f1": 2.0 * found / (accused + replaced) if accused + replaced else 0.0}
