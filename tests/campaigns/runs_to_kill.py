"""A process that has imported everything and forks one child for each run, so that a killed run
costs no start.

It reads lines "KIND BASE WORKDIR OUTPUT", separated by tabs, and answers with the id of the child,
then with its exit status.
"""

import importlib
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence

import transformer_jax as tj
from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    LoraConfig,
    ReinforcementConfig,
    SampleConfig,
)

STEPS = 12
SHAPE = tj.ModelConfig(max_len=48, num_layers=1, num_heads=2, model_dim=16, dropout=0.1)
SAYINGS = ["the king said to his men that night", "we would come home", "the old cat sat on the mat",
           "and saw the dogs"]
TALKS = [{"prompt": f"what is {a} and {b}", "response": f"it is {a + b}"} for a in range(4) for b in range(4)]
RANKED = [{"prompt": f"what is {a}", "chosen": f"it is {a}", "rejected": f"{b} it"} for a in range(4) for b in range(4)]


def config(**changes):
    usual = dict(steps=STEPS, batch_size=4, log_every=1, model=SHAPE, sample=SampleConfig(every=0),
                 eval=EvalConfig(every=4), checkpoint=CheckpointConfig(every=2, keep=2),
                 data=DataConfig(tokenizer=tj.config.TokenizerConfig(kind="char", chat=True)))
    return ExperimentConfig(**(usual | changes))


def lengths_of(texts: Sequence[str]) -> list[float]:
    """A reward that needs no model."""
    return [float(len(text) % 7) for text in texts]


def train(kind: str, base: str, workdir: str | None) -> tj.Bundle:
    """Trains one kind of run in a workdir, from the start or from where it was killed."""
    import jax

    mesh = tj.sharding.make_mesh(devices=jax.devices()[:1])
    options = dict(workdir=workdir, mesh=mesh)
    texts = [*SAYINGS, *(f"{row['prompt']}, {row['response']}" for row in TALKS)]
    if kind in ("base", "language_model"):
        return tj.train(config(steps=2 if kind == "base" else STEPS), texts=[" ".join(texts)] * 2, **options)
    if kind == "masked_language_model":
        return tj.train(config(model=tj.ModelConfig(family="encoder", max_len=24, num_layers=1, num_heads=2,
                                                    model_dim=16, dropout=0.1)), texts=texts * 2, **options)
    if kind == "translation":
        path = pathlib.Path(base).parent / "pairs.tsv"
        path.write_text("".join(f"{text}\t{text[::-1]}\n" for text in SAYINGS * 8))
        model = tj.ModelConfig(family="encoder_decoder", max_len=48, num_layers=1, num_heads=2, model_dim=16,
                               dropout=0.1)
        return tj.train(config(model=model, task="translation"), data=str(path), **options)
    started = tj.load(base)
    plain = config(model=tj.ModelConfig(), data=DataConfig())
    if kind == "sft":
        data = _written(base, "talks", TALKS)
        return tj.train(plain.replace(task="sft", lora=LoraConfig(rank=2)), data=data, base=started, **options)
    if kind == "dpo":
        return tj.train(plain.replace(task="dpo"), data=_written(base, "ranked", RANKED), base=started, **options)
    rl = ReinforcementConfig(reward="runs_to_kill:lengths_of", num_prompts=8, epochs=2, max_new_tokens=4)
    prompts = _written(base, "prompts", [{"prompt": row["prompt"]} for row in TALKS])
    return tj.train(plain.replace(task="policy", rl=rl), data=prompts, base=started, **options)


def _written(base: str, name: str, rows: list[dict]) -> str:
    path = pathlib.Path(base).parent / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main() -> None:
    for name in ("grain", "orbax.checkpoint", "tensorboardX", "tensorstore", *(
            f"transformer_jax.tasks.{module}" for module in ("language_model", "masked_language_model", "translation",
                                                             "sft", "preferences", "policy"))):
        importlib.import_module(name)  # none of these imports starts a thread of JAX, which a fork would lose
    for line in sys.stdin:
        kind, base, workdir, output = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 1
            try:
                train(kind, base, workdir)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
