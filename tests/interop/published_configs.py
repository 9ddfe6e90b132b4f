"""Configs of models on the Hugging Face hub at small sizes, with the names of their tensors.

The settings are those of the published files, in the form of their time (such as
``openai-community/gpt2``, ``google-bert/bert-base-uncased``, ``facebook/bart-large-cnn``,
``Helsinki-NLP/opus-mt-en-de``, ``google/pegasus-xsum``, ``google-t5/t5-small``), but for sizes and
token ids.
"""

import re

VOCAB = 34
PUBLISHED = {}


def publish(case, kind, config, *, generation=None, rename=lambda name: name, copies=None, buffers=None, body=False,
            again=True, again_body=False, save=None, experts=None, dense=0):
    """Registers a published model.

    Args:
      case: its name.
      kind: ``"decoder"``, ``"encoder"`` or ``"pair"``; ``"texts"`` or ``"tokens"`` for a classifier.
      config: ``config.json``.
      generation: ``generation_config.json``, if there is one.
      rename: from the name of a tensor today to that in the file; ``None``: not in the file.
      copies: tensors that a file holds a second time, with the name of the first.
      buffers: shape and type of what is stored beside the weights, by name.
      body: whether the model has no head.
      again: whether transformers 5 saves it again as another case.
      again_body: whether ``AutoModel`` does.
      save: options of ``save_pretrained``.
      experts: of a mixture, which transformers joins in memory: the name of the layer in the file,
        the number of experts, their two widths, and the names of gate, up and down projection.
      dense: the number of first layers that have no experts.
    """
    PUBLISHED[f"{case}-published"] = dict(
        kind=kind, config=config, generation=generation, rename=rename, copies=copies or {}, buffers=buffers or {},
        body=body, again=again, again_body=again_body, save=save or {},
        experts=_expert_shapes(experts, config, dense))


def _expert_shapes(experts, config, dense):
    """The shapes of the matrices of experts by their names in the file."""
    if experts is None:
        return {}
    place, number, width, inner, (gate, up, down) = experts
    return {f"model.layers.{layer}.{place}.experts.{expert}.{name}.weight": shape
            for layer in range(dense, config["num_hidden_layers"]) for expert in range(number)
            for name, shape in ((gate, (inner, width)), (up, (inner, width)), (down, (width, inner)))}


def without(*patterns, also=lambda name: name):
    """A function for ``rename`` that leaves out the tensors of some patterns."""
    return lambda name: None if any(re.search(pattern, name) for pattern in patterns) else also(name)


