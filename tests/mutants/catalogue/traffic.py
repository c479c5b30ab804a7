"""What a step sends, and how much of it is needed."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/placement/test_traffic.py"

MUTANTS = [
    Mutant(
        name="frozen-embedding-gathered-in-backward",
        file="dist_subspace/placement/deepspeed/engine.py",
        text="    spare_frozen_embeddings(engine.module)\n",
        becomes="",
        promise="A frozen embedding is gathered for forward alone, with activation checkpointing too.",
        tests=[f"{_TESTS}::test_a_head_that_is_larger_than_a_block_is_gathered_once"],
    ),
    Mutant(
        name="trained-embedding-not-gathered-in-backward",
        file="dist_subspace/placement/deepspeed/embeddings.py",
        text="all(is_partitioned(p) and not p.requires_grad for p in own)",
        becomes="all(is_partitioned(p) for p in own)",
        promise="A trained embedding goes DeepSpeed's own way.",
        tests=["tests/placement/deepspeed/test_embeddings.py::test_frozen_embeddings_alone_are_spared"],
    ),
    Mutant(
        name="packed-bytes-cross-with-second-shards",
        file="dist_subspace/placement/traffic.py",
        text="Sent(weights, weights if near > ranks_per_node else 0)",
        becomes="Sent(weights, weights)",
        promise="By the formula too, second shards keep packed bytes inside a node.",
        tests=[f"{_TESTS}::test_blocks_and_norms_are_sent_for_forward_and_for_backward_embedding_and_head_once"],
    ),
    Mutant(
        name="gradients-once-a-step-at-stage-2",
        file="dist_subspace/placement/traffic.py",
        text="(rounds if stage == 2 else 1)",
        becomes="1",
        promise="At stage 2 gradients are summed once a micro-batch.",
        tests=[f"{_TESTS}::test_gradients_are_summed_once_a_step_below_stage_2_and_once_a_micro_batch_from_there_on"],
    ),
    Mutant(
        name="nothing-kept-for-its-backward",
        file="dist_subspace/placement/traffic.py",
        text="reversed(units) if unit.in_backward)",
        becomes="reversed(units))",
        promise="The formula knows what is sent for forward alone.",
        tests=[f"{_TESTS}::test_blocks_and_norms_are_sent_for_forward_and_for_backward_embedding_and_head_once"],
    ),
    Mutant(
        name="shards-without-padding",
        file="dist_subspace/placement/traffic.py",
        text="    return -(-numel // ranks)\n",
        becomes="    return numel // ranks\n",
        promise="A tensor that the ranks do not divide is sent in shards that are rounded up.",
        tests=[f"{_TESTS}::test_gradients_are_summed_once_a_step_below_stage_2_and_once_a_micro_batch_from_there_on"],
    ),
    Mutant(
        name="users-allocator-overruled",
        file="dist_subspace/cuda_allocator.py",
        text="and not any(name in variables for name in NAMES)",
        becomes="and NAMES[0] not in variables",
        promise="A user's own setting of the allocator stays, under its older name too.",
        tests=["tests/test_cuda_allocator.py::test_a_users_own_setting_stays"],
    ),
    Mutant(
        name="allocator-chosen-too-late",
        file="dist_subspace/cli.py",
        text="    let_segments_grow()\n",
        becomes="",
        promise="The command line chooses the allocator's segments before torch is there.",
        tests=["tests/test_cuda_allocator.py::test_the_command_line_chooses_before_torch_is_imported"],
    ),
]
