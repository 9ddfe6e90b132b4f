"""Makes ``fixtures/models`` with transformers: small models of every family as published on the
Hugging Face hub, as transformers 5 saves them again, and as ``AutoModel`` does.

Run it where torch and transformers are installed: ``python tests/interop/make_models.py [CASE
...]``. Each case is a directory with the JSON files of the model, the names and shapes of its
tensors (``tensors.json``; the values come from ``fixture_weights``), and what transformers computes
with them in float64 (``expected.npz``): logits, hidden states, and 50 tokens by greedy decoding.
"""

import copy
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import published_encoders  # noqa: F401 (it publishes more)
import published_pairs  # noqa: F401
import torch
import transformers
from fixture_weights import MODELS, model_directory
from published_configs import PUBLISHED
from safetensors import safe_open

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
NEW_TOKENS, LEAST_MARGIN, LEAST_DISTINCT = 50, 2e-3, 3
AUTO = {"decoder": transformers.AutoModelForCausalLM, "encoder": transformers.AutoModelForMaskedLM,
        "pair": transformers.AutoModelForSeq2SeqLM, "body": transformers.AutoModel,
        "texts": transformers.AutoModelForSequenceClassification,
        "tokens": transformers.AutoModelForTokenClassification}
ENCODERS = ("bert", "roberta", "distilbert", "xlm-roberta", "camembert", "electra", "albert", "modernbert")
_OF_SEARCH = dict(num_beams=1, do_sample=False, eos_token_id=None, forced_eos_token_id=None, no_repeat_ngram_size=0,
                  repetition_penalty=1.0, length_penalty=1.0, early_stopping=False)


def table_of(directory, sinusoids):
    """Names and shapes of the tensors in the files of a directory."""
    tensors, paths = {}, sorted(directory.glob("*.safetensors"))
    for path in paths:
        with safe_open(path, framework="np") as file:
            for name in sorted(file.keys()):
                view = file.get_slice(name)
                tensors[name] = {"shape": list(view.get_shape())}
                if len(paths) > 1:
                    tensors[name]["file"] = path.name
                if sinusoids and "embed_positions" in name:
                    tensors[name] |= {"buffer": True}
    return tensors


def write_case(case, files, tensors):
    """Writes the files and the table, without the results of transformers."""
    directory = MODELS / case
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, settings in files.items():
        (directory / name).write_text(json.dumps(settings, indent=1) + "\n")
    mean = {"norm_mean": 0.0} if files["config.json"]["model_type"].startswith("gemma") else {}
    write_table(case, {"seed": 0, **mean, "tensors": tensors})


def write_table(case, table):
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(table["tensors"].items())]
    text = ",\n".join(lines)
    head = json.dumps({key: value for key, value in table.items() if key != "tensors"})
    (MODELS / case / "tensors.json").write_text(f'{head[:-1]}, "tensors": {{\n{text}\n}}}}\n')


def published(case):
    """The table of a published model: its own names, with what was stored beside the weights."""
    entry = PUBLISHED[case]
    config = transformers.AutoConfig.for_model(**copy.deepcopy(entry["config"]))  # which it changes
    name = config.architectures[0]
    model = getattr(transformers, name)(config)
    tensors = {}
    stored = {key: list(value.shape) for key, value in model.state_dict().items()}
    for key, shape in stored.items():
        new = entry["rename"](key)
        if new is not None:
            tensors[new] = {"shape": shape}
    tensors |= {name: {"shape": list(shape)} for name, shape in entry["experts"].items()}
    for twin, original in entry["copies"].items():
        tensors[twin] = {"shape": tensors[original]["shape"], "copy_of": original}
    tensors |= {key: {"buffer": True, "shape": list(shape), "dtype": dtype}
                for key, (shape, dtype) in entry["buffers"].items()}
    files = {"config.json": entry["config"]}
    if entry["generation"] is not None:
        files["generation_config.json"] = entry["generation"]
    write_case(case, files, tensors)


