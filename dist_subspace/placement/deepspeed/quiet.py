"""What libraries say about themselves while an engine is made."""

from __future__ import annotations

import logging
import warnings


def be_quiet() -> None:
    """Hold back what libraries say about themselves: DeepSpeed's progress, and torch's notes on functions that DeepSpeed
    calls by their old names. Errors still come through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
