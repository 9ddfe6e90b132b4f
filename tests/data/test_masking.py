import json
import math

import numpy as np
import pytest

from transformer_jax.data import (
    LineRows,
    Masking,
    Tokenizer,
    make_batches,
    masked_evaluation_batches,
    read_documents,
    split_lines,
)
from transformer_jax.data.sentencepiece_training import SPECIAL_TOKENS

WORDS = ["casa", "amor", "capitu", "olhos", "ressaca", "não", "de", "e", "o", "bentinho", "impossibilidade", "\tx"]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([" ".join(WORDS) * 9], vocab_size=330)


@pytest.fixture(scope="module")
def rows(tok):
    rng = np.random.default_rng(5)
    lines = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) + " ∞" * (i % 3) for i in range(600)]
    lines += [" ".join(["∞∞"] * 9)] * 5  # rows without a small word
    return LineRows.build(lines, tok, 64)


def specials(tok):
    return [tok.piece_to_id(name) for name in SPECIAL_TOKENS]


def words_of(tok, tokens):
    """The words of a row as lists of positions, from the text of its tokens."""
    words, open_word = [], False
    for position, token in enumerate(tokens):
        text = tok.decode([token])
        if token in specials(tok):
            open_word = False
        elif text in ("\t", "\n", "\u2047"):
            words.append([position])
            open_word = False
        elif open_word and not text.startswith(" "):
            words[-1].append(position)
        else:
            words.append([position])
            open_word = True
    return words


def chosen(row, batch):
    return batch["masked_positions"][row][batch["masked_weights"][row] == 1].tolist()


def within(count, trials, probability, sigmas=4.5):
    return abs(count - trials * probability) <= sigmas * math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("probability", [0.15, 0.01, 0.4, 0.999])
def test_layout_and_what_stays_as_it_was(tok, rows, whole_words, probability):
    batch = rows[np.arange(len(rows))]
    before = {name: array.copy() for name, array in batch.items()}
    masked = Masking.of(tok, probability, whole_words)(batch | {"extra": np.arange(3)}, np.random.default_rng(0))
    assert all(np.array_equal(batch[name], before[name]) for name in before)
    num_masked = math.ceil(probability * 64)
    assert {name: (array.shape[1], array.dtype) for name, array in masked.items() if name != "extra"} == {
        "tokens": (64, np.int32), "segment_ids": (64, np.int32), "masked_positions": (num_masked, np.int32),
        "masked_targets": (num_masked, np.int32), "masked_weights": (num_masked, np.float32),
    }
    assert masked["extra"].tolist() == [0, 1, 2]
    assert np.array_equal(masked["segment_ids"], batch["segment_ids"])
    for row in range(len(rows)):
        positions = chosen(row, masked)
        count = len(positions)
        assert positions == sorted(set(positions))
        assert masked["masked_weights"][row].tolist() == [1] * count + [0] * (num_masked - count)
        assert not masked["masked_positions"][row, count:].any() and not masked["masked_targets"][row, count:].any()
        assert masked["masked_targets"][row, :count].tolist() == batch["tokens"][row, positions].tolist()
        assert not np.isin(batch["tokens"][row, positions], specials(tok)).any()
        untouched = np.setdiff1d(np.arange(64), positions)
        assert np.array_equal(masked["tokens"][row, untouched], batch["tokens"][row, untouched])
        ordinary = int(np.sum(~np.isin(batch["tokens"][row], specials(tok))))
        budget = max(1, round(probability * ordinary))
        if not whole_words:
            assert count == budget
        assert 1 <= count <= budget


def test_80_10_10_and_every_place_and_token_alike(tok, rows):
    masking = Masking.of(tok, 0.15)
    rng = np.random.default_rng(1)
    row = rows[np.zeros(400, int)]  # one row, many times over
    ordinary = np.flatnonzero(~np.isin(row["tokens"][0], specials(tok)))
    per_row = round(0.15 * len(ordinary))
    kinds, places, replaced = {"mask": 0, "same": 0, "other": 0}, np.zeros(64, int), np.zeros(tok.vocab_size, int)
    repeats = 40
    for _ in range(repeats):
        masked = masking(row, rng)
        assert (masked["masked_weights"].sum(1) == per_row).all()
        real = masked["masked_weights"] == 1
        new = np.take_along_axis(masked["tokens"], masked["masked_positions"], 1)[real]
        old = masked["masked_targets"][real]
        kinds["mask"] += np.sum(new == tok.mask_id)
        kinds["same"] += np.sum(new == old)
        other = new[(new != old) & (new != tok.mask_id)]
        kinds["other"] += len(other)
        replaced += np.bincount(other, minlength=tok.vocab_size)
        places += np.bincount(masked["masked_positions"][real], minlength=64)
    trials = 400 * repeats * per_row
    num_ordinary = tok.vocab_size - len(SPECIAL_TOKENS)
    assert sum(kinds.values()) == trials
    assert within(kinds["mask"], trials, 0.8)
    assert within(kinds["same"], trials, 0.1 + 0.1 / num_ordinary)  # the random token is the old one now and then
    assert within(kinds["other"], trials, 0.1 - 0.1 / num_ordinary)
    assert places[np.setdiff1d(np.arange(64), ordinary)].sum() == 0
    assert all(within(places[place], 400 * repeats, per_row / len(ordinary)) for place in ordinary)
    assert replaced[specials(tok)].sum() == 0
    # Bytes are ordinary tokens too. A token of the row itself can be drawn a little less often:
    # where it was.
    away = np.setdiff1d(np.arange(tok.vocab_size), [*specials(tok), *row["tokens"][0]])
    assert all(within(replaced[token], trials, 0.1 / num_ordinary) for token in away)


