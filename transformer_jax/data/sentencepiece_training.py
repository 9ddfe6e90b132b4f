"""Training SentencePiece models that lose nothing, and the runs in which such models are given
text."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

KINDS = ("char", "word", "bpe", "unigram")
PAD, BOS, EOS, UNK, MASK, END_OF_TEXT = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
ROLES = ("system", "user", "assistant")
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)

# SentencePiece writes a space as U+2581, reserves tab, NUL and U+2047 while training, and strips
# line ends. These characters are therefore cut out of the text before it sees them: each is a token
# (or bytes) of its own.
SPACE = "\u2581"
ISOLATED_PIECES = "\t\n\r\u2047"
ISOLATED = re.compile(f"[\0{SPACE}{ISOLATED_PIECES}]")
_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")  # what no piece goes beyond
_PIECE_TAG = 1 << 3 | 2  # field 1 of SentencePiece's ModelProto, with a length: one of the pieces, in order
_MAX_CHARS = 4096  # per call into SentencePiece: its BPE slows down with length, its trainer refuses longer words
_TRAINING_THREADS = 4  # a constant and not the machine's number of cores: it is written into the model


def train_model(
    texts: Iterable[str], kind: str, vocab_size: int | None, byte_fallback: bool | None, min_frequency: int, chat: bool
) -> bytes:
    """Trains a SentencePiece model; arguments and errors are those of `Tokenizer.train`."""
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
    # The character trainer alone takes what there is and says nothing.
    largest = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if vocab_size is not None and largest < vocab_size:
        raise ValueError(_too_large(vocab_size, largest))
    return model.getvalue()


def isolated_or_special(special_tokens: Iterable[str]) -> re.Pattern:
    """Returns the pattern of what is cut out of a text in which names of special tokens stand for
    these tokens."""
    return re.compile("|".join([ISOLATED.pattern, *map(re.escape, special_tokens)]))


def split_runs(text: str, pattern: re.Pattern) -> Iterator[str]:
    """Yields the matches of `pattern` and, in runs of at most 4,096 characters, what lies between
    them.

    A longer stretch is cut before the last space that follows a non-space, where no token straddles
    the cut; only a stretch without such a place is cut at exactly 4,096.
    """
    text.encode()  # half a surrogate pair is refused here, in Python's words
    start = 0
    for match in pattern.finditer(text):
        yield from _cut(text, start, match.start())
        yield match.group()
        start = match.end()
    yield from _cut(text, start, len(text))


def _cut(text: str, start: int, end: int) -> Iterator[str]:
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
    """Returns the runs to train on and those isolated characters that occur and get a token."""
    # The trainer drops names of control tokens that it meets in its text; cut in two, they are text
    # like any other.
    rest_of_name = "|".join(["0x[0-9A-F]{2}>", *(re.escape(name[1:]) for name in special_tokens)])
    inside_control_name = re.compile(f"(?<=<)(?={rest_of_name})")
    sentences, isolated = [], set()
    for text in texts:
        for run in split_runs(text, ISOLATED):
            if ISOLATED.fullmatch(run):
                isolated.add(run)
            else:
                sentences += [part for part in inside_control_name.split(run) if part]
    return sentences, sorted(isolated.intersection(ISOLATED_PIECES))


def _without_rare_pieces(model: bytes, sentences: list[str], min_frequency: int) -> bytes:
    """Drops the learned pieces that occur in fewer places of the sentences.

    What is merged from a dropped piece occurs at most as often and goes with it: all that stay can
    still be built.
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
    # The serialised model is edited itself: the classes in sentencepiece_model_pb2 refuse all but
    # the newest protobuf.
    return b"".join(field for tag, field in _fields(model) if tag != _PIECE_TAG or next(is_kept))


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the tags and the whole encodings of a protobuf message's fields, all of which have a
    length."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        size, position = _varint(message, position)
        position += size
        yield tag, message[start:position]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns the protobuf integer at a position, and where it ends."""
    value = shift = 0
    while message[position] & 0x80:
        value |= (message[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | message[position] << shift, position + 1


def _too_small(vocab_size: int | None, smallest: int) -> str:
    return f"vocab_size={vocab_size} is too small: characters, bytes and special tokens need at least {smallest}"


def _too_large(vocab_size: int | None, largest: int) -> str:
    return f"vocab_size={vocab_size} is larger than this text supports: at most {largest}; lower it or give more text"


def _explain(message: str, vocab_size: int | None) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return _too_large(vocab_size, int(found[1]))
    if found := re.search(r"\d+ vs (\d+)", message):
        return _too_small(vocab_size, int(found[1]))
    return "SentencePiece could not train on this text: " + message.rpartition("] ")[2]
