"""Masked language modelling from end to end: train, fill in, measure, resume; and errors of the
user."""

import collections
import itertools
import json
import random
import re

import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import DataConfig, ExperimentConfig
from transformer_jax.data import LineRows, Masking, masked_evaluation_batches
from transformer_jax.tasks.masked_language_model import MaskedLanguageModel
from transformer_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
WHO, DOES, WHAT = ("the king", "a queen", "my son"), ("saw", "took", "said"), ("the water", "a ship", "my home")
STEPS = 40
LENGTH = 24
# All runs have the same shapes and the same number of steps, so that they share compiled programs.
# The model has room for more tokens than the tokenizer has.
TRAIN = ("--config=book_mlm", "--config.model.num_layers=1", "--config.model.num_heads=2",
         "--config.model.model_dim=32", f"--config.model.max_len={LENGTH}", "--config.model.unroll=1",
         "--config.model.vocab_size=400", "--config.data.tokenizer.vocab_size=330",
         "--config.data.validation_fraction=0.2", "--config.data.mask_whole_words=True", f"--config.steps={STEPS}",
         "--config.batch_size=8", "--config.optim.peak_lr=0.01", "--config.optim.warmup_steps=10",
         "--config.log_every=1", "--config.checkpoint.every=25", f"--config.eval.every={STEPS}",
         "--config.eval.batch_size=8", "--config.sample.every=20",
         "--config.sample.prompt=the king <mask> the <mask>")


def lines(seed, num_lines):
    draw = random.Random(seed)
    return [f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)}." for _ in range(num_lines)]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("\n\n".join(lines(0, 160)) + "\n")
    return path


@pytest.fixture
def whole(program, book, runs):
    """The workdir of an uninterrupted run, trained when first asked for."""
    folder, ended = runs
    if "whole" not in ended:
        ended["whole"] = program("train", *TRAIN, f"--config.data.path={book}", f"--workdir={folder}/whole")
    assert ended["whole"].status == 0, ended["whole"]
    return folder / "whole"


# From end to end


def test_training_says_what_it_does(whole, runs):
    out = runs[1]["whole"].out
    bundle = tj.load(whole)
    rows = LineRows.build(lines(0, 160)[:128], bundle.tokenizer, LENGTH)
    assert out.startswith(f"128 lines in {len(rows)} rows to train on, 32 lines held out, a vocabulary of "
                          f"{bundle.tokenizer.vocab_size}, {tj.count_parameters(bundle.config):,} parameters, "
                          "1 cpu device(s)\n")
    assert bundle.config.vocab_size == 400 > bundle.tokenizer.vocab_size
    assert out.endswith(f'done; next: transformer-jax fill-mask --workdir={whole} --text="... <mask> ..."\n')
    losses = [line["loss"] for line in read_metrics(whole / "metrics.jsonl") if "loss" in line]
    assert len(losses) == STEPS and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    # Five candidates for each of the two masks, at steps 20 and 40.
    shown = out.split("--- step ")[1:]
    assert [block.split(" ---\n")[0] for block in shown] == ["20", "40"]
    for block in shown:
        candidates = re.findall(r"^(the king.*)  \((0\.\d{3})\)$", block, re.MULTILINE)
        assert len(candidates) == 10
        for mask, part in (("the <mask>", candidates[:5]), ("king <mask> the", candidates[5:])):
            probabilities = [float(probability) for _, probability in part]
            assert all(mask in text and text.count("<mask>") == 1 for text, _ in part)
            assert probabilities == sorted(probabilities, reverse=True)


def softmax(model, tokens_BT, segment_ids_BT):
    logits_BTV = np.asarray(tj.forward(model, tokens_BT, segment_ids_BT=segment_ids_BT), np.float64)
    weights_BTV = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
    return weights_BTV / weights_BTV.sum(-1, keepdims=True)


