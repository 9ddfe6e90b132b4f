"""Configs: derived fields, errors, round trips and the published sizes."""

import dataclasses
import json
import math
import pathlib
import re
import typing
from typing import Optional

import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax import config, presets
from transformer_jax.config import (
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    RopeLayout,
    RopeScaling,
    SampleConfig,
    TokenizerConfig,
)
from transformer_jax.config.ranges import RANGES
from transformer_jax.settings import differences, from_dict, nearest, to_dict


def test_derived_fields():
    config = ModelConfig(num_heads=4, model_dim=32)
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (4, 8, 128)


def test_replace_derives_anew_what_was_derived():
    config = ModelConfig(num_heads=4, model_dim=32).replace(num_heads=8, model_dim=128)
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (8, 16, 512)
    assert config == ModelConfig(num_heads=8, model_dim=128)


def test_layers_of_an_encoder_decoder():
    config = ModelConfig(family="encoder_decoder", num_layers=3)
    assert (config.num_encoder_layers, config.num_decoder_layers) == (3, 3)
    deeper = config.replace(num_layers=4, num_decoder_layers=2)
    assert (deeper.num_encoder_layers, deeper.num_decoder_layers) == (4, 2)
    assert deeper.replace(num_layers=5).num_decoder_layers == 2
    assert config.replace(family="encoder") == ModelConfig(family="encoder", num_layers=3)
    for family in ("decoder", "encoder"):
        plain = ModelConfig(family=family)
        assert plain.num_encoder_layers is None and plain.num_decoder_layers is None


def test_initial_weights_and_dropout_of_attention_may_be_left_open():
    config = ModelConfig(init_std=None, dropout=0.3)
    assert config.init_std is None and config.attention_dropout is None and config.num_token_types == 0
    assert config.replace(attention_dropout=0.0).attention_dropout == 0.0
    assert config.replace(attention_dropout=0.1) != config


def test_replace_keeps_what_was_given():
    config = ModelConfig(num_heads=4, model_dim=32, num_kv_heads=2, head_dim=6, mlp_dim=50)
    assert config.replace(model_dim=64, num_heads=8) == ModelConfig(
        num_heads=8, model_dim=64, num_kv_heads=2, head_dim=6, mlp_dim=50)
    assert ModelConfig(num_heads=4, model_dim=32).replace(mlp_dim=64).replace(num_heads=2).mlp_dim == 64


def test_a_width_of_heads_that_does_not_divide_is_kept():
    config = ModelConfig(num_heads=3, model_dim=20, head_dim=6)
    assert config.replace(dropout=0.5).head_dim == 6


def test_scaled_rotations():
    scaling = RopeScaling("llama3", 8.0, original_max_len=64)
    config = ModelConfig(positions="rope", rope_scaling=scaling, use_qkv_bias=True)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert ModelConfig().rope_scaling == RopeScaling("none")
    for wrong, message in ((dict(kind="ntk"), "kind='ntk' is not one of none, linear, dynamic, yarn"),
                           (dict(factor=0.5), "rope_scaling.factor=0.5 must be at least 1"),
                           (dict(low_frequency_factor=4.0), "low_frequency_factor=4.0 must be positive and below"),
                           (dict(original_max_len=0), "original_max_len=0 must be a positive integer")):
        with pytest.raises(ValueError, match=message):
            RopeScaling(**wrong)
    with pytest.raises(ValueError, match="rope_scaling.kind='llama3' is for positions='rope', not 'learned'"):
        ModelConfig(rope_scaling=scaling)


def test_token_ids_survive_json():
    config = ModelConfig(family="encoder_decoder", vocab_size=9, start_ids=(2, 0), banned_ids=(1,))
    stored = json.loads(json.dumps(to_dict(config)))
    assert stored["start_ids"] == [2, 0] and from_dict(ModelConfig, stored) == config
    with pytest.raises(ValueError, match=r"ModelConfig.start_ids=.*'2'.*expected int"):
        from_dict(ModelConfig, stored | {"start_ids": ["2"]})


