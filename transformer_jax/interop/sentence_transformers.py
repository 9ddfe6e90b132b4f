"""Write an encoder so that the library sentence-transformers loads it."""

from __future__ import annotations

import json
import pathlib

from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.files import naming
from transformer_jax.interop.huggingface import to_huggingface
from transformer_jax.settings import require
from transformer_jax.training.bundle import Bundle

_MODES = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def to_sentence_transformers(bundle: Bundle, directory: str | pathlib.Path, *, pooling: str | None = None) -> None:
    """Writes an encoder as a directory that ``SentenceTransformer(directory)`` loads.

    Its vectors are those of ``tj.embed`` with the same pooling.

    Args:
      bundle: an encoder with a tokenizer of Hugging Face, for example one that was loaded with
        ``from_huggingface`` and trained further with the task ``embed``.
      directory: the directory to write, see ``to_huggingface``.
      pooling: ``"mean"``, ``"first"`` or ``"last"``; ``None`` for the pooling of the training, or
        ``"mean"`` if there was none.

    Raises:
      ValueError: if the model is not an encoder, if its tokenizer is not one of Hugging Face (a
        SentencePiece model of this library has no form that transformers reads), or if no family
        can express it.
    """
    if pooling is None:
        pooling = "mean" if bundle.experiment is None else bundle.experiment.contrastive.pooling
    require(pooling in _MODES, f"pooling={pooling!r} is not one of {', '.join(_MODES)}")
    require(bundle.config.family == "encoder",
            f"sentence-transformers needs an encoder, not a model of family {bundle.config.family!r}")
    require(isinstance(bundle.tokenizer, HuggingFaceTokenizer),
            f"sentence-transformers cannot read a tokenizer of type {type(bundle.tokenizer).__name__}; train a model "
            "that was loaded with tj.from_huggingface, or pass a tokenizer of Hugging Face to tj.train")
    require(bundle.config.norm_position == "post",
            f"norm_position={bundle.config.norm_position!r}: transformers normalizes the last layer once more than "
            "tj.embed, so that the vectors would differ; expected 'post'")
    to_huggingface(bundle, directory)
    directory = pathlib.Path(directory)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    _write(directory / "modules.json", [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds)])
    _write(directory / "sentence_bert_config.json", {"max_seq_length": bundle.config.max_len, "do_lower_case": False})
    (directory / "1_Pooling").mkdir(exist_ok=True)
    _write(directory / "1_Pooling" / "config.json", {
        "word_embedding_dimension": bundle.config.model_dim,
        **{mode: name == pooling for name, mode in _MODES.items()}})


def _write(path: pathlib.Path, content: object) -> None:
    """Writes a JSON file."""
    with naming(path):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
