"""The chat template of a model whose files keep it where AutoTokenizer does not look.

transformers reads `tokenizer_config.json` (a text, or a list of named ones), `chat_template.jinja` and
`additional_chat_templates/`. Models with a processor (vision-language ones) may keep it in `chat_template.json`, which only
the processor reads.
"""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from dist_subspace.errors import UsageError
from dist_subspace.loading.template_internals import file_of

FILE = "chat_template.json"


def read_processor_template(tokenizer: PreTrainedTokenizerBase, source: str, local_files_only: bool) -> None:
    """Give a tokenizer without a template the one of the folder's (or Hub repository's) `chat_template.json`.

    Raises:
        UsageError: the file holds none.
    """
    if getattr(tokenizer, "chat_template", None):
        return
    file = file_of(source, FILE, local_files_only)
    if file is None:
        return
    try:
        with open(file, encoding="utf-8") as text:
            template = json.load(text)["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{FILE} of {source!r} holds no chat template: {type(error).__name__}: {error}") from error
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    tokenizer.chat_template = template
