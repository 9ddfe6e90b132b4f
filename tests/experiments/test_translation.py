"""Translation from end to end: train, translate, measure, average, resume; dates; and errors of the
user."""

import dataclasses
import gzip
import random
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import transformer_jax as tj
from transformer_jax.decoding.beam import Hypothesis
from transformer_jax.tasks import translating, translation
from transformer_jax.tasks.translation_scores import scores
from transformer_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
WORDS = {"the": "die", "a": "eine", "old": "alte", "red": "rote", "cat": "Katze", "lamp": "Lampe", "sees": "sieht",
         "wants": "will", "no": "keine"}
STEPS = 40
# All runs have the same shapes and the same number of steps, so that they share compiled programs.
SHAPE = ("--config.model.num_layers=1", "--config.model.num_heads=2", "--config.model.model_dim=32",
         "--config.model.mlp_dim=64", "--config.model.max_len=16", "--config.model.unroll=1",
         "--config.data.tokenizer.vocab_size=330", "--config.batch_size=8", "--config.optim.peak_lr=0.01",
         "--config.optim.warmup_steps=10", "--config.log_every=1", "--config.eval.batch_size=8",
         "--config.sample.every=0")
TRAIN = ("--config=multi30k_ende", *SHAPE, f"--config.steps={STEPS}", "--config.checkpoint.every=25",
         "--config.checkpoint.keep=2", f"--config.eval.every={STEPS}", "--config.model.dropout=0.2")
TEXTS = ["the old cat sees a lamp", "", "no cat", "a cat wants the red lamp", "the lamp"]


def sentences(seed, num):
    draw = random.Random(seed)
    adjectives = ["old ", "red ", ""]
    return [f"{draw.choice(['the', 'a'])} {draw.choice(adjectives)}cat {draw.choice(['sees', 'wants'])} "
            f"{draw.choice(['the', 'a', 'no'])} {draw.choice(adjectives)}lamp" for _ in range(num)]


def translated(sentence):
    return " ".join(WORDS[word] for word in sentence.split())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Writes training and validation data, each as two files (one of them .gz) and as a TSV file
    with the target first."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in (("train", sentences(0, 160)), ("val", sentences(1, 20))):
        (folder / f"{name}.en.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in part).encode()))
        (folder / f"{name}.de").write_text("".join(f"{translated(line)}\n" for line in part))
        (folder / f"{name}.tsv").write_text("".join(f"{translated(line)}\t{line}\n" for line in part))
    return folder


def two(folder, name):
    return f"{folder}/{name}.en.gz,{folder}/{name}.de"


@pytest.fixture
def whole(program, corpus, runs):
    """The workdir of an uninterrupted run on TSV files, trained when first asked for."""
    folder, ended = runs
    if "whole" not in ended:
        ended["whole"] = program("train", *TRAIN, f"--config.data.path={corpus}/train.tsv", "--config.data.source=1",
                                 "--config.data.target=0", f"--config.data.validation_path={corpus}/val.tsv",
                                 "--config.sample.every=20", f"--workdir={folder}/whole")
    assert ended["whole"].status == 0, ended["whole"]
    return folder / "whole"


def losses(workdir):
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")}
            for line in read_metrics(workdir / "metrics.jsonl")]


def searched(bundle, text, n_best=1):
    """Returns the expected translation, by beam search over this text alone. The text is passed
    twice to keep the shape of the other searches."""
    return tj.beam_search(bundle.model, [text] * 2, tokenizer=bundle.tokenizer, beam_size=5, n_best=n_best,
                          penalty="length", length_penalty=1.0).n_best[0]


# Training


def test_training_says_what_it_does(whole, runs):
    out = runs[1]["whole"].out
    assert re.match(r"160 pairs, 0 with an empty side, 0 longer than 16 tokens left out, \d+ rows, \d+ % full to train "
                    r"on; 20 pairs, 0 with an empty side, 0 longer than 16 tokens left out, \d+ rows, \d+ % full held "
                    r"out, a vocabulary of 330, "
                    rf"{tj.count_parameters(tj.load(whole).config):,} parameters, 1 cpu device\(s\)\n",
                    out)
    assert out.endswith(f'done; next: transformer-jax translate --workdir={whole} --text="..."\n')
    losses_ = [line["loss"] for line in losses(whole) if "loss" in line]
    assert len(losses_) == STEPS and np.mean(losses_[-5:]) < 0.6 * np.mean(losses_[:5])
    blocks = out.split("--- step ")[1:]
    assert [block.split(" ---\n")[0] for block in blocks] == ["20", "40"]
    for block in blocks:
        shown = block.split(" ---\n")[1].split("\n\n")[0].split("\n")
        assert shown[::3] == sentences(1, 20)[:3]
        assert shown[2::3] == [f"   ? {translated(line)}" for line in sentences(1, 20)[:3]]
        assert all(line.startswith("  -> ") for line in shown[1::3])


