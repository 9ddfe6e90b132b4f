"""A custom objective in one file: contrastive embeddings of pairs of texts, with every program and
preflight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, EvalConfig, MeshConfig, OptimConfig, SampleConfig

LENGTH = 8


class Rows:
    """Pairs of texts as token ids, padded on the right."""

    def __init__(self, pairs, tokenizer):
        self.tokens_N2T = np.zeros((len(pairs), 2, LENGTH), np.int32)
        for row, pair in enumerate(pairs):
            for side, text in enumerate(pair):
                ids = tokenizer.encode(text)[:LENGTH]
                self.tokens_N2T[row, side, :len(ids)] = ids

    def __len__(self):
        return len(self.tokens_N2T)

    def __getitem__(self, indices):
        return {"tokens": self.tokens_N2T[indices]}


class Contrastive(tj.Task):
    """The two texts of a pair are near each other, and far from those of other pairs (van den Oord
    et al., 2018)."""

    name = "contrastive"
    family = "encoder"

    def texts(self, examples):
        return [text for pair in examples for text in pair]

    def prepare(self, examples, held_out, tokenizer, cache_dir):
        train, validation = Rows(examples, tokenizer), Rows(held_out, tokenizer)
        return tj.tasks.TaskData(train, contents=[repr(examples), repr(held_out)], summary=f"{len(train)} pairs",
                                 evaluation_batches=lambda size: [validation[np.arange(len(validation))]])

    def loss(self, model, batch, key=None):
        tokens_B2T = batch["tokens"]
        B = tokens_B2T.shape[0]
        tokens_MT = tokens_B2T.reshape(2 * B, LENGTH)
        hidden_MTD = model(tokens_MT, mask_BT=tokens_MT != 0, key=key).hidden
        vectors_MD = hidden_MTD.mean(1)
        vectors_B2D = (vectors_MD / jnp.linalg.norm(vectors_MD, axis=-1, keepdims=True)).reshape(B, 2, -1)
        scores_BB = 10.0 * vectors_B2D[:, 0] @ vectors_B2D[:, 1].T
        losses_B = -jnp.diagonal(jax.nn.log_softmax(scores_BB))
        hits = (scores_BB.argmax(-1) == jnp.arange(B)).sum().astype(jnp.float32)
        return losses_B.sum(), jnp.float32(B), {"accuracy": hits}

    def measure(self, bundle, data=None, *, batch_size=32, **options):
        rows = Rows(data, bundle.tokenizer)
        total, count, sums = self.loss(bundle.model, rows[np.arange(len(rows))])
        return {"loss": float(total / count), "accuracy": float(sums["accuracy"] / count)}

    def batch_shapes(self, batch_size):
        return {"tokens": jax.ShapeDtypeStruct((batch_size, 2, LENGTH), np.int32)}


PAIRS = [(f"{a}{b}", f"{b}{a}") for a in "abcdef" for b in "ghijkl"]
CONFIG = tj.ExperimentConfig(
    task="contrastive", steps=30, batch_size=8, log_every=10, optim=OptimConfig(peak_lr=0.01, warmup_steps=3),
    model=tj.ModelConfig(family="encoder", max_len=LENGTH, num_layers=1, num_heads=2, model_dim=16),
    eval=EvalConfig(every=15), checkpoint=CheckpointConfig(every=10), sample=SampleConfig(every=0))


@pytest.fixture(scope="module", autouse=True)
def registered():
    tj.tasks.register(Contrastive)


def leaves(bundle):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(bundle.model)]


@pytest.mark.long
def test_it_trains_evaluates_and_resumes(one_device, tmp_path, capsys):
    bundle = tj.train(CONFIG, PAIRS, workdir=tmp_path)
    measured = tj.evaluate(bundle, PAIRS)
    untrained = tj.Bundle(model=tj.Encoder(bundle.config, key=jax.random.key(5)), tokenizer=bundle.tokenizer,
                          config=bundle.config, experiment=bundle.experiment)
    assert measured["loss"] < 0.8 * tj.evaluate(untrained, PAIRS)["loss"]
    logged = tj.training.read_metrics(tmp_path / "metrics.jsonl")
    assert {"loss", "accuracy"} <= set(logged[0])
    assert {"validation_loss", "validation_accuracy"} <= set(logged[-1])
    loaded = tj.load(tmp_path)
    assert loaded.experiment.task == "contrastive"
    assert all(map(np.array_equal, leaves(loaded), leaves(bundle)))
    assert tj.train(CONFIG, PAIRS, workdir=tmp_path).step == 30
    assert "resuming from step 30" in capsys.readouterr().out


@pytest.mark.long
def test_eight_devices_learn_what_one_learns():
    one, eight = (tj.train(CONFIG.replace(steps=5, mesh=mesh), PAIRS, mesh=tj.sharding.make_mesh(mesh, devices))
                  for mesh, devices in ((MeshConfig(), jax.devices()[:1]),
                                        (MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())))
    for a, b in zip(leaves(one), leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_preflight_plans_the_custom_task():
    config = CONFIG.replace(model=CONFIG.model.replace(vocab_size=20))
    found = tj.preflight(config, mesh=tj.sharding.make_mesh(devices=jax.devices()[:1]), device="cpu", search=False)
    assert found.batch_size == 8 and found.peak > found.parameters > 0


def test_names_are_checked():
    class Other(tj.Task):
        name = "contrastive"

    with pytest.raises(ValueError, match="a task with the name 'contrastive' is already registered"):
        tj.tasks.register(Other)
    with pytest.raises(ValueError, match="did you mean 'contrastive'"):
        tj.tasks.get("contrastiv")
