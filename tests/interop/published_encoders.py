"""More configs of models on the Hugging Face hub at small sizes: classifiers, and encoders of other
families."""


from published_configs import VOCAB, publish, without

_SMALL = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 12,
          "initializer_range": 0.02, "intermediate_size": 20, "layer_norm_eps": 1e-12, "num_attention_heads": 2,
          "num_hidden_layers": 2, "vocab_size": VOCAB}
_POLARITY = {"id2label": {"0": "negative", "1": "neutral", "2": "positive"},
             "label2id": {"negative": 0, "neutral": 1, "positive": 2}}
_ENTITIES = {"id2label": {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC"},
             "label2id": {"O": 0, "B-PER": 1, "I-PER": 2, "B-LOC": 3}}

# textattack/bert-base-uncased-SST-2, dslim/bert-base-NER, cardiffnlp/twitter-roberta-base-sentiment
publish("bert_texts", "texts", _SMALL | _POLARITY | {
    "architectures": ["BertForSequenceClassification"], "finetuning_task": "sst-2", "max_position_embeddings": 24,
    "model_type": "bert", "pad_token_id": 0, "position_embedding_type": "absolute",
    "problem_type": "single_label_classification", "type_vocab_size": 2},
    buffers={"bert.embeddings.position_ids": ((1, 24), "int64")})
publish("bert_tokens", "tokens", _SMALL | _ENTITIES | {
    "_num_labels": 4, "architectures": ["BertForTokenClassification"], "classifier_dropout": 0.2,
    "max_position_embeddings": 24, "model_type": "bert", "pad_token_id": 0, "type_vocab_size": 2}, again=False)
publish("roberta_texts", "texts", _SMALL | _POLARITY | {
    "architectures": ["RobertaForSequenceClassification"], "bos_token_id": 0, "eos_token_id": 2,
    "gradient_checkpointing": False, "layer_norm_eps": 1e-05, "max_position_embeddings": 26, "model_type": "roberta",
    "pad_token_id": 1, "type_vocab_size": 1}, again=False)
publish("roberta_tokens", "tokens", _SMALL | _ENTITIES | {
    "architectures": ["RobertaForTokenClassification"], "layer_norm_eps": 1e-05, "max_position_embeddings": 26,
    "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1}, again=False)
publish("gpt2_texts", "texts", {
    "activation_function": "gelu_new", "architectures": ["GPT2ForSequenceClassification"], "attn_pdrop": 0.1,
    "bos_token_id": 33, "embd_pdrop": 0.1, "eos_token_id": 33, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_embd": 12, "n_head": 2, "n_layer": 2, "n_positions": 64, "pad_token_id": 33,
    "resid_pdrop": 0.1, "vocab_size": VOCAB}, again=False)
publish("llama_texts", "texts", _POLARITY | {
    "architectures": ["LlamaForSequenceClassification"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 20, "max_position_embeddings": 64,
    "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": VOCAB}, again=False)

publish("distilbert", "encoder", {  # distilbert/distilbert-base-uncased
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 12,
    "dropout": 0.1, "hidden_dim": 20, "initializer_range": 0.02, "max_position_embeddings": 24,
    "model_type": "distilbert", "n_heads": 2, "n_layers": 2, "pad_token_id": 0, "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True,
    "transformers_version": "4.10.0.dev0", "vocab_size": VOCAB},
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}, again_body=True)
publish("distilbert_texts", "texts", _POLARITY | {  # distilbert/distilbert-base-uncased-finetuned-sst-2-english
    "activation": "relu", "architectures": ["DistilBertForSequenceClassification"], "attention_dropout": 0.1, "dim": 12,
    "dropout": 0.1, "finetuning_task": "sst-2", "hidden_dim": 20, "initializer_range": 0.02,
    "max_position_embeddings": 24, "model_type": "distilbert", "n_heads": 2, "n_layers": 2, "output_past": True,
    "pad_token_id": 0, "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True,
    "vocab_size": VOCAB}, again=False)
publish("xlm_roberta", "encoder", _SMALL | {  # FacebookAI/xlm-roberta-base
    "architectures": ["XLMRobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 26, "model_type": "xlm-roberta", "output_past": True, "pad_token_id": 1,
    "position_embedding_type": "absolute", "transformers_version": "4.17.0.dev0", "type_vocab_size": 1,
    "use_cache": True},
    rename=without(r"decoder\.bias"), copies={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
    buffers={"roberta.embeddings.position_ids": ((1, 26), "int64"),
             "roberta.pooler.dense.weight": ((12, 12), "float32"), "roberta.pooler.dense.bias": ((12,), "float32")})
publish("camembert", "encoder", _SMALL | {  # almanach/camembert-base
    "architectures": ["CamembertForMaskedLM"], "bos_token_id": 5, "eos_token_id": 6, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 26, "model_type": "camembert", "output_past": True, "pad_token_id": 1,
    "type_vocab_size": 1},
    rename=without(r"decoder\."), buffers={"roberta.embeddings.position_ids": ((1, 26), "int64"),
                                           "roberta.pooler.dense.weight": ((12, 12), "float32"),
                                           "roberta.pooler.dense.bias": ((12,), "float32")})
_ELECTRA = _SMALL | {"embedding_size": 8, "max_position_embeddings": 24, "model_type": "electra",
                     "summary_activation": "gelu", "summary_last_dropout": 0.1, "summary_type": "first",
                     "summary_use_proj": True, "pad_token_id": 0, "type_vocab_size": 2}
publish("electra", "encoder", _ELECTRA | {  # google/electra-small-generator
    "architectures": ["ElectraForMaskedLM"]},
    rename=without(r"generator_lm_head\.weight"), buffers={"electra.embeddings.position_ids": ((1, 24), "int64")},
    again_body=True)
publish("electra_replaced", "tokens", _ELECTRA | {  # google/electra-small-discriminator
    "architectures": ["ElectraForPreTraining"], "hidden_act": "gelu_new"}, again=False)
publish("electra_texts", "texts", _ELECTRA | _POLARITY | {
    "architectures": ["ElectraForSequenceClassification"], "embedding_size": 12}, again=False)
_ALBERT = _SMALL | {"attention_probs_dropout_prob": 0, "bos_token_id": 2, "classifier_dropout_prob": 0.1,
                    "down_scale_factor": 1, "embedding_size": 8, "eos_token_id": 3, "gap_size": 0,
                    "hidden_act": "gelu_new", "hidden_dropout_prob": 0, "inner_group_num": 1,
                    "max_position_embeddings": 24, "model_type": "albert", "net_structure_type": 0,
                    "num_hidden_groups": 1, "num_hidden_layers": 3, "num_memory_blocks": 0, "pad_token_id": 0,
                    "type_vocab_size": 2}
publish("albert", "encoder", _ALBERT | {  # albert/albert-base-v2
    "architectures": ["AlbertForMaskedLM"]},
    rename=without(r"decoder\."), copies={"predictions.decoder.bias": "predictions.bias"},
    buffers={"albert.pooler.weight": ((12, 12), "float32"), "albert.pooler.bias": ((12,), "float32"),
             "sop_classifier.classifier.weight": ((2, 12), "float32"),
             "sop_classifier.classifier.bias": ((2,), "float32")}, again_body=True)
publish("albert_texts", "texts", _ALBERT | _POLARITY | {
    "architectures": ["AlbertForSequenceClassification"]}, again=False)

_MODERNBERT = {  # answerdotai/ModernBERT-base
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 31,
    "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean",
    "cls_token_id": 31, "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 32, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 12,
    "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "intermediate_size": 10, "layer_norm_eps": 1e-05,
    "local_attention": 6, "local_rope_theta": 10000.0, "max_position_embeddings": 24, "mlp_bias": False,
    "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 2,
    "num_hidden_layers": 5, "pad_token_id": 33, "position_embedding_type": "absolute", "sep_token_id": 32,
    "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": VOCAB}
publish("modernbert", "encoder", _MODERNBERT, rename=without(r"^decoder\.weight"), again_body=True)
publish("modernbert_texts", "texts", _MODERNBERT | _POLARITY | {
    "architectures": ["ModernBertForSequenceClassification"], "problem_type": "single_label_classification"},
    again=False)
publish("modernbert_tokens", "tokens", _MODERNBERT | _ENTITIES | {
    "architectures": ["ModernBertForTokenClassification"], "classifier_dropout": 0.1}, again=False)
