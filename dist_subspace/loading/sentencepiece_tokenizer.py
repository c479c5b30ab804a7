"""A bare sentencepiece model as a tokenizer of transformers: pieces by sentencepiece, special tokens as transformers reads them.

transformers 5 converts a bare sentencepiece file to its own backend, and the conversion changes ids: measured with
5.23, the dummy prefix is lost, and a unigram model keeps the blanks that its normaliser folds. So the pieces are
sentencepiece's here. Everything beside the model file (`added_tokens_decoder`, `added_tokens.json`,
`special_tokens_map.json`, named and extra special tokens, chat templates) is read by `from_pretrained` of transformers.

Read against transformers 5.23 (`tokenization_python.py`, `tokenization_utils_sentencepiece.py`): what is overridden and read of
its base class below the public surface begins with an underscore.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AddedToken, SentencePieceBackend

from dist_subspace.errors import UsageError

MOST_GAPS = 10_000  # ids without a token between the pieces and the largest added one; more is a broken file
BPE = 2  # TrainerSpec.model_type of sentencepiece
MARKS = ("add_bos_token", "add_eos_token")


class SentencePieceTokenizer(SentencePieceBackend):
    """A sentencepiece model run by sentencepiece: ids and texts of `SentencePieceProcessor`, byte fallback included.

    Added tokens have the ids that the files give them, also where those skip some or take a piece's place; a special token
    without an id follows the vocabulary. Added and special tokens are recognised in text (chat templates need that),
    which sentencepiece does not do; so are the model's control pieces. `legacy`, as in transformers: text behind such a token
    gets the model's dummy prefix too. Where the folder does not say, it does not, as in `AutoTokenizer`; a model that has no
    such token beside its marks of begin and end keeps it. `save_pretrained` writes the model file back unchanged;
    `load_tokenizer` reads that folder again.
    """

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        given = {
            key: _as_token(value) if key.endswith("_token") else value
            for key, value in kwargs.items()
            if value is not None
        }
        given = _own_special_tokens(model) | given
        added = _without_gaps(given.get("added_tokens_decoder", {}), model.get_piece_size())
        legacy = given.get("legacy", not _has_more(model, given, added))
        extra = given.get("extra_special_tokens") or given.pop("additional_special_tokens", None) or []
        if not isinstance(extra, dict):  # a dictionary names tokens; transformers takes it as it stands
            given["extra_special_tokens"] = list(extra) + [
                t for t in _controls(model).values() if t not in map(str, extra)
            ]
        added = _with_controls(model, added)
        begins, ends = (
            bool(given.get(f"add_{mark}", mark == "bos_token")) and mark in given for mark in ("bos_token", "eos_token")
        )
        pattern = {(True, True): "bos_eos", (True, False): "bos", (False, True): "eos"}.get((begins, ends), "none")
        self._beginning = model  # what a text begins with gets the dummy prefix; `sp_model` has none unless legacy
        self._first: str | None = None
        given |= {"add_bos_token": begins, "add_eos_token": ends, "added_tokens_decoder": added, "legacy": legacy}
        super().__init__(vocab_file=vocab_file, **given | {"special_tokens_pattern": pattern})
        if not given.get("add_prefix_space", True) and not legacy:
            self._beginning = self.sp_model

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        first = self.tokens_trie.split(text)[0] if text else ""
        self._first = None if first in self._added_tokens_encoder else first
        return super().tokenize(text, *args, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        begins, self._first = self._first is not None, None
        return self._beginning.encode(text, out_type=str) if begins else super()._tokenize(text, **kwargs)

    def _update_total_vocab_size(self) -> None:
        """The next id that is free, which is no count of entries: two ids may have one text."""
        self.total_vocab_size = max([self.sp_model.get_piece_size() - 1, *self._added_tokens_decoder]) + 1

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        """Runs of ordinary pieces through sentencepiece (which joins bytes), added tokens by their own text."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        special = {*self.all_special_ids, *(i for i, token in self._added_tokens_decoder.items() if token.special)}
        text, run = "", []
        for i in ids:
            # unk stays in the run: sentencepiece has a surface of its own for it.
            if i not in self._added_tokens_decoder or i == self.sp_model.unk_id():
                run.append(i)
                continue
            text += self._run_text(run, begins=not text)
            run = []
            if not skip_special_tokens or i not in special:
                text += self.convert_ids_to_tokens(i)
        return text + self._run_text(run, begins=not text)

    def _run_text(self, run: list[int], begins: bool) -> str:
        return (self._beginning if begins else self.sp_model).decode(run)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(list(tokens))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As transformers saves it, and with what it leaves out: the flags of the marks, and the class by which
        `AutoTokenizer` comes nearest (it knows none for a unigram model whose ids are the file's)."""
        written = super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory) / "tokenizer_config.json"
        settings = json.loads(file.read_text("utf-8")) | {key: self.init_kwargs[key] for key in MARKS}
        if _model_type(self.sp_model) == BPE:
            settings["tokenizer_class"] = "LlamaTokenizer"
        file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        return written