def test_replace_validates():
    with pytest.raises(ValueError, match="num_heads=5"):
        ModelConfig().replace(num_heads=5)
    with pytest.raises(ValueError, match="ModelConfig has no field 'n_layers'"):
        ModelConfig().replace(n_layers=3)
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        ExperimentConfig().replace(batchsize=3)


@pytest.mark.parametrize(("cls", "given", "words"), [
    *((ModelConfig, {field: value}, [f"{field}={value!r}", "positive integer"])
      for field in ("max_len", "num_layers", "num_heads", "model_dim", "num_kv_heads", "head_dim", "mlp_dim",
                    "vocab_size", "sliding_window", "unroll") for value in (0, -1, 1.5, "2", True)),
    *((ModelConfig, {"family": "encoder_decoder", field: value}, [f"{field}={value!r}", "positive integer"])
      for field in ("num_encoder_layers", "num_decoder_layers") for value in (0, 2.0)),
    *((ModelConfig, {"family": family, field: 2}, [field, "family='encoder_decoder'", f"family={family!r} has num_la"])
      for field in ("num_encoder_layers", "num_decoder_layers") for family in ("decoder", "encoder")),
    (ModelConfig, dict(positions="rope", position_offset=2), ["position_offset=2", "positions='learned'", "'rope'"]),
    (ModelConfig, dict(position_offset=-1), ["position_offset=-1"]),
    (ModelConfig, dict(relative_buckets=6), ["relative_buckets=6", "multiple of 4"]),
    (ModelConfig, dict(relative_buckets=32, relative_max_distance=16), ["relative_max_distance=16"]),
    (ModelConfig, dict(attention_scale=0.0), ["attention_scale=0.0 must be positive"]),
    (ModelConfig, dict(family="encoder", use_output_bias=True), ["use_output_bias", "family='encoder'"]),
    (ModelConfig, dict(start_ids=(1,)), ["start_ids=(1,)", "encoder-decoder", "family='decoder'"]),
    (ModelConfig, dict(vocab_size=9, banned_ids=(9,)), ["banned_ids=(9,)", "vocab_size=9"]),
    (ModelConfig, dict(family="encoder-decoder"), ["family='encoder-decoder'", "did you mean 'encoder_decoder'?"]),
    (ModelConfig, dict(num_token_types=-1), ["num_token_types=-1"]),
    *((ModelConfig, {field: "x"}, [f"{field}='x'", "not one of"])
      for field in ("positions", "norm", "norm_position", "activation", "dtype", "param_dtype", "remat")),
    (ModelConfig, dict(positions="rotary_rope"), [
        "positions='rotary_rope'", "sinusoidal_halves, sinusoidal_fairseq, learned, rope, alibi, relative, none"]),
    (ModelConfig, dict(activation="gelu_tan"), ["did you mean 'gelu_tanh'"]),
    (ModelConfig, dict(num_heads=7), ["model_dim=768", "num_heads=7", "set head_dim"]),
    (ModelConfig, dict(num_kv_heads=5), ["num_heads=12", "num_kv_heads=5"]),
    (ModelConfig, dict(positions="rope", head_dim=7), ["head_dim=7", "even"]),
    (ModelConfig, dict(positions="sinusoidal", model_dim=9, num_heads=3), ["even model_dim", "9"]),
    *((ModelConfig, {field: value}, [f"{field}={value}", "[0, 1)"])
      for field in ("dropout", "attention_dropout") for value in (-0.1, 1.0, float("nan"))),
    *((ModelConfig, {field: value}, [f"{field}={value}", "positive"])
      for field in ("norm_epsilon", "init_std", "rope_base") for value in (0, -1.0)),
    (TokenizerConfig, dict(kind="bpee"), ["kind='bpee'", "did you mean 'bpe'"]),
    (TokenizerConfig, dict(kind="unigram"), ["data.tokenizer.kind='unigram'", "data.tokenizer.vocab_size"]),
    *((TokenizerConfig, dict(kind="bpe", vocab_size=9, min_frequency=value), [f"min_frequency={value!r}", "positive"])
      for value in (0, 1.5)),
    *((TokenizerConfig, dict(kind=kind, vocab_size=9, min_frequency=2), ["min_frequency=2", "'bpe'", f"{kind!r}"])
      for kind in ("char", "word", "unigram")),
    *((DataConfig, {field: value}, [f"data.{field}={value}", "(0, 1)"])
      for field in ("validation_fraction", "mask_probability") for value in (0.0, 1.0, -0.1, float("nan"))),
    (DataConfig, dict(generated="numbers"), ["data.generated='numbers'", "'dates'"]),
    (OptimConfig, dict(name="adam"), ["name='adam'", "did you mean 'adamw'"]),
    (OptimConfig, dict(schedule="cosin"), ["schedule='cosin'", "did you mean 'cosine'"]),
    (OptimConfig, dict(accumulation=0), ["accumulation=0"]),
    (OptimConfig, dict(peak_lr=-1.0), ["optim.peak_lr=-1.0"]),
    (OptimConfig, dict(warmup_steps=-1), ["optim.warmup_steps=-1"]),
    (OptimConfig, dict(schedule="noam", warmup_steps=0), ["optim.schedule='noam'", "warmup_steps > 0"]),
    (OptimConfig, dict(end_lr=1.5), ["optim.end_lr=1.5", "[0, 1]"]),
    (OptimConfig, dict(decay_fraction=0.0), ["optim.decay_fraction=0.0", "(0, 1]"]),
    (OptimConfig, dict(clip_norm=0.0), ["optim.clip_norm=0.0"]),
    (LossConfig, dict(label_smoothing=1.0), ["loss.label_smoothing=1.0"]),
    (LossConfig, dict(z_loss=-1e-4), ["loss.z_loss=-0.0001"]),
    (CheckpointConfig, dict(every=0), ["every=0"]),
    (CheckpointConfig, dict(keep=-2), ["keep=-2"]),
    (EvalConfig, dict(every=0), ["every=0"]),
    (EvalConfig, dict(batch_size=0), ["batch_size=0"]),
    (EvalConfig, dict(max_batches=0), ["max_batches=0"]),
    (SampleConfig, dict(every=-5), ["sample.every=-5"]),
    (SampleConfig, dict(max_new_tokens=0), ["max_new_tokens=0"]),
    (MetricsConfig, dict(attention_every=-1), ["metrics.attention_every=-1"]),
    (MeshConfig, dict(fsdp=0), ["fsdp=0"]),
    (MeshConfig, dict(tensor=0), ["tensor=0"]),
    (MeshConfig, dict(data=0), ["data=0"]),
    (ExperimentConfig, dict(steps=0), ["steps=0"]),
    (ExperimentConfig, dict(log_every=0), ["log_every=0"]),
    (ExperimentConfig, dict(batch_size=10, optim=OptimConfig(accumulation=4)),
     ["batch_size=10", "optim.accumulation=4"]),
], ids=lambda value: value.__name__ if isinstance(value, type) else str(value))
def test_errors_name_the_field_and_the_value(cls, given, words):
    with pytest.raises(ValueError) as error:
        cls(**given)
    assert all(word in str(error.value) for word in words), str(error.value)


