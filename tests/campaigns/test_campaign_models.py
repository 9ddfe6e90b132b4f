"""Models of random configs: each config is refused in one line, or its model computes, saves, loads
and decodes correctly."""

import dataclasses
import shutil

import campaign
import jax
import jax.numpy as jnp
import numpy as np
from random_configs import LONGEST, VOCABULARY, draw, drawn_fields, is_exact

import transformer_jax as tj
from transformer_jax.models.functional import make_model
from transformer_jax.training.leaves import tree_digest

pytestmark = campaign.MARKS


def test_random_configs_differ_in_every_field():
    assert drawn_fields() == {field.name for field in dataclasses.fields(tj.ModelConfig)}


def test_random_configs(tmp_path):
    def case(rng):
        config = draw(rng)
        model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(int(rng.integers(1 << 30))))
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        tj.save(tmp_path / "saved", tj.Bundle(model=model, tokenizer=None, config=config))
        loaded = tj.load(tmp_path / "saved")
        assert loaded.config == config and tree_digest(loaded.model) == tree_digest(model)
        CONTRACTS[config.role](loaded.model, config, rng)
        return True

    campaign.run_cases("random configs", case, most=int(campaign.ONLY or 0) + 1000)


def row_contract(outputs):
    """Makes the contract of a model that reads rows: padding and other rows do not change the
    outputs of a row. ``outputs(model, rows, is_token)`` are the outputs, and ``is_token`` says which
    tokens are not padding."""
    def contract(model, config, rng):
        rows = rng.integers(VOCABULARY, size=(2, 9))
        is_token = np.arange(9) < [[9], [5]]
        found = np.asarray(outputs(model, rows, is_token), np.float32)
        kept = is_token if found.ndim > 1 and found.shape[1] == 9 else np.array([True, True])
        assert np.isfinite(found[kept]).all()
        if not is_exact(config):
            return
        other = np.where(is_token, rows, rng.integers(VOCABULARY, size=(2, 9)))
        np.testing.assert_allclose(outputs(model, other, is_token)[kept], found[kept], rtol=1e-4, atol=1e-4)
        alone = outputs(model, rows[:1], is_token[:1])
        np.testing.assert_allclose(alone[0], found[0], rtol=1e-4, atol=1e-4)

    return contract


def decode_contract(model, config, rng):
    """Checks cached, batched and padded decoding: each new token is the most probable one of a full
    pass, with the same log P."""
    prompts = [rng.integers(VOCABULARY, size=length).tolist() for length in (6, 3)]
    is_pair = config.role == "encoder_decoder"
    options = dict(max_new_tokens=4, sampling=tj.Sampling(temperature=0), end_ids=[])
    if is_pair and not config.start_ids:
        options["start_id"] = 1
    batch = tj.generate(model, prompts, **options)
    for prompt, tokens, logprobs in zip(prompts, batch.tokens, batch.logprobs, strict=True):
        start_ids = list(config.start_ids or (1,)) if is_pair else prompt
        logits = np.array([logits_after(model, prompt, [*start_ids, *tokens[:count]], is_pair)
                           for count in range(len(tokens))], np.float64)
        assert np.isfinite(logits).all()
        if not is_exact(config):
            continue
        expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
            -1, keepdims=True)
        chosen = expected[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(logprobs, chosen, rtol=1e-3, atol=1e-3)
        expected[:, list(config.banned_ids)] = -np.inf
        assert (chosen >= expected.max(-1) - 1e-3).all(), (tokens, expected.argmax(-1))


def logits_after(model, source, tokens, is_pair):
    """The logits of the token that follows ``tokens``, from a full pass of a padded row."""
    row = np.array([tokens + [0] * (LONGEST - len(tokens))])
    segments = (np.arange(LONGEST) < len(tokens)).astype(np.int32)[None]
    if not is_pair:
        return tj.forward(model, row, segment_ids_BT=jnp.asarray(segments))[0, len(tokens) - 1]
    padded = np.array([source + [0] * (6 - len(source))])
    read = (np.arange(6) < len(source)).astype(np.int32)[None]
    return tj.forward(model, padded, row, source_segment_ids_BS=read, target_segment_ids_BT=segments)[
        0, len(tokens) - 1]


def autoencoder_contract(model, config, rng):
    """Checks that rows do not depend on each other, and that SAELens's files hold the same model."""
    x = rng.normal(size=(3, config.input_dim)).astype(np.float32)
    features, found = np.asarray(model.encode(x)), np.asarray(model(x))
    assert np.isfinite(found).all() and found.shape == (3, config.out_dim)
    assert config.activation != "topk" or ((features != 0).sum(-1) <= config.k).all()
    np.testing.assert_allclose(model(x[:1])[0], found[0], rtol=1e-5, atol=1e-5)


def vector_contract(model, config, rng):
    """Checks that each word has a finite vector."""
    assert np.isfinite(model(np.arange(VOCABULARY)[None])).all()


CONTRACTS = {
    "decoder": decode_contract, "encoder_decoder": decode_contract,
    "encoder": row_contract(lambda model, rows, is_token: tj.forward(model, rows, mask_BT=is_token)),
    "elmo": row_contract(lambda model, rows, is_token: model(rows, segment_ids_BT=is_token.astype(np.int32)).hidden),
    "reward": row_contract(lambda model, rows, is_token: model(rows, segment_ids_BT=is_token.astype(np.int32))),
    **dict.fromkeys(("classifier", "token_classifier"), row_contract(
        lambda model, rows, is_token: tj.forward(model, rows, segment_ids_BT=is_token.astype(np.int32)))),
    "sparse_autoencoder": autoencoder_contract, "word_vectors": vector_contract,
}
