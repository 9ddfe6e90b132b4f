"""GPT-2 and decoders in Llama's form against transformers in float32 torch, on random weights made
on the spot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # with several threads, small products are slow
VOCAB, MAX_LEN = 97, 260
_GPT2 = dict(vocab_size=VOCAB, n_positions=MAX_LEN, n_embd=36, n_layer=3, n_head=3, bos_token_id=1, eos_token_id=1)
_LLAMA = dict(vocab_size=VOCAB, max_position_embeddings=MAX_LEN, hidden_size=36, intermediate_size=52,
              num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, bos_token_id=1, eos_token_id=1)
_LLAMA3 = dict(rope_theta=5000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)
_NEOX = dict(vocab_size=VOCAB, max_position_embeddings=MAX_LEN, hidden_size=48, intermediate_size=52,
             num_hidden_layers=3, num_attention_heads=3, bos_token_id=1, eos_token_id=1)
_PHI = _NEOX | dict(num_key_value_heads=3)
_OPT = dict(vocab_size=VOCAB, max_position_embeddings=MAX_LEN, hidden_size=36, ffn_dim=52, num_hidden_layers=3,
            num_attention_heads=3, bos_token_id=1, eos_token_id=1, pad_token_id=0, dropout=0.0)
_ROPE = dict(rope_theta=700.0, rope_type="default")
_GEMMA = _LLAMA | dict(head_dim=8)
_GEMMA2 = _GEMMA | dict(num_hidden_layers=5, query_pre_attn_scalar=11, sliding_window=5, attn_logit_softcapping=2.0,
                        final_logit_softcapping=7.0)
_NESTED = {"sliding_attention": dict(rope_theta=100.0, rope_type="default"),
           "full_attention": dict(rope_theta=9000.0, rope_type="linear", factor=4.0)}
_YARN = dict(rope_theta=500.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0,
             beta_slow=0.5)
_PHI3 = _LLAMA | dict(pad_token_id=0)
_LONGROPE = dict(rope_type="longrope", rope_theta=900.0, short_factor=[1.0, 1.2, 1.4], long_factor=[1.0, 3.0, 5.0])
_LATENT = _LLAMA | dict(
    num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=14, qk_nope_head_dim=10, qk_rope_head_dim=6,
    v_head_dim=8, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, first_k_dense_replace=1)
_MSCALE = _YARN | dict(mscale=1.0, mscale_all_dim=0.707)
CASES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2", _GPT2),
    "gpt2, untied, erf": ("GPT2LMHeadModel", "GPT2", _GPT2 | dict(
        tie_word_embeddings=False, activation_function="gelu", n_inner=50)),
    "llama, tied": ("LlamaForCausalLM", "Llama", _LLAMA | dict(tie_word_embeddings=True)),
    "llama 3": ("LlamaForCausalLM", "Llama", _LLAMA | dict(head_dim=10, rope_parameters=_LLAMA3)),
    "llama, linear scaling, biases": ("LlamaForCausalLM", "Llama", _LLAMA | dict(
        attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_theta=500.0, rope_type="linear", factor=3.0))),
    "llama, biases of attention": ("LlamaForCausalLM", "Llama", _LLAMA | dict(attention_bias=True)),
    "llama, biases of the feed-forward layer": ("LlamaForCausalLM", "Llama", _LLAMA | dict(mlp_bias=True)),
    "mistral": ("MistralForCausalLM", "Mistral", _LLAMA | dict(sliding_window=5)),
    "qwen2, tied": ("Qwen2ForCausalLM", "Qwen2", _LLAMA | dict(tie_word_embeddings=True)),
    "qwen2, window": ("Qwen2ForCausalLM", "Qwen2", _LLAMA | dict(use_sliding_window=True, sliding_window=4,
                                                                 max_window_layers=0)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", _LLAMA | dict(head_dim=8)),
    "mixtral": ("MixtralForCausalLM", "Mixtral", _LLAMA | dict(
        num_local_experts=5, num_experts_per_tok=2, sliding_window=6)),
    "olmoe": ("OlmoeForCausalLM", "Olmoe", _LLAMA | dict(num_experts=7, num_experts_per_tok=3)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3Moe", _LLAMA | dict(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, head_dim=8, norm_topk_prob=True)),
    "qwen3_moe, biases": ("Qwen3MoeForCausalLM", "Qwen3Moe", _LLAMA | dict(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=52, head_dim=8, attention_bias=True)),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2", _LATENT | dict(
        q_lora_rank=11, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=3.0)),
    "deepseek_v2, lite, yarn": ("DeepseekV2ForCausalLM", "DeepseekV2", _LATENT | dict(
        q_lora_rank=None, v_head_dim=10, n_shared_experts=1, rope_parameters=_MSCALE)),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3", _LATENT | dict(
        q_lora_rank=11, n_group=4, topk_group=2, rope_parameters=_MSCALE)),
    "deepseek_v3, halves, biases": ("DeepseekV3ForCausalLM", "DeepseekV3", _LATENT | dict(
        q_lora_rank=11, n_group=1, topk_group=1, rope_interleave=False, attention_bias=True, norm_topk_prob=False,
        first_k_dense_replace=2, n_shared_experts=2, rms_norm_eps=1e-3)),
    "gpt_oss": ("GptOssForCausalLM", "GptOss", _LLAMA | dict(
        head_dim=8, num_local_experts=5, num_experts_per_tok=2, sliding_window=4, swiglu_limit=0.5,
        rope_parameters=_YARN | dict(truncate=False))),
    "gpt_oss, no biases of attention": ("GptOssForCausalLM", "GptOss", _LLAMA | dict(
        head_dim=8, num_local_experts=4, num_experts_per_tok=3, attention_bias=False, tie_word_embeddings=True,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], rope_parameters=_ROPE)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoX", _NEOX | dict(
        rope_parameters=_ROPE | dict(partial_rotary_factor=0.25))),
    "gpt_neox, sequential, no biases, tied": ("GPTNeoXForCausalLM", "GPTNeoX", _NEOX | dict(
        use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="relu",
        rope_parameters=dict(rope_theta=500.0, rope_type="linear", factor=3.0, partial_rotary_factor=1.0))),
    "gptj": ("GPTJForCausalLM", "GPTJ", _GPT2 | dict(rotary_dim=4)),
    "gptj, whole heads": ("GPTJForCausalLM", "GPTJ", _GPT2 | dict(rotary_dim=12, n_inner=50)),
    "phi": ("PhiForCausalLM", "Phi", _PHI | dict(rope_parameters=_ROPE | dict(partial_rotary_factor=0.5))),
    "phi, grouped": ("PhiForCausalLM", "Phi", _PHI | dict(
        num_attention_heads=6, rope_parameters=_ROPE | dict(partial_rotary_factor=0.75))),
    "opt": ("OPTForCausalLM", "OPT", _OPT),
    "opt, galactica": ("OPTForCausalLM", "OPT", _OPT | dict(
        enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu")),
    "opt, no biases": ("OPTForCausalLM", "OPT", _OPT | dict(enable_bias=False, tie_word_embeddings=False)),
    "stablelm": ("StableLmForCausalLM", "StableLm", _PHI | dict(
        rope_parameters=_ROPE | dict(partial_rotary_factor=0.25))),
    "stablelm, parallel, biases": ("StableLmForCausalLM", "StableLm", _PHI | dict(
        num_attention_heads=6, use_parallel_residual=True, use_qkv_bias=True,
        rope_parameters=_ROPE | dict(partial_rotary_factor=0.5))),
    "olmo": ("OlmoForCausalLM", "Olmo", _LLAMA),
    "olmo, clipped": ("OlmoForCausalLM", "Olmo", _LLAMA | dict(clip_qkv=0.7)),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2", _LLAMA),
    "olmo2, biases, yarn": ("Olmo2ForCausalLM", "Olmo2", _LLAMA | dict(
        attention_bias=True, tie_word_embeddings=True, rope_parameters=_YARN)),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3", _LLAMA | dict(num_hidden_layers=6, sliding_window=5, rope_parameters={
        "sliding_attention": _ROPE, "full_attention": _YARN})),
    "gemma": ("GemmaForCausalLM", "Gemma", _GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2", _GEMMA2),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", _GEMMA2 | dict(
        num_hidden_layers=8, rope_parameters=_NESTED, attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma3, own pattern": ("Gemma3ForCausalLM", "Gemma3Text", _GEMMA2 | dict(
        rope_parameters=_NESTED, attention_bias=True, query_pre_attn_scalar=8, attn_logit_softcapping=None,
        layer_types=["full_attention", *["sliding_attention"] * 4])),
    "phi3": ("Phi3ForCausalLM", "Phi3", _PHI3 | dict(sliding_window=6)),
    "phi3, longrope": ("Phi3ForCausalLM", "Phi3", _PHI3 | dict(
        original_max_position_embeddings=64, rope_parameters=_LONGROPE)),
    "phi3, longrope, beyond": ("Phi3ForCausalLM", "Phi3", _PHI3 | dict(
        original_max_position_embeddings=5, rope_parameters=_LONGROPE, tie_word_embeddings=True)),
    "phi3, partial": ("Phi3ForCausalLM", "Phi3", _PHI3 | dict(
        num_key_value_heads=6, hidden_size=48, rope_parameters=_ROPE | dict(partial_rotary_factor=0.75))),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3", _PHI3 | dict(num_hidden_layers=5)),
    "smollm3, windows": ("SmolLM3ForCausalLM", "SmolLM3", _PHI3 | dict(
        no_rope_layer_interval=3, use_sliding_window=True, sliding_window=5, attention_bias=True,
        tie_word_embeddings=False)),
    "qwen2, mixed": ("Qwen2ForCausalLM", "Qwen2", _LLAMA | dict(use_sliding_window=True, sliding_window=4,
                                                                max_window_layers=1)),
    "llama, yarn": ("LlamaForCausalLM", "Llama", _LLAMA | dict(rope_parameters=_YARN)),
    "llama, dynamic": ("LlamaForCausalLM", "Llama", _LLAMA | dict(
        max_position_embeddings=10, rope_parameters=dict(rope_theta=500.0, rope_type="dynamic", factor=3.0))),
    "olmo, biases, tied": ("OlmoForCausalLM", "Olmo", _LLAMA | dict(attention_bias=True, tie_word_embeddings=True)),
}


@functools.cache
def torch_model(name, seed=0, std=0.2):
    kind, config, settings = CASES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, f"{config}Config")(
        **settings, attn_implementation="eager")).eval()
    for path, weight in model.named_parameters():
        # Gemma's norms multiply by 1 plus their weights.
        is_scale = path.endswith("weight") and ("norm" in path or "ln_" in path) and config[:5] != "Gemma"
        weight.data.normal_(1.0 if is_scale else 0.0, std)
    for path, values in model.named_buffers():
        if path.endswith("e_score_correction_bias"):
            values.normal_(0.0, std)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The torch model of a case and seed, and our model loaded from the files that it saved."""
    @functools.cache
    def make(name, seed=0, std=0.2):
        directory = tmp_path_factory.mktemp("model")
        model = torch_model(name, seed, std)
        model.save_pretrained(directory)
        return model, tj.from_huggingface(directory), directory

    return make


