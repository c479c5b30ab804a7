"""A rank's own parts of a checkpoint: which bytes are read, how pieces are packed, and what ranks say alike."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

OWN_PARTS = "tests/loading/test_own_parts.py"
RANGES = "tests/loading/test_ranges.py"
FLOAT16 = "tests/loading/test_float16.py"
FOUR_BIT_CPU = "tests/storage/test_four_bit_cpu.py"

MUTANTS = [
    Mutant(
        name="last-unit-of-a-part-unread",
        file="dist_subspace/loading/own_parts.py",
        text="-(-part.stop // per)) for part",
        becomes="part.stop // per) for part",
        promise="A part that ends inside a block has the bytes of the whole there too.",
        tests=[f"{OWN_PARTS}::test_a_ranks_bytes_are_those_of_the_whole[nf4-llama-2]"],
    ),
    Mutant(
        name="a-blocks-statistic-summed-twice",
        file="dist_subspace/loading/own_parts.py",
        text="(-(-place // per) * pieces.statistic.per_unit",
        becomes="(place // per * pieces.statistic.per_unit",
        promise="A block that two ranks read is in the statistics once.",
        tests=[f"{OWN_PARTS}::test_a_ranks_bytes_are_those_of_the_whole[nf4-double-llama-3]"],
    ),
    Mutant(
        name="offset-of-a-ranks-own-blocks",
        file="dist_subspace/loading/own_parts.py",
        text="one.pieces.plain_values(whole)",
        becomes="one.pieces.plain_values(one.own)",
        promise="Double quantisation subtracts the mean over the blocks of all ranks.",
        tests=[f"{OWN_PARTS}::test_a_ranks_bytes_are_those_of_the_whole[nf4-double-llama-2]"],
    ),
    Mutant(
        name="every-rank-reads-all",
        file="dist_subspace/loading/stream.py",
        text="if splitter is not None and splitter.takes_parts:",
        becomes="if False:",
        promise="All ranks together read the checkpoint once.",
        tests=[f"{OWN_PARTS}::test_all_ranks_together_read_the_checkpoint_once[nf4-double]"],
    ),
    Mutant(
        name="packed-from-the-whole-matrix",
        file="dist_subspace/loading/stream.py",
        text="if in_pieces is not None and self._in_parts(name):",
        becomes="if False:",
        promise="No rank holds a whole matrix while it loads.",
        tests=["tests/loading/test_memory.py::test_a_rank_holds_its_shard_and_one_chunk[int8]"],
    ),
    Mutant(
        name="second-shards-left-out",
        file="dist_subspace/placement/deepspeed/partitioner.py",
        text="shards[1] if len(shards) > 1 else None",
        becomes="None",
        promise="Where second shards are kept, they are placed in parts too.",
        tests=[f"{OWN_PARTS}::test_second_shards_are_parts_of_the_whole_too"],
    ),
    Mutant(
        name="ranks-say-their-own-largest-value",
        file="dist_subspace/loading/stream.py",
        text="                    if self.own is None:\n                        raise\n",
        becomes="                    raise\n",
        promise="Ranks that see different values beyond float16 say the same sentence.",
        tests=[f"{OWN_PARTS}::test_ranks_that_see_other_values_beyond_float16_say_the_same[model.embed_tokens.weight]"],
    ),
    Mutant(
        name="cut-file-read-as-zeros",
        file="dist_subspace/loading/ranges.py",
        text='raise UsageError(f"{file} is cut short: it ends within {key}; copy or download it again")',
        becomes="break",
        promise="A file that ends too early is refused.",
        tests=[f"{RANGES}::test_a_file_that_has_become_shorter_is_one_sentence"],
    ),
    Mutant(
        name="last-row-of-a-transpose-cut",
        file="dist_subspace/loading/ranges.py",
        text="-(-end // rows)",
        becomes="end // rows",
        promise="A range of a transpose that ends within a row is whole.",
        tests=[f"{RANGES}::test_any_range_is_that_of_the_tensor[64-torch.float32]"],
    ),
    Mutant(
        name="infinite-weights-hide-large-ones",
        file="dist_subspace/loading/float16.py",
        text="magnitudes.nan_to_num(0.0, posinf=0.0)",
        becomes="magnitudes.nan_to_num(0.0, posinf=0.0).mul(0)",
        promise="A value beyond float16 is found beside one that is infinite already.",
        tests=[f"{FLOAT16}::test_the_largest_finite_magnitude_is_the_same_in_any_pieces"],
    ),
    Mutant(
        name="a-bound-counts-as-exceeded",
        file="dist_subspace/storage/four_bit_cpu.py",
        text="exceeds = scaled > torch",
        becomes="exceeds = scaled >= torch",
        promise="An entry between two codes takes bitsandbytes' one.",
        tests=[f"{FOUR_BIT_CPU}::test_entries_at_the_bounds_and_next_to_them[nf4]"],
    ),
    Mutant(
        name="no-number-is-the-smallest-code",
        file="dist_subspace/storage/four_bit_cpu.py",
        text="nan_to_num_(nan=CELLS + 1)",
        becomes="nan_to_num_(nan=0)",
        promise="What is no number is packed as bitsandbytes packs it.",
        tests=[f"{FOUR_BIT_CPU}::test_every_pattern_of_16_bits[nf4]"],
    ),
    Mutant(
        name="another-bitsandbytes-not-asked",
        file="dist_subspace/storage/bnb.py",
        text=" and _same_on_cpu(quant_type, blocksize):",
        becomes=":",
        promise="A bitsandbytes that rounds otherwise than our quantiser is used itself.",
        tests=[f"{FOUR_BIT_CPU}::test_a_bitsandbytes_that_rounds_otherwise_is_asked_itself"],
    ),
    Mutant(
        name="pages-shared-with-children",
        file="dist_subspace/pages.py",
        text="mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS",
        becomes="mmap.MAP_SHARED | mmap.MAP_ANONYMOUS",
        promise="A forked process does not write into its parent's weights.",
        tests=["tests/test_pages.py::test_a_forked_process_has_memory_of_its_own"],
    ),
    Mutant(
        name="whole-reads-unsaid",
        file="dist_subspace/loading/notices.py",
        text="if ranks == 1 or share < WORTH:",
        becomes="if ranks == 1 or share > WORTH:",
        promise="What every rank reads whole is said, where it is much.",
        tests=[f"{OWN_PARTS}::test_what_transformers_makes_of_other_tensors_is_read_whole_and_said"],
    ),
    Mutant(
        name="progress-counts-tied-tensors-twice",
        file="dist_subspace/loading/stream.py",
        text="for key in keys - counted))",
        becomes="for key in keys))",
        promise="The bar of a load counts every byte once.",
        tests=["tests/loading/test_load.py::test_progress_counts_every_byte_of_the_checkpoint_once"],
    ),
]
