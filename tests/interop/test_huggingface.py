"""Hugging Face files without torch: written by hand, read and written again; and errors for wrong
files."""

import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import transformer_jax as tj
from transformer_jax.config import MeshConfig, RopeLayout, RopeScaling
from transformer_jax.interop import FAMILIES, huggingface, tensors
from transformer_jax.ops.rotations import rotary_frequencies
from transformer_jax.sharding import make_mesh, shardings

VOCAB, LENGTH, LAYERS, DIM, HEADS, KV_HEADS, MLP = 31, 22, 3, 24, 4, 2, 20
_GPT2 = tj.ModelConfig(vocab_size=VOCAB, max_len=LENGTH, num_layers=LAYERS, num_heads=HEADS, model_dim=DIM)
_LLAMA = _GPT2.replace(positions="rope", norm="rmsnorm", activation="swiglu", use_bias=False, num_kv_heads=KV_HEADS,
                       mlp_dim=MLP, tie_embeddings=False)
OURS = {
    "gpt2": _GPT2,
    "gpt2, untied, bfloat16": _GPT2.replace(tie_embeddings=False, activation="gelu", dtype="bfloat16",
                                            param_dtype="bfloat16"),
    "llama": _LLAMA.replace(rope_base=500.0, rope_scaling=RopeScaling("llama3", 4.0, original_max_len=16)),
    "llama, tied, head dim": _LLAMA.replace(tie_embeddings=True, head_dim=8, use_bias=True),
    "gpt_neox": _GPT2.replace(positions="rope", rope_base=500.0, rope_layout=RopeLayout(2), residual="parallel",
                              tie_embeddings=False, activation="gelu"),
    "mistral": _LLAMA.replace(sliding_window=7, rope_scaling=RopeScaling("linear", 2.0)),
    "qwen2": _LLAMA.replace(use_qkv_bias=True),
    "qwen3, float16": _LLAMA.replace(use_qk_norm=True, sliding_window=5, dtype="float16", param_dtype="float16"),
}


def random_decoder(config, seed=0):
    """A decoder with every weight random, those of norms around 1 (NumPy's generator compiles
    nothing)."""
    rng = np.random.default_rng(seed)

    def weight(path, leaf):
        mean = 1.0 if ".scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(weight, shapes)


def rotate(x_TNH, base):
    """Pairs of halves as complex numbers, turned by the position's angle."""
    half = x_TNH.shape[-1] // 2
    turns = np.exp(1j * np.arange(len(x_TNH))[:, None, None] * base ** (-np.arange(half) / half))
    numbers = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * turns
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def gpt2_files(directory, seed=0, **changes):
    """A GPT-2 in the names and layouts of its file on the hub, which lack the prefix; returns the
    tensors."""
    rng = np.random.default_rng(seed)

    def weight(*shape, mean=0.0):
        return rng.normal(mean, 0.4, shape).astype(np.float32)

    found = {"wte.weight": weight(VOCAB, DIM), "wpe.weight": weight(LENGTH, DIM),
             "ln_f.weight": weight(DIM, mean=1), "ln_f.bias": weight(DIM)}
    for layer in range(LAYERS):
        h = f"h.{layer}."
        found |= {f"{h}ln_1.weight": weight(DIM, mean=1), f"{h}ln_1.bias": weight(DIM),
                  f"{h}attn.c_attn.weight": weight(DIM, 3 * DIM), f"{h}attn.c_attn.bias": weight(3 * DIM),
                  f"{h}attn.c_proj.weight": weight(DIM, DIM), f"{h}attn.c_proj.bias": weight(DIM),
                  f"{h}ln_2.weight": weight(DIM, mean=1), f"{h}ln_2.bias": weight(DIM),
                  f"{h}mlp.c_fc.weight": weight(DIM, 4 * DIM), f"{h}mlp.c_fc.bias": weight(4 * DIM),
                  f"{h}mlp.c_proj.weight": weight(4 * DIM, DIM), f"{h}mlp.c_proj.bias": weight(DIM),
                  f"{h}attn.bias": np.ones((1, 1, LENGTH, LENGTH), np.float32)}  # the mask
    directory.mkdir(exist_ok=True)
    save_file(found | changes.pop("tensors", {}), directory / "model.safetensors", metadata={"format": "pt"})
    settings = {"model_type": "gpt2", "vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": DIM, "n_layer": LAYERS,
                "n_head": HEADS, "activation_function": "gelu_new"}
    (directory / "config.json").write_text(json.dumps(settings | changes))
    return found


