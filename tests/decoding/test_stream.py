"""Streamed text: only whole characters are returned, stop strings are found, and the joined pieces
equal the result of generate."""

import functools

import jax
import jax.numpy as jnp
import pytest

import transformer_jax as tj
from transformer_jax.decoding import sample as sample_module

GREEDY = tj.Sampling(temperature=0)
CHARACTERS = tj.Tokenizer.train(["abcdefghx"], kind="char")
WORDS = tj.Tokenizer.train(["abcdefgh " * 3], kind="word")
BYTES = tj.Tokenizer.train(["a plain text"], kind="bpe", vocab_size=278)  # encodes accents and emoji as bytes
MAX_LEN = 32
CONFIG = tj.ModelConfig(vocab_size=BYTES.vocab_size, max_len=MAX_LEN, num_layers=1, num_heads=1, model_dim=MAX_LEN,
                        mlp_dim=8, tie_embeddings=False)


def scripted_model(tokens: list[int]) -> tj.Decoder:
    """A decoder that greedily writes ``tokens`` after an empty prompt, whatever was written
    before."""
    return scripted(tokens, CONFIG.vocab_size)


def scripted(tokens: list[int], vocab_size: int, scale: float = 30.0) -> tj.Decoder:
    """A decoder whose most probable token at a position is that of ``tokens``.

    Blocks add nothing to the residual stream, which holds a one-hot position; the unembedding of a
    token sums the positions after which it is due.
    """
    model = tj.Decoder(CONFIG.replace(vocab_size=vocab_size), key=jax.random.key(0))
    for parameter in (model.embeddings.token, model.stack.blocks.attention.output.kernel,
                      model.stack.blocks.mlp.down.kernel):
        parameter[...] = jnp.zeros_like(parameter[...])
    model.embeddings.position[...] = jnp.eye(MAX_LEN)
    model.embeddings.output[...] = jnp.zeros_like(model.embeddings.output[...]).at[
        jnp.array(tokens), jnp.arange(len(tokens))].set(scale)
    return model


def write(text: str, tokenizer: tj.Tokenizer = BYTES, tokens: list[int] | None = None, **arguments):
    """The result of generate, and the pieces of stream, of a model that writes ``text``."""
    tokens = tokenizer.encode(text) if tokens is None else tokens
    model = scripted_model(tokens)
    arguments = dict(tokenizer=tokenizer, sampling=GREEDY, max_new_tokens=len(tokens)) | arguments
    result = tj.generate(model, "", **arguments)
    pieces = list(tj.stream(model, "", **arguments))
    assert result.tokens[0] == tokens[:result.lengths[0]]
    assert "".join(pieces) == result.texts[0]
    assert "" not in pieces
    return result, pieces


@pytest.mark.long
def test_pieces_are_whole_characters():
    text = "né🎉 text à"
    assert len(BYTES.encode(text)) > len(text)  # several tokens for each character
    result, pieces = write(text)
    assert result.texts == [text]
    assert result.finish_reasons == ["length"]
    assert pieces == ["n", "é", "🎉", " t", "ext", " ", "à"]


def test_a_character_that_the_length_cuts_is_replaced():
    result, pieces = write("né🎉", max_new_tokens=5)
    assert result.texts == ["né�"]
    assert pieces == ["n", "é", "�"]


@pytest.mark.parametrize("end", ["eos_id", "end_of_text_id"])
def test_end_of_text_ends(end):
    tokens = [*BYTES.encode("né"), getattr(BYTES, end), *BYTES.encode("more")]
    result, pieces = write("", tokens=tokens)
    assert (result.texts, result.finish_reasons, result.lengths) == (["né"], ["eos"], [4])
    assert pieces == ["n", "é"]
    cut = [*BYTES.encode("né")[:2], getattr(BYTES, end)]
    assert write("", tokens=cut)[0].texts == ["n�"]


def test_other_tokens_may_end_a_text():
    """As at the end of an answer in a chat, which may be another token than that of a text."""
    tokens = BYTES.encode("né z")
    result, pieces = write("", tokens=tokens, end_ids=[tokens[-1]])
    assert result.finish_reasons == ["eos"] and "".join(pieces) == BYTES.decode(tokens[:-1])


