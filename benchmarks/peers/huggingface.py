"""The Hugging Face sides of the benchmarks: training of RoBERTa, and beam search with Marian (extra
``bench``).

The functions are workers of ``benchmarks.timing.OtherProcess``.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from transformer_jax.config import ExperimentConfig, ModelConfig
from transformer_jax.interop.huggingface import to_huggingface
from transformer_jax.interop.mapping import map_parameters, parameters
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.ops.positions import sinusoidal
from transformer_jax.training.bundle import Bundle


def roberta_training(pipe, config: ExperimentConfig, learning_rates: list[float],
                     directory: str) -> None:
    """Worker that trains RoBERTa. It answers ``("train", batches)`` with the last loss, and
    ``("evaluate", batches)`` with the mean loss.

    It is a plain PyTorch loop with AdamW and clipping, on the same batches and masks. The
    ``RobertaForMaskedLM`` comes from a directory that ``to_huggingface`` wrote.
    """
    import torch
    from torch.nn import functional
    from transformers import RobertaForMaskedLM

    torch.manual_seed(config.seed)
    optim = config.optim
    model = RobertaForMaskedLM.from_pretrained(directory)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": optim.weight_decay},
                                   {"params": others, "weight_decay": 0.0}],
                                  lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.epsilon)
    step = 0

    def losses(batch: dict[str, np.ndarray]) -> torch.Tensor:
        tokens, segments = torch.from_numpy(batch["tokens"]).long(), torch.from_numpy(batch["segment_ids"])
        labels = torch.full(tokens.shape, -100)
        rows, places = np.nonzero(batch["masked_weights"])
        labels[rows, batch["masked_positions"][rows, places]] = torch.from_numpy(
            batch["masked_targets"][rows, places]).long()
        mask = (segments[:, None, :, None] == segments[:, None, None, :]) & (segments != 0)[:, None, None, :]
        # Padding attends to itself, because its softmax would otherwise be NaN.
        mask = mask | torch.eye(tokens.shape[1], dtype=torch.bool)
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        places = torch.arange(tokens.shape[1]).expand(tokens.shape)
        positions = places - torch.cummax(torch.where(starts, places, 0), dim=1).values
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        positions = positions + config.model.position_offset
        logits = model(input_ids=tokens, attention_mask=bias, position_ids=positions).logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    while True:
        command, batches = pipe.recv()
        total = weight = 0.0
        model.train(command == "train")
        for batch in batches:
            if command == "train":
                for group in optimizer.param_groups:
                    group["lr"] = learning_rates[step]
                loss = losses(batch) / float(batch["masked_weights"].sum())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
                optimizer.step()
                step += 1
                total, weight = float(loss), 1.0
            else:
                with torch.no_grad():
                    total += float(losses(batch))
                weight += float(batch["masked_weights"].sum())
        pipe.send(total / weight)


def marian_beam_search(pipe, config: ModelConfig, directory: str, ids: dict[str, int], beam_size: int,
                       length_penalty: float, max_new_tokens: int) -> None:
    """Worker that answers lists of source token ids with the best target token ids that
    ``MarianMTModel.generate`` finds."""
    import torch

    model = marian(config, directory, ids)
    while True:
        sources = pipe.recv()
        width = max(map(len, sources))
        tokens = torch.tensor([source + [ids["pad"]] * (width - len(source)) for source in sources])
        mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in sources])
        with torch.no_grad():
            found = model.generate(tokens, attention_mask=mask, num_beams=beam_size, do_sample=False, use_cache=True,
                                   length_penalty=length_penalty, max_new_tokens=max_new_tokens)
        # Rows that are shorter than the longest are padded with </s>, so the answer ends at the
        # first one.
        pipe.send([row[1:row.index(ids["eos"], 1) + 1] if ids["eos"] in row[1:] else row[1:] for row in found.tolist()])


def marian(config: ModelConfig, directory: str, ids: dict[str, int]) -> Any:
    """Loads a ``MarianMTModel`` from a directory that ``write_marian`` wrote."""
    import torch
    from transformers import MarianMTModel

    model = MarianMTModel.from_pretrained(directory, pad_token_id=ids["pad"], eos_token_id=ids["eos"]).eval()
    generation = model.generation_config
    generation.bad_words_ids = generation.forced_eos_token_id = None
    generation.decoder_start_token_id, generation.eos_token_id, generation.pad_token_id = (
        ids["bos"], ids["eos"], ids["pad"])
    # This library alternates sines and cosines, which config.json cannot express.
    positions = torch.from_numpy(np.array(sinusoidal(np.arange(config.max_len), config.model_dim)))
    for side in (model.model.encoder, model.model.decoder):
        side.embed_positions.weight.data.copy_(positions)
    return model


def write_marian(model: EncoderDecoder, directory: str) -> None:
    """Writes the weights of an encoder-decoder as a Marian model, whose sinusoids have another
    order.

    Raises:
      ValueError: If the model does not have the architecture of Vaswani et al. (2017).
    """
    config = model.config
    if (config.norm_position, config.positions, config.use_qk_norm) != ("post", "sinusoidal", False):
        raise ValueError("Marian has the architecture of the paper; use a model that was trained with --config.model."
                         "norm_position=post --config.model.positions=sinusoidal --config.model.use_qk_norm=false")
    config = config.replace(positions="sinusoidal_halves", use_output_bias=True)
    shapes = jax.eval_shape(lambda key: EncoderDecoder(config, key=key), jax.random.key(0))
    weights = parameters(model)
    to_huggingface(Bundle(map_parameters(
        lambda path, node: weights.get(path) or node.replace(np.zeros(node.shape, node.dtype)), shapes), None, config),
        directory)
