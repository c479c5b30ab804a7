"""What torchrun shows of a rank that failed, in the place of "To enable traceback see ...": its sentence, in a file for it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def tell_torchrun(sentence: str, variables: Mapping[str, str] = os.environ) -> None:
    """Local: the last words of this rank, for the table that torchrun prints at the end. Elsewhere nothing."""
    file = variables.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")
