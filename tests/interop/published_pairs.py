"""More configs of encoder-decoders on the Hugging Face hub at small sizes: mT5, M2M100 and NLLB."""

from published_configs import VOCAB, publish, without

publish("mt5", "pair", {  # google/mt5-small
    "_name_or_path": "/home/patrick/t5/mt5-small", "architectures": ["MT5ForConditionalGeneration"], "d_ff": 20,
    "d_kv": 5, "d_model": 12, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "model_type": "mt5", "num_decoder_layers": 2, "num_heads": 2, "num_layers": 2,
    "pad_token_id": 0, "relative_attention_num_buckets": 8, "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer", "transformers_version": "4.10.0.dev0", "use_cache": True, "vocab_size": VOCAB},
    generation={"_from_model_config": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
                "transformers_version": "4.27.0.dev0"},
    rename=without(r"(encoder|decoder)\.embed_tokens\.weight$"))
_M2M100 = {
    "_name_or_path": "./", "activation_dropout": 0.0, "activation_function": "relu",
    "architectures": ["M2M100ForConditionalGeneration"], "attention_dropout": 0.1, "bos_token_id": 0, "d_model": 12,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 20, "decoder_layerdrop": 0.05, "decoder_layers": 2,
    "decoder_start_token_id": 2, "dropout": 0.1, "early_stopping": True, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 20, "encoder_layerdrop": 0.05, "encoder_layers": 2, "eos_token_id": 2, "init_std": 0.02,
    "is_encoder_decoder": True, "max_length": 200, "max_position_embeddings": 64, "model_type": "m2m_100",
    "num_beams": 5, "num_hidden_layers": 2, "pad_token_id": 1, "scale_embedding": True, "use_cache": True,
    "vocab_size": VOCAB}
_GENERATION = {"_from_model_config": True, "bos_token_id": 0, "decoder_start_token_id": 2, "early_stopping": True,
               "eos_token_id": 2, "max_length": 200, "num_beams": 5, "pad_token_id": 1,
               "transformers_version": "4.27.0.dev0"}
_TIED = r"(encoder|decoder)\.embed_tokens\.weight$|^lm_head"
publish("m2m_100", "pair", _M2M100 | {"transformers_version": "4.4.0.dev0"},  # facebook/m2m100_418M
        generation=_GENERATION, rename=without(_TIED))
publish("nllb", "pair", _M2M100 | {  # facebook/nllb-200-distilled-600M, tuned for one target language
    "num_hidden_layers": 2, "tokenizer_class": "NllbTokenizer", "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0"},
    generation=_GENERATION | {"forced_bos_token_id": 9}, rename=without(_TIED), again=False)
