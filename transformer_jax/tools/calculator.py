"""Answers in which the model writes expressions, and a calculator writes their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from transformer_jax.data.tokens import TextTokenizer, text_after
from transformer_jax.decoding.batch import decodable, encode_prompts, vocab_size_of
from transformer_jax.decoding.grammar import Grammar
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.functional import Model
from transformer_jax.tools.arithmetic import EXPRESSION, calculate

_BEGIN, _EQUALS, _END = "<<", "=", ">>"  # GSM8K's annotations: <<48/2=24>>
_NOT_A_NUMBER = "?"


@dataclasses.dataclass(frozen=True)
class CalculatedAnswer:
    """An answer, and what the calculator computed for it.

    Attributes:
      text: the answer, with its annotations, such as ``"48/2 = <<48/2=24>>24"``.
      tokens: the new tokens.
      calls: each expression with its value, ``"?"`` if it divides by zero.
      finish_reason: ``"eos"`` or ``"length"``.
    """

    text: str
    tokens: list[int]
    calls: list[tuple[str, str]]
    finish_reason: str


def answer_with_calculator(model: Model, prompt: str | Sequence[int], *, tokenizer: TextTokenizer,
                           key: jax.Array | None = None, max_new_tokens: int = 200,
                           sampling: Sampling = Sampling(), end_ids: Sequence[int] | None = None) -> CalculatedAnswer:
    """Continues a prompt, and computes what the model writes between ``<<`` and ``=``.

    When the model writes ``<<``, a grammar allows only an arithmetic expression and ``=`` after it.
    The calculator then writes the value and ``>>``, and the model continues. This is the form of
    the data set GSM8K.

    Args:
      model: a decoder.
      prompt: a text or its token ids, such as those of ``tj.data.encode_prompt``.
      tokenizer: the model's tokenizer.
      key: a PRNG key; not needed for greedy decoding.
      max_new_tokens: the largest number of tokens to add, with those of the calculator.
      sampling: how tokens are drawn.
      end_ids: token ids that end the answer, as in ``generate``.

    Returns:
      The answer and the calculations.

    Raises:
      ImportError: if llguidance is not installed.
      ValueError: for the same reasons as ``generate``.

    Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems".
    """
    expression = Grammar.lark(f'start: sum "{_EQUALS}"{EXPRESSION}')
    [start] = encode_prompts([prompt] if isinstance(prompt, str) else [list(prompt)], tokenizer, vocab_size_of(model))
    tokens: list[int] = []
    calls: list[tuple[str, str]] = []

    def extend(**options) -> tuple[str, str]:
        """Lets the model continue what it has read and written so far."""
        step_key = None if key is None else jax.random.fold_in(key, len(tokens))
        result = generate(model, [start + tokens], tokenizer=tokenizer, key=step_key, sampling=sampling,
                          max_new_tokens=max_new_tokens - len(tokens), end_ids=end_ids, **options)
        tokens.extend(result.tokens[0])
        assert result.texts is not None  # there is a tokenizer
        return result.texts[0], result.finish_reasons[0]

    reason = "length"
    while len(tokens) < max_new_tokens:
        _, reason = extend(stop=_BEGIN)
        if reason != "stop" or len(tokens) == max_new_tokens:
            break
        written, ended = extend(grammar=expression)
        if ended == "length":
            break
        calls.append((written.removesuffix(_EQUALS), _computed(written.removesuffix(_EQUALS))))
        if len(tokens) < max_new_tokens:
            extend(grammar=Grammar.choice([calls[-1][1] + _END]))
    shown = tokens[:-1] if reason == "eos" else tokens
    return CalculatedAnswer(text_after(tokenizer, decodable(start, tokenizer), shown), tokens, calls,
                            "eos" if reason == "eos" else "length")


def _computed(expression: str) -> str:
    """Returns the value of an expression that the grammar allowed, or ``"?"`` if there is none."""
    try:
        return calculate(expression)
    except ValueError:
        return _NOT_A_NUMBER