NUMBERS = [(cls, field) for cls in (getattr(config, name) for name in config.__all__)
           for field, hint in typing.get_type_hints(cls).items()
           if hint not in (tuple[int, ...], tuple[float, ...]) and {int, float} & set(typing.get_args(hint) or (hint,))]


def a_number_of(cls, field, value):
    """Returns a config with one number set, and with the other settings that this number needs."""
    needs = {"kind": "bpe", "vocab_size": 9} if cls is TokenizerConfig else {}
    if cls is CorpusConfig:
        needs = {"name": "novels"}
    if field in ("num_encoder_layers", "num_decoder_layers"):
        needs = {"family": "encoder_decoder"}
    return cls(**needs | {field: value})


def test_every_number_of_every_config_has_a_range():
    assert {(cls.__name__, field) for cls, field in NUMBERS} == {
        (name, field) for name, (_, ranges) in RANGES.items() for field in ranges}
    assert set(RANGES) == set(config.__all__) - {"register_model_family"}


@pytest.mark.parametrize(("cls", "field"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_every_number_is_finite_and_in_range(cls, field):
    prefix, ranges = RANGES[cls.__name__]
    is_float = float in (typing.get_args(typing.get_type_hints(cls)[field]) or (typing.get_type_hints(cls)[field],))
    wrong = [math.nan, math.inf, -math.inf, 1e300, -1e300, -1, -0.5, "1", True, [1], 10**400]
    if is_float:
        wrong += [1e39] + ([1.5, 2.0] if ranges[field].high <= 1 else []) + (
            [1e-60, 0.0] if 0 < ranges[field].low < 1e-30 else [])
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{re.escape(f'{prefix}{field}={value!r}')} must "):
            a_number_of(cls, field, value)


def test_numbers_of_numpy_and_paths_become_those_of_json():
    made = ExperimentConfig(steps=np.int64(3), optim=OptimConfig(peak_lr=np.float32(0.5)),
                            data=DataConfig(path=pathlib.Path("a.txt")))
    assert json.loads(json.dumps(to_dict(made)))["steps"] == 3
    assert (type(made.optim.peak_lr), made.optim.peak_lr, made.data.path) == (float, 0.5, "a.txt")


@pytest.mark.parametrize(("cls", "given", "message"), [
    (ModelConfig, dict(use_bias="no"), "use_bias='no' is of type str; expected bool"),
    (ModelConfig, dict(use_qkv_bias=1), "use_qkv_bias=1 is of type int; expected bool or None"),
    (ModelConfig, dict(rope_scaling="llama3"), "rope_scaling='llama3' is of type str; expected RopeScaling"),
    (ModelConfig, dict(banned_ids=3), "banned_ids=3 is of type int; expected tuple"),
    (DataConfig, dict(path=["a", "b"]), r"data.path=\['a', 'b'\] is of type list; expected str or None"),
    (ExperimentConfig, dict(model={}), r"model=\{\} is of type dict; expected ModelSettings"),
    (ExperimentConfig, dict(task=3), "task=3 is of type int; expected str or None"),
])
def test_settings_of_another_type(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls(**given)


TRANSLATOR = ExperimentConfig(
    model=ModelConfig(family="encoder_decoder", num_layers=2, num_decoder_layers=3, num_heads=4, attention_dropout=0.0,
                      init_std=None, scale_embeddings=True),
    data=DataConfig(tfds="set/de-en", source="en", target="de"))
MASKED = ExperimentConfig(
    model=ModelConfig(family="encoder", num_token_types=2, use_embedding_norm=True),
    data=DataConfig(path="a.txt", mask_probability=0.2, mask_whole_words=True,
                    tokenizer=TokenizerConfig(kind="bpe", vocab_size=100, min_frequency=2)))
CHANGED = ExperimentConfig(
    seed=3,
    model=ModelConfig(vocab_size=65, num_heads=4, num_kv_heads=2, dropout=0.1, sliding_window=16, positions="rope"),
    data=DataConfig(path="a.txt", tokenizer=TokenizerConfig(kind="bpe", vocab_size=100)),
    optim=OptimConfig(clip_norm=None, schedule="wsd"), mesh=MeshConfig(data=2, tensor=4))


@pytest.mark.parametrize("config", [ExperimentConfig(), CHANGED, TRANSLATOR, MASKED])
def test_round_trip_through_json(config):
    back = from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config))))
    assert back == config and hash(back) == hash(config)


