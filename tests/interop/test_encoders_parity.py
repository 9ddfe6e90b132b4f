"""BERT, RoBERTa and ModernBERT compute the same as transformers, and are equal after an export and an
import."""

import functools
import tempfile

import jax
import numpy as np
import pytest
import their_models
from safetensors.numpy import load_file
from their_models import KINDS, VOCAB, torch

from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import masked_token_loss

ENCODERS = ("bert", "bert-untied", "bert-gelu_new", "roberta", "roberta-relu", "modernbert", "modernbert-biases")
LENGTHS = np.array([13, 6, 1])


@functools.cache
def loaded(kind, seed):
    theirs = their_models.make(kind, seed)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return theirs, from_huggingface(directory)


def batch(kind, seed, side="right"):
    """Token ids, which of them are real, and token types."""
    rng = np.random.default_rng(seed)
    mask = np.arange(13) < LENGTHS[:, None]
    mask = mask if side == "right" else mask[:, ::-1]
    tokens = np.where(mask, rng.integers(3, VOCAB, mask.shape), KINDS[kind][3])
    types = rng.integers(0, 1 if "roberta" in kind else 2, mask.shape)
    return tokens, mask, None if "modernbert" in kind else types


@jax.jit
def run(model, tokens, mask, types):
    out = model(tokens, mask_BT=mask, token_types_BT=types)
    return out.logits, out.trace.residual, out.trace.attention(), out.hidden


def of_torch(array):
    return torch.from_numpy(np.array(array)).long()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ENCODERS)
def test_logits_hidden_states_and_maps(kind, seed):
    theirs, bundle = loaded(kind, seed)
    # BERT counts positions through padding.
    for side in ("right",) if kind.split("-")[0] == "bert" else ("right", "left"):
        tokens, mask, types = batch(kind, seed, side)
        given = {} if types is None else {"token_type_ids": of_torch(types)}
        with torch.no_grad():
            wanted = theirs(of_torch(tokens), attention_mask=of_torch(mask), output_hidden_states=True,
                            output_attentions=True, **given)
        logits, hidden, maps, final = map(np.array, run(bundle.model, tokens, mask, types))
        hidden[-1] = final  # under pre-norm, the trace ends with the stream before the final norm, and theirs after it
        assert wanted.logits.abs().max() > 1
        np.testing.assert_allclose(logits[mask], wanted.logits.numpy()[mask], atol=2e-5)
        np.testing.assert_allclose(hidden[:, mask], torch.stack(wanted.hidden_states).numpy()[:, mask], atol=2e-5)
        np.testing.assert_allclose(maps.swapaxes(2, 3)[:, mask],
                                   torch.stack(wanted.attentions).numpy().swapaxes(2, 3)[:, mask], atol=2e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_loss_and_gradients(kind, tmp_path):
    theirs, bundle = loaded(kind, 0)
    tokens, mask, _ = batch(kind, 5)
    places, weights = np.array([[1, 4, 12], [5, 0, 3], [0, 0, 0]]), np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    targets = np.random.default_rng(9).integers(3, VOCAB, places.shape)
    labels = np.full(tokens.shape, -100)
    for row, place in zip(*np.nonzero(weights), strict=True):
        labels[row, places[row, place]] = targets[row, place]
    loss = theirs(of_torch(tokens), attention_mask=of_torch(mask), labels=of_torch(labels)).loss
    theirs.zero_grad()
    loss.backward()

    def mean_loss(model):
        total, weight = masked_token_loss()(model, {
            "tokens": tokens, "segment_ids": mask.astype(np.int32), "masked_positions": places,
            "masked_targets": targets, "masked_weights": weights.astype(np.float32)})
        return total / weight

    ours, gradient = jax.jit(jax.value_and_grad(mean_loss))(bundle.model)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-4)
    to_huggingface(Bundle(gradient, None, bundle.config), tmp_path)
    for name, values in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_allclose(values, theirs.get_parameter(name).grad.numpy(), atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ENCODERS)
def test_round_trip_is_exact(kind, tmp_path):
    theirs, bundle = loaded(kind, 1)
    to_huggingface(bundle, tmp_path)
    again = from_huggingface(tmp_path)
    assert again.config == bundle.config
    jax.tree.map(np.testing.assert_array_equal, again.model, bundle.model)
    back = type(theirs).from_pretrained(tmp_path)
    for name, values in theirs.state_dict().items():
        if kind == "bert-untied" and name == "cls.predictions.bias":
            continue  # unused there
        assert torch.equal(values, back.state_dict()[name]), name
    assert set(back.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_in_bfloat16_logits_stay_within_two_percent(kind, tmp_path):
    """The root mean square of the difference, divided by that of the logits. The error of torch's
    bfloat16 is about as large."""
    theirs, bundle = loaded(kind, 0)
    tokens, mask, types = batch(kind, 0)
    to_huggingface(bundle, tmp_path)
    half = from_huggingface(tmp_path, dtype="bfloat16")
    assert half.model.embeddings.token.dtype == "bfloat16"
    with torch.no_grad():
        wanted = theirs(of_torch(tokens), attention_mask=of_torch(mask),
                        token_type_ids=of_torch(types)).logits.numpy()[mask]
    error = np.asarray(run(half.model, tokens, mask, types)[0])[mask] - wanted
    assert 1e-4 < np.sqrt((error**2).mean() / (wanted**2).mean()) < 0.02
