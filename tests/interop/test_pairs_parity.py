"""BART, mBART, Marian, Pegasus and T5 give the same outputs, generated texts and beams as
transformers."""

import functools
import tempfile

import jax
import numpy as np
import pytest
import their_models
from safetensors.numpy import load_file
from their_models import KINDS, torch

import transformer_jax as tj
from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import translation_loss

PAIRS = [kind for kind in KINDS if "bert" not in kind]
LENGTHS = np.array([13, 6, 1])


@functools.cache
def loaded(kind, seed, std=0.2, turned=False):
    theirs = their_models.make(kind, seed, std, turned)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return theirs, from_huggingface(directory)


def batch(kind, seed):
    """Sources, which of their tokens are real, and targets."""
    rng = np.random.default_rng(seed)
    mask = np.arange(13) < LENGTHS[:, None]
    return np.where(mask, rng.integers(3, 60, mask.shape), KINDS[kind][3]), mask, rng.integers(3, 60, (3, 9))


@jax.jit
def run(model, source, mask, target):
    out = model(source, target, source_segment_ids_BS=mask)
    trace = out.trace
    return out.logits, out.hidden, trace, [part.attention() for part in (trace.encoder, trace.decoder, trace.cross)]


def of_torch(array):
    return torch.from_numpy(np.array(array)).long()


def check(ours, theirs, rows=None):
    """Two arrays of layers ``[L, B, ...]``, or of their real tokens; theirs is a tuple of
    layers."""
    ours, theirs = np.asarray(ours), torch.stack(theirs).numpy()
    if ours.ndim == 5:  # maps: rows of the batch and of the map together
        ours, theirs = ours.swapaxes(2, 3), theirs.swapaxes(2, 3)
    if rows is not None:
        ours, theirs = ours[:, rows], theirs[:, rows]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", PAIRS)
def test_logits_hidden_states_and_maps(kind, seed):
    theirs, bundle = loaded(kind, seed)
    source, mask, target = batch(kind, seed)
    with torch.no_grad():
        wanted = theirs(of_torch(source), attention_mask=of_torch(mask), decoder_input_ids=of_torch(target),
                        output_hidden_states=True, output_attentions=True)
    logits, hidden, trace, (encoder, decoder, cross) = run(bundle.model, source, mask, target)
    assert wanted.logits.abs().max() > 0.3
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=2e-5)
    np.testing.assert_allclose(hidden, wanted.decoder_hidden_states[-1].numpy(), atol=2e-5)
    # Under pre-norm, theirs end with the final norm, ours with the stream before it.
    layers = slice(None, -1 if bundle.config.norm_position == "pre" else None)
    check(trace.encoder.residual[layers], wanted.encoder_hidden_states[layers], mask)
    check(trace.decoder.residual[layers], wanted.decoder_hidden_states[layers])
    check(encoder, wanted.encoder_attentions, mask)
    check(decoder, wanted.decoder_attentions)
    check(cross, wanted.cross_attentions)