@pytest.mark.parametrize("name", presets.names())
def test_presets_survive_json(name):
    config = presets.get(name)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_configs_without_the_fields_of_other_families_still_load():
    values = to_dict(CHANGED)
    for name in ("family", "num_encoder_layers", "num_decoder_layers", "num_token_types", "use_embedding_norm",
                 "scale_embeddings", "attention_dropout"):
        del values["model"][name]
    for name in ("generated", "source", "target", "mask_probability", "mask_whole_words"):
        del values["data"][name]
    del values["data"]["tokenizer"]["min_frequency"]
    assert from_dict(ExperimentConfig, values) == CHANGED


def test_integers_serve_as_floats():
    config = from_dict(OptimConfig, {"clip_norm": 1, "end_lr": 0})
    assert config == OptimConfig(clip_norm=1.0, end_lr=0.0) and isinstance(config.clip_norm, float)


@pytest.mark.parametrize(("values", "words"), [
    ({"modl": {}}, ["ExperimentConfig has no field 'modl'", "did you mean 'model'"]),
    ({"model": {"num_head": 4}}, ["ModelConfig has no field 'num_head'", "did you mean 'num_heads'"]),
    ({"data": {"tokenizer": {"qqqq": 1}}}, ["TokenizerConfig has no field 'qqqq'", "kind, vocab_size, path"]),
    ({"model": {"num_heads": "4"}}, ["ModelConfig.num_heads='4'", "expected int", "got str"]),
    ({"model": {"use_bias": 1}}, ["ModelConfig.use_bias=1", "expected bool"]),
    ({"model": {"num_layers": True}}, ["ModelConfig.num_layers=True", "expected int"]),
    ({"model": {"num_layers": 2.0}}, ["ModelConfig.num_layers=2.0", "expected int"]),
    ({"model": {"dropout": "0.1"}}, ["ModelConfig.dropout='0.1'", "expected float"]),
    ({"model": {"vocab_size": "65"}}, ["ModelConfig.vocab_size='65'", "int or NoneType"]),
    ({"model": {"num_layers": None}}, ["ModelConfig.num_layers=None", "expected int"]),
    ({"model": 5}, ["ExperimentConfig.model=5", "ModelSettings"]),
])
def test_wrong_dicts_are_refused(values, words):
    with pytest.raises(ValueError) as error:
        from_dict(ExperimentConfig, values)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_differences():
    assert differences(CHANGED, CHANGED) == []
    other = CHANGED.replace(seed=4, model=CHANGED.model.replace(dropout=0.0), data=dataclasses.replace(
        CHANGED.data, tokenizer=TokenizerConfig(kind="word", vocab_size=100)))
    assert differences(CHANGED, other) == [
        "seed: 3 -> 4", "model.dropout: 0.1 -> 0.0", "data.tokenizer.kind: 'bpe' -> 'word'"]


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().num_layers = 3