def test_fill_mask(program, whole):
    texts = ["the king <mask> the water.", "<mask> king saw my<mask>"]
    arguments = (f"--workdir={whole}", *(f"--text={text}" for text in texts), "--top_k=3")
    ended = program("fill_mask", *arguments)
    assert ended.status == 0 and ended.err == ""
    tokenizer = (bundle := tj.load(whole)).tokenizer
    encode, mask = tokenizer.encode, tokenizer.mask_id  # the mask also replaces the space before the word
    tokens, segment_ids = np.zeros((2, 8, LENGTH), np.int32)
    for row, ids in enumerate([[*encode("the king"), mask, *encode(" the water.")],
                               [mask, *encode(" king saw my"), mask]]):
        ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        tokens[row, :len(ids)], segment_ids[row, :len(ids)] = ids, 1
    places = np.argwhere(tokens == mask).tolist()
    probabilities = softmax(bundle.model, tokens, segment_ids)[..., :tokenizer.vocab_size]
    around = (("the king", " the water."), ("", " king saw my<mask>"), ("<mask> king saw my", ""))
    printed = ended.out.splitlines()
    assert printed[0] == texts[0] and printed[4:6] == [texts[1], "mask 1:"] and printed[9] == "mask 2:"
    for lines_, (row, place), (before, after) in zip((printed[1:4], printed[6:9], printed[10:]), places, around,
                                                     strict=True):
        best = np.argsort(-probabilities[row, place])[:3].tolist()
        for line, token in zip(lines_, best, strict=True):
            piece = tokenizer.pieces([token])[0]
            assert float(line[2:8]) == pytest.approx(probabilities[row, place, token], abs=6e-5)
            assert line[8:] == f"  {piece!r:16}  {before}{piece}{after}"
    best = program("fill_mask", *arguments, "--step=best")
    assert best.status == 0 and len(best.out.splitlines()) == len(printed)


@pytest.mark.parametrize("given", [False, True])
def test_evaluate_counts_what_plain_python_counts(program, whole, tmp_path, given):
    train, held_out = lines(0, 160)[:128], lines(0, 160)[128:]
    arguments = ["--batch_size=4"]
    if given:
        held_out = lines(1, 20)
        (tmp_path / "other.txt").write_text("\n".join(held_out))
        arguments.append(f"--data={tmp_path}/other.txt")
    ended = program("evaluate", f"--workdir={whole}", *arguments)
    assert ended.status == 0, ended
    tokenizer = (bundle := tj.load(whole)).tokenizer
    unigrams, bigrams = collections.Counter(), collections.defaultdict(collections.Counter)
    for line in train:
        tokens = [tokenizer.bos_id, *tokenizer.encode(line)]
        unigrams.update(tokens[1:])
        for left, token in itertools.pairwise(tokens):
            bigrams[left][token] += 1

    def most_frequent(counter):
        return sorted(counter, key=lambda token: (-counter[token], token))

    total, hits = 0.0, collections.defaultdict(list)
    rows = LineRows.build(held_out, tokenizer, LENGTH)
    assert len(rows) % 4  # rows of padding fill the last batch
    masking = Masking.of(tokenizer, whole_words=True)
    for batch in masked_evaluation_batches(rows, masking, 8):  # masks do not depend on the batch size
        probabilities = softmax(bundle.model, batch["tokens"], batch["segment_ids"])
        for row, place in zip(*np.nonzero(batch["masked_weights"]), strict=True):
            position, target = batch["masked_positions"][row, place], batch["masked_targets"][row, place]
            total -= np.log(probabilities[row, position, target])
            left = bigrams[int(batch["tokens"][row, position - 1])]
            guesses = {"model": np.argsort(-probabilities[row, position]), "unigram": most_frequent(unigrams),
                       "bigram": list(dict.fromkeys(most_frequent(left)[:5] + most_frequent(unigrams)))}
            for name, guess in guesses.items():
                hits[name].append((guess[0] == target, target in guess[:5]))
    num_masked = len(hits["model"])
    shares = {name: np.mean(found, axis=0) for name, found in hits.items()}
    first, second, *accuracies = ended.out.splitlines()
    assert first == f"step {STEPS}, {len(held_out)} lines, {num_masked} masked tokens"
    loss, perplexity = re.fullmatch(r"loss (\S+) nats per masked token, perplexity (\S+)", second).groups()
    assert float(loss) == pytest.approx(total / num_masked, abs=1e-4)
    assert float(perplexity) == pytest.approx(np.exp(total / num_masked), abs=0.01)
    assert accuracies == [f"{name:8} top-1 {shares[name][0]:6.2%}  top-5 {shares[name][1]:6.2%}"
                          for name in ("model", "unigram", "bigram")]
    assert shares["bigram"][0] > shares["unigram"][0] > 0 and 0 < shares["model"][0] < 1
    if not given:  # training printed the same value
        logged = [line["validation_loss"] for line in read_metrics(whole / "metrics.jsonl")
                  if "validation_loss" in line]
        assert float(loss) == pytest.approx(logged[-1], abs=1e-4)


