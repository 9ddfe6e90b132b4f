"""Trains an assistant that praises films: pretraining on film reviews, fine-tuning, a reward model,
DPO and PPO. At the end it compares the assistants.

python -m experiments.assistant --data=../shared/data --workdir=runs/assistant

Each stage is a separate run in the workdir, and the same command resumes a stopped stage. The judge
is a bag-of-words classifier, which is trained on reviews and sentences that no stage sees. --quick
runs every stage for a minute in all, with a model that is too small to learn.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time
from collections.abc import Sequence

from absl import flags

import transformer_jax as tj
from experiments import assistant_data
from transformer_jax.alignment import comparison
from transformer_jax.alignment.judging import distinct_n, win_rate
from transformer_jax.cli.flags import directory, run
from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    PreferenceConfig,
    ReinforcementConfig,
    SampleConfig,
    TokenizerConfig,
)
from transformer_jax.runs.evaluation import evaluate
from transformer_jax.runs.training import train
from transformer_jax.tasks.policy import PolicyLearning, load_reward
from transformer_jax.training.metrics import read_metrics

_DATA = flags.DEFINE_string("data", "../shared/data",
                            "The folder with movie_reviews, sentence_polarity and english_novels.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/assistant", "The directory for all results.")
_QUICK = flags.DEFINE_boolean("quick", False, "Only test that every stage runs, with a very small model.")

_NEW_TOKENS = 48


def configs(quick: bool) -> dict[str, ExperimentConfig]:
    """Returns the config of every stage, by its name. ``quick`` selects very small sizes."""
    def steps(full: int) -> int:
        return 4 if quick else full

    def optim(peak_lr: float, schedule: str = "linear", **changes) -> OptimConfig:
        return OptimConfig(peak_lr=peak_lr, schedule=schedule, end_lr=0.0, warmup_steps=steps(20) - 1, beta2=0.95,
                           **{"weight_decay": 0.01} | changes)

    shape = dict(num_layers=2, num_heads=2, model_dim=32, unroll=2) if quick else dict(
        num_layers=4, num_heads=4, model_dim=256, unroll=4)
    keep = CheckpointConfig(every=100, keep=1)
    sample = SampleConfig(every=steps(10_000), max_new_tokens=_NEW_TOKENS, temperature=1.0)
    tuned = ModelConfig(dropout=0.1)
    return {
        "base": ExperimentConfig(
            steps=steps(2000), batch_size=16,
            model=ModelConfig(max_len=256 if quick else 128, positions="rope", norm="rmsnorm", activation="gelu_tanh",
                              use_bias=False, use_qk_norm=True, **shape),
            data=DataConfig(tokenizer=TokenizerConfig(kind="bpe", vocab_size=600 if quick else 4000, min_frequency=2,
                                                      chat=True)),
            optim=optim(3e-3, "wsd", name="muon", muon_lr=0.02, decay_fraction=0.4),
            checkpoint=CheckpointConfig(every=400, keep=1), eval=EvalConfig(every=steps(800), batch_size=16),
            sample=SampleConfig(every=steps(1200), prompt="the film ")),
        "sft": ExperimentConfig(
            task="sft", steps=steps(400), batch_size=8, model=tuned, optim=optim(5e-4), checkpoint=keep,
            eval=EvalConfig(every=steps(100)), sample=sample),
        "reward": ExperimentConfig(
            task="reward",
            steps=steps(240), batch_size=32, model=ModelConfig(dropout=0.2), optim=optim(6e-4), checkpoint=keep,
            eval=EvalConfig(every=steps(60)), sample=sample),
        "dpo": ExperimentConfig(
            task="dpo",
            steps=steps(150), batch_size=32, model=tuned, optim=optim(1e-4, weight_decay=0.0), checkpoint=keep,
            dpo=PreferenceConfig(beta=0.1), eval=EvalConfig(every=steps(50), batch_size=32), sample=sample),
        "ppo": ExperimentConfig(
            task="policy",
            steps=steps(720), batch_size=8 if quick else 32, optim=optim(3e-4, weight_decay=0.0), checkpoint=keep,
            rl=ReinforcementConfig(num_prompts=8 if quick else 64, max_new_tokens=_NEW_TOKENS, min_length=_NEW_TOKENS,
                                   epochs=4, kl_coefficient=0.02, kl_target=28.0, max_step_kl=0.05),
            eval=EvalConfig(every=steps(160)), sample=sample),
    }


def main() -> None:
    """Runs all stages and reports the results."""
    workdir, settings = directory(_WORKDIR), configs(_QUICK.value)
    data = assistant_data.read(pathlib.Path(_DATA.value))
    start_time, seconds = time.perf_counter(), {}

    def stage(name: str, examples: Sequence, held_out: Sequence, base: tj.Bundle | None = None,
              **options) -> tj.Bundle:
        print(f"=== {name} ===", flush=True)
        start = time.perf_counter()
        bundle = train(settings[name], examples, held_out=held_out, base=base, workdir=workdir / name,
                       **options)
        seconds[name] = time.perf_counter() - start
        return bundle

    base = stage("base", data.documents, data.held_out_documents)
    stage("sft", data.demonstrations, data.held_out_demonstrations, base)
    sft = tj.load(workdir / "sft", step="best")
    stage("reward", data.comparisons, data.held_out_comparisons, sft)
    rewarded = evaluate(tj.load(workdir / "reward", step="best"), data.held_out_comparisons)
    dpo = stage("dpo", data.comparisons, data.held_out_comparisons, sft)
    reward = load_reward(str(workdir / "reward"), sft.tokenizer)
    ppo = stage("ppo", data.prompts, data.held_out_prompts, sft, task=functools.partial(PolicyLearning, reward=reward))

    print("=== who answers best ===")
    bundles = {"sft": sft, "base": base, "dpo": dpo, "ppo": ppo}
    answers = comparison.answer(bundles, data.held_out_prompts, data.judge, max_new_tokens=_NEW_TOKENS)
    figures = {
        "reward model: held-out pairs in the right order": rewarded["accuracy"],
        "judge: held-out pairs in the right order": _judge_accuracy(data),
        "perplexity of held-out sentences, base": _perplexity(base, data),
        "perplexity of held-out sentences, sft": _perplexity(sft, data),
        "ppo beats sft": win_rate(answers["ppo"].scores, answers["sft"].scores)[0],
        "sft beats base": win_rate(answers["sft"].scores, answers["base"].scores)[0],
        "kl of ppo to sft, nats an answer": answers["ppo"].kl,
        "distinct-2 of ppo over that of sft":
            distinct_n(answers["ppo"].texts, 2) / max(distinct_n(answers["sft"].texts, 2), 1e-9),
        "minutes": (time.perf_counter() - start_time) / 60,
    }
    _report(workdir, data, answers, figures, seconds)


def _perplexity(bundle: tj.Bundle, data: assistant_data.AssistantData) -> float:
    """Returns the perplexity of held-out sentences after their prompts, which shows how well a
    model predicts such sentences."""
    return evaluate(bundle, data.held_out_demonstrations, task="sft", batch_size=16)["perplexity"]


def _judge_accuracy(data: assistant_data.AssistantData) -> float:
    """Returns the fraction of held-out pairs in which the judge prefers the better answer."""
    good, bad = zip(*(comparison.responses for comparison in data.held_out_comparisons), strict=True)
    return win_rate(data.judge(good), data.judge(bad))[0]


def _report(workdir: pathlib.Path, data: assistant_data.AssistantData, answers: dict[str, comparison.Answers],
            figures: dict[str, float], seconds: dict[str, float]) -> None:
    """Prints and writes the answers, the table and the figures, and draws the reward and the KL
    divergence."""
    lines = []
    for number, prompt in enumerate(data.held_out_prompts[:5]):
        lines += [f"{prompt[-1].content}", *(f"  {name:>5}  {found.texts[number]}" for name, found in answers.items())]
    lines += ["", comparison.table(answers, against="sft"), ""]
    lines += [f"{name}: {value:.3f}" for name, value in figures.items()]
    lines += [f"seconds of {name}: {value:.0f}" for name, value in seconds.items()]
    print("\n".join(lines))
    (workdir / "report.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (workdir / "figures.json").write_text(json.dumps(figures | {"seconds": seconds}, indent=1))
    _draw(read_metrics(workdir / "ppo" / "metrics.jsonl"), workdir / "ppo.png")
    print(f"written to {workdir}: report.md, figures.json, ppo.png")


def _draw(metrics: list[dict], path: pathlib.Path) -> None:
    """Draws the reward and the KL divergence of every rollout of PPO."""
    from matplotlib.figure import Figure

    drawn = [line for line in metrics if "explained_variance" in line]
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, name, label in zip(figure.subplots(1, 2), ("reward", "kl"), ("reward", "KL to SFT (nats an answer)"),
                                 strict=True):
        axes.plot([line["step"] for line in drawn], [line[name] for line in drawn], color="#08519c")
        axes.set(xlabel="update", ylabel=label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