def test_samples_are_due():
    assert [step for step in range(21) if SampleConfig(every=5).due(step)] == [0, 5, 10, 15, 20]
    assert [step for step in range(1, 90) if SampleConfig(every=5, growing=True).due(step)] == [5, 10, 20, 40, 80]
    assert not any(SampleConfig().due(step) for step in range(5))


@pytest.mark.parametrize(("name", "count"), [
    # As Hugging Face's and OpenAI's checkpoints count (output matrix tied).
    ("gpt2-small", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
    ("llama-tiny", 15_191_712),  # llama2.c's stories15M
    # As the safetensors files on the Hugging Face hub count.
    ("gemma-2b", 2_506_172_416), ("gemma-7b", 8_537_680_896), ("gemma-2-2b", 2_614_341_888),
    ("gemma-2-9b", 9_241_705_984), ("gemma-2-27b", 27_227_128_320), ("gemma-3-270m", 268_098_176),
    ("gemma-3-1b", 999_885_952), ("olmo-2-1b", 1_484_916_736), ("olmo-2-7b", 7_298_617_344),
    ("olmo-2-13b", 13_716_198_400), ("olmo-3-7b", 7_298_011_136), ("phi-3-mini-4k", 3_821_079_552),
    ("mistral-7b", 7_241_732_096), ("smollm3-3b", 3_075_098_624),
])
def test_published_parameter_counts(name, count):
    assert tj.count_parameters(presets.get(name)) == count


@pytest.mark.parametrize(("name", "count", "active"), [
    # Of all weights of the published files; the model cards round the active ones to 12.9, 39, 1.3,
    # 3.3 and 22 billion, for DeepSeek to 2.4 (without embeddings), 21 and 37 billion, and for gpt-oss
    # to 3.6 and 5.1 billion (without embeddings).
    ("mixtral-8x7b", 46_702_792_704, 12.9), ("mixtral-8x22b", 140_620_634_112, 39.2),
    ("olmoe-1b-7b", 6_919_161_856, 1.3),
    ("qwen3-30b-a3b", 30_532_122_624, 3.4), ("qwen3-235b-a22b", 235_093_634_560, 22.2),
    ("deepseek-v2-lite", 15_706_484_224, 2.7), ("deepseek-v2", 235_741_434_880, 21.4),
    ("deepseek-v3", 671_026_419_200, 37.6),
    ("gpt-oss-20b", 20_914_757_184, 4.2), ("gpt-oss-120b", 116_829_156_672, 5.7),
])
def test_mixtures_have_the_published_number_of_parameters(name, count, active):
    config = presets.get(name)
    assert tj.count_parameters(config) == count
    assert round(tj.count_parameters(config, active=True) / 1e9, 1) == active


@pytest.mark.parametrize(("name", "count", "without_embeddings"), [
    # The table in the model cards of EleutherAI/pythia-*.
    ("pythia-70m", 70_426_624, 18_915_328), ("pythia-160m", 162_322_944, 85_056_000),
    ("pythia-410m", 405_334_016, 302_311_424), ("pythia-1b", 1_011_781_632, 805_736_448),
    ("pythia-1.4b", 1_414_647_808, 1_208_602_624), ("pythia-2.8b", 2_775_208_960, 2_517_652_480),
    ("pythia-6.9b", 6_857_302_016, 6_444_163_072), ("pythia-12b", 11_846_072_320, 11_327_027_200),
])
def test_pythia_has_the_published_number_of_parameters(name, count, without_embeddings):
    config = presets.get(name)
    assert tj.count_parameters(config) == count
    assert count - 2 * config.vocab_size * config.model_dim == without_embeddings
    assert 4 * config.rope_layout.dim == config.head_dim  # rotary_pct=0.25


@pytest.mark.parametrize(("name", "width", "heads"), [("pythia-14m", 128, 4), ("pythia-31m", 256, 8)])
def test_the_smallest_pythias(name, width, heads):
    config = presets.get(name)
    assert (config.num_layers, config.model_dim, config.num_heads, config.mlp_dim) == (6, width, heads, 4 * width)
    # For each layer 12 D^2 weights and 13 D biases and norms, and the last norm.
    layers = 6 * (12 * width**2 + 13 * width) + 2 * width
    assert tj.count_parameters(config) == layers + 2 * 50_304 * width


@pytest.mark.parametrize(("wrong", "words"), [
    (dict(residual="parallel", norm_position="post"), "residual='parallel' needs norm_position='pre' and a family"),
    (dict(residual="parallel_shared", family="encoder_decoder"), "without cross-attention, not .*'encoder_decoder'"),
    (dict(use_first_norm=False, norm_position="post"), "use_first_norm=False needs norm_position='pre' and residual"),
    (dict(use_first_norm=False, family="encoder_decoder"), "is for families with one stack of layers"),
    (dict(positions="sinusoidal_fairseq", model_dim=2, num_heads=1), "needs a model_dim of at least 4, not 2"),
    (dict(family="electra"), "family='electra' needs an ElectraConfig"),
    (dict(residual="paralel"), "residual='paralel' is not one of .*; did you mean 'parallel'"),
    (dict(rope_layout=RopeLayout(2)), "rope_layout=.* is for positions='rope', not 'learned'"),
    (dict(positions="rope", rope_layout=RopeLayout(64)), "rope_layout.dim=64 must be below head_dim=64"),
    (dict(norm="rmsnorm", use_norm_bias=True), "use_norm_bias=True is for norm='layernorm'; norm='rmsnorm' has no"),
])
def test_blocks_that_do_not_exist_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**wrong)


