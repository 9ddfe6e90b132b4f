"""How the next token is drawn: the sampling settings, the built-in rules that apply them, and the
draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from transformer_jax.decoding.batch import token_ids
from transformer_jax.decoding.formulas import Logits, Tokens, first_largest, inverse_cdf
from transformer_jax.decoding.processors import (
    Bias,
    FrequencyPenalty,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    TypicalP,
)
from transformer_jax.decoding.rules import History, Processor
from transformer_jax.decoding.setting_ranges import checked_setting


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token; with the defaults, tokens are drawn from the model's own
    distribution.

    Each setting is one of the rules in ``transformer_jax.decoding.processors``. ``generate``
    applies them in the order of this list.

    Attributes:
      banned: token ids that are never drawn.
      bias: numbers to add to the logits of some token ids.
      min_new_tokens: the text does not end before it has this many new tokens.
      repetition_penalty: divides positive logits, and multiplies negative logits, of tokens that
        the text already contains (Keskar et al., 2019).
      presence_penalty: subtracted from the logits of tokens that the new text already contains.
      frequency_penalty: subtracted from a token's logit once for each time that the new text
        contains it.
      no_repeat_ngram: no n-gram of this length occurs twice, except where every token that the
        other settings allow would complete one again; 0 switches the rule off.
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k most probable tokens (Fan et al., 2018); 0 keeps all.
      top_p: keep the smallest set of tokens with at least this total probability (Holtzman et al.,
        2020).
      min_p: keep tokens whose probability is at least this fraction of the largest one (Nguyen et
        al., 2024).
      typical_p: keep the tokens whose surprise is nearest to the entropy, with at least this total
        probability (Meister et al., 2023).

    Raises:
      ValueError: if a setting is not a number or is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0
    banned: Sequence[int] = ()
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in (*_RESTRICTING, *_TRUNCATING, "temperature"):
            object.__setattr__(self, name, checked_setting(name, getattr(self, name)))
        if not isinstance(self.bias, Mapping):
            raise ValueError(f"bias={self.bias!r} must be a dict from token ids to numbers")
        for value in self.bias.values():
            checked_setting("bias", value)


# The rule of each setting. Rules that depend on the text so far are applied first, in this order.
# Then the temperature divides the logits, and the rules that exclude improbable tokens follow.
_RESTRICTING = {"min_new_tokens": MinNewTokens, "repetition_penalty": RepetitionPenalty,
                "presence_penalty": PresencePenalty, "frequency_penalty": FrequencyPenalty,
                "no_repeat_ngram": NoRepeatNgram}
_TRUNCATING = {"top_k": TopK, "top_p": TopP, "min_p": MinP, "typical_p": TypicalP}
_KNOWN = {*_RESTRICTING, *_TRUNCATING, "temperature", "banned", "bias"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """A ``Sampling`` in the form of rules that compiled code applies.

    Attributes:
      restricting: rules that depend on the text so far; they are applied first, in order.
      temperature: divides the logits after that.
      truncating: rules that exclude improbable tokens; they are applied last, in order.
      excluded_V: True for tokens that are never drawn.
      ends_V: True for tokens that end a text.
    """

    restricting: tuple[Processor, ...]
    temperature: Temperature
    truncating: tuple[Processor, ...]
    excluded_V: Bool[Array | np.ndarray, " V"]
    ends_V: Bool[Array | np.ndarray, " V"]

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int, end_ids: Sequence[int] = (),
           excluded_V: np.ndarray | None = None) -> Self:
        """Makes the settings of a ``Sampling``; tokens that are True in ``excluded_V`` are never
        drawn.

        Raises:
          ValueError: if a token id is outside the vocabulary, or if no token is left to draw.
          TypeError: if a subclass of ``Sampling`` has a setting that no rule applies.
        """
        unknown = [field.name for field in dataclasses.fields(sampling) if field.name not in _KNOWN]
        if unknown:
            raise TypeError(f"{type(sampling).__name__} has settings that no built-in rule applies: "
                            f"{', '.join(unknown)}; pass a rule of your own in processors=[...]")
        bias = Bias.of(vocab_size, sampling.bias, sampling.banned)
        ends_V = np.zeros(vocab_size, bool)
        ends_V[token_ids("end_ids", end_ids, vocab_size)] = True
        banned_V = np.isneginf(bias.bias_V)
        excluded_V = banned_V if excluded_V is None else banned_V | excluded_V
        if (excluded_V[~ends_V] if sampling.min_new_tokens else excluded_V).all():
            raise ValueError(f"banned and bias leave none of {vocab_size} tokens to draw"
                             f"{' before min_new_tokens' if sampling.min_new_tokens else ''}; allow at least one")
        bias = Bias(np.where(excluded_V, np.float32(-np.inf), bias.bias_V))
        return cls(restricting=(bias, *_rules(_RESTRICTING, sampling)), temperature=Temperature(sampling.temperature),
                   truncating=_rules(_TRUNCATING, sampling), excluded_V=excluded_V, ends_V=ends_V)


def _rules(rules: Mapping[str, type], sampling: Sampling) -> tuple[Processor, ...]:
    """Makes the rule of each setting in ``rules``."""
    return tuple(rule(getattr(sampling, name)) for name, rule in rules.items())


def sample(logits_BV: Logits, history: History, keys_B: Key[Array, " B"],
           settings: Settings) -> tuple[Tokens, Bool[Array, " B"]]:
    """Draws the next token of every row with the row's own key.

    Args:
      logits_BV: float32.
      history: the tokens so far; the number of new tokens is folded into the keys.
      keys_B: one PRNG key per row.
      settings: the settings; their numbers may be traced, and may be one for each row ``[B, 1]``.

    Returns:
      Token ids, and True for rows in which a token could be drawn: no logit is NaN or plus
      infinity, and at least one is finite.
    """
    logits_BV = restrict(logits_BV, history, settings)
    largest_B1 = logits_BV.max(-1, keepdims=True)

    is_greedy = settings.temperature.temperature == 0.0

    def draw(logits_BV: jax.Array) -> jax.Array:
        kept_BV = truncate(settings.temperature.divide(logits_BV, largest_B1), history, settings)
        num_new_B = jnp.broadcast_to(jnp.ravel(history.num_new), keys_B.shape)
        uniforms_B = jax.vmap(lambda key, num_new: jax.random.uniform(jax.random.fold_in(key, num_new)))(
            keys_B, num_new_B)
        drawn_B = inverse_cdf(jax.nn.softmax(kept_BV, axis=-1), uniforms_B)
        if jnp.ndim(is_greedy) == 0:
            return drawn_B
        return jnp.where(jnp.ravel(is_greedy), first_largest(logits_BV, largest_B1), drawn_B)

    token_B = jax.lax.cond(jnp.all(is_greedy), lambda x: first_largest(x, largest_B1), draw, logits_BV)
    return token_B, jnp.isfinite(largest_B1[:, 0])


def restrict(logits_BV: Logits, history: History, settings: Settings) -> Float[Array, "B V"]:
    """Applies the rules that depend on the text so far: bias, minimum length, repetition,
    n-grams."""
    return apply(settings.restricting, logits_BV, history)


def truncate(logits_BV: Logits, history: History, settings: Settings) -> Float[Array, "B V"]:
    """Sets the logits of improbable tokens to minus infinity: first top-k, then top-p, min-p and
    typical-p."""
    return apply(settings.truncating, logits_BV, history)


def apply(rules: Sequence[Processor], logits_BV: Logits, history: History) -> Float[Array, "B V"]:
    """Applies rules to the logits in order.

    Raises:
      ValueError: if a rule returns something other than logits of the same shape.
    """
    for rule in rules:
        result_BV = rule(logits_BV, history)
        shape = getattr(result_BV, "shape", None)
        if shape != logits_BV.shape:
            raise ValueError(f"the sampling rule {rule!r} returns {'no array' if shape is None else shape}; expected "
                             f"logits of the shape that it was given, {logits_BV.shape}")
        logits_BV = result_BV
    return logits_BV
