"""The studies of circuits as a whole, at toy size, and the parts of them that can be computed in
another way."""

import re

import numpy as np
import pytest
from PIL import Image

from experiments import alignment_data, alignment_study, modular_data
from experiments.study_training import DrawnBatches


def test_frequencies_are_those_of_numpy():
    """The power of each frequency, against the fast Fourier transform of NumPy."""
    waves, vectors = modular_data.Waves(), np.random.default_rng(0).normal(size=(modular_data.PRIME, 5))
    powers = np.square(np.abs(np.fft.rfft(vectors, axis=0)))[1:].sum(1)
    np.testing.assert_allclose(waves.shares(vectors), powers / powers.sum(), rtol=1e-10)
    everything = waves.part(vectors, waves.frequencies)
    np.testing.assert_allclose(everything + vectors.mean(0), vectors, atol=1e-12)
    np.testing.assert_allclose(waves.part(vectors, [3]) + waves.part(vectors, [7, 20]),
                               waves.part(vectors, [20, 3, 7]), atol=1e-12)


def test_turned_frequencies_are_those_of_larger_numbers():
    waves, vectors = modular_data.Waves(), np.random.default_rng(1).normal(size=(modular_data.PRIME, 3))
    part = waves.part(vectors, [2, 11])
    np.testing.assert_allclose(waves.part(vectors, [2, 11], turned_by=4), np.roll(part, -4, axis=0), atol=1e-12)
    other = waves.part(vectors, [5], turned_by=0.5)
    assert np.abs(other - waves.part(vectors, [5])).max() > 0.01
    np.testing.assert_allclose(np.square(other).sum(), np.square(waves.part(vectors, [5])).sum())


def test_additions_are_right_and_none_is_in_both_parts():
    pairs = modular_data.Additions(0, 0.4)
    rows = np.concatenate([pairs.train, pairs.held_out])
    assert len(pairs.train) == int(0.4 * 59**2) and len({(a, b) for a, b, *_ in rows.tolist()}) == len(rows) == 59**2
    assert all(answer == (a + b) % 59 and equals == 59 for a, b, equals, answer in rows.tolist())
    noise = modular_data.Additions(0, 0.4, is_random=True)
    np.testing.assert_array_equal(noise.train[:, :3], pairs.train[:, :3])
    assert (noise.train[:, 3] == pairs.train[:, 3]).mean() < 0.1
    batch = next(DrawnBatches(pairs.draw, 8, 0))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :2])
    assert batch["weights"].tolist() == [[0, 0, 1]] * 8


def test_translations_are_aligned_word_by_word():
    words = {**alignment_data.VERBS, **alignment_data.OTHERS}
    pairs = alignment_data.Translations(np.random.default_rng(0), 60)
    moved = 0
    for row, (source, target) in enumerate(pairs.texts):
        assert len(source) == len(target) <= alignment_data.LENGTH and source[-1] == target[-1] == "</s>"
        places = pairs.aligned[row, :len(target) - 1].tolist()
        assert sorted(places) == list(range(len(source) - 1)) and (pairs.aligned[row, len(places):] == -1).all()
        genders = []
        for position, place in enumerate(places):
            theirs, ours = source[place], target[position]
            moved += place != position
            if theirs in alignment_data.NOUNS:
                assert alignment_data.NOUNS[theirs].split() == [ours, genders[-1]]
                assert source[place + 1:place + 2][0] not in alignment_data.ADJECTIVES
            elif theirs in alignment_data.DETERMINERS:
                genders.append("mf"[alignment_data.DETERMINERS[theirs].split().index(ours)])
            elif theirs in alignment_data.ADJECTIVES:
                assert ours == alignment_data.ADJECTIVES[theirs] + {"m": "o", "f": "a"}[genders[-1]]
            else:
                assert ours == words[theirs]
        read = [alignment_data.WORDS[token] for token in pairs.batch["source"][row] if token]
        written = [alignment_data.WORDS[token] for token in pairs.batch["targets"][row] if token]
        assert read == source and written == target
        tokens, targets = (pairs.batch[name][row, :len(target)].tolist() for name in ("tokens", "targets"))
        assert tokens[1:] == targets[:-1]
    assert moved > 100 and len(alignment_data.IDS) == len(alignment_data.WORDS)


def test_the_weight_on_the_aligned_word():
    """Against a loop, on random maps."""
    rng = np.random.default_rng(0)
    maps, aligned = rng.random((2, 3, 4, 5, 6)), np.array([[2, 0, -1, -1, -1], [1, 3, 5, 2, -1], [0, -1, 4, 1, -1]])
    for layer, head in np.ndindex(2, 4):
        found = [maps[layer, row, head, place, aligned[row, place]] for row, place in np.argwhere(aligned >= 0)]
        np.testing.assert_allclose(alignment_study.weight_on(maps, aligned)[layer, head], np.mean(found))
    own, other = alignment_study.contrasted(aligned)
    assert own.tolist() == [[2, -1, -1, -1, -1], [1, 3, -1, -1, -1], [0, -1, 4, 1, -1]]
    assert other.tolist() == [[0, -1, -1, -1, -1], [2, 0, -1, -1, -1], [1, -1, 5, 2, -1]]


def test_other_heads_are_none_of_those():
    drawn = alignment_study.other_heads([(0, 1), (1, 0), (1, 3)])
    assert len(drawn) == 10 and {kind for others in drawn for kind, *_ in others} == {"cross", "self", "encoder"}
    for others in drawn:
        assert len(set(others)) == 3 and not {("cross", 0, 1), ("cross", 1, 0), ("cross", 1, 3)} & set(others)


def test_nouns_that_are_exchanged():
    pairs = alignment_data.Translations(np.random.default_rng(3), 40)
    of_nouns, of_others, wanted = alignment_study.noun_orders(pairs)
    assert len(wanted) > 5
    for row, position, word in wanted:
        source, target = pairs.texts[row]
        first = pairs.aligned[row, position]
        second = of_nouns[row, first]
        nouns = [alignment_data.NOUNS[source[place]].split() for place in (first, second)]
        assert nouns[0][0] == target[position] and nouns[1][0] == word != target[position]
        assert nouns[0][1] == nouns[1][1]
        assert of_nouns[row, second] == first and of_others[row, first - 1] == second - 1 > first
    for order in (of_nouns, of_others):
        np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(alignment_data.LENGTH), (40, 1)))


@pytest.mark.long
@pytest.mark.parametrize(("name", "steps", "figures", "verdicts"), [
    ("modular_addition", 30, ["onset.png", "frequencies.png"], 1),
    ("alignment_heads", 20, ["heads.png", "alignment.png"], 3),
    ("induction", 20, ["onset.png", "induction.png"], 0),
    ("indirect_objects", 20, ["faithfulness.png"], 1)])
def test_a_study_runs_and_does_not_confirm_what_was_not_learned(program, tmp_path, one_device, name, steps, figures,
                                                                verdicts):
    ended = program(name, f"--workdir={tmp_path}", f"--steps={steps}")
    assert ended.status == 0, ended
    assert len(re.findall("REFUTED|confirmed", ended.out)) >= verdicts and (not verdicts or "REFUTED" in ended.out)
    for figure in figures:
        with Image.open(tmp_path / figure) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