publish("gpt2", "decoder", {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 33,
    "embd_pdrop": 0.1, "eos_token_id": 33, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 64, "n_embd": 12, "n_head": 2, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": VOCAB},
    generation={"_from_model_config": True, "bos_token_id": 33, "eos_token_id": 33,
                "transformers_version": "4.26.0.dev0"},
    rename=without(r"^lm_head", also=lambda name: name.removeprefix("transformer.")),
    buffers={f"h.{layer}.attn.{name}": (shape, "float32") for layer in (0, 1)
             for name, shape in (("bias", (1, 1, 64, 64)), ("masked_bias", ()))},
    again_body=True)

_LLAMA = {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02,
          "intermediate_size": 20, "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
          "num_key_value_heads": 2, "use_cache": True, "vocab_size": VOCAB}
publish("llama2", "decoder", _LLAMA | {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "num_key_value_heads": 4, "pad_token_id": -1, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0"},
    generation={"_from_model_config": True, "bos_token_id": 1, "do_sample": True, "eos_token_id": 2,
                "max_length": 64, "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9},
    buffers={f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": ((2,), "float32") for layer in (0, 1)},
    again_body=True)
publish("llama3", "decoder", _LLAMA | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": [2, 30, 31], "head_dim": 6, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                            "original_max_position_embeddings": 16, "rope_type": "llama3"},
    "rope_theta": 500.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0"},
    generation={"bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 30, 31], "temperature": 0.6, "top_p": 0.9,
                "transformers_version": "4.45.0.dev0"},
    rename=without(r"^lm_head"))
publish("mistral", "decoder", _LLAMA | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0"},
    generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2,
                "transformers_version": "4.34.0.dev0"},
    save={"max_shard_size": "6KB"})
publish("qwen2", "decoder", _LLAMA | {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "max_window_layers": 21, "model_type": "qwen2",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_sliding_window": False},
    generation={"bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 3], "pad_token_id": 1,
                "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
                "transformers_version": "4.37.0"},
    rename=without(r"^lm_head"))
publish("qwen3", "decoder", _LLAMA | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 6,
    "max_window_layers": 28, "model_type": "qwen3", "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_sliding_window": False},
    generation={"bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 3], "pad_token_id": 1, "temperature": 0.6,
                "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"},
    copies={"lm_head.weight": "model.embed_tokens.weight"})
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False, "torch_dtype": "bfloat16"}
publish("mixtral", "decoder", _LLAMA | _EXPERTS | {  # mistralai/Mixtral-8x7B-v0.1
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "model_type": "mixtral",
    "num_local_experts": 4, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "transformers_version": "4.36.0.dev0"},
    generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2,
                "transformers_version": "4.36.0.dev0"},
    rename=without("experts", also=lambda name: name.replace(".mlp.", ".block_sparse_moe.")),
    experts=("block_sparse_moe", 4, 16, 20, ("w1", "w3", "w2")))
publish("olmoe", "decoder", _LLAMA | _EXPERTS | {  # allenai/OLMoE-1B-7B-0924
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "eos_token_id": 33, "model_type": "olmoe", "norm_topk_prob": False, "num_experts": 4, "num_key_value_heads": 4,
    "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0"},
    generation={"_from_model_config": True, "eos_token_id": 33, "pad_token_id": 1,
                "transformers_version": "4.43.0.dev0"},
    rename=without("experts"), experts=("mlp", 4, 16, 20, ("gate_proj", "up_proj", "down_proj")))
publish("qwen3_moe", "decoder", _LLAMA | _EXPERTS | {  # Qwen/Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "head_dim": 6, "max_window_layers": 2, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 12, "norm_topk_prob": True, "num_experts": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "transformers_version": "4.51.0", "use_sliding_window": False},
    rename=without("experts"), experts=("mlp", 4, 16, 12, ("gate_proj", "up_proj", "down_proj")))

# deepseek-ai/DeepSeek-V2-Lite and DeepSeek-V3; of the second without the types of 8 bits (fp8), in
# which its weights are stored, but with tensors of the layer that predicts a second token.
_DEEPSEEK = _LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "max_position_embeddings": 64, "moe_intermediate_size": 12,
    "moe_layer_freq": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4,
    "pretraining_tp": 1, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 6}
_SCALES = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 8, "type": "yarn"}
publish("deepseek_v2", "decoder", _DEEPSEEK | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 1, "n_shared_experts": 2, "norm_topk_prob": False, "q_lora_rank": None,
    "rope_scaling": _SCALES | {"mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "transformers_version": "4.33.1"},
    generation={"_from_model_config": True, "bos_token_id": 1, "do_sample": True, "eos_token_id": 2,
                "temperature": 0.3, "top_p": 0.95, "transformers_version": "4.33.1"},
    rename=without(r"mlp\.experts"), experts=("mlp", 4, 16, 12, ("gate_proj", "up_proj", "down_proj")), dense=1)
publish("deepseek_v3", "decoder", _DEEPSEEK | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_group": 2, "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
    "q_lora_rank": 10, "rope_scaling": _SCALES | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 1, "topk_method": "noaux_tc",
    "transformers_version": "4.33.1"},
    rename=without(r"mlp\.experts"), experts=("mlp", 8, 16, 12, ("gate_proj", "up_proj", "down_proj")), dense=1,
    buffers={f"model.layers.2.{name}.weight": (shape, "float32")
             for name, shape in (("enorm", (16,)), ("eh_proj", (16, 32)), ("self_attn.o_proj", (16, 24)))})
