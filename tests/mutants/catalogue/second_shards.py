"""Second shards inside a node, and the preset that keeps them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_SECONDARY = "tests/placement/deepspeed/test_secondary.py"
_NODES = "tests/placement/test_nodes.py"

MUTANTS = [
    Mutant(
        name="second-shards-of-trained-parameters",
        file="dist_subspace/placement/deepspeed/secondary.py",
        text="if not param.requires_grad:",
        becomes="if True:",
        promise="A trained parameter has no second shard, which would be that of before the step.",
        tests=[f"{_SECONDARY}::test_a_trained_parameter_has_no_second_shard_and_an_edit_reaches_the_next_forward"],
    ),
    Mutant(
        name="trained-parameters-gathered-from-second-shards",
        file="dist_subspace/placement/deepspeed/persistent.py",
        text="            forget(absent)\n",
        becomes="",
        promise="What is gathered after a step are the values after the step, whoever has split the model.",
        tests=[f"{_SECONDARY}::test_a_model_that_deepspeed_splits_learns_too_and_others_follow_it"],
    ),
    Mutant(
        name="replaced-weights-in-first-shards-alone",
        file="dist_subspace/placement/deepspeed/shards.py",
        text="shard.copy_(_cut(whole.to(shard.device), start, shard.numel()))",
        becomes="pass",
        promise="A method that replaces the frozen matrix replaces it where forward gathers it from.",
        tests=[f"{_SECONDARY}::test_weights_that_a_method_replaces_are_replaced_in_second_shards_too"],
    ),
    Mutant(
        name="second-shards-not-counted",
        file="dist_subspace/placement/deepspeed/shards.py",
        text="shards = [parameter.ds_tensor, None if second is None else second[0]]",
        becomes="shards = [parameter.ds_tensor]",
        promise="The bytes that a rank keeps are those of both shards.",
        tests=[f"{_SECONDARY}::test_weights_in_forward_and_backward_are_the_files_and_the_adapter_is_zero_3s[int8]"],
    ),
    Mutant(
        name="group-of-the-last-model",
        file="dist_subspace/placement/deepspeed/secondary.py",
        text="if group is None or torch.distributed.get_world_size(group) != size:",
        becomes="if True:",
        promise="A second model in a process has second shards too.",
        tests=[f"{_SECONDARY}::test_a_second_model_uses_the_group_of_the_first"],
    ),
    Mutant(
        name="hierarchical-preset-without-hierarchy",
        file="dist_subspace/placement/deepspeed/presets.py",
        text="return {KEY: ranks_per_node}",
        becomes="return {}",
        promise="zero3-hpz keeps second shards.",
        tests=[
            "tests/placement/deepspeed/test_presets.py::test_second_shards_are_split_over_the_ranks_of_a_node_and_kept_where_they_"
            "are_asked_for_alone"
        ],
    ),
    Mutant(
        name="ranks-of-a-node-in-any-order",
        file="dist_subspace/placement/nodes.py",
        text="if seat.local_rank != rank % size:",
        becomes="if False:",
        promise="Second shards are split over ranks of one node, or refused.",
        tests=[f"{_NODES}::test_what_second_shards_cannot_be_split_over_is_refused"],
    ),
    Mutant(
        name="hierarchy-on-one-node",
        file="dist_subspace/placement/nodes.py",
        text="if len(seats) in (1, size):",
        becomes="if len(seats) == 1:",
        promise="zero3-hpz on one node is refused with the reason.",
        tests=[f"{_NODES}::test_what_second_shards_cannot_be_split_over_is_refused"],
    ),
    Mutant(
        name="stock-second-shards-unchecked",
        file="dist_subspace/placement/engines.py",
        text="    check_partition_size(made, facts.world_size)\n",
        becomes="",
        promise="A stock JSON's second shards that DeepSpeed would ignore or fail at are refused by name.",
        tests=["tests/training/test_engine_config.py::test_second_shards_of_a_stock_json_that_cannot_be_are_refused"],
    ),
]
