"""DPO: log-probabilities ignore padding, the loss equals the published one, the reference runs
once, and training learns."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.alignment.dpo import dpo_loss, response_logprobs, with_reference
from transformer_jax.alignment.rankings import Rankings
from transformer_jax.config import MeshConfig, OptimConfig, PreferenceConfig
from transformer_jax.data.preferences import Comparison
from transformer_jax.models.decoder import Decoder
from transformer_jax.sharding import batch_sharding, make_mesh
from transformer_jax.tasks import preferences
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

COMPARISONS = [Comparison("the cat", ("sat on a mat", "bad")), Comparison("it", ("good", "or a mat")),
               Comparison("was it", ("on", "or")), Comparison("and", ("the cat", "a mat or a cat"))]
RANKED = [*COMPARISONS, Comparison("sat", ("on a mat", "on", "or"))]


def expected_logprobs(model, batch):
    """Computes each response separately, without padding, in float64."""
    found = np.zeros(batch["ranks"].shape)
    for n, k in np.ndindex(*found.shape):
        real = batch["segment_ids"][n, k] == 1
        ids, length = batch["tokens"][n, k][real], int(batch["mask"][n, k].sum())
        if len(ids):
            logits = np.asarray(model(jnp.asarray(ids)[None]).logits, np.float64)[0]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            found[n, k] = log_p[np.arange(len(ids) - length - 1, len(ids) - 1), ids[-length:]].sum()
    return found


@pytest.fixture(scope="module")
def rankings(tokenizer, config, make_decoder):
    return with_reference(Rankings.build(COMPARISONS, tokenizer, config.max_len), make_decoder(2), batch_size=3)


@pytest.fixture(scope="module")
def batch(rankings):
    return rankings[np.arange(4)]


@pytest.mark.long
def test_logprobs_are_those_of_the_responses(make_decoder, tokenizer, config):
    batch = Rankings.build(RANKED, tokenizer, config.max_len)[np.arange(5)]
    found = jax.jit(response_logprobs)(make_decoder(1), batch)
    np.testing.assert_allclose(found, expected_logprobs(make_decoder(1), batch), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_the_reference_is_measured_once_and_stored(batch, make_decoder):
    np.testing.assert_allclose(batch["reference_logprobs"], expected_logprobs(make_decoder(2), batch), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Two rankings of two responses, without their tokens."""

    digest: str = "0123456789abcdef" * 4
    reference_logprobs_NK: np.ndarray | None = None

    def __len__(self):
        return 2


def test_a_damaged_file_of_the_reference_is_measured_again(tmp_path, monkeypatch):
    expected, calls = np.array([[-1.5, -2.25], [-3.0, -0.125]], np.float32), []

    def measured(rankings, reference, batch_size):
        calls.append(batch_size)
        return dataclasses.replace(rankings, reference_logprobs_NK=expected)

    monkeypatch.setattr(preferences, "with_reference", measured)
    task = types.SimpleNamespace(config=tj.ExperimentConfig())
    for damage, count in ((lambda content: content, 1), (lambda content: content, 1),
                          (lambda content: content[:-1] + b"x", 2), (lambda content: content[:5], 3)):
        for path in tmp_path.glob("*.bin"):
            path.write_bytes(damage(path.read_bytes()))
        found = preferences.DirectPreference._with_reference(task, Ranked(), {"w": np.zeros(1)}, tmp_path)
        np.testing.assert_array_equal(found.reference_logprobs_NK, expected)
        assert len(calls) == count


def test_the_published_loss(batch, make_decoder):
    log_ratios = expected_logprobs(make_decoder(1), batch) - expected_logprobs(make_decoder(2), batch)
    margins = 0.3 * (log_ratios[:, 0] - log_ratios[:, 1])
    loss, weight, sums = jax.jit(dpo_loss(PreferenceConfig(beta=0.3)))(make_decoder(1), batch)
    assert float(weight) == 4.0
    assert float(loss) == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins), rel=1e-4)
    assert float(sums["margin"]) == pytest.approx(margins.sum(), rel=1e-4, abs=1e-4)
    assert float(sums["accuracy"]) == (margins > 0).sum()


def test_it_begins_at_the_log_of_two(batch, make_decoder):
    loss, weight, _ = jax.jit(dpo_loss(PreferenceConfig()))(make_decoder(2), batch)
    assert float(loss / weight) == pytest.approx(math.log(2), abs=1e-5)


def train(make_decoder, batch, mesh=None, steps=15):
    optimizer = make_optimizer(OptimConfig(peak_lr=3e-3, schedule="constant", warmup_steps=1, weight_decay=0.0), steps)
    step = make_train_step(dpo_loss(PreferenceConfig()), optimizer)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh):
        mesh = jax.sharding.get_mesh()
        state = init_state(jax.tree_util.Partial(lambda model, key: model, make_decoder(2)), optimizer,
                           jax.random.key(0), mesh)
        placed = jax.device_put(batch, batch_sharding(mesh))
        losses = []
        for _ in range(steps):
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"]))
    return state, metrics, losses


@pytest.mark.long
def test_it_learns_to_prefer(batch, make_decoder):
    _, metrics, losses = train(make_decoder, batch)
    assert losses[-1] < 0.5 * losses[0] and float(metrics["accuracy"]) == 1.0 and float(metrics["margin"]) > 0.5


@pytest.mark.long
def test_eight_devices_have_the_losses_of_one(batch, make_decoder):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(train(make_decoder, batch, mesh, steps=5)[2], train(make_decoder, batch, steps=5)[2],
                               rtol=1e-4)


def test_a_reference_of_another_vocabulary(tokenizer, config):
    other = jax.eval_shape(lambda key: Decoder(config.replace(vocab_size=9), key=key), jax.random.key(0))
    with pytest.raises(ValueError, match="the reference model has a vocabulary of 9 tokens; build the rankings"):
        with_reference(Rankings.build(COMPARISONS, tokenizer, 48), other)