publish("gpt_oss", "decoder", _LLAMA | {  # openai/gpt-oss-20b, with the weights in bfloat16
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 33,
    "experts_per_token": 2, "head_dim": 6, "initial_context_length": 16,
    "layer_types": ["sliding_attention", "full_attention"], "model_type": "gpt_oss", "num_experts_per_tok": 2,
    "num_local_experts": 4, "output_router_logits": False, "pad_token_id": 31, "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 16,
                     "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 5, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0"},
    generation={"bos_token_id": 1, "do_sample": True, "eos_token_id": [33, 31], "pad_token_id": 31,
                "transformers_version": "4.55.0.dev0"})

_MASKS = {"bias": ((1, 1, 64, 64), "uint8"), "masked_bias": ((), "float32")}
publish("gpt_neox", "decoder", {  # EleutherAI/pythia-70m
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 20, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 64, "model_type": "gpt_neox", "num_attention_heads": 2, "num_hidden_layers": 2,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": VOCAB},
    rename=lambda name: name.replace("lm_head", "embed_out"),
    buffers={f"gpt_neox.layers.{layer}.attention.{name}": entry for layer in (0, 1)
             for name, entry in (_MASKS | {"rotary_emb.inv_freq": ((1,), "float32")}).items()})
publish("gptj", "decoder", {  # EleutherAI/gpt-j-6b
    "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0, "bos_token_id": 33,
    "embd_pdrop": 0.0, "eos_token_id": 33, "gradient_checkpointing": False, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gptj", "n_embd": 16, "n_head": 2, "n_inner": None, "n_layer": 2,
    "n_positions": 64, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 4, "scale_attn_weights": True,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer", "transformers_version": "4.18.0.dev0", "use_cache": True,
    "vocab_size": VOCAB},
    buffers={f"transformer.h.{layer}.attn.{name}": entry for layer in (0, 1) for name, entry in _MASKS.items()})
publish("phi", "decoder", {  # microsoft/phi-2
    "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 33, "embd_pdrop": 0.0,
    "eos_token_id": 33, "hidden_act": "gelu_new", "hidden_size": 20, "initializer_range": 0.02,
    "intermediate_size": 24, "layer_norm_eps": 1e-05, "max_position_embeddings": 64, "model_type": "phi",
    "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.4,
    "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.37.0", "use_cache": True,
    "vocab_size": VOCAB},
    generation={"_from_model_config": True, "bos_token_id": 33, "eos_token_id": 33, "transformers_version": "4.37.0"})
publish("opt", "decoder", {  # facebook/opt-125m
    "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
    "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True,
    "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 24, "hidden_size": 12, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 64, "model_type": "opt", "num_attention_heads": 2, "num_hidden_layers": 2,
    "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0",
    "use_cache": True, "vocab_size": VOCAB, "word_embed_proj_dim": 12},
    generation={"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
                "transformers_version": "4.27.0.dev0"},
    rename=without(r"^lm_head"))
publish("stablelm", "decoder", {  # stabilityai/stablelm-2-1_6b
    "architectures": ["StableLmForCausalLM"], "bos_token_id": 33, "eos_token_id": 33, "hidden_act": "silu",
    "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 20, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 64, "model_type": "stablelm", "num_attention_heads": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.38.0", "use_cache": True, "use_qkv_bias": True,
    "vocab_size": VOCAB},
    generation={"_from_model_config": True, "bos_token_id": 33, "eos_token_id": 33, "transformers_version": "4.38.0"})
publish("olmo", "decoder", {  # allenai/OLMo-1B-hf
    "architectures": ["OlmoForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "eos_token_id": 33, "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 20,
    "max_position_embeddings": 64, "model_type": "olmo", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 4, "pad_token_id": 1, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "4.40.0.dev0", "use_cache": True,
    "vocab_size": VOCAB},
    generation={"_from_model_config": True, "eos_token_id": 33, "pad_token_id": 1,
                "transformers_version": "4.40.0.dev0"},
    rename=without(r"^lm_head"))

_GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GEMMA = _LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 6, "hidden_act": "gelu", "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "torch_dtype": "bfloat16"}
publish("gemma", "decoder", _GEMMA | {  # google/gemma-2b
    "architectures": ["GemmaForCausalLM"], "hidden_activation": None, "model_type": "gemma", "num_key_value_heads": 1,
    "rope_scaling": None, "transformers_version": "4.38.0.dev0"},
    generation=_GENERATION | {"transformers_version": "4.38.0.dev0"}, rename=without(r"^lm_head"))
publish("gemma2", "decoder", _GEMMA | {  # google/gemma-2-2b
    "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2", "num_hidden_layers": 3, "query_pre_attn_scalar": 9, "sliding_window": 8,
    "torch_dtype": "float32", "transformers_version": "4.42.4"},
    generation=_GENERATION | {"cache_implementation": "hybrid", "transformers_version": "4.42.4"},
    rename=without(r"^lm_head"))
publish("gemma3", "decoder", _GEMMA | {  # google/gemma-3-1b-pt
    "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma3_text", "num_hidden_layers": 7, "num_key_value_heads": 1, "query_pre_attn_scalar": 6,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 5,
    "sliding_window_pattern": 6, "transformers_version": "4.50.0.dev0"},
    generation=_GENERATION | {"cache_implementation": "hybrid", "transformers_version": "4.50.0.dev0"},
    rename=without(r"^lm_head"))
_OLMO2 = _LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "num_key_value_heads": 4, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_theta": 500000, "tie_word_embeddings": False}
publish("olmo2", "decoder", _OLMO2 | {  # allenai/OLMo-2-1124-7B
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rope_scaling": None, "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0"},
    generation=_GENERATION | {"transformers_version": "4.47.0.dev0"})
publish("olmo3", "decoder", _OLMO2 | {  # allenai/Olmo-3-1025-7B
    "architectures": ["Olmo3ForCausalLM"], "dtype": "float32", "model_type": "olmo3", "num_hidden_layers": 5,
    "layer_types": [*["sliding_attention"] * 3, "full_attention", "sliding_attention"],
    "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                     "original_max_position_embeddings": 8, "rope_type": "yarn"},
    "sliding_window": 6, "transformers_version": "4.57.0"},
    generation=_GENERATION | {"transformers_version": "4.57.0"})
publish("phi3", "decoder", _LLAMA | {  # microsoft/Phi-3-mini-128k-instruct
    "_name_or_path": "Phi-3-mini-128k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "model_type": "phi3", "original_max_position_embeddings": 20,
    "pad_token_id": 0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.08, 7.5], "short_factor": [1.0, 1.4], "type": "longrope"},
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2"},
    generation=_GENERATION | {"eos_token_id": [2, 3], "transformers_version": "4.40.2"})
publish("smollm3", "decoder", _LLAMA | {  # HuggingFaceTB/SmolLM3-3B
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "layer_types": ["full_attention"] * 5, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1], "num_hidden_layers": 5, "pad_token_id": 0,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_sliding_window": False},
    generation=_GENERATION | {"do_sample": True, "temperature": 0.6, "top_p": 0.95,
                              "transformers_version": "4.54.0.dev0"},
    rename=without(r"^lm_head"))

_BERT = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_size": 12,
         "initializer_range": 0.02, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2,
         "vocab_size": VOCAB}
publish("bert", "encoder", _BERT | {
    "architectures": ["BertForMaskedLM"], "gradient_checkpointing": False, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "max_position_embeddings": 24, "model_type": "bert", "pad_token_id": 0,
    "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2,
    "use_cache": True},
    rename=without(r"decoder\.", also=lambda name: re.sub(
        r"LayerNorm\.(weight|bias)$", lambda found: f"LayerNorm.{dict(weight='gamma', bias='beta')[found[1]]}", name)),
    buffers={"bert.embeddings.position_ids": ((1, 24), "int64"), "cls.seq_relationship.weight": ((2, 12), "float32"),
             "cls.seq_relationship.bias": ((2,), "float32"), "bert.pooler.dense.weight": ((12, 12), "float32"),
             "bert.pooler.dense.bias": ((12,), "float32")})
publish("bert_relu", "encoder", _BERT | {
    "architectures": ["BertForMaskedLM"], "hidden_act": "relu", "layer_norm_eps": 1e-12,
    "max_position_embeddings": 24, "model_type": "bert", "pad_token_id": 0, "type_vocab_size": 2},
    rename=without(r"decoder\."), again=False)
publish("minilm", "encoder", _BERT | {
    "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"],
    "gradient_checkpointing": False, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 24,
    "model_type": "bert", "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.8.2",
    "type_vocab_size": 2, "use_cache": True},
    buffers={"embeddings.position_ids": ((1, 24), "int64")}, body=True, again=False, again_body=True)
