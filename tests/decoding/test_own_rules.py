"""Sampling rules and interventions of a user's own, in every way of decoding, against full passes
over each row alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj

TOKENIZER = tj.Tokenizer.train(["abcdefgh"], kind="char")
VOCAB, MAX_LEN, NUM_NEW = TOKENIZER.vocab_size, 16, 10
DECODER = tj.ModelConfig(vocab_size=VOCAB, max_len=MAX_LEN, num_layers=2, num_heads=2, model_dim=16, init_std=0.5)
CONFIGS = {"decoder": DECODER, "pair": DECODER.replace(family="encoder_decoder", num_layers=1, positions="rope",
                                                        tie_embeddings=False)}
START = 1
TEXTS = [[5, 9, 7, 8, 6, 11, 10], [9, 8, 11]]
KEYS = jax.random.split(jax.random.key(4), 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Presence:
    """Lowers the logits of tokens that the text holds."""

    penalty: jax.Array | float

    def __call__(self, logits_BV, history):
        rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, history.tokens_BS].max(history.valid_BS)
        return jnp.where(seen_BV, logits_BV - self.penalty, logits_BV)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """Makes some values of the first layer larger, of an encoder too; a strength of 1 changes
    nothing."""

    strength: jax.Array | float

    def __call__(self, site, layer, value):
        if site not in ("mlp_output", "head_output", "encoder_mlp_output", "cross_head_output"):
            return value
        return jnp.where(layer == 0, self.strength * value, value)


@functools.cache
def make(name):
    return (tj.Decoder if name == "decoder" else tj.EncoderDecoder)(CONFIGS[name], key=jax.random.key(1))


@jax.jit
def full_pass(model, edit, *tokens):
    return model(*tokens, intervene=edit).logits


def next_logits(name, text, context, strength):
    """Generates one row alone without a cache. Tokens after the context only keep the shape."""
    tokens_1T = np.zeros((1, MAX_LEN), np.int32)
    tokens_1T[0, :len(context)] = context
    sources = () if name == "decoder" else (np.array([text]),)
    logits_BTV = full_pass(make(name), Scale(strength), *sources, tokens_1T)
    return np.asarray(logits_BTV, np.float64)[0, len(context) - 1]


def plain_loop(name, text, key=None, penalty=0.0, strength=1.0, num_new=NUM_NEW):
    context, tokens = list(text) if name == "decoder" else [START], []
    for step in range(num_new):
        if len(context) == MAX_LEN:
            context = context[-(MAX_LEN // 2):]
        logits = next_logits(name, text, context, strength)
        logits[sorted(set(context))] -= penalty
        if key is None:
            tokens.append(int(logits.argmax()))
        else:
            p = np.exp(logits - logits.max())
            uniform = float(jax.random.uniform(jax.random.fold_in(key, step)))
            tokens.append(int((p.cumsum() / p.sum() <= uniform).sum()))
        context.append(tokens[-1])
    return tokens


def generated(name, texts=TEXTS, key=KEYS, penalty=0.0, strength=1.0, function=tj.generate, **arguments):
    options = dict(slide=True) if name == "decoder" else dict(start_id=START)
    return function(make(name), texts, max_new_tokens=NUM_NEW, key=key, processors=[Presence(penalty)],
                    intervene=Scale(strength), **options, **arguments)


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
def test_rules_and_interventions_act_as_in_full_passes(name, is_greedy):
    """The decoder fills its context and slides; the pair reads sources of different lengths."""
    sampling = tj.Sampling(temperature=0.0 if is_greedy else 1.0)
    outcomes = set()
    for penalty, strength in ((0.0, 1.0), (1.5, 1.0), (0.0, 2.0), (1.5, 2.0)):
        found = generated(name, penalty=penalty, strength=strength, sampling=sampling, end_ids=()).tokens
        keys = [None, None] if is_greedy else KEYS
        assert found == [plain_loop(name, text, key, penalty, strength) for text, key in zip(TEXTS, keys, strict=True)]
        outcomes.add(str(found))
    assert len(outcomes) == 4  # the rule and the intervention each changed something


def test_stream_gives_what_full_passes_do():
    tokens = generated("decoder", TEXTS[:1], KEYS[:1], 1.5, 2.0, tokenizer=TOKENIZER).tokens[0]
    wanted = plain_loop("decoder", TEXTS[0], KEYS[0], 1.5, 2.0)
    assert tokens == wanted[:len(tokens)]
    pieces = list(generated("decoder", TEXTS[0], KEYS[:1], 1.5, 2.0, function=tj.stream, tokenizer=TOKENIZER))
    ended = tokens[-1] in TOKENIZER.end_ids
    assert "".join(pieces) == TOKENIZER.decode(tokens[:-1] if ended else tokens) and len(pieces) > 3


@pytest.mark.parametrize("name", CONFIGS)
def test_wide_beams_search_what_full_passes_find(name):
    """Three hypotheses of a source, each kept by its log P under the model with the
    intervention."""
    limit, found = 5, {}
    for strength in (1.0, 2.0):
        options = {} if name == "decoder" else dict(start_id=START)
        found[strength] = tj.beam_search(make(name), TEXTS, beam_size=3, n_best=3, max_new_tokens=limit, end_ids=(),
                                         length_penalty=0.0, intervene=Scale(strength), **options)
        for text, hypotheses in zip(TEXTS, found[strength].n_best, strict=True):
            alive = [((), 0.0)]
            for _ in range(limit):
                longer = []
                for tokens, logprob in alive:
                    logits = next_logits(name, text, [*(text if name == "decoder" else [START]), *tokens], strength)
                    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
                    longer += [((*tokens, token), logprob + logprobs[token]) for token in range(VOCAB)]
                alive = sorted(longer, key=lambda one: -one[1])[:3]
            assert [tuple(one.tokens) for one in hypotheses] == [tokens for tokens, _ in alive]
            np.testing.assert_allclose([one.logprob for one in hypotheses], [logprob for _, logprob in alive],
                                       rtol=1e-4)
    assert found[1.0].scores != found[2.0].scores
