"""tj.save and tj.load: what research code keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig, OptimConfig
from transformer_jax.models.functional import make_model
from transformer_jax.settings import to_dict
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest

TEXT = "the king said to his men that night we would come home\n" * 4
TOKENIZER = tj.Tokenizer.train([TEXT], kind="char")
CONFIG = tj.ModelConfig(vocab_size=TOKENIZER.vocab_size, max_len=16, num_layers=2, num_heads=2, model_dim=16)
EXPERIMENT = ExperimentConfig(steps=7, model=CONFIG, optim=OptimConfig(name="lion"))


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda key: tj.Decoder(CONFIG, key=key))(jax.random.key(0))


@pytest.mark.parametrize("experiment", [None, EXPERIMENT])
@pytest.mark.parametrize("tokenizer", [None, TOKENIZER])
def test_round_trip(tmp_path, model, tokenizer, experiment):
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=tokenizer, config=CONFIG, step=7, experiment=experiment))
    bundle = tj.load(tmp_path)
    assert tree_digest(bundle.model) == tree_digest(model)
    assert jax.tree.structure(bundle.model) == jax.tree.structure(model)
    assert (bundle.config, bundle.step, bundle.experiment) == (CONFIG, 7, experiment)
    if tokenizer is None:
        assert bundle.tokenizer is None
    else:
        assert bundle.tokenizer.to_bytes() == tokenizer.to_bytes()
    tj.save(tmp_path / "again", bundle)
    assert tree_digest(tj.load(tmp_path / "again").model) == tree_digest(model)


def test_a_loaded_model_is_used_like_any_other(tmp_path, model):
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=TOKENIZER, config=CONFIG))
    bundle = tj.load(str(tmp_path))
    tokens = jnp.array([bundle.tokenizer.encode("the king")])
    np.testing.assert_array_equal(tj.forward(bundle.model, tokens), tj.forward(model, tokens))
    assert tj.trace(bundle.model, tokens).attention(layers=-1).shape == (1, 2, 8, 8)
    greedy = tj.Sampling(temperature=0)
    loaded, kept = (tj.generate(m, ["the "], tokenizer=bundle.tokenizer, max_new_tokens=4, sampling=greedy)
                    for m in (bundle.model, model))
    assert loaded.tokens == kept.tokens and loaded.logprobs == kept.logprobs
    total = tj.score(bundle.model, ["we would"], tokenizer=bundle.tokenizer)
    np.testing.assert_array_equal(total.logprobs, tj.score(model, ["we would"], tokenizer=TOKENIZER).logprobs)


OTHERS = [
    tj.ModelConfig(family="encoder", vocab_size=TOKENIZER.vocab_size + 9, max_len=16, num_layers=2, num_heads=2,
                   model_dim=16, num_token_types=2, use_embedding_norm=True, norm_position="post", activation="gelu"),
    tj.ModelConfig(family="encoder_decoder", vocab_size=TOKENIZER.vocab_size, max_len=16, num_layers=1, num_heads=2,
                   num_decoder_layers=2, model_dim=16, positions="sinusoidal", scale_embeddings=True, init_std=None)]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.family)
def test_the_other_families_are_kept_too(tmp_path, config):
    model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(0))
    experiment = EXPERIMENT.replace(model=config)
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=TOKENIZER, config=config, step=7, experiment=experiment))
    bundle = tj.load(tmp_path)
    assert type(bundle.model) is type(model) and tree_digest(bundle.model) == tree_digest(model)
    assert (bundle.config, bundle.experiment, bundle.model.config) == (config, experiment, config)
    assert jax.tree.structure(bundle.model) == jax.tree.structure(model)
    tokens = [jnp.array([TOKENIZER.encode("the king")])] * (2 if config.family == "encoder_decoder" else 1)
    np.testing.assert_array_equal(tj.forward(bundle.model, *tokens), tj.forward(model, *tokens))


@pytest.fixture
def workdir(tmp_path, model):
    """What training leaves: steps 2 and 4, and step 2 as the best; the weights tell them apart."""
    for name, steps in (("checkpoints", (2, 4)), ("best", (2,))):
        checkpoints = Checkpoints(tmp_path / name, keep=2)
        for step in steps:
            state = {"params": jax.tree.map(lambda x, step=step: x * step, model), "step": jnp.int32(step)}
            checkpoints.save(step, state, metadata={"config": to_dict(EXPERIMENT)},
                             files={"tokenizer.model": TOKENIZER.to_bytes()})
        checkpoints.close()
    return tmp_path


@pytest.mark.parametrize(("step", "found"), [(None, 4), ("best", 2), (2, 2), ("2", 2), (4, 4)])
def test_which_step(workdir, model, step, found):
    bundle = tj.load(workdir, step=step)
    assert bundle.step == found
    assert tree_digest(bundle.model) == tree_digest(jax.tree.map(lambda x: x * found, model))
    assert bundle.experiment == EXPERIMENT


@pytest.mark.parametrize(("arguments", "factor", "step"), [
    (dict(average=2), 3, 4), (dict(average=2, step=4), 3, 4), (dict(average=1), 4, 4), (dict(average=1, step=2), 2, 2),
    (dict(average=1, step="best"), 2, 2)])
def test_average(workdir, model, arguments, factor, step):
    bundle = tj.load(workdir, **arguments)
    assert bundle.step == step and bundle.experiment == EXPERIMENT
    assert jax.tree.structure(bundle.model) == jax.tree.structure(model)
    for leaf, original in zip(jax.tree.leaves(bundle.model), jax.tree.leaves(model), strict=True):
        assert leaf.dtype == original.dtype
        np.testing.assert_allclose(leaf, factor * np.asarray(original, np.float64), rtol=1e-6)


def test_what_cannot_be_averaged(workdir):
    for arguments, message in (
            (dict(average=3), r"average=3, but .*/checkpoints keeps 2 checkpoints up to step 4; train with "
                              "checkpoint.keep=3, or average fewer"),
            (dict(average=2, step=2), "keeps 1 checkpoints up to step 2"),
            (dict(average=2, step="best"), "average=2 takes the last checkpoints, up to a step; there is one best"),
            (dict(average=0), "average=0 must be at least 1"),
            (dict(average=-1), "average=-1 must be at least 1")):
        with pytest.raises(ValueError, match=message):
            tj.load(workdir, **arguments)


def test_a_damaged_step_is_passed_over_with_a_warning(workdir):
    largest = max((workdir / "checkpoints" / "4" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.warns(UserWarning, match=f"4 is damaged: .*{largest.name}.* using step 2 instead"):
        assert tj.load(workdir).step == 2
    with pytest.raises(ValueError, match="4 is damaged"):
        tj.load(workdir, step=4)


def test_what_is_not_there(workdir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=f"there is no directory {empty}/nothing"):
        tj.load(empty / "nothing")
    with pytest.raises(ValueError, match=f"there is no checkpoint in {empty}; train one"):
        tj.load(empty)
    with pytest.raises(ValueError, match=r"holds steps \[2, 4\], not 3"):
        tj.load(workdir, step=3)
    with pytest.raises(ValueError, match="step 'newest' is neither a number nor 'best'"):
        tj.load(workdir, step="newest")
    with pytest.raises(ValueError, match="no checkpoint"):
        tj.load(workdir / "checkpoints", step="best")
    assert list(empty.iterdir()) == []  # looking changes nothing


def test_saving_below_a_later_step_is_refused(workdir, model):
    bundle = tj.Bundle(model=model, tokenizer=None, config=CONFIG, step=3)
    with pytest.raises(ValueError, match="holds step 4 already, later than step 3 of this bundle"):
        tj.save(workdir, bundle)
    assert tj.load(workdir).step == 4
    tj.save(workdir, dataclasses.replace(bundle, step=9))
    assert tj.load(workdir).step == 9