publish("roberta", "encoder", _BERT | {
    "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-05, "max_position_embeddings": 26, "model_type": "roberta", "pad_token_id": 1,
    "type_vocab_size": 1},
    rename=without(r"decoder\.bias"), copies={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
    buffers={"roberta.embeddings.position_ids": ((1, 26), "int64"),
             "roberta.pooler.dense.weight": ((12, 12), "float32"), "roberta.pooler.dense.bias": ((12,), "float32")},
    again_body=True)

_PAIR = {"activation_dropout": 0.1, "attention_dropout": 0.1, "classif_dropout": 0.0, "classifier_dropout": 0.0,
         "d_model": 12, "decoder_attention_heads": 2, "decoder_ffn_dim": 20, "decoder_layerdrop": 0.0,
         "decoder_layers": 2, "dropout": 0.1, "encoder_attention_heads": 2, "encoder_ffn_dim": 20,
         "encoder_layerdrop": 0.0, "encoder_layers": 2, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
         "init_std": 0.02, "is_encoder_decoder": True, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
         "max_position_embeddings": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "add_bias_logits": False}
_EMBEDDINGS = {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")}
_VERSIONS = {f"model.{side}.version": ((1,), "float32") for side in ("encoder", "decoder")}
_TIED = r"(encoder|decoder)\.embed_tokens\.weight$|^lm_head"
publish("bart", "pair", _PAIR | {
    "_num_labels": 3, "activation_function": "gelu", "add_final_layer_norm": False,
    "architectures": ["BartForConditionalGeneration"], "bos_token_id": 0, "decoder_start_token_id": 2,
    "early_stopping": True, "eos_token_id": 2, "extra_pos_embeddings": 2, "force_bos_token_to_be_generated": True,
    "forced_eos_token_id": 2, "gradient_checkpointing": False, "length_penalty": 2.0, "max_length": 142,
    "min_length": 56, "model_type": "bart", "no_repeat_ngram_size": 3, "normalize_before": False,
    "normalize_embedding": True, "num_beams": 4, "output_past": True, "pad_token_id": 1, "prefix": " ",
    "scale_embedding": False, "static_position_embeddings": False,
    "task_specific_params": {"summarization": {"length_penalty": 2.0, "num_beams": 4}}, "use_cache": True},
    rename=without(_TIED), copies=_EMBEDDINGS, buffers=_VERSIONS)
publish("bart_base", "pair", _PAIR | {
    "_name_or_path": "bart-base", "activation_function": "gelu", "add_final_layer_norm": False,
    "architectures": ["BartModel"], "bos_token_id": 0, "decoder_start_token_id": 2, "early_stopping": True,
    "eos_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2, "gradient_checkpointing": False,
    "model_type": "bart", "no_repeat_ngram_size": 3, "normalize_before": False, "normalize_embedding": True,
    "num_beams": 4, "pad_token_id": 1, "scale_embedding": False, "torch_dtype": "float32",
    "transformers_version": "4.12.0.dev0", "use_cache": True},
    rename=without(_TIED), copies={name.removeprefix("model."): "shared.weight" for name in _EMBEDDINGS}, body=True,
    again=False, again_body=True)
publish("mbart", "pair", _PAIR | {
    "_num_labels": 3, "activation_function": "gelu", "add_final_layer_norm": True,
    "architectures": ["MBartForConditionalGeneration"], "bos_token_id": 0, "decoder_start_token_id": 31,
    "eos_token_id": 2, "forced_eos_token_id": 2, "max_length": 200, "model_type": "mbart", "normalize_before": True,
    "normalize_embedding": True, "num_beams": 5, "output_past": True, "pad_token_id": 1, "save_step": 58,
    "scale_embedding": True, "static_position_embeddings": False,
    "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": 31}}},
    rename=without(_TIED), copies=_EMBEDDINGS)