@jax.jit
def whole_output(model, tokens, segments):
    return model(tokens, segment_ids_BT=segments)


def left_padded(seed, rows=3, length=17):
    """Tokens, and a mask of padding on the left (none, some, much)."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length)[None] >= np.array([0, 4, 11])[:rows, None]
    return rng.integers(0, VOCAB, (rows, length)) * mask, mask


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_logits_hidden_states_and_maps(pair, name, seed):
    model, bundle, _ = pair(name, seed)
    tokens, mask = left_padded(seed)
    if "dynamic" in name:  # transformers takes the longest text of a batch, and we that of each row
        mask = np.ones_like(mask)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64)),
                       position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)), output_hidden_states=True,
                       output_attentions=True)
    ours = whole_output(bundle.model, jnp.asarray(tokens), jnp.asarray(mask, jnp.int32))
    assert np.ptp(theirs.logits.numpy()[mask]) > 2
    np.testing.assert_allclose(np.asarray(ours.logits)[mask], theirs.logits.numpy()[mask], atol=2e-5)
    hidden = [*ours.trace.residual[:-1], ours.hidden]  # transformers shows the last after the final norm
    assert len(hidden) == len(theirs.hidden_states)
    for layer, (a, b) in enumerate(zip(hidden, theirs.hidden_states, strict=True)):
        np.testing.assert_allclose(np.asarray(a)[mask], b.numpy()[mask], atol=2e-5, err_msg=f"hidden state {layer}")
    for layer, (a, b) in enumerate(zip(ours.trace.attention(), theirs.attentions, strict=True)):
        a, b = np.asarray(a).swapaxes(1, 2)[mask], b.numpy().swapaxes(1, 2)[mask]
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"map {layer}")


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt_neox", "gptj"])
def test_loss_and_its_gradients(pair, name):
    model, bundle, _ = pair(name)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, 19))
    model.zero_grad()
    theirs = model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    theirs.backward()

    def loss(model):
        logprobs = jax.nn.log_softmax(model(jnp.asarray(tokens)).logits[:, :-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(tokens)[:, 1:, None], -1).mean()

    ours, gradients = jax.jit(jax.value_and_grad(loss))(bundle.model)
    assert float(ours) == pytest.approx(theirs.item(), abs=1e-4)
    assert _compare_gradients(model, gradients) >= 9


def _compare_gradients(model, gradients):
    """Gradients under their names, by the tables that the export uses; the number of those
    compared."""
    from transformer_jax.interop import FAMILIES, huggingface

    family = FAMILIES[model.config.model_type]
    theirs = {}
    for name, weight in model.named_parameters():
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        layer, _, fused = name.partition(".experts.")
        if fused:  # in memory, transformers joins what its files have apart
            theirs |= {f"{layer}.experts.{expert}.{part}.weight": half
                       for expert, whole in enumerate(weight.grad.numpy()) for part, half in zip(
                           parts[fused], np.split(whole, len(parts[fused])), strict=True)}
        else:
            theirs[name] = weight.grad.numpy()
    compared = 0
    for name, _, _, values in huggingface._their_tensors(family, gradients):
        name = name.replace("embed_out", "lm_head")  # transformers 5 renames it when it loads and saves
        if name.endswith("e_score_correction_bias"):  # it has no gradient
            assert not values().any()
            continue
        scale = max(1.0, np.abs(theirs[name]).max())
        np.testing.assert_allclose(values(), theirs[name], atol=1e-4 * scale, err_msg=name)
        compared += 1
    assert compared == len(theirs)
    return compared


@pytest.mark.parametrize("name", [
    "gpt2", "llama 3", "mistral", "qwen2, tied", "mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3",
    "gpt_oss", "gpt_neox", "gptj", "phi, grouped", "opt", "stablelm, parallel, biases", "olmo", "olmo3", "gemma",
    "gemma2", "gemma3", "phi3, longrope", "smollm3, windows"])
def test_greedy_generation_of_200_tokens(pair, name):
    model, bundle, _ = pair(name, std=0.3)
    prompts = [[5, 9, 2], [7, 7, 30, 31, 32]]
    new = 200
    found = tj.generate(bundle.model, prompts, max_new_tokens=new, end_ids=[], sampling=tj.Sampling(temperature=0))
    for prompt, ours in zip(prompts, found.tokens, strict=True):
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None,
                                pad_token_id=0)[0, len(prompt):].tolist()
        assert len(ours) == new and ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_theirs_to_ours_to_theirs(pair, name, tmp_path):
    model, bundle, _ = pair(name)
    tj.to_huggingface(bundle, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is type(model)
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    old, new = model.config.to_dict(), again.config.to_dict()
    for settings in (old, new):
        if settings["model_type"] in ("gpt2", "gptj"):
            settings["n_inner"] = settings["n_inner"] or 4 * settings["n_embd"]
        if "num_attention_heads" in settings:
            derived = settings["hidden_size"] // settings["num_attention_heads"]
            settings["head_dim"] = settings.get("head_dim") or derived
    # Without a window, the setting that chooses the layers with a window has no effect.
    unimportant = {"_name_or_path", "max_window_layers", "partial_rotary_factor", "bos_token_id", "eos_token_id"}
    assert {key: value for key, value in old.items() if key not in unimportant} == {
        key: value for key, value in new.items() if key not in unimportant}


@pytest.mark.parametrize("name", ["gpt2", "llama 3"])
def test_bfloat16(pair, name):
    model, _, directory = pair(name)
    bundle = tj.from_huggingface(directory, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(bundle.model)} == {jnp.dtype("bfloat16")}
    tokens = np.random.default_rng(3).integers(0, VOCAB, (2, 17))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    error = np.abs(np.asarray(tj.forward(bundle.model, jnp.asarray(tokens))) - theirs)
    # bfloat16 has 8 bits: rounding weights and three layers costs a few per cent of the logits'
    # standard deviation.
    assert 1e-4 < error.mean() < 0.05 * theirs.std() and error.max() < 0.3 * theirs.std()


def test_stored_bfloat16_is_kept(pair, tmp_path):
    model, _, _ = pair("llama 3")
    transformers.LlamaForCausalLM(model.config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    bundle = tj.from_huggingface(tmp_path / "theirs")
    assert bundle.config.dtype == bundle.config.param_dtype == "bfloat16"
    tj.to_huggingface(bundle, tmp_path / "ours")
    theirs, ours = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("theirs", "ours"))
    assert ours.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_score_is_the_models_log_probability(pair):
    model, bundle, _ = pair("gpt2")
    tokenizer = tj.Tokenizer.train(["what a text says, and what it does not say"] * 3, kind="char")
    text = "what it says"
    ids = tokenizer.encode(text)
    assert max(ids) < VOCAB
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.start_id, *ids[:-1]]])).logits[0]
    expected = torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)]
    found = tj.score(bundle.model, [text], tokenizer=tokenizer)
    np.testing.assert_allclose(found.logprobs[0], expected.numpy(), atol=2e-5)
    assert found.totals[0] == pytest.approx(expected.sum().item(), abs=1e-4)
