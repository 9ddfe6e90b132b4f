"""The built-in sampling rules as a user composes them: equal to the settings of ``Sampling``, in
any order, compiling nothing anew."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import PROMPTS, SMALL, VOCAB, count_compiles, make_model
from test_logits import BATCH, make_history, make_logits
from test_logits import VOCAB as FEW

import transformer_jax as tj
from transformer_jax import decoding
from transformer_jax.decoding.logits import Settings
from transformer_jax.decoding.rules import History

KEY = jax.random.key(3)
RULES = {
    "temperature": decoding.Temperature, "top_k": decoding.TopK, "top_p": decoding.TopP, "min_p": decoding.MinP,
    "typical_p": decoding.TypicalP, "repetition_penalty": decoding.RepetitionPenalty,
    "presence_penalty": decoding.PresencePenalty, "frequency_penalty": decoding.FrequencyPenalty,
    "no_repeat_ngram": decoding.NoRepeatNgram, "min_new_tokens": decoding.MinNewTokens}
VALUES = dict(temperature=0.6, top_k=7, top_p=0.7, min_p=0.05, typical_p=0.7, repetition_penalty=1.3,
              presence_penalty=0.7, frequency_penalty=2.5, no_repeat_ngram=1, min_new_tokens=6)
OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0,
           presence_penalty=0.0, frequency_penalty=0.0, no_repeat_ngram=0, min_new_tokens=0)
ORDER = ["min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram",
         "temperature", "top_k", "top_p", "min_p", "typical_p"]


@functools.cache
def ends():
    """Tokens that are drawn soon."""
    return tuple(tokens[1] for tokens in tj.generate(make_model(SMALL), PROMPTS, key=KEY, max_new_tokens=16).tokens)


def generated(processors=(), **sampling):
    result = tj.generate(make_model(SMALL), PROMPTS, key=KEY, max_new_tokens=16, end_ids=ends(), processors=processors,
                         sampling=tj.Sampling(**sampling))
    return result.tokens, result.logprobs


def chain(**values):
    """All rules in the order of ``Sampling``, those without a value switched off: one compiled
    program."""
    bias = decoding.Bias.of(VOCAB, values.pop("bias", {}), values.pop("banned", ()))
    return [bias, *(RULES[name]((OFF | values)[name]) for name in ORDER)]


CASES = [*({name: value} for name, value in VALUES.items()), dict(bias={1: 2.0, 3: -1.0}, banned=[2]), VALUES,
         dict(temperature=0), dict(temperature=0, repetition_penalty=1.5)]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_a_rule_draws_what_the_setting_draws(case):
    """The results are equal bit for bit, and after the first call no value compiles a program."""
    generated(chain())
    generated()
    with count_compiles() as compiles:
        assert generated(chain(**case)) == generated(**case)
    assert compiles == []


def test_rules_that_are_off_change_nothing_and_on_they_do():
    assert generated(chain()) == generated()
    changed = {name: generated(chain(**{name: value})) != generated() for name, value in VALUES.items()}
    assert all(changed.values()), changed


def applied(rules, logits_BV):
    tokens_BS, valid_BS = make_history()
    ends_V = np.isin(np.arange(FEW), [1, 4])
    history = History(tokens_BS, valid_BS, jnp.int32(2), ends_V)
    for rule in rules:
        logits_BV = rule(logits_BV, history)
    return np.asarray(logits_BV)


def test_any_order_is_that_order():
    """The second of two rules gets the result of the first, so their order matters for some pairs
    of rules."""
    logits_BV = make_logits()[:2]
    top_k, top_p, cold = decoding.TopK(3), decoding.TopP(0.6), decoding.Temperature(0.3)
    found = {order: applied(order, np.repeat(logits_BV, BATCH // 2, axis=0))
             for order in itertools.permutations([top_k, top_p, cold])}
    for order, after in found.items():
        row = logits_BV[0].astype(np.float64)
        for rule in order:  # in float64
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            sorted_row = np.sort(row)[::-1]
            if rule is top_k:
                row = np.where(row >= sorted_row[2], row, -np.inf)
            elif rule is top_p:
                reached = np.sort(p)[::-1].cumsum()
                row = np.where(p >= np.sort(p)[::-1][(reached >= 0.6).argmax()], row, -np.inf)
            else:
                row = (row - row.max()) / 0.3
        np.testing.assert_allclose(after[0], row, rtol=1e-5, atol=1e-5)
    assert len({np.isfinite(after).sum() for after in found.values()}) > 1


def test_temperature_0_leaves_the_first_of_the_largest():
    logits_BV = np.array([[1.0, 5.0, 5.0, -np.inf]] * BATCH, np.float32)
    history = History(*make_history(), 0)
    after = np.asarray(decoding.Temperature(0)(logits_BV, history))
    assert np.isfinite(after).tolist() == [[False, True, False, False]] * BATCH
    assert np.isfinite(decoding.MinNewTokens(3)(after, history)).all(0).tolist() == [False, True, False, False]


def test_rules_are_pytrees_whose_settings_are_leaves():
    for rule in chain(**VALUES)[1:]:
        leaf, = jax.tree.leaves(rule)
        assert jax.tree.map(lambda x: x, rule) == rule and isinstance(leaf, (int, float))
        assert jax.tree.leaves(jax.tree.map(lambda x: -1, rule)) == [-1]  # JAX may put any object there
        value, = dataclasses.fields(rule)
        jax.eval_shape(lambda leaf, rule=rule: type(rule)(leaf), leaf)  # a traced value is not checked
        assert value.name


def test_every_setting_of_sampling_has_a_rule_or_is_refused():
    changes = VALUES | dict(banned=[2], bias={1: 2.0})
    assert set(changes) == {field.name for field in dataclasses.fields(tj.Sampling)}
    plain = jax.tree.leaves(Settings.of(tj.Sampling(), VOCAB, [9, 17]))
    for name, value in changes.items():
        leaves = jax.tree.leaves(Settings.of(tj.Sampling(**{name: value}), VOCAB, [9, 17]))
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(plain, leaves, strict=True)), name

    @dataclasses.dataclass(frozen=True)
    class More(tj.Sampling):
        entropy_floor: float | None = None

    with pytest.raises(TypeError, match="More has settings that no built-in rule applies: entropy_floor; .*proc"):
        Settings.of(More(), VOCAB)
