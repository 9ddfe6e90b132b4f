"""The work of a researcher in Python with only ``transformer_jax``: training, evaluation, custom
tasks and custom loops."""

import dataclasses
import itertools
import math
import os
import random
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, ClassifierConfig, EvalConfig, OptimConfig, SampleConfig
from transformer_jax.config.families import config_class_of

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs"]
CONFIG = tj.ExperimentConfig(
    steps=12, batch_size=8, log_every=4, optim=OptimConfig(peak_lr=0.01, warmup_steps=2),
    model=tj.ModelConfig(max_len=16, num_layers=1, num_heads=2, model_dim=16), eval=EvalConfig(every=6, batch_size=8),
    checkpoint=CheckpointConfig(every=5), sample=SampleConfig(every=0))


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=12)) for _ in range(60)]


@pytest.fixture(scope="module")
def bundle(texts):
    return tj.train(CONFIG, texts=texts)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_notebook_trains_on_its_own_texts(bundle, texts):
    assert bundle.step == 12 and bundle.config.vocab_size == bundle.tokenizer.vocab_size
    assert bundle.experiment.model == bundle.config
    text = tj.generate(bundle.model, "the", tokenizer=bundle.tokenizer, key=jax.random.key(0), max_new_tokens=4).texts
    assert len(text) == 1
    found = tj.evaluate(bundle, texts[:5])
    assert found["loss"] < math.log(bundle.config.vocab_size)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / found["bytes"])
    with pytest.raises(ValueError, match=r"the task 'language_model' has no option 'batchsize'; did you mean 'batch_"):
        tj.evaluate(bundle, texts[:5], batchsize=4)
    with pytest.raises(ValueError, match="no option 'beam_size'"):
        tj.evaluate(bundle, texts[:5], beam_size=4)


@pytest.mark.long
def test_the_same_call_with_a_workdir_resumes_and_learns_the_same(bundle, texts, tmp_path):
    hook = Stopper(7)
    with pytest.raises(tj.training.Interrupted):
        tj.train(CONFIG, texts=texts, workdir=tmp_path / "run", hooks=[hook])
    resumed = tj.train(CONFIG, texts=texts, workdir=tmp_path / "run")
    assert same(resumed.model, bundle.model) and same(tj.load(tmp_path / "run").model, bundle.model)
    with pytest.raises(ValueError, match="holds a run with another config"):
        tj.train(CONFIG.replace(seed=1), texts=texts, workdir=tmp_path / "run")
    with pytest.raises(ValueError, match="the training data is not the same"):
        tj.train(CONFIG, texts=texts[1:], workdir=tmp_path / "run")


class Stopper:
    """Ctrl-C after a step."""

    def __init__(self, step):
        self._step = step

    def __call__(self, loop):
        if loop.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_returns_what_was_learned(texts):
    assert tj.train(CONFIG, texts=texts, hooks=[Stopper(3)]).step == 3


@pytest.mark.long
def test_a_path_a_config_by_name_and_steps(texts, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(texts))
    trained = tj.train(CONFIG, data=path, steps=3)
    assert trained.step == 3 and trained.experiment.data.path == str(path)
    with pytest.raises(ValueError, match=r"quickstart"):
        tj.train("quickstar", texts=texts)


def test_an_iterator_of_batches(bundle):
    trained = tj.train(CONFIG, random_batches(), tokenizer=bundle.tokenizer, steps=3)
    assert trained.step == 3 and trained.tokenizer is bundle.tokenizer
    with pytest.raises(ValueError, match=r"set model\.vocab_size, or pass tokenizer"):
        tj.train(CONFIG, random_batches())


def random_batches():
    draw = np.random.default_rng(0)
    while True:
        tokens = draw.integers(5, size=(8, 17)).astype(np.int32)
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


