"""What is done with a model and its tokenizer together works on a directory of transformers', and as there."""

import functools

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
from transformer_jax.models.functional import make_model
from transformer_jax.training.bundle import Bundle

tokenizers = pytest.importorskip("tokenizers", reason="the extra `hf` is not installed")
pytest.importorskip("safetensors", reason="the extra `hf` is not installed")

TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "cats and dogs, running there"]
_ENCODER = tj.presets.get("bert-base").replace(max_len=16, num_layers=2, num_heads=2, model_dim=8, init_std=0.7)
_PAIR = tj.ModelConfig(
    family="encoder_decoder", vocab_size=17, max_len=32, num_layers=2, num_heads=2, model_dim=8, init_std=0.7,
    norm_position="post", activation="gelu", use_output_bias=True)


def _word_pieces():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=names, show_progress=False))
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer, dict(zip(("pad", "unk", "cls", "sep", "mask"), names, strict=True))


def _byte_pairs():
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=names, show_progress=False))
    tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer, {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}


def _pieces():
    names = ["<pad>", "</s>", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.UnigramTrainer(
        vocab_size=50, special_tokens=names, unk_token="<unk>", show_progress=False))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}


KINDS = {
    "bert": (_word_pieces, _ENCODER, "BertTokenizerFast"),
    "roberta": (_byte_pairs, _ENCODER.replace(position_offset=2, num_token_types=1), "RobertaTokenizerFast"),
    "bart": (_byte_pairs, _PAIR.replace(positions="learned", position_offset=2, use_embedding_norm=True,
                                        start_ids=(2, 0)), "PreTrainedTokenizerFast"),
    "marian": (_pieces, _PAIR.replace(positions="sinusoidal_halves", start_ids=(0,), banned_ids=(0,)),
               "PreTrainedTokenizerFast"),
    "t5": (_pieces, _PAIR.replace(
        positions="relative", attention_scale=1.0, norm="rmsnorm", norm_position="pre", use_bias=False,
        use_output_bias=False, tie_embeddings=False, activation="geglu", start_ids=(0,), norm_epsilon=1e-6),
        "PreTrainedTokenizerFast"),
}


@functools.cache
def imported(kind, tmp):
    """A directory of files, and the bundle that was loaded from it."""
    make_tokenizer, config, name = KINDS[kind]
    tokenizer, special = make_tokenizer()
    settings = {f"{role}_token": token for role, token in special.items()} | {"tokenizer_class": name}
    tokenizer = HuggingFaceTokenizer.make(tokenizer.to_str(), settings, {})
    config = config.replace(vocab_size=tokenizer.vocab_size)
    directory = f"{tmp}/{kind}"
    to_huggingface(Bundle(make_model(config, key=jax.random.key(0)), tokenizer, config), directory)
    return directory, from_huggingface(directory)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return str(tmp_path_factory.mktemp("imported"))


@pytest.mark.parametrize(("kind", "text"), [
    ("bert", "The cat [MASK] on [MASK] mat."), ("roberta", "the <mask> sat<mask>")])
def test_fill_mask_and_embed(kind, text, tmp):
    directory, bundle = imported(kind, tmp)
    found = tj.fill_mask(bundle.model, text, tokenizer=bundle.tokenizer, top_k=4)[0]
    assert len(found) == 2 and all(len(candidates) == 4 for candidates in found)
    vectors = tj.embed(bundle.model, TEXTS, tokenizer=bundle.tokenizer, pooling="none")
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(text, return_tensors="pt")
    places = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
    with torch.no_grad():
        probabilities = theirs(**encoded).logits[0, places].softmax(-1)
        wanted = torch.topk(probabilities, 4)
        for candidates, values, ids in zip(found, *wanted, strict=True):
            assert [candidate.token_id for candidate in candidates] == ids.tolist()
            np.testing.assert_allclose([candidate.probability for candidate in candidates], values, rtol=1e-4)
        for text, vector in zip(TEXTS, vectors, strict=True):
            hidden = theirs.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            np.testing.assert_allclose(vector, hidden, atol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "marian", "t5"])
def test_translations(kind, tmp):
    directory, bundle = imported(kind, tmp)
    found = tj.beam_search(bundle.model, TEXTS, tokenizer=bundle.tokenizer, beam_size=3, length_penalty=0.0,
                           max_new_tokens=12)
    greedy = tj.generate(bundle.model, TEXTS, tokenizer=bundle.tokenizer, sampling=tj.Sampling(temperature=0),
                         max_new_tokens=12)
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    theirs.generation_config.forced_eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    settings = dict(attention_mask=encoded["attention_mask"], do_sample=False, length_penalty=0.0,
                    max_new_tokens=11 + len(bundle.config.start_ids))
    with torch.no_grad():
        for ours, options in ((found.texts, dict(num_beams=3, early_stopping="never")), (greedy.texts, {})):
            wanted = theirs.generate(encoded["input_ids"], **settings, **options)
            assert ours == tokenizer.batch_decode(wanted, skip_special_tokens=True)
    assert len(set(greedy.texts)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_a_text(kind, tmp):
    _, bundle = imported(kind, tmp)
    seen = tj.inspect_text(bundle, TEXTS[0])
    pair = bundle.config.family == "encoder_decoder"
    maps = np.asarray(seen.attention("encoder" if pair else "self"))
    ids = bundle.tokenizer.encode_source(TEXTS[0])
    assert maps.shape == (2, 2, len(ids), len(ids))
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-5)
    if pair:
        assert seen.ids[:len(bundle.config.start_ids)].tolist() == list(bundle.config.start_ids)
        assert seen.attention("cross").shape[2:] == (len(seen.ids), len(ids))
