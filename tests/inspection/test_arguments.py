"""Arguments of the functions of inspection: each gives the right result or one clear error, and
never a different result or another error."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax import inspection
from transformer_jax.inspection import maps, plots, viewer

L, N, T, V = 2, 2, 5, 12
IDS = np.array([[1, 5, 7, 5, 2]])
CONFIG = tj.ModelConfig(vocab_size=V, max_len=1024, num_layers=L, num_heads=N, model_dim=8, positions="rope",
                        init_std=0.4)


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch):
    """Without the checks of types that the tests alone add, which would come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@functools.cache
def make(family="decoder"):
    positions = {"decoder": "rope"}.get(family, "sinusoidal")
    return tj.models.functional.make_model(CONFIG.replace(family=family, positions=positions), key=jax.random.key(0))


@functools.cache
def inspected():
    return tj.inspect_text(make(), IDS[0])


@functools.cache
def trace():
    return tj.trace(make(), IDS)


@functools.cache
def every_map():
    return np.asarray(inspected().attention())


def answer(logits):
    return logits[0, -1, 3]


RIGHT = {  # the meaning of indices, by NumPy's own rules
    "one": (dict(layers=1, heads=0, queries=2), lambda maps: maps[1, 0, 2]),
    "negative": (dict(layers=-1, heads=-2, queries=-5), lambda maps: maps[-1, -2, -5]),
    "lists": (dict(layers=[1, 0], heads=[-1], queries=[0, -1]), lambda maps: maps[np.ix_([1, 0], [-1], [0, -1])]),
    "ranges": (dict(layers=range(2), heads=range(1, 2), queries=range(3)), lambda maps: maps[:, 1:2, :3]),
    "twice": (dict(queries=[3, 3]), lambda maps: maps[:, :, [3, 3]]),
    "tuples": (dict(layers=(0,), queries=(4, 1)), lambda maps: maps[:1, :, [4, 1]]),
    "numpy": (dict(layers=np.int64(1), heads=np.uint8(1), queries=np.array([2])), lambda maps: maps[1, 1, [2]]),
    "jax": (dict(layers=jnp.int32(1), queries=jnp.array([0, -1])), lambda maps: maps[1][:, [0, -1]]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_indices_are_those_of_numpy(name):
    wanted, chosen = RIGHT[name]
    expected = chosen(every_map())
    found = inspected().attention(**wanted)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.squeeze(trace().attention(**wanted)), np.squeeze(expected), atol=1e-6)


NO_INDEX = {
    "none": ([], "is empty; pass at least one index"),
    "no tuple": ((), "is empty"),
    "no array": (np.array([], int), "is empty"),
    "text": ("1", "is not an index; pass an integer"),
    "texts": (["a", "b"], "is not an index"),
    "fraction": (1.0, "is not an index"),
    "fractions": ([0.0, 1.5], "is not an index"),
    "truth": (True, "is not an index"),
    "mask": ([True, False], "is not an index"),
    "nested": ([[0, 1]], "is not an index"),
    "ragged": ([[0], [0, 1]], "is not an index"),
    "too large": (5, "out of range"),
    "too small": (-6, "out of range"),
    "one of them": ([0, 99], "index 99 is out of range"),
    "enormous": (2**40, "out of range"),
}
TAKES_INDICES = {
    "Inspection.attention queries": lambda index: inspected().attention(queries=index),
    "Inspection.attention layers": lambda index: inspected().attention(layers=index),
    "Inspection.value_weighted heads": lambda index: inspected().value_weighted(heads=index),
    "Inspection.logit_lens": lambda index: inspected().logit_lens(index),
    "Inspection.plot": lambda index: inspected().plot(layer=index),
    "Inspection.to_html": lambda index: inspected().to_html(layer=index),
    "Trace.attention": lambda index: trace().attention(queries=index),
    "Trace.scores": lambda index: trace().scores(heads=index),
    "logit_lens": lambda index: inspection.logit_lens(make(), trace(), positions=index),
    "target_logprobs": lambda index: inspection.target_logprobs(make(), trace(), [[1]], positions=index),
    "direct_logit_attribution": lambda index: inspection.direct_logit_attribution(make(), trace(), [[1]],
                                                                                   positions=index),
    "flow": lambda index: inspection.flow(every_map()[:, 0], queries=index),
    "knock_out_edge": lambda index: tj.forward(make(), IDS, intervene=inspection.knock_out_edge(0, 0, index, 0)),
    "ablate_head": lambda index: tj.forward(make(), IDS, intervene=inspection.ablate_head(0, index)),
    "steer": lambda index: tj.forward(make(), IDS, intervene=inspection.steer(1, np.ones(8), positions=index)),
    "patch": lambda index: tj.forward(make(), IDS, intervene=inspection.patch("residual", 0, 0.0, positions=index)),
    "path_effect": lambda index: inspection.path_effect(make(), IDS, IDS, answer, sender=(0, index)),
}


@pytest.mark.parametrize("wrong", NO_INDEX)
@pytest.mark.parametrize("call", TAKES_INDICES)
def test_invalid_indices_raise(call, wrong):
    index, words = NO_INDEX[wrong]
    with pytest.raises(ValueError, match=words):
        TAKES_INDICES[call](index)


def test_the_layers_of_an_edit_count_from_0():
    for layer, words in ((-1, "counted from 0"), (None, "expected one layer or several"), ("0", "is not an index"),
                         ([], "is empty"), (2, "out of range")):
        with pytest.raises(ValueError, match=words):
            tj.forward(make(), IDS, intervene=inspection.ablate_head(layer, 0))


NO_TOKENS = {
    "text": ("abc", "'abc' is text: pass token ids"),
    "texts": (["a", "b"], "is text: pass token ids"),
    "one row": ([1, 2, 3], r"\[3\]: add the batch axis, ids\[None\]"),
    "nothing": ([], r"at least one token; got float64 \[0\]"),
    "an empty row": ([[]], r"at least one token; got float64 \[1, 0\]"),
    "fractions": ([[0.5, 1.0]], r"whole numbers \[B, T\] with at least one token; got float64"),
    "ragged": ([[1, 2], [3]], "rows of tokens differ in length: pad them"),
    "a pair": ((IDS, IDS), "a Decoder reads tokens_BT; got 2 arrays"),
    "too large": ([[1, V]], "token id 12 is outside the vocabulary of 12"),
    "negative": ([[-1]], "token id -1 is outside"),
}
TAKES_TOKENS = {
    "head_ablation_table": lambda ids: inspection.head_ablation_table(make(), ids, answer),
    "patching_grid": lambda ids: inspection.patching_grid(make(), ids, IDS, answer),
    "path_effect": lambda ids: inspection.path_effect(make(), ids, ids, answer, sender=(0, 0)),
    "input_gradient": lambda ids: inspection.input_gradient(make(), ids, answer),
    "integrated_gradients": lambda ids: inspection.integrated_gradients(make(), ids, answer, baseline=0),
}


@pytest.mark.parametrize("wrong", NO_TOKENS)
@pytest.mark.parametrize("call", TAKES_TOKENS)
def test_arrays_that_are_not_token_ids_are_refused(call, wrong):
    ids, words = NO_TOKENS[wrong]
    with pytest.raises(ValueError, match=words):
        TAKES_TOKENS[call](ids)


def test_lists_are_read_as_arrays():
    ids, weights = IDS.tolist(), every_map().tolist()
    np.testing.assert_array_equal(inspection.input_gradient(make(), ids, answer),
                                  inspection.input_gradient(make(), IDS, answer))
    for name, score in inspection.summaries(trace(), ids).items():
        np.testing.assert_array_equal(score, inspection.summaries(trace(), IDS)[name])
    for function, *others in ((inspection.entropy,), (inspection.head_agreement,), (inspection.sink_mass,),
                              (inspection.induction_score, ids[0])):
        arrays = map(np.asarray, others)
        np.testing.assert_array_equal(function(weights, *others), function(every_map(), *arrays))
    np.testing.assert_array_equal(inspection.rollout(every_map().mean(1).tolist()),
                                  inspection.rollout(every_map().mean(1)))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: inspection.entropy("abc"), r"maps are numbers \[\.\.\., T, S\]"),
    (lambda: inspection.entropy([0.5, 0.5]), r"got float64 \[2\]"),
    (lambda: inspection.head_agreement(["a"]), "maps are numbers"),
    (lambda: inspection.previous_token_score(np.ones((2, 3))), "maps of 2 queries and 3 keys need queries_T"),
    (lambda: inspection.rollout(np.ones((3, 3))), r"self-attention maps \[L, \.\.\., T, T\], one for each"),
    (lambda: inspection.rollout(np.ones((2, 3, 4))), r"one for each layer; got \[2, 3, 4\]"),
    (lambda: inspection.flow(np.ones((2, 2, 3, 3))), "flow takes one map for each layer"),
    (lambda: inspection.summaries(IDS), "trace of one kind of attention; got ndarray"),
    (lambda: inspection.summaries(tj.trace(make("encoder_decoder"), IDS, IDS)), "attention; got PairTrace"),
    (lambda: inspection.summaries(trace(), IDS[0]), r"tokens_BT has shape \(5,\); expected that of the trace"),
    (lambda: inspection.logit_lens(make(), IDS), "ndarray is not a trace: pass what transformer_jax.trace"),
    (lambda: inspection.logit_lens("gpt2", trace()), "str is not a model"),
    (lambda: inspection.logit_lens(make(), trace(), top_k=0), "top_k=0; expected a whole number from 1 to 12"),
    (lambda: inspection.logit_lens(make(), trace(), top_k=13), "top_k=13; expected a whole number from 1 to 12"),
    (lambda: inspected().logit_lens(top_k=2.0), "top_k=2.0; expected a whole number"),
    (lambda: inspected().attribution(target=V), "token id 12 is outside the vocabulary"),
    (lambda: inspected().attribution(position=[0, 1]), "pass one position"),
    (lambda: inspection.target_logprobs(make(), trace(), [[1]]), r"targets_BP has shape \(1, 1\); expected \(1, 5\)"),
    (lambda: inspection.target_logprobs(make(), trace(), [[V]], positions=-1), "token id 12 is outside"),
    (lambda: inspection.direct_logit_attribution(make(), trace(), [["a"]], positions=-1), "is text: pass token ids"),
    (lambda: inspection.integrated_gradients(make(), IDS, answer, baseline=0, steps=0), "steps=0; expected a whole"),
    (lambda: inspection.integrated_gradients(make(), IDS, answer, baseline=V), "token id 12 is outside"),
    (lambda: inspection.head_ablation_table(make(), IDS, answer, how="half"), "how='half' is not one of"),
    (lambda: inspection.head_ablation_table(make(), IDS, answer, kind="cross"), "kind='cross' is not one of self"),
    (lambda: inspection.patching_grid(make(), IDS, IDS[:, :3], answer), "clean and corrupted tokens differ in shape"),
    (lambda: inspection.patching_grid(make("encoder_decoder"), IDS, IDS, answer), r"reads \(source_BS, target_BT\)"),
    (lambda: inspection.nearest(np.eye(3), np.ones(3), top_k=4), "top_k=4; expected a whole number from 1 to 3"),
    (lambda: inspection.nearest(np.eye(3), np.ones(3), 1, exclude=[3]), "exclude=.*index 3 is out of range for 3"),
    (lambda: inspection.analogy(np.eye(9), 1, 2, 9), "index 9 is out of range for 9"),
    (lambda: inspection.analogy(np.eye(9), 1, [2.5], 3), "is not an index"),
    (lambda: tj.inspect_text(make(), ""), "strings need tokenizer="),
    (lambda: tj.inspect_text(make(), []), "empty"),
    (lambda: tj.inspect_text(make(), [0.5, 1.5]), "is not a prompt"),
    (lambda: tj.inspect_text(make(), [1] * 1025), "longer than the 1024"),
    (lambda: inspected().attention("other"), "kind='other' is not one of self"),
    (lambda: plots.attention_map("abc", list("abc")), "weights must be"),
    (lambda: viewer.AttentionMaps("abc", list("abc")), "weights must be"),
])
def test_other_wrong_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("queries", [None, "ab", 2])
def test_labels_of_a_plot_are_lists(queries):
    with pytest.raises(TypeError, match=f"queries must be a list of labels, one for each; got {queries!r}"):
        plots.attention_map(np.eye(2), queries)


