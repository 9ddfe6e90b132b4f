"""Times the engine: many requests together against one at a time, and how long a token takes.

python -m benchmarks.serving [--shape=shakespeare|gpt2-small] [--requests=32] [--new_tokens=64] [--rounds=3]
"""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np
from absl import app, flags

import transformer_jax as tj
from transformer_jax.serving import Engine, Reply, TextRequest

_SHAPE = flags.DEFINE_enum("shape", "shakespeare", ["shakespeare", "gpt2-small"], "The shape of the model.")
_REQUESTS = flags.DEFINE_integer("requests", 32, "The number of requests.", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "The length of a prompt.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "The length of a reply.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Both are measured so often, in turn; the best of each counts.",
                               lower_bound=1)

SHAPES = {
    "shakespeare": tj.ModelConfig(vocab_size=65, max_len=256, num_layers=4, num_heads=4, model_dim=128),  # 0.8M
    "gpt2-small": tj.presets.get("gpt2-small"),
}
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Timed:
    """A request, and when each of its tokens came."""

    def __init__(self, engine: Engine, request: TextRequest):
        self.begin, self.times = time.perf_counter(), []
        self.reply: Reply | None = None
        self.reply = engine.submit(request, self._listen)

    def _listen(self) -> None:
        now = time.perf_counter()
        if self.reply is not None:
            self.times += [now] * (len(self.reply.new.tokens) - len(self.times))

    def wait(self) -> None:
        """Waits until the reply is complete."""
        assert self.reply is not None
        self.reply.result()


def measure(engine: Engine, requests: list[TextRequest], *, together: bool) -> dict[str, float]:
    """Answers the requests together or one after the other, and returns the times."""
    begin, timed = time.perf_counter(), []
    for request in requests:
        timed.append(Timed(engine, request))
        if not together:
            timed[-1].wait()
    for each in timed:
        each.wait()
    seconds = time.perf_counter() - begin
    tokens = sum(request.max_new_tokens for request in requests)
    first = statistics.median(each.times[0] - each.begin for each in timed)
    between = statistics.median((each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in timed)
    return {"tokens/s": tokens / seconds, "first token, ms": 1e3 * first, "between tokens, ms": 1e3 * between}


def compile_all(engine: Engine, requests: list[TextRequest]) -> None:
    """Answers requests until two rounds in a row have compiled nothing. How a batch grows depends on
    when its requests come, so one round does not compile the programs for all sizes."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event == _COMPILED else None)
    measure(engine, requests[:2], together=False)
    rounds_without = 0
    while rounds_without < 2:
        compiled.clear()
        measure(engine, requests, together=True)
        rounds_without = 0 if compiled else rounds_without + 1


def main(_: list[str]) -> None:
    config = SHAPES[_SHAPE.value]
    engine = Engine(tj.Decoder(config, key=jax.random.key(0)), max_batch=32, num_prefixes=0)
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, config.vocab_size, (_REQUESTS.value, _PROMPT_TOKENS.value))
    requests = [TextRequest(prompt.tolist(), _NEW_TOKENS.value, tj.Sampling(temperature=0.8), jax.random.key(index))
                for index, prompt in enumerate(prompts)]
    compile_all(engine, requests)
    few = requests[:max(4, _REQUESTS.value // 8)]
    rounds = [(measure(engine, few, together=False), measure(engine, requests, together=True))
              for _ in range(_ROUNDS.value)]
    alone, together = (max(results, key=lambda result: result["tokens/s"]) for results in zip(*rounds, strict=True))
    for name, result in (("one at a time", alone), (f"{_REQUESTS.value} together", together)):
        print(f"{_SHAPE.value}, {name}: " + ", ".join(f"{value:.1f} {unit}" for unit, value in result.items()))
    print(f"{_SHAPE.value}: {together['tokens/s'] / alone['tokens/s']:.1f} times the throughput")


if __name__ == "__main__":
    app.run(main)
