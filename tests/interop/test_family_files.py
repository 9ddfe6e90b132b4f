"""Files of the families of BERT, BART and T5, without torch: names, layouts, round trips and
refused files."""

import functools
import json

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
from transformer_jax.models.functional import make_model
from transformer_jax.training.bundle import Bundle

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")

_BERT = tj.presets.get("bert-base").replace(vocab_size=17, max_len=9, num_layers=3, num_heads=2, model_dim=6,
                                           mlp_dim=10)
_BART = tj.ModelConfig(
    family="encoder_decoder", vocab_size=17, max_len=9, num_layers=3, num_decoder_layers=2, num_heads=2, model_dim=6,
    mlp_dim=10, norm_position="post", activation="gelu", positions="learned", position_offset=2,
    use_embedding_norm=True, use_output_bias=True, start_ids=(2, 0))
_MARIAN = _BART.replace(positions="sinusoidal_halves", position_offset=0, use_embedding_norm=False, activation="silu",
                        scale_embeddings=True, start_ids=(16,), banned_ids=(16,))
_T5 = tj.ModelConfig(
    family="encoder_decoder", vocab_size=17, max_len=9, num_layers=3, num_decoder_layers=2, num_heads=2, model_dim=6,
    head_dim=5, mlp_dim=10, positions="relative", attention_scale=1.0, norm="rmsnorm", norm_epsilon=1e-6,
    use_bias=False, activation="relu", scale_logits=True, init_std=None, start_ids=(0,))
_MODERNBERT = tj.ModelConfig(
    family="encoder", vocab_size=17, max_len=9, num_layers=4, num_heads=2, model_dim=12, mlp_dim=10, positions="rope",
    rope_base=160_000.0, norm_position="pre", activation="geglu_erf", use_bias=False, use_embedding_norm=True,
    use_first_norm=False, layer_pattern=(tj.config.LayerKind(), tj.config.LayerKind(3, rope_base=10_000.0)))
CONFIGS = {
    "bert": _BERT, "bert, untied": _BERT.replace(tie_embeddings=False),
    "roberta": _BERT.replace(num_token_types=1, norm_epsilon=1e-5, position_offset=2),
    "xlm-roberta": _BERT.replace(num_token_types=1, norm_epsilon=1e-5, position_offset=2),
    "camembert": _BERT.replace(num_token_types=1, norm_epsilon=1e-5, position_offset=2),
    "distilbert": _BERT.replace(num_token_types=0),
    "electra": _BERT.replace(embedding_dim=4), "albert": _BERT.replace(embedding_dim=4, shared_layers=True),
    "modernbert": _MODERNBERT, "modernbert, biases": _MODERNBERT.replace(use_bias=True, dropout=0.1),
    "bart": _BART, "mbart": _BART.replace(norm_position="pre", scale_embeddings=True), "marian": _MARIAN,
    "pegasus": _MARIAN.replace(norm_position="pre", activation="relu", banned_ids=(), start_ids=(0,)), "t5": _T5,
    "mt5": _T5.replace(activation="geglu", tie_embeddings=False, scale_logits=False),
    "m2m_100": _BART.replace(norm_position="pre", positions="sinusoidal_fairseq", use_embedding_norm=False,
                             use_output_bias=False, activation="relu", scale_embeddings=True, start_ids=(2, 9)),
    "t5, 1.1": _T5.replace(activation="geglu", tie_embeddings=False, scale_logits=False),
}


@functools.cache
def bundle_of(name):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: make_model(CONFIGS[name], key=key), jax.random.key(0))
    model = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    if not CONFIGS[name].use_first_norm:  # this norm is not in the files, and keeps its initial values
        first = model.stack.blocks.attention_norm
        first.scale[...] = first.scale[...].at[0].set(1.0)
        if first.bias is not None:
            first.bias[...] = first.bias[...].at[0].set(0.0)
    return Bundle(model, None, CONFIGS[name])


def written(name, directory):
    """The tensors and the settings of the files."""
    to_huggingface(bundle_of(name), directory, model_type=name.split(",")[0])
    return numpy_files.load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())


def rewrite(directory, tensors=None, **settings):
    if tensors is not None:
        numpy_files.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_exact(name, tmp_path):
    tensors, settings = written(name, tmp_path)
    assert settings["model_type"] == name.split(",")[0]
    again = from_huggingface(tmp_path)
    assert again.config == CONFIGS[name]
    jax.tree.map(np.testing.assert_array_equal, again.model, bundle_of(name).model)
    to_huggingface(again, tmp_path / "twice")  # of the family that it was read from
    twice = numpy_files.load_file(tmp_path / "twice" / "model.safetensors")
    assert twice.keys() == tensors.keys() and all((twice[key] == tensors[key]).all() for key in tensors)


