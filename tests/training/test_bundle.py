"""tj.save and tj.load: what research code keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig, OptimConfig, to_dict
from transformer_jax.training.checkpoint import Checkpoints, tree_digest

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
