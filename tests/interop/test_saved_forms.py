"""Forms in which models are saved: without a head, in other types, with biases of one side, with
other activations; and sources longer than ``n_positions``."""

import json
import warnings

import jax
import numpy as np
import pytest
from fixture_weights import MODELS, model_directory

import transformer_jax as tj
from transformer_jax.interop import FAMILIES
from transformer_jax.models.functional import make_model

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")


def tensors_of(directory):
    return numpy_files.load_file(directory / "model.safetensors")


def put(directory, tensors):
    numpy_files.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change(directory, **settings):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def leaves(model):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


@pytest.mark.parametrize(("case", "new"), [
    ("llama2-automodel", ["embeddings.output"]), ("roberta-automodel", ["head.bias", "head.transform.kernel"]),
    ("minilm-published", ["head.norm.scale"])])
def test_a_new_head_is_named_and_the_same_each_time(case, new, tmp_path):
    directory = model_directory(case, tmp_path)
    with pytest.warns(UserWarning, match="without its head, so the head is new and untrained") as caught:
        first = tj.from_huggingface(directory)
    assert len(caught) == 1 and all(name in str(caught[0].message) for name in new)
    with pytest.warns(UserWarning, match="without its head"):
        second = tj.from_huggingface(directory)
    jax.tree.map(np.testing.assert_array_equal, first.model, second.model)
    # The head is trainable and not zero: it has the values of a newly initialised model.
    start, found = leaves(make_model(first.config, key=jax.random.key(0))), leaves(first.model)
    heads = [name for name in found if "head" in name or "embeddings.output" in name]
    assert heads
    for name in heads:
        np.testing.assert_allclose(found[name], start[name], rtol=1e-5)


