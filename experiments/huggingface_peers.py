"""Peers of the benchmarks among Hugging Face's models: RoBERTa in training, Marian in beam search (extra ``bench``).

Workers of :class:`experiments.timing.OtherProcess`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from transformer_jax.config import ExperimentConfig, ModelConfig


def roberta_training(pipe, config: ExperimentConfig, learning_rates: list[float],
                     weights: dict[str, np.ndarray]) -> None:
    """Answers ``("train", batches)`` with the last loss and ``("evaluate", batches)`` with the mean loss.

    A plain PyTorch loop around ``RobertaForMaskedLM``: the weights to begin with, AdamW, clipping, the same batches and
    masks.
    """
    import torch
    from torch.nn import functional
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(config.seed)
    shape, optim = config.model, config.optim
    model = RobertaForMaskedLM(RobertaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.model_dim, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.mlp_dim, hidden_act="gelu",
        hidden_dropout_prob=shape.dropout, attention_probs_dropout_prob=shape.dropout,
        max_position_embeddings=shape.max_len + 1, type_vocab_size=shape.num_token_types, pad_token_id=0,
        layer_norm_eps=shape.norm_epsilon))
    _load(model, weights, tied=("lm_head.decoder.weight", "lm_head.decoder.bias"))
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
        mask = mask | torch.eye(tokens.shape[1], dtype=torch.bool)  # padding looks at itself, or it would be NaN
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        places = torch.arange(tokens.shape[1]).expand(tokens.shape)
        positions = places - torch.cummax(torch.where(starts, places, 0), dim=1).values
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        logits = model(input_ids=tokens, attention_mask=bias, position_ids=positions + 1).logits
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


def marian_beam_search(pipe, config: ModelConfig, weights: dict[str, np.ndarray], ids: dict[str, int],
                       beam_size: int, length_penalty: float, max_new_tokens: int) -> None:
    """Answers lists of source token ids with the best target token ids that ``MarianMTModel.generate`` finds."""
    import torch

    model = marian(config, weights, ids)
    while True:
        sources = pipe.recv()
        width = max(map(len, sources))
        tokens = torch.tensor([source + [ids["pad"]] * (width - len(source)) for source in sources])
        mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in sources])
        with torch.no_grad():
            found = model.generate(tokens, attention_mask=mask, num_beams=beam_size, do_sample=False, use_cache=True,
                                   length_penalty=length_penalty, max_new_tokens=max_new_tokens)
        # Rows that end before the longest are filled up, with </s> itself.
        pipe.send([row[1:row.index(ids["eos"], 1) + 1] if ids["eos"] in row[1:] else row[1:] for row in found.tolist()])


def marian(config: ModelConfig, weights: dict[str, np.ndarray], ids: dict[str, int]) -> Any:
    """A ``MarianMTModel`` of the config's shape with the weights from :func:`marian_weights`."""
    from transformers import MarianConfig, MarianMTModel

    layers = dict(attention_heads=config.num_heads, ffn_dim=config.mlp_dim)
    model = MarianMTModel(MarianConfig(
        vocab_size=config.vocab_size, d_model=config.model_dim, activation_function="relu", scale_embedding=True,
        encoder_layers=config.num_encoder_layers, decoder_layers=config.num_decoder_layers,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in layers.items()},
        max_position_embeddings=config.max_len, pad_token_id=ids["pad"], eos_token_id=ids["eos"],
        decoder_start_token_id=ids["bos"], forced_eos_token_id=None)).eval()
    model.generation_config.bad_words_ids = None
    _load(model, weights, tied=("lm_head.weight", "final_logits_bias"))
    return model


def _load(model: Any, weights: dict[str, np.ndarray], tied: tuple[str, ...]) -> None:
    """Puts weights into a model; those that are tied to others need not be given."""
    import torch

    missing, unexpected = model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()},
                                                strict=False)
    if unexpected or set(missing) - set(tied):
        raise ValueError(f"weights that do not fit: missing {missing}, unexpected {unexpected}")