@pytest.mark.long
def test_stopped_and_resumed_it_ends_as_the_whole_run(program, whole, runs, corpus, final_digest, stop_at):
    """Resumes in the middle of an epoch with dropout. Nothing is tokenised again, and two files
    give the same result as TSV."""
    folder, _ = runs
    arguments = ("train", *TRAIN, f"--config.data.path={two(corpus, 'train')}",
                 f"--config.data.validation_path={two(corpus, 'val')}", f"--workdir={folder}/stopped")
    stop_at(27)
    stopped = program(*arguments)
    assert stopped.status == 128 + 15
    assert stopped.err.endswith("SIGTERM: saved step 27; run the same command again to resume\n")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "stopped" / "data").iterdir())
    resumed = program(*arguments)
    assert resumed.status == 0 and f"resuming from step 27 of {STEPS}\n" in resumed.out, resumed
    assert final_digest(folder / "stopped") == final_digest(whole)
    assert losses(folder / "stopped") == losses(whole)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "stopped" / "data").iterdir())


def test_the_last_pairs_are_held_out(corpus):
    config = tj.config.DataConfig(path=two(corpus, "train"), validation_fraction=0.25)
    train, held_out = map(list, translation.read_translation_data(config))
    assert train + held_out == [(line, translated(line)) for line in sentences(0, 160)]
    assert (len(train), len(held_out)) == (120, 40)


@pytest.mark.long
def test_a_tfds_translation_set(program, wmt14, tmp_path):
    tfds = ("--config.data.tfds=wmt14_translate/de-en", "--config.data.source=en", "--config.data.target=de")
    ended = program("train", *TRAIN, *tfds, f"--workdir={tmp_path}/run")
    assert ended.status == 0, ended
    assert ended.out.startswith(f"{len(wmt14['train'])} pairs, 0 with an empty side, 0 longer than 16 tokens left ")
    assert f"to train on; {len(wmt14['validation'])} pairs, " in ended.out
    arguments = ("evaluate", f"--workdir={tmp_path}/run", "--batch_size=2")
    measured = program(*arguments)
    assert measured.out.startswith(f"step {STEPS}, {len(wmt14['validation'])} sentences, ")
    for side, name in enumerate(("en", "de")):
        (tmp_path / name).write_text("".join(f"{pair[side]}\n" for pair in sorted(wmt14["validation"])))
    assert program(*arguments, f"--data={tmp_path}/en,{tmp_path}/de").out == measured.out


# Translating