def test_stop_string_across_tokens_is_not_shown_and_held_back():
    text = "a plain text, t"
    tokens = BYTES.encode(text)
    for stop in ("n t", "in te", "plain text,"):
        assert not any(stop in piece for piece in BYTES.pieces(tokens))  # spans several tokens
        result, _ = write(text, stop=stop)
        assert result.texts == [text[:text.index(stop)]]
        assert result.finish_reasons == ["stop"]
        assert BYTES.decode(result.tokens[0]).startswith(text[:text.index(stop) + len(stop)])
        assert result.lengths[0] < len(tokens)


def test_a_beginning_of_a_stop_string_is_released_when_it_does_not_go_on():
    assert write("ababcx", CHARACTERS, stop="abcc")[1] == ["ab", "abcx"]
    assert write("xabcx", CHARACTERS, stop="bcc")[1] == ["x", "a", "bcx"]
    assert write("xab", CHARACTERS, stop="abc")[1] == ["x", "ab"]  # and when the text ends with it
    assert write("xaab", CHARACTERS, stop=["aab", "c"])[1] == ["x"]


def test_stop_string_inside_the_first_token():
    tokens = WORDS.encode("abcdefgh")
    assert len(tokens) == 1
    result, pieces = write("", WORDS, tokens=tokens * 3, stop="bc")
    assert (result.texts, pieces) == (["a"], ["a"])
    assert (result.lengths, result.finish_reasons) == ([1], ["stop"])
    result, pieces = write("", WORDS, tokens=tokens * 3, stop="a")
    assert (result.texts, pieces, result.lengths) == ([""], [], [1])


def test_the_earliest_of_several_stop_strings_wins():
    assert write("abcdefgh", CHARACTERS, stop=["g", "cd", "ef"])[0].texts == ["ab"]
    assert write("abcdefgh", CHARACTERS, stop=["cdef", "de"])[0].texts == ["abc"]  # "de" is complete first
    tokens = WORDS.encode("abcdefgh")
    assert write("", WORDS, tokens=tokens, stop=["f", "c", "de"])[0].texts == ["ab"]  # all in one token


@pytest.mark.parametrize("between", [1, 3, 16])
def test_stop_checks_may_come_late(monkeypatch, between):
    monkeypatch.setattr(sample_module, "_TOKENS_BETWEEN_STOP_CHECKS", between)
    result, _ = write("a plain text, a plain text", stop=["text,"], max_new_tokens=16)
    assert (result.texts, result.finish_reasons) == (["a plain "], ["stop"])
    assert len(result.logprobs[0]) == result.lengths[0] == len(result.tokens[0]) < 16


def test_rows_stop_on_their_own():
    text = "abcdefghabcdefgh"
    model = scripted_model(CHARACTERS.encode(text))
    prompts = ["", "a", "abcdefg"]  # their first new character is b (after <|endoftext|>: a), b, h
    result = tj.generate(model, prompts, tokenizer=CHARACTERS, sampling=GREEDY, max_new_tokens=8, stop=["d"])
    assert result.texts == ["abc", "abc", "gha" + "bc"]
    assert result.finish_reasons == ["stop"] * 3
    assert result.lengths == [4, 4, 6]


def test_stream_checks_its_arguments_when_called():
    model = scripted_model(BYTES.encode("text"))
    stream = functools.partial(tj.stream, model, "a", tokenizer=BYTES)
    for arguments, words in [
            (dict(stop=""), "a stop string is empty"), (dict(stop=["a", ""]), "a stop string is empty"),
            (dict(sampling=tj.Sampling()), "sampling needs key"), (dict(max_new_tokens=0), "max_new_tokens=0"),
            (dict(max_new_tokens=MAX_LEN), "exceed the model's context")]:
        with pytest.raises(ValueError, match=words):
            stream(**dict(sampling=GREEDY, max_new_tokens=8) | arguments)


def test_streamed_samples_equal_generated_ones_past_the_context():
    model = tj.Decoder(CONFIG, key=jax.random.key(2))
    arguments = dict(tokenizer=BYTES, key=jax.random.key(3), max_new_tokens=70, slide=True)
    result = tj.generate(model, "x" * 16, **arguments)
    pieces = list(tj.stream(model, "x" * 16, **arguments))
    assert "".join(pieces) == result.texts[0]
    assert result.lengths == [70] or result.finish_reasons == ["eos"]
    assert len(pieces) > 10
    assert "".join(pieces).encode("utf-8", "strict")
