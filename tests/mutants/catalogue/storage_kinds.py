"""What a storage says of itself: its options, its bytes, the layers that it takes over; and fp8."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FP8, REGISTRY, FOUR_BIT, ADOPT = (
    f"dist_subspace/storage/{name}.py" for name in ("fp8", "registry", "four_bit", "adopt")
)
BYTES = "tests/storage/test_fp8.py::test_codes_and_scales_are_those_of_transformers"
EDGES = "tests/storage/test_fp8.py::test_blocks_at_the_edge_have_scales_of_their_own"
TAKEN = "tests/storage/test_registry.py::test_a_matrix_takes_the_bytes_that_its_storage_says"
OLDER = "tests/storage/test_registry.py::test_the_older_name_reaches_the_storages_that_have_the_option"

MUTANTS = [
    Mutant(
        name="fp8-scaled-to-240",
        file="dist_subspace/storage/fp8.py",
        text="LARGEST = torch.finfo(KIND).max",
        becomes="LARGEST = 240.0",
        promise="The largest number of a block becomes the largest float8 e4m3, 448.",
        tests=[BYTES],
    ),
    Mutant(
        name="fp8-scale-a-strip",
        file="dist_subspace/storage/fp8.py",
        text="view(-1, BLOCK).amax(dim=1)",
        becomes="view(-1, BLOCK).amax(dim=1).amax().expand(scale.shape[1])",
        promise="Each block of 128 x 128 has a scale of its own.",
        tests=[BYTES],
    ),
    Mutant(
        name="fp8-zeros-become-nothing",
        file="dist_subspace/storage/fp8.py",
        text="torch.where(largest > 0, LARGEST / largest, torch.ones_like(largest))",
        becomes="LARGEST / largest",
        promise="A block of zeros stays zeros.",
        tests=[BYTES],
    ),
    Mutant(
        name="fp8-edge-takes-the-next-scale",
        file="dist_subspace/storage/fp8.py",
        text="repeat_interleave(BLOCK, 1)[:, : self.in_features]",
        becomes="repeat_interleave(BLOCK, 1)[:, -self.in_features :]",
        promise="The columns beyond the last whole block have the last scale.",
        tests=[EDGES],
    ),
    Mutant(
        name="fp8-of-other-blocks-is-taken",
        file="dist_subspace/storage/fp8.py",
        text='and tuple(getattr(module, "block_size", None) or ()) == (BLOCK, BLOCK)',
        becomes='and getattr(module, "block_size", None) is not None',
        promise="A layer of transformers in other blocks is not read as if it had these.",
        tests=["tests/storage/test_fp8.py::test_a_layer_in_another_layout_is_not_taken_for_it"],
    ),
    Mutant(
        name="storage-bytes-without-nested-statistics",
        file="dist_subspace/storage/four_bit.py",
        text="blocks + 4 * math.ceil(blocks / NESTED_BLOCKSIZE) if double_quant",
        becomes="blocks if double_quant",
        promise="A storage knows the bytes of a matrix, the statistics of its statistics included.",
        tests=[TAKEN],
    ),
    Mutant(
        name="storage-options-are-ignored",
        file="dist_subspace/storage/registry.py",
        text="info.checked(older | dict(options or {}))",
        becomes="info.checked(dict(options or {}) | older)",
        promise="model.storage_options outweighs the default of the older name.",
        tests=[OLDER],
    ),
    Mutant(
        name="unknown-storage-options-pass",
        file="dist_subspace/storage/registry.py",
        text="            if name not in self.options:\n",
        becomes="            if not self.options:\n                continue\n            if name not in self.options:\n",
        promise="An option that the storage does not have is refused.",
        tests=["tests/storage/test_registry.py::test_an_option_that_the_storage_does_not_have_is_refused"],
    ),
    Mutant(
        name="foreign-layers-are-no-operators",
        file="dist_subspace/storage/adopt.py",
        text="return adopt or (adopt_plain if is_linear(module) else None)",
        becomes="return adopt_plain if is_linear(module) else None",
        promise="A layer that another library quantised is taken over in its own bytes.",
        tests=["tests/storage/test_fp8.py::test_a_layer_of_transformers_is_taken_over_byte_for_byte"],
    ),
    Mutant(
        name="both-names-of-double-quant-pass",
        file="dist_subspace/config/schema.py",
        text='if "double_quant" in self.model_fields_set and option != self.double_quant:',
        becomes='if "double_quant" not in self.model_fields_set and option != self.double_quant:',
        promise="double_quant said twice, and differently, is refused.",
        tests=["tests/config/test_schema.py::test_double_quant_is_said_once"],
    ),
    Mutant(
        name="storage-options-not-passed-on",
        file="dist_subspace/training/model.py",
        text="            storage_options=config.model.storage_options,\n",
        becomes="",
        promise="model.storage_options reaches the load.",
        tests=["tests/keys/test_model.py::test_a_key_changes_the_run_as_the_reference_says[model.storage_options]"],
    ),
]