def test_layouts_of_rotations():
    with pytest.raises(ValueError, match="rope_layout.dim=3 must be even"):
        RopeLayout(3)
    with pytest.raises(ValueError, match="pairs='interleave' is not one of halves, interleaved"):
        RopeLayout(pairs="interleave")
    # A head of an odd width can rotate a part of its channels.
    assert ModelConfig(model_dim=15, num_heads=3, positions="rope", rope_layout=RopeLayout(4)).head_dim == 5


def test_a_config_from_before_parallel_blocks_is_read():
    config = ExperimentConfig(model=ModelConfig(positions="rope"))
    values = json.loads(json.dumps(to_dict(config)))
    for name in ("residual", "rope_layout", "use_norm_bias"):
        del values["model"][name]
    assert from_dict(ExperimentConfig, values) == config


@pytest.mark.parametrize(("name", "printed"), [("nanogpt-char-cpu", "0.80M"), ("nanogpt-char-gpu", "10.65M")])
def test_nanogpt_prints_the_same_number(name, printed):
    config = presets.get(name)  # it leaves the position embeddings out
    assert f"{(tj.count_parameters(config) - config.max_len * config.model_dim) / 1e6:.2f}M" == printed


@pytest.mark.parametrize(("name", "printed", "rounding", "layers", "heads", "width"), [
    # Brown et al. (2020), table 2.1; XL's 24 heads and 13B's width of 5140, as printed, do not
    # multiply out.
    ("gpt3-small", 125e6, 0.5e6, 12, 12, 768), ("gpt3-medium", 350e6, 6e6, 24, 16, 1024),
    ("gpt3-large", 760e6, 5e6, 24, 16, 1536), ("gpt3-xl", 1.3e9, 0.05e9, 24, 16, 2048),
    ("gpt3-2.7b", 2.7e9, 0.05e9, 32, 32, 2560), ("gpt3-6.7b", 6.7e9, 0.05e9, 32, 32, 4096),
    ("gpt3-13b", 13e9, 0.5e9, 40, 40, 5120), ("gpt3-175b", 175e9, 0.5e9, 96, 96, 12288),
])
def test_gpt3_table(name, printed, rounding, layers, heads, width):
    config = presets.get(name)
    assert (config.num_layers, config.num_heads, config.model_dim, config.max_len) == (layers, heads, width, 2048)
    assert config.num_heads * config.head_dim == config.model_dim and config.mlp_dim == 4 * config.model_dim
    assert abs(tj.count_parameters(config) - printed) <= rounding


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match="no preset 'gpt2-smal'; did you mean 'gpt2-small'"):
        presets.get("gpt2-smal")
    with pytest.raises(ValueError, match="known: transformer-base"):
        presets.get("zzz")


