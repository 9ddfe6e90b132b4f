"""Writes the fixtures of SAELens: small random models, with what SAELens computes from them.

WANDB_MODE=offline python tests/features/make_saelens.py    (with sae-lens and transformer_lens)
"""

import pathlib

import torch
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).with_name("fixtures") / "saelens"
SIZES = {"d_in": 6, "d_sae": 10}
HOOK = {"metadata": SAEMetadata(hook_name="blocks.1.hook_mlp_out", model_name="none")}
OUT = {"d_out": 5, "apply_b_dec_to_input": False,
       "metadata": SAEMetadata(hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out")}
MODELS = {
    "standard": lambda: StandardSAE(StandardSAEConfig(**SIZES, **HOOK)),
    "standard_plain": lambda: StandardSAE(StandardSAEConfig(**SIZES, **HOOK, apply_b_dec_to_input=False)),
    "standard_bfloat16": lambda: StandardSAE(StandardSAEConfig(**SIZES, **HOOK, dtype="bfloat16")),
    "topk": lambda: TopKSAE(TopKSAEConfig(**SIZES, **HOOK, k=3)),
    "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**SIZES, **HOOK)),
    "gated": lambda: GatedSAE(GatedSAEConfig(**SIZES, **HOOK)),
    "transcoder": lambda: Transcoder(TranscoderConfig(**SIZES, **OUT)),
    "jumprelu_transcoder": lambda: JumpReLUTranscoder(JumpReLUTranscoderConfig(**SIZES, **OUT)),
}


def main():
    torch.manual_seed(0)
    for name, make in MODELS.items():
        model = make()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                values = torch.randn(parameter.shape) * 0.5
                parameter.copy_(values.abs() if parameter_name == "threshold" else values)
            x = torch.randn(12, SIZES["d_in"])
            features = model.encode(x)
            outputs = model.decode(features)
            targets = x if outputs.shape == x.shape else torch.randn(12, 5)
            variance = ExplainedVarianceCalculator()
            variance.add_batch(outputs.float(), targets)
            model.save_model(FOLDER / name)
            expected = {"x": x, "features": features.float(), "outputs": outputs.float(), "targets": targets.clone(),
                        "explained_variance": torch.tensor(variance.compute()),
                        "l0": (features != 0).float().sum(-1).mean()}
            save_file(expected, FOLDER / name / "expected.safetensors")


if __name__ == "__main__":
    main()
