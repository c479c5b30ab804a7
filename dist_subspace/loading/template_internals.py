"""Chat templates below transformers' public surface: a file of a model's folder, the compiled template in a sandbox that answers
sooner, and the spans of its marks.

Beside transformers_internals.py and not in it, because processes that only tokenise do not import torch. Read against
transformers 5.23.0 (`utils/hub.py`, `utils/chat_template_utils.py`) and jinja2 3.1.6 (`sandbox.py`);
tests/loading/test_template_internals.py fails when what is used here moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import BuiltinMethodType
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

Message = dict[str, Any]
OF_DICTIONARIES = frozenset(dir(dict))
SCALARS = frozenset((str, int, float, bool, type(None)))
FORMATS = ("format", "format_map")  # methods of texts that the sandbox wraps


def file_of(source: str, name: str, local_files_only: bool) -> str | None:
    """The path of a file of a model's folder or Hub repository; None where there is no such file, or no way to it."""
    path: str | None = cached_file(
        source,
        name,
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return path


def rendered_with_marks(
    messages: list[Message], template: str, tools: Any, documents: Any, prompt: bool, variables: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The messages as `apply_chat_template` renders them, and the spans that the template itself marks as the assistant's.

    Raises:
        Exception: whatever the template raises, and where it has no marks.
    """
    texts_and_spans: Any = render_jinja_template(  # (texts, spans of each), whatever its signature says
        conversations=[messages],
        tools=tools,
        documents=documents,
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        **variables,
    )
    (rendered,), (spans,) = texts_and_spans
    return rendered, [(start, end) for start, end in spans]


class _Quick(ImmutableSandboxedEnvironment):
    """The sandbox, which decides by the type of a value and the name of an attribute, and here does so once for each two."""

    safe: dict[tuple[type, str], bool]

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in OF_DICTIONARIES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if self.safe.get((kind, attribute)):
            try:
                value = getattr(obj, attribute)
            except AttributeError:
                return super().getattr(obj, attribute)
            if type(value) in SCALARS or (kind is str and attribute not in FORMATS):
                return value
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = (type(obj), attr)
        is_safe = self.safe.get(key)
        if is_safe is None:
            is_safe = self.safe[key] = super().is_safe_attribute(obj, attr, value)
        return is_safe

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str:
            kwargs.pop("_loop_vars", None)  # what the compiled template passes for functions that ask for it
            kwargs.pop("_block_vars", None)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


@lru_cache(maxsize=16)
def _quick_template(template: str) -> Any:
    """transformers' own compiled template: its filters, functions and extensions, in the other sandbox."""
    environment: Any = _compile_jinja_template(template).environment.overlay()
    environment.__class__ = _Quick
    environment.safe = {}
    return environment.from_string(template)


def quick_rendering(tokenizer: Any) -> Callable[[list[Message]], str] | None:
    """A function that renders messages as `apply_chat_template(messages, tokenize=False)` does; None for a tokenizer that
    renders otherwise than by its template. The messages must be plain: {role, content}, both exactly `str`."""
    if "apply_chat_template" in vars(tokenizer):
        return None
    if getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    template = _quick_template(tokenizer.get_chat_template(None, None))
    variables = {"tools": None, "documents": None, "add_generation_prompt": False} | tokenizer.special_tokens_map

    def rendered(messages: list[Message]) -> str:
        return template.render(messages=messages, **variables)

    return rendered
