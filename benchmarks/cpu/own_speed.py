"""Measures the speed of one checkout, so that two checkouts can be compared in alternating runs.

for round in 1 2 3 4 5; do for checkout in OLD NEW; do
    PYTHONPATH=$checkout python benchmarks/cpu/own_speed.py; done; done

It imports only names that have not changed since commit 0d36f73. It prints milliseconds as JSON:
the medians of a training step (4 layers x 128, 12 x 64 tokens) and of greedy decoding of 200
tokens, and the time of the import, after jax is imported.
"""

import json
import statistics
import time

import jax
import numpy as np

_WARM_UP = 5


def main() -> None:
    """Measures the import, decoding and training, and prints the results."""
    start = time.perf_counter()
    import transformer_jax as tj

    _ = tj.Decoder
    imported = time.perf_counter() - start
    from transformer_jax.runtime import keep_freed_memory

    keep_freed_memory()
    config = tj.ModelConfig(vocab_size=65, max_len=256, num_layers=4, num_heads=4, model_dim=128)
    model = tj.Decoder(config, key=jax.random.key(0))
    decoding = _median(lambda: tj.generate(model, [[1, 2, 3]], max_new_tokens=200, sampling=tj.Sampling(temperature=0)),
                       60)
    print(json.dumps({"step_ms": _training_step(), "decode_ms": decoding, "import_ms": 1e3 * imported}))


def _training_step() -> float:
    """Returns the median milliseconds of a training step."""
    import transformer_jax as tj
    from transformer_jax.config import OptimConfig
    from transformer_jax.training.objectives import next_token_loss
    from transformer_jax.training.optimizer import make_optimizer
    from transformer_jax.training.state import init_state
    from transformer_jax.training.step import make_train_step

    config = tj.ModelConfig(vocab_size=65, max_len=64, num_layers=4, num_heads=4, model_dim=128, unroll=4)
    optimizer = make_optimizer(OptimConfig(), 100)
    state = init_state(lambda key: tj.Decoder(config, key=key), optimizer, jax.random.key(0))
    step = make_train_step(next_token_loss(), optimizer)
    draw = np.random.default_rng(0)
    batch = {name: draw.integers(65, size=(12, 64)).astype(np.int32) for name in ("tokens", "targets")}

    def once() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return _median(once, 300)


def _median(run, rounds: int) -> float:
    """Returns the median milliseconds of a call, without the first calls, which compile."""
    seconds = []
    for _ in range(rounds + _WARM_UP):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[_WARM_UP:])


if __name__ == "__main__":
    main()
