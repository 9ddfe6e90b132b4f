"""Small models with their tokenizers in Hugging Face directories, for tests that use both
together."""

import functools

import jax

import transformer_jax as tj
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
from transformer_jax.models.functional import make_model
from transformer_jax.training.bundle import Bundle

TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "cats and dogs, running there"]
_ENCODER = tj.presets.get("bert-base").replace(max_len=16, num_layers=2, num_heads=2, model_dim=8, init_std=0.7)
_PAIR = tj.ModelConfig(
    family="encoder_decoder", vocab_size=17, max_len=32, num_layers=2, num_heads=2, model_dim=8, init_std=0.7,
    norm_position="post", activation="gelu", use_output_bias=True)


def _word_pieces():
    import tokenizers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=names, show_progress=False))
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer, dict(zip(("pad", "unk", "cls", "sep", "mask"), names, strict=True))


def _byte_pairs():
    import tokenizers

    names = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=names, show_progress=False))
    tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer, {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}


def _pieces():
    import tokenizers

    names = ["<pad>", "</s>", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.UnigramTrainer(
        vocab_size=50, special_tokens=names, unk_token="<unk>", show_progress=False))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}


KINDS = {
    "bert": (_word_pieces, _ENCODER, "BertTokenizerFast"),
    "roberta": (_byte_pairs, _ENCODER.replace(position_offset=2, num_token_types=1), "RobertaTokenizerFast"),
    "bart": (_byte_pairs, _PAIR.replace(positions="learned", position_offset=2, use_embedding_norm=True,
                                        start_ids=(2, 0)), "PreTrainedTokenizerFast"),
    "marian": (_pieces, _PAIR.replace(positions="sinusoidal_halves", start_ids=(0,), banned_ids=(0,)),
               "PreTrainedTokenizerFast"),
    "t5": (_pieces, _PAIR.replace(
        positions="relative", attention_scale=1.0, norm="rmsnorm", norm_position="pre", use_bias=False,
        use_output_bias=False, tie_embeddings=False, activation="geglu", start_ids=(0,), norm_epsilon=1e-6),
        "PreTrainedTokenizerFast"),
    "gpt2": (_byte_pairs, tj.presets.get("gpt2-small").replace(max_len=64, num_layers=2, num_heads=2, model_dim=8,
                                                               init_std=0.7), "PreTrainedTokenizerFast"),
}


@functools.cache
def imported(kind, tmp):
    """A directory of files, and the bundle that was loaded from it."""
    make_tokenizer, config, name = KINDS[kind]
    tokenizer, special = make_tokenizer()
    settings = {f"{role}_token": token for role, token in special.items()} | {"tokenizer_class": name}
    tokenizer = HuggingFaceTokenizer.make(tokenizer.to_str(), settings, {})
    config = config.replace(vocab_size=tokenizer.vocab_size)
    directory = f"{tmp}/{kind}"
    to_huggingface(Bundle(make_model(config, key=jax.random.key(0)), tokenizer, config), directory)
    return directory, from_huggingface(directory)
