"""Makes ``fixtures/parameter_counts.json``: the number of parameters of published encoders, counted
by transformers, which makes them without memory.

Run it where torch and transformers are installed: ``python tests/interop/make_parameter_counts.py``.
The settings are those of the published config.json files; all others are defaults of transformers.
"""

import json
import pathlib

import torch
import transformers


def sizes(layers, heads, width, inner, **more):
    return dict(num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width, intermediate_size=inner, **more)


BASE, LARGE = sizes(12, 12, 768, 3072), sizes(24, 16, 1024, 4096)
ROBERTA = dict(max_position_embeddings=514, type_vocab_size=1)
MODELS = {  # by the name of the preset: the class, and the settings
    "bert-tiny": ("BertForMaskedLM", sizes(2, 2, 128, 512)),
    "bert-mini": ("BertForMaskedLM", sizes(4, 4, 256, 1024)),
    "bert-small": ("BertForMaskedLM", sizes(4, 8, 512, 2048)),
    "bert-medium": ("BertForMaskedLM", sizes(8, 8, 512, 2048)),
    "bert-base": ("BertForMaskedLM", BASE),
    "bert-large": ("BertForMaskedLM", LARGE),
    "bert-base-cased": ("BertForMaskedLM", BASE | {"vocab_size": 28_996}),
    "bert-large-cased": ("BertForMaskedLM", LARGE | {"vocab_size": 28_996}),
    "bert-base-multilingual": ("BertForMaskedLM", BASE | {"vocab_size": 119_547}),
    "roberta-base": ("RobertaForMaskedLM", BASE | ROBERTA),
    "roberta-large": ("RobertaForMaskedLM", LARGE | ROBERTA),
    "distilroberta-base": ("RobertaForMaskedLM", BASE | ROBERTA | {"num_hidden_layers": 6}),
    "xlm-roberta-base": ("XLMRobertaForMaskedLM", BASE | ROBERTA | {"vocab_size": 250_002}),
    "xlm-roberta-large": ("XLMRobertaForMaskedLM", LARGE | ROBERTA | {"vocab_size": 250_002}),
    "distilbert-base": ("DistilBertForMaskedLM", {}),
    "distilbert-base-multilingual": ("DistilBertForMaskedLM", {"vocab_size": 119_547}),
    "albert-base": ("AlbertForMaskedLM", BASE),
    "albert-large": ("AlbertForMaskedLM", LARGE),
    "albert-xlarge": ("AlbertForMaskedLM", sizes(24, 16, 2048, 8192)),
    "albert-xxlarge": ("AlbertForMaskedLM", sizes(12, 64, 4096, 16_384)),
    "modernbert-base": ("ModernBertForMaskedLM", {}),
    "modernbert-large": ("ModernBertForMaskedLM", sizes(28, 16, 1024, 2624)),
    "electra-small discriminator": ("ElectraForPreTraining", {}),
    "electra-base discriminator": ("ElectraForPreTraining", BASE | {"embedding_size": 768}),
    "electra-large discriminator": ("ElectraForPreTraining", LARGE | {"embedding_size": 1024}),
    "electra-small generator": ("ElectraForMaskedLM", sizes(12, 1, 64, 256)),
    "electra-base generator": ("ElectraForMaskedLM", sizes(12, 4, 256, 1024, embedding_size=768)),
    "electra-large generator": ("ElectraForMaskedLM", sizes(24, 4, 256, 1024, embedding_size=1024)),
}


def count(name, settings):
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**settings))
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "pooler" not in name)


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "fixtures" / "parameter_counts.json"
    path.write_text(json.dumps({name: count(*entry) for name, entry in MODELS.items()}, indent=1) + "\n")