@pytest.mark.parametrize("case", ["gpt2-automodel", "bart_base-published", "marian-automodel", "t5-automodel"])
def test_a_tied_model_without_a_head_lacks_nothing(case, tmp_path):
    directory = model_directory(case, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = tj.from_huggingface(directory)
    if bundle.config.use_output_bias:
        assert not np.asarray(bundle.model.embeddings.output_bias[...]).any()


def test_a_head_that_should_be_there_is_missed(tmp_path):
    directory = model_directory("llama2-published", tmp_path / "llama")
    tensors = tensors_of(directory)
    del tensors["lm_head.weight"]
    put(directory, tensors)
    with pytest.raises(ValueError, match="missing: lm_head.weight$"):
        tj.from_huggingface(directory)
    directory = model_directory("roberta-automodel", tmp_path / "roberta")
    put(directory, tensors_of(directory) | {"lm_head.bias": np.zeros(34, np.float32)})  # a part of the head
    with pytest.raises(ValueError, match="missing: lm_head.dense.bias, "):
        tj.from_huggingface(directory)


def test_a_body_of_an_encoder_alone_is_refused(tmp_path):
    """``T5EncoderModel``."""
    directory = model_directory("t5-automodel", tmp_path)
    put(directory, {name: value for name, value in tensors_of(directory).items() if not name.startswith("decoder.")})
    change(directory, architectures=["T5EncoderModel"])
    with pytest.raises(ValueError, match="missing: decoder.block.0"):
        tj.from_huggingface(directory)


def test_float64_is_rounded_with_a_warning(tmp_path):
    directory = model_directory("gpt2-transformers5", tmp_path)
    before = leaves(tj.from_huggingface(directory).model)
    put(directory, {name: value.astype(np.float64) for name, value in tensors_of(directory).items()})
    with pytest.warns(UserWarning, match="float64, which are rounded to float32"):
        bundle = tj.from_huggingface(directory)
    assert bundle.config.param_dtype == "float32"
    after = leaves(bundle.model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("attention", "mlp"), [(True, False), (False, True)])
def test_biases_of_attention_and_of_the_feed_forward_layer_apart(attention, mlp, tmp_path):
    """Biases of zero change no output, and each single bias is added where the formula of its layer
    adds it."""
    directory = model_directory("llama2-published", tmp_path / "model")
    plain = tj.from_huggingface(directory)
    tensors = tensors_of(directory)
    biases = {name.replace(".weight", ".bias"): value.shape[0] for name, value in tensors.items()
              if name.endswith("_proj.weight") and ((attention and "self_attn" in name) or (mlp and ".mlp." in name))}
    change(directory, attention_bias=attention, mlp_bias=mlp)
    tokens = np.arange(1, 9)[None] * 3 % 34
    put(directory, tensors | {name: np.zeros(size, np.float32) for name, size in biases.items()})
    bundle = tj.from_huggingface(directory)
    assert bundle.config.use_bias is attention
    assert (bundle.model.stack.blocks.mlp.gate.bias is not None) is mlp
    assert (bundle.model.stack.blocks.attention.output.bias is not None) is attention
    np.testing.assert_allclose(tj.forward(bundle.model, tokens), tj.forward(plain.model, tokens), atol=1e-6)
    rng = np.random.RandomState(0)
    put(directory, tensors | {name: rng.standard_normal(size).astype(np.float32) for name, size in biases.items()})
    bundle = tj.from_huggingface(directory)
    trace = tj.trace(bundle.model, tokens)
    blocks, stored = bundle.model.stack.blocks, tensors_of(directory)
    if mlp:  # float64 formula from the neurons, in torch's layout
        neurons = np.asarray(trace.layers.neurons[1], np.float64)
        wanted = (neurons @ stored["model.layers.1.mlp.down_proj.weight"].T.astype(np.float64)
                  + stored["model.layers.1.mlp.down_proj.bias"])
        np.testing.assert_allclose(trace.layers.mlp_output[1], wanted, atol=1e-5)
    if attention:
        heads = np.asarray(trace.layers.head_output[1], np.float64).reshape(1, 8, -1)
        wanted = (heads @ stored["model.layers.1.self_attn.o_proj.weight"].T.astype(np.float64)
                  + stored["model.layers.1.self_attn.o_proj.bias"])
        np.testing.assert_allclose(trace.layers.attention_output[1], wanted, atol=1e-5)
        np.testing.assert_array_equal(blocks.attention.value.bias[...][0],
                                      stored["model.layers.0.self_attn.v_proj.bias"])
    tj.to_huggingface(bundle, tmp_path / "out")
    assert tj.from_huggingface(tmp_path / "out").config == bundle.config


@pytest.mark.parametrize(("name", "ours"), [
    ("gelu", "gelu"), ("gelu_python", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"),
    ("gelu_fast", "gelu_tanh"), ("relu", "relu"), ("silu", "silu"), ("swish", "silu")])
def test_activations_of_bert_and_roberta(name, ours):
    """The fixture ``bert_relu`` compares a model's numbers; the head of BERT uses the same
    activation, and the head of RoBERTa does not."""
    bert, roberta = (json.loads((MODELS / f"{family}-published" / "config.json").read_text()) | {"hidden_act": name}
                     for family in ("bert", "roberta"))
    bert, roberta = (FAMILIES[settings["model_type"]].read_config(settings) for settings in (bert, roberta))
    assert (bert.activation, bert.head_activation) == (ours, ours)
    assert (roberta.activation, roberta.head_activation) == (ours, "gelu")
    assert FAMILIES["bert"].read_config({"model_type": "bert"} | FAMILIES["bert"].write_config(bert)) == bert


@pytest.mark.long
def test_sources_longer_than_n_positions(tmp_path):
    """T5 has a bias of distances and no table of positions: it reads 100 tokens where
    ``n_positions`` is 64."""
    bundle = tj.from_huggingface(model_directory("t5-published", tmp_path))
    assert bundle.config.max_len == 64
    source = np.arange(100)[None] * 7 % 30 + 3
    found = tj.generate(bundle.model, source.tolist(), max_new_tokens=5, end_ids=[],
                        sampling=tj.Sampling(temperature=0)).tokens[0]
    logits = np.asarray(tj.forward(bundle.model, source, np.array([[0, *found]])))[0]
    assert logits.argmax(-1)[:5].tolist() == found
    other = np.asarray(tj.forward(bundle.model, source[:, ::-1], np.array([[0, *found]])))[0]
    assert np.abs(logits - other).max() > 1e-3  # the position of a token matters


def test_a_target_without_a_token_that_starts_it(tmp_path):
    directory = model_directory("mbart-published", tmp_path)
    change(directory, decoder_start_token_id=None)
    bundle = tj.from_huggingface(directory)
    with pytest.raises(ValueError, match="needs start_id="):
        tj.generate(bundle.model, [[5, 6]], max_new_tokens=2, sampling=tj.Sampling(temperature=0))

    class NoStart:
        bos_id = None

    from transformer_jax.decoding.batch import first_tokens

    with pytest.raises(ValueError, match="the token that starts a target"):
        first_tokens(None, bundle.config, NoStart())


@pytest.mark.parametrize(("case", "tied", "scaled"), [
    ("t5-published", True, True), ("t5-transformers5", True, True), ("t5_1_1-published", False, False),
    ("t5_1_1-transformers5", False, False), ("t5_1_1_tied-published", True, False)])
def test_which_t5_is_tied(case, tied, scaled, tmp_path):
    config = tj.from_huggingface(model_directory(case, tmp_path)).config
    assert (config.tie_embeddings, config.scale_logits) == (tied, scaled)


def test_sinusoids_that_are_none_are_refused(tmp_path):
    directory = model_directory("marian-published", tmp_path)
    tensors = tensors_of(directory)
    name = "model.decoder.embed_positions.weight"
    put(directory, tensors | {name: tensors[name] + 0.1})
    with pytest.raises(ValueError, match=f"different from the values that this library computes: {name}$"):
        tj.from_huggingface(directory)
    put(directory, tensors | {name: tensors[name].astype(np.float16)})
    tj.from_huggingface(directory)