def test_names_and_layouts(tmp_path):
    tensors, _ = written("roberta", tmp_path / "roberta")
    model = bundle_of("roberta").model
    np.testing.assert_array_equal(tensors["roberta.embeddings.position_embeddings.weight"],
                                  model.embeddings.position[...])
    assert tensors["roberta.embeddings.position_embeddings.weight"].shape == (9 + 2, 6)
    np.testing.assert_array_equal(tensors["roberta.encoder.layer.2.intermediate.dense.weight"],
                                  model.stack.blocks.mlp.up.kernel[...][2].T)
    np.testing.assert_array_equal(tensors["lm_head.dense.weight"], model.head.transform.kernel[...].T)
    tensors, _ = written("bart", tmp_path / "bart")
    model = bundle_of("bart").model
    np.testing.assert_array_equal(tensors["final_logits_bias"], model.embeddings.output_bias[...][None])
    np.testing.assert_array_equal(tensors["model.decoder.layernorm_embedding.bias"],
                                  model.target_embeddings.norm.bias[...])
    np.testing.assert_array_equal(tensors["model.decoder.layers.1.encoder_attn.v_proj.weight"],
                                  model.decoder.blocks.cross_attention.value.kernel[...][1].T)
    tensors, _ = written("t5, 1.1", tmp_path / "t5")
    model = bundle_of("t5, 1.1").model
    np.testing.assert_array_equal(
        tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
        model.decoder.relative.table[...])
    np.testing.assert_array_equal(tensors["decoder.block.1.layer.2.DenseReluDense.wi_1.weight"],
                                  model.decoder.blocks.mlp.up.kernel[...][1].T)
    assert "encoder.block.2.layer.1.DenseReluDense.wi.weight" in written("t5", tmp_path / "t5, 1.0")[0]


# Tensors that a file may contain besides the weights, or under an older name.
LEFT_OVER = {
    "bert": ("bert.pooler.dense.weight", "cls.seq_relationship.bias", "bert.embeddings.position_ids"),
    "roberta": ("roberta.pooler.dense.bias",),
    "marian": ("model.encoder.version", "model.decoder.version"),
    "t5": ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_tensors_that_are_not_weights_are_left_out(name, tmp_path):
    tensors, _ = written(name, tmp_path)
    named = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
             if name == "bert" else key: value for key, value in tensors.items()}
    rewrite(tmp_path, named | {key: np.zeros(3, np.float32) for key in LEFT_OVER[name]})
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(tmp_path).model, bundle_of(name).model)
    rewrite(tmp_path, tensors | {"classifier.weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="left over: classifier.weight"):
        from_huggingface(tmp_path)


@pytest.mark.parametrize(("name", "settings", "words"), [
    ("bert", {"hidden_act": "tanh"}, "hidden_act='tanh' is not supported; expected gelu, gelu_python, relu"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ("roberta", {"is_decoder": True}, "is_decoder=True"),
    ("bart", {"decoder_attention_heads": 3}, r"decoder_attention_heads=3 \(expected 2\)"),
    ("bart", {"decoder_ffn_dim": 11}, r"decoder_ffn_dim=11 \(expected 10\)"),
    ("marian", {"decoder_vocab_size": 18}, "17 tokens for sources and 18 for targets"),
    ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False"),
    ("pegasus", {"activation_function": "tanh"}, "activation_function='tanh' is not supported"),
    ("t5", {"feed_forward_proj": "gated-relu"}, "feed_forward_proj='gated-relu' is not supported"),
    ("t5", {"tie_word_embeddings": False}, "missing: lm_head.weight"),
])
def test_settings_that_our_models_lack_are_refused_on_reading(name, settings, words, tmp_path):
    written(name, tmp_path)
    rewrite(tmp_path, **settings)
    with pytest.raises(ValueError, match=words):
        from_huggingface(tmp_path)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(positions="sinusoidal", position_offset=0), "positions='sinusoidal' .expected 'sinusoidal_halves'"),
    (dict(num_kv_heads=1), r"num_kv_heads=1 \(expected 2\)"),
    (dict(start_ids=(1, 2, 3)), "expected at most two tokens"),
])
def test_settings_that_the_family_lacks_are_refused_on_writing(changes, words, tmp_path):
    config = _BART.replace(**changes)
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    with pytest.raises(ValueError, match=words):
        to_huggingface(Bundle(shapes, None, config), tmp_path)


def test_generation_config_overrides_config_for_decoding(tmp_path):
    """If two files contain the same setting, the one that transformers reads takes precedence."""
    written("t5", tmp_path)
    rewrite(tmp_path, decoder_start_token_id=None, pad_token_id=3)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["decoder_start_token_id"]
    path.write_text(json.dumps(settings))
    assert from_huggingface(tmp_path).config.start_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps(
        {"decoder_start_token_id": 5, "forced_bos_token_id": 6, "bad_words_ids": [[7], [8]], "num_beams": 4}))
    config = from_huggingface(tmp_path).config
    assert (config.start_ids, config.banned_ids) == ((5, 6), (7, 8))