def saved_again(case, source, auto, **options):
    """The table of what ``save_pretrained`` writes of a published model."""
    with tempfile.TemporaryDirectory() as directory:
        before, after = pathlib.Path(directory, "before"), pathlib.Path(directory, "after")
        auto.from_pretrained(model_directory(source, before), dtype=torch.float32).save_pretrained(after, **options)
        files = {path.name: json.loads(path.read_text()) for path in sorted(after.glob("*.json"))}
        sinusoids = files["config.json"]["model_type"] in ("marian", "pegasus")
        write_case(case, files, table_of(after, sinusoids))


def expected(case, kind):
    """Returns what transformers computes, with the first seed for which no greedy token is almost
    tied with another."""
    table = json.loads((MODELS / case / "tensors.json").read_text())
    for seed in range(40):
        write_table(case, table | {"seed": seed})
        with tempfile.TemporaryDirectory() as directory:
            # The files are float32, even if the published config.json names another type.
            auto = transformers.ElectraForPreTraining if "replaced" in case else AUTO[kind]
            model, info = auto.from_pretrained(model_directory(case, directory), dtype=torch.float32,
                                               output_loading_info=True)
        missing = [name for name in info["missing_keys"] if "pooler" not in name]
        assert not missing and not info["mismatched_keys"], (case, info)
        with torch.no_grad():
            # Float64: the tests then measure the rounding of one side alone, on every CPU.
            found, margin, distinct = compute(model.double().eval(), kind)
        if margin > LEAST_MARGIN and distinct >= LEAST_DISTINCT:
            np.savez_compressed(MODELS / case / "expected.npz", **found)
            return seed, margin, distinct
    raise SystemExit(f"{case}: with every tried seed, two tokens are almost equally probable")


def compute(model, kind):
    config, rng = model.config, np.random.RandomState(7)
    vocab = config.vocab_size

    def draw(*shape):
        return torch.tensor(rng.randint(3, vocab - 1, shape))

    pair = config.is_encoder_decoder
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    pad = max(config.pad_token_id or 0, 0)
    tokens = draw(2, 9)
    is_masked = config.model_type in ENCODERS or kind in ("texts", "tokens")
    if pair or is_masked:
        tokens = torch.where(mask == 1, tokens, torch.tensor(pad))
    if pair:
        target = draw(2, 6)
        out = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=target, output_hidden_states=True)
        hidden = out.decoder_hidden_states[-1]
        found = {"source": tokens, "mask": mask, "target": target, "hidden": hidden}
    else:
        masks = {"attention_mask": mask} if is_masked else {}
        out = model(input_ids=tokens, output_hidden_states=True, **masks)
        hidden = out.hidden_states[-1]
        found = {"tokens": tokens, "hidden": hidden, **({"mask": mask} if masks else {})}
    if kind != "body":
        found["logits"] = out.logits if out.logits.ndim != 2 or kind != "tokens" else out.logits[..., None]
    margin, distinct = 1.0, 9
    if kind in ("decoder", "pair"):
        start = draw(2, 4) if kind == "decoder" else tokens
        options = _OF_SEARCH | {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        made = model.generate(start, attention_mask=torch.ones_like(start) if kind == "decoder" else mask,
                              output_scores=True, return_dict_in_generate=True, pad_token_id=pad,
                              **options)
        top = torch.stack(made.scores).topk(2, -1).values
        margin = float((top[..., 0] - top[..., 1]).min())
        distinct = min(len(set(row.tolist())) for row in made.sequences[:, -NEW_TOKENS:])
        found |= {"prompt": start, "generated": made.sequences[:, start.shape[1] if kind == "decoder" else 0:]}
    arrays = {name: value.numpy() for name, value in found.items()}
    return {name: value.astype(np.float32 if value.dtype.kind == "f" else np.int16)
            for name, value in arrays.items()}, margin, distinct


def main(wanted):
    for case, entry in PUBLISHED.items():
        kind = "body" if entry["body"] else entry["kind"]
        eras = {"published": kind, **({"transformers5": kind} if entry["again"] else {}),
                **({"automodel": "body"} if entry["again_body"] else {})}
        for era, what in eras.items():
            name = f"{case.removesuffix('-published')}-{era}"
            if wanted and name not in wanted:
                continue
            if era == "published":
                published(case)
            else:
                saved_again(name, case, AUTO[what], **(entry["save"] if era == "transformers5" else {}))
            print(name, *expected(name, what))
    print(sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()), "bytes in all")


if __name__ == "__main__":
    main(sys.argv[1:])