def test_translate_texts(program, whole):
    arguments = ("translate", f"--workdir={whole}", f"--text={TEXTS[0]}", f"--text={TEXTS[3]}")
    ended = program(*arguments)
    bundle = tj.load(whole)
    assert ended.status == 0 and ended.err == ""
    assert ended.out.splitlines() == [searched(bundle, text)[0].text for text in (TEXTS[0], TEXTS[3])]
    assert "Katze" in ended.out  # it has learnt something
    assert program(*arguments, "--step=best").status == 0


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_line_n_of_the_output_is_the_translation_of_line_n(program, whole, tmp_path, suffix):
    content = ("\ufeff" + "\r\n".join(TEXTS) + "\n\n<|endoftext|>\n").encode()
    (tmp_path / f"in{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    arguments = ("translate", f"--workdir={whole}", f"--input={tmp_path}/in{suffix}", "--batch_size=2")
    ended = program(*arguments, f"--output={tmp_path}/out")
    assert ended.status == 0 and ended.out == "", ended
    bundle = tj.load(whole)
    expected = [searched(bundle, text)[0].text if text else "" for text in (*TEXTS, "", "<|endoftext|>")]
    assert (tmp_path / "out").read_text(encoding="utf-8") == "".join(f"{text}\n" for text in expected)
    assert program(*arguments).out == (tmp_path / "out").read_text(encoding="utf-8")


def test_a_line_end_in_a_translation_does_not_make_two_lines(program, whole, monkeypatch):
    hypothesis = Hypothesis(text="", tokens=[], score=-0.5, logprob=-1.0, finish_reason="eos")
    monkeypatch.setattr(translating, "translate", lambda bundle, sources, **_: [
        [dataclasses.replace(hypothesis, text=f"a\n{source}")] * 2 for source in sources])
    assert program("translate", f"--workdir={whole}", "--text=b", "--text=c").out == "a b\na c\n"
    assert program("translate", f"--workdir={whole}", "--text=b", "--n_best=2").out == "1\t-0.5000\ta b\n" * 2


def test_n_best(program, whole):
    out = program("translate", f"--workdir={whole}", f"--text={TEXTS[0]}", f"--text={TEXTS[2]}", "--n_best=3").out
    lines = [line.split("\t") for line in out.splitlines()]
    bundle = tj.load(whole)
    expected = [searched(bundle, text, n_best=3) for text in (TEXTS[0], TEXTS[2])]
    assert [(number, text) for number, _, text in lines] == [
        (number, hypothesis.text.replace("\n", " "))
        for number, hypotheses in zip("12", expected, strict=True) for hypothesis in hypotheses]
    scores_ = [hypothesis.score for hypotheses in expected for hypothesis in hypotheses]
    assert [float(score) for _, score, _ in lines] == pytest.approx(scores_, abs=1e-4)
    assert scores_[0] > scores_[1] > scores_[2]


def test_evaluate(program, whole, corpus, tmp_path):
    arguments = ("evaluate", f"--workdir={whole}", "--batch_size=2")
    ended = program(*arguments, "--target_language=de")
    assert ended.status == 0, ended
    program("translate", *arguments[1:], f"--input={corpus}/val.en.gz", f"--output={tmp_path}/out")
    found = [line.strip() for line in (tmp_path / "out").read_text(encoding="utf-8").split("\n")[:-1]]
    references = [translated(line) for line in sentences(1, 20)]
    expected = scores(found, references, language="de")
    exact = sum(a == b for a, b in zip(found, references, strict=True))
    head = [f"step {STEPS}, 20 sentences, beam of 5, length penalty 1.0",
            f"translations that equal the reference: {exact / 20:.2%}"]
    assert ended.out.splitlines() == [*head, *(f"{name} {expected[name]:.2f}  ({expected[f'{name}_signature']})"
                                               for name in ("bleu", "chrf", "tokenised_bleu"))]
    assert expected["chrf"] > 20
    for data in (two(corpus, "val"), f"{corpus}/val.tsv"):  # whose columns are those of the training
        assert program(*arguments, f"--data={data}").out.splitlines() == head


def test_a_sentence_too_long_to_be_read_counts_as_untranslated(program, whole, tmp_path):
    arguments = ("evaluate", f"--workdir={whole}", "--batch_size=2", f"--data={tmp_path}/en,{tmp_path}/de",
                 "--target_language=de")
    (tmp_path / "en").write_text("no cat\n" + "the " * 30 + "cat\nthe lamp\n")
    (tmp_path / "de").write_text("keine Katze\n" + "die " * 30 + "Katze\ndie Lampe\n")
    out = program(*arguments).out.splitlines()
    assert out[1] == "1 sentences are longer than the 15 tokens that the model reads; they are not translated"
    bundle = tj.load(whole)
    found = [searched(bundle, text)[0].text.strip() if text else "" for text in ("no cat", "", "the lamp")]
    expected = scores(found, (tmp_path / "de").read_text().splitlines(), language="de")
    assert out[3].startswith(f"bleu {expected['bleu']:.2f}  ")


def test_average_is_the_mean_of_the_last_checkpoints(program, whole):
    kept = [tj.load(whole, step=step) for step in (25, STEPS)]
    mean = jax.tree.map(lambda *leaves: np.mean([np.asarray(leaf, np.float64) for leaf in leaves], axis=0),
                        *(bundle.model for bundle in kept))
    for leaf, expected in zip(jax.tree.leaves(tj.load(whole, average=2).model), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-8)
    averaged = dataclasses.replace(kept[1], model=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), mean))
    texts = (TEXTS[0], TEXTS[2])
    printed = {average: [float(line.split("\t")[1]) for line in program(
        "translate", f"--workdir={whole}", *(f"--text={text}" for text in texts), "--n_best=3",
        f"--average={average}").out.splitlines()] for average in (1, 2)}
    expected = [hypothesis.score for text in texts for hypothesis in searched(averaged, text, n_best=3)]
    assert printed[2] == pytest.approx(expected, abs=2e-4)
    assert abs(printed[2][0] - printed[1][0]) > 1e-3
    measured = program("evaluate", f"--workdir={whole}", "--average=2", "--batch_size=2")
    assert measured.out.startswith(f"step {STEPS}, 20 sentences, ")


