"""Descriptions of the tokenizer classes of transformers: one row of a table for each class.

A class of transformers 5 reads from the files the vocabulary (and merges), the precompiled
character map of a SentencePiece model, and the settings of ``tokenizer_config.json``. The code of
the class defines the rest: how to normalise and split a text, which ids to move to make room for
special tokens, and which special tokens to put around a text. The rows here describe the same, and
a test compares the ids.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"


@dataclasses.dataclass
class Given:
    """The content of the files that a class builds its tokenizer from.

    Attributes:
      vocab: for unigram models, pieces with scores in the order of their ids; else ids by piece.
      merges: the merges of byte pair encoding.
      settings: the settings of the files, and the defaults of the class for all others.
    """

    vocab: Any
    merges: list[tuple[str, str]]
    settings: dict[str, Any]

    def name(self, role: str) -> str:
        """Returns the text of a special token, or of a setting that names a token."""
        return str(self.settings.get(f"{role}_token", self.settings.get(role)))


# Makes the post-processor that puts special tokens around a text. Its second argument is a function
# from the name of a token to its id.
Frame = Callable[[Given, Callable[[str], int]], Any]


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """The description of one tokenizer class.

    Attributes:
      files: the names of the vocabulary files, all of which must exist.
      special: the default special tokens by role, if the files do not name them.
      build: a function that makes the tokenizer without its special tokens.
      model: the form of the vocabulary that ``build`` expects: "unigram", "bpe" or "wordpiece";
        ``None`` for the form in the SentencePiece model.
      settings: the defaults of further settings, if the files leave them out.
      rearrange: a function that moves the pieces of a SentencePiece model to the ids of the class.
      prepare: a function that first changes the settings, such as additional special tokens.
      added: the flags of special tokens that differ from the usual ones, by role.
      frame: makes the post-processor that puts special tokens around a text. If it is ``None``,
        ``tokenizer.json`` defines them, or else ``add_bos_token`` and ``add_eos_token``.
      frame_first: whether ``tokenizer.json``, ``add_bos_token`` and ``add_eos_token`` override
        ``frame`` if they are given.
      flags_last: whether ``add_bos_token`` and ``add_eos_token`` override ``tokenizer.json``.
      adds_named: whether to add each special token again at the end, as a "token" or as "special".
        With "special", ``add_bos_token`` and ``add_eos_token`` override ``frame`` if they are given
        or if ``tokenizer.json`` defines no tokens around a text.
    """

    files: tuple[str, ...]
    special: Mapping[str, str | None]
    build: Callable[[Given], tokenizers.Tokenizer]
    model: str | None = "unigram"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rearrange: Callable[[Any, Mapping[str, Any]], Any] = lambda vocab, settings: vocab
    prepare: Callable[[dict[str, Any]], None] = lambda settings: None
    added: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    frame: Frame | None = None
    frame_first: bool = False
    flags_last: bool = False
    adds_named: str | None = None


def _ids(given: Given, roles: Iterable[str], unnamed: Mapping[str, int],
         token_id: Callable[[str], int]) -> dict[str, int]:
    """Returns the ids of special tokens by role. If the files declare that a token does not exist,
    its id comes from ``unnamed``."""
    ids = {}
    for role in roles:
        is_named = given.settings.get(f"{role}_token", given.settings.get(role)) is not None
        if not is_named and role not in unnamed:
            raise ValueError(f"{role}_token is null, but the class puts this token around a text: name the token")
        ids[role] = token_id(given.name(role)) if is_named else unnamed[role]
    return ids


def template(single: str, pair: str, **unnamed: int) -> Frame:
    """Makes a frame from templates for a text and for a pair; ``{role}`` stands for a special
    token.

    ``unnamed`` gives the ids of the roles for which the files may declare that no token exists.
    """

    def make(given: Given, token_id: Callable[[str], int]) -> Any:
        from tokenizers import processors

        ids = _ids(given, dict.fromkeys(re.findall(r"{(\w+)}", single + pair)), unnamed, token_id)
        names = {role: given.name(role) for role in ids}
        return processors.TemplateProcessing(
            single=[part.format(**names) for part in single.split(" ")],
            pair=[part.format(**names) for part in pair.split(" ")],
            special_tokens=[(names[role], number) for role, number in ids.items()])

    return make


def roberta_frame(end: str, start: str, trim_offsets: bool | None = None, **unnamed: int) -> Frame:
    """Makes the frame of RoBERTa with the special tokens of two roles.

    ``trim_offsets`` is whether the offsets of a token exclude the white space around it. If it is
    ``None``, the settings define it and ``add_prefix_space``. ``unnamed`` is as in ``template``.
    """

    def make(given: Given, token_id: Callable[[str], int]) -> Any:
        from tokenizers import processors

        trim, prefix = ((given.settings["trim_offsets"], given.settings["add_prefix_space"]) if trim_offsets is None
                        else (trim_offsets, False))
        ids = _ids(given, (end, start), unnamed, token_id)
        return processors.RobertaProcessing((given.name(end), ids[end]), (given.name(start), ids[start]), trim, prefix)

    return make


def parts(model: Any, normalizers: list[Any], pre: list[Any], decoder: Any) -> tokenizers.Tokenizer:
    """Makes a tokenizer from its model, normalizers, pre-tokenizers and decoder."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    if normalizers:
        tokenizer.normalizer = tokenizers.normalizers.Sequence(normalizers)
    if pre:
        tokenizer.pre_tokenizer = pre[0] if len(pre) == 1 else tokenizers.pre_tokenizers.Sequence(pre)
    tokenizer.decoder = decoder
    return tokenizer