def added_beyond_pieces(tokenizer: SentencePieceTokenizer) -> list[list[Any]]:
    """[token, id] of every token that is recognised in text, the marks of the model's own begin and end aside, with its
    blank-eating flags if it has any: what decides on ids beside the model file."""
    model, beyond = tokenizer.sp_model, []
    marks = set(_own_special_tokens(model).values())
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.content not in marks or model.piece_to_id(token.content) != number:
            flags = [name for name in ("lstrip", "rstrip", "single_word") if getattr(token, name)]
            beyond.append([token.content, number, *flags])
    return sorted(beyond)


def _as_token(value: Any) -> Any:
    """tokenizer_config.json may write a special token as a dictionary, with or without the mark that transformers looks for."""
    return AddedToken(**value | {"special": True}) if isinstance(value, dict) else value


def _own_special_tokens(model: Any) -> dict[str, Any]:
    """The model file's own special tokens, by the names that transformers has for them."""
    ids = {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return {f"{name}_token": model.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _without_gaps(added: dict[Any, AddedToken], pieces: int) -> dict[int, AddedToken]:
    """The added tokens, with one for each id that they skip: `AutoTokenizer`, to which a saved tokenizer may go, counts them
    and would give every token behind a gap another id.

    Raises:
        UsageError: for an id that cannot be meant.
    """
    tokens = {int(number): token for number, token in added.items()}
    behind = sum(number >= pieces for number in tokens)
    largest, smallest = max(tokens, default=0), min(tokens, default=0)
    if smallest < 0 or largest - pieces - behind > MOST_GAPS:
        wrong = smallest if smallest < 0 else largest
        raise UsageError(
            f"the tokenizer gives {tokens[wrong].content!r} the id {wrong}; accepted: ids that follow its {pieces:,} pieces"
        )
    for number in range(pieces, largest):
        tokens.setdefault(number, AddedToken(f"<|reserved_token_{number}|>", normalized=False))
    return tokens


def _controls(model: Any) -> dict[int, str]:
    """Control pieces, which sentencepiece itself never finds in a text; unk and the marks of begin and end among them."""
    return {i: model.id_to_piece(i) for i in range(model.get_piece_size()) if model.is_control(i)}


def _with_controls(model: Any, added: dict[int, AddedToken]) -> dict[int, AddedToken]:
    texts = {str(token) for token in added.values()}
    missing = {i: text for i, text in _controls(model).items() if i not in added and text not in texts}
    tokens = {i: AddedToken(text, normalized=False, special=True) for i, text in missing.items()}
    return dict(sorted((tokens | added).items()))


def _has_more(model: Any, given: dict[str, Any], added: dict[int, AddedToken]) -> bool:
    """Whether there are special or added tokens beside the model's own unk, begin, end and padding."""
    extra = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    named = [value for key, value in given.items() if key.endswith("_token") and key not in MARKS]
    texts = {
        *named,
        *(extra.values() if isinstance(extra, dict) else extra),
        *added.values(),
        *_controls(model).values(),
    }
    return bool({str(text) for text in texts} - set(_own_special_tokens(model).values()))


def _model_type(model: Any) -> int:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time
    return int(messages.ModelProto.FromString(model.serialized_model_proto()).trainer_spec.model_type)
