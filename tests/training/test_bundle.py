"""tj.save and tj.load, with which research code stores models."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig, OptimConfig
from transformer_jax.models.functional import make_model
from transformer_jax.settings import from_dict, to_dict
from transformer_jax.training import manifest
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.family)
def test_bundles_of_the_other_families_are_saved_and_loaded(tmp_path, config):
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
    """A workdir as after training: steps 2 and 4, and step 2 as the best. The weights identify the
    step."""
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


def test_averages_of_missing_checkpoints_are_refused(workdir):
    for arguments, message in (
            (dict(average=3), r"average=3, but .*/checkpoints keeps 2 checkpoints up to step 4; train with "
                              "checkpoint.keep=3, or average fewer"),
            (dict(average=2, step=2), "keeps 1 checkpoints up to step 2"),
            (dict(average=2, step="best"), "average=2 averages the last checkpoints up to a step, but only one best"),
            (dict(average=0), "average=0 must be a whole number, at least 1"),
            (dict(average=-1), "average=-1 must be a whole number, at least 1")):
        with pytest.raises(ValueError, match=message):
            tj.load(workdir, **arguments)


@pytest.mark.parametrize("average", [1, 2])
def test_each_file_is_hashed_once(workdir, monkeypatch, average):
    """Hashing takes most of the time of loading, so a step must not be verified twice."""
    hashed = []
    monkeypatch.setattr(manifest, "_check_file", lambda directory, name, recorded: hashed.append((directory, name)))
    tj.load(workdir, average=average)
    assert len(hashed) == len(set(hashed)) > 0
    assert len({directory for directory, _ in hashed}) == average


def test_a_damaged_step_is_passed_over_with_a_warning(workdir):
    largest = max((workdir / "checkpoints" / "4" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.warns(UserWarning, match=f"4 is damaged: .*{largest.name}.* using step 2 instead"):
        assert tj.load(workdir).step == 2
    with pytest.raises(ValueError, match="4 is damaged"):
        tj.load(workdir, step=4)


def test_loading_what_does_not_exist_raises(workdir, tmp_path_factory):
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
    assert list(empty.iterdir()) == []  # loading does not change the files


def test_saving_below_a_later_step_is_refused(workdir, model):
    bundle = tj.Bundle(model=model, tokenizer=None, config=CONFIG, step=3)
    with pytest.raises(ValueError, match="already contains step 4, which is later than step 3 of this bundle"):
        tj.save(workdir, bundle)
    assert tj.load(workdir).step == 4
    tj.save(workdir, dataclasses.replace(bundle, step=9))
    assert tj.load(workdir).step == 9


def test_adapters_cannot_be_loaded_as_a_bundle(tmp_path, model):
    config = tj.config.LoraConfig(rank=2)
    adapters = tj.nn.lora.make_adapters(model, config, key=jax.random.key(0))
    tj.training.save_adapters(tmp_path, adapters, config, model)
    with pytest.raises(ValueError, match=r"0/metadata.json: these are adapters without .* tj.load_adapters\(directory"):
        tj.load(tmp_path)


# Every save can be loaded, or is refused before anything is written


class Louder(nnx.Module):
    """A custom final norm with one more weight."""

    def __init__(self, norm):
        self.norm, self.loudness = norm, nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.norm(x) * self.loudness[...]


class OwnDecoder(tj.Decoder):
    """A custom family."""


def copied(model):
    return jax.tree.map(lambda leaf: leaf, model)


def louder(model):
    model = copied(model)
    model.final_norm = Louder(model.final_norm)
    return model


def with_array(model):
    model = copied(model)
    model.steering = nnx.Param(jnp.arange(16.0))
    return model


def without_array(model):
    model = copied(model)
    model.final_norm = None
    return model


@pytest.mark.parametrize(("change", "message"), [
    (louder, r"a tests?\S*\.Louder at 'final_norm'\. .*: tj.load\(directory, template=model\), model = tj.Decoder\("
             r"config, key=jax.random.key\(0\)\) with its custom module assigned to model.final_norm"),
    (with_array, "an array at 'steering.value'"),
    (without_array, "an array at 'final_norm.*assigned to model.final_norm"),
    (lambda model: jax.jit(lambda key: OwnDecoder(CONFIG, key=key))(jax.random.key(0)),
     r"the class \S+\.OwnDecoder\. .*model = OwnDecoder\(config, key=jax.random.key\(0\)\)")])
def test_custom_modules_need_a_template_to_load(tmp_path, model, change, message):
    own = change(model)
    tj.save(tmp_path, tj.Bundle(model=own, tokenizer=None, config=CONFIG))
    with pytest.raises(ValueError, match=message):
        tj.load(tmp_path)
    loaded = tj.load(tmp_path, template=jax.eval_shape(lambda: own)).model
    assert tree_digest(loaded) == tree_digest(own) and jax.tree.structure(loaded) == jax.tree.structure(own)


def test_loading_a_run_with_custom_modules_needs_a_template(tmp_path, model):
    own = louder(model)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, {"params": own}, metadata={"config": to_dict(EXPERIMENT)})
    with pytest.raises(ValueError, match=r"params/final_norm/loudness/value: stored float32\[\], expected nothing.*"
                                         r"pass a model with the same modules: tj.load\(directory, template=model\)"):
        tj.load(tmp_path)
    assert tree_digest(tj.load(tmp_path, template=own).model) == tree_digest(own)


class OwnTokenizer(tj.Tokenizer):
    """Reads texts in its own way, which a saved file cannot describe."""


@dataclasses.dataclass(frozen=True)
class OwnConfig(tj.ModelConfig):
    """A config with one more field."""

    flavour: str = "plain"


@pytest.mark.parametrize(("change", "message"), [
    (lambda model: dict(config=CONFIG.replace(num_layers=3)),
     r"the config of the bundle differs .*\(num_layers: 2 -> 3.*; save it with config=model.config"),
    (lambda model: dict(config=CONFIG.replace(activation="relu")), r"\(activation: 'gelu_tanh' -> 'relu'\)"),
    (lambda model: dict(model=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)),
     r"the model has \S+ as bfloat16\[.*\], but its config describes it as float32\[.*another param_dtype"),
    (lambda model: dict(tokenizer=OwnTokenizer(TOKENIZER.to_bytes())), "the tokenizer is a OwnTokenizer, which tj"),
    (lambda model: dict(config=from_dict(OwnConfig, to_dict(CONFIG))), "this is a OwnConfig that JSON would change"),
    (lambda model: dict(model=jax.tree.map(np.asarray, model)), "is a ndarray; a checkpoint stores jax.Array leaves"),
])
def test_bundles_that_could_not_be_loaded_are_refused_when_saving(tmp_path, model, change, message):
    bundle = dataclasses.replace(tj.Bundle(model=model, tokenizer=TOKENIZER, config=CONFIG), **change(model))
    with pytest.raises(ValueError, match=message):
        tj.save(tmp_path, bundle)
    with pytest.raises(ValueError, match="no checkpoint"):
        tj.load(tmp_path)


def test_the_config_of_the_model_is_kept_beside_that_of_the_run(tmp_path, model):
    experiment = EXPERIMENT.replace(model=CONFIG.replace(max_len=32))
    config = CONFIG.replace(dropout=0.25)
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=None, config=config, experiment=experiment))
    found = tj.load(tmp_path)
    assert found.config == config and found.experiment == experiment
