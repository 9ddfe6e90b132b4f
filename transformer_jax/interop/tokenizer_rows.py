"""The rows of the table of tokenizer classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformer_jax.interop.language_codes import MBART, MBART50, NLLB
from transformer_jax.interop.tokenizer_classes import (
    Given,
    TokenizerClass,
    big_bird,
    byte_level,
    charsmap,
    deberta_v2,
    gemma,
    llama,
    marked_pairs,
    parts,
    pegasus,
    place,
    quotes_and_accents,
    rembert,
    replace,
    roberta_frame,
    squeezed,
    template,
    unigrams,
)

if TYPE_CHECKING:
    import tokenizers

_SPIECE, _BPE_MODEL, _PAIRS = ("spiece.model",), ("sentencepiece.bpe.model",), ("vocab.json", "merges.txt")
_CLS_SEP = ("{cls}:0 $A:0 {sep}:0", "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1")
_BOS_EOS = template("{bos} $A {eos}", "{bos} $A {eos} {eos} $B {eos}")
_ROBERTA = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
_ALBERT = {"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "sep": "[SEP]", "pad": "<pad>", "cls": "[CLS]",
           "mask": "[MASK]"}
_BRACKETS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_END = "<|endoftext|>"
_PREFIX = {"add_prefix_space": True}
_LEFT = {"mask": {"lstrip": True}}
_QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
         r"\s+")
_CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Settings = dict[str, Any]


def _fairseq(first: str = "bos", further: tuple[str, ...] = ()) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Orders pieces as fairseq does: four special tokens, the other pieces, ``further`` ones."""

    def rearrange(vocab: Any, settings: Mapping[str, Any]) -> Any:
        start = [str(settings.get(f"{role}_token", _ROBERTA[role])) for role in (first, "pad", "eos", "unk")]
        end = [*further, str(settings.get("mask_token", "<mask>"))]
        return [*((name, 0.0) for name in start), *vocab[3:], *((name, 0.0) for name in end)]

    return rearrange


def _nllb_ids(vocab: Any, settings: Mapping[str, Any]) -> dict[str, int]:
    """Puts four special tokens before the pieces of an NLLB model and numbers all of them."""
    start = [str(settings.get(f"{role}_token", _ROBERTA[role])) for role in ("bos", "pad", "eos", "unk")]
    return {piece: number for number, piece in enumerate(dict.fromkeys([*start, *vocab]))}


def _camembert_ids(vocab: Any, settings: Mapping[str, Any]) -> Any:
    """Adds the unused tokens that CamemBERT's ids start with, and the mask token at the end."""
    pad, unknown, mask = (str(settings.get(f"{role}_token", _ROBERTA[role])) for role in ("pad", "unk", "mask"))
    return [("<s>NOTUSED", 0.0), (pad, 0.0), ("</s>NOTUSED", 0.0), (unknown, 0.0), ("<unk>NOTUSED", -100.0),
            *vocab[1:], (mask, 0.0)]


def _pegasus_ids(vocab: Any, settings: Mapping[str, Any]) -> Any:
    """Adds padding, the end token, the masks and unknown tokens before the pieces of Pegasus."""
    pad, end = (str(settings.get(f"{role}_token", _ROBERTA[role])) for role in ("pad", "eos"))
    # transformers uses these defaults here, but different ones for the names of the tokens.
    masks = [str(settings.get(name, default)) for name, default in (("mask_token", "<mask_1>"),
                                                                    ("mask_token_sent", "<mask_2>"))]
    names = [pad, end, *dict.fromkeys(mask for mask in masks if mask != "None")]
    return [*((name, 0.0) for name in names),
            *((f"<unk_{number}>", -100.0) for number in range(2, settings.get("offset", 103))), *vocab[2:]]


def _t5_ids(vocab: Any, settings: Mapping[str, Any]) -> Any:
    """Adds T5's sentinels after the pieces, the one with the highest number first."""
    return [*vocab, *((f"<extra_id_{number}>", 0.0) for number in reversed(range(settings.get("extra_ids", 100))))]