def charsmap(given: Given) -> list[Any]:
    """Returns the normalizer with the precompiled character map, if there is one."""
    import tokenizers

    table = given.settings.get("_spm_precompiled_charsmap")
    return [tokenizers.normalizers.Precompiled(table)] if table else []


def replace(pattern: str, text: str, regex: bool = True) -> Any:
    """Returns a normalizer that replaces a pattern."""
    import tokenizers

    return tokenizers.normalizers.Replace(tokenizers.Regex(pattern) if regex else pattern, text)


def unigrams(given: Given, unknown: int, normalizers: list[Any], words: bool = True, scheme: str | None = None,
              before: list[Any] | None = None) -> tokenizers.Tokenizer:
    """Makes a unigram tokenizer whose pieces begin with a mark for the space.

    Args:
      given: the content of the files.
      unknown: the id of the unknown token.
      normalizers: the normalizers of the text.
      words: whether to split the text at white space first, so that each run counts as one space.
      scheme: the ``prepend_scheme`` of Metaspace; ``None`` to derive it from ``add_prefix_space``.
      before: pre-tokenizers that split the text first.
    """
    from tokenizers import decoders, models, pre_tokenizers

    if scheme is None:
        scheme = "always" if given.settings["add_prefix_space"] else "never"
    pre = [*(before or []), *([pre_tokenizers.WhitespaceSplit()] if words else []),
           pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True)]
    return parts(models.Unigram(given.vocab, unk_id=unknown, byte_fallback=False), normalizers, pre,
                  decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True))


def place(given: Given, name: str, default: int, start: int = 0) -> int:
    """Returns the id of a piece, or ``default`` if it does not exist."""
    return next((place for place, (piece, _) in enumerate(given.vocab) if piece == name and place >= start), default)


def scored(given: Given, role: str, default: int) -> int:
    """Returns the id of a special token with score 0, or ``default`` if it does not exist."""
    wanted = (given.name(role), 0.0)
    return given.vocab.index(wanted) if wanted in given.vocab else default


def pegasus(given: Given) -> tokenizers.Tokenizer:
    """Makes the tokenizer of Pegasus."""
    table = charsmap(given)
    unknown = place(given, given.name("unk"), -1, start=1)
    if unknown < 0:
        raise ValueError(f"the vocabulary has no piece {given.name('unk')!r}")
    return unigrams(given, unknown, [*(table or [replace(r"\n", " ")]), replace(r" {2,}", " ")], words=False,
                     scheme="always")


