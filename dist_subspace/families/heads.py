"""What families call output layers and classification heads."""

from __future__ import annotations

from torch import nn

from dist_subspace.families.embeddings import output_embeddings
from dist_subspace.families.names import ends_with_any, last_component

# A linear layer that gives a class a number. PEFT trains these two for a classification task, whatever else it is told.
CLASSIFIERS = ("classifier", "score")
# The linear layer that finds an answer's first and last token.
ANSWERS = ("qa_outputs",)
# Heads that are one linear layer; `embed_out` is GPT-NeoX's.
OUTPUT_LAYERS = ("lm_head", *CLASSIFIERS, *ANSWERS, "embed_out")
# All that may belong to a head: `cls` holds BERT's, `pre_classifier` is DistilBERT's layer before the classifier.
HEAD_PARTS = (*OUTPUT_LAYERS, "cls", "pre_classifier")
# Classification heads of any number of layers; `classification_head` is BART's and T5's.
CLASSIFICATION_HEADS = (*CLASSIFIERS, "classification_head")
# The layer behind an encoder's first token; a checkpoint without a head may lack it.
POOLER = "pooler"


def head_names(model: nn.Module) -> list[str]:
    """Output layers: what the model says, and the usual names of heads of one layer."""
    head = output_embeddings(model)
    return [n for n, m in model.named_modules() if m is head or ends_with_any(n, OUTPUT_LAYERS)]


def classification_heads(model: nn.Module) -> list[str]:
    """The names of the model's classification heads, each whole."""
    return [name for name, _ in model.named_children() if name in CLASSIFICATION_HEADS]


def is_inside_classification_head(name: str) -> bool:
    return name.partition(".")[0] in CLASSIFICATION_HEADS


def is_head_layer(name: str) -> bool:
    """Whether a linear layer of that name is a part of a head, by its last word."""
    return last_component(name) in HEAD_PARTS


def is_inside_head(name: str) -> bool:
    return any(component in HEAD_PARTS for component in name.split("."))


def is_inside_pooler(name: str) -> bool:
    return POOLER in name.split(".")


def base_prefix(model: nn.Module) -> str:
    """The name under which a model with a head holds its body (`base_model_prefix`); empty where it has none."""
    return getattr(model, "base_model_prefix", "") or ""
