"""Trains SentencePiece models that can encode every text without loss, and splits texts into the
runs that such models encode."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformer_jax.settings import check_text, check_type

KINDS = ("char", "word", "bpe", "unigram")
PAD, BOS, EOS, UNK, MASK, END_OF_TEXT = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
ROLES = ("system", "user", "assistant")
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)

# SentencePiece writes a space as U+2581, reserves tab, NUL and U+2047 during training, and removes
# line endings. Therefore it never gets these characters: each one becomes a token, or byte tokens,
# of its own.
SPACE = "\u2581"
ISOLATED_PIECES = "\t\n\r\u2047"
ISOLATED = re.compile(f"[\0{SPACE}{ISOLATED_PIECES}]")
_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")  # no piece extends beyond a word
_PIECE_TAG = 1 << 3 | 2  # the tag of field 1 of SentencePiece's ModelProto, which holds one piece
_MAX_CHARS = 4096  # per call: SentencePiece's BPE is slow on long texts, and its trainer refuses longer words
_TRAINING_THREADS = 4  # constant, not the number of cores, because it is written into the model


def train_model(
    texts: Iterable[str], kind: str, vocab_size: int | None, byte_fallback: bool | None, min_frequency: int, chat: bool
) -> bytes:
    """Trains a SentencePiece model. The arguments and errors are those of ``Tokenizer.train``."""
    import sentencepiece

    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer kind {kind!r}; expected one of {', '.join(KINDS)}")
    if vocab_size is None and kind in ("bpe", "unigram"):
        raise ValueError(f"a tokenizer of kind {kind!r} needs a vocab_size, for example vocab_size=1000")
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency} must be positive")
    if min_frequency > 1 and kind != "bpe":
        raise ValueError(f"min_frequency={min_frequency} is for a tokenizer of kind 'bpe', not {kind!r}")
    if byte_fallback is None:
        byte_fallback = kind != "char"
    special_tokens = SPECIAL_TOKENS + ROLE_TOKENS * chat
    sentences, isolated = _training_sentences(texts, special_tokens)
    if not sentences:
        raise ValueError("there is no text to train a tokenizer on")
    smallest = len(special_tokens) + 256 * byte_fallback + len(isolated) + 1
    if vocab_size is not None and vocab_size < smallest:
        raise ValueError(_too_small(vocab_size, smallest))
    size: dict[str, Any] = {"use_all_vocab": True} if vocab_size is None else {"vocab_size": vocab_size}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            byte_fallback=byte_fallback,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            max_sentence_length=4 * _MAX_CHARS,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=UNK,
            control_symbols=list(special_tokens[special_tokens.index(MASK) :]),
            user_defined_symbols=isolated,
            hard_vocab_limit=min_frequency == 1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
            **size,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from error
    if min_frequency > 1:
        return _without_rare_pieces(model.getvalue(), sentences, min_frequency)
    # Only the trainer of characters silently returns a smaller vocabulary.
    largest = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if vocab_size is not None and largest < vocab_size:
        raise ValueError(_too_large(vocab_size, largest))
    return model.getvalue()


def ids_of_roles(special: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Returns the token id of each role, given the ids of the special tokens by name. Raises
    ValueError if there are no role tokens."""
    if ROLE_TOKENS[0] not in special:
        raise ValueError(
            f"this tokenizer has no role tokens ({', '.join(ROLE_TOKENS)}), which conversations need; train the "
            "tokenizer, and the base model with it, with --config.data.tokenizer.chat=true (Tokenizer.train(..., "
            "chat=True))"
        )
    return {role: special[name][0] for role, name in zip(ROLES, ROLE_TOKENS, strict=True)}


def isolated_or_special(special_tokens: Iterable[str]) -> re.Pattern:
    """Returns the pattern of the isolated characters and of the names of special tokens."""
    return re.compile("|".join([ISOLATED.pattern, *map(re.escape, special_tokens)]))


