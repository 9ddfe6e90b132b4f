"""Batches of several rows are multiplied without YNNPACK on processors without AVX-512."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.decoding import products
from transformer_jax.decoding.loop import decode
from transformer_jax.decoding.products import JitByRows, avoids_ynnpack
from transformer_jax.decoding.speculation import speculate

OLD, NEW = frozenset({"avx2", "fma"}), frozenset({"avx2", "avx512f"})


@pytest.fixture
def on_processor(monkeypatch):
    """Returns a function that makes the process believe in the features of a processor."""
    def believe(features):
        monkeypatch.setattr(products, "_features_of_processor", lambda: features)
        avoids_ynnpack.cache_clear()

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    yield believe
    avoids_ynnpack.cache_clear()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices do not use YNNPACK")
def test_the_choice_follows_the_processor_and_the_environment(on_processor, monkeypatch):
    on_processor(NEW)
    assert not avoids_ynnpack()
    on_processor(frozenset())  # an ARM processor, or another operating system
    assert not avoids_ynnpack()
    on_processor(OLD)
    assert avoids_ynnpack() == products._knows_option()
    for name, value in (("TRANSFORMER_JAX_XLA_FLAGS", "0"), ("XLA_FLAGS", f"--{products._YNNPACK}=")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            avoids_ynnpack.cache_clear()
            assert not avoids_ynnpack()


def test_an_unknown_option_is_not_used(monkeypatch):
    monkeypatch.setattr(products, "_YNNPACK", "xla_cpu_no_such_option")
    assert not products._knows_option()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices do not use YNNPACK")
def test_only_batches_of_several_rows_are_compiled_without_ynnpack(on_processor):
    on_processor(OLD)
    if not avoids_ynnpack():
        pytest.skip("this version of XLA has no option for YNNPACK")

    class Batch(tuple):
        """Stands for the state of a batch."""

        history_BS = property(lambda self: self[0])

    jax.tree_util.register_pytree_node(Batch, lambda batch: (tuple(batch), None), lambda _, leaves: Batch(leaves))
    product = JitByRows(lambda weights, batch: jax.lax.fori_loop(
        0, 3, lambda _, x: jnp.tanh(x @ weights), batch.history_BS))
    weights = jnp.eye(256) * 0.5
    for rows in (1, 3, 4, 32):
        given = jnp.ones((rows, 256))
        np.testing.assert_allclose(product(weights, Batch([given])), jnp.full((rows, 256), np.tanh(
            0.5 * np.tanh(0.5 * np.tanh(0.5)))), rtol=1e-6)
    assert (product._plain._cache_size(), product._for_rows._cache_size(), product.num_programs) == (2, 2, 4)
    compiled = product._for_rows.lower(weights, Batch([jnp.ones((32, 256))])).compile().as_text()
    assert "ynn_fusion" not in compiled
    assert " dot(" in compiled


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices do not use YNNPACK")
def test_texts_are_the_same_on_both_kinds_of_processors(on_processor):
    model = tj.Decoder(tj.ModelConfig(vocab_size=97, max_len=64, num_layers=2, num_heads=2, model_dim=64, init_std=0.2),
                       key=jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, 97, (8, 7)).tolist()
    results, programs = [], decode.num_programs
    for features in (OLD, NEW):
        on_processor(features)
        for sampling in (tj.Sampling(temperature=0), tj.Sampling(temperature=0.9)):
            results.append(tj.generate(model, prompts, key=jax.random.key(1), max_new_tokens=40, sampling=sampling,
                                       end_ids=[]))
    for old, new in zip(results[:2], results[2:], strict=True):
        assert old.tokens == new.tokens
        np.testing.assert_allclose(old.logprobs, new.logprobs, rtol=1e-4, atol=1e-5)
    assert decode.num_programs == programs + 1 + products._knows_option()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices do not use YNNPACK")
@pytest.mark.parametrize(("num_guesses", "is_large"), [(1, False), (3, True)])
def test_a_pass_over_several_guesses_counts_as_several_rows(on_processor, num_guesses, is_large):
    on_processor(OLD)
    model = tj.Decoder(tj.ModelConfig(vocab_size=31, max_len=64, num_layers=1, num_heads=1, model_dim=16),
                       key=jax.random.key(0))
    before = speculate._for_rows._cache_size()
    tj.generate(model, [[1, 2, 3]], max_new_tokens=8, sampling=tj.Sampling(temperature=0),
                speculation=tj.Speculation(num_guesses=num_guesses))
    assert speculate._for_rows._cache_size() - before == (is_large and products._knows_option())