@pytest.mark.long
def test_stopped_and_resumed_it_ends_as_the_whole_run(program, whole, runs, book, final_digest, stop_at):
    """In the middle of an epoch, with dropout, and masks that are drawn anew every epoch."""
    folder, _ = runs
    arguments = ("train", *TRAIN, f"--config.data.path={book}", f"--workdir={folder}/stopped")
    stop_at(27)
    stopped = program(*arguments)
    assert stopped.status == 128 + 15
    assert stopped.err.endswith("SIGTERM: saved step 27; run the same command again to resume\n")
    resumed = program(*arguments)
    assert resumed.status == 0 and f"resuming from step 27 of {STEPS}\n" in resumed.out, resumed
    assert final_digest(folder / "stopped") == final_digest(whole)

    def scalars(workdir):
        return [{name: value for name, value in line.items() if not name.endswith("_per_second")}
                for line in read_metrics(workdir / "metrics.jsonl")]

    assert scalars(folder / "stopped") == scalars(whole)
    # The run stopped in the middle of an epoch, after several epochs.
    num_rows = int(resumed.out.split(" lines in ")[1].split()[0])
    num_seen = 27 * 8
    assert num_seen > 3 * num_rows and num_seen % num_rows


@pytest.mark.parametrize("validates", [False, True])
def test_which_lines_are_held_out(tmp_path, validates):
    parts = lines(0, 50), lines(1, 50), lines(2, 30)
    for name, documents in (("book.jsonl", parts[:2]), ("other.jsonl", parts[2:])):
        (tmp_path / name).write_text("".join(
            json.dumps({"body": "\n\n".join(document)}) + "\n" for document in documents))
    data = DataConfig(path=f"{tmp_path}/book.jsonl", text_key="body", validation_fraction=0.1,
                      validation_path=f"{tmp_path}/other.jsonl" if validates else None)
    train, held_out = MaskedLanguageModel(ExperimentConfig(data=data)).read()
    both = parts[0] + parts[1]
    assert (train, held_out) == ((both, parts[2]) if validates else (both[:90], both[90:]))


def test_a_token_that_the_tokenizer_does_not_have_is_no_candidate(program, whole):
    vocab_size = tj.load(whole).tokenizer.vocab_size
    filled = program("fill_mask", f"--workdir={whole}", "--text=the <mask>", f"--top_k={vocab_size}")
    assert filled.status == 0 and len(filled.out.splitlines()) - 1 == vocab_size < 400


# What a user gets wrong


@pytest.mark.parametrize(("changes", "message"), [
    (["--config.sample.prompt=the king"],
     "sample.prompt='the king' has no <mask> to fill in; set a prompt with <mask>, or sample.every=0"),
    ([f"--config.sample.prompt={'the king saw ' * 9}<mask>"],
     "sample.prompt has {length} tokens, but the model reads at most model.max_len=24 tokens; use a shorter prompt"),
    (["--config.data.mask_probability=0"], "data.mask_probability=0.0 must be in (0, 1)"),
    (["--config.data.mask_probability=1"], "data.mask_probability=1.0 must be in (0, 1)"),
    (["--config.data.tokenizer.kind=char"], "data.tokenizer.min_frequency=2 is for kind 'bpe', not 'char'"),
    (["--config.data.tokenizer.min_frequency=0"], "data.tokenizer.min_frequency=0 must be a positive integer"),
    (["--config.data.validation_fraction=0.999"], "validation_fraction=0.999 of 160 lines leaves a part empty"),
    (["--config.model.max_len=2", "--config.sample.every=0"], "length=2 must be at least 3: <s>, a token and </s>"),
    (["--config.model.num_encoder_layers=2"],
     "num_encoder_layers belongs to family='encoder_decoder'; family='encoder' has num_layers"),
    (["--config.model.vocab_size=300"], "model.vocab_size=300, but the tokenizer has {pieces} tokens; leave "
                                        "model.vocab_size out"),
    (["--config.model.family=decoder"],
     "model.vocab_size=400, but the tokenizer has {pieces} tokens; leave model.vocab_size out"),
    (["--config.data.generated=dates"], "set exactly one source of training data: "),
])
def test_settings(program, book, tmp_path, changes, message):
    error = program("train", *TRAIN, *changes, f"--config.data.path={book}", f"--workdir={tmp_path}/run").error
    tokenizer = tj.Tokenizer.train(lines(0, 160)[:128], kind="bpe", vocab_size=330, min_frequency=2)
    length = 3 + len(tokenizer.encode(("the king saw " * 9).strip()))
    message = message.format(pieces=tokenizer.vocab_size, length=length)
    assert error == f"error: {message}" or (message.endswith(": ") and error.startswith(f"error: {message}"))
    assert not (tmp_path / "run" / "run.json").exists(), "a run that never began must not claim its directory"


