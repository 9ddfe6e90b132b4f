"""Every named experiment loads, its documented command works, and the one for TPU pods is compiled
without a TPU."""

import functools
import importlib
import importlib.util
import math
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax import recipes
from transformer_jax.config import ExperimentConfig, MeshConfig
from transformer_jax.data import PackedPairs, make_batches
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import batch_sharding, make_mesh
from transformer_jax.tasks.language_model import read_corpus
from transformer_jax.tasks.translation import read_translation_data
from transformer_jax.training.objectives import translation_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import abstract_state
from transformer_jax.training.step import make_train_step

FAMILIES = {
    "quickstart": "decoder", "shakespeare_char": "decoder", "shakespeare_fast": "decoder", "shakespeare_gpu": "decoder",
    "gpt2_small": "decoder", "book_mlm": "encoder", "book_mlm_full": "encoder", "dates": "encoder_decoder",
    "multi30k_ende": "encoder_decoder", "multi30k_enfr": "encoder_decoder", "tatoeba_pten": "encoder_decoder",
    "wmt14_ende": "encoder_decoder", "agreement_gpt": "decoder", "agreement_mlm": "encoder",
    "word_vectors": "word_vectors", "classify": "encoder", "classify_tokens": "encoder",
    "embed": "encoder", "book_electra": "electra", "book_modernbert": "encoder",
}
# These need no file of the user: a program of their own makes their data.
OWN_PROGRAMS = {"quickstart": "quickstart", "dates": "dates", "agreement_gpt": "agreement",
                "agreement_mlm": "agreement"}
STAGES = {"reward": "reward", "dpo": "dpo", "ppo": "ppo", "grpo": "ppo", "sft_instructions": "sft", "sft_faquad": "sft",
          "scaling": "scaling"}
FOLDER = pathlib.Path(recipes.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def test_the_names_that_others_rely_on():
    assert set(FAMILIES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(name):
    config = recipes.get(name)
    assert isinstance(config, ExperimentConfig)
    assert config.model.family == FAMILIES.get(name, config.model.family)
    # The vocabulary is the tokenizer's; an encoder alone may have room for more.
    assert config.model.vocab_size is None or config.model.family == "encoder"
    assert config.optim.warmup_steps < config.steps
    if config.model.family == "encoder" and config.sample.every and config.task is None:
        assert "<mask>" in config.sample.prompt
    if name not in OWN_PROGRAMS and config.data.tfds is None and config.data.generated is None:
        # a user's text is still to be named
        with pytest.raises(ValueError, match="set exactly one source of training data"):
            (read_translation_data if config.model.family == "encoder_decoder" else read_corpus)(config.data)


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_says_how_to_run_it(name):
    docstring = importlib.import_module(f"experiments.configs.{name}").__doc__
    commands = [shlex.split(line) for line in docstring.replace("\\\n", " ").splitlines() if line.startswith("python ")]
    assert commands and docstring.splitlines()[0].endswith(".")
    if name in OWN_PROGRAMS:
        assert commands[0] == ["python", "-m", f"experiments.{OWN_PROGRAMS[name]}"]
    else:
        program = STAGES.get(name, "train")
        is_default = name == program
        assert commands[0][:4 - is_default] == ["python", "-m", f"experiments.{program}",
                                                f"--config={name}"][:4 - is_default]
        assert any(argument.startswith("--workdir=") for argument in commands[0])
    for command in commands:
        assert importlib.util.find_spec(command[2]), command
        for path in re.findall(r"--config\.([\w.]+)=", " ".join(command)):
            functools.reduce(getattr, path.split("."), recipes.get(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_size_that_its_docstring_states(name):
    docstring = importlib.import_module(f"experiments.configs.{name}").__doc__
    stated = re.findall(r"([\d.]+)M (?:parameters|character)", docstring)
    config = recipes.get(name)
    if stated:
        vocab_size = config.model.vocab_size or config.data.tokenizer.vocab_size or 65  # Shakespeare's characters
        count = tj.count_parameters(config.model.replace(vocab_size=vocab_size)) / 1e6
        assert [float(number) for number in stated] == [round(count, len(stated[0].partition(".")[2]))]


def test_the_sources_configuration_of_the_full_book():
    model = recipes.get("book_mlm_full").model
    assert (model.vocab_size, model.max_len, model.num_heads, model.num_layers, model.model_dim) == (
        52_000, 512, 12, 6, 768)
    assert tj.count_parameters(model) == 83_502_880


# WMT14 compiled for eight simulated devices

WMT14 = recipes.get("wmt14_ende")
BATCH = {name: (WMT14.batch_size, WMT14.model.max_len) for name in
         ("source", "source_segment_ids", "tokens", "targets", "segment_ids", "weights")}


def dtype_of(name):
    return np.float32 if name == "weights" else np.int32


def test_the_data_of_wmt14_come_from_the_tfds_set(wmt14):
    pairs, held_out = read_translation_data(WMT14.data)
    assert (sorted(pairs), sorted(held_out)) == (sorted(wmt14["train"]), sorted(wmt14["validation"]))
    tokenizer = tj.Tokenizer.train((text for pair in pairs for text in pair), kind=WMT14.data.tokenizer.kind,
                                   vocab_size=300)
    length = WMT14.model.max_len
    batch = next(make_batches(PackedPairs.build(pairs, tokenizer, length, length), batch_size=WMT14.batch_size, seed=0))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (shape, dtype_of(name)) for name, shape in BATCH.items()}


@pytest.mark.long
def test_wmt14_compiles_for_eight_devices_and_fits_them(capfd):
    model = WMT14.model.replace(vocab_size=WMT14.data.tokenizer.vocab_size)
    assert (model.num_layers, model.model_dim, model.num_heads, model.mlp_dim) == (6, 512, 8, 2048)  # the paper's base
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(WMT14.optim, WMT14.steps)
    with jax.set_mesh(mesh):
        state = abstract_state(lambda key: make_model(model, key=key), optimizer, mesh)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype_of(name), sharding=batch_sharding(mesh))
                 for name, shape in BATCH.items()}
        compiled = make_train_step(translation_loss(WMT14.loss), optimizer).lower(state, batch).compile()

    # XLA would say so here if it had found no better way than to gather an activation of the whole
    # batch.
    assert "full rematerialization" not in capfd.readouterr().err

    def held(tree):
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(tree))

    # Weights and Adam's two moments in float32, in four parts each but for the norms; the data axis
    # repeats them.
    num_parameters = tj.count_parameters(model)
    state_bytes = held((state.params, state.opt_state))
    assert 12 * num_parameters / 4 <= state_bytes < 1.01 * 12 * num_parameters / 4
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(state_bytes + held(batch), rel=1e-3)
    assert memory.alias_size_in_bytes >= state_bytes  # the new state takes the place of the old
    # The rest fits beside it into the memory of the smallest TPU core, 8 GiB in a v2.
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 8 * 2**30