def test_places_of_different_rows_are_independent(tok, rows):
    masked = Masking.of(tok, 0.15)(rows[np.zeros(50, int)], np.random.default_rng(0))
    assert len({tuple(positions) for positions in masked["masked_positions"].tolist()}) > 45


def test_whole_words_are_chosen_together_and_share_their_fate(tok, rows):
    masking = Masking.of(tok, 0.3, whole_words=True)
    batch = rows[np.arange(len(rows))]
    fates, fewer = {"mask": 0, "same": 0, "other": 0}, 0
    rng = np.random.default_rng(2)
    for _ in range(10):
        masked = masking(batch, rng)
        for row, tokens in enumerate(batch["tokens"]):
            words = words_of(tok, tokens)
            positions = set(chosen(row, masked))
            left = max(1, round(0.3 * sum(map(len, words)))) - len(positions)
            fewer += left > 0
            for word in words:
                assert len(positions.intersection(word)) in (0, len(word))
                if word[0] not in positions:
                    assert len(word) > left  # the word would have fitted
                    continue
                new, old = masked["tokens"][row, word], tokens[word]
                if (new == tok.mask_id).any():
                    assert (new == tok.mask_id).all()
                    fates["mask"] += 1
                elif len(word) > 1:  # one random token may equal the old one, but probably not all of them
                    fates["same" if (new == old).all() else "other"] += 1
                else:
                    fates["same" if new[0] == old[0] else "other"] += 1
    trials = sum(fates.values())
    assert trials > 2000 and fewer > 0
    assert all(within(fates[fate], trials, p) for fate, p in [("mask", 0.8), ("same", 0.1), ("other", 0.1)])


def test_isolated_characters_are_words_of_their_own(tok):
    tokens = np.array([[tok.bos_id, *tok.encode("amor\tx\n\u2047x de"), tok.eos_id, *tok.encode("e\t"), tok.eos_id]])
    words = words_of(tok, tokens[0])
    assert [tok.decode(tokens[0, word]) for word in words[:4]] == ["amor", "\t", "x", "\n"]
    alone = {tuple(chosen(0, Masking.of(tok, 0.01, whole_words=True)({"tokens": tokens}, np.random.default_rng(seed))))
             for seed in range(300)}
    assert alone == {tuple(word) for word in words if len(word) == 1}


def test_words_of_many_pieces_occur(tok, rows):
    sizes = {len(word) for tokens in rows.tokens for word in words_of(tok, tokens)}
    assert {1, 4, 7} <= sizes  # " ∞" is three bytes and a space


@pytest.mark.parametrize(("line", "count"), [("∞∞∞ ∞∞", 2), ("∞∞∞∞∞", 2), ("a", 1)])
def test_the_smallest_of_too_large_words_is_cut(tok, line, count):
    tokens = np.array([[tok.bos_id, *tok.encode(line), tok.eos_id]], np.int32)
    words = words_of(tok, tokens[0])
    smallest = min(words, key=len)
    for seed in range(20):
        masked = Masking.of(tok, 0.14, whole_words=True)({"tokens": tokens}, np.random.default_rng(seed))
        assert chosen(0, masked) == smallest[: max(1, round(0.14 * sum(map(len, words))))]
        assert len(chosen(0, masked)) == count


def test_rows_without_an_ordinary_token(tok):
    tokens = np.array([specials(tok), specials(tok)[::-1], [tok.bos_id, 7, 8, tok.eos_id, 0, 0]], np.int32)
    for whole_words in (False, True):
        masked = Masking.of(tok, 0.5, whole_words)({"tokens": tokens}, np.random.default_rng(0))
        assert np.array_equal(masked["tokens"][:2], tokens[:2])
        assert masked["masked_weights"].sum(1).tolist() == [0, 0, 1]


