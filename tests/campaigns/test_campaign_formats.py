"""Damaged and hostile files of the further formats: GGUF files, activations of a corpus, sparse
autoencoders of SAELens, classifiers, experts, and measurements of a run."""

import pathlib
import warnings

import campaign
import jax
import numpy as np
import pytest
from damage import copied, damage, hostile_json, hostile_tensors, one_file

import transformer_jax as tj
from transformer_jax import inspection
from transformer_jax.config import ClassifierConfig, ExpertConfig
from transformer_jax.models.functional import make_model
from transformer_jax.runs.measured_checkpoints import over_training
from transformer_jax.sharding import make_mesh
from transformer_jax.training.leaves import tree_digest

pytestmark = campaign.MARKS

TESTS = pathlib.Path(__file__).parents[1]
SHAPE = dict(vocab_size=17, max_len=16, num_layers=2, num_heads=2, model_dim=8)
_NUMBERS = (0, 1, 2, 8, 9, 255, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
_MODELS = {
    "classifier": tj.ModelConfig(family="encoder_classifier", norm_position="post", use_embedding_norm=True,
                                 num_token_types=2, activation="gelu", norm_epsilon=1e-12,
                                 classifier=ClassifierConfig(("bad", "so so", "good")), **SHAPE),
    "experts": tj.ModelConfig(positions="rope", norm="rmsnorm", use_bias=False, activation="swiglu",
                              tie_embeddings=False, moe=ExpertConfig(num_experts=4, z_loss=0.0), **SHAPE),
}


def bundle_of(config):
    model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(0))
    return tj.Bundle(model=model, tokenizer=None, config=config)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A good directory of each format."""
    place = tmp_path_factory.mktemp("formats")
    for name, config in _MODELS.items():
        tj.to_huggingface(bundle_of(config), place / name)
        tj.save(place / f"saved-{name}", bundle_of(config))
    decoder = bundle_of(tj.ModelConfig(**SHAPE))
    inspection.collect(decoder.model, [[3, 4, 5], [6, 7], [8] * 9], ["layers.0.mlp_output"], place / "activations",
                       batch_size=2, rows_per_shard=4)
    (place / "gguf").mkdir()
    for path in (TESTS / "interop" / "fixtures" / "gguf").glob("*.gguf"):
        (place / "gguf" / path.name).write_bytes(path.read_bytes())
    copied(TESTS / "features" / "fixtures" / "saelens", place / "saelens")
    return place


def change(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Changes a file so that it does harm, or damages it."""
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(hostile_json(path.read_text(), rng))
    elif path.suffix == ".safetensors" and rng.random() < 0.6:
        path.write_bytes(hostile_tensors(path.read_bytes(), rng))
    elif path.suffix == ".gguf" and rng.random() < 0.8:
        content = bytearray(path.read_bytes())
        for _ in range(int(rng.integers(1, 4))):  # most of the beginning is counts, lengths, types and names
            at, size = int(rng.integers(4, 3000)), int(rng.choice([4, 8]))
            content[at:at + size] = (int(rng.choice(_NUMBERS)) % 2**(8 * size)).to_bytes(size, "little")
        path.write_bytes(content)
    else:
        damage(path, rng)


def read_activations(directory):
    found = inspection.Activations(directory)
    found.verify()
    rows = found[np.arange(len(found))]
    assert rows["tokens"].tolist() == [3, 4, 5, 6, 7, *[8] * 9]
    assert rows["layers.0.mlp_output"].shape == (14, 8) and np.isfinite(rows["layers.0.mlp_output"]).all()


def read_model(path):
    try:
        bundle = tj.from_gguf(path) if path.suffix == ".gguf" else tj.from_huggingface(path)
    except ValueError as error:
        if str(error).startswith("the tensors in "):  # a line for each kind of problem
            raise ValueError(" ".join(str(error).split())) from error
        raise
    expected = jax.eval_shape(lambda key: make_model(bundle.config, key=key), jax.random.key(0))
    assert [leaf.shape for leaf in jax.tree.leaves(bundle.model)] == [leaf.shape for leaf in jax.tree.leaves(expected)]
    if bundle.tokenizer is not None:
        bundle.tokenizer.decode(bundle.tokenizer.encode("the king"))


def read_saved(directory):
    bundle = tj.load(directory)
    assert tree_digest(bundle.model) == tree_digest(bundle_of(_MODELS[directory.name.removeprefix("saved-")]).model)


def read_autoencoder(directory):
    bundle = tj.features.from_saelens(directory)
    rows = bundle.model(np.zeros((2, bundle.config.input_dim), np.float32))
    assert rows.shape == (2, bundle.config.output_dim or bundle.config.input_dim)


READERS = {"activations": read_activations, "classifier": read_model, "experts": read_model,
           "saved-classifier": read_saved, "saved-experts": read_saved, "saelens": read_autoencoder, "gguf": read_model}


@pytest.mark.parametrize("kind", sorted(READERS))
def test_damaged_and_hostile_files(directories, tmp_path, kind):
    """Every changed file is refused in one line, or what the reader checks still holds."""
    for good in sorted((directories / kind).iterdir()) if kind in ("gguf", "saelens") else [directories / kind]:
        READERS[kind](good)  # so that a reader that refuses everything fails

    def case(rng):
        place = copied(directories / kind, tmp_path / kind)
        if kind == "saelens":
            place = rng.choice(sorted(path for path in place.iterdir() if path.is_dir()))
        path = one_file(place, rng)
        change(path, rng)
        with warnings.catch_warnings(), campaign.refusals(str(tmp_path)):
            warnings.simplefilter("ignore")
            READERS[kind](path if kind == "gguf" else place)
        return True

    counts = campaign.run_cases(f"files of {kind}", case, least=20)
    assert counts.refused and not counts.failures  # some of the changes are always noticed


def num_layers(bundle):
    return {"layers": bundle.config.num_layers, "step": bundle.step}


def test_damaged_measurements_are_made_again(tmp_path):
    run = tmp_path / "run"
    tj.train(tj.config.ExperimentConfig(steps=1, batch_size=1, model=tj.ModelConfig(**SHAPE | {"vocab_size": None}),
                                        sample=tj.config.SampleConfig(every=0)),
             texts=["the king said to his men"] * 20, workdir=run, mesh=make_mesh(devices=jax.devices()[:1]))
    over_training(run, num_layers)
    stored = next((run / "measured" / "num_layers").iterdir())
    whole = stored.read_bytes()

    def case(rng):
        if stored.exists():
            stored.rmdir() if stored.is_dir() else stored.unlink()
        stored.write_bytes(whole)
        damage(stored, rng)
        with campaign.refusals(str(run)):
            assert over_training(run, num_layers).values["layers"].tolist() == [2]
        return True

    campaign.run_cases("measurements", case, least=20)
