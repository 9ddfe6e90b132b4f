"""TRL's GRPO trainer as the other side of ``benchmarks rl`` (extra ``bench``).

TRL 1.16 has no PPO trainer any more. Its GRPO has the same rollouts, epochs of minibatches, clipped
ratios and reference, but no critic.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable

from transformer_jax.config import ExperimentConfig


def grpo_training(pipe, config: ExperimentConfig, words: list[str], prompts: list[str],
                  reward: Callable[[list[str]], list[float]]) -> None:
    """Worker that makes a rollout and its updates for each message, and answers with the mean
    length of the responses.

    Args:
      pipe: The pipe to the benchmark.
      config: The config, of which ``model`` (with the architecture of GPT-2), ``rl``,
        ``batch_size`` and ``optim.peak_lr`` are used.
      words: The vocabulary.
      prompts: The prompts, which are words separated by spaces.
      reward: A function from the texts of responses to their rewards.
    """
    warnings.filterwarnings("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    shape, settings = config.model, config.rl
    word_level = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token=words[0], pad_token=words[1],
                                        eos_token=words[2])
    torch.manual_seed(config.seed)
    policy = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(words), n_positions=shape.max_len, n_embd=shape.model_dim, n_layer=shape.num_layers,
        n_head=shape.num_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=2, eos_token_id=2,
        pad_token_id=1))

    per_rollout = settings.epochs * settings.num_prompts * settings.num_samples // config.batch_size
    lengths: list[float] = []

    def rewards(completions: list[str], **columns) -> list[float]:
        del columns
        lengths.append(sum(len(text.split()) for text in completions) / len(completions))
        return reward(completions)

    class Turns(TrainerCallback):
        """Waits for a message before each rollout, and answers after its updates."""

        def on_step_begin(self, args, state, control, **others):
            if state.global_step % per_rollout == 0:
                pipe.recv()

        def on_step_end(self, args, state, control, **others):
            if state.global_step % per_rollout == 0:
                pipe.send(lengths[-1])

    with tempfile.TemporaryDirectory() as directory:
        for part in (policy, tokenizer):  # the trainer loads the reference model from this directory
            part.save_pretrained(directory)
        GRPOTrainer(
            model=GPT2LMHeadModel.from_pretrained(directory), reward_funcs=rewards, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[Turns()],
            args=GRPOConfig(
                output_dir=directory, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
                save_strategy="no", logging_steps=1000, disable_tqdm=True, max_steps=10**6,
                per_device_train_batch_size=config.batch_size, num_generations=settings.num_samples,
                generation_batch_size=settings.num_prompts * settings.num_samples, num_iterations=settings.epochs,
                max_completion_length=settings.max_new_tokens, temperature=1.0, beta=settings.kl_coefficient,
                epsilon=settings.clip, learning_rate=config.optim.peak_lr)).train()
