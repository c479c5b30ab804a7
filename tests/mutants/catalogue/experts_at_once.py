"""Slips in the products of several experts in one call, in experts of classes of their own, and in lists of experts."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_GROUPED = "dist_subspace/storage/grouped.py"
_STACK = "dist_subspace/storage/stack.py"
_INTERNALS = "dist_subspace/loading/experts_internals.py"
_OF_GROUPS = "tests/storage/test_grouped.py"
_OF_INTERNALS = "tests/loading/test_experts_internals.py"
_OF_LISTS = "tests/placement/deepspeed/test_expert_lists.py"

MUTANTS = [
    Mutant(
        name="grouped-decodes-all-at-once",
        file=_GROUPED,
        text="    for first in range(0, len(hits), at_once):\n",
        becomes="    at_once = len(hits)\n    buffer = x.new_zeros((at_once, *buffer.shape[1:]), dtype=kind)\n"
        "    for first in range(0, len(hits), at_once):\n",
        promise="At most model.experts_at_once matrices are decoded at once.",
        tests=[f"{_OF_GROUPS}::test_at_most_so_many_matrices_are_decoded_at_once_and_of_experts_with_tokens_alone[3]"],
    ),
    Mutant(
        name="grouped-row-factors-forgotten-backwards",
        file=_GROUPED,
        text="        if back:\n            given = _scaled(",
        becomes="        if False:\n            given = _scaled(",
        promise="The scales of int8's rows count in backward, too.",
        tests=[f"{_OF_GROUPS}::test_groups_give_what_each_expert_gives_alone[whole 16 bytes-torch.float32-False-int8]"],
    ),
    Mutant(
        name="grouped-scales-the-incoming-gradient-in-place",
        file=_GROUPED,
        text="    y = y.clone() if copy else y\n",
        becomes="",
        promise="A gradient that others hold, too, is not written over.",
        tests=[f"{_OF_GROUPS}::test_the_gradient_that_comes_in_is_not_written_over"],
    ),
    Mutant(
        name="grouped-rows-of-the-first-experts-twice",
        file=_GROUPED,
        text="        own = [slice(rows.start - start, rows.stop - start) for _, rows in some]\n",
        becomes="        own = [slice(rows.start, rows.stop) for _, rows in some]\n",
        promise="Every group of experts is multiplied with its own rows.",
        tests=[f"{_OF_GROUPS}::test_groups_give_what_each_expert_gives_alone[whole 16 bytes-torch.float32-False-int8]"],
    ),
    Mutant(
        name="stack-gives-other-rows-the-product-of-its-own",
        file=_STACK,
        text="        return x is self.pieces[self.places[number]]\n",
        becomes="        return True\n",
        promise="A method that scales its rows first is not given the product of the unscaled ones.",
        tests=[f"{_OF_GROUPS}::test_a_method_on_every_expert_has_the_products_of_all_in_one_call"],
    ),
    Mutant(
        name="experts-identities-dropped",
        file=_INTERNALS,
        text="    return y + (hidden_states * passed).to(y.dtype)\n",
        becomes="    return y\n",
        promise="LongCat-Flash's experts without weights pass their tokens on.",
        tests=[f"{_OF_INTERNALS}::test_classes_of_their_own_compute_what_their_own_forward_does[LongcatFlash]"],
    ),
    Mutant(
        name="experts-lists-are-no-leaves",
        file="dist_subspace/placement/deepspeed/leaf_blocks.py",
        text="    for block in (*leaves, *callers_of_experts(model)):\n",
        becomes="    for block in leaves:\n",
        promise="Ranks whose tokens go to different experts of a list do not wait for each other.",
        tests=[
            f"{_OF_LISTS}::test_ranks_whose_tokens_go_to_different_listed_experts_train_what_one_rank_trains[nf4-3-no leaves]"
        ],
    ),
    Mutant(
        name="experts-at-once-is-not-passed-on",
        file="dist_subspace/training/model.py",
        text="            experts_at_once=config.model.experts_at_once,\n",
        becomes="",
        promise="model.experts_at_once reaches the stacks.",
        tests=["tests/keys/test_model.py::test_a_key_changes_the_run_as_the_reference_says[model.experts_at_once]"],
    ),
    Mutant(
        name="pages-freed-memory-stays-in-the-heap",
        file="dist_subspace/pages.py",
        text="        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)\n",
        becomes="        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 25)\n",
        promise="Weights that ZeRO-3 gathers on a CPU and lets go are given back to the system.",
        tests=[
            "tests/test_pages.py::test_what_was_gathered_and_let_go_between_small_tensors_that_stay_is_given_back",
        ],
    ),
]