# Dates


@pytest.mark.long
def test_dates(program, tmp_path, monkeypatch):
    monkeypatch.setitem(translation._DATES_CORPUS, "num_train", 300)
    monkeypatch.setitem(translation._DATES_CORPUS, "num_held_out", 1)
    tiny = (*SHAPE, "--config.model.max_len=64", "--config.data.tokenizer.vocab_size=400", "--config.steps=30",
            f"--workdir={tmp_path}/dates")
    text = "sábado, vinte e dois de maio de 1998"
    ended = program("dates", *tiny, f"--text={text}")
    assert ended.status == 0, ended
    assert re.match(r"300 pairs, 0 with an empty side, \d longer than 64 tokens left out, ", ended.out)
    assert "step 30, 1 sentences, beam of 1, length penalty 0.0\ntranslations that equal the reference: " in ended.out
    bundle = tj.load(tmp_path / "dates")
    iso = tj.beam_search(bundle.model, text, tokenizer=bundle.tokenizer, beam_size=1).texts[0]
    assert f"{text} -> {iso}\nThe model is in {tmp_path}/dates" in ended.out
    with Image.open(tmp_path / "dates" / "attention.png") as image:
        assert image.format == "PNG" and len(np.unique(np.asarray(image.convert("L")))) > 50
    # The commands that the program prints at its end work.
    name, *arguments = shlex.split(ended.out.split("Next:\n  python -m ")[1].split("\n")[0])
    assert (name, arguments[0]) == ("experiments.translate", f"--workdir={tmp_path}/dates")
    assert program("translate", *arguments, "--beam_size=1").status == 0
    again = program("train", "--config=dates", *tiny)  # it is an experiment like any other
    assert again.status == 0 and "resuming from step 30 of 30" in again.out


def test_the_dates_held_out_are_not_among_those_to_train_on():
    train, held_out = map(list, translation.read_translation_data(tj.config.DataConfig(generated="dates")))
    assert len(train) == 60_000 and len(held_out) == 2_000
    assert not {iso for _, iso in train} & {iso for _, iso in held_out}


# What a user gets wrong


@pytest.mark.parametrize(("changes", "message"), [
    ([], "set exactly one source of training data: --config.data.path=SOURCE,TARGET (aligned files) or a "),
    (["--config.data.path={corpus}/train.tsv", "--config.data.generated=dates"],
     "set exactly one source of training data: "),
    (["--config.data.generated=numbers"], "data.generated='numbers' must be None, 'dates' or 'agreement'"),
    (["--config.data.tfds=wmt14_translate/de-en"],
     "a TFDS translation data set needs the names of two languages; set --config.data.source and --config.data.target"),
    (["--config.data.generated=dates", "--config.data.validation_path={corpus}/val.tsv"],
     "data.validation_path can only be used with data.path, because a TFDS data set and generated pairs have their "
     "own held-out part"),
    (["--config.data.path={corpus}/train.en.gz,{corpus}/val.de"],
     "{corpus}/train.en.gz has 160 lines and {corpus}/val.de has 20; expected as many of both, "),
    (["--config.data.path={corpus}/train.en.gz"], "{corpus}/train.en.gz, line 1 has 1 tab-separated columns; "),
    (["--config.data.path={corpus}/none.tsv"], "no file at '{corpus}/none.tsv'; expected SOURCE_FILE,TARGET_FILE or "),
    (["--config.data.path={corpus}/train.tsv", "--config.data.target=2"],
     "{corpus}/train.tsv, line 1 has 2 tab-separated columns; expected at least 3, "),
    (["--config.data.path={corpus}/train.tsv", "--config.data.validation_fraction=0.999"],
     "data.validation_fraction=0.999 of 160 pairs leaves a part empty; set data.validation_path, or another fraction"),
    (["--config.data.path={corpus}/train.tsv", "--config.model.max_len=2"], "none of 144 pairs fits a row: "),
    (["--config.data.path={corpus}/train.tsv", "--config.model.vocab_size=400"],
     "model.vocab_size=400, but the tokenizer has 330 tokens; leave model.vocab_size out"),
])
def test_settings(program, corpus, tmp_path, changes, message):
    changes = [change.format(corpus=corpus) for change in changes]
    error = program("train", *TRAIN, *changes, f"--workdir={tmp_path}/run").error
    assert error.startswith(f"error: {message.format(corpus=corpus)}")
    assert not (tmp_path / "run" / "run.json").exists(), "a run that never began must not claim its directory"


