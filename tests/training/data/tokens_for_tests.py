"""A small real tokenizer made in the test itself: words and punctuation as tokens, marks like LLaMA's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dist_subspace.training.data import DataSettings, Prepared, prepare

PIECE = r"\s|\w|[^\w\s]"


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts how often it is asked to tokenise."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def char_tokenizer(kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast, eos: bool = True) -> Any:
    """One token a character (printable ASCII and newline), <s> before every text, </s> as the end of sequence."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "\n": 3} | {chr(c): c - 28 for c in range(32, 127)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<unk>"} | ({"eos_token": "</s>"} if eos else {})
    return kind(tokenizer_object=core, **names)


def prepared(tmp_path: Path, tokenizer: Any = None, seed: int = 0, **settings: Any) -> Prepared:
    """The data of `settings`, with its cache in tmp_path."""
    data = DataSettings(**settings)
    task = "classification" if data.format == "classification" else "causal-lm"
    return prepare(data, tokenizer or char_tokenizer(), tmp_path / "cache", seed, False, task)


def texts(data: Prepared, tokenizer: Any = None) -> list[tuple[str, str]]:
    """(text, trained text) of every training sample; "^" is <s>, "$" is </s>."""
    tokenizer = tokenizer or char_tokenizer()
    return [tuple(_text(tokenizer, ids) for ids in data.train.sample(i)) for i in range(len(data.train))]


def _text(tokenizer: Any, ids: Any) -> str:
    text = "".join(tokenizer.convert_ids_to_tokens(int(i)) for i in ids if i != -100)
    return re.sub("</s>", "$", re.sub("<s>", "^", text))