def quotes_and_accents(given: Given, keep_accents: bool) -> list[Any]:
    """Returns the normalizers of ALBERT, XLNet and RemBERT; the first two unify quotation marks."""
    from tokenizers import normalizers

    accents = [] if keep_accents else [normalizers.NFKD(), normalizers.StripAccents()]
    lower = [normalizers.Lowercase()] if given.settings.get("do_lower_case") else []
    return [replace("``", '"', regex=False), replace("''", '"', regex=False), *accents, *lower, *charsmap(given)]


def rembert(given: Given) -> tokenizers.Tokenizer:
    """Makes the tokenizer of RemBERT."""
    steps = quotes_and_accents(given, given.settings["keep_accents"])
    return unigrams(given, 2, [*steps[:2], replace(r" {2,}", " "), *steps[2:]], words=False)


def squeezed() -> list[Any]:
    """Returns normalizers that reduce runs of white space to one space."""
    from tokenizers import normalizers

    return [replace(r"\s{2,}|[\n\r\t]", " "), normalizers.NFC(), normalizers.Strip(left=False, right=True)]


def deberta_v2(given: Given) -> tokenizers.Tokenizer:
    """Makes the tokenizer of DeBERTa v2."""
    from tokenizers import normalizers, pre_tokenizers

    lower = [normalizers.Lowercase()] if given.settings["do_lower_case"] else []
    punctuation = [pre_tokenizers.Punctuation(behavior="isolated")] if given.settings["split_by_punct"] else []
    return unigrams(given, scored(given, "unk", given.settings["unk_id"]), [*lower, *squeezed()], words=False,
                     scheme="always" if given.settings["add_prefix_space"] else "first", before=punctuation)


def big_bird(given: Given) -> tokenizers.Tokenizer:
    """Makes the tokenizer of BigBird."""
    from tokenizers import normalizers

    return unigrams(given, scored(given, "unk", 100),
                     [normalizers.Strip(left=False, right=False), replace(r" {2,}", SPACE)], words=False)


def marked_pairs(given: Given, normalizers: list[Any]) -> tokenizers.Tokenizer:
    """Makes a byte pair encoding tokenizer whose pieces begin with a mark for the space."""
    from tokenizers import decoders, models, pre_tokenizers

    model = models.BPE(vocab=given.vocab, merges=given.merges, unk_token=given.name("unk"), fuse_unk=True,
                       byte_fallback=False)
    return parts(model, normalizers, [pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")],
                  decoders.Metaspace(replacement=SPACE, prepend_scheme="always"))


def llama(given: Given) -> tokenizers.Tokenizer:
    """Makes the tokenizer of Llama."""
    from tokenizers import decoders, models, pre_tokenizers

    prefix = given.settings.get("add_prefix_space") is not False
    scheme = ("always" if given.settings["legacy"] else "first") if prefix else "never"
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return parts(models.BPE(vocab=given.vocab, merges=given.merges, fuse_unk=True, byte_fallback=True), [],
                  [pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)],
                  decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps))


def gemma(given: Given) -> tokenizers.Tokenizer:
    """Makes the tokenizer of Gemma."""
    from tokenizers import decoders, models, pre_tokenizers

    model = models.BPE(vocab=given.vocab, merges=given.merges, fuse_unk=True, unk_token=given.name("unk"),
                       byte_fallback=True)
    return parts(model, [replace(" ", SPACE, regex=False)],
                  [pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")],
                  decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]))


def byte_level(given: Given, normalizers: list[Any], before: list[Any], use_regex: bool = True,
                prefix: bool | None = None, **model: Any) -> tokenizers.Tokenizer:
    """Makes a byte-level byte pair encoding tokenizer, as in GPT-2."""
    from tokenizers import decoders, models, pre_tokenizers

    prefix = bool(given.settings.get("add_prefix_space")) if prefix is None else prefix
    pairs = models.BPE(vocab=given.vocab, merges=given.merges, **(
        {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False} | model))
    return parts(pairs, normalizers, [*before, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)],
                  decoders.ByteLevel())
