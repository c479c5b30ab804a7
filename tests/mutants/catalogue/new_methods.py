"""Methods that later papers brought: MiSS, OFT, LoRA-XS."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_LORA_XS, _LORA_XS_TESTS = (
    "dist_subspace/subspace/combination/lora_xs.py",
    "tests/subspace/combination/test_lora_xs.py",
)
_MISS, _MISS_TESTS = "dist_subspace/subspace/extension/miss.py", "tests/subspace/extension/test_miss.py"
_OFT, _OFT_TESTS = "dist_subspace/subspace/reconstruction/oft.py", "tests/subspace/reconstruction/test_oft.py"
_OTHERS = "tests/interchange/peft/test_importing.py::test_every_other_kind_of_peft_has_the_same_logits"
_KINDS_TESTS = "tests/interchange/peft/test_kinds.py"

MUTANTS = [
    # LoRA-XS
    Mutant(
        name="lora-xs-scale-lost",
        file="dist_subspace/subspace/combination/lora_xs.py",
        text="self.scale * wide(",
        becomes="wide(",
        promise="LoRA-XS's γ is α / r.",
        tests=[f"{_LORA_XS_TESTS}::test_forward_and_merge_are_the_definition[4.0-2.0-False]"],
    ),
    Mutant(
        name="lora-xs-singular-values-on-the-wrong-side",
        file="dist_subspace/subspace/combination/lora_xs.py",
        text="wide(self.spectral_S)[:, None]",
        becomes="wide(self.spectral_S)",
        promise="LoRA-XS's singular values belong to B = U_r Σ_r.",
        tests=[f"{_LORA_XS_TESTS}::test_forward_and_merge_are_the_definition[None-1.0-False]"],
    ),
    Mutant(
        name="lora-xs-starts-at-the-papers-noise",
        file="dist_subspace/subspace/combination/lora_xs.py",
        text='if settings.options["init"] == "normal":',
        becomes='if settings.options["init"]:',
        promise="LoRA-XS is exactly its base at the start, unless the paper's start is asked for.",
        tests=[f"{_LORA_XS_TESTS}::test_the_core_alone_is_trained_and_zero_at_the_start"],
    ),
    # MiSS
    Mutant(
        name="miss-shards-interleaved",
        file="dist_subspace/subspace/extension/miss.py",
        text="padded.unflatten(-1, (-1, rank))",
        becomes="padded.unflatten(-1, (rank, -1)).transpose(-1, -2)",
        promise="MiSS adds up inputs that lie r apart.",
        tests=[f"{_MISS_TESTS}::test_forward_and_merge_are_the_golden_ones[two shards-False]"],
    ),
    Mutant(
        name="miss-columns-interleaved",
        file="dist_subspace/subspace/extension/miss.py",
        text=".repeat(self.out_features // self.miss_block.shape[1], 1)",
        becomes=".repeat_interleave(self.out_features // self.miss_block.shape[1], 0)",
        promise="With mini_r the columns of D repeat along the outputs, as PEFT's do.",
        tests=[f"{_MISS_TESTS}::test_pefts_layer_computes_and_merges_the_same[2-3]"],
    ),
    Mutant(
        name="miss-drops-in-evaluation",
        file="dist_subspace/subspace/extension/miss.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation nothing is dropped.",
        tests=["tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[miss]"],
    ),
    Mutant(
        name="import-miss-mini-as-miss",
        file="dist_subspace/subspace/extension/miss.py",
        text='options={"mini_r": columns}',
        becomes="options={}",
        promise="A MiSS of few columns is read as one.",
        tests=[f"{_OTHERS}[LlamaForCausalLM-miss with few columns]"],
    ),
    Mutant(
        name="import-miss-bat-as-miss",
        file="dist_subspace/subspace/extension/miss.py",
        text='if variant == "bat":',
        becomes='if variant == "bath":',
        promise="PEFT's Bat variant of MiSS, which is not computed here, is refused.",
        tests=[f"{_KINDS_TESTS}::test_a_miss_that_computes_something_else_is_refused[bat]"],
    ),
    # OFT
    Mutant(
        name="oft-turns-the-other-way",
        file="dist_subspace/subspace/reconstruction/oft.py",
        text="skew = upper - upper.mT",
        becomes="skew = upper.mT - upper",
        promise="OFT turns the way that PEFT's OFT turns.",
        tests=[f"{_OFT_TESTS}::test_forward_and_merge_are_the_golden_ones[five terms-False]"],
    ),
    Mutant(
        name="oft-last-term-doubled",
        file="dist_subspace/subspace/reconstruction/oft.py",
        text="return total + power @ skew",
        becomes="return total + 2 * power @ skew",
        promise="The last term of the series has the factor 1.",
        tests=[f"{_OFT_TESTS}::test_the_series_is_that_of_cayleys_inverse[5]"],
    ),
    Mutant(
        name="oft-merges-the-inverse",
        file="dist_subspace/subspace/reconstruction/oft.py",
        text='"onc,nkc->onk"',
        becomes='"onk,nkc->onc"',
        promise="What is merged is W R.",
        tests=[f"{_OFT_TESTS}::test_forward_and_merge_are_the_golden_ones[solved-False]"],
    ),
    Mutant(
        name="oft-larger-divisor-of-two",
        file="dist_subspace/subspace/reconstruction/oft.py",
        text="(abs(n - size), n)",
        becomes="(abs(n - size), -n)",
        promise="Of two divisors as near, PEFT takes the smaller one.",
        tests=[f"{_OFT_TESTS}::test_a_block_size_that_does_not_fit_is_the_one_that_peft_takes"],
    ),
    Mutant(
        name="a-shared-rotation-counted-once",
        file="dist_subspace/subspace/reconstruction/oft.py",
        text="self.turn().expand(self.blocks, -1, -1)",
        becomes="self.turn()",
        promise="inspect measures a rotation that blocks share in each of them.",
        tests=["tests/report/test_movement.py::test_a_rotation_is_measured_as_one[True]"],
    ),
    Mutant(
        name="conv1d-told-to-peft",
        file="dist_subspace/interchange/model_description.py",
        text="agrees and placed and alike",
        becomes="agrees and alike",
        promise="A method that PEFT has not on Conv1D is not told to it as its own there.",
        tests=[
            "tests/interchange/peft/test_export.py::test_peft_computes_the_same_from_a_model_and_from_a_folder_alone[GPT2LMHeadModel-miss]"
        ],
    ),
]
