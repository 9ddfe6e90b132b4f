"""SentencePiece model files of Llama and T5 as ``tokenizer.json``: the form in which transformers
runs them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"


def tokenizer_json(data: bytes, settings: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    """The text of a ``tokenizer.json``, and the ids of special tokens by role.

    Byte pair encoding becomes a tokenizer as Llama's, which puts ``<s>`` before a text; unigrams
    one as T5's, which puts ``</s>`` after it; ``add_bos_token`` and ``add_eos_token`` of the
    settings say otherwise.

    Args:
      data: the SentencePiece model.
      settings: those of ``tokenizer_config.json``.

    Raises:
      ValueError: for what is no SentencePiece model, or one of characters or words.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # of protobuf, which is not imported for its name alone
        raise ValueError(f"not a SentencePiece model ({len(data)} bytes)") from error
    spec, pieces = proto.trainer_spec, [piece.piece for piece in proto.pieces]
    kinds = [piece.type for piece in proto.pieces]
    if spec.model_type not in (_UNIGRAM, _BPE) or _UNKNOWN not in kinds:
        raise ValueError("this SentencePiece model is of characters or words; expected byte pair encoding or unigrams")
    unknown = kinds.index(_UNKNOWN)
    prefix = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
    if spec.model_type == _BPE:
        ids = {piece: place for place, piece in enumerate(pieces)}
        found = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=_merges(ids), unk_token=pieces[unknown],
                                                fuse_unk=True, byte_fallback=_BYTE in kinds))
        found.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=prefix, split=False)
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        found.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix == "first" else steps)
    else:
        found = tokenizers.Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces],
                                                    unk_id=unknown, byte_fallback=_BYTE in kinds))
        metaspace = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
        found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        found.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    if proto.normalizer_spec.precompiled_charsmap:
        found.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    found.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True)
                              for piece, kind in zip(pieces, kinds, strict=True) if kind in (_UNKNOWN, _CONTROL)])
    found.add_tokens([tokenizers.AddedToken(piece, normalized=False, special=False)
                      for piece, kind in zip(pieces, kinds, strict=True) if kind == _USER])
    roles = {"bos": spec.bos_id, "eos": spec.eos_id, "pad": spec.pad_id, "unk": unknown}
    roles = {role: place for role, place in roles.items() if 0 <= place < len(pieces)}
    around = {role: [pieces[roles[role]]] if role in roles and settings.get(f"add_{role}_token", default) else []
              for role, default in (("bos", spec.model_type == _BPE), ("eos", spec.model_type == _UNIGRAM))}
    found.post_processor = processors.TemplateProcessing(
        single=[*around["bos"], "$A", *around["eos"]],
        special_tokens=[(name, found.token_to_id(name)) for name in (*around["bos"], *around["eos"])])
    return found.to_str(), roles


def _merges(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, in the order in which SentencePiece prefers the pieces: by
    their ids."""
    ways = [(ids[piece], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
            for piece in ids for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids]
    return [(left, right) for *_, left, right in sorted(ways)]
