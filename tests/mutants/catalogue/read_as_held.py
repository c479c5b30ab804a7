"""What a load reads once more: experts in the file's own bytes, a revision, a file that is cut, a state in parts."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_LOADING = "tests/loading"
_JOINED = f"{_LOADING}/test_joined_bytes.py::test_experts_of_bitsandbytes_are_not_rounded_again"
_REVISION = (
    f"{_LOADING}/test_hub.py::test_a_revision_of_quantised_weights_is_what_is_read_and_a_commit_is_not_asked_for_again"
)

MUTANTS = [
    Mutant(
        name="statistics-of-the-first-blocks",
        file="dist_subspace/loading/formats/bitsandbytes_4bit.py",
        text="return plain_absmax(packed)[low - known :].view",
        becomes="return plain_absmax(packed)[: high - low].view",
        promise="The statistics of an expert's blocks are their own, wherever a rank's part begins.",
        tests=[f"{_JOINED}[nf4-True]"],
    ),
    Mutant(
        name="offset-of-an-expert-forgotten",
        file="dist_subspace/loading/own_parts.py",
        text="[own | dict(values) for values in held.plain]",
        becomes="[own for _ in held.plain]",
        promise="Each expert of a stack whose bytes are kept has the offset of its own double quantisation.",
        tests=[f"{_JOINED}[nf4-True]"],
    ),
    Mutant(
        name="codes-joined-to-floats",
        file="dist_subspace/loading/sources.py",
        text="        if codes is not None and any(kind in FLOATS for kind in kinds.values()):",
        becomes="        if False:",
        promise="Codes among the floats of experts are refused, and not joined to them as if they were numbers.",
        tests=[
            f"{_LOADING}/test_failures_of_formats.py::test_every_rank_says_the_same_of_what_a_folder_lacks[experts]"
        ],
    ),
    Mutant(
        name="newest-whatever-the-revision",
        file="dist_subspace/loading/hub.py",
        text="snapshot_download(name, revision=revision, allow_patterns=[*wanted, *weights])",
        becomes="snapshot_download(name, allow_patterns=[*wanted, *weights])",
        promise="The files that are fetched are those of the revision that was asked for.",
        tests=[_REVISION],
    ),
    Mutant(
        name="a-commit-is-asked-for-again",
        file="dist_subspace/loading/hub.py",
        text="    if copy is not None and copy.name == revision:",
        becomes="    if False:",
        promise="A commit that is whole in the cache is taken without a question.",
        tests=[_REVISION],
    ),
    Mutant(
        name="revision-of-a-run-forgotten",
        file="dist_subspace/training/plan.py",
        text="        folder = resolve_folder(config.model.path, config.model.revision)\n",
        becomes="        folder = resolve_folder(config.model.path)\n",
        promise="A run trains beside the revision that its configuration names.",
        tests=["tests/keys/test_model.py::test_a_key_changes_the_run_as_the_reference_says[model.revision]"],
    ),
    Mutant(
        name="whole-state-on-every-rank",
        file="dist_subspace/checkpoint/state.py",
        text="                if size > self.GROUP:\n",
        becomes="                if False:\n",
        promise="A rank holds a part of the optimizer's file at a time while a run is resumed.",
        tests=[
            "tests/checkpoint/test_state.py::"
            "test_no_rank_holds_more_of_the_optimizers_state_than_a_part_while_a_run_is_resumed"
        ],
    ),
    Mutant(
        name="lists-of-experts-not-watched",
        file="dist_subspace/placement/for_loading.py",
        text="    watch_expert_lists(model)\n",
        becomes="",
        promise="Adapters on listed experts are refused at ZeRO's stages 1 and 2 under transformers' Trainer too.",
        tests=["tests/placement/deepspeed/test_expert_lists.py::test_transformers_trainer_is_refused_the_same[2]"],
    ),
    Mutant(
        name="fp8-edge-rows-take-the-first-scale",
        file="dist_subspace/storage/fp8.py",
        text="            numbers[whole:].mul_(own[-1])",
        becomes="            numbers[whole:].mul_(own[0])",
        promise="The rows beyond the last whole block have the last scales.",
        tests=["tests/storage/test_fp8.py"],
    ),
    Mutant(
        name="fp4-upper-half-first",
        file="dist_subspace/loading/formats/fp8.py",
        text="        numbers = unpacked(codes.entries(read, start // 2, stop // 2)).view(-1, GROUP)",
        becomes="        numbers = unpacked(codes.entries(read, start // 2, stop // 2)).view(-1, 2).flip(1).reshape(-1, GROUP)",
        promise="Of two numbers of 4 bits in a byte the lower half is the earlier one.",
        tests=[
            f"{_LOADING}/formats/test_fp8.py::test_experts_in_4_bits_beside_fp8_are_the_numbers_of_transformers",
        ],
    ),
]