@pytest.mark.parametrize(("arguments", "message"), [
    ([], 'pass the sentences to translate: either --text="..." or --input=FILE'),
    (["--text=a", "--input=b"], 'pass the sentences to translate: either --text="..." or --input=FILE'),
    (["--input=/no/such"], "no file at '/no/such'"),
    (["--text=a", "--output=/no/such/file"], "/no/such/file: No such file or directory"),
    (["--text=a", "--output={tmp_path}"], "{tmp_path}: Is a directory"),
    (["--text=a", "--text={long}"],
     "line 2 has {length} tokens; the model reads 15 at most: shorten or split it"),
    (["--text=a", "--beam_size=0"], "beam_size=0 must be from 1 to the 330 tokens of the vocabulary"),
    (["--text=a", "--n_best=0"], "n_best=0 must be from 1 to beam_size=5"),
    (["--text=a", "--n_best=3", "--beam_size=2"], "n_best=3 must be from 1 to beam_size=2"),
    (["--text=a", "--length_penalty=-1"], "length_penalty=-1.0 must be 0 (off) or positive"),
    (["--text=a", "--batch_size=0"], "flag --batch_size=0: "),
    (["--text=a", "--average=0"], "average=0 must be a whole number, at least 1"),
    (["--text=a", "--average=3"], "average=3, but {workdir}/checkpoints keeps 2 checkpoints up to step 40; train with "
                                  "checkpoint.keep=3, or average fewer"),
    (["--text=a", "--average=2", "--step=25"],
     "average=2, but {workdir}/checkpoints keeps 1 checkpoints up to step 25; "),
    (["--text=a", "--average=2", "--step=best"], "average=2 averages the last checkpoints up to a step, "),
])
def test_inputs_that_cannot_be_translated_end_with_one_line(program, whole, tmp_path, arguments, message):
    long = "the old cat " * 20
    fill = dict(workdir=whole, tmp_path=tmp_path, long=long, length=len(tj.load(whole).tokenizer.encode(long)))
    error = program("translate", f"--workdir={whole}", *(argument.format(**fill) for argument in arguments)).error
    assert error.startswith(f"error: {message.format(**fill)}")


def test_missing_flags_and_wrong_models_end_with_one_line(program, whole, gpt, tmp_path):
    assert program("translate", "--text=a").error.startswith("error: --workdir is missing: ")
    assert program("translate", f"--workdir={gpt}", "--text=a").error == (
        f"error: {gpt} is not a translation model with its tokenizer")
    assert program("generate", f"--workdir={whole}", "--prompt=a").error == (
        f"error: {whole} is not a language model with its tokenizer")
    (tmp_path / "empty").write_bytes(b"")
    error = program("translate", f"--workdir={whole}", f"--input={tmp_path}/empty").error
    assert error == f"error: {tmp_path}/empty is empty; expected UTF-8 text"
    bundle = tj.load(whole)
    tj.save(tmp_path / "bare", tj.Bundle(model=bundle.model, tokenizer=bundle.tokenizer, config=bundle.config))
    assert program("evaluate", f"--workdir={tmp_path}/bare").error == (
        "error: the model has no config of its training, so its held-out data is unknown; pass --data=SOURCE,TARGET")
    assert "xx" in program("evaluate", f"--workdir={whole}", "--target_language=xx").error
