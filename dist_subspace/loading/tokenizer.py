"""Tokenizers from a model folder, a folder with a bare sentencepiece `tokenizer.model`, or a path to a `*.model` file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dist_subspace.errors import UsageError
from dist_subspace.loading.chat_template import read_processor_template
from dist_subspace.loading.hub import TOKENIZER_FILES, cached, fetch, is_hub_name
from dist_subspace.loading.sentencepiece_tokenizer import SentencePieceTokenizer

T = TypeVar("T")

# Classes whose ids are the sentencepiece ids unchanged. Others (XLM-R's offset by one, T5's extra ids) renumber pieces.
PLAIN_SENTENCEPIECE = {
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "SentencePieceTokenizer",
    "SentencePieceBackend",
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
}
LOOKED_FOR = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(
    model_folder: str, tokenizer: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or the one named by `tokenizer` (folder, `*.model` file, or Hub name).

    A folder is read from its own files only. Without a pad token, the end of sequence (or unk) doubles as one: the
    vocabulary never grows, and nothing downstream may tell padding from text by its id.

    Raises:
        UsageError: nothing there that is a tokenizer; says what was looked for.
    """
    place = tokenizer or model_folder
    path = Path(place).expanduser()
    if path.is_file():
        loaded = _from_file(path, place)
    else:
        folder = path if path.is_dir() else _from_hub(place)
        loaded = _from_folder(folder, place, trust_remote_code)
        read_processor_template(loaded, str(folder), local_files_only=True)
    _give_pad_token(loaded)
    return loaded


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The tokens' ids, in their order. Those that the tokenizer does not know follow its vocabulary, as special tokens: they
    are never split, and left out where special tokens are skipped.

    Raises:
        UsageError: for a token that is named twice or is blank, and for one that would get the id of another.
    """
    for token in tokens:
        if not token.strip() or list(tokens).count(token) > 1:
            raise UsageError(f"model.new_tokens has {token!r}; accepted: texts that are not blank, each once")
    known = tokenizer.get_vocab() if tokens else {}
    tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens))]
    # A vocabulary whose ids have gaps is extended by its number of tokens, which may be the id of one that is there.
    taken = {number: token for token, number in known.items()}
    for token, number in zip(tokens, ids):
        if taken.get(number, token) != token:
            raise UsageError(
                f"model.new_tokens has {token!r}, to which the tokenizer, whose ids have gaps, would give the id {number} of "
                f"{taken[number]!r}; accepted: a tokenizer without gaps, or tokens that it has"
            )
    return ids


def _from_file(path: Path, place: str) -> PreTrainedTokenizerBase:
    if path.name == "tokenizer.model" and _tokenizer_config(path.parent).get("tokenizer_class") in PLAIN_SENTENCEPIECE:
        return _sentencepiece(path, path.parent)  # what lies beside it belongs to it
    if path.suffix == ".model":
        return _sentencepiece(path, path)
    if path.name == "tokenizer.json":
        return _from_folder(path.parent, place, False)
    raise UsageError(f"model.tokenizer is {place!r}; accepted: a folder, a sentencepiece file (*.model), a Hub name")


def _from_folder(folder: Path, place: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in LOOKED_FOR):
        raise UsageError(f"no tokenizer in {place!r}: looked for {', '.join(LOOKED_FOR)}; name one by model.tokenizer")
    settings = _tokenizer_config(folder)
    bare = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if bare and settings.get("tokenizer_class") in PLAIN_SENTENCEPIECE:
        return _sentencepiece(folder / "tokenizer.model", folder)
    return _by_auto_tokenizer(str(folder), place, trust_remote_code)


def _from_hub(name: str) -> Path:
    """The copy on this machine; the hub is asked where there is none."""
    if not is_hub_name(name):
        raise UsageError(f"no tokenizer: {name!r} is no folder or file here")
    return cached(name, TOKENIZER_FILES) or fetch(name, "model.tokenizer", TOKENIZER_FILES)


def _by_auto_tokenizer(source: str, place: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    # Which exceptions transformers raises here differs by version and backend; to the person they are all this one.
    return _loaded_or_refused(
        lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=True),
        f"the tokenizer of {place!r} cannot be loaded (looked for {', '.join(LOOKED_FOR)})",
    )


def _sentencepiece(file: Path, source: Path) -> SentencePieceTokenizer:
    """A sentencepiece model as a tokenizer; source: the file alone, or its folder, whose other files say what is added to it."""
    import sentencepiece

    _loaded_or_refused(
        lambda: sentencepiece.SentencePieceProcessor().Load(str(file)), f"{str(file)!r} is no sentencepiece model"
    )
    if source == file:
        return SentencePieceTokenizer(str(file))
    return _loaded_or_refused(
        lambda: SentencePieceTokenizer.from_pretrained(str(source), local_files_only=True),
        f"the tokenizer of {str(source)!r} cannot be loaded",
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    settings = _loaded_or_refused(lambda: json.loads(file.read_text("utf-8")), f"{str(file)!r} is not JSON")
    if not isinstance(settings, dict):
        raise UsageError(f"{str(file)!r} holds {type(settings).__name__}; accepted: an object")
    return settings


def _give_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        others = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next(filter(None, others), None) or tokenizer.convert_ids_to_tokens(0)


def _loaded_or_refused(load: Callable[[], T], complaint: str) -> T:
    """What `load` gives; whatever it raises becomes a UsageError that begins with the complaint."""
    try:
        return load()
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason += "; accepted: model.trust_remote_code true, with its folder named"
        raise UsageError(f"{complaint}: {reason}") from error