def _t5_extra(settings: Settings) -> None:
    """Adds the sentinels to the additional special tokens."""
    extra_ids, given = settings["extra_ids"], settings.get("additional_special_tokens")
    sentinels = [f"<extra_id_{number}>" for number in range(extra_ids)]
    named = [token for token in given or [] if "<extra_id_" in str(token)]
    if named and extra_ids > 0 and extra_ids != len(named):
        raise ValueError(f"extra_ids={extra_ids}, but {len(named)} of additional_special_tokens are sentinels; "
                         "expected equal numbers")
    settings["additional_special_tokens"] = given if named else [*(given or []), *sentinels]


def _pegasus_extra(settings: Settings) -> None:
    """Sets the mask of a sentence and the unknown tokens as additional special tokens."""
    given, sentence = settings.get("additional_special_tokens"), settings["mask_token_sent"]
    start = [sentence] if sentence is not None and (given is None or sentence not in given) else []
    settings["additional_special_tokens"] = [*start, *(f"<unk_{number}>" for number in range(2, settings["offset"]))]


def _mbart_extra(settings: Settings) -> None:
    """Adds the language codes of mBART before the special tokens of the files."""
    given = settings.get("additional_special_tokens") or []
    settings["additional_special_tokens"] = [*MBART, *(token for token in given if token not in MBART)]
    settings["lang"] = settings.get("src_lang") or "en_XX"


def _mbart50_extra(settings: Settings) -> None:
    """Adds the language codes of mBART-50 after the special tokens of the files."""
    settings["additional_special_tokens"] = [*(settings.get("additional_special_tokens") or []), *MBART, *MBART50]
    settings["lang"] = settings.get("src_lang") or "en_XX"


def _nllb_extra(settings: Settings) -> None:
    """Sets the language codes of NLLB, unless the files name other special tokens."""
    given = settings.get("extra_special_tokens")
    given = settings.get("additional_special_tokens") if given is None else given
    settings["extra_special_tokens"] = list(NLLB) if given is None else given
    settings["lang"] = settings.get("src_lang") or "eng_Latn"


def _nllb_frame(given: Given, token_id: Callable[[str], int]) -> Any:
    """Puts the language code before a text, or in older models after its end token."""
    single = "$A {eos} {lang}" if given.settings["legacy_behaviour"] else "{lang} $A {eos}"
    return template(single, single.replace("$A", "$A $B"))(given, token_id)


def _or_else(*tokens: str) -> Callable[[Settings], None]:
    """Sets the additional special tokens if the files have none."""

    def prepare(settings: Settings) -> None:
        if settings.get("additional_special_tokens") is None:
            settings["additional_special_tokens"] = list(tokens)

    return prepare


def _barthez(given: Given) -> tokenizers.Tokenizer:
    return unigrams(given, 3, squeezed(), words=False)


def _xlnet(given: Given) -> tokenizers.Tokenizer:
    return unigrams(given, given.settings["unk_id"], quotes_and_accents(given, keep_accents=False), scheme="always")


def _reformer(given: Given) -> tokenizers.Tokenizer:
    table = charsmap(given)
    return marked_pairs(given, [*table, replace(r" {2,}", " ")] if table else [])


def _qwen2(given: Given) -> tokenizers.Tokenizer:
    from tokenizers import Regex, normalizers, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated", invert=False)
    return byte_level(given, [normalizers.NFC()], [split], use_regex=False)


def _gpt_neox(given: Given) -> tokenizers.Tokenizer:
    from tokenizers import normalizers

    return byte_level(given, [normalizers.NFC()], [])


def _cohere(given: Given) -> tokenizers.Tokenizer:
    from tokenizers import normalizers, pre_tokenizers

    return byte_level(given, [normalizers.NFC()], [pre_tokenizers.Digits(individual_digits=True)])


def _clip(given: Given) -> tokenizers.Tokenizer:
    from tokenizers import Regex, normalizers, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_CLIP), behavior="removed", invert=True)
    return byte_level(given, [normalizers.NFC(), replace(r"\s+", " "), normalizers.Lowercase()], [split], prefix=False,
                      unk_token=given.name("unk"), end_of_word_suffix="</w>")


def _openai(given: Given) -> tokenizers.Tokenizer:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    model = models.BPE(vocab=given.vocab, merges=given.merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                       fuse_unk=False, unk_token=given.name("unk"))
    return parts(model, [normalizers.BertNormalizer(lowercase=True)], [pre_tokenizers.BertPreTokenizer()],
                 decoders.BPEDecoder(suffix="</w>"))


