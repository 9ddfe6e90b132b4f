"""Choose the tokenizer class of transformers for a directory, as ``AutoTokenizer`` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The class that reads tokenizer.json unchanged. transformers 4 calls it PreTrainedTokenizerFast.
AS_WRITTEN = "TokenizersBackend"


def _words(text: str) -> frozenset[str]:
    """Splits a text into a set of words."""
    return frozenset(text.split())


# The tokenizer class of each model type in transformers 5, except for types that are not listed:
# these read tokenizer.json unchanged.
_TYPES = {
    "AlbertTokenizer": "albert yoso",
    "BarthezTokenizer": "barthez",
    "BartphoTokenizer": "bartpho",
    "BertGenerationTokenizer": "bert-generation",
    "BertJapaneseTokenizer": "bert-japanese",
    "BertTokenizer": "align bark bert blip bros chinese_clip convbert distilbert electra ernie flava git "
                     "grounding-dino layoutlm lxmert megatron-bert mm-grounding-dino mobilebert nezha nomic_bert "
                     "qdqbert realm retribert squeezebert tvp vilt visual_bert",
    "BertweetTokenizer": "bertweet",
    "BigBirdTokenizer": "big_bird",
    "BioGptTokenizer": "biogpt",
    "BlenderbotSmallTokenizer": "blenderbot-small",
    "BlenderbotTokenizer": "blenderbot",
    "ByT5Tokenizer": "byt5",
    "CLIPTokenizer": "aimv2 clip clipseg groupvit omdet-turbo oneformer owlv2 owlvit sam3 sam3_video xclip",
    "CTRLTokenizer": "ctrl",
    "CamembertTokenizer": "camembert",
    "CanineTokenizer": "canine",
    "CodeLlamaTokenizer": "code_llama",
    "CohereTokenizer": "aya_vision cohere cohere2",
    "CpmAntTokenizer": "cpmant",
    "CpmTokenizer": "cpm",
    "DPRQuestionEncoderTokenizer": "dpr",
    "DebertaTokenizer": "deberta",
    "DebertaV2Tokenizer": "deberta-v2",
    "EsmTokenizer": "esm",
    "FNetTokenizer": "fnet",
    "FSMTTokenizer": "fsmt",
    "FlaubertTokenizer": "flaubert",
    "FunnelTokenizer": "funnel",
    "GPT2Tokenizer": "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip "
                     "instructblipvideo jais2 opt phi starcoder2",
    "GPTNeoXJapaneseTokenizer": "gpt_neox_japanese",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "GPTSw3Tokenizer": "gpt-sw3",
    "GemmaTokenizer": "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma "
                      "shieldgemma2 t5gemma zaya",
    "HerbertTokenizer": "herbert",
    "LlamaTokenizer": "idefics idefics2",
    "LukeTokenizer": "luke",
    "M2M100Tokenizer": "m2m_100",
    "MBart50Tokenizer": "mbart50",
    "MBartTokenizer": "mbart",
    "MLukeTokenizer": "mluke",
    "MPNetTokenizer": "mpnet",
    "MarianTokenizer": "marian",
    "MyT5Tokenizer": "myt5",
    "NllbTokenizer": "nllb nllb-moe",
    "OpenAIGPTTokenizer": "openai-gpt",
    "PLBartTokenizer": "plbart",
    "PegasusTokenizer": "pegasus",
    "PerceiverTokenizer": "perceiver",
    "PhobertTokenizer": "phobert",
    "ProphetNetTokenizer": "prophetnet",
    "Qwen2Tokenizer": "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl lighton_ocr "
                      "moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe "
                      "qwen2_vl qwen3 qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe vibevoice",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "RagTokenizer": "rag",
    "ReformerTokenizer": "reformer",
    "RemBertTokenizer": "rembert",
    "RoCBertTokenizer": "roc_bert",
    "RoFormerTokenizer": "roformer",
    "RobertaTokenizer": "bart bridgetower clap data2vec-text florence2 ibert led lilt longformer mega mra mvp roberta "
                        "roberta-prelayernorm",
    "SeamlessM4TTokenizer": "seamless_m4t seamless_m4t_v2",
    "SplinterTokenizer": "splinter",
    "T5Tokenizer": "mt5 musicgen musicgen_melody switch_transformers t5",
    "TapasTokenizer": "tapas",
    "UdopTokenizer": "udop",
    "WhisperTokenizer": "whisper",
    "XGLMTokenizer": "xglm",
    "XLMRobertaTokenizer": "gte jina_embeddings_v3 metaclip_2 trocr xlm-roberta xmod",
    "XLMTokenizer": "xlm",
    "XLNetTokenizer": "xlnet",
    AS_WRITTEN: "bigbird_pegasus flex_olmo gpt_bigcode granite granitemoe granitemoehybrid granitemoeshared ministral "
                "ministral3 mistral mistral3 mixtral nystromformer olmo2 olmo3 olmo_hybrid pegasus_x persimmon "
                "stablelm umt5 xlm-roberta-xl glm glm4 glm4_moe",
}
# Model types whose published tokenizer_config.json names a wrong class. The class of the type is
# used instead, or tokenizer.json is read unchanged.
_WRONGLY_DECLARED = _words(
    "arctic camembertv2-base chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax hyperclovax_vision_v2 "
    "hyperclovax_vlm internlm2 internlm3 iquestcoder jamba llava llava_next minicpm3 minicpmv minimax_m2 modernbert "
    "modernbert-decoder molmo molmo2 nemotron nvfp4 opencua openvla paddleocr_vl phi3 phi3_v phimoe qwen2 qwen3_5 "
    "qwen3_5_moe qwen3_5_moe_text qwen4_exp siglip2 smolvlm step3_vl vipllava")
_BY_TYPE = {kind: AS_WRITTEN for kind in _WRONGLY_DECLARED} | {
    kind: name for name, kinds in _TYPES.items() for kind in kinds.split()}
# Other names for the same class.
_SAME = {name: cls for cls, names in {
    "BertTokenizer": "DistilBertTokenizer ElectraTokenizer LayoutLMTokenizer LxmertTokenizer MobileBertTokenizer "
                     "SqueezeBertTokenizer ConvBertTokenizer DPRContextEncoderTokenizer "
                     "DPRQuestionEncoderTokenizer DPRReaderTokenizer",
    "RobertaTokenizer": "BartTokenizer LEDTokenizer LongformerTokenizer MvpTokenizer",
    "LlamaTokenizer": "Phi3Tokenizer",
    AS_WRITTEN: "PreTrainedTokenizer BloomTokenizer PythonBackend",
}.items() for name in names.split()}
# Tokenizer classes of transformers that no model type uses.
_FURTHER = _words(
    "ClvpTokenizer CodeGenTokenizer DiaTokenizer EsmcTokenizer LasrTokenizer LayoutLMv2Tokenizer "
    "LayoutLMv3Tokenizer LayoutXLMTokenizer MarkupLMTokenizer MgpstrTokenizer NougatTokenizer ParakeetTokenizer "
    "Siglip2Tokenizer SiglipTokenizer Speech2TextTokenizer SpeechT5Tokenizer Tipsv2Tokenizer VideoPrismTokenizer "
    "VitsTokenizer Wav2Vec2CTCTokenizer Wav2Vec2PhonemeCTCTokenizer SentencePieceBackend")


def tokenizer_class(settings: Mapping[str, Any], config: Mapping[str, Any], has_byte_level: bool) -> str:
    """Returns the name of the tokenizer class, without the suffix "Fast".

    Args:
      settings: the content of ``tokenizer_config.json``, which may name the class.
      config: the content of ``config.json``, which names the model type and may name the class.
      has_byte_level: whether ``tokenizer.json`` has a byte-level component. Llama's class has none,
        so such a file is read unchanged even if it names this class.

    Returns:
      A name in the table of classes; ``AS_WRITTEN``, also for a class that transformers does not
      know; or a class of transformers that this library does not support.
    """
    model_type = config.get("model_type")
    declared = _text(settings.get("tokenizer_class")) or _text(config.get("tokenizer_class"))
    usual = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if declared is None:
        return usual or AS_WRITTEN
    declared = declared.removesuffix("Fast")
    if declared == "LlamaTokenizer" and has_byte_level and model_type not in _WRONGLY_DECLARED:
        return AS_WRITTEN
    if usual is not None and usual != declared:
        if usual == AS_WRITTEN:
            return AS_WRITTEN
        declared = usual if model_type in _WRONGLY_DECLARED else declared
    declared = _SAME.get(declared, declared)
    return declared if declared in _TYPES or declared in _FURTHER else AS_WRITTEN


def _text(value: Any) -> str | None:
    """Returns a value that is a non-empty string, and ``None`` for any other value."""
    return value if isinstance(value, str) and value else None