publish("marian", "pair", _PAIR | {
    "_num_labels": 3, "activation_function": "swish", "add_final_layer_norm": False,
    "architectures": ["MarianMTModel"], "bad_words_ids": [[33]], "bos_token_id": 0, "decoder_start_token_id": 33,
    "decoder_vocab_size": VOCAB, "eos_token_id": 0, "forced_eos_token_id": 0, "max_length": 512,
    "model_type": "marian", "normalize_before": False, "normalize_embedding": False, "num_beams": 6,
    "pad_token_id": 33, "scale_embedding": True, "share_encoder_decoder_embeddings": True,
    "static_position_embeddings": True, "transformers_version": "4.22.0.dev0", "use_cache": True},
    generation={"_from_model_config": True, "bad_words_ids": [[33]], "bos_token_id": 0, "decoder_start_token_id": 33,
                "eos_token_id": 0, "forced_eos_token_id": 0, "max_length": 64, "num_beams": 6, "pad_token_id": 33,
                "renormalize_logits": True, "transformers_version": "4.32.0.dev0"},
    rename=without(_TIED, "embed_positions"), copies=_EMBEDDINGS,
    buffers={f"model.{side}.embed_positions.weight": ((64, 12), "float32") for side in ("encoder", "decoder")},
    again_body=True)
