"""A small masked model learns who is full and who is empty, reads it at the nouns, and needs some
of its heads for it; what the program reads and refuses."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import transformer_jax as tj
from experiments import agreement_study as study
from transformer_jax.data import agreement_contrasts, agreement_corpus, generate_agreement
from transformer_jax.tasks import language_model, translation

POUR = "Verteu água da jarra para o copo até que ele ficasse <mask>"


@pytest.fixture(scope="module")
def untrained():
    """An encoder and a decoder with the word tokenizer, not trained."""
    texts, _ = agreement_corpus(2_000, 10, 0)
    tokenizer = tj.Tokenizer.train(texts, kind="word")
    bundles = {}
    for family in ("encoder", "decoder"):
        config = tj.ModelConfig(family=family, vocab_size=tokenizer.vocab_size, max_len=24, num_layers=1, num_heads=2,
                                model_dim=16)
        make = tj.Encoder if family == "encoder" else tj.Decoder
        model = jax.jit(lambda key, make=make, config=config: make(config, key=key))(jax.random.key(0))
        bundles[family] = tj.Bundle(model=model, tokenizer=tokenizer, config=config)
    return bundles


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_questions_are_what_the_model_reads(untrained, family):
    bundle = untrained[family]
    sentences = [one for one in generate_agreement(60, 0) if one.is_last]
    groups, left_out = study.ask(bundle, sentences)
    assert left_out == 0 and sum(map(len, groups)) == len(sentences)
    tokenizer = bundle.tokenizer
    for questions in groups:
        for sentence, row, choices in zip(questions.sentences, questions.tokens_BT, questions.choices_BC, strict=True):
            given = [piece.strip() for piece in tokenizer.pieces(row.tolist())]
            words = [piece.strip() for piece in tokenizer.pieces(choices.tolist())]
            assert words[0] == sentence.answer and set(words[1:]) == set(sentence.alternatives)
            if family == "decoder":
                assert " ".join(given) == sentence.prefix and questions.position == len(row) - 1
            else:
                assert given == ["<s>", *sentence.masked().split(" "), "</s>"]
                assert given[questions.position] == "<mask>"
    # The same choice as a float64 computation from the logits of one sentence at a time.
    questions = groups[0]
    found = study.chosen(bundle, questions)
    for number in range(3):
        logits_V = np.asarray(tj.forward(bundle.model, questions.tokens_BT[number:number + 1]), np.float64)[
            0, questions.position]
        choices = questions.choices_BC[number]
        assert found[number].tolist() == [logits_V.argmax() == choices[0],
                                          all(logits_V[choices[0]] > logits_V[other] for other in choices[1:])]


def test_words_of_several_tokens_are_left_out(untrained):
    sentences = [dataclasses.replace(one, alternatives=("desconhecido",)) for one in generate_agreement(5, 0)]
    assert study.ask(untrained["encoder"], sentences) == ([], 5)
    assert np.isnan(study.accuracy(untrained["encoder"], [])).all()


def test_patching_the_whole_difference_of_a_first_layer_brings_all_back(untrained):
    """In "voice" one noun differs: its embedding carries the whole difference."""
    pairs = [pair for pair in agreement_contrasts(60, 0, "voice") if pair[0].referent_at == 1][:12]
    clean, corrupted = (study.ask(untrained["encoder"], side)[0][0] for side in zip(*pairs, strict=True))
    effects_LT = study.patching(untrained["encoder"], clean, corrupted)
    np.testing.assert_allclose(effects_LT[0, 2], 1, atol=1e-3)  # <s>, the article, the noun
    np.testing.assert_allclose(np.delete(effects_LT[0], 2), 0, atol=1e-3)


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_the_direction_of_gender_is_that_of_the_noun_and_its_article(untrained, family):
    bundle = untrained[family]
    questions = study.ask(bundle, [one for one in generate_agreement(60, 0, family="part") if one.is_last])[0][0]
    pieces = [[piece.strip() for piece in bundle.tokenizer.pieces(row.tolist())] for row in questions.tokens_BT]
    places, others = (study.noun_phrase(bundle, questions, of_referent=is_it) for is_it in (True, False))
    table = np.asarray(bundle.model.embeddings.token[...], np.float64)
    found = {True: [], False: []}
    for sentence, row, words, is_feminine in zip(questions.sentences, questions.tokens_BT, pieces,
                                                 study.is_feminine(questions), strict=True):
        given = sentence.text.split(" ")
        assert words[places] == given[sentence.referent_at - 1:sentence.referent_at + 1]
        assert words[others] == given[sentence.other_at - 1:sentence.other_at + 1]
        assert is_feminine == words[places][0].rstrip("s").endswith("a")
        found[bool(is_feminine)].append(table[row[places]])
    direction = study.gender_direction(bundle, questions)
    positions = tj.trace(bundle.model, questions.tokens_BT)["residual"][0] - table[questions.tokens_BT]
    np.testing.assert_allclose(positions, positions[:1] + np.zeros_like(positions), atol=1e-5)  # cancel in the means
    np.testing.assert_allclose(direction, np.mean(found[True], 0) - np.mean(found[False], 0), atol=1e-5)
    assert 0 <= study.turned(bundle, questions, places, direction) <= 1


@pytest.mark.long
def test_a_masked_model_learns_it_and_needs_its_heads(program, tmp_path):
    workdir = tmp_path / "agreement_mlm"
    # A process without the flags of the tests, which compile quickly but run slowly, for eight devices.
    settings = {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", "experiments.train", "--config=agreement_mlm", "--config.steps=700",
                    "--config.eval.every=700", "--config.sample.every=0", f"--workdir={workdir}"],
                   env=os.environ | settings, check=True, capture_output=True, timeout=600)
    bundle = tj.load(workdir)
    filled = tj.fill_mask(bundle.model, [POUR, POUR.replace("da jarra para o copo", "do copo para a jarra")],
                          tokenizer=bundle.tokenizer, top_k=1)
    assert [found[0][0].token.strip() for found in filled] == ["cheio", "vazio"]
    for family in ("pour", "cross", "part"):
        held_out = [one for split in ("pairs", "nouns") for one in generate_agreement(100, 9, split=split,
                                                                                  family=family)]
        filled = tj.fill_mask(bundle.model, [one.masked() for one in held_out], tokenizer=bundle.tokenizer, top_k=1)
        right = [found[0][0].token.strip() == one.answer for found, one in zip(filled, held_out, strict=True)]
        assert np.mean(right) > 0.95, family

    ended = program("agreement", f"--model={workdir}", f"--workdir={tmp_path}/study", "--num=60")
    assert ended.status == 0, ended
    cells = re.search(r"^pour +([\d.]+)%", ended.out, re.M)
    assert float(cells[1]) > 95
    found = re.search(r"pour: right against the alternatives ([\d.]+)%; without the heads [\d. ]+ ([\d.]+)%; without "
                      r"\d other heads ([\d.]+)% ", ended.out)
    whole, ablated, others = map(float, found.groups())
    assert whole > 95 and ablated < whole - 10 and others > ablated + 10
    for name in ("attention", "pour_patching", "voice_patching", "pour_heads"):
        with Image.open(tmp_path / "study" / f"agreement_mlm_{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert (tmp_path / "study" / "agreement_mlm_attention.html").stat().st_size > 10_000


@pytest.mark.long
def test_both_recipes_train_from_the_program(program, tmp_path, monkeypatch, one_device):
    def tiny(name, get=tj.recipes.get):
        config = get(name)
        return config.replace(steps=6, model=config.model.replace(num_layers=2, model_dim=32, mlp_dim=64, unroll=1))

    monkeypatch.setattr(tj.recipes, "get", tiny)
    ended = program("agreement", f"--workdir={tmp_path}", "--num=10")
    assert ended.status == 0, ended
    assert re.findall(r"^== (\w+)", ended.out, re.M) == ["agreement_mlm", "agreement_gpt"]
    assert ended.out.count("right against the alternatives") == 8
    again = program("agreement", f"--workdir={tmp_path}", "--num=10")  # from the checkpoints
    assert "resuming from step 6 of 6" in again.out
    assert again.out.split("== ")[1:] == ended.out.split("== ")[1:]


def test_what_the_generated_corpus_refuses(monkeypatch):
    monkeypatch.setitem(language_model._AGREEMENT_CORPUS, "num_train", 40)
    monkeypatch.setitem(language_model._AGREEMENT_CORPUS, "num_held_out", 8)
    config = tj.recipes.get("agreement_mlm")
    for name in ("agreement_mlm", "agreement_gpt"):
        assert tuple(map(list, tj.tasks.make(tj.recipes.get(name)).read())) == agreement_corpus(40, 8, 0)
    train, held_out = tj.tasks.make(config).read(["a", "b", "c", "d"])  # other texts: their own last part is held out
    assert (train, held_out) == (["a", "b", "c"], ["d"])
    data = dataclasses.replace(config.data, validation_path="x.txt")
    with pytest.raises(ValueError, match="generated sentences have their own held-out part; leave it out"):
        tj.tasks.make(config.replace(data=data)).read()
    with pytest.raises(ValueError, match="set exactly one source of training data: --config.data.path=FILE"):
        language_model.read_corpus(tj.config.DataConfig(generated="dates"))
    with pytest.raises(ValueError, match="set exactly one source of training data: --config.data.path=SOURCE"):
        translation.read_translation_data(tj.config.DataConfig(generated="agreement"))
    with pytest.raises(ValueError, match="must be None, 'dates' or 'agreement'"):
        tj.config.DataConfig(generated="agreements")


@pytest.mark.long
def test_a_translator_is_refused(program, tmp_path):
    tokenizer = tj.Tokenizer.train(["o copo"], kind="char")
    config = tj.ModelConfig(family="encoder_decoder", vocab_size=tokenizer.vocab_size, max_len=8, num_layers=1,
                            num_heads=1, model_dim=8)
    model = jax.jit(lambda key: tj.EncoderDecoder(config, key=key))(jax.random.key(0))
    tj.save(tmp_path / "translator", tj.Bundle(model=model, tokenizer=tokenizer, config=config))
    ended = program("agreement", f"--model={tmp_path}/translator", f"--workdir={tmp_path}/out")
    assert "expected a masked language model or a GPT with its tokenizer" in ended.error
