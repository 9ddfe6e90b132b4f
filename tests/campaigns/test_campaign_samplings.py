"""Random sampling settings: each is refused in one line, or draws only tokens that it allows. A
second call and a row alone give the same tokens."""

import campaign
import jax
import numpy as np

import transformer_jax as tj

pytestmark = campaign.MARKS

CONFIG = tj.ModelConfig(vocab_size=19, max_len=64, num_layers=1, num_heads=2, model_dim=16, init_std=0.6)
_VALUES = {
    "temperature": (0, 0.0, 0.7, 1, 1e-6, 1e6, -1, np.nan, np.inf, "1", None),
    "top_k": (0, 1, 5, 19, 1000, -1, 2.5, 2**40),
    "top_p": (1, 0.9, 1e-9, 0.5, 0, 1.1, np.nan, "0.5"), "min_p": (0, 0.1, 1, 1e-30, -0.1, 2, np.nan),
    "typical_p": (1, 0.3, 1e-9, 0, 1.2, np.nan),
    "repetition_penalty": (1, 1.3, 0.5, 100.0, 0, -1, np.inf, np.nan, 1e-40),
    "no_repeat_ngram": (0, 1, 2, 3, 100, -1, 1.5), "min_new_tokens": (0, 3, 100, -1),
    "banned": ((), (3,), (1, 2, 18), tuple(range(18)), tuple(range(19)), (19,), (-1,), (2.5,), "abc"),
    "bias": ({}, {3: 2.0}, {0: -np.inf}, {4: np.inf}, {4: np.nan}, {99: 1.0}, {5: 1e300}, {3: -3.5, 7: 100.0}),
}


def repeats(text, start, size):
    """The places from `start` on of tokens that complete an n-gram of `size` which the text before
    them has."""
    grams = [tuple(text[max(end - size, 0):end]) for end in range(1, len(text) + 1)]
    return [at for at in range(max(start, size - 1), len(text)) if size and grams[at] in grams[max(size - 1, 0):at]]


def test_random_samplings():
    model = jax.jit(lambda key: tj.Decoder(CONFIG, key=key))(jax.random.key(0))

    def case(rng):
        names = rng.permutation(list(_VALUES))[: int(rng.integers(1, 6))]
        # Most values are valid; these come first in the list.
        chosen = {str(name): _VALUES[str(name)][min(int(rng.exponential(2.0)), len(_VALUES[str(name)]) - 1)]
                  for name in names}
        sampling = tj.Sampling(**chosen)
        prompts = [rng.integers(19, size=int(rng.integers(1, 8))).tolist() for _ in range(2)]
        keys = jax.random.split(jax.random.key(int(rng.integers(1 << 30))), 2)
        options = dict(max_new_tokens=8, sampling=sampling, end_ids=[0])
        found = tj.generate(model, prompts, key=keys, **options)
        again = tj.generate(model, prompts[1:], key=keys[1:], **options)
        assert found.tokens[1] == again.tokens[0], chosen
        for tokens, logprobs, prompt in zip(found.tokens, found.logprobs, prompts, strict=True):
            assert 0 < len(tokens) <= 8 and all(0 <= token < 19 for token in tokens)
            assert np.isfinite(logprobs).all() and max(logprobs) <= 1e-6
            allowed = set(range(19)) - set(sampling.banned) - {t for t, b in sampling.bias.items() if b == -np.inf}
            assert set(tokens) <= allowed, (tokens, chosen)
            if 0 in tokens:
                assert tokens.index(0) == len(tokens) - 1 >= sampling.min_new_tokens
            for at in repeats([*prompt, *tokens], len(prompt), int(sampling.no_repeat_ngram)):
                text = [*prompt, *tokens]
                # The rule may be broken only where every allowed token would repeat an n-gram.
                drawable = allowed - ({0} if at - len(prompt) < sampling.min_new_tokens else set())
                for token in drawable:
                    other = [*text[:at], token]
                    assert at in repeats(other, at, int(sampling.no_repeat_ngram)), (text, at, token, chosen)
        if sampling.temperature == 0 or sampling.top_k == 1:
            options["sampling"] = tj.Sampling(**(chosen | {"temperature": 0}))
            greedy = tj.generate(model, prompts, **options)
            assert greedy.tokens == found.tokens, chosen
        return True

    campaign.run_cases("random samplings", case, least=30)