@pytest.mark.long
def test_a_workdir_of_batches_refuses_another_config(bundle, tmp_path):
    tj.train(CONFIG, random_batches(), tokenizer=bundle.tokenizer, steps=2, workdir=tmp_path / "run")
    assert tj.load(tmp_path / "run").tokenizer.digest == bundle.tokenizer.digest
    with pytest.raises(ValueError, match="holds a run with another config"):
        tj.train(CONFIG.replace(seed=1), random_batches(), tokenizer=bundle.tokenizer, steps=2,
                 workdir=tmp_path / "run")


@pytest.mark.long
def test_a_grain_data_set_of_batches_resumes_exactly(bundle, tmp_path):
    def source():
        rows = grain.MapDataset.source(np.arange(40)).seed(0).shuffle().repeat().map(
            lambda number: {"tokens": (np.arange(16) + number) % 5, "targets": (np.arange(16) + number + 1) % 5})
        return rows.batch(8).to_iter_dataset()

    config = CONFIG.replace(model=bundle.config, steps=8)
    whole = tj.train(config, source())
    with pytest.raises(tj.training.Interrupted):
        tj.train(config, source(), workdir=tmp_path / "run", hooks=[Stopper(6)])
    assert same(tj.train(config, source(), workdir=tmp_path / "run").model, whole.model)


def test_iterators_of_batches_refuse_watching_and_wrong_batches(bundle, tmp_path):
    watched = CONFIG.replace(metrics=tj.config.MetricsConfig(attention_every=1))
    with pytest.raises(ValueError, match="attention_every needs held-out examples"):
        tj.train(watched, random_batches(), tokenizer=bundle.tokenizer)
    with pytest.raises(ValueError, match=r"a batch of type str; expected a dict of arrays .* or a list of examples"):
        tj.train(CONFIG, (text for text in ["the cat"]), tokenizer=bundle.tokenizer)


@pytest.mark.long
def test_a_tokenizer_is_never_dropped_silently(bundle, texts, tmp_path):
    with pytest.raises(ValueError, match="base already has a tokenizer"):
        tj.train(tj.ExperimentConfig(), texts, base=bundle, tokenizer=bundle.tokenizer)
    tj.train(CONFIG, texts, steps=2, workdir=tmp_path / "run")
    other = tj.Tokenizer.train(texts, kind="word")
    with pytest.raises(ValueError, match="started with another tokenizer"):
        tj.train(CONFIG, texts, steps=2, workdir=tmp_path / "run", tokenizer=other)


@pytest.mark.long
def test_a_custom_loop_learns_the_same_as_train(bundle, texts, tmp_path):
    config = CONFIG.replace(model=bundle.config)
    task = tj.tasks.make(config)
    data = task.prepare(*task.read(texts), bundle.tokenizer, tmp_path)
    optimizer = tj.training.make_optimizer(config.optim, config.steps)
    state, step = tj.init_training(config, task), tj.make_train_step(task.loss, optimizer)
    batches = tj.data.make_batches(data.train, batch_size=config.batch_size, seed=config.seed)
    with jax.set_mesh(tj.sharding.make_mesh(devices=jax.devices()[:1])):
        for _ in range(config.steps):
            state, metrics = step(state, tj.training.to_devices(next(batches)))
    assert math.isfinite(float(metrics["loss"])) and len(jax.devices()) > 1
    # tj.train shards the batch over all devices, which sums in another order. Biases of keys change
    # nothing in a softmax, so that their gradients are rounding errors alone: what is compared is
    # what the models compute.
    tokens = np.arange(16)[None] % config.model.vocab_size
    np.testing.assert_allclose(tj.forward(state.params, tokens), tj.forward(bundle.model, tokens), atol=1e-4)


def test_batches_that_end_early_or_lack_an_array(bundle):
    config = CONFIG.replace(model=bundle.config)
    with pytest.raises(ValueError, match="the batches end after step 1, but the run has 12 steps; set steps=1, or"):
        tj.train(config, itertools.islice(random_batches(), 1))
    with pytest.raises(ValueError, match="the loss finds nothing named 'tokens'; a batch of this run has the arrays "
                                         "targets, token"):
        tj.train(config, ({"token": batch["tokens"], "targets": batch["targets"]} for batch in random_batches()))