publish("pegasus", "pair", _PAIR | {
    "activation_function": "relu", "add_final_layer_norm": True,
    "architectures": ["PegasusForConditionalGeneration"], "bos_token_id": 0, "decoder_start_token_id": 0,
    "eos_token_id": 1, "extra_pos_embeddings": 0, "force_bos_token_to_be_generated": False, "forced_eos_token_id": 1,
    "gradient_checkpointing": False, "length_penalty": 0.6, "max_length": 64, "model_type": "pegasus",
    "normalize_before": True, "normalize_embedding": False, "num_beams": 8, "pad_token_id": 0,
    "scale_embedding": True, "static_position_embeddings": True,
    "task_specific_params": {"summarization_xsum": {"length_penalty": 0.6}}},
    rename=without(_TIED, "embed_positions"), copies=_EMBEDDINGS | {"lm_head.weight": "model.shared.weight"},
    buffers={f"model.{side}.embed_positions.weight": ((64, 12), "float32") for side in ("encoder", "decoder")})

_T5 = {"architectures": ["T5ForConditionalGeneration"], "d_ff": 20, "d_kv": 5, "d_model": 12,
       "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
       "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 64, "num_heads": 2,
       "num_layers": 2, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 8,
       "vocab_size": VOCAB}
_T5_COPIES = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
publish("t5", "pair", _T5 | {"task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}}},
        generation={"_from_model_config": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
                    "transformers_version": "4.27.0.dev0"},
        rename=without(_TIED), copies=_T5_COPIES | {"lm_head.weight": "shared.weight"},
        buffers={"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": ((8, 2), "float32")},
        again_body=True)
publish("t5_1_1", "pair", _T5 | {
    "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "relative_attention_max_distance": 20,
    "tie_word_embeddings": False, "transformers_version": "4.23.1", "use_cache": True},
    generation={"_from_model_config": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
                "transformers_version": "4.27.0.dev0"},
    rename=without(r"(encoder|decoder)\.embed_tokens\.weight$"), copies=_T5_COPIES)
publish("t5_1_1_tied", "pair", _T5 | {
    "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "relative_attention_max_distance": 20,
    "scale_decoder_outputs": False, "tie_word_embeddings": True, "transformers_version": "5.0.0", "use_cache": True},
    generation={"_from_model_config": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    rename=without(_TIED), again=False)
