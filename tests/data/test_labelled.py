"""Texts and words with labels: files, the split, and rows of token ids."""

import gzip
import json

import numpy as np
import pytest

from transformer_jax.data import LabelledRows, LabelledText, LabelledWords, Tokenizer
from transformer_jax.data.labelled import (
    label_names,
    labelled_text_of,
    labelled_words_of,
    read_labelled_texts,
    read_labelled_words,
    split_by_label,
)
from transformer_jax.data.labelled_rows import first_tokens


def write(path, *objects):
    path.write_text("".join(f"{json.dumps(each)}\n" for each in objects))
    return path


def test_texts_of_a_file(tmp_path):
    objects = [{"review": "so good", "stars": 5}, {"review": "bad", "stars": "1"}]
    wanted = [LabelledText("so good", "5"), LabelledText("bad", "1")]
    assert read_labelled_texts(write(tmp_path / "a.jsonl", *objects), text_key="review", label_key="stars") == wanted
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(objects).encode()))
    assert read_labelled_texts(packed, text_key="review", label_key="stars") == wanted


@pytest.mark.parametrize(("record", "message"), [
    ({"text": "a"}, r"line 2: no label or words under the key 'label'; found the keys \['text'\]"),
    ({"text": "a", "label": 1.5}, "line 2: the label is 1.5; expected a string"),
    ({"text": "a", "label": True}, "line 2: the label is True; expected a string"),
    ({"text": " ", "label": "x"}, "line 2: the text is ' '; expected a string that is not blank"),
    ({"label": "x"}, "line 2: no text under the key 'text'"),
])
def test_a_bad_line_is_named(record, message, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": "x"}, record)
    with pytest.raises(ValueError, match=message):
        read_labelled_texts(path)


def test_words_of_json_and_of_columns(tmp_path):
    wanted = [LabelledWords(("Anna", "runs"), ("PER", "O")), LabelledWords(("Rome",), ("LOC",))]
    assert read_labelled_words(write(tmp_path / "a.jsonl", {"words": ["Anna", "runs"], "labels": ["PER", "O"]},
                                     {"words": "Rome", "labels": ["LOC"]})) == wanted
    columns = tmp_path / "a.conll"
    columns.write_text("-DOCSTART- -X- O\n\nAnna NNP PER\nruns VBZ O\n\n\nRome NNP LOC\n")
    assert read_labelled_words(columns) == wanted
    columns.write_text("Anna PER\nruns\n")
    with pytest.raises(ValueError, match="a.conll, line 2: 'runs' has no label"):
        read_labelled_words(columns)
    with pytest.raises(ValueError, match="line 1: 1 labels for 2 words"):
        read_labelled_words(write(tmp_path / "b.jsonl", {"words": ["a", "b"], "labels": ["O"]}))


@pytest.mark.parametrize(("read", "example"), [
    (labelled_text_of, "a text"), (labelled_text_of, ("a", "b", "c")), (labelled_words_of, (["a"], "O")),
    (labelled_words_of, ([], [])), (labelled_words_of, 3)])
def test_examples_of_another_form_are_refused(read, example):
    with pytest.raises(ValueError, match="expected"):
        read(example)


def test_the_split_keeps_the_shares_of_the_labels():
    """Also if the file is sorted by label, as that of movie_reviews is."""
    examples = [LabelledText(str(n), "neg" if n < 60 else "pos") for n in range(80)]
    train, held_out = split_by_label(examples, 0.1)
    assert [example.text for example in held_out] == [*map(str, range(54, 60)), "78", "79"]
    assert len(train) == 72 and set(train).isdisjoint(held_out) and label_names(train) == ("neg", "pos")
    with pytest.raises(ValueError, match="leaves a part empty"):
        split_by_label(examples[59:61], 0.1)


TEXT = "Anna lives in Rome"
TOKENIZERS = {kind: Tokenizer.train([TEXT] * 3, kind=kind, vocab_size=size) for kind, size in
              (("char", None), ("bpe", 280), ("word", None))}


@pytest.mark.parametrize("form", ["masked", "prompt"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_label_of_a_word_is_at_its_first_token(kind, form):
    tokenizer, words = TOKENIZERS[kind], TEXT.split()
    example = LabelledWords(tuple(words), ("PER", "O", "O", "LOC"))
    rows = LabelledRows.build([example], ("LOC", "O", "PER"), tokenizer, form, 64)
    places = np.flatnonzero(rows.weights_N[0])
    assert rows.labels_N[0, places].tolist() == [2, 1, 1, 0]
    # What follows each place, up to the next one, spells the word.
    ids = rows.tokens_NT[0].tolist()
    spelled = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(places, [*places[1:], len(ids)], strict=True)]
    assert spelled == words


def test_first_tokens_of_words_without_tokens():
    # Tokens: <s>, "ab" of the first word, nothing of the second, "d" of the third, </s>.
    assert first_tokens(["ab", "c", "d"], [(0, 0), (0, 1), (1, 2), (5, 6), (6, 6)]) == [1, None, 3]


def test_long_texts_are_cut_and_keep_their_end():
    tokenizer = TOKENIZERS["char"]
    rows = LabelledRows.build([LabelledText(TEXT, "x"), LabelledText("in", "y")], ("x", "y"), tokenizer, "masked", 8)
    assert rows.num_cut == 1 and rows.tokens_NT.shape == (2, 8)
    assert rows.tokens_NT[0].tolist() == [*tokenizer.encode_masked(TEXT)[:7], tokenizer.eos_id]
    assert rows.segment_ids_NT.tolist() == [[1] * 8, [1] * 4 + [0] * 4] and rows.labels_N.tolist() == [0, 1]
    # The last token of a row that is cut is not the first token of a word.
    words = LabelledRows.build([LabelledWords(tuple(TEXT.split()), ("x",) * 4)], ("x",), tokenizer, "masked", 12)
    assert np.flatnonzero(words.weights_N[0]).tolist() == [1, 6]
    last = [batch["weights"] for batch in rows.batches(3)]
    assert [weights.tolist() for weights in last] == [[1, 1, 0]]
    with pytest.raises(ValueError, match="the label 'y', which the model does not know; its labels are x"):
        LabelledRows.build([LabelledText("a", "y")], ("x",), tokenizer, "masked", 8)
