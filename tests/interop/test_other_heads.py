"""Models with heads for other tasks, and files that contradict their ``config.json``: what
transformers computes with them. The hidden states are those of the fixtures."""

import numpy as np
import pytest
from fixture_weights import MODELS, model_directory
from test_saved_forms import change, put, tensors_of

import transformer_jax as tj

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")


def check_hidden(bundle, case):
    wanted = np.load(MODELS / case / "expected.npz")
    if bundle.config.family == "encoder_decoder":
        out = bundle.model(wanted["source"].astype(np.int32), wanted["target"].astype(np.int32),
                           source_segment_ids_BS=wanted["mask"].astype(np.int32))
        real = np.ones(wanted["target"].shape, bool)
    else:
        mask = wanted["mask"] if "mask" in wanted else np.ones(wanted["tokens"].shape, int)
        out = bundle.model(wanted["tokens"].astype(np.int32), segment_ids_BT=mask.astype(np.int32))
        real = mask == 1
    np.testing.assert_allclose(np.asarray(out.hidden)[real], wanted["hidden"][real], atol=2e-5)
    return out, wanted


# The head of each class in transformers 5, and the prefix of its other tensors.
HEADS = [
    ("gpt2-automodel", "GPT2DoubleHeadsModel", "multiple_choice_head.summary", ""),
    ("llama2-automodel", "LlamaForQuestionAnswering", "qa_outputs", "transformer."),
    ("minilm-automodel", "BertForMultipleChoice", "classifier", "bert."),
    ("roberta-automodel", "RobertaForQuestionAnswering", "qa_outputs", "roberta."),
    ("bart_base-automodel", "BartForSequenceClassification", "classification_head.dense", "model."),
    ("t5-automodel", "T5ForQuestionAnswering", "qa_outputs", ""),
    ("t5-automodel", "T5ForSequenceClassification", "classification_head.dense", "transformer."),
]


@pytest.mark.long
@pytest.mark.parametrize(("case", "name", "head", "prefix"), HEADS)
def test_the_body_of_a_model_for_another_task(case, name, head, prefix, tmp_path):
    directory = model_directory(case, tmp_path)
    tensors = {prefix + tensor: value for tensor, value in tensors_of(directory).items()}
    put(directory, tensors | {f"{head}.weight": np.ones((2, 3), np.float32), f"{head}.bias": np.ones(2, np.float32)})
    change(directory, architectures=[name])
    with pytest.warns(UserWarning, match=f"holds a {name}; its head for that task is left out: {head}.bias, {head}"):
        bundle = tj.from_huggingface(directory)
    check_hidden(bundle, case)


def test_a_head_for_another_task_may_have_a_part_of_ours(tmp_path):
    """The hidden layer of all heads of ModernBERT has the same names."""
    directory = model_directory("modernbert-published", tmp_path)
    tensors = tensors_of(directory)
    hidden = tensors["head.dense.weight"]
    del tensors["decoder.bias"]
    put(directory, tensors | {"classifier.weight": np.ones((2, 12), np.float32)})
    change(directory, architectures=["ModernBertForQuestionAnswering"])
    with pytest.warns(UserWarning, match="the head is new and untrained: head.bias"):
        bundle = tj.from_huggingface(directory)
    check_hidden(bundle, "modernbert-published")
    np.testing.assert_array_equal(bundle.model.head.transform.kernel[...], hidden.T)


def test_tensors_of_a_head_that_nothing_names_are_left_over(tmp_path):
    directory = model_directory("gpt2-automodel", tmp_path)
    put(directory, tensors_of(directory) | {"score.weight": np.ones((2, 12), np.float32)})
    with pytest.raises(ValueError, match=r"left over: score\.weight$"):
        tj.from_huggingface(directory)


@pytest.mark.parametrize(("case", "head", "table"), [
    ("gpt2-published", "lm_head.weight", "wte.weight"),
    ("llama3-published", "lm_head.weight", "model.embed_tokens.weight"),
    ("bart-transformers5", "lm_head.weight", "model.shared.weight"),
    ("t5-published", "lm_head.weight", "shared.weight"),
])
def test_a_stored_head_that_differs_from_the_embeddings_is_read(case, head, table, tmp_path):
    """transformers 5 does not tie them, whatever ``config.json`` says."""
    directory = model_directory(case, tmp_path)
    tensors = tensors_of(directory)
    put(directory, tensors | {head: -2 * tensors[table]})
    with pytest.warns(UserWarning, match="have different values for the two; they are read as two tables"):
        bundle = tj.from_huggingface(directory)
    assert not bundle.config.tie_embeddings
    out, wanted = check_hidden(bundle, case)
    if not bundle.config.use_output_bias:
        np.testing.assert_allclose(out.logits, -2 * wanted["logits"], atol=1e-4)


@pytest.mark.parametrize("case", ["bert-transformers5", "roberta-transformers5"])
def test_the_bias_of_an_untied_encoder(case, tmp_path):
    """With an unembedding of its own, version 5 uses ``decoder.bias``; version 4 stored only
    ``bias``."""
    directory = model_directory(case, tmp_path)
    tensors = tensors_of(directory)
    name = "cls.predictions" if case.startswith("bert") else "lm_head"
    table = next(value for tensor, value in tensors.items() if tensor.endswith("word_embeddings.weight"))
    bias = tensors.pop(f"{name}.bias")
    tensors.pop(f"{name}.decoder.bias", None)
    change(directory, tie_word_embeddings=False)
    for biases in ({f"{name}.decoder.bias": bias, f"{name}.bias": bias + 1}, {f"{name}.bias": bias},
                   {f"{name}.decoder.bias": bias}):
        put(directory, tensors | {f"{name}.decoder.weight": table} | biases)
        out, wanted = check_hidden(tj.from_huggingface(directory), case)
        real = wanted["mask"] == 1
        np.testing.assert_allclose(np.asarray(out.logits)[real], wanted["logits"][real], atol=2e-5)
