"""Tokenizers from a model folder, a folder with a bare sentencepiece `tokenizer.model`, or a path to a `*.model` file.

transformers 5 converts a bare sentencepiece file to its own backend, and the conversion changes ids: measured with
5.23, the dummy prefix is lost, and a unigram model keeps the blanks that its normaliser folds. So a bare file is run
by sentencepiece itself here, and only what transformers cannot take from it (special tokens, chat template) is added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, SentencePieceBackend

from dist_subspace.errors import UsageError

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


class SentencePieceTokenizer(SentencePieceBackend):
    """A sentencepiece model run by sentencepiece: ids and texts of `SentencePieceProcessor`, byte fallback included.

    The markers of begin and end of sequence are recognised in text (chat templates need that), which sentencepiece
    does not do. `save_pretrained` writes the model file back unchanged; `load_tokenizer` reads that folder again.
    """

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        super().__init__(vocab_file=vocab_file, **{**kwargs, "legacy": True})

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        """Runs of ordinary pieces through sentencepiece (which joins bytes), special tokens by their own text."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        special = set(self.all_special_ids)
        text, run = "", []
        for i in ids:
            # unk stays in the run: sentencepiece has a surface of its own for it.
            if i < self.sp_model.get_piece_size() and (i not in special or i == self.sp_model.unk_id()):
                run.append(i)
                continue
            text += self.sp_model.decode(run)
            run = []
            if not skip_special_tokens or i not in special:
                text += self.convert_ids_to_tokens(i)
        return text + self.sp_model.decode(run)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(list(tokens))


def load_tokenizer(model_folder: str, tokenizer: str | None = None, trust_remote_code: bool = False) -> Any:
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
    elif path.is_dir():
        loaded = _from_folder(path, place, trust_remote_code)
    else:
        loaded = _from_hub(place, trust_remote_code)
    _give_pad_token(loaded)
    return loaded


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The tokens' ids, in their order. Those that the tokenizer does not know follow its vocabulary, as special tokens: they
    are never split, and left out where special tokens are skipped.

    Raises:
        UsageError: for a token that is named twice or is blank.
    """
    for token in tokens:
        if not token.strip() or list(tokens).count(token) > 1:
            raise UsageError(f"model.new_tokens has {token!r}; accepted: texts that are not blank, each once")
    known = tokenizer.get_vocab() if tokens else {}
    tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)
    return [int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens))]


def _from_file(path: Path, place: str) -> Any:
    if path.suffix == ".model":
        return _sentencepiece(path, {})
    if path.name == "tokenizer.json":
        return _from_folder(path.parent, place, False)
    raise UsageError(f"model.tokenizer is {place!r}; accepted: a folder, a sentencepiece file (*.model), a Hub name")


def _from_folder(folder: Path, place: str, trust_remote_code: bool) -> Any:
    if not any((folder / name).is_file() for name in LOOKED_FOR):
        raise UsageError(f"no tokenizer in {place!r}: looked for {', '.join(LOOKED_FOR)}; name one by model.tokenizer")
    settings = _tokenizer_config(folder)
    bare = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if bare and settings.get("tokenizer_class") in PLAIN_SENTENCEPIECE:
        return _with_added_tokens(_sentencepiece(folder / "tokenizer.model", settings), folder / "added_tokens.json")
    return _auto(str(folder), place, trust_remote_code, local_files_only=True)


def _from_hub(name: str, trust_remote_code: bool) -> Any:
    if name.startswith((".", "/", "~")) or name.endswith((".model", ".json")) or name.count("/") > 1:
        raise UsageError(f"no tokenizer: {name!r} is no folder or file here")
    return _auto(name, name, trust_remote_code, local_files_only=False)


def _auto(source: str, place: str, trust_remote_code: bool, local_files_only: bool) -> Any:
    # Which exceptions transformers raises here differs by version and backend; to the person they are all this one.
    return _readable(
        lambda: AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        ),
        f"the tokenizer of {place!r} cannot be loaded (looked for {', '.join(LOOKED_FOR)})",
    )


def _sentencepiece(path: Path, settings: dict[str, Any]) -> SentencePieceTokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    _readable(lambda: model.Load(str(path)), f"{str(path)!r} is no sentencepiece model")
    special = {
        f"{name}_token": model.id_to_piece(i)
        for name, i in (("unk", model.unk_id()), ("bos", model.bos_id()), ("eos", model.eos_id()))
        if i >= 0
    }
    if model.pad_id() >= 0:
        special["pad_token"] = model.id_to_piece(model.pad_id())
    for key in ("unk_token", "bos_token", "eos_token", "pad_token"):
        named = _token_text(settings.get(key))
        # A special token that the model file lacks would grow the vocabulary beyond the embedding.
        if named is not None and model.id_to_piece(model.piece_to_id(named)) == named:
            special[key] = named
    keys = ("model_max_length", "padding_side", "chat_template")
    known = {key: settings[key] for key in keys if settings.get(key) is not None}
    begins = settings.get("add_bos_token", True) and "bos_token" in special
    ends = settings.get("add_eos_token", False) and "eos_token" in special
    pattern = {(True, True): "bos_eos", (True, False): "bos", (False, True): "eos"}.get((begins, ends), "none")
    # The two flags are kept too: a saved tokenizer_config.json must say them to whoever reads it.
    return SentencePieceTokenizer(
        str(path), special_tokens_pattern=pattern, add_bos_token=begins, add_eos_token=ends, **known, **special
    )


def _with_added_tokens(tokenizer: SentencePieceTokenizer, file: Path) -> SentencePieceTokenizer:
    """With the tokens that `save_pretrained` writes beside the model file: those that follow its pieces."""
    if file.is_file():
        added: dict[str, int] = _readable(lambda: json.loads(file.read_text("utf-8")), f"{str(file)!r} is not JSON")
        pieces = tokenizer.sp_model.get_piece_size()
        behind = sorted((number, token) for token, number in added.items() if number >= pieces)
        if [number for number, _ in behind] != list(range(pieces, pieces + len(behind))):
            raise UsageError(f"{str(file)!r} has ids that do not follow the model's {pieces} pieces")
        extend_tokenizer(tokenizer, [token for _, token in behind])
    return tokenizer


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = {}
    if file.is_file():
        settings = _readable(lambda: json.loads(file.read_text("utf-8")), f"{str(file)!r} is not JSON")
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text("utf-8")
    return settings


def _token_text(token: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string, or as a dictionary with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _give_pad_token(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
        )


def _readable(load: Callable[[], Any], complaint: str) -> Any:
    try:
        return load()
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(f"{complaint}: {reason}") from error
