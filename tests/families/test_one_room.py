"""What model families call their parts stands in `dist_subspace/families/` alone: a list of such names anywhere else is found."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

import pytest

from dist_subspace.families import attention, blocks, classes, configuration, experts, heads, norms, positions, towers
from dist_subspace.families import projections as p
from tests.ranks import ROOT

PACKAGE = ROOT / "dist_subspace"
ROOM = PACKAGE / "families"

TABLES: tuple[Iterable[str], ...] = (
    *(p.KEYS_AND_VALUES, p.FFN_INPUTS, p.BLOCK_INPUTS, p.FUSED_GATES, p.ATTENTION_OUTPUTS, p.FFN_OUTPUTS),
    *(p.NOT_ATTENTION_OUTPUTS, norms.WIDTH_ATTRIBUTES, norms.POST_NORMS, norms.POST_NORMS.values()),
    *(heads.HEAD_PARTS, heads.CLASSIFICATION_HEADS, [heads.POOLER], positions.POSITION_TABLES),
    *(attention.CROSS_ATTENTION, attention.HEAD_WIDTHS, towers.ENTITIES, towers.TOWERS, blocks.STACKS),
    *(blocks.ONE_FUNCTION, experts.ROUTERS, configuration.BIAS_SWITCHES, configuration.EXTRA_LAYERS),
    *(classes.TASKS_BY_ENDING, classes.READS_EVERY_TOKEN, classes.AUTO_CLASSES.values()),
)
# Names of parts that no table needs yet.
OTHERS = """
    q_proj gate_proj embed_tokens word_embeddings wte self_attn input_layernorm post_attention_layernorm ln_f final_layer_norm
    block_sparse_moe shared_expert q_lin Wq w1 w3 wi_0 DenseReluDense
"""
# Words of the tables that mean other things elsewhere: one of them alone says nothing, two in one list do.
ORDINARY_WORDS = """
    attn attention bias bottleneck cls decoder dense down encoder feed_forward ffn gate intermediate k key linear mlp o output
    proj query_key router score self up v value
"""
ORDINARY = frozenset(ORDINARY_WORDS.split())
# Lists of such words that are about something else.
ELSEWHERE = {
    "lstm mlp none": "the networks that make the tokens of P-tuning",
    "bias weight": "what a linear layer holds",
}
WORDS = {word for table in TABLES for name in table for word in name.split(".") if not word.isdigit()} | {
    *OTHERS.split()
}
COMPONENT = re.compile(r"[A-Za-z_]\w*")


def violations(source: str, path: str) -> list[str]:
    """Names of families' parts in a file outside the room, and comparisons with a family's name."""
    tree, places = ast.parse(source), []
    for constant in _names(tree):
        words = set(COMPONENT.findall(str(constant.value))) & WORDS - ORDINARY
        places += [f"{path}:{constant.lineno}: {' '.join(sorted(words))}"] if words else []
    for line, members in _lists(tree):
        words = {word for member in members for word in COMPONENT.findall(member)}
        if len(words & ORDINARY) > 1 and " ".join(sorted(words)) not in ELSEWHERE:
            places.append(f"{path}:{line}: {' '.join(sorted(words & ORDINARY))}")
    places += [f"{path}:{line}: a comparison with model_type" for line in _comparisons(tree)]
    return places


def _names(tree: ast.AST) -> Iterator[ast.Constant]:
    """The strings that hold no blank, and those that are split at blanks; no prose and no docstring."""
    split = {n.func.value for n in ast.walk(tree) if isinstance(n, ast.Call) and _is_split(n.func)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and (node in split or not re.search(r"\s", node.value)):  # type: ignore[attr-defined]
            yield node  # type: ignore[misc]


def _is_split(function: ast.AST) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == "split"


def _lists(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """The strings in each tuple, list, set or dict, those of lists unpacked into it among them; alternatives of a pattern."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            yield node.lineno, _strings(node.elts)
        elif isinstance(node, ast.Dict):
            yield node.lineno, _strings([key for key in node.keys if key is not None])
    for constant in _names(tree):
        yield constant.lineno, str(constant.value).split("|")


def _strings(nodes: Iterable[ast.expr]) -> list[str]:
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def _comparisons(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare) or "model_type" not in ast.unparse(node):
            continue
        if any(isinstance(n, ast.Constant) and n.value not in ("model_type", "") for n in ast.walk(node)):
            yield node.lineno


def outside() -> list[str]:
    return sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if ROOM not in file.parents)


@pytest.mark.parametrize("path", outside())
def test_no_name_of_a_familys_part_stands_outside_the_room(path: str) -> None:
    assert violations((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "HEADS = ('lm_head', 'embed_out')",
        "names = ['up_proj', 'fc1']",
        "targets = 'q_proj k_proj v_proj'.split()",
        "pattern = re.compile(r'(^|\\.)(score|classifier)$')",
        "if name.endswith('.down_proj'): pass",
        "if 'pooler' in name.split('.'): pass",
        "stack = next(c for c in components if c in ('encoder', 'decoder'))",
        "widths = {'head_dim': 1}",
        "switches = {'attention_bias', 'use_bias'}",
        "task = type(model).__name__.endswith('ForCausalLM')",
        "getattr(transformers, 'AutoModelForMaskedLM')",
        "if config.model_type == 'llama': pass",
        "if getattr(config, 'model_type', '') in ('bert', 'roberta'): pass",
        "f'{block}.self_attn.o_proj'",
    ],
)
def test_a_name_outside_the_room_is_found(source: str) -> None:
    assert violations(source, "x.py")


@pytest.mark.parametrize(
    "source",
    [
        '"""The layers q_proj and k_proj are adapted."""',
        "raise UsageError(f'{name} has no lm_head, and score is none')",
        "kinds = ('weight', 'bias')",
        "encoder = choice('mlp', 'lstm')",
        "key, value = state['key'], state['value']",
        "kind = getattr(config, 'model_type', None)",
    ],
)
def test_prose_and_ordinary_words_pass(source: str) -> None:
    assert violations(source, "x.py") == []
