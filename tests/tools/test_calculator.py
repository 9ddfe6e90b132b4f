"""The calculator is exact and runs no code, and answers hold what it computes."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer_jax as tj
from tests.decoding.test_stream import scripted
from transformer_jax.tools.arithmetic import EXPRESSION, calculate


@pytest.mark.parametrize(("expression", "value"), [
    ("48/2", "24"), ("(3+4)*5", "35"), ("1/3", "0.333333"), ("-2/3", "-0.666667"), ("0.1+0.2", "0.3"), ("--5", "5"),
    ("2-3-4", "-5"), ("-(1+1)*2.50", "-5"), ("999999999999*999999999999", "999999999998000000000001"), (" 7 ", "7"),
])
def test_values(expression, value):
    assert calculate(expression) == value


@given(st.integers(-10**6, 10**6), st.integers(-10**6, 10**6), st.integers(1, 10**6))
@settings(max_examples=30, deadline=None)
def test_values_are_those_of_python(a, b, c):
    assert calculate(f"({a}+{b})*{c}-{a}*({b}-{c})") == str((a + b) * c - a * (b - c))


@pytest.mark.parametrize(("expression", "message"), [
    ("1/0", "divides by zero"), ("2**99999", "is not an expression"), ("__import__('os')", "is not an expression"),
    ("1+", "is not an expression"), ("", "is not an expression"), ("True", "is not an expression"),
    ("1" * 1001, "at most 1000 characters"), ("(" * 500 + "1", "is not an expression"), (3, "at most"),
    ("1j", "is not an expression"), ("1 if 1 else 2", "is not an expression"), ("1e999999", "is not an expression"),
])
def test_what_is_no_expression(expression, message):
    with pytest.raises(ValueError, match=message):
        calculate(expression)


CHARACTERS = tj.Tokenizer.train(["x <>=0123456789+-*/().?"], kind="char")


def answer(text, max_new_tokens=30):
    pytest.importorskip("llguidance", reason='needs pip install "transformer_jax[grammar]"')
    model = scripted([*CHARACTERS.encode(text), CHARACTERS.eos_id], CHARACTERS.vocab_size)
    return tj.tools.answer_with_calculator(model, "", tokenizer=CHARACTERS, max_new_tokens=max_new_tokens,
                                           sampling=tj.Sampling(temperature=0))


@pytest.mark.long
def test_the_calculator_corrects_the_value_of_the_model():
    found = answer("x <<12+30=99>>42")
    assert (found.text, found.calls, found.finish_reason) == ("x <<12+30=42>>42", [("12+30", "42")], "eos")
    assert found.tokens == [*CHARACTERS.encode(found.text), CHARACTERS.eos_id]


@pytest.mark.long
def test_several_calls_and_a_division_by_zero():
    found = answer("<<1/0=x>>x<<2*3=x>>")
    assert (found.text, found.calls) == ("<<1/0=?>>x<<2*3=6>>", [("1/0", "?"), ("2*3", "6")])


@pytest.mark.long
def test_what_is_no_expression_cannot_be_written():
    [call] = answer("<<xx>>x", 16).calls or [("", "")]
    found = answer("<<x")
    assert found.text.startswith("<<") and "x" not in found.text.split("=")[0]
    assert not call[0] or calculate(call[0])


@pytest.mark.parametrize("limit", range(1, 12))
@pytest.mark.long
def test_an_answer_that_is_cut_says_so(limit):
    found = answer("x <<1+2=3>>x", limit)
    assert len(found.tokens) == limit and found.finish_reason == "length"
    assert found.text == "x <<1+2=3>>x"[:limit]


@pytest.mark.long
def test_the_grammar_writes_only_what_the_calculator_reads():
    pytest.importorskip("llguidance", reason='needs pip install "transformer_jax[grammar]"')
    config = tj.ModelConfig(vocab_size=CHARACTERS.vocab_size, max_len=32, num_layers=1, num_heads=1, model_dim=16)
    result = tj.generate(tj.Decoder(config, key=jax.random.key(0)), "x", tokenizer=CHARACTERS, key=jax.random.key(1),
                         num_samples=32, max_new_tokens=24, grammar=tj.Grammar.lark(f'start: sum "="{EXPRESSION}'))
    complete = [text for text, reason in zip(result.texts, result.finish_reasons, strict=True) if reason == "grammar"]
    assert len(set(complete)) > 8
    for text in complete:
        try:
            assert float(calculate(text[:-1])) == pytest.approx(eval(text[:-1]), abs=1e-5)
        except ValueError as error:
            assert "divides by zero" in str(error)
