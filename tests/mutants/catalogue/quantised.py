"""Checkpoints that are quantised already: which bytes are kept, which numbers others get, and what is refused."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FORMATS = "tests/loading/formats"
FOUR, EIGHT = f"{FORMATS}/test_bitsandbytes_4bit.py", f"{FORMATS}/test_bitsandbytes_8bit.py"
FP8, MXFP4 = f"{FORMATS}/test_fp8.py", f"{FORMATS}/test_mxfp4.py"
AS_HELD, DECODED, DECODING, JOINED = (
    f"tests/loading/test_{name}.py" for name in ("as_held", "decoded", "decoding", "joined_bytes")
)

MUTANTS = [
    Mutant(
        name="nested-offset-of-the-file-forgotten",
        file="dist_subspace/loading/as_held.py",
        text="        operator.set_plain_values(as_held.plain)\n",
        becomes="",
        promise="What belongs to a double quantisation and is no tensor is taken over too.",
        tests=[f"{FOUR}::test_every_byte_is_the_files[nf4-double]"],
    ),
    Mutant(
        name="blocks-of-64-whatever-the-file-has",
        file="dist_subspace/loading/formats/bitsandbytes_4bit.py",
        text='options = {"double_quant": len(self.parts) > 2, "blocksize": self.blocksize}',
        becomes='options = {"double_quant": len(self.parts) > 2, "blocksize": 64}',
        promise="Blocks of another size are kept as they are.",
        tests=[f"{FOUR}::test_other_blocks_are_kept_too"],
    ),
    Mutant(
        name="unchecked-map-of-the-16-values",
        file="dist_subspace/loading/formats/bitsandbytes_4bit.py",
        text="    if not torch.equal(stored.whole(files.read), expected):",
        becomes="    if stored.numel != expected.numel():",
        promise="Codes that stand for other values than bitsandbytes' are refused.",
        tests=[f"{FOUR}::test_what_is_missing_or_damaged_is_one_sentence_on_every_rank"],
    ),
    Mutant(
        name="layers-left-in-floats-are-packed",
        file="dist_subspace/loading/as_held.py",
        text="return bool(self.taken) and not any(",
        becomes="return False and not any(",
        promise="A layer that the maker of the file left in floats stays so beside those whose bytes are kept.",
        tests=[f"{AS_HELD}::test_what_the_maker_left_in_floats_stays_so_in_the_same_storage_alone"],
    ),
    Mutant(
        name="conv1d-not-turned",
        file="dist_subspace/loading/decoded.py",
        text="    if not conv1d:\n",
        becomes="    if conv1d:\n",
        promise="The matrix of a Conv1D, which quantisers turn, is turned back.",
        tests=[f"{EIGHT}::test_every_byte_is_the_files[gpt2]"],
    ),
    Mutant(
        name="block-from-the-sides-of-the-grid",
        file="dist_subspace/loading/formats/fp8.py",
        text="            return high, wide\n",
        becomes="            return math.ceil(rows / scales[-2]), math.ceil(columns / scales[-1])\n",
        promise="The last block is the shorter one where a side is no multiple of a block.",
        tests=[f"{FP8}::test_a_last_block_is_the_shorter_one_as_in_transformers_layer"],
    ),
    Mutant(
        name="scale-of-a-row-as-that-of-a-block",
        file="dist_subspace/loading/formats/fp8.py",
        text="one_scale_a_block = (high % BLOCK == 0 or high >= height) and",
        becomes="one_scale_a_block = (high % BLOCK == 0 or height >= high) and",
        promise="The storage fp8 takes bytes alone whose scales it can hold.",
        tests=[f"{FP8}::test_the_storage_fp8_keeps_codes_where_it_has_such_scales[compressed rows]"],
    ),
    Mutant(
        name="halves-of-a-byte-exchanged",
        file="dist_subspace/loading/formats/mxfp4.py",
        text="(pairs.bitwise_and(15), pairs.bitwise_right_shift(4))",
        becomes="(pairs.bitwise_right_shift(4), pairs.bitwise_and(15))",
        promise="The earlier number of MXFP4 is in the lower half of a byte.",
        tests=[f"{MXFP4}::test_numbers_are_transformers[bf16]"],
    ),
    Mutant(
        name="runs-begin-inside-a-unit",
        file="dist_subspace/loading/decoding.py",
        text="        low = first // weight.unit * weight.unit\n",
        becomes="        low = first\n",
        promise="A run that begins inside a block is decoded with the block's statistics.",
        tests=[f"{DECODING}::test_any_run_is_that_of_the_whole[nf4-7]"],
    ),
    Mutant(
        name="bytes-of-the-whole-on-every-rank",
        file="dist_subspace/loading/own_parts.py",
        text="            own = [(held.part.start, held.part.stop)] if held.part.start < held.part.stop else []\n",
        becomes="            own = [(0, spec.numel)]\n",
        promise="A rank reads its own part alone of what a file holds quantised.",
        tests=[f"{FP8}::test_a_rank_reads_its_own_bytes[2]"],
    ),
    Mutant(
        name="experts-joined-within-a-block",
        file="dist_subspace/loading/joined_bytes.py",
        text="        if within:\n",
        becomes="        if False:\n",
        promise="Experts' bytes are joined only where each gives whole rows of blocks.",
        tests=[f"{JOINED}::test_experts_that_end_within_a_block_are_packed_anew"],
    ),
    Mutant(
        name="scales-of-the-first-expert",
        file="dist_subspace/loading/formats/fp8.py",
        text="        at = first // self.shape[-2] * self.grid[0] + row // high\n",
        becomes="        at = row // high\n",
        promise="Rows of a stack that is one tensor have their own expert's scales.",
        tests=[f"{JOINED}::test_any_run_of_a_stack_that_is_one_tensor"],
    ),
    Mutant(
        name="stale-quantization-config",
        file="dist_subspace/loading/formats/registry.py",
        text="            del part.quantization_config\n",
        becomes="            pass\n",
        promise="A loaded model says no longer that its weights are in a file's format.",
        tests=[f"{FOUR}::test_logits_are_transformers"],
    ),
    Mutant(
        name="original-rounded-to-the-computation",
        file="dist_subspace/loading/sources.py",
        text="index.decode(key, torch.float32))",
        becomes="index.decode(key, torch.bfloat16))",
        promise="The original of a quantised weight is what its codes stand for.",
        tests=[f"{DECODED}::test_the_original_is_what_the_codes_stand_for"],
    ),
    Mutant(
        name="bytes-kept-that-float16-cannot-hold",
        file="dist_subspace/loading/as_held.py",
        text="look = (self.index.layout(key), watch, end) if self.dtype == torch.float16 else None",
        becomes="look = None",
        promise="What float16 cannot hold is refused also where bytes are kept as they are.",
        tests=[f"{AS_HELD}::test_numbers_that_float16_cannot_hold_are_refused[fp8]"],
    ),
]
