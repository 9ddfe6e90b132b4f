"""A model is printed as a tree of its parts."""

import jax

import transformer_jax as tj
from transformer_jax.models.functional import count_parameters, make_model


def test_a_model_is_a_tree_to_read():
    config = tj.ModelConfig(vocab_size=11, max_len=8, num_layers=3, num_heads=2, model_dim=8, positions="relative")
    for family in ("decoder", "encoder", "encoder_decoder", "reward"):
        shape = config.replace(family=family)
        model = jax.eval_shape(lambda key, shape=shape: make_model(shape, key=key), jax.random.key(0))
        text = repr(model)
        assert str(model) == text
        assert text.startswith(f"{type(model).__name__}: {count_parameters(shape):,} parameters, ")
        assert "num_layers=3" in text.splitlines()[0] and "head_dim" not in text
        assert "float32 [11, 8]  (vocab, embed)" in text and "float32 [3, 8, 32]  (embed, mlp)" in text
        assert ": Stack, 3 layers" in text and max(map(len, text.splitlines()[1:])) < 80
        # Every parameter has its line.
        assert text.count("float32 [") == len(jax.tree.leaves(model))
