"""The built-in sampling rules: pytrees that are called as ``(logits_BV, history) -> logits_BV``.

A user's own rules have the same form. The settings of a rule are traced, so changing one does not
compile again. Each setting has a value that switches its rule off at no cost. Rules can be combined
in any order: ``generate(..., processors=[TopK(40), Temperature(0.7), TopP(0.9)])``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer_jax.decoding.batch import token_ids
from transformer_jax.decoding.formulas import (
    first_largest,
    forbid_repeated_ngrams,
    min_p,
    occurrences,
    penalize_repetition,
    top_k,
    top_p,
    typical_p,
)
from transformer_jax.decoding.rule_pytrees import apply_where, check_field, rule_pytree
from transformer_jax.decoding.rules import History
from transformer_jax.decoding.setting_ranges import checked_setting

Logits = Float[Array, "B V"]

# Smaller temperatures would draw the same tokens, but float32 may round them to 0.
_SMALLEST_TEMPERATURE = 1e-30

@rule_pytree
@dataclasses.dataclass(frozen=True)
class Temperature:
    """Divides the logits by the temperature; 0 keeps only the most probable token, the first on a
    tie.

    Attributes:
      temperature: 0 or positive.
    """

    temperature: Float[Array, ""] | float

    def __post_init__(self):
        check_field(self, "temperature", "temperature")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        largest_B1 = logits_BV.max(-1, keepdims=True)

        def only_first(logits_BV: jax.Array) -> jax.Array:
            is_first_BV = jnp.arange(logits_BV.shape[-1]) == first_largest(logits_BV, largest_B1)[:, None]
            return jnp.where(is_first_BV, 0.0, -jnp.inf)

        return jax.lax.cond(self.temperature == 0.0, only_first, lambda x: self.divide(x, largest_B1), logits_BV)

    def divide(self, logits_BV: Float[Array, "B V"], largest_B1: Float[Array, "B 1"]) -> Float[Array, "B V"]:
        """Divides logits by a temperature that is not 0.

        Args:
          logits_BV: logits, ``[B, V]``.
          largest_B1: the largest logit of each row, ``[B, 1]``.

        Returns:
          Logits, ``[B, V]``, the largest of which is 0.
        """
        # The largest logit becomes 0, so that no temperature, however small, makes it overflow.
        return (logits_BV - largest_B1) / jnp.maximum(self.temperature, _SMALLEST_TEMPERATURE)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the k most probable tokens (Fan et al., 2018); 0 keeps all.

    Attributes:
      k: the number of tokens.
    """

    k: Int[Array, ""] | int

    def __post_init__(self):
        check_field(self, "k", "top_k")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.k > 0, lambda x: top_k(x, self.k), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class TopP:
    """Keeps the smallest set of tokens with at least this total probability (Holtzman et al.,
    2020).

    Attributes:
      p: the total probability; 1 keeps all tokens.
    """

    p: Float[Array, ""] | float

    def __post_init__(self):
        check_field(self, "p", "top_p")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.p < 1.0, lambda x: top_p(x, self.p), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class MinP:
    """Keeps tokens whose probability is at least this fraction of the largest one (Nguyen et al.,
    2024).

    Attributes:
      p: the fraction; 0 keeps all tokens.
    """

    p: Float[Array, ""] | float

    def __post_init__(self):
        check_field(self, "p", "min_p")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.p > 0.0, lambda x: min_p(x, self.p), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class TypicalP:
    """Keeps the tokens whose surprise is nearest to the entropy, with at least this total
    probability.

    Source: Meister et al. (2023).

    Attributes:
      p: the total probability; 1 keeps all tokens.
    """

    p: Float[Array, ""] | float

    def __post_init__(self):
        check_field(self, "p", "typical_p")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.p < 1.0, lambda x: typical_p(x, self.p), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive logits, and multiplies negative logits, of tokens that the text already
    contains.

    Source: Keskar et al. (2019).

    Attributes:
      penalty: the divisor and factor; 1 changes nothing.
    """

    penalty: Float[Array, ""] | float

    def __post_init__(self):
        check_field(self, "penalty", "repetition_penalty")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.penalty != 1.0, lambda x: penalize_repetition(
            x, history.tokens_BS, history.valid_BS, self.penalty), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class PresencePenalty:
    """Subtracts a number from the logits of the tokens that the new text already contains.

    The prompt does not count, unlike for ``RepetitionPenalty``.

    Attributes:
      penalty: the number; 0 changes nothing.
    """

    penalty: Float[Array, ""] | float

    def __post_init__(self):
        check_field(self, "penalty", "presence_penalty")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.penalty != 0.0, lambda x: x - self.penalty * jnp.minimum(
            occurrences(x, history.tokens_BS, history.valid_BS, history.num_new), 1.0), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class FrequencyPenalty:
    """Subtracts a number from the logit of a token for each time that the new text contains it.

    The prompt does not count, unlike for ``RepetitionPenalty``.

    Attributes:
      penalty: the number; 0 changes nothing.
    """

    penalty: Float[Array, ""] | float

    def __post_init__(self):
        check_field(self, "penalty", "frequency_penalty")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.penalty != 0.0, lambda x: x - self.penalty * occurrences(
            x, history.tokens_BS, history.valid_BS, history.num_new), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
    """Forbids tokens that would complete an n-gram a second time.

    Where every token that earlier rules allow would complete one, the rule forbids nothing, so that
    a token is left to draw.

    Attributes:
      n: the length of the n-grams; 0 switches the rule off.
    """

    n: Int[Array, ""] | int

    def __post_init__(self):
        check_field(self, "n", "no_repeat_ngram")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return apply_where(self.n > 0, lambda x: forbid_repeated_ngrams(
            x, history.tokens_BS, history.valid_BS, self.n), logits_BV)


@rule_pytree
@dataclasses.dataclass(frozen=True)
class MinNewTokens:
    """Forbids the tokens that end a text until the text has a minimum number of new tokens.

    Attributes:
      count: the number of new tokens.
    """

    count: Int[Array, ""] | int

    def __post_init__(self):
        check_field(self, "count", "min_new_tokens")

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        if history.ends_V is None:
            return logits_BV
        return jnp.where((history.num_new < self.count) & history.ends_V, -jnp.inf, logits_BV)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
    """Adds a number to the logit of each token; minus infinity bans the token. Make it with
    ``Bias.of``.

    Attributes:
      bias_V: the numbers, ``[V]``.
    """

    bias_V: Float[Array | np.ndarray, " V"]

    @classmethod
    def of(cls, vocab_size: int, bias: Mapping[int, float] | None = None, banned: Sequence[int] = ()) -> Self:
        """Makes the bias from token ids.

        Args:
          vocab_size: the size of the model's vocabulary.
          bias: the number to add to the logits of each of these token ids.
          banned: token ids that are never drawn.

        Returns:
          The rule.

        Raises:
          ValueError: if a token id is outside the vocabulary, or if float32 cannot hold a bias.
        """
        bias = {} if bias is None else bias
        bias_V = np.zeros(vocab_size, np.float32)
        bias_V[token_ids("bias", bias, vocab_size)] = [checked_setting("bias", value) for value in bias.values()]
        bias_V[token_ids("banned", banned, vocab_size)] = -np.inf
        return cls(bias_V)

    def __call__(self, logits_BV: Logits, history: History) -> Logits:
        return logits_BV + self.bias_V
