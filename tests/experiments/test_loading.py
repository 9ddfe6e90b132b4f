"""The flags --workdir and --model load the models that they name."""

import jax
import pytest

import transformer_jax as tj
from transformer_jax.cli import loading

CONFIG = tj.ModelConfig(vocab_size=13, max_len=8, num_layers=1, num_heads=2, model_dim=8)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A workdir and a directory of Hugging Face with the same model."""
    bundle = tj.Bundle(tj.Decoder(CONFIG, key=jax.random.key(0)), None, CONFIG, step=3)
    workdir, directory = tmp_path_factory.mktemp("workdir"), tmp_path_factory.mktemp("directory")
    tj.save(workdir, bundle)
    tj.to_huggingface(bundle, directory)
    return str(workdir), str(directory)


def test_either_place_and_either_flag(places):
    workdir, directory = places
    loaded = [loading.load(workdir, None), loading.load(None, workdir, step="3"), loading.load(None, directory)]
    assert [bundle.step for bundle in loaded] == [3, 3, 0]
    assert all(bundle.config == CONFIG for bundle in loaded)
    assert loading.name(None, directory) == directory and loading.name(workdir, None) == workdir


def test_missing_or_conflicting_models_raise(places):
    workdir, directory = places
    for flags, message in [((None, None), "--workdir is missing: the directory of a run, which transformer-jax train "
                                           "wrote; or pass --model"),
                           ((workdir, directory), "name two models; pass only one of them"),
                           ((None, "/no/such"), "there is no directory /no/such")]:
        with pytest.raises(ValueError, match=message):
            loading.load(*flags)
    with pytest.raises(ValueError, match="has no config.json|there is no checkpoint in"):
        loading.load(directory, None)
    for options in (dict(step="best"), dict(average=2)):
        with pytest.raises(ValueError, match="select checkpoints of a workdir, but .* has no checkpoints"):
            loading.load(None, directory, **options)