def roberta_weights(model: Any) -> dict[str, np.ndarray]:
    """The weights of an ``Encoder`` in RoBERTa's shape under the names of ``RobertaForMaskedLM``."""
    tables = model.embeddings
    # RoBERTa counts positions from the row after that of padding.
    positions = np.pad(np.asarray(tables.position[...]), ((1, 0), (0, 0)))
    weights = {"roberta.embeddings.word_embeddings.weight": np.array(tables.token[...]),
               "roberta.embeddings.position_embeddings.weight": positions,
               "roberta.embeddings.token_type_embeddings.weight": np.array(tables.token_type[...]),
               "lm_head.bias": np.array(model.head.bias[...])}
    weights |= _linear("lm_head.dense", model.head.transform) | _norm("lm_head.layer_norm", model.head.norm)
    weights |= _norm("roberta.embeddings.LayerNorm", tables.norm)
    for layer in range(model.stack.num_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], model.stack.blocks)
        prefix = f"roberta.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            weights |= _linear(f"{prefix}.attention.self.{name}", getattr(block.attention, name))
        weights |= _linear(f"{prefix}.attention.output.dense", block.attention.output)
        weights |= _norm(f"{prefix}.attention.output.LayerNorm", block.attention_norm)
        weights |= _linear(f"{prefix}.intermediate.dense", block.mlp.up)
        weights |= _linear(f"{prefix}.output.dense", block.mlp.down)
        weights |= _norm(f"{prefix}.output.LayerNorm", block.mlp_norm)
    return weights


def _linear(name: str, linear: Any) -> dict[str, np.ndarray]:
    return {f"{name}.weight": np.asarray(linear.kernel[...]).T.copy(), f"{name}.bias": np.array(linear.bias[...])}


def _norm(name: str, norm: Any) -> dict[str, np.ndarray]:
    return {f"{name}.weight": np.array(norm.scale[...]), f"{name}.bias": np.array(norm.bias[...])}


def marian_weights(model: Any) -> dict[str, np.ndarray]:
    """The weights of a post-norm ``EncoderDecoder`` with sinusoidal positions under Marian's names."""
    import jax.numpy as jnp

    from transformer_jax.ops.positions import sinusoidal

    config = model.config
    if (config.norm_position, config.positions, config.use_qk_norm) != ("post", "sinusoidal", False):
        raise ValueError("Marian has the form of the paper: compare with a model trained with --config.model."
                         "norm_position=post --config.model.positions=sinusoidal --config.model.use_qk_norm=false")
    shared = np.array(model.embeddings.token[...])
    positions = np.array(sinusoidal(jnp.arange(config.max_len), config.model_dim))
    weights = {f"model.{name}": shared for name in ("shared.weight", "encoder.embed_tokens.weight",
                                                    "decoder.embed_tokens.weight")}
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        weights[f"model.{side}.embed_positions.weight"] = positions
        for layer in range(stack.num_layers):
            block = jax.tree.map(lambda x, layer=layer: x[layer], stack.blocks)
            linears = {"fc1": block.mlp.up, "fc2": block.mlp.down}
            norms = {"self_attn_layer_norm": block.attention_norm, "final_layer_norm": block.mlp_norm}
            attentions = {"self_attn": block.attention}
            if block.cross_attention is not None:
                attentions["encoder_attn"] = block.cross_attention
                norms["encoder_attn_layer_norm"] = block.cross_norm
            for name, attention in attentions.items():
                linears |= {f"{name}.q_proj": attention.query, f"{name}.k_proj": attention.key,
                            f"{name}.v_proj": attention.value, f"{name}.out_proj": attention.output}
            for name, linear in linears.items():
                weights |= _linear(f"model.{side}.layers.{layer}.{name}", linear)
            for name, norm in norms.items():
                weights |= _norm(f"model.{side}.layers.{layer}.{name}", norm)
    return weights
