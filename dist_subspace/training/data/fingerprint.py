"""What decides on the ids of a text, as one string."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dist_subspace.loading.sentencepiece_tokenizer import added_beyond_pieces
from dist_subspace.training.data.encoding import Encoder


def digest(value: Any) -> str:
    """sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what decides on ids: the vocabulary with its rules, the marks, the chat template."""
    if hasattr(tokenizer, "sp_model"):
        body: Any = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
        added = added_beyond_pieces(tokenizer)
        body = [body, added] if added else body
    elif getattr(tokenizer, "backend_tokenizer", None) is not None:
        body = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by the last call that was made, not by the tokenizer's files.
        body = {key: value for key, value in body.items() if key not in ("truncation", "padding")}
    else:
        body = sorted(tokenizer.get_vocab().items())
    encoder = Encoder(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    return digest([body, encoder.opening, encoder.closing, encoder.end, template])
