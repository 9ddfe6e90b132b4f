"""Training steps of SAELens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


def train_saelens(pipe: Any, activation: str, sizes: Mapping[str, int]) -> None:
    """Answers a number of training steps on the pipe with the seconds that they take."""
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import (
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    torch.set_num_threads(2)
    dims = {"d_in": sizes["input_dim"], "d_sae": sizes["num_features"]}
    model = (TopKTrainingSAE(TopKTrainingSAEConfig(**dims, k=sizes["k"])) if activation == "topk" else
             StandardTrainingSAE(StandardTrainingSAEConfig(**dims)))
    rows = torch.randn(sizes["batch_size"], sizes["input_dim"])
    settings = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=sizes["batch_size"],
                                lr=1e-3, lr_end=1e-3)
    trainer: Any = SAETrainer(settings, model, iter(()))
    while True:
        count, start = pipe.recv(), time.perf_counter()
        for _ in range(count):
            trainer._train_step(model, rows)
        pipe.send(time.perf_counter() - start)