@pytest.mark.parametrize("kind", ["bart-scaled", "marian", "t5", "t5-1.1"])
def test_loss_and_gradients(kind, tmp_path):
    theirs, bundle = loaded(kind, 0)
    source, mask, target = batch(kind, 5)
    weights = np.arange(9) < np.array([9, 4, 6])[:, None]
    start = np.full((3, 1), theirs.config.decoder_start_token_id)
    inputs = np.concatenate([start, target[:, :-1]], axis=1)
    loss = theirs(of_torch(source), attention_mask=of_torch(mask), decoder_input_ids=of_torch(inputs),
                  labels=of_torch(np.where(weights, target, -100))).loss
    theirs.zero_grad()
    loss.backward()

    def mean_loss(model):
        total, weight = translation_loss()(model, {
            "source": source, "source_segment_ids": mask.astype(np.int32), "tokens": inputs, "targets": target,
            "weights": weights.astype(np.float32)})
        return total / weight

    ours, gradient = jax.jit(jax.value_and_grad(mean_loss))(bundle.model)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-4)
    to_huggingface(Bundle(gradient, None, bundle.config), tmp_path)
    for name, values in load_file(tmp_path / "model.safetensors").items():
        if name == "final_logits_bias":
            continue  # their model has no gradient for it
        wanted = theirs.get_parameter(name).grad.numpy()
        if name == "model.shared.weight":  # torch has no gradient for the row of padding
            values, wanted = (np.delete(x, KINDS[kind][3], axis=0) for x in (values, wanted))
        np.testing.assert_allclose(values, wanted, atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", PAIRS)
def test_round_trip_is_exact(kind, tmp_path):
    theirs, bundle = loaded(kind, 1)
    to_huggingface(bundle, tmp_path)
    again = from_huggingface(tmp_path)
    assert again.config == bundle.config
    jax.tree.map(np.testing.assert_array_equal, again.model, bundle.model)
    back = type(theirs).from_pretrained(tmp_path)
    for name, values in theirs.state_dict().items():
        assert torch.equal(values, back.state_dict()[name]), name
    for name in ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids"):
        assert getattr(back.generation_config, name) == getattr(theirs.generation_config, name)


def new_tokens(sequence, bundle, end):
    """The generated tokens, without the tokens that start every target and without padding."""
    tokens = sequence[len(bundle.config.start_ids):].tolist()
    return tokens[:tokens.index(end) + 1] if end in tokens else tokens


# With weights like these greedy texts do not only repeat a token.
@pytest.mark.parametrize(("kind", "turned"), [("bart", True), ("marian", True), ("t5", False)])
def test_greedy_for_200_tokens(kind, turned):
    theirs, bundle = loaded(kind, 0, 0.4, turned)
    source, mask, _ = batch(kind, 0)
    end, num_new = KINDS[kind][4], 200
    with torch.no_grad():
        theirs.get_output_embeddings().weight[end] = 0.0  # in both: rows are to go on
        if kind != "t5":
            theirs.final_logits_bias[:, end] = -1e9
        wanted = theirs.generate(of_torch(source), attention_mask=of_torch(mask), do_sample=False,
                                 max_new_tokens=num_new)
    embeddings = bundle.model.embeddings
    embeddings.token[...] = embeddings.token[...].at[end].set(0.0)
    if kind != "t5":
        embeddings.output_bias[...] = embeddings.output_bias[...].at[end].set(-1e9)
    rows = [row[:length].tolist() for row, length in zip(source, LENGTHS, strict=True)]
    found = tj.generate(bundle.model, rows, end_ids=[end], sampling=tj.Sampling(temperature=0),
                        max_new_tokens=num_new - len(bundle.config.start_ids) + 1)
    assert found.tokens == [new_tokens(sequence, bundle, end) for sequence in wanted]
    assert max(found.lengths) > 150 and max(len(set(tokens)) for tokens in found.tokens) > 4


@pytest.mark.parametrize(("kind", "alpha"), [("bart", 0.0), ("marian", 1.0), ("marian", 0.0), ("t5", 1.0), ("t5", 0.3),
                                             ("m2m100", 0.0)])
def test_beam_search(kind, alpha):
    """All n best and their scores.

    Both define the same where a score is log P over length^alpha and a search goes on until nothing
    can become better (``early_stopping="never"`` there). transformers counts a forced token in the
    length, and this library counts it as part of the start, so BART and M2M100 are compared with
    alpha = 0.
    """
    theirs, bundle = loaded(kind, 1, 0.3)
    source, mask, _ = batch(kind, 1)
    end = KINDS[kind][4]
    with torch.no_grad():
        if kind == "marian":
            theirs.final_logits_bias[0, 60] = 5.0  # padding would have the largest probability if it were allowed
            bundle.model.embeddings.output_bias[...] = bundle.model.embeddings.output_bias[...].at[60].set(5.0)
        wanted = theirs.generate(
            of_torch(source), attention_mask=of_torch(mask), num_beams=4, num_return_sequences=4, do_sample=False,
            max_new_tokens=24, length_penalty=alpha, early_stopping="never", output_scores=True,
            return_dict_in_generate=True)
    rows = [row[:length].tolist() for row, length in zip(source, LENGTHS, strict=True)]
    found = tj.beam_search(bundle.model, rows, beam_size=4, n_best=4, length_penalty=alpha, penalty="length",
                           max_new_tokens=24 - len(bundle.config.start_ids) + 1, end_ids=[end])
    hypotheses = [hypothesis for n_best in found.n_best for hypothesis in n_best]
    assert [hypothesis.tokens for hypothesis in hypotheses] == [
        new_tokens(sequence, bundle, end)[:len(hypothesis.tokens)]
        for sequence, hypothesis in zip(wanted.sequences, hypotheses, strict=True)]
    np.testing.assert_allclose([hypothesis.score for hypothesis in hypotheses], wanted.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_in_bfloat16_logits_stay_within_three_percent(kind, tmp_path):
    """The root mean square of the difference, divided by that of the logits."""
    theirs, bundle = loaded(kind, 1)
    source, mask, target = batch(kind, 0)
    to_huggingface(bundle, tmp_path)
    half = from_huggingface(tmp_path, dtype="bfloat16")
    with torch.no_grad():
        wanted = theirs(of_torch(source), attention_mask=of_torch(mask),
                        decoder_input_ids=of_torch(target)).logits.numpy()
    error = np.asarray(run(half.model, source, mask, target)[0]) - wanted
    assert 1e-4 < np.sqrt((error**2).mean() / (wanted**2).mean()) < 0.03
