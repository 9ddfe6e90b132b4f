import itertools
import json
import sys

import numpy as np
import pytest

from transformer_jax.data import Windows, evaluation_batches, make_batches

END = 5


def take(batches, count):
    return [next(batches) for _ in range(count)]


def rows(batches):
    """The first token of every row. The tokens count 0, 1, 2, ..., so it identifies the window."""
    return np.concatenate([batch["tokens"][:, 0] for batch in batches])


@pytest.fixture
def windows():
    return Windows(np.arange(25 * 4 + 1 + 2, dtype=np.uint16), 4)


@pytest.mark.parametrize("num_tokens", [5, 8, 9, 10, 12, 13, 61])
def test_windows_cover_the_tokens(num_tokens):
    windows = Windows(np.arange(num_tokens, dtype=np.uint16), 4)
    examples = [windows[i] for i in range(len(windows))]
    assert all(set(example) == {"tokens", "targets"} for example in examples)
    for i, example in enumerate(examples):
        assert example["tokens"].tolist() == list(range(4 * i, 4 * i + 4))
        assert example["targets"].tolist() == list(range(4 * i + 1, 4 * i + 5))
        assert example["tokens"].dtype == example["targets"].dtype == np.int32
    # One window more would need a token that is not there.
    assert 4 * len(windows) + 1 <= num_tokens < 4 * (len(windows) + 1) + 1
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_many_windows_at_once_are_each_alone(windows):
    indices = np.array([3, 0, 24, 3])
    for name, array in windows[indices].items():
        assert array.tolist() == [windows[i][name].tolist() for i in indices]


def test_a_large_vocabulary_survives():
    tokens = np.array([1, 70_000, 2, 65_535], np.uint32)
    assert Windows(tokens, 3)[0]["targets"].tolist() == [70_000, 2, 65_535]


def test_too_short():
    with pytest.raises(ValueError, match="shorter than one window: 8 tokens available, 9 needed"):
        Windows(np.arange(8), 8)
    with pytest.raises(ValueError, match="length=0"):
        Windows(np.arange(8), 0)


def test_parts_of_a_split_share_no_token():
    tokens = np.arange(1000, dtype=np.uint16)
    token_sets = []
    for part in (tokens[:903], tokens[903:]):
        windows = Windows(part, 8)
        example = windows[np.arange(len(windows))]
        token_sets.append(set(example["tokens"].ravel()) | set(example["targets"].ravel()))
        for batch in evaluation_batches(windows, 4):
            scored = batch["weights"] > 0
            token_sets[-1] |= set(batch["tokens"][scored]) | set(batch["targets"][scored])
    assert not token_sets[0] & token_sets[1]
    assert token_sets[0] | token_sets[1] == set(range(1000))


def test_segments_grow_at_each_document():
    generator = np.random.default_rng(0)
    tokens = generator.choice([END, 7, 8, 9], size=400, p=[0.2, 0.4, 0.2, 0.2]).astype(np.uint16)
    windows = Windows(tokens, 16, end_of_text_id=END)
    for i in range(len(windows)):
        example, segment, expected = windows[i], 1, []
        for position, token in enumerate(example["tokens"]):
            segment += int(token == END and position > 0)
            expected.append(segment)
        assert example["segment_ids"].tolist() == expected
        assert example["segment_ids"].dtype == np.int32
    batch = windows[np.array([2, 5])]["segment_ids"]
    assert batch.tolist() == [windows[2]["segment_ids"].tolist(), windows[5]["segment_ids"].tolist()]


def test_an_epoch_is_every_window_once_and_each_in_another_order(windows):
    order = rows(take(make_batches(windows, batch_size=5, seed=3), 15)).reshape(3, 25)
    for epoch in order:
        assert sorted(epoch) == list(range(0, 100, 4))
    assert len({tuple(epoch) for epoch in [*order, np.arange(0, 100, 4)]}) == 4