class Scribble(tj.Task):
    """A task whose parts return what the test sets."""

    name, family, data, sums = "scribble", "decoder", None, None

    def prepare(self, examples, held_out, tokenizer, cache_dir):
        return self.data

    def loss(self, model, batch, key=None):
        return self.sums


def test_a_task_that_returns_the_wrong_things(bundle, texts):
    with pytest.raises(ValueError, match=r"what Scribble\.prepare returns is of type NoneType; expected a tj\.tasks"):
        tj.train(CONFIG, texts, task=Scribble)
    for sums, found in ((jnp.ones(()), r"\(\)"), ((jnp.ones(3), jnp.ones(())), r"\(\(3,\), \(\)\)")):
        wrong = type("Wrong", (Scribble,), {"sums": sums})
        with pytest.raises(ValueError, match=rf"the loss returns {found} \(shapes\); expected \(sum of losses, sum"):
            tj.train(CONFIG.replace(model=bundle.config), random_batches(), task=wrong)
    with pytest.raises(ValueError, match="is not a class that is derived from tj.Task"):
        tj.tasks.register(int)


@pytest.mark.long
def test_any_optax_transformation(texts):
    still = tj.train(CONFIG, texts=texts, optimizer=optax.sgd(0.0), steps=2)
    start = tj.init_training(CONFIG.replace(model=still.config))
    assert same(still.model, start.params)


def test_invalid_arguments_raise_one_line_errors(texts):
    with pytest.raises(ValueError, match="starts from a trained model"):
        tj.train(CONFIG.replace(task="sft"), texts)
    with pytest.raises(ValueError, match="did you mean 'translation'"):
        tj.train(CONFIG.replace(task="translaton"), texts)
    with pytest.raises(ValueError, match="texts is one string"):
        tj.train(CONFIG, texts="a text")
    with pytest.raises(ValueError, match="two names of the same argument"):
        tj.train(CONFIG, texts, texts=texts)
    with pytest.raises(ValueError, match="set exactly one source of training data"):
        tj.train(CONFIG)


@pytest.mark.long
def test_translation_and_masked_tokens_by_the_same_call(texts):
    pairs = [(text, text.upper()) for text in texts]
    model = dataclasses.replace(CONFIG.model, family="encoder_decoder", max_len=80, num_encoder_layers=None,
                                num_decoder_layers=None)
    translator = tj.train(CONFIG.replace(model=model, steps=2), pairs)
    found = tj.evaluate(translator, pairs[:2], beam_size=1)
    assert found["sentences"] == 2 and 0 <= found["exact"] <= 1
    encoder = tj.train(CONFIG.replace(model=CONFIG.model.replace(family="encoder"), steps=2), texts)
    found = tj.evaluate(encoder, texts[:2])
    # The baselines count the training text of the run, which is in no file, so they are left out.
    assert found["lines"] == 2 and {name for name in found if "top1" in name} == {"model_top1"}


TRANSFORMERS = ("decoder", "encoder", "encoder_decoder", "reward")


def test_every_task_says_what_its_batches_are_or_why_not():
    for name in tj.tasks.names():
        task = tj.tasks.get(name)
        if task.family in ("classifier", "token_classifier"):
            model = CONFIG.model.replace(family=f"encoder_{task.family}", classifier=ClassifierConfig(("good", "bad")))
        else:
            model = (CONFIG.model.replace(family=task.family) if task.family in TRANSFORMERS else
                     config_class_of(task.family)())
        config = CONFIG.replace(task=name, model=model.replace(vocab_size=30))
        try:
            shapes = task(config).batch_shapes(3)
        except ValueError as error:
            assert name in str(error)
        else:
            # Word vectors read the text in blocks: as many tokens as three rows have, or more.
            assert all(shape.size >= 3 * model.max_len if name == "word_vectors" else shape.shape[0] == 3
                       for shape in shapes.values())
