"""Writes ``fixtures/tokenizers``: small vocabularies, directories made of them, and what
transformers reads there.

``python tests/interop/make_tokenizers.py`` needs transformers 5, sentencepiece and tokenizers. The
texts are invented: nothing of a real corpus is in the files. A case of ``cases.json`` is a
directory: which vocabulary has which name in it, and its JSON files. ``expected.json`` holds what
``AutoTokenizer`` reads there, for each text of ``TEXTS``. The directories in ``again`` are what
``save_pretrained`` of transformers 5 wrote of some of the cases.
"""

import json
import os
import pathlib
import shutil
import tempfile

import sentencepiece
import tokenizers
import transformers

HERE = pathlib.Path(__file__).parent / "fixtures" / "tokenizers"
CORPUS = ["The little robot walks over the old bridge. ", "A robot sings, and the bridge sings too!",
          "Größe, naïve café: ça va? don't I'll it's", "日本語 の テキスト 你好 мир", "one  two   three\n\n\tfour",
          "🙂🎉 emoji 1,2 3,4 123", "walking walked walker old older oldest bridges robots",
          "a b c d e f g h i j k l m n o p q r s t u v w x y z",
          "A B C D E 0 1 2 3 4 5 6 7 8 9 . , ; : ! ? ( ) [ ] < > / _ - '"] * 6
TEXTS = ["", " ", "The little robot", "Größe, naïve CAFÉ cafe\u0301", "日本語 の 你好", "🙂 emoji 👩‍👩‍👧 x",
         "one  two   three    ", "   robot\n\nbridge\tx\r\n ", "a </s> b <s>c <unk> <pad>",
         "x<mask> the <mask>y [MASK]", "[CLS] the [SEP]bridge",
         "<extra_id_0> robot <extra_id_11>.", "don't I'll 1,2 3,4 123 ``a'' ﬁ ½ ①",
         "\u2581walks \u2581", "<new> robot<new>old <|endoftext|>x", "en_XX the eng_Latn x >>fra<< y",
         "<mask_1> a <mask_2><unk_7>", "a\u00a0b\u3000c \u200bd", "THE OLD BRIDGE, <pad>"]
# What the normalizer of SentencePiece replaces: a small table in place of NFKC's, of 240 kB.
RULES = {"ﬁ": "fi", "①": "1", "½": "1/2", "\u00a0": " ", "\u3000": " ", "\t": " ", "\n": " ", "\r": " ", "e\u0301": "é",
         "\u200b": ""}


def train(name, **options):
    """A SentencePiece model."""
    options = dict(model_type="unigram", vocab_size=150, hard_vocab_limit=False, minloglevel=2,
                   character_coverage=0.99, user_defined_symbols=[], control_symbols=[]) | options
    if options.pop("rules", True):
        rules = pathlib.Path("rules.tsv")
        rules.write_text("".join(f"{' '.join(f'{ord(c):X}' for c in a)}\t{' '.join(f'{ord(c):X}' for c in b)}\n"
                                 for a, b in RULES.items()))
        options["normalization_rule_tsv"] = str(rules)
    else:
        options["normalization_rule_name"] = "identity"
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_prefix=name, **options)
    pathlib.Path(f"{name}.vocab").unlink()


def train_pairs(name, special, suffix=None, size=330):
    """``vocab.json`` and ``merges.txt`` of byte pair encoding."""
    options = {} if suffix is None else {"end_of_word_suffix": suffix}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **options))
    pathlib.Path(name).mkdir()
    found.model.save(name)


def train_words(name, special):
    """``vocab.txt`` of word pieces."""
    found = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=special[1]))
    found.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    found.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    found.train_from_iterator(CORPUS + [text.lower() for text in CORPUS], tokenizers.trainers.WordPieceTrainer(
        vocab_size=240, special_tokens=special, show_progress=False))
    pathlib.Path(name).mkdir()
    found.model.save(name)