def test_nothing_to_train_on(program):
    assert program("train", "--config=book_mlm", "--workdir=x").error.startswith(
        "error: set exactly one source of training data: --config.data.path=FILE (text, glob or JSONL), ")


def test_a_run_with_other_masks_is_another_run(program, whole, runs, book):
    error = program("train", *TRAIN, "--config.data.mask_probability=0.2", f"--config.data.path={book}",
                    f"--workdir={whole}").error
    assert f"{whole} holds a run with another config (data.mask_probability: 0.15 -> 0.2); " in error


@pytest.mark.parametrize(("arguments", "message"), [
    (["--text=the king"], "the text 'the king' has no <mask>; write <mask> in place of a token"),
    (["--text=the <mask>", "--text=a <masc>"],
     "the text 'a <masc>' has no <mask>: <masc> is not a token; did you mean <mask>?"),
    ([f"--text={'ship ' * 40}<mask>"], "a text of {length} tokens is longer than the model's context of 24; "),
    (["--text=the <mask>", "--top_k=0"], "top_k=0 must be from 1 to the {pieces} tokens of the vocabulary"),
    (["--text=the <mask>", "--top_k=9999"], "top_k=9999 must be from 1 to the {pieces} tokens of the vocabulary"),
    (["--text=the <mask>", "--step=7"], "{workdir}/checkpoints holds steps [25, 40], not 7"),
    ([], "--text is missing: a text with at least one mask"),
])
def test_texts_that_cannot_be_filled_in_end_with_one_line(program, whole, arguments, message):
    tokenizer = tj.load(whole).tokenizer
    error = program("fill_mask", f"--workdir={whole}", *arguments).error
    assert error.startswith("error: " + message.format(
        workdir=whole, pieces=tokenizer.vocab_size, length=3 + len(tokenizer.encode(("ship " * 40).strip()))))


def test_missing_flags_and_wrong_models_end_with_one_line(program, whole, gpt):
    assert program("fill_mask", "--text=a <mask>").error.startswith("error: --workdir is missing: ")
    assert program("fill_mask", f"--workdir={gpt}", "--text=a <mask>").error == (
        f"error: {gpt} is not a masked language model with its tokenizer")
    assert program("generate", f"--workdir={whole}", "--prompt=the").error == (
        f"error: {whole} is not a language model with its tokenizer")


def test_without_the_training_text_evaluate_needs_data_and_counts_nothing(program, whole, tmp_path):
    bundle = tj.load(whole)
    tj.save(tmp_path, tj.Bundle(model=bundle.model, tokenizer=bundle.tokenizer, config=bundle.config))
    assert program("evaluate", f"--workdir={tmp_path}").error == (
        "error: the training text of the model is unknown, so no part of it can be held out; pass the text to measure "
        "on (data=, or --data=FILE)")
    lines = ["the king took the ship", "the king saw the ship"] * 4
    alone, known = (tj.evaluate(tj.load(place), lines) for place in (tmp_path, whole))
    assert alone == {name: value for name, value in known.items() if "gram" not in name} and "model_top1" in alone
    assert program("evaluate", f"--workdir={whole}", "--data=/no/such").error.startswith("error: no text file at ")
