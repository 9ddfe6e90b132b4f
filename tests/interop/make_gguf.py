"""Makes the fixtures of ``test_gguf.py`` with the packages gguf, torch and transformers.

python tests/interop/make_gguf.py

It writes a small model of each architecture as a GGUF file, with tensors in several formats; the
logits that transformers computes from that file; and random blocks of each format with the numbers
that gguf converts them to.
"""

import pathlib

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "gguf"
VOCAB, DIM, HEADS, KV_HEADS, MLP, LENGTH, LAYERS = 64, 32, 4, 2, 64, 32, 2
TOKENS = [[5, 1, 63, 20, 20, 7, 33, 2]]
_BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
_KINDS = [Kind.Q8_0, Kind.Q4_0, Kind.F16, Kind.BF16, Kind.F32]


def write(name: str) -> None:
    """Writes a model with random weights; norms and biases are float32, as llama.cpp has them."""
    random = np.random.default_rng(len(name))
    writer = gguf.GGUFWriter(FOLDER / f"{name}.gguf", name)
    writer.add_block_count(LAYERS)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(4 * DIM if name == "gpt2" else MLP)
    writer.add_head_count(HEADS)
    if name == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(5000.0)
        writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if name == "gpt2" else "qwen2")
    writer.add_token_list([*_BYTES[33:94], "th", "the", "<end>"])
    writer.add_token_types([1] * 63 + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(63)
    shapes = {"token_embd.weight": (VOCAB, DIM), "output_norm.weight": (DIM,)}
    if name == "gpt2":
        shapes |= {"position_embd.weight": (LENGTH, DIM), "output_norm.bias": (DIM,)}
    else:
        shapes["output.weight"] = (VOCAB, DIM)
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in _layer(name).items()}
    for number, (tensor, shape) in enumerate(shapes.items()):
        values = random.normal(0, 0.3, shape).astype(np.float32) + ("norm.weight" in tensor)
        kind = Kind.F32 if len(shape) == 1 or "position" in tensor else _KINDS[number % len(_KINDS)]
        writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layer(name: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of one layer."""
    width = DIM // HEADS * KV_HEADS
    if name == "gpt2":
        linear = {"attn_qkv": (3 * DIM, DIM), "attn_output": (DIM, DIM), "ffn_up": (4 * DIM, DIM),
                  "ffn_down": (DIM, 4 * DIM)}
        norms = {f"{norm}.{part}": (DIM,) for norm in ("attn_norm", "ffn_norm") for part in ("weight", "bias")}
        biases = {f"{part}.bias": shape[:1] for part, shape in linear.items()}
    else:
        linear = {"attn_q": (DIM, DIM), "attn_k": (width, DIM), "attn_v": (width, DIM), "attn_output": (DIM, DIM),
                  "ffn_gate": (MLP, DIM), "ffn_up": (MLP, DIM), "ffn_down": (DIM, MLP)}
        norms = {"attn_norm.weight": (DIM,), "ffn_norm.weight": (DIM,)}
        biases = {f"attn_{part}.bias": linear[f"attn_{part}"][:1] for part in "qkv"} if name == "qwen2" else {}
    return norms | {f"{part}.weight": shape for part, shape in linear.items()} | biases


def blocks() -> None:
    """Writes random blocks of each format, and their numbers."""
    random, arrays = np.random.default_rng(0), {}
    for kind, scales in ((Kind.Q8_0, [0]), (Kind.Q4_0, [0]), (Kind.Q4_K, [0, 2]), (Kind.Q6_K, [208])):
        _, size = gguf.constants.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (3, size), dtype=np.uint8)
        for start in scales:  # random bits of a scale could be infinity or no number
            raw[:, start:start + 2] = random.normal(0, 0.1, (3, 1)).astype("<f2").view(np.uint8)
        arrays[f"{kind.name} blocks"], arrays[f"{kind.name} numbers"] = raw, gguf.quants.dequantize(raw, kind)
    np.savez_compressed(FOLDER / "blocks.npz", **arrays)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    blocks()
    logits = {}
    for architecture in ("llama", "qwen2", "gpt2"):
        write(architecture)
        file = f"{architecture}.gguf"
        config = AutoConfig.from_pretrained(FOLDER, gguf_file=file)
        config.max_position_embeddings = LENGTH  # transformers does not read it for GPT-2
        model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=file, config=config, dtype=torch.float32)
        logits[architecture] = model.eval()(torch.tensor(TOKENS)).logits.detach().numpy()
    np.savez_compressed(FOLDER / "logits.npz", **logits)
