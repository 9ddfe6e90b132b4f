"""Writes fixtures/chat_templates.json: the texts that transformers makes of conversations with four
templates.

    python tests/data/make_chat_templates.py     # with transformers 5 installed

Each template is a copy of the one that its models publish. A second form marks the messages of the
assistant with `{% generation %}`, so that transformers can return the mask of these tokens. The
tokenizers are small ones of the kinds that these models have.
"""

import json
import pathlib

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["Be brief. What is 2 + 2? It is 4. And 3 + 3? That is 6, I think. system user assistant model", "olá, ção!"]
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['role'] == 'assistant' %}GEN{{ message['content'] + '<|im_end|>' }}END{{ '\n' }}\
{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}{%- for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\
{%- if message['role'] == 'assistant' %}GEN{{- message['content'] | trim + '<|eot_id|>' }}END\
{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
# This template puts the system text into the last turn of the user, so a prompt is not the
# beginning of the whole conversation.
MISTRAL = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}\
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}\
{%- for message in rest %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}{%- if message['role'] == 'user' %}\
{%- if loop.index0 >= rest | length - 2 and system is defined %}\
{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}\
{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}\
{%- else %}GEN{{- ' ' + message['content'] | trim + eos_token }}END{%- endif %}{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}\
{{ '<start_of_turn>model\n' }}GEN{{ message['content'] | trim + '<end_of_turn>' }}END{{ '\n' }}{% else %}\
{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
TURNS = [("system", "Be brief."), ("user", "What is 2 + 2?"), ("assistant", "It is 4."),
         ("user", "And 3 + 3?\n"), ("assistant", "  That is 6,\n\nI think. "), ("user", "olá"), ("assistant", "4 < 6")]


def byte_level(special):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(TEXT * 9, trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def metaspace(special):
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.train_from_iterator([" ".join(TEXT)] * 9, trainers.BpeTrainer(
        vocab_size=370, special_tokens=["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=8))
    loaded = json.loads(made.to_str())  # the bytes are tokens of the vocabulary, not special ones
    loaded["added_tokens"] = [entry for entry in loaded["added_tokens"] if not entry["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(loaded))


def main():
    cases = {}
    for name, template, make, special, turns in (
            ("chatml", CHATML, byte_level, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], TURNS),
            ("llama3", LLAMA3, byte_level, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
                                            "<|end_header_id|>"], TURNS),
            ("mistral", MISTRAL, metaspace, ["<s>", "</s>", "[INST]", "[/INST]"], TURNS),
            ("gemma", GEMMA, metaspace, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], TURNS[1:])):
        names = {"bos_token": special[0], "eos_token": special[2] if name == "chatml" else special[1]}
        made = make(special)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
        plain = template.replace("GEN", "").replace("END", "")
        marked = template.replace("GEN", "{% generation %}").replace("END", "{% endgeneration %}")
        messages = [{"role": role, "content": content} for role, content in turns]
        found = theirs.apply_chat_template(messages, chat_template=marked, return_dict=True,
                                           return_assistant_tokens_mask=True)
        ids = theirs.apply_chat_template(messages, chat_template=plain, return_dict=True)["input_ids"]
        assert ids == found["input_ids"], name
        prompt = theirs.apply_chat_template(messages[:-1], chat_template=plain, add_generation_prompt=True,
                                            return_dict=True)["input_ids"]
        cases[name] = {"tokenizer": json.loads(made.to_str()), "names": names, "plain": plain, "marked": marked,
                       "turns": turns, "ids": ids, "mask": found["assistant_masks"], "prompt": prompt}
    path = pathlib.Path(__file__).parent / "fixtures" / "chat_templates.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(cases, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
