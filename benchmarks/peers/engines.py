"""Inference engines for CPUs as sides of ``python -m benchmarks interop``: CTranslate2, llama.cpp and
ONNX Runtime (extra ``engines``).

Every engine gets the weights of a directory that ``to_huggingface`` wrote, in a file format of its
own. The functions are workers of ``benchmarks.timing.OtherProcess``, which answer a matrix of tokens
with the result of the model.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_GPT2_NAMES = {
    "wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight", "ln_f": "output_norm",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # in transformers, and in llama.cpp


class Numbers:
    """A tokenizer whose tokens are the numbers of a vocabulary, for a model without text.

    Args:
      vocab_size: The size of the vocabulary.
    """

    bos_token = eos_token = unk_token = "0"

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Returns the number of every token."""
        return {str(number): number for number in range(self._vocab_size)}

    def convert_ids_to_tokens(self, number: int) -> str:
        """Returns the token of a number."""
        return str(number)


def ctranslate2(pipe: Any, name: str, directory: str, new_tokens: int, beam_size: int, weights: str) -> None:
    """Worker for CTranslate2.

    Args:
      pipe: The pipe to the benchmark.
      name: ``decode`` or ``beam``.
      directory: The directory of the model.
      new_tokens: The number of tokens to generate.
      beam_size: The beam of ``beam``.
      weights: ``float32`` or ``int8``, the type that CTranslate2 computes with.
    """
    import ctranslate2 as engine
    import transformers

    class Converter(engine.converters.TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Numbers:
            del tokenizer_class, options
            return Numbers(transformers.AutoConfig.from_pretrained(model_name_or_path).vocab_size)

        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            model = super().load_model(model_class, model_name_or_path, **options)
            if name == "beam":  # an attribute that transformers 5 no longer has
                model.config.normalize_before = False
            return model

    options = {"compute_type": weights, "inter_threads": 1, "intra_threads": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        converted = Converter(directory).convert(folder, force=True)
        kind = engine.Generator if name == "decode" else engine.Translator
        model = kind(converted, device="cpu", **options)

    def run(tokens: np.ndarray) -> list[list[int]]:
        rows = [[str(number) for number in row] for row in tokens]
        if name == "decode":
            found = model.generate_batch(rows, max_length=new_tokens, min_length=new_tokens, beam_size=1,
                                         sampling_topk=1, include_prompt_in_result=False)
            return [result.sequences_ids[0] for result in found]
        found = model.translate_batch(rows, beam_size=beam_size, max_decoding_length=new_tokens,
                                      min_decoding_length=new_tokens, length_penalty=1.0)
        return [[int(token) for token in result.hypotheses[0]] for result in found]

    _serve(pipe, run)


def llama_cpp(pipe: Any, directory: str, new_tokens: int, weights: str) -> None:
    """Worker for llama.cpp, which decodes the rows one after the other.

    Args:
      pipe: The pipe to the benchmark.
      directory: The directory of a GPT-2.
      new_tokens: The number of tokens to generate.
      weights: ``F32``, ``F16`` or ``Q8_0``, the type of the matrices.
    """
    import llama_cpp
    from llama_cpp import llama_cpp as functions

    default_params = functions.llama_model_default_params

    def plain_params() -> Any:
        params = default_params()
        params.use_extra_bufts = False
        return params

    # With weights rearranged for AMX, version 0.3.36 ends with a segmentation fault on a virtual
    # machine of a Xeon (Sapphire Rapids).
    functions.llama_model_default_params = plain_params
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.gguf")
        write_gguf(directory, path, weights)
        model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(),
                                verbose=False)

    def greedy(row: np.ndarray) -> Iterator[int]:
        model.reset()
        model.eval(row.tolist())
        for _ in range(new_tokens):
            yield (token := model.sample(temp=0.0, repeat_penalty=1.0))
            model.eval([token])

    _serve(pipe, lambda tokens: [list(greedy(row)) for row in tokens])


def write_gguf(directory: str, path: pathlib.Path, weights: str,
               add_tokenizer: Callable[[Any], None] | None = None) -> None:
    """Writes a GPT-2 as a file of llama.cpp.

    Args:
      directory: The directory of the model, as ``to_huggingface`` writes it.
      path: The file to write.
      weights: ``F32``, ``F16`` or ``Q8_0``, the type of the matrices.
      add_tokenizer: Adds a tokenizer to the ``gguf.GGUFWriter``; ``None`` for a model without one.
    """
    import gguf
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(directory)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    if add_tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer)
    for name, tensor in model.transformer.state_dict().items():
        parts = name.split(".")
        if parts[0] == "h":
            place, key, suffix = f"blk.{parts[1]}.", ".".join(parts[2:-1]), f".{parts[-1]}"
        else:
            place, key, suffix = "", *((name, "") if name in _GPT2_NAMES else (parts[0], f".{parts[-1]}"))
        values = tensor.numpy().astype(np.float32)
        if key.startswith(("attn.", "mlp.")) and suffix == ".weight":
            values = values.T  # transformers stores these as [in, out]
        is_matrix = values.ndim == 2 and key != "wpe.weight"
        kind = gguf.GGMLQuantizationType[weights if is_matrix else "F32"]
        writer.add_tensor(place + _GPT2_NAMES[key] + suffix, gguf.quants.quantize(np.ascontiguousarray(values), kind),
                          raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def onnx_runtime(pipe: Any, directory: str) -> None:
    """Worker for ONNX Runtime, which encodes.

    Args:
      pipe: The pipe to the benchmark.
      directory: The directory of an encoder.
    """
    import onnxruntime
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(directory).eval()

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(tokens, attention_mask=mask).last_hidden_state

    sessions: dict[tuple[int, ...], onnxruntime.InferenceSession] = {}

    def session_of(ids: np.ndarray) -> onnxruntime.InferenceSession:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.onnx")
            example = torch.from_numpy(ids)
            torch.onnx.export(Hidden(), (example, torch.ones_like(example)), str(path), verbose=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = os.cpu_count() or 1
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(tokens: np.ndarray) -> np.ndarray:
        ids = tokens.astype(np.int64)
        if ids.shape not in sessions:
            sessions[ids.shape] = session_of(ids)
        session = sessions[ids.shape]
        names = [each.name for each in session.get_inputs()]
        return session.run(None, dict(zip(names, (ids, np.ones_like(ids)), strict=True)))[0]

    _serve(pipe, run)


def _serve(pipe: Any, run: Callable[[np.ndarray], Any]) -> None:
    """Answers every matrix of tokens."""
    while True:
        pipe.send(run(pipe.recv()))