def layer_norm(x, w, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def causal_attention(q, k, v):
    """``[T, N, H]`` of queries, keys and values of as many heads."""
    scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


def gpt2_forward(tensors, tokens):
    """GPT-2 in float64 from tensors in its own layout: products with ``[in, out]``, queries, keys,
    values joined."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    x = w["wte.weight"][tokens] + w["wpe.weight"][:len(tokens)]
    for layer in range(LAYERS):
        h = f"h.{layer}."
        joined = layer_norm(x, w, f"{h}ln_1") @ w[f"{h}attn.c_attn.weight"] + w[f"{h}attn.c_attn.bias"]
        q, k, v = (part.reshape(len(tokens), HEADS, -1) for part in np.split(joined, 3, axis=-1))
        x = x + causal_attention(q, k, v) @ w[f"{h}attn.c_proj.weight"] + w[f"{h}attn.c_proj.bias"]
        up = layer_norm(x, w, f"{h}ln_2") @ w[f"{h}mlp.c_fc.weight"] + w[f"{h}mlp.c_fc.bias"]
        up = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + up @ w[f"{h}mlp.c_proj.weight"] + w[f"{h}mlp.c_proj.bias"]
    return layer_norm(x, w, "ln_f") @ w["wte.weight"].T


def llama_forward(tensors, tokens, base, num_kv_heads):
    """Llama in float64 from tensors in its own layout: products with ``[out, in]``, pairs of halves
    rotated."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}

    def rms_norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        h = f"model.layers.{layer}."
        y = rms_norm(x, f"{h}input_layernorm")
        q, k, v = ((y @ w[f"{h}self_attn.{name}_proj.weight"].T).reshape(len(tokens), -1, DIM // HEADS)
                   for name in "qkv")
        q, k = (rotate(heads, base) for heads in (q, k))
        k, v = (np.repeat(heads, HEADS // num_kv_heads, axis=1) for heads in (k, v))
        x = x + causal_attention(q, k, v) @ w[f"{h}self_attn.o_proj.weight"].T
        y = rms_norm(x, f"{h}post_attention_layernorm")
        gate = y @ w[f"{h}mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[f"{h}mlp.up_proj.weight"].T)) @ w[f"{h}mlp.down_proj.weight"].T
    return rms_norm(x, "model.norm") @ w["lm_head.weight"].T


def test_gpt2_from_tensors_in_its_own_layout(tmp_path):
    tensors = gpt2_files(tmp_path)
    bundle = tj.from_huggingface(tmp_path)
    assert bundle.tokenizer is None and bundle.config == _GPT2.replace(dropout=0.1)
    tokens = np.arange(11) * 7 % VOCAB
    np.testing.assert_allclose(tj.forward(bundle.model, jnp.asarray(tokens[None]))[0], gpt2_forward(tensors, tokens),
                               atol=2e-5)


def test_llama_to_tensors_in_its_own_layout(tmp_path):
    config = _LLAMA.replace(rope_base=300.0)
    bundle = tj.Bundle(random_decoder(config), None, config)
    tj.to_huggingface(bundle, tmp_path)
    tokens = np.arange(11) * 7 % VOCAB
    np.testing.assert_allclose(tj.forward(bundle.model, jnp.asarray(tokens[None]))[0],
                               llama_forward(load_file(tmp_path / "model.safetensors"), tokens, 300.0, KV_HEADS),
                               atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_ours_to_theirs_to_ours(tmp_path, name):
    config = OURS[name]
    model = random_decoder(config)
    tj.to_huggingface(tj.Bundle(model, None, config), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name.split(",")[0]
    again = tj.from_huggingface(tmp_path)
    assert again.config == config
    assert jax.tree.structure(again.model) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again.model), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_shards_onto_a_mesh_with_a_cast(tmp_path, monkeypatch, name):
    config = OURS[name]
    model = random_decoder(config)
    monkeypatch.setattr(tensors, "_SHARD_BYTES", 5000)
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier model")
    tj.to_huggingface(tj.Bundle(model, None, config), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"].values())
    assert len(names) > 2 and {path.name for path in tmp_path.glob("*.safetensors")} == names
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    loaded = tj.from_huggingface(tmp_path, dtype="bfloat16", mesh=mesh)
    assert loaded.config.dtype == loaded.config.param_dtype == "bfloat16"
    expected = jax.tree.leaves(shardings(model, mesh))
    for a, b, sharding in zip(jax.tree.leaves(model), jax.tree.leaves(loaded.model), expected, strict=True):
        assert b.sharding.is_equivalent_to(sharding, b.ndim)
        np.testing.assert_array_equal(np.asarray(b), np.asarray(a.astype(jnp.bfloat16)))
    (tmp_path / sorted(names)[0]).unlink()
    with pytest.raises(ValueError, match=f"index.json names files that are not there: {sorted(names)[0]}"):
        tj.from_huggingface(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True])
def test_the_host_holds_one_tensor_at_a_time(tmp_path, monkeypatch, sharded):
    config = _LLAMA.replace(model_dim=512, mlp_dim=4096, num_layers=3, vocab_size=1000)
    shapes = jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))
    model = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    tj.to_huggingface(tj.Bundle(model, None, config), tmp_path)
    del model
    largest = 4 * config.model_dim * config.mlp_dim

    def put(shape, sharding, read):
        # Replaces the devices, because the memory of simulated devices is that of the CPU: it reads
        # what they would read, and keeps nothing.
        parts = [read(index) for index in sharding.addressable_devices_indices_map(shape).values()]
        assert all((part == 1).all() for part in parts)
        return jnp.ones(shape, parts[0].dtype, device=sharding)

    monkeypatch.setattr(huggingface.jax, "make_array_from_callback", put)
    monkeypatch.setattr(huggingface, "_in_host_memory", lambda sharding: False)
    monkeypatch.setattr(tensors, "aligned_empty", np.empty)  # tracemalloc sees only memory of NumPy
    tracemalloc.start()
    loaded = tj.from_huggingface(tmp_path, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if sharded else None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(loaded.model))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    # Of all booleans of the check above there is a byte for each four.
    assert largest < peak < 1.1 * largest + largest / 4 < total / 2


def test_a_cpu_reads_into_the_memory_of_the_parameters(tmp_path):
    # The parameters of a CPU are the arrays that the loader filled: no second copy of any value.
    config = _LLAMA.replace(model_dim=64, mlp_dim=256)
    tj.to_huggingface(tj.Bundle(random_decoder(config), None, config), tmp_path)
    read, filled = tensors.TensorFiles.read, []

    def remember(self, *arguments):
        filled.append(read(self, *arguments))
        return filled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors.TensorFiles, "read", remember)
        model = tj.from_huggingface(tmp_path).model
    memory = {array.ctypes.data for array in filled}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)} == memory


def broken(tmp_path, how):
    tensors = gpt2_files(tmp_path)
    path, settings = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    if how == "pickle":
        path.rename(tmp_path / "pytorch_model.bin")
    elif how == "nothing":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "tensors":
        tensors["h.3.ln_1.weight"] = tensors.pop("h.1.ln_1.weight")
        tensors["wpe.weight"] = tensors["wpe.weight"][:-1].copy()
        tensors["h.0.mlp.c_fc.bias"] = tensors["h.0.mlp.c_fc.bias"].astype(np.int32)
        save_file(tensors, path)
    elif how == "tied":
        save_file(tensors | {"lm_head.weight": tensors["wte.weight"][:-1] + 1}, path)
    elif how == "no config":
        (tmp_path / "config.json").unlink()
    elif how == "no json":
        (tmp_path / "config.json").write_text("{")
    else:
        (tmp_path / "config.json").write_text(json.dumps(settings | how))


@pytest.mark.parametrize(("how", "messages"), [
    ("pickle", ["pytorch_model.bin only, which is pickle: reading it runs any code", "safe_serialization=True"]),
    ("nothing", ["has neither model.safetensors nor model.safetensors.index.json"]),
    ("damaged", ["model.safetensors is not a complete safetensors file"]),
    ("tensors", ["missing: transformer.h.1.ln_1.weight\n", "left over: transformer.h.3.ln_1.weight\n",
                 "of another shape: transformer.wpe.weight is [21, 24], expected [22, 24]\n",
                 "of a type that is not supported: transformer.h.0.mlp.c_fc.bias is I32"]),
    ("tied", ["of another shape: lm_head.weight is ["]),
    ("no config", ["has no config.json; expected a directory"]),
    ("no json", ["config.json, line 1 is not JSON"]),
    ({"model_type": "mamba"}, ["cannot be loaded: model_type='mamba' is not supported; expected one of gpt2, llama, "]),
    ({"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True},
     ["scale_attn_by_inverse_layer_idx=True (expected False), add_cross_attention=True (expected False)"]),
    ({"activation_function": "tanh"}, ["activation_function='tanh' is not supported; expected gelu, "]),
    ({"model_type": "llama"}, ["config.json of this llama model lacks hidden_size, intermediate_size, "]),
])
def test_broken_directories_are_refused_with_the_reason(tmp_path, how, messages):
    broken(tmp_path, how)
    with pytest.raises(ValueError) as caught:
        tj.from_huggingface(tmp_path)
    assert all(message in f"{caught.value}\n" for message in messages), caught.value


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_scaling": {"type": "yarm", "factor": 4.0}}, "rope_type='yarm' is not supported; expected default, "),
    ({"rope_scaling": {"type": "longrope", "long_factor": 2}}, "rope_scaling.long_factor=2: expected a list of numb"),
    ({"rope_scaling": {"type": "longrope"}}, "0 short_factors and 0 long_factors; expected one for each of the 3"),
    ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types=['full_atte"),
    ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["local"] * 3}, "layer_types='local' is not "),
    ({"model_type": "qwen2", "num_hidden_layers": 10**9, "use_sliding_window": True}, "expected at most 10000"),
    ({"model_type": "qwen2", "attention_bias": True}, "attention_bias=True (expected False)"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected silu, "),
])
def test_settings_of_llama_that_our_models_lack_are_refused(tmp_path, changes, message):
    tj.to_huggingface(tj.Bundle(random_decoder(_LLAMA), None, _LLAMA), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("rope_parameters")
    settings.pop("mlp_bias")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"mlp_bias": False} | changes))
    with pytest.raises(ValueError) as caught:
        tj.from_huggingface(tmp_path)
    assert message in str(caught.value)


