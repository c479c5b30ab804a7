"""Chat templates of well-known families (in own words), and small tokenizers of every kind, made in the test itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dist_subspace.training.data.chat import chat
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.samples import Outcome
from dist_subspace.training.data.settings import DataSettings

Message = dict[str, Any]
SETTINGS = DataSettings(train="x.jsonl", format="chat", max_length=100_000)
TEMPLATES = Path(__file__).parent / "templates"
CHATML = ["<|im_start|>", "<|im_end|>"]
SPECIAL = {
    "chatml": CHATML,
    "llama2": [],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral_v1": [],
    "mistral_v3": ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"],
    "qwen2": CHATML,
    "qwen3": CHATML,
    "gemma2": ["<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": [],
    "glm4_5": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "deepseek_r1": ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "command_r": ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"],
    "granite": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    "harmony": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
    "marked": CHATML,
    "endless": [],
    "needs_question": CHATML,
}  # fmt: skip
"""The special tokens of each template, beside <s> and </s>."""
CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice: 1 2 3.",
    "assistant user system tool call name arguments model think",
    'ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 w0q w1q w2q w3q w4q w5q w6q w7q w8q w9q [](){}<>/|_.,:!?#"',
]


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    core = Tokenizer(model)
    for name, part in parts.items():
        setattr(core, name, part)
    core.train_from_iterator(CORPUS * 4, trainer)
    return core


def byte_level() -> Tokenizer:
    """As GPT-2, LLaMA 3, Qwen."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"])
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), trainer, pre_tokenizer=split, decoder=decoders.ByteLevel())


def byte_fallback() -> Tokenizer:
    """As LLaMA 2 and Mistral: sentencepiece BPE with a blank before a text, unknown characters as bytes."""
    tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *tokens])
    core = _trained(
        models.BPE(byte_fallback=True, unk_token="<unk>"),
        trainer,
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def word_piece() -> Tokenizer:
    """As BERT: lower case, no blanks."""
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    core = _trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )
    core.decoder = decoders.WordPiece(prefix="##")
    return core


def unigram() -> Tokenizer:
    """As T5 and ALBERT: runs of blanks become one, line ends become blanks."""
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    return _trained(
        models.Unigram(),
        trainer,
        normalizer=normalizers.Sequence([normalizers.NFKC(), blanks, normalizers.Strip()]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


KINDS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "word-piece": word_piece, "unigram": unigram}
LOSSLESS = ("byte-level", "byte-fallback")
"""Kinds whose tokens hold every character of the text."""


@cache
def _made(kind: str) -> str:
    return KINDS[kind]().to_str()


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text("utf-8").removesuffix("\n")


def chat_tokenizer(kind: str, template: str, ends: bool = True) -> Any:
    """A tokenizer of that kind with that template and its special tokens; without an end of sequence if not `ends`."""
    core = Tokenizer.from_str(_made(kind))
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[template]])
    names = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<unk>"} | ({"eos_token": "</s>"} if ends else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = template_text(template)
    return tokenizer


def outcomes(tokenizer: Any, messages: list[Message], **columns: Any) -> list[Outcome]:
    return chat([Row({"messages": messages} | columns, 1, "x", SETTINGS)], Encoder(tokenizer))[0]


def parts(tokenizer: Any, outcome: Outcome) -> tuple[str, str]:
    """(trained, not trained), decoded."""
    assert outcome.sample is not None
    found: dict[bool, list[int]] = {True: [], False: []}
    for i, is_trained in zip(outcome.sample.ids, outcome.sample.trained):
        found[bool(is_trained)].append(int(i))
    return tokenizer.decode(found[True]), tokenizer.decode(found[False])