def test_batches_run_on_over_the_end_of_an_epoch(windows):
    order = rows(take(make_batches(windows, batch_size=4, seed=3), 25))
    assert order.tolist() == rows(take(make_batches(windows, batch_size=5, seed=3), 20)).tolist()


def test_one_row_at_a_time(windows):
    order = rows(take(make_batches(windows, batch_size=1, seed=3), 25))
    assert sorted(order) == list(range(0, 100, 4))


def test_the_seed_decides_the_order(windows):
    first, again, other = (rows(take(make_batches(windows, batch_size=5, seed=s), 10)).tolist() for s in (3, 3, 4))
    assert first == again != other


def test_order_without_shuffling(windows):
    order = rows(take(make_batches(windows, batch_size=5, seed=0, shuffle=False), 10))
    assert order.tolist() == [*range(0, 100, 4), *range(0, 100, 4)]


@pytest.mark.parametrize("stop", [0, 1, 4, 7, 12])
def test_resuming_anywhere_continues_exactly(windows, stop):
    settings = {"batch_size": 4, "seed": 11}
    batches = make_batches(windows, **settings)
    take(batches, stop)
    state = json.loads(json.dumps(batches.get_state()))
    ahead = rows(take(batches, 9))
    resumed = make_batches(windows, **settings)
    resumed.set_state(state)
    assert rows(take(resumed, 9)).tolist() == ahead.tolist()
    batches.set_state(state)  # restores an earlier position when batches are already prefetched
    assert rows(take(batches, 9)).tolist() == ahead.tolist()


