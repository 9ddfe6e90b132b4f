"""Word vectors: the loss and its gradient against NumPy and autodiff, training, resuming,
sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transformer_jax as tj
from transformer_jax import recipes
from transformer_jax.baselines import most_similar
from transformer_jax.baselines.negative_sampling import BLOCK, BLOCKS, draw_pairs
from transformer_jax.baselines.word_vectors import WordVectors, make_word_vector_step
from transformer_jax.config.word_vectors import WordVectorConfig
from transformer_jax.data.words import Subsampling, WordRows, words_of
from transformer_jax.tasks.word_vectors import keep_probabilities
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.loop import to_devices
from transformer_jax.training.state import init_state

DAYS, COLOURS = ["monday", "tuesday", "friday"], ["red", "green", "blue"]


@pytest.fixture(scope="module")
def texts():
    """Days and colours stand in sentences of their own."""
    draw = np.random.default_rng(0)
    days = [f"On {draw.choice(DAYS)} we work and rest at {draw.choice(['noon', 'night'])}." for _ in range(300)]
    colours = [f"A {draw.choice(COLOURS)} wall has paint of {draw.choice(['oil', 'chalk'])}!" for _ in range(300)]
    return [" ".join(days), " ".join(colours)]


def settings(**model):
    config = recipes.get("word_vectors")
    model = WordVectorConfig(max_len=64, model_dim=8, window=3, subsample=0.0, **model)
    return config.replace(model=model, batch_size=8, steps=40,
                          optim=dataclasses.replace(config.optim, peak_lr=0.05), sample=tj.config.SampleConfig(),
                          checkpoint=tj.config.CheckpointConfig(every=20))


def train(*arguments, **options):
    return tj.train(*arguments, mesh=tj.sharding.make_mesh(devices=jax.devices()[:1]), **options)


def drawn(method, vocab_size=30):
    config = WordVectorConfig(vocab_size=vocab_size, model_dim=6, window=3, negatives=4, method=method)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, vocab_size, (2, BLOCK)), jnp.int32)
    segments = jnp.asarray(np.where(np.arange(BLOCK) < 40, 1, np.where(np.arange(BLOCK) < 60, 2, 0)) * np.ones((2, 1)),
                           jnp.int32)
    cumulative = jnp.cumsum(jnp.full(vocab_size, 1 / vocab_size))
    draw_once = jax.jit(draw_pairs, static_argnums=3)
    return config, np.asarray(segments), draw_once(tokens, segments, cumulative, config, jax.random.key(0))


def test_the_weights_of_cbow_are_those_of_its_pairs():
    pairs = drawn("cbow")[2]
    near = np.asarray(pairs.near_BLL)
    has_window = (near.sum(2) > 0).astype(float)
    num_random = pairs.outputs_BO.shape[1] - BLOCK
    of_inputs, of_outputs = jax.jit(type(pairs).weights)(pairs)
    np.testing.assert_allclose(of_inputs, np.einsum("bij,bi->bj", near, has_window * (1 + num_random * pairs.share)),
                               rtol=1e-5)
    np.testing.assert_allclose(of_outputs[:, :BLOCK], has_window)
    shares = np.repeat(has_window.sum(1)[:, None] * pairs.share, num_random, 1)
    np.testing.assert_allclose(of_outputs[:, BLOCK:], shares, rtol=1e-5)


@pytest.mark.parametrize("method", ["skip_gram", "cbow"])
def test_the_loss_is_that_of_a_loop_over_pairs(method):
    config, segments, pairs = drawn(method)
    draw = np.random.default_rng(1)
    inputs, outputs = draw.normal(size=(2, BLOCK, 6)), draw.normal(size=(2, pairs.outputs_BO.shape[1], 6))
    num_random = outputs.shape[1] - BLOCK
    log_sigmoid = lambda score: -np.log1p(np.exp(-score))
    near = np.asarray(pairs.true_BLL).swapaxes(1, 2) if method == "skip_gram" else np.asarray(pairs.near_BLL)
    expected, count = 0.0, 0
    for block in range(2):
        for centre in range(BLOCK):
            window = np.flatnonzero(near[block, centre])
            assert centre not in window and (abs(window - centre) <= config.window).all()
            assert (segments[block, window] == segments[block, centre]).all() or not len(window)
            if not len(window):
                continue
            compared = inputs[block, window] if method == "skip_gram" else inputs[block, window].mean(0)[None]
            count += len(compared)
            for vector in compared:
                expected -= log_sigmoid(vector @ outputs[block, centre])
                expected -= config.negatives / num_random * log_sigmoid(-outputs[block, BLOCK:] @ vector).sum()
    vectors = jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32)
    loss, pairs_found = jax.jit(type(pairs).loss)(pairs, *vectors)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and int(pairs_found) == count


@pytest.mark.parametrize("method", ["skip_gram", "cbow"])
def test_the_gradient_is_that_of_the_loss(method):
    """In CBOW, each word of a window takes the gradient of the mean: as if they were added, and
    their sum divided where it is compared."""
    pairs = drawn(method)[2]
    draw = np.random.default_rng(1)
    vectors = [jnp.asarray(draw.normal(size=(2, size, 6)), jnp.float32) for size in (BLOCK, pairs.outputs_BO.shape[1])]
    expected = list(jax.jit(jax.grad(lambda vectors: pairs.loss(*vectors)[0]))(vectors))
    if method == "cbow":
        near = np.asarray(pairs.near_BLL)
        counts = near.sum(2)

        def loss_of_means(means):
            scores = jnp.einsum("bid,bod->bio", means, vectors[1])
            true = jax.nn.softplus(-jnp.diagonal(scores[..., :BLOCK], axis1=1, axis2=2))
            return ((counts > 0) * (true + pairs.share * jax.nn.softplus(scores[..., BLOCK:]).sum(2))).sum()

        means = np.einsum("bij,bjd->bid", near, vectors[0]) / np.maximum(counts, 1)[..., None]
        expected[0] = np.einsum("bij,bid->bjd", near, jax.jit(jax.grad(loss_of_means))(means))
    for found, wanted in zip(jax.jit(type(pairs).gradients)(pairs, *vectors), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_windows_and_random_words_have_their_frequencies():
    config = WordVectorConfig(vocab_size=4, window=4)
    tokens, segments = jnp.zeros((200, BLOCK), jnp.int32), jnp.ones((200, BLOCK), jnp.int32)
    pairs = jax.jit(draw_pairs, static_argnums=3)(tokens, segments, jnp.asarray([0.0, 0.2, 0.7, 1.0]), config,
                                                  jax.random.key(0))
    frequencies = np.bincount(np.asarray(pairs.outputs_BO[:, BLOCK:]).ravel(), minlength=4) / (200 * BLOCK)
    np.testing.assert_allclose(frequencies, [0, 0.2, 0.5, 0.3], atol=0.02)
    middle = np.asarray(pairs.true_BLL)[:, :, 32]  # the words from which word 32 is predicted
    np.testing.assert_allclose(middle[:, 33:38].mean(0), [1, 0.75, 0.5, 0.25, 0], atol=0.1)


def test_frequent_words_are_left_out_as_often_as_in_word2vec():
    counts = np.array([9000, 900, 90, 10])
    fractions = counts / counts.sum()
    expected = np.minimum(np.sqrt(0.01 / fractions) + 0.01 / fractions, 1)
    keep = keep_probabilities(counts, 0.01)
    np.testing.assert_allclose(keep, expected)
    tokens = np.random.default_rng(0).choice(4, (8, 1000), p=fractions)
    subsampling = Subsampling(keep.astype(np.float32), 8, BLOCKS, BLOCK, 8)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    found = subsampling(batch, np.random.default_rng(1))
    assert found["tokens"].shape == found["segment_ids"].shape == (BLOCK * BLOCKS, 8)
    kept = np.bincount(found["tokens"][found["segment_ids"] > 0], minlength=4)
    np.testing.assert_allclose(kept, tokens.size * fractions * expected, rtol=0.2)
    everything = Subsampling(np.ones(4, np.float32), 40, BLOCKS, BLOCK, 8)(batch, np.random.default_rng(1))
    blocks = everything["tokens"].reshape(BLOCKS, BLOCK, 40).transpose(0, 2, 1).reshape(-1)
    np.testing.assert_array_equal(blocks[:8000], tokens.ravel())  # block b of the stream is in microbatch b % S
    assert not everything["segment_ids"].reshape(BLOCKS, BLOCK, 40).transpose(0, 2, 1).reshape(-1)[8000:].any()


def test_rows_have_no_rare_words_and_know_their_documents():
    tokens = np.array([9, 1, 2, 5, 1, 9, 2, 1, 2])
    rows = WordRows(tokens, np.isin(np.arange(10), [1, 2]), 9, 2)
    found = rows[np.arange(3)]
    assert found["tokens"].tolist() == [[1, 2], [1, 2], [1, 2]]
    assert found["segment_ids"].tolist() == [[1, 1], [1, 2], [2, 2]]
    assert words_of("The king's Café, no. 7_x!") == " the king s café no 7 x"
    with pytest.raises(ValueError, match="has 6 words that are frequent enough, but one row needs 7"):
        WordRows(tokens, np.isin(np.arange(10), [1, 2]), 9, 7)


@pytest.fixture(scope="module")
def trained(texts):
    return train(settings(), texts)


def test_similar_words_are_near_each_other(trained):
    for group in (DAYS, COLOURS):
        assert {word for word, _ in most_similar(trained, [group[0]], top=2)} == set(group[1:])
    (word, cosine), *_ = most_similar(trained, ["Monday", "red"], ["tuesday"], top=1)
    assert word in COLOURS[1:] and 0 < cosine <= 1.001


def test_analogies_are_measured(trained, tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text(": section\nmonday tuesday red green\nmonday red tuesday nowhere\n")
    measured = tj.evaluate(trained, str(path))
    best = most_similar(trained, ["tuesday", "red"], ["monday"], top=1)[0][0]
    assert measured == {"accuracy": float(best == "green"), "questions": 1, "skipped": 1}
    for content, message in (("a b c\n", "line 1 has 3 words"), (": only\n", "has no analogy"),
                             ("x y z w\n", "has no analogy")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            tj.evaluate(trained, str(path))
    with pytest.raises(ValueError, match="there is no file"):
        tj.evaluate(trained, str(tmp_path / "none"))


def test_cbow_learns_the_same_groups(texts):
    bundle = train(settings(method="cbow"), texts)
    assert {word for word, _ in most_similar(bundle, ["red"], top=2)} == set(COLOURS[1:])


def test_an_interrupted_run_ends_with_the_same_bits(texts, trained, tmp_path):
    class Stop(Exception):
        pass

    def stop(loop):
        if loop.step == 25:
            raise Stop

    with pytest.raises(Stop):
        train(settings(), texts, workdir=tmp_path, hooks=[stop])
    resumed = train(settings(), texts, workdir=tmp_path)
    assert tree_digest(resumed.model) == tree_digest(trained.model)
    loaded = tj.load(tmp_path)
    assert tree_digest(loaded.model) == tree_digest(trained.model) and loaded.step == 40
    assert most_similar(loaded, ["red"]) == most_similar(trained, ["red"])


def test_tables_are_sharded_by_the_vocabulary():
    """The vectors are those of a run whose tables are whole, up to rounding."""
    model = WordVectorConfig(vocab_size=40, model_dim=8, window=3)
    mesh = tj.sharding.make_mesh(tj.config.MeshConfig(data=2, tensor=4))
    step = make_word_vector_step(jnp.cumsum(jnp.full(40, 1 / 40)), lambda step: 0.05)
    draw = np.random.default_rng(0)
    batch = {"tokens": draw.integers(0, 40, (BLOCK * BLOCKS, 3)).astype(np.int32),
             "segment_ids": np.ones((BLOCK * BLOCKS, 3), np.int32)}
    results = []
    for devices in (mesh, tj.sharding.make_mesh(devices=jax.devices()[:1])):
        with jax.set_mesh(devices):
            state = init_state(lambda key: WordVectors(model, key=key), optax.identity(), jax.random.key(0), devices)
            for _ in range(2):
                state, metrics = step(state, to_devices(batch, devices))
        results.append((state.params, metrics))
    sharded, whole = results[0][0], results[1][0]
    assert {shard.data.shape for shard in sharded.input[...].addressable_shards} == {(model.vocab_size // 4, 8)}
    np.testing.assert_allclose(sharded.input[...], whole.input[...], atol=1e-6)
    np.testing.assert_allclose(sharded.output[...], whole.output[...], atol=1e-6)
    assert float(results[0][1]["loss"]) == pytest.approx(float(results[1][1]["loss"]), rel=1e-5)
    assert np.abs(whole.output[...]).sum() > 0


def test_an_update_that_is_not_finite_is_skipped():
    config = WordVectorConfig(vocab_size=8, model_dim=4)
    step = make_word_vector_step(jnp.linspace(0.125, 1, 8), lambda step: 0.1)
    state = init_state(lambda key: WordVectors(config, key=key), optax.identity(), jax.random.key(0))
    state.params.input[...] = state.params.input[...].at[0].set(jnp.nan)
    batch = {"tokens": jnp.ones((BLOCK * BLOCKS, 2), jnp.int32).at[:, 1].set(0),
             "segment_ids": jnp.ones((BLOCK * BLOCKS, 2), jnp.int32)}
    state, metrics = step(state, batch)
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
    assert np.isfinite(state.params.output[...]).all() and np.abs(state.params.output[...]).sum() > 0


@pytest.mark.parametrize(("change", "message"), [
    (lambda config: config.replace(optim=tj.config.OptimConfig()), "optim.name='adamw', but word vectors"),
    (lambda config: config.replace(model=config.model.replace(min_count=9999)), "lower model.min_count"),
    (lambda config: config.replace(model=config.model.replace(method="glove")), "method='glove' is not one of"),
    (lambda config: config.replace(model=config.model.replace(window=0)), "window"),
    (lambda config: config.replace(model=config.model.replace(num_layers=2)), "num_layers=2"),
])
def test_wrong_settings(texts, change, message):
    with pytest.raises(ValueError, match=message):
        train(change(settings()), texts)


def test_unknown_words(trained):
    with pytest.raises(ValueError, match="there is no vector of 'nowhere', 'two words'"):
        most_similar(trained, ["red", "nowhere"], ["two words"])
    with pytest.raises(ValueError, match="must be a list of words"):
        most_similar(trained, "red")


def test_held_out_text_is_measured(texts):
    found = {}

    class Logger:
        def write(self, step, values):
            found.update({step: values["validation_loss"]} if "validation_loss" in values else {})

        def close(self):
            pass

    config = settings().replace(eval=tj.config.EvalConfig(every=20))
    train(config, texts, held_out=[text[:3000] for text in texts], loggers=[Logger()])
    untrained = (1 + config.model.negatives) * np.log(2)  # every score is 0 while the output vectors are
    assert sorted(found) == [20, 40] and found[40] < found[20] < untrained


def test_an_optimizer_of_ones_own_uses_the_gradient_of_the_whole_batch(texts):
    losses = []
    bundle = train(settings(), texts, optimizer=optax.adam(0.02), hooks=[
        lambda loop: losses.append(float(loop.metrics["loss"]))])
    assert losses[0] == pytest.approx(6 * np.log(2), rel=1e-3) and losses[-1] < 0.8 * losses[0]
    assert bundle.model.output[...].any()
