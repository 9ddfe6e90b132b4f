"""Small models of transformers with random weights, in directories that ``save_pretrained``
wrote."""

import pytest

torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")

VOCAB = 61
_ENCODER = dict(vocab_size=VOCAB, hidden_size=20, num_hidden_layers=3, num_attention_heads=5, intermediate_size=28,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_PAIR = dict(vocab_size=VOCAB, d_model=20, encoder_layers=3, decoder_layers=2, encoder_attention_heads=5, dropout=0.0,
             decoder_attention_heads=5, encoder_ffn_dim=28, decoder_ffn_dim=28, max_position_embeddings=256)
_T5 = dict(vocab_size=VOCAB, d_model=20, d_kv=6, d_ff=28, num_layers=3, num_decoder_layers=2, num_heads=3,
           relative_attention_num_buckets=8, relative_attention_max_distance=21, dropout_rate=0.0,
           decoder_start_token_id=0)
_MODERNBERT = dict(
    vocab_size=VOCAB, hidden_size=20, num_hidden_layers=5, num_attention_heads=5, intermediate_size=28,
    max_position_embeddings=40, local_attention=5, embedding_dropout=0.0, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, cls_token_id=1, sep_token_id=2)
# Class and config; and the tokens that pad and that end a text.
KINDS = {
    "bert": ("BertForMaskedLM", "BertConfig", dict(**_ENCODER, max_position_embeddings=40), 0, None),
    "bert-untied": ("BertForMaskedLM", "BertConfig",
                    dict(**_ENCODER, max_position_embeddings=40, tie_word_embeddings=False), 0, None),
    "bert-gelu_new": ("BertForMaskedLM", "BertConfig",
                      dict(**_ENCODER, max_position_embeddings=40, hidden_act="gelu_new"), 0, None),
    "roberta-relu": ("RobertaForMaskedLM", "RobertaConfig",
                     dict(**_ENCODER, max_position_embeddings=42, type_vocab_size=1, hidden_act="relu"), 1, None),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig",
                dict(**_ENCODER, max_position_embeddings=42, type_vocab_size=1), 1, None),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", _MODERNBERT, 0, None),
    "modernbert-biases": ("ModernBertForMaskedLM", "ModernBertConfig",
                          dict(**_MODERNBERT, norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True,
                               hidden_activation="silu", classifier_activation="relu", global_attn_every_n_layers=2),
                          0, None),
    "bart": ("BartForConditionalGeneration", "BartConfig", _PAIR, 1, 2),
    "bart-scaled": ("BartForConditionalGeneration", "BartConfig", dict(**_PAIR, scale_embedding=True), 1, 2),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig",
              dict(**_PAIR, scale_embedding=True, decoder_start_token_id=2), 1, 2),
    "marian": ("MarianMTModel", "MarianConfig",
               dict(**_PAIR, activation_function="swish", scale_embedding=True, pad_token_id=60, eos_token_id=0,
                    decoder_start_token_id=60, forced_eos_token_id=None), 60, 0),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig",
                dict(**_PAIR, scale_embedding=True, activation_function="relu"), 0, 1),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, 0, 1),
    "t5-1.1": ("T5ForConditionalGeneration", "T5Config",
               dict(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False), 0, 1),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5, 0, 1),
    "m2m100": ("M2M100ForConditionalGeneration", "M2M100Config", _PAIR, 1, 2),
}


def make(kind, seed=0, std=0.2, turned=False):
    """A model in evaluation mode whose weights are all random, those of norms around 1.

    The last norm is around -1, and values that are the same for all tokens are small, so that texts
    do not repeat one token.
    """
    name, config, settings, _, end = KINDS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings, attn_implementation="eager"))
    if kind in ("t5-1.1", "mt5"):  # transformers 5 makes it tied, whatever the config says
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 20))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sinusoids = kind in ("marian", "pegasus") and "embed_positions" in name
            if not sinusoids:
                weight.normal_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, std)
        if turned:
            model.model.decoder.layers[-1].final_layer_norm.weight.mul_(-1.0)
            for name, weight in model.named_parameters():
                weight.mul_(0.1 if name.endswith("bias") or "attn.out_proj" in name else 1.0)
                if "decoder.embed_positions" in name and kind == "bart":
                    weight.mul_(5.0)
        if kind == "bert-untied":  # the bias of the unembedding counts, not this one, which was the same before 5
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0.0, 0.01 if turned else std)
    if end is not None:
        generation = model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.forced_eos_token_id = end, KINDS[kind][3], None
        generation.forced_bos_token_id = {"bart": 0, "mbart": 5, "m2m100": 7}.get(kind)
        generation.bad_words_ids = [[60]] if kind == "marian" else None
    return model.eval()