def split_runs(text: str, pattern: re.Pattern) -> Iterator[str]:
    """Splits a text into the matches of a pattern and the runs between them.

    A run has at most 4,096 characters. A longer one is split before the last space that follows a
    non-space, because no token spans that place. If there is no such place, it is split after
    exactly 4,096 characters.

    Args:
      text: The text.
      pattern: The pattern of the parts that are not encoded by the model.

    Yields:
      The parts of the text, in order.

    Raises:
      ValueError: If the text is not a string, or has half a surrogate pair.
    """
    check_text(text)
    start = 0
    for match in pattern.finditer(text):
        yield from _cut(text, start, match.start())
        yield match.group()
        start = match.end()
    yield from _cut(text, start, len(text))


def _cut(text: str, start: int, end: int) -> Iterator[str]:
    """Splits one run of a text into runs of at most ``_MAX_CHARS`` characters."""
    while end - start > _MAX_CHARS:
        cut = text.rfind(" ", start + 1, start + _MAX_CHARS + 1)
        while cut > start and text[cut - 1] == " ":
            cut -= 1
        if cut <= start:
            cut = start + _MAX_CHARS
        yield text[start:cut]
        start = cut
    if start < end:
        yield text[start:end]


def _training_sentences(texts: Iterable[str], special_tokens: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the runs to train on, and the isolated characters that occur and get a token."""
    # The trainer drops names of control tokens in its text. If a name is split in two parts, it is
    # ordinary text.
    rest_of_name = "|".join(["0x[0-9A-F]{2}>", *(re.escape(name[1:]) for name in special_tokens)])
    inside_control_name = re.compile(f"(?<=<)(?={rest_of_name})")
    sentences, isolated = [], set()
    check_type("texts", texts, Iterable, "a list of strings")
    for text in [texts] if isinstance(texts, str) else texts:
        for run in split_runs(text, ISOLATED):
            if ISOLATED.fullmatch(run):
                isolated.add(run)
            else:
                sentences += [part for part in inside_control_name.split(run) if part]
    return sentences, sorted(isolated.intersection(ISOLATED_PIECES))


def _without_rare_pieces(model: bytes, sentences: list[str], min_frequency: int) -> bytes:
    """Removes the learned pieces that occur less often than ``min_frequency`` in the sentences.

    A piece that is merged from a removed piece occurs at most as often, so it is removed too.
    Therefore all remaining pieces can still be built.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    is_learned = {
        piece: len(piece) > 1 and not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
        for i, piece in enumerate(map(processor.id_to_piece, range(processor.vocab_size())))
    }
    longest = max(map(len, is_learned))
    words = Counter(word for text in sentences for word in _WORD.findall(text.replace(" ", SPACE)))
    occurrences = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(start + longest, len(word)) + 1):
                if is_learned.get(word[start:end]):
                    occurrences[word[start:end]] += count
    is_kept = (not learned or occurrences[piece] >= min_frequency for piece, learned in is_learned.items())
    # This code edits the serialized model, because the classes in sentencepiece_model_pb2 need the
    # newest protobuf.
    return b"".join(field for tag, field in _fields(model) if tag != _PIECE_TAG or next(is_kept))


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the tag and the full encoding of each field of a protobuf message. Every field must
    have a length."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        size, position = _varint(message, position)
        position += size
        yield tag, message[start:position]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns the protobuf integer at a position, and the position after it."""
    value = shift = 0
    while message[position] & 0x80:
        value |= (message[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | message[position] << shift, position + 1


def _too_small(vocab_size: int | None, smallest: int) -> str:
    """Returns the error message for a vocabulary that is too small."""
    return f"vocab_size={vocab_size} is too small: characters, bytes and special tokens need at least {smallest}"


def _too_large(vocab_size: int | None, largest: int) -> str:
    """Returns the error message for a vocabulary that is too large."""
    return f"vocab_size={vocab_size} is larger than this text supports: at most {largest}; lower it or give more text"


def _explain(message: str, vocab_size: int | None) -> str:
    """Converts an error message of SentencePiece to one of this library."""
    if found := re.search(r"value <= (\d+)", message):
        return _too_large(vocab_size, int(found[1]))
    if found := re.search(r"\d+ vs (\d+)", message):
        return _too_small(vocab_size, int(found[1]))
    return "SentencePiece could not train on this text: " + message.rpartition("] ")[2]