def test_wrong_probabilities(tok):
    for probability in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"probability={probability} must lie between 0 and 1"):
            Masking.of(tok, probability)


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_are_fresh_each_epoch_and_resume_in_the_middle_of_one(tok, rows, whole_words):
    masking = Masking.of(tok, whole_words=whole_words)
    num_rows, batch_size = len(rows), 8
    source = LineRows(rows.tokens[: num_rows // 8 * 8], rows.segment_ids[: num_rows // 8 * 8], 0)
    epoch = len(source) // batch_size
    assert epoch > 5

    def start(seed=7):
        return make_batches(source, batch_size=batch_size, seed=seed, transform=masking)

    batches = start()
    first_batches = [next(batches) for _ in range(epoch + 3)]
    state = json.loads(json.dumps(batches.get_state()))
    first_batches += [next(batches) for _ in range(2 * epoch - 3)]
    again, resumed, other = start(), start(), start(seed=8)
    resumed.set_state(state)
    again, ahead = [next(again) for _ in first_batches], [next(resumed) for _ in first_batches[epoch + 3 :]]
    pairs = [*zip(first_batches, again, strict=True), *zip(first_batches[epoch + 3 :], ahead, strict=True)]
    for expected, batch in pairs:
        assert all(np.array_equal(expected[name], batch[name]) for name in expected)
    assert not np.array_equal(first_batches[0]["tokens"], next(other)["tokens"])

    # A row, found by its tokens before masking, has another mask in each of the three epochs.
    masks = {}
    for batch in first_batches:
        original = batch["tokens"].copy()
        for row, targets in enumerate(batch["masked_targets"]):
            original[row, chosen(row, batch)] = targets[batch["masked_weights"][row] == 1]
            masks.setdefault(tuple(original[row]), []).append(tuple(chosen(row, batch)))
    assert sorted(masks) == sorted({tuple(row) for row in source.tokens.tolist()})
    assert sum(map(len, masks.values())) == 3 * len(source)
    assert np.mean([len(set(found)) == len(found) for found in masks.values()]) > 0.95


def test_evaluation_masks_depend_on_seed_and_row_only(tok, rows):
    masking = Masking.of(tok)
    collected = {}
    for batch_size in (1, 7, len(rows), 1000):
        batches = list(masked_evaluation_batches(rows, masking, batch_size))
        assert {array.shape[0] for batch in batches for array in batch.values()} == {batch_size}
        assert len(batches) == -(-len(rows) // batch_size)
        whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        assert all(array[len(rows) :].sum() == 0 for array in whole.values())
        collected[batch_size] = {name: array[: len(rows)] for name, array in whole.items()}
        assert {name: array.dtype for name, array in whole.items()} == {
            "tokens": np.int32, "segment_ids": np.int32, "masked_positions": np.int32, "masked_targets": np.int32,
            "masked_weights": np.float32,
        }
    first = collected[1]
    for batches in collected.values():
        assert all(np.array_equal(batches[name], first[name]) for name in first)
    restored = first["tokens"].copy()
    for row in range(len(rows)):
        assert chosen(row, first)
        restored[row, chosen(row, first)] = rows.tokens[row, chosen(row, first)]
    assert np.array_equal(restored, rows.tokens) and np.array_equal(first["segment_ids"], rows.segment_ids)
    (other,) = masked_evaluation_batches(rows, masking, len(rows), seed=1)
    assert not np.array_equal(other["masked_positions"], first["masked_positions"])
    # Rows of the same length do not share a mask.
    (same,) = masked_evaluation_batches(LineRows(rows.tokens[[0] * 9], rows.segment_ids[[0] * 9], 0), masking, 9)
    assert len({tuple(positions) for positions in same["masked_positions"].tolist()}) > 7


def test_evaluation_errors_come_at_the_call(tok, rows):
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        masked_evaluation_batches(rows, Masking.of(tok), 0)


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_book(corpora, whole_words):
    path = corpora / "machado_books" / "dom_casmurro.txt"
    if not path.exists():
        pytest.skip(f"no book at {path}")
    train, _ = split_lines(read_documents(path), 0.05)
    tok = Tokenizer.train(train, vocab_size=8000, min_frequency=2)
    rows = LineRows.build(train, tok, 128)
    batch = rows[np.arange(len(rows))]
    masked = Masking.of(tok, whole_words=whole_words)(batch, np.random.default_rng(3))
    ordinary = ~np.isin(batch["tokens"], specials(tok))
    count = int(masked["masked_weights"].sum())
    # Rounded row by row; whole words may leave a token or two of a row's budget.
    assert abs(count / ordinary.sum() - 0.15) < (0.002 if whole_words else 0.001)
    positions = [(row, position) for row in range(len(rows)) for position in chosen(row, masked)]
    new = np.array([masked["tokens"][place] for place in positions])
    old = np.array([batch["tokens"][place] for place in positions])
    words = count
    if whole_words:  # one draw decides for all tokens of a word, so the bound uses the number of words
        words = sum(bool(set(word) & set(chosen(row, masked))) for row, tokens in enumerate(batch["tokens"][:100])
                    for word in words_of(tok, tokens)) * len(rows) // 100
    spread = 4.5 * math.sqrt(0.8 * 0.2 / words) * (2 if whole_words else 1)
    assert abs(np.mean(new == tok.mask_id) - 0.8) < spread
    assert abs(np.mean(new == old) - 0.1) < spread
    assert not np.isin(old, specials(tok)).any() and not np.isin(new[new != tok.mask_id], specials(tok)).any()