def _bert(given: Given) -> tokenizers.Tokenizer:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    settings = given.settings
    normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"], lowercase=settings["do_lower_case"])
    return parts(models.WordPiece(given.vocab, unk_token=given.name("unk")), [normalizer],
                 [pre_tokenizers.BertPreTokenizer()], decoders.WordPiece(prefix="##"))


_BERT_SETTINGS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
_EOS = template("$A {eos}", "$A {eos} $B {eos}")

CLASSES: dict[str, TokenizerClass] = {
    "T5Tokenizer": TokenizerClass(
        _SPIECE, {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}, lambda given: unigrams(
            given, 2, charsmap(given), scheme="always"),
        settings={"extra_ids": 100}, rearrange=_t5_ids, prepare=_t5_extra, frame=_EOS),
    "PegasusTokenizer": TokenizerClass(
        _SPIECE, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask_2>"}, pegasus,
        settings={"mask_token_sent": "<mask_1>", "offset": 103}, rearrange=_pegasus_ids, prepare=_pegasus_extra,
        frame=template("$A {eos}", "$A $B {eos}")),
    "XLMRobertaTokenizer": TokenizerClass(
        _BPE_MODEL, _ROBERTA, lambda given: unigrams(given, 3, charsmap(given)), settings=_PREFIX,
        rearrange=_fairseq(), frame=_BOS_EOS),
    "MBartTokenizer": TokenizerClass(
        _BPE_MODEL, _ROBERTA, lambda given: unigrams(given, 3, [], scheme="always"),
        rearrange=_fairseq(further=tuple(MBART)), prepare=_mbart_extra, added=_LEFT,
        frame=template("$A {eos} {lang}", "$A $B {eos} {lang}")),
    "MBart50Tokenizer": TokenizerClass(
        _BPE_MODEL, {role: name for role, name in _ROBERTA.items() if role != "bos"}, lambda given: unigrams(
            given, 3, [*charsmap(given), replace(r" {2,}", " ")], words=False, scheme="always"),
        rearrange=_fairseq("cls", (*MBART, *MBART50)), prepare=_mbart50_extra, added=_LEFT,
        frame=template("{lang} $A {eos}", "{lang} $A $B {eos}")),
    "NllbTokenizer": TokenizerClass(
        _BPE_MODEL, _ROBERTA, _reformer, model="bpe", settings={"legacy_behaviour": False}, rearrange=_nllb_ids,
        prepare=_nllb_extra, added={"mask": {"lstrip": True, "normalized": True, "special": True}}, frame=_nllb_frame),
    "CamembertTokenizer": TokenizerClass(
        _BPE_MODEL, _ROBERTA, lambda given: unigrams(
            given, place(given, given.name("unk"), 0), charsmap(given)), model=None, settings=_PREFIX,
        rearrange=_camembert_ids, prepare=_or_else("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"),
        added={"mask": {"lstrip": True, "special": True}}, frame=_BOS_EOS),
    "BarthezTokenizer": TokenizerClass(_BPE_MODEL, _ROBERTA, _barthez, model=None, settings=_PREFIX, added=_LEFT),
    "AlbertTokenizer": TokenizerClass(
        _SPIECE, _ALBERT, lambda given: unigrams(
            given, 1, quotes_and_accents(given, given.settings["keep_accents"])),
        settings=_PREFIX | {"do_lower_case": True, "keep_accents": False}, frame=template(*_CLS_SEP), frame_first=True),
    "DebertaV2Tokenizer": TokenizerClass(
        ("spm.model",), _BRACKETS | {"bos": "[CLS]", "eos": "[SEP]"}, deberta_v2,
        settings=_PREFIX | {"do_lower_case": False, "split_by_punct": False, "unk_id": 1},
        frame=template(*_CLS_SEP, cls=0, sep=0)),
    "BigBirdTokenizer": TokenizerClass(
        _SPIECE, {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>", "sep": "[SEP]", "mask": "[MASK]",
                  "cls": "[CLS]"}, big_bird, settings=_PREFIX, frame=template(*_CLS_SEP),
        added={role: {} for role in ("bos", "eos", "unk", "pad", "cls", "sep")} | _LEFT),
    "XLNetTokenizer": TokenizerClass(
        _SPIECE, {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "<sep>", "pad": "<pad>", "cls": "<cls>",
                  "mask": "<mask>"}, _xlnet, settings={"unk_id": 0, "do_lower_case": False},
        prepare=_or_else("<eop>", "<eod>"), added=_LEFT,
        frame=template("$A:0 {sep}:0 {cls}:2", "$A:0 {sep}:0 $B:1 {sep}:1 {cls}:2")),
    "RemBertTokenizer": TokenizerClass(
        ("sentencepiece.model",), _ALBERT, rembert,
        settings=_PREFIX | {"do_lower_case": False, "keep_accents": True}, frame=template(*_CLS_SEP),
        adds_named="special"),
    "ReformerTokenizer": TokenizerClass(
        _SPIECE, {"eos": "</s>", "unk": "<unk>"}, _reformer, model="bpe", prepare=_or_else(), adds_named="special"),
    "LlamaTokenizer": TokenizerClass(
        ("tokenizer.model",), {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, llama, model="bpe",
        settings={"legacy": False}),
    "GemmaTokenizer": TokenizerClass(
        ("tokenizer.model",), {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "mask": "<mask>"}, gemma,
        model="bpe"),
    "GPT2Tokenizer": TokenizerClass(
        _PAIRS, {"unk": _END, "bos": _END, "eos": _END, "pad": None}, lambda given: byte_level(given, [], []),
        model="bpe"),
    "RobertaTokenizer": TokenizerClass(
        _PAIRS, _ROBERTA, lambda given: byte_level(given, [], []), model="bpe",
        settings={"add_prefix_space": False, "trim_offsets": True}, frame=roberta_frame("sep", "cls")),
    "BlenderbotTokenizer": TokenizerClass(
        _PAIRS, _ROBERTA, lambda given: byte_level(given, [], []), model="bpe", settings=_PREFIX,
        added={"mask": {"lstrip": True, "normalized": False}}),
    "DebertaTokenizer": TokenizerClass(
        _PAIRS, _BRACKETS | {"bos": "[CLS]", "eos": "[SEP]"}, lambda given: byte_level(given, [], []), model="bpe",
        frame=template("{cls} $A {sep}", "{cls} $A {sep} {sep} $B {sep}")),
    "Qwen2Tokenizer": TokenizerClass(
        _PAIRS, {"unk": _END, "bos": None, "eos": _END, "pad": _END}, _qwen2, model="bpe", adds_named="token"),
    "CLIPTokenizer": TokenizerClass(
        _PAIRS, {"unk": _END, "bos": "<|startoftext|>", "eos": _END, "pad": _END}, _clip, model="bpe",
        frame=roberta_frame("eos", "bos", trim_offsets=False)),
    "GPTNeoXTokenizer": TokenizerClass(
        _PAIRS, {"unk": _END, "bos": _END, "eos": _END, "pad": "<|padding|>"}, _gpt_neox, model="bpe",
        flags_last=True),
    "CohereTokenizer": TokenizerClass(
        _PAIRS, {"unk": "<UNK>", "bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>", "cls": "<CLS>",
                 "sep": "<SEP>", "mask": "<MASK_TOKEN>"}, _cohere, model="bpe", adds_named="special"),
    "OpenAIGPTTokenizer": TokenizerClass(_PAIRS, {"unk": "<unk>"}, _openai, model="bpe"),
    "BertTokenizer": TokenizerClass(
        ("vocab.txt",), _BRACKETS, _bert, model="wordpiece", settings=_BERT_SETTINGS,
        frame=template(*_CLS_SEP, cls=2, sep=3)),
    "MPNetTokenizer": TokenizerClass(
        ("vocab.txt",), {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "[UNK]", "pad": "<pad>",
                         "mask": "<mask>"}, _bert, model="wordpiece", settings=_BERT_SETTINGS,
        added={role: {} for role in ("bos", "eos", "sep", "cls", "unk", "pad")} | _LEFT,
        frame=roberta_frame("sep", "cls", trim_offsets=True, cls=0, sep=2)),
}
