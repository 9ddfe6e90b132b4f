"""Training SentencePiece models that lose nothing, and the runs in which such models are given text."""

import io
import re
from collections.abc import Iterable, Iterator

KINDS = ("char", "word", "bpe", "unigram")
PAD, BOS, EOS, UNK, MASK, END_OF_TEXT = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<|endoftext|>")

# SentencePiece writes a space as U+2581, reserves tab, NUL and U+2047 while training, and strips line ends.
# These characters are therefore cut out of the text before it sees them: each is a token (or bytes) of its own.
SPACE = "\u2581"
ISOLATED_PIECES = "\t\n\r\u2047"
ISOLATED = re.compile(f"[\0{SPACE}{ISOLATED_PIECES}]")
ISOLATED_OR_SPECIAL = re.compile("|".join([ISOLATED.pattern, *map(re.escape, SPECIAL_TOKENS)]))
# The trainer drops names of control tokens that it meets in its text; cut in two, they are text like any other.
_INSIDE_CONTROL_NAME = re.compile(
    "(?<=<)(?=0x[0-9A-F]{2}>|" + "|".join(re.escape(name[1:]) for name in SPECIAL_TOKENS) + ")"
)
_MAX_CHARS = 4096  # per call into SentencePiece: its BPE slows down with length, its trainer refuses longer words
_TRAINING_THREADS = 4  # a constant and not the machine's number of cores: it is written into the model


def train_model(texts: Iterable[str], kind: str, vocab_size: int | None, byte_fallback: bool | None) -> bytes:
    """Trains a SentencePiece model; arguments and errors are those of `Tokenizer.train`."""
    import sentencepiece

    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer kind {kind!r}; expected one of {', '.join(KINDS)}")
    if vocab_size is None and kind in ("bpe", "unigram"):
        raise ValueError(f"a tokenizer of kind {kind!r} needs a vocab_size, for example vocab_size=1000")
    if byte_fallback is None:
        byte_fallback = kind != "char"
    sentences, isolated = _training_sentences(texts)
    if not sentences:
        raise ValueError("there is no text to train a tokenizer on")
    smallest = len(SPECIAL_TOKENS) + 256 * byte_fallback + len(isolated) + 1
    if vocab_size is not None and vocab_size < smallest:
        raise ValueError(_too_small(vocab_size, smallest))
    size = {"use_all_vocab": True} if vocab_size is None else {"vocab_size": vocab_size}
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
            control_symbols=[MASK, END_OF_TEXT],
            user_defined_symbols=isolated,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
            **size,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from error
    # The character trainer alone takes what there is and says nothing.
    largest = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if vocab_size is not None and largest < vocab_size:
        raise ValueError(_too_large(vocab_size, largest))
    return model.getvalue()


def split_runs(text: str, pattern: re.Pattern) -> Iterator[str]:
    """Yields the matches of `pattern` and, in runs of at most 4,096 characters, what lies between them.

    A longer stretch is cut before the last space that follows a non-space, where no token straddles the cut; only a
    stretch without such a place is cut at exactly 4,096.
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


def _training_sentences(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the runs to train on and those isolated characters that occur and get a token."""
    sentences, isolated = [], set()
    for text in texts:
        for run in split_runs(text, ISOLATED):
            if ISOLATED.fullmatch(run):
                isolated.add(run)
            else:
                sentences += [part for part in _INSIDE_CONTROL_NAME.split(run) if part]
    return sentences, sorted(isolated.intersection(ISOLATED_PIECES))


def _too_small(vocab_size: int, smallest: int) -> str:
    return f"vocab_size={vocab_size} is too small: characters, bytes and special tokens need at least {smallest}"


def _too_large(vocab_size: int, largest: int) -> str:
    return f"vocab_size={vocab_size} is larger than this text supports: at most {largest}; lower it or give more text"


def _explain(message: str, vocab_size: int | None) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return _too_large(vocab_size, int(found[1]))
    if found := re.search(r"\d+ vs (\d+)", message):
        return _too_small(vocab_size, int(found[1]))
    return "SentencePiece could not train on this text: " + message.rpartition("] ")[2]
