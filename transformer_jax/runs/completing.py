"""What completes a config before a run: the tokenizer, and the shape of the model that follows from
it."""

from __future__ import annotations

from collections.abc import Iterable

from jax.sharding import Mesh

from transformer_jax.config import DataConfig, ExperimentConfig, ModelConfig, TokenizerConfig
from transformer_jax.data import Tokenizer
from transformer_jax.settings import differences
from transformer_jax.training.bundle import Bundle

# Of a model's config what a run that starts from a trained model sets anew.
_TUNABLE = ("dropout", "attention_dropout")


def make_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a config names, or one trained on texts."""
    settings = config.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path)
        if settings.chat:
            _ = tokenizer.role_ids  # ValueError without them
        return tokenizer
    return Tokenizer.train(texts, kind=settings.kind, vocab_size=settings.vocab_size,
                           min_frequency=settings.min_frequency, chat=settings.chat)


def model_config_for(config: ExperimentConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's vocabulary is the tokenizer's; an encoder, which never draws a token, may have
    room for more."""
    given = config.model.vocab_size
    if given is None or given == tokenizer.vocab_size:
        return config.model.replace(vocab_size=tokenizer.vocab_size)
    if config.model.family != "encoder" or given < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size={given}, but the tokenizer has {tokenizer.vocab_size} pieces; leave "
                         "model.vocab_size out")
    return config.model


def model_config_from(config: ExperimentConfig, base: Bundle) -> ModelConfig:
    """The model is the base, but for its dropout; ValueError for settings of another one."""
    set_here = differences(ModelConfig(), config.model.replace(**{field: getattr(ModelConfig(), field)
                                                                  for field in _TUNABLE}), "model.")
    set_here += differences(TokenizerConfig(), config.data.tokenizer, "data.tokenizer.")
    if set_here:
        raise ValueError(f"model and tokenizer are those of --model; of them a config may set {', '.join(_TUNABLE)} "
                         f"alone, not {'; '.join(set_here)}")
    return base.config.replace(**{field: getattr(config.model, field) for field in _TUNABLE})


def check_batch_size(config: ExperimentConfig, mesh: Mesh) -> None:
    """Raises ValueError for a batch that the devices of a mesh cannot share evenly."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % shares:
        raise ValueError(f"batch_size={config.batch_size} does not divide among the {shares} devices of mesh.data "
                         "x mesh.fsdp")
    if config.optim.gradient_dtype is not None and config.batch_size // shares % config.optim.accumulation:
        raise ValueError(f"with optim.gradient_dtype the {config.batch_size // shares} rows of a device, which are "
                         f"batch_size={config.batch_size} over {shares} devices, must split into optim.accumulation="
                         f"{config.optim.accumulation} parts")
