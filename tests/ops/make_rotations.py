"""Makes ``fixtures/rotations.npz`` with transformers: the cosines and sines of every kind of scaled
rotary positions, for a text inside the first context and for one beyond it.

Run it where torch and transformers are installed: ``python tests/ops/make_rotations.py``.
"""

import pathlib

import numpy as np
import torch
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3RotaryEmbedding

FIRST, BEYOND, HEAD_DIM = 16, 40, 16
SHORT, LONG = [1.0, 1.1, 1.3, 1.5, 1.6, 1.8, 2.0, 2.2], [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 9.0, 11.0]
CASES = {
    "none": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=3.0),
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=FIRST),
    "yarn, own factor": dict(rope_type="yarn", factor=4.0, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5,
                             truncate=False, original_max_position_embeddings=FIRST),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=FIRST),
    "longrope": dict(rope_type="longrope", short_factor=SHORT, long_factor=LONG),
    "longrope, own factor": dict(rope_type="longrope", short_factor=SHORT, long_factor=LONG, attention_factor=1.2,
                                 factor=5.0),
}


class AnyKind(Phi3Config):
    """The only family with longrope checks the kind; the rotation itself supports every kind."""

    def validate_rope(self):
        """Checks nothing."""

    def convert_rope_params_to_dict(self, **kwargs):
        return kwargs


def main():
    found = {}
    for name, rope in CASES.items():
        longest = FIRST if rope["rope_type"] == "dynamic" else BEYOND
        config = AnyKind(hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=longest,
                         original_max_position_embeddings=FIRST, pad_token_id=0)
        config.rope_parameters = dict(rope_theta=500.0, partial_rotary_factor=1.0, **rope)
        for length in (FIRST, BEYOND):
            rotary = Phi3RotaryEmbedding(config)  # a new one, because it remembers the longest text
            for kind, values in zip(("cos", "sin"), rotary(torch.zeros(1), torch.arange(length)[None]), strict=True):
                found[f"{name}: {kind} of {length}"] = values[0, :, :HEAD_DIM // 2].numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / "fixtures" / "rotations.npz", **found)


if __name__ == "__main__":
    main()