@pytest.mark.parametrize(("name", "known", "hint"), [
    ("gpt2-smal", ["gpt2-small", "gpt2-medium"], "; did you mean 'gpt2-small'?"),
    ("xyz", ["gpt2-small"], ""),
    ("xyz", [], ""),
])
def test_the_nearest_name_is_suggested(name, known, hint):
    assert nearest(name, known) == hint


def test_an_annotation_that_settings_cannot_read_is_an_error_and_a_union_is_read_in_either_form():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        rate: float | None = None
        other: Optional[float] = None  # noqa: UP045
        names: dict[str, int] | None = None

    assert from_dict(Mine, {"rate": 3, "other": 3}) == Mine(rate=3.0, other=3.0)
    assert isinstance(from_dict(Mine, {"other": 3}).other, float)
    with pytest.raises(TypeError, match=r"Mine.names has the annotation dict\[str, int\] \| None, which"):
        from_dict(Mine, {"names": {"a": 1}})


def test_values_that_are_not_configs_names_or_paths_are_refused_in_one_line(tmp_path):
    import jax

    config = tj.ModelConfig(vocab_size=9, max_len=8, num_layers=1, num_heads=1, model_dim=4)
    model = tj.Decoder(config, key=jax.random.key(0))
    bundle = tj.Bundle(model=model, tokenizer=None, config=config)
    adapters = tj.make_adapters(model, tj.LoraConfig(rank=1), key=jax.random.key(0))
    calls = [
        (lambda wrong: tj.presets.get(wrong), "there is no preset"),
        (lambda wrong: tj.recipes.get(wrong), "there is no recipe"),
        (lambda wrong: tj.sharding.make_mesh(wrong), "expected a tj.config.MeshConfig"),
        (lambda wrong: tj.sharding.make_mesh(devices=wrong), "must be a list of devices"),
        (lambda wrong: tj.count_parameters(wrong), "expected a tj.ModelConfig"),
        (lambda wrong: tj.Decoder(wrong, key=jax.random.key(0)), "expected a tj.ModelConfig"),
        (lambda wrong: tj.Decoder(config, key=wrong), "is not a PRNG key; pass jax.random.key"),
        (lambda wrong: tj.preflight(wrong), "expected a tj.ExperimentConfig"),
        (lambda wrong: tj.prepare_for_decoding(wrong), "is not a model"),
        (lambda wrong: tj.make_adapters(model, wrong, key=jax.random.key(0)), "expected a tj.LoraConfig"),
        (lambda wrong: tj.merge_adapters(model, wrong), "expected the adapters"),
        (lambda wrong: tj.save(wrong, bundle), "expected a path"),
        (lambda wrong: tj.save(tmp_path, wrong), "bundle is of type .*; expected a tj.Bundle"),
        (lambda wrong: tj.load(wrong), "expected a path"),
        (lambda wrong: tj.load(tmp_path, average=wrong), "must be a whole number, at least 1"),
        (lambda wrong: tj.save_adapters(wrong, adapters, tj.LoraConfig(rank=1), model), "expected a path"),
        (lambda wrong: tj.load_adapters(wrong, model), "expected a path"),
        (lambda wrong: tj.to_huggingface(wrong, tmp_path), "expected a tj.Bundle"),
        (lambda wrong: tj.from_huggingface(wrong), "expected a path"),
        (lambda wrong: tj.Tokenizer.load(wrong), "expected a path"),
    ]
    for call, message in calls:
        for wrong in (2.5, [], object()):
            with pytest.raises(ValueError, match=message) as raised:
                call(wrong)
            assert "\n" not in str(raised.value)
    for path, message in (("", "empty string"), ("a\0b", "NUL character"), (b"a", "expected a path")):
        for call in (lambda path: tj.save(path, bundle), tj.load, tj.from_huggingface, tj.Tokenizer.load):
            with pytest.raises(ValueError, match=message):
                call(path)
    for step in (-1, 2.5, True, None):
        with pytest.raises(ValueError, match="the step of the bundle is .*; expected a whole number"):
            tj.save(tmp_path / "x", tj.Bundle(model=model, tokenizer=None, config=config, step=step))
    tj.save(tmp_path / "right", bundle)
    with pytest.raises(ValueError, match=r"step \[\] is neither a number nor 'best'"):
        tj.load(tmp_path / "right", step=[])
    with pytest.raises(ValueError, match="expected a list of strings"):
        tj.Tokenizer.train(None, kind="char")
    tokenizer = tj.Tokenizer.train("abc", kind="char")
    with pytest.raises(ValueError, match="token id x is outside the vocabulary"):
        tokenizer.decode("x")