@pytest.mark.parametrize("process_count", [2, 3, 6])
@pytest.mark.parametrize("num_epochs", [None, 2])
def test_processes_read_the_rows_of_the_one_process_batch(windows, process_count, num_epochs):
    settings = {"batch_size": 6, "seed": 5, "num_epochs": num_epochs}
    whole = list(itertools.islice(make_batches(windows, **settings), 17))
    shares = [
        list(itertools.islice(make_batches(windows, process_index=p, process_count=process_count, **settings), 17))
        for p in range(process_count)
    ]
    assert len(whole) == (17 if num_epochs is None else 50 // 6)
    assert {len(share) for share in shares} == {len(whole)}
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            assert np.concatenate([share[step][name] for share in shares]).tolist() == array.tolist()


def test_a_process_gathers_only_its_share(windows):
    read = []

    class Recorder:
        def __len__(self):
            return len(windows)

        def __getitem__(self, indices_B):
            read.extend(indices_B.tolist())
            return windows[indices_B]

    batches = make_batches(Recorder(), batch_size=6, seed=5, process_index=1, process_count=3, num_epochs=1)
    assert [len(batch["tokens"]) for batch in batches] == [2, 2, 2, 2]
    assert len(read) == 8


def with_draws(batch, rng):
    return dict(batch) | {"draws": rng.integers(1 << 60, size=3), "more": rng.normal(size=2)}


def flat(batches):
    return [{name: array.tolist() for name, array in batch.items()} for batch in batches]


def test_a_transform_draws_afresh_for_every_batch_and_leaves_the_order(windows):
    settings = {"batch_size": 5, "seed": 3}
    batches = take(make_batches(windows, transform=with_draws, **settings), 15)
    assert rows(batches).tolist() == rows(take(make_batches(windows, **settings), 15)).tolist()
    draws = [draw for batch in batches for draw in batch["draws"].tolist()]
    assert len(set(draws)) == 45
    assert flat(batches) == flat(take(make_batches(windows, transform=with_draws, **settings), 15))
    other = take(make_batches(windows, transform=with_draws, batch_size=5, seed=4), 15)
    assert not set(draws) & {draw for batch in other for draw in batch["draws"].tolist()}


@pytest.mark.parametrize("stop", [0, 1, 4, 7, 12])
def test_resuming_anywhere_draws_the_same(windows, stop):
    settings = {"batch_size": 4, "seed": 11, "transform": with_draws}
    batches = make_batches(windows, **settings)
    take(batches, stop)
    state = json.loads(json.dumps(batches.get_state()))
    ahead = flat(take(batches, 9))
    resumed = make_batches(windows, **settings)
    resumed.set_state(state)
    assert flat(take(resumed, 9)) == ahead
    batches.set_state(state)
    assert flat(take(batches, 9)) == ahead


def test_processes_transform_their_shares_each_with_its_own_draws(windows):
    settings = {"batch_size": 6, "seed": 5, "transform": with_draws}
    whole = take(make_batches(windows, **settings), 9)
    shares = [take(make_batches(windows, process_index=p, process_count=3, **settings), 9) for p in range(3)]
    for step, batch in enumerate(whole):
        assert np.concatenate([share[step]["tokens"] for share in shares]).tolist() == batch["tokens"].tolist()
    draws = [draw for share in shares for batch in share for draw in batch["draws"].tolist()]
    assert len(set(draws)) == 3 * 9 * 3
    assert flat(shares[1]) == flat(take(make_batches(windows, process_index=1, process_count=3, **settings), 9))


def test_a_process_transforms_only_its_share(windows):
    sizes = []

    def count(batch, rng):
        sizes.append(len(batch["tokens"]))
        return batch

    list(make_batches(windows, batch_size=6, seed=5, process_index=1, process_count=3, num_epochs=1, transform=count))
    assert sizes == [2, 2, 2, 2]


def test_a_source_smaller_than_a_batch_repeats_within_it():
    order = rows(take(make_batches(Windows(np.arange(13), 4), batch_size=7, seed=0), 3))
    assert np.bincount(order, minlength=9)[::4].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "positive multiple"),
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 must be a positive multiple of process_count=4"),
        ({"batch_size": 6, "process_count": 2, "process_index": 2}, "process_index=2"),
        ({"batch_size": 6, "process_index": -1}, "process_index=-1"),
        ({"batch_size": 26, "num_epochs": 1}, "25 examples, num_epochs=1, do not fill a batch of 26"),
        ({"batch_size": 6, "num_epochs": 0}, "num_epochs=0"),
        ({"batch_size": 6, "seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings(windows, settings, message):
    with pytest.raises(ValueError, match=message):
        make_batches(windows, **{"seed": 0, **settings})


def test_grain_not_installed(windows, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match="pip install grain"):
        make_batches(windows, batch_size=5, seed=0)


@pytest.mark.parametrize("num_tokens", [5, 6, 8, 9, 40, 41, 42, 80, 81, 83])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_scores_every_token_but_the_first_once(num_tokens, batch_size):
    tokens = np.arange(100, 100 + num_tokens)
    scored = []
    for batch in evaluation_batches(Windows(tokens, 4), batch_size):
        assert {array.shape for array in batch.values()} == {(batch_size, 4)}
        assert batch["weights"].dtype == np.float32 and batch["tokens"].dtype == batch["targets"].dtype == np.int32
        real = batch["weights"] == 1
        assert np.all(batch["weights"][~real] == 0)
        assert np.array_equal(batch["targets"][real], batch["tokens"][real] + 1)
        assert not batch["targets"][~real].any() and not batch["tokens"][~real].any()
        scored += batch["targets"][real].tolist()
    assert scored == tokens[1:].tolist()


def test_evaluation_rows_are_the_windows():
    tokens = np.array([END, 7, 8, END, 9, 9, 7, END, 8, 8, 8], np.uint16)
    windows = Windows(tokens, 4, end_of_text_id=END)
    (batch,) = evaluation_batches(windows, 3)
    for name, array in windows[np.arange(2)].items():
        assert batch[name][:2].tolist() == array.tolist()
    assert batch["segment_ids"][2].tolist() == [1, 1, 0, 0]
    assert batch["weights"][2].tolist() == [1, 1, 0, 0]


def test_evaluation_errors_come_at_the_call(windows):
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        evaluation_batches(windows, 0)
