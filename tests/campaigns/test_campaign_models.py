"""Models of random configs: each config is refused in one line, or its model computes, saves, loads
and decodes correctly."""

import shutil

import campaign
import jax
import jax.numpy as jnp
import numpy as np
from random_configs import LONGEST, VOCABULARY, draw

import transformer_jax as tj
from transformer_jax.models.functional import make_model
from transformer_jax.training.leaves import tree_digest

pytestmark = campaign.MARKS


def test_random_configs(tmp_path):
    def case(rng):
        config = draw(rng)
        model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(int(rng.integers(1 << 30))))
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        tj.save(tmp_path / "saved", tj.Bundle(model=model, tokenizer=None, config=config))
        loaded = tj.load(tmp_path / "saved")
        assert loaded.config == config and tree_digest(loaded.model) == tree_digest(model)
        (encoder_contract if config.family == "encoder" else decode_contract)(loaded.model, config, rng)
        return True

    campaign.run_cases("random configs", case, most=int(campaign.ONLY or 0) + 1000)


def encoder_contract(model, config, rng):
    """Checks that padding and other rows do not change the outputs of a row."""
    rows = rng.integers(VOCABULARY, size=(2, 9))
    mask = np.arange(9) < [[9], [5]]
    logits = np.asarray(tj.forward(model, rows, mask_BT=mask))
    assert np.isfinite(logits[mask]).all()
    other = np.where(mask, rows, rng.integers(VOCABULARY, size=(2, 9)))
    np.testing.assert_allclose(tj.forward(model, other, mask_BT=mask)[mask], logits[mask], rtol=1e-4, atol=1e-4)
    alone = tj.forward(model, rows[:1], mask_BT=mask[:1])
    np.testing.assert_allclose(alone[0], logits[0], rtol=1e-4, atol=1e-4)


def decode_contract(model, config, rng):
    """Checks cached, batched and padded decoding: each new token is the most probable one of a full
    pass, with the same log P."""
    prompts = [rng.integers(VOCABULARY, size=length).tolist() for length in (6, 3)]
    is_pair = config.family == "encoder_decoder"
    options = dict(max_new_tokens=4, sampling=tj.Sampling(temperature=0), end_ids=[])
    if is_pair and not config.start_ids:
        options["start_id"] = 1
    batch = tj.generate(model, prompts, **options)
    for prompt, tokens, logprobs in zip(prompts, batch.tokens, batch.logprobs, strict=True):
        start_ids = list(config.start_ids or (1,)) if is_pair else prompt
        whole = np.array([[*start_ids, *tokens] + [0] * (LONGEST - len(start_ids) - len(tokens))])
        segments = (np.arange(LONGEST) < len(start_ids) + len(tokens)).astype(np.int32)[None]
        if is_pair:
            source = np.array([prompt + [0] * (6 - len(prompt))])
            read = (np.arange(6) < len(prompt)).astype(np.int32)[None]
            logits = tj.forward(model, source, whole, source_segment_ids_BS=read, target_segment_ids_BT=segments)
        else:
            logits = tj.forward(model, whole, segment_ids_BT=jnp.asarray(segments))
        logits = np.array(logits[0, len(start_ids) - 1:len(start_ids) + len(tokens) - 1], np.float64)
        assert np.isfinite(logits).all()
        expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
            -1, keepdims=True)
        chosen = expected[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(logprobs, chosen, rtol=1e-3, atol=1e-3)
        expected[:, list(config.banned_ids)] = -np.inf
        assert (chosen >= expected.max(-1) - 1e-3).all(), (tokens, expected.argmax(-1))
