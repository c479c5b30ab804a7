"""Slips in how frozen matrices are packed, decoded, packed again, and kept."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="int8-scale-over-127.5",
        file="dist_subspace/storage/int8.py",
        text="from_bytes(self.scale, torch.float32) / 127",
        becomes="from_bytes(self.scale, torch.float32) / 127.5",
        promise="int8 is decoded as bitsandbytes decodes it.",
        tests=["tests/storage/test_bnb.py::test_int8_bytes_decode_to_what_bitsandbytes_decodes[(7, 5)]"],
    ),
    Mutant(
        name="int8-power-of-two-not-undone",
        file="dist_subspace/storage/bnb.py",
        text="scale.float() * torch.exp2(exponents.view_as(scale))",
        becomes="scale.float()",
        promise="Rows above float16's range come back at their size.",
        tests=["tests/storage/test_bnb.py::test_int8_rows_of_any_size_are_within_half_a_step[torch.bfloat16]"],
    ),
    Mutant(
        name="int8-rows-one-power-too-large",
        file="dist_subspace/storage/bnb.py",
        text="(torch.frexp(largest)[1] - 15)",
        becomes="(torch.frexp(largest)[1] - 17)",
        promise="Rows within float16's range are quantised as they are.",
        tests=["tests/storage/test_bnb.py::test_int8_rows_of_any_size_are_within_half_a_step[torch.bfloat16]"],
    ),
    Mutant(
        name="int8-sums-unscaled-in-float16",
        file="dist_subspace/storage/int8.py",
        text="if dtype == torch.float16:",
        becomes="if dtype == torch.float64:",
        promise="A wide int8 layer does not overflow in float16.",
        tests=["tests/storage/test_bnb.py::test_int8_sums_of_a_wide_layer_do_not_overflow_float16"],
    ),
    Mutant(
        name="offset-of-a-rebase-lost",
        file="dist_subspace/statistics/setup.py",
        text="    base.set_plain_values(plain)\n",
        becomes="",
        promise="A folded base has its own double quantisation's mean.",
        tests=[
            "tests/subspace/blocks/test_residual_ranks.py::test_a_folded_base_holds_what_bitsandbytes_makes_of_the_residual[llama-nf4]"
        ],
    ),
    Mutant(
        name="residual-not-packed",
        file="dist_subspace/statistics/setup.py",
        text="return Result(factors_made, part.base.repacked(matrix))",
        becomes="return Result(factors_made, None)",
        promise="A folded base holds the residual.",
        tests=[
            "tests/subspace/blocks/test_residual_ranks.py::test_a_folded_base_holds_what_bitsandbytes_makes_of_the_residual[llama-nf4]"
        ],
    ),
    Mutant(
        name="repacked-with-the-default-blocksize",
        file="dist_subspace/storage/four_bit.py",
        text="double_quant=self.double_quant, blocksize=self.blocksize)",
        becomes="double_quant=self.double_quant)",
        promise="A layer packed again keeps its blocksize.",
        tests=[
            "tests/storage/test_bnb.py::test_a_4bit_layer_packed_again_keeps_its_blocks_and_has_its_own_statistics[128-nf4]"
        ],
    ),
    Mutant(
        name="repacked-without-double-quantisation",
        file="dist_subspace/storage/four_bit.py",
        text="double_quant=self.double_quant, blocksize",
        becomes="double_quant=False, blocksize",
        promise="A layer packed again keeps its double quantisation.",
        tests=[
            "tests/storage/test_bnb.py::test_a_4bit_layer_packed_again_keeps_its_blocks_and_has_its_own_statistics[64-nf4]"
        ],
    ),
    Mutant(
        name="double-quantisations-mean-not-added",
        file="dist_subspace/storage/bnb.py",
        text="dequantize_blockwise(packed.absmax, state2) + packed.offset",
        becomes="dequantize_blockwise(packed.absmax, state2)",
        promise="The mean taken out of absmax is put back.",
        tests=["tests/storage/test_bnb.py::test_4bit_bytes_decode_to_what_bitsandbytes_decodes[nf4-(33, 31)]"],
    ),
    Mutant(
        name="blocks-of-128",
        file="dist_subspace/storage/bnb.py",
        text="double_quant: bool, blocksize: int = 64) -> Packed4bit",
        becomes="double_quant: bool, blocksize: int = 128) -> Packed4bit",
        promise="4 bits come in blocks of 64.",
        tests=[
            "tests/storage/test_bnb.py::test_4bit_bytes_and_statistics_are_those_of_bitsandbytes[torch.float32-nf4-(172, 64)]"
        ],
    ),
    Mutant(
        name="fp4-packed-as-nf4",
        file="dist_subspace/storage/four_bit.py",
        text="_holding(quantize_4bit(logical, quant_type, double",
        becomes='_holding(quantize_4bit(logical, "nf4", double',
        promise="fp4 is fp4.",
        tests=[
            "tests/storage/test_bnb.py::test_4bit_bytes_and_statistics_are_those_of_bitsandbytes[torch.float32-fp4-(172, 64)]"
        ],
    ),
    Mutant(
        name="matrix-kept-on-the-autograd-node",
        file="dist_subspace/linear_map.py",
        text="        ctx.linear_map = linear_map\n        return on_rows",
        becomes='        ctx.linear_map, ctx.kept = linear_map, getattr(linear_map, "decode", lambda t: t)(x.dtype)\n'
        "        return on_rows",
        promise="Nothing of the weight lives from forward to backward.",
        tests=[
            "tests/subspace/test_methods.py::test_nothing_as_large_as_the_weight_lives_from_forward_to_backward[float32-nf4-lora]"
        ],
    ),
    Mutant(
        name="matrix-kept-on-the-gated-node",
        file="dist_subspace/linear_map.py",
        text="y = linear_map.gated_product(rows, inner, gate)\n",
        becomes="y = linear_map.gated_product(rows, inner, gate)\n        ctx.kept = linear_map.entries(x.dtype)\n",
        promise="Nothing of the weight lives from forward to backward.",
        tests=[
            "tests/subspace/test_methods.py::test_nothing_as_large_as_the_weight_lives_from_forward_to_backward[float32-nf4-liera]"
        ],
    ),
    Mutant(
        name="product-under-plain-autograd",
        file="dist_subspace/linear_map.py",
        text="if x.requires_grad and torch.is_grad_enabled():",
        becomes="if x.requires_grad and not torch.is_grad_enabled():",
        promise="The product saves no view of the weight.",
        tests=[
            "tests/subspace/test_methods.py::test_nothing_as_large_as_the_weight_lives_from_forward_to_backward[float32-fp32-lora]"
        ],
    ),
    Mutant(
        name="matrix-kept-on-the-operator",
        file="dist_subspace/storage/operator.py",
        text="matrix, factors = self.entries(wide)\n        y = x.to(wide) @ matrix.t()\n        return",
        becomes="matrix, factors = self._kept = self.entries(wide)\n        y = x.to(wide) @ matrix.t()\n        return",
        promise="An operator holds its packed bytes alone.",
        tests=[
            "tests/subspace/test_methods.py::test_nothing_as_large_as_the_weight_lives_from_forward_to_backward[float32-nf4-lora]"
        ],
    ),
    Mutant(
        name="transposed-int8-packed-as-it-lies",
        file="dist_subspace/storage/int8.py",
        text="quantize_8bit(weight.t() if transposed else weight)",
        becomes="quantize_8bit(weight)",
        promise="GPT-2's layout is held as the logical matrix.",
        tests=["tests/storage/test_operator.py::test_a_transposed_weight_is_held_as_the_same_matrix[int8]"],
    ),
]
