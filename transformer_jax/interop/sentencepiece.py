"""Convert SentencePiece model files to tokenizers of the ``tokenizers`` library."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from transformer_jax.interop.tokenizer_classes import SPACE

_NORMAL, _CONTROL, _USER = 1, 3, 4
_UNIGRAM = 1


def read_proto(path: pathlib.Path) -> Any:
    """Reads a SentencePiece model file and returns its protobuf message.

    Raises:
      ValueError: if the file is not a SentencePiece model.
    """
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # protobuf creates its classes at import, so the type is Any
    proto, data = messages.ModelProto(), path.read_bytes()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, without an import of protobuf
        raise ValueError(f"{path} is not a SentencePiece model ({len(data)} bytes)") from error
    if not proto.pieces:
        raise ValueError(f"{path} is a SentencePiece model without pieces")
    return proto


def extracted(proto: Any, model: str | None) -> tuple[Any, list[tuple[str, str]], dict[str, Any]]:
    """Returns the vocabulary, the merges, and the tokenizer settings in a model file.

    Args:
      proto: the protobuf message of the file.
      model: the form of the vocabulary: "unigram" (pieces with scores) or "bpe" (ids by piece, with
        merges); ``None`` for the form in which the model was trained.
    """
    from tokenizers import AddedToken

    if (model or ("unigram" if proto.trainer_spec.model_type == _UNIGRAM else "bpe")) == "unigram":
        vocab, merges = [(piece.piece, piece.score) for piece in proto.pieces], []
    else:
        vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        merges = _merges(vocab)
    added = [AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL) for piece in proto.pieces
             if piece.type in (_CONTROL, _USER)]
    settings = {"additional_special_tokens": added,
                "_spm_precompiled_charsmap": proto.normalizer_spec.precompiled_charsmap or None}
    return vocab, merges, settings | ({"unk_id": proto.trainer_spec.unk_id} if isinstance(vocab, list) else {})


def _merges(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Returns every pair of pieces that forms a piece, in the order of the formed piece's id."""
    ways = [(ids[piece], cut, piece[:cut], piece[cut:]) for piece in ids for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids]
    return [(left, right) for *_, left, right in sorted(ways)]


def as_written(proto: Any, settings: dict[str, Any]) -> Any:
    """Makes the tokenizer that a SentencePiece model file describes, for models without a tokenizer
    class.

    Args:
      proto: the protobuf message of the file.
      settings: the settings of ``tokenizer_config.json``. The function adds the special tokens that
        the model file names.
    """
    from tokenizers import AddedToken

    vocab, _, brought = extracted(proto, None)
    settings.update(brought)
    added = settings.get("added_tokens_decoder") or {}
    if isinstance(vocab, dict) and added:
        # A name in added_tokens_decoder replaces the piece with the same id.
        names = {number: str(token) for number, token in added.items()}
        kept = {piece for piece, number in vocab.items() if number not in names}
        vocab = {names[number] if names.get(number, piece) not in kept and number in names else piece: number
                 for piece, number in vocab.items()}
    user_defined = {piece.piece for piece in proto.pieces if piece.type == _USER}
    settings["additional_special_tokens"] = [token for token in settings["additional_special_tokens"]
                                             if str(token) not in user_defined]
    if proto.normalizer_spec.add_dummy_prefix:
        settings["added_tokens_decoder"] = {
            number: AddedToken(token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                               normalized=False, special=token.special) for number, token in added.items()}
    spec = proto.trainer_spec
    for role, number, name in (("bos", spec.bos_id, spec.bos_piece), ("eos", spec.eos_id, spec.eos_piece),
                               ("unk", spec.unk_id, spec.unk_piece)):
        if number >= 0:
            settings.setdefault(f"{role}_token", name)
    return _own_tokenizer(proto, vocab, bool(settings.get("legacy", True)))


def _own_tokenizer(proto: Any, vocab: Any, legacy: bool) -> Any:
    """Builds the tokenizer from the normalizer and trainer settings of a model file."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    pieces = list(proto.pieces)
    spec, names = proto.normalizer_spec, _names(vocab)
    user_defined = [names[number] for number, piece in enumerate(pieces) if piece.type == _USER and number in names]
    if isinstance(vocab, dict):
        model = models.BPE(vocab=vocab, merges=_scored_merges(pieces, names), unk_token=proto.trainer_spec.unk_piece,
                           fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback,
                           ignore_merges=bool(user_defined))
    else:
        model = models.Unigram(vocab, unk_id=proto.trainer_spec.unk_id,
                               byte_fallback=proto.trainer_spec.byte_fallback)
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix and legacy:
        # SentencePiece adds a space mark even to a text that begins with one; Metaspace does not.
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    tokenizer.normalizer = normalizers.Sequence(steps)
    splits = []
    if spec.add_dummy_prefix:
        splits.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always" if legacy else "first",
                                               split=False))
    if user_defined:
        pattern = "|".join(re.escape(piece) for piece in sorted(user_defined, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    back: list[Any] = [decoders.Replace(SPACE, " ")]
    back += [decoders.ByteFallback()] if proto.trainer_spec.byte_fallback else []
    if spec.add_dummy_prefix:
        back += [decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    elif proto.trainer_spec.byte_fallback:
        back.append(decoders.Fuse())
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _names(vocab: Any) -> dict[int, str]:
    """Returns the pieces by id."""
    if isinstance(vocab, dict):
        return {number: piece for piece, number in vocab.items()}
    return {number: piece for number, (piece, _) in enumerate(vocab)}


def _scored_merges(pieces: list[Any], names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Returns every pair of normal pieces that forms a normal piece, best score first."""
    normal = {names[number]: (piece.score, number) for number, piece in enumerate(pieces)
              if piece.type == _NORMAL and number in names}
    ways = [(-score, number, piece[:cut], piece[cut:]) for piece, (score, number) in normal.items()
            for cut in range(1, len(piece)) if piece[:cut] in normal and piece[cut:] in normal]
    return [(left, right) for *_, left, right in sorted(ways)]
