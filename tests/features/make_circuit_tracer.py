"""Writes the fixtures of circuit-tracer: small random cross-layer transcoders, with what
circuit-tracer computes from them.

python tests/features/make_circuit_tracer.py    (with circuit-tracer, which brings torch)
"""

import pathlib

import torch
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).with_name("fixtures") / "circuit_tracer"
CONFIG = """model_name: "none"
model_kind: cross_layer_transcoder
feature_input_hook: "ln2.hook_normalized"
feature_output_hook: "hook_mlp_out"
"""


def main():
    torch.manual_seed(0)
    for activation in ("relu", "jump_relu"):
        made = CrossLayerTranscoder(3, 10, 6, activation, lazy_decoder=False, device=torch.device("cpu"),
                                    dtype=torch.float32)
        if activation == "jump_relu":
            made.activation_function.threshold = torch.nn.Parameter(torch.rand(3, 1, 10))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "threshold" not in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.5)
            made.to_safetensors(FOLDER / activation)
            (FOLDER / activation / "config.yaml").write_text(CONFIG)
            loaded = load_clt(str(FOLDER / activation), device=torch.device("cpu"), dtype=torch.float32,
                              lazy_decoder=False)
            x = torch.randn(3, 12, 6)
            features = loaded.encode(x)
            outputs = loaded.decode(features)
        save_file({"x": x, "features": features, "outputs": outputs}, FOLDER / activation / "expected.safetensors")


if __name__ == "__main__":
    main()
