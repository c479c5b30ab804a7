"""What families call the table that gives each position a vector."""

from __future__ import annotations

from torch import nn

from dist_subspace.families.names import last_component

# BERT, OPT and BART, GPT-2, and families of BERT's kin that say it in the singular.
POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding")
# The table whose own padding row says that the family counts behind it (RoBERTa and its kin).
PADDED_TABLE = "position_embeddings"


def has_learned_positions(stack: nn.Module) -> bool:
    """Whether positions are rows of a table (and not rotations, or distances between tokens)."""
    return any(
        last_component(name) in POSITION_TABLES and isinstance(m, nn.Embedding) for name, m in stack.named_modules()
    )


def first_position(stack: nn.Module) -> int:
    """Where a stack begins to count: 0, or after the padding's own position (RoBERTa and its kin)."""
    for name, module in stack.named_modules():
        if name.endswith(PADDED_TABLE) and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0