def test_a_model_that_no_family_can_express_is_refused_with_the_nearest_families(tmp_path):
    config = _GPT2.replace(positions="alibi", use_bias=False)
    with pytest.raises(ValueError) as caught:
        tj.to_huggingface(tj.Bundle(random_decoder(config), None, config), tmp_path / "new")
    advice, nearest, *others = str(caught.value).split("\n")
    assert f"the 6 nearest of {len(FAMILIES)} families" in advice and len(others) == 5
    assert nearest == "  gpt2: positions='alibi' (expected 'learned'), use_bias=False (expected True)"
    assert all(" (expected " in other and "family=" not in other for other in others)  # they are decoders too
    assert not (tmp_path / "new").exists()


def test_an_older_config_of_scaled_rotations(tmp_path):
    gpt2_files(tmp_path)  # its tensors are not read
    older = {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 10}
    config = FAMILIES["llama"].read_config(older | sizes)
    assert config.rope_base == 500.0 and config.rope_scaling == RopeScaling("linear", 3.0)
    assert config.num_kv_heads == 2 and not config.tie_embeddings


@pytest.mark.parametrize(("model_type", "longest"), [("llama", 2048), ("mistral", 131_072), ("qwen2", 32_768),
                                                     ("qwen3", 32_768)])
def test_a_config_that_leaves_out_the_longest_text(model_type, longest):
    """The defaults of the classes of transformers, such as ``LlamaConfig().max_position_embeddings``."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    assert FAMILIES[model_type].read_config({"model_type": model_type} | sizes).max_len == longest
    with pytest.raises(ValueError, match="lacks vocab_size, hidden_size"):
        FAMILIES[model_type].read_config({"model_type": model_type})


def test_llama3_scaling_in_its_three_bands():
    scaling = RopeScaling("llama3", 8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_len=64)
    plain, scaled = (rotary_frequencies(16, 10_000.0, kind) for kind in (RopeScaling(), scaling))
    wavelengths = 2 * np.pi / plain
    ratios = scaled / plain
    np.testing.assert_allclose(ratios[wavelengths < 16], 1.0)
    np.testing.assert_allclose(ratios[wavelengths > 64], 1 / 8)
    between = (wavelengths > 16) & (wavelengths < 64)
    assert between.any() and ((ratios[between] > 1 / 8) & (ratios[between] < 1)).all()


def test_an_id_is_fetched_without_pickle(tmp_path, monkeypatch):
    import huggingface_hub

    gpt2_files(tmp_path)
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert tj.from_huggingface("someone/gpt2").config.num_layers == LAYERS
    assert asked["name"] == "someone/gpt2" and asked["revision"] is None
    tj.from_huggingface("someone/gpt2", revision="step1000")
    assert asked["revision"] == "step1000" and "*.safetensors" in asked["patterns"]
    assert not any(pattern.endswith(("bin", "pt", "py")) for pattern in asked["patterns"])

    with pytest.raises(ValueError, match=r"revision='step1000' is for a model on the Hugging Face hub, but"):
        tj.from_huggingface(tmp_path, revision="step1000")

    def unreachable(name, revision, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"no model of this name could be fetched .*: no network"):
        tj.from_huggingface("someone/gpt2")
    with pytest.raises(ValueError, match=r"no model of this name with revision='step7' could be fetched"):
        tj.from_huggingface("someone/gpt2", revision="step7")
    with pytest.raises(ValueError, match=r"there is no directory /no/such"):
        tj.from_huggingface("/no/such")
