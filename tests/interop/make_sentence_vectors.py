"""Makes ``fixtures/sentence_vectors.npz``: the vectors that sentence-transformers computes with our
exports.

Run it where sentence-transformers is installed: ``python tests/interop/make_sentence_vectors.py``.
"""

import pathlib
import tempfile

import jax
import numpy as np

import transformer_jax as tj
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.models.functional import make_model

VECTORS = pathlib.Path(__file__).parent / "fixtures" / "sentence_vectors.npz"
POOLINGS = ("mean", "first", "last")
TEXTS = ["The cat sat.", "a dog, and a cat", "dogs"]
_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "sat", "and", "##s", ",", "."]


def bundle():
    """A small BERT with fixed weights, and a tokenizer of word pieces."""
    import tokenizers

    vocabulary = {piece: number for number, piece in enumerate(_VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(_VOCABULARY[:5])
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    settings = {f"{name[1:-1].lower()}_token": name for name in _VOCABULARY[:5]} | {
        "tokenizer_class": "BertTokenizerFast"}
    config = tj.presets.get("bert-base").replace(vocab_size=len(_VOCABULARY), max_len=16, num_layers=2, num_heads=2,
                                                 model_dim=12)
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    rng = np.random.RandomState(0)
    model = jax.tree.map(lambda leaf: jax.numpy.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    return tj.Bundle(model, HuggingFaceTokenizer.make(tokenizer.to_str(), settings, {}), config)


def theirs(directory):
    """The vectors that sentence-transformers computes with a directory."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu").encode(TEXTS)


def main():
    found = {}
    for pooling in POOLINGS:
        with tempfile.TemporaryDirectory() as directory:
            tj.interop.to_sentence_transformers(bundle(), directory, pooling=pooling)
            found[pooling] = theirs(directory)
    np.savez_compressed(VECTORS, **found)
    print({name: value.shape for name, value in found.items()}, VECTORS.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