def test_an_empty_text_is_read_as_the_start_token():
    tokenizer = tj.Tokenizer.train(["ab"], kind="char")
    config = CONFIG.replace(vocab_size=tokenizer.vocab_size)
    empty = tj.inspect_text(tj.Decoder(config, key=jax.random.key(0)), "", tokenizer)
    assert empty.tokens == ["<|endoftext|>"]


def test_one_token():
    one = tj.inspect_text(make(), [3])
    assert one.attention().tolist() == [[[[1.0]]] * N] * L and one.rollout().shape == (L, 1, 1)
    assert one.summaries()["entropy"].tolist() == [[0.0] * N] * L
    assert one.plot().axes[0].images and one.plot(layer=0, head=0).axes[0].images
    assert '"queries": ["3"]' in one.to_html()
    assert inspection.flow(one.attention().mean(1)).tolist() == [[1.0]]


def test_a_thousand_tokens():
    long = tj.inspect_text(make(), np.arange(1000) % V)
    row = np.asarray(long.attention(layers=1, heads=1, queries=-1))
    assert row.shape == (1000,) and abs(row.sum() - 1) < 1e-5
    figure = long.plot(layer=0)
    assert max(figure.get_size_inches()) <= 13 and "of 1000 is named" in figure.axes[0].get_ylabel()
    for call in (long.plot, long.to_html):
        with pytest.raises(ValueError, match="1000 tokens is more than the 512 that a page shows"):
            call()
    assert "1000 tokens" in long._repr_html_() and "\n" in repr(long)


def test_the_checks_leave_traced_indices_alone():
    moved = jax.jit(lambda query: trace().attention(layers=0, heads=0, queries=query))(-1)
    np.testing.assert_allclose(moved, trace().attention(layers=0, heads=0, queries=-1), atol=1e-6)
    slope = jax.grad(lambda weights: maps.entropy(weights).sum())(jnp.asarray(every_map()))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("kind", [[], [0], np.array([0]), slice(0, 1), 3])
def test_a_kind_that_is_no_name(kind):
    for call in (inspected().plot, inspected().to_html):
        with pytest.raises(ValueError, match="is not one of self"):
            call(kind=kind)


@pytest.mark.parametrize("target", [2.5, True, [0, 1], [], "a", V, -1])
def test_a_target_that_is_no_token(target):
    with pytest.raises(ValueError, match="targets_BP|is text|outside the vocabulary"):
        inspected().attribution(target=target)


def test_a_path_that_is_no_path():
    figure = plots.attention_map(np.eye(2), ["a", "b"])
    for call in (inspected().to_html, lambda path: plots.save(figure, path)):
        for path in (3, b"a.png", "a\0.png"):
            with pytest.raises(ValueError, match="expected a path|NUL"):
                call(path)