def make_vocabularies():
    """Writes all vocabularies to the current directory."""
    train("t5", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    train("fairseq", unk_id=0, bos_id=1, eos_id=2)
    train("fairseq_pairs", model_type="bpe", unk_id=0, bos_id=1, eos_id=2)
    train("barthez", bos_id=0, pad_id=1, eos_id=2, unk_id=3, user_defined_symbols=["<mask>"])
    train("albert", pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=["[CLS]", "[SEP]"],
          user_defined_symbols=["[MASK]", "(", ")"])
    train("deberta", pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
          unk_piece="[UNK]")
    train("bigbird", pad_id=0, eos_id=1, bos_id=2, unk_id=3, control_symbols=["[CLS]", "[SEP]", "[MASK]"])
    train("xlnet", unk_id=0, bos_id=1, eos_id=2,
          control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"])
    train("rembert", pad_id=0, unk_id=2, bos_id=1, eos_id=-1, control_symbols=["[CLS]", "[SEP]", "[MASK]"])
    plain = dict(model_type="bpe", byte_fallback=True, vocab_size=400, rules=False, remove_extra_whitespaces=False)
    train("llama", unk_id=0, bos_id=1, eos_id=2, **plain)
    train("gemma", pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>", add_dummy_prefix=False,
          user_defined_symbols=["<mask>", "<start_of_turn>", "  ", "\n"], **plain)
    train("target", unk_id=1, bos_id=-1, eos_id=0, vocab_size=120, rules=False)
    train_pairs("gpt2", [END])
    train_pairs("roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    train_pairs("clip", ["<|startoftext|>", END], suffix="</w>")
    train_pairs("gpt", ["<unk>"], suffix="</w>")
    models = [sentencepiece.SentencePieceProcessor(model_file=f"{name}.model") for name in ("fairseq", "target")]
    pieces = [[model.id_to_piece(number) for number in range(model.vocab_size())] for model in models]
    marian = dict.fromkeys(["</s>", "<unk>", ">>fra<<", *pieces[1][2:60], *pieces[0][3:-5], "<pad>"])
    m2m = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *pieces[0][3:]])
    for name, vocabulary in (("marian", marian), ("m2m", m2m)):
        pathlib.Path(f"{name}.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    train_words("bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    train_words("mpnet", ["<s>", "[UNK]", "</s>", "<pad>", "<mask>"])


def added(number, content, special=False, **flags):
    """An entry of ``added_tokens_decoder``."""
    return {str(number): dict(content=content, lstrip=False, rstrip=False, normalized=not special, single_word=False,
                              special=special) | flags}


def case(model_type, files, tokenizer=None, **others):
    """A directory: the type of its model, files by the name of a vocabulary, and further JSON
    files."""
    return {"files": files, "json": {"config": {"model_type": model_type}} | (
        {} if tokenizer is None else {"tokenizer_config": tokenizer}) | others}


END = "<|endoftext|>"
SPIECE, FAIRSEQ, LLAMA = "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"
GPT2 = {"vocab.json": "gpt2/vocab.json", "merges.txt": "gpt2/merges.txt"}
ROBERTA = {"vocab.json": "roberta/vocab.json", "merges.txt": "roberta/merges.txt"}
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": True, "single_word": False}
CASES = {
    "t5": case("t5", {SPIECE: "t5.model"}),
    "t5-as-published": case("t5", {SPIECE: "t5.model"}, {"tokenizer_class": "T5Tokenizer", "extra_ids": 12,
                            "additional_special_tokens": [f"<extra_id_{i}>" for i in range(12)]},
                            special_tokens_map={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "t5-added": case("t5", {SPIECE: "t5.model"}, {"extra_ids": 0, "tokenizer_class": "T5Tokenizer"},
                     added_tokens={"<new>": 140, "robots": 141},
                     special_tokens_map={"additional_special_tokens": ["<new>"]}),
    "pegasus": case("pegasus", {SPIECE: "t5.model"}, {"model_max_length": 512}),
    "pegasus-as-published": case("pegasus", {SPIECE: "t5.model"},
                                 {"tokenizer_class": "PegasusTokenizer", "offset": 9, "mask_token_sent": None},
                                 special_tokens_map={"mask_token": "<mask>", "eos_token": "</s>"}),
    "xlm-roberta": case("xlm-roberta", {FAIRSEQ: "fairseq.model"}),
    "xlm-roberta-published": case("xlm-roberta", {FAIRSEQ: "fairseq.model"}, {"mask_token": {"__type": "AddedToken"} |
                                  MASK, "tokenizer_class": "XLMRobertaTokenizer"}),
    "mbart": case("mbart", {FAIRSEQ: "fairseq.model"}, {"src_lang": "ro_RO", "tgt_lang": "en_XX"}),
    "mbart-plain": case("mbart", {FAIRSEQ: "fairseq.model"}),
    "mbart50": case("mbart", {FAIRSEQ: "fairseq.model"}, {"tokenizer_class": "MBart50Tokenizer", "src_lang": "fr_XX"},
                    special_tokens_map={"mask_token": MASK, "cls_token": "<s>"}),
    "nllb": case("m2m_100", {FAIRSEQ: "fairseq_pairs.model"}, {
        "tokenizer_class": "NllbTokenizer", "src_lang": "fra_Latn",
        "additional_special_tokens": ["eng_Latn", "fra_Latn", "deu_Latn"]}),
    "nllb-legacy": case("m2m_100", {FAIRSEQ: "fairseq_pairs.model"}, {
        "tokenizer_class": "NllbTokenizer", "legacy_behaviour": True}),
    "camembert": case("camembert", {FAIRSEQ: "fairseq.model"}),
    "camembert-no-prefix": case("camembert", {FAIRSEQ: "fairseq.model"}, {"add_prefix_space": False}),
    "barthez": case("mbart", {FAIRSEQ: "barthez.model"}, {"tokenizer_class": "BarthezTokenizer"}),
    "albert": case("albert", {SPIECE: "albert.model"}),
    "albert-cased": case("albert", {SPIECE: "albert.model"}, {"do_lower_case": False, "keep_accents": True}),
    "deberta-v2": case("deberta-v2", {"spm.model": "deberta.model"}, {"do_lower_case": True}),
    "deberta-v2-punctuation": case("deberta-v2", {"spm.model": "deberta.model"}, {"split_by_punct": True},
                                   added_tokens={"[MASK]": 150}),
    "big_bird": case("big_bird", {SPIECE: "bigbird.model"}),
    "xlnet": case("xlnet", {SPIECE: "xlnet.model"}, {"do_lower_case": True}),
    "rembert": case("rembert", {"sentencepiece.model": "rembert.model"}),
    "reformer": case("reformer", {SPIECE: "fairseq_pairs.model"}),
    "llama": case("llama", {LLAMA: "llama.model"}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True,
                                                    "add_eos_token": False}),
    "llama-legacy": case("llama", {LLAMA: "llama.model"}, {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": True,
        "pad_token": "<pad>", "added_tokens_decoder": added(0, "<unk>", True) | added(1, "<s>", True) | added(
            2, "</s>", True) | added(400, "<new>")}),
    "llama-no-class": case("llama", {LLAMA: "llama.model"}),
    "llama-no-prefix": case("llama", {LLAMA: "llama.model"}, {"tokenizer_class": "LlamaTokenizerFast",
                                                              "add_prefix_space": False}),
    "mistral": case("mistral", {LLAMA: "llama.model"}, {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True,
        "added_tokens_decoder": added(1, "<s>", True) | added(9, "<new>", True)}),
    "gemma": case("gemma", {LLAMA: "gemma.model"}, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}),
    "own-unigram": case("pegasus_x", {LLAMA: "t5.model"}, {"add_eos_token": True}),
    "gpt2": case("gpt2", GPT2),
    "gpt2-prefix": case("gpt2", GPT2, {"add_prefix_space": True, "pad_token": "<pad>", "add_bos_token": True,
                                       "tokenizer_class": "GPT2Tokenizer"}),
    "gpt2-added": case("gpt2", GPT2, added_tokens={"<new>": 330},
                       special_tokens_map={"additional_special_tokens": ["<new>"], "unk_token": "<|endoftext|>"}),
    "opt": case("opt", ROBERTA, {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>",
                                 "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}),
    "roberta": case("roberta", ROBERTA),
    "roberta-prefix": case("roberta", ROBERTA, {"add_prefix_space": True, "trim_offsets": False,
                                                "mask_token": {"__type": "AddedToken"} | MASK}),
    "bart": case("bart", ROBERTA, {"tokenizer_class": "BartTokenizer"}, special_tokens_map={"mask_token": MASK}),
    "blenderbot": case("blenderbot", ROBERTA),
    "deberta": case("deberta", ROBERTA, {"tokenizer_class": "DebertaTokenizer"}),
    "qwen2": case("qwen2", GPT2, {
        "tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_start|>"], "pad_token": END,
        "added_tokens_decoder": added(330, "<|im_start|>", True) | added(331, "<|im_end|>", True) | added(332, "<new>"),
        "eos_token": "<|im_end|>"}),
    "qwen3": case("qwen3", GPT2),
    "gpt_neox": case("gpt_neox", GPT2, {"add_bos_token": True}),
    "cohere": case("cohere", GPT2, {"add_bos_token": True}),
    "clip": case("clip", {"vocab.json": "clip/vocab.json", "merges.txt": "clip/merges.txt"}),
    "openai-gpt": case("openai-gpt", {"vocab.json": "gpt/vocab.json", "merges.txt": "gpt/merges.txt"}),
    "bert": case("bert", {"vocab.txt": "bert/vocab.txt"}),
    "bert-cased": case("bert", {"vocab.txt": "bert/vocab.txt"}, {
        "do_lower_case": False, "tokenize_chinese_chars": False, "tokenizer_class": "BertTokenizerFast",
        "additional_special_tokens": ["<new>"]}),
    "distilbert": case("distilbert", {"vocab.txt": "bert/vocab.txt"}, {
        "tokenizer_class": "DistilBertTokenizer", "strip_accents": False, "clean_up_tokenization_spaces": True}),
    "electra": case("electra", {"vocab.txt": "bert/vocab.txt"}, {"do_lower_case": True}),
    "mpnet": case("mpnet", {"vocab.txt": "mpnet/vocab.txt"}),
    "m2m_100": case("m2m_100", {FAIRSEQ: "fairseq.model", "vocab.json": "m2m.json"},
                    {"src_lang": "fr", "tgt_lang": "en", "tokenizer_class": "M2M100Tokenizer"}),
    "marian": case("marian", {"source.spm": "fairseq.model", "target.spm": "target.model", "vocab.json": "marian.json"},
                   {"source_lang": "en", "target_lang": "ro"}),
    "marian-many": case("marian", {"source.spm": "fairseq.model", "target.spm": "target.model",
                                   "vocab.json": "marian.json"},
                        {"source_lang": "en", "target_lang": "mul", "tokenizer_class": "MarianTokenizer"},
                        special_tokens_map={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
}
# The same directory, saved again by transformers 5 with its tokenizer.json.
SAVED_AGAIN = ("t5-as-published", "pegasus-as-published", "xlm-roberta", "mbart", "mbart50", "nllb", "camembert",
               "barthez", "albert", "deberta-v2", "big_bird", "xlnet", "rembert", "reformer", "llama", "llama-legacy",
               "mistral", "gemma", "gpt2-added", "roberta-prefix", "qwen2", "clip", "bert-cased", "distilbert", "mpnet",
               "marian")


def write(entry, directory):
    """Writes the directory of one test case."""
    directory.mkdir()
    for name, source in entry["files"].items():
        shutil.copy(source, directory / name)
    for name, content in entry["json"].items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def expected(directory):
    """What transformers reads in a directory."""
    found = transformers.AutoTokenizer.from_pretrained(directory)
    rows = []
    for text in TEXTS:
        ids = found(text).input_ids
        rows.append({"ids": ids, "bare": found(text, add_special_tokens=False).input_ids,
                     "decoded": found.decode(ids, skip_special_tokens=True), "whole": found.decode(ids)})
        if found.is_fast:
            rows[-1]["offsets"] = sum(found(text, return_offsets_mapping=True).offset_mapping, ())
        else:
            rows[-1]["target"] = found(text_target=text).input_ids
    roles = {role: getattr(found, f"{role}_token_id") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    return found, {"class": type(found).__name__, "length": len(found), "roles": roles, "rows": rows}


def again(name, found):
    """What ``save_pretrained`` writes of a case, without the vocabulary that the case has."""
    target = HERE / "again" / name
    found.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(CASES[name]["json"]["config"]))
    for path in target.iterdir():
        if path.suffix in (".model", ".spm"):
            path.unlink()
        elif path.name == "tokenizer.json":
            path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))
    for file, source in CASES[name]["files"].items():
        if file.endswith(".spm"):
            shutil.copy(source, target / file)


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    os.chdir(HERE)
    make_vocabularies()
    pathlib.Path("rules.tsv").unlink()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, entry in CASES.items():
            directory = pathlib.Path(place) / name
            write(entry, directory)
            tokenizer, found[name] = expected(directory)
            if name in SAVED_AGAIN:
                again(name, tokenizer)
                recorded = expected(HERE / "again" / name)[1]
                found[f"{name} again"] = name if recorded == found[name] else recorded
    versions = {module.__name__: module.__version__ for module in (transformers, tokenizers, sentencepiece)}
    for name, content in (("cases", CASES), ("texts", TEXTS), ("expected", {"versions": versions, "cases": found})):
        pathlib.Path(f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
