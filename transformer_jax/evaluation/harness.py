"""The adapter by which ``lm-eval``, the harness of EleutherAI, measures models of this library."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import jax
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from transformer_jax.decoding.batch import check_family, whole_number
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.evaluation.continuations import continuation_scores
from transformer_jax.runs.bases import load_base
from transformer_jax.training.bundle import Bundle, load

_DEFAULT_BATCH = 16
_DEFAULT_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SWITCHES = {"do_sample", "num_beams", "use_cache"}  # of transformers; they change nothing here


@register_model("transformer_jax")
class HarnessModel(TemplateLM):
    """A decoder of this library as ``lm-eval`` sees it.

    It tokenizes, truncates and scores as the harness's own ``hf`` does, so the same weights have
    the same scores.

    Attributes:
      model: the decoder.
      text_tokenizer: its tokenizer.
      batch_size: the number of rows of a batch.
      max_length: the most tokens that the model reads.
      max_gen_toks: the largest number of new tokens, where a task does not say it.
    """

    def __init__(self, workdir: str | None = None, model: str | None = None, *, step: str | None = None,
                 bundle: Bundle | None = None, batch_size: int | str = _DEFAULT_BATCH, max_length: int | None = None,
                 max_gen_toks: int = _DEFAULT_NEW_TOKENS, prefix_token_id: int | None = None, seed: int = 0,
                 device: str | None = None, max_batch_size: int | None = None):
        """Loads the model. Exactly one of ``workdir``, ``model`` and ``bundle`` must be given.

        Args:
          workdir: the directory of a run.
          model: a directory of Hugging Face files, or an id on the hub.
          step: the step of a checkpoint in ``workdir``, or ``"best"``.
          bundle: a model that is loaded already.
          batch_size: the number of rows of a batch; ``"auto"`` means 16.
          max_length: reads at most this many tokens, if the model's context is longer.
          max_gen_toks: the largest number of new tokens, where a task does not say it.
          prefix_token_id: the token before a text without context; the default is the tokenizer's
            ``start_id``.
          seed: draws the same texts again, if a task samples.
          device: ignored; JAX chooses the device.
          max_batch_size: ignored; ``batch_size`` is fixed.

        Raises:
          ValueError: if the model cannot be loaded, is not a decoder, or has no tokenizer.
        """
        del device, max_batch_size
        super().__init__()
        if [workdir, model, bundle].count(None) != 2:
            raise ValueError("name one model: --model_args workdir=DIR, or model=DIRECTORY_OR_ID")
        if bundle is None:
            bundle = load(workdir, step=step) if workdir is not None else load_base(str(model), step=step)
        self.model = check_family("lm-eval", bundle.model, "decoder")
        if bundle.tokenizer is None:
            raise ValueError("lm-eval needs a model that is stored with its tokenizer")
        self.text_tokenizer = bundle.tokenizer
        self.batch_size = _DEFAULT_BATCH if str(batch_size).startswith("auto") else whole_number(
            "batch_size", int(batch_size))
        context = self.model.config.max_len
        self.max_length = context if max_length is None else whole_number("max_length", max_length, most=context)
        self.max_gen_toks = whole_number("max_gen_toks", max_gen_toks)
        self._prefix = self.text_tokenizer.start_id if prefix_token_id is None else prefix_token_id
        self._key = jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.text_tokenizer.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        """The token from which the first token of a text is predicted."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, for the harness's cache of requests."""
        return self.text_tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Encodes a text.

        Args:
          string: the text.
          add_special_tokens: whether to put the tokenizer's special tokens around it. ``None`` means
            yes, unless the text begins with the name of the prefix token.
          **options: ignored.

        Returns:
          The token ids.
        """
        del options
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.text_tokenizer.pieces([self._prefix])[0])
        before, after = self.text_tokenizer.frame("prompt") if add_special_tokens else ([], [])
        return [*before, *self.text_tokenizer.encode(string), *after]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **options: Any) -> list[tuple[float, bool]]:
        """Scores pairs of token ids."""
        del options
        pairs = [((context + continuation)[-(self.max_length + 1):-len(continuation)], continuation)
                 for _, context, continuation in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Scoring continuations") as bar:
            found = continuation_scores(self.model, pairs, batch_size=self.batch_size, progress=bar.update)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Computes the log-probability of whole texts, in windows of the model's context.

        Args:
          requests: the harness's instances, each with one text.
          disable_tqdm: whether to show no progress.

        Returns:
          The log-probability of each text in nats.
        """
        owners, windows = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self._prefix, self.max_length, 1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until a stop string.

        Args:
          requests: the harness's instances, each with a context and settings.
          disable_tqdm: whether to show no progress.

        Returns:
          The new text of each request, without the stop string.

        Raises:
          ValueError: for a setting that this library does not have.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for settings, numbers in groups.items():
                sampling, until, new_tokens = self._settings(json.loads(settings))
                room = self.max_length - new_tokens
                contexts = {number: self._context(requests[number].args[0], room) for number in numbers}
                numbers.sort(key=lambda number: -len(contexts[number]))
                for start in range(0, len(numbers), self.batch_size):
                    chosen = numbers[start:start + self.batch_size]
                    rows = [contexts[number] for number in chosen]
                    rows += [rows[-1]] * (self.batch_size - len(rows))  # so that every batch has the same shape
                    keys_B = _keys(self._key, [(settings, requests[number].args[0]) for number in chosen], len(rows))
                    result = generate(self.model, rows, tokenizer=self.text_tokenizer, key=keys_B,
                                      max_new_tokens=new_tokens, sampling=sampling, stop=until)
                    for number, text in zip(chosen, cast(list, result.texts), strict=False):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(chosen))
        return texts

    def _context(self, text: str, room: int) -> list[int]:
        """Returns the last tokens of a context for which there is room."""
        return self.tok_encode(text)[-room:] or [self._prefix]

    def _settings(self, given: dict[str, Any]) -> tuple[Sampling, list[str], int]:
        """Returns the sampling, the stop strings, and the number of new tokens."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until = [string for string in settings.pop("until", []) if string]
        new_tokens = int(settings.pop("max_gen_toks"))
        sampling = Sampling(**{name: settings.pop(name) for name in _SAMPLING if settings.get(name) is not None})
        unknown = sorted(name for name in settings if name not in {*_SAMPLING, *_SWITCHES})
        if unknown:
            raise ValueError(f"the task sets {', '.join(unknown)}, which this library does not have; it has "
                             f"{', '.join(_SAMPLING)}, until and max_gen_toks")
        if new_tokens >= self.max_length:
            raise ValueError(f"the task asks for {new_tokens} new tokens, but the model reads {self.max_length}; pass "
                             "--gen_kwargs max_gen_toks=... or --model_args max_gen_toks=...")
        return sampling, until, new_tokens


def _keys(key: jax.Array, requests: Sequence[tuple[str, str]], num_rows: int) -> jax.Array:
    """Returns a PRNG key for each row, which depends on its request and not on its batch."""
    numbers = [int.from_bytes(hashlib.sha256("\0".join(request).encode("utf-8", "replace")).digest()[:4], "little")
               for request in requests]
    numbers += [0] * (num_rows - len(numbers))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.asarray(numbers, jax.numpy.uint32))
