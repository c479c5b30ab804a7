"""The mathematics of each method: forward, initial values, merge, file."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="lora-gaussian-spread",
        file="dist_subspace/subspace/extension/lora.py",
        text="normal_(std=1 / settings.rank",
        becomes="normal_(std=settings.rank**-0.5",
        promise="LoRA's A drawn with init: gaussian has the standard deviation 1 / r.",
        tests=["tests/subspace/extension/test_lora.py::test_a_is_drawn_as_wide_as_pefts[gaussian-gaussian]"],
    ),
    Mutant(
        name="rslora-scale-of-lora",
        file="dist_subspace/subspace/extension/rslora.py",
        text="settings.alpha / math.sqrt(settings.rank)",
        becomes="settings.alpha / settings.rank",
        promise="rsLoRA's γ is α / √r.",
        tests=["tests/subspace/extension/test_rslora.py::test_forward_is_the_golden_one[False]"],
    ),
    Mutant(
        name="lora-fa-correction-by-one-scale",
        file="dist_subspace/subspace/extension/lora_fa.py",
        text="/ self.scale**2).float()",
        becomes="/ self.scale).float()",
        promise="LoRA-FA's corrected gradient of B is g (A Aᵀ)⁻¹ / γ².",
        tests=[
            "tests/subspace/extension/test_lora_fa.py::test_the_corrected_gradient_is_that_of_the_closest_step_in_w"
        ],
    ),
    Mutant(
        name="moslora-mixers-exchanged",
        file="dist_subspace/subspace/extension/moslora.py",
        text='orthogonal if settings.options["mixer"] == "orthogonal" else square_kaiming',
        becomes='square_kaiming if settings.options["mixer"] == "orthogonal" else orthogonal',
        promise="MoSLoRA's mixer starts as the option says.",
        tests=["tests/subspace/extension/test_moslora.py::test_b_is_zero_at_the_start_and_the_mixer_kaiming_uniform"],
    ),
    Mutant(
        name="trilora-scale-not-one",
        file="dist_subspace/subspace/extension/trilora.py",
        text='return 1.0 if settings.options["scale"] == 1 else super().scaling(settings)',
        becomes="return super().scaling(settings)",
        promise="TriLoRA's γ is 1 where the option scale says so.",
        tests=["tests/subspace/extension/test_trilora.py::test_forward_is_the_golden_one[1-expected1-False]"],
    ),
    Mutant(
        name="flora-starts-at-one",
        file="dist_subspace/subspace/extension/flora.py",
        text="torch.zeros(settings.rank, settings.rank)",
        becomes="torch.eye(settings.rank)",
        promise="FLoRA's core is zero at the start: the model is its base.",
        tests=[
            "tests/subspace/extension/test_flora.py::test_the_core_is_zero_at_the_start_and_both_factors_kaiming_uniform"
        ],
    ),
    Mutant(
        name="adalora-fewer-rows",
        file="dist_subspace/subspace/extension/adalora.py",
        text="math.ceil(1.5 * rank)",
        becomes="int(1.5 * rank)",
        promise="AdaLoRA begins with 1.5 times the rank, rounded up.",
        tests=[
            "tests/subspace/extension/test_adalora.py::test_the_defaults_are_a_target_of_8_from_12_and_a_scale_of_2"
        ],
    ),
    Mutant(
        name="adalora-scale-of-the-target",
        file="dist_subspace/subspace/extension/adalora.py",
        text='return settings.alpha / int(settings.options["init_rank"])',
        becomes="return settings.alpha / settings.rank",
        promise="AdaLoRA's γ is α over the rank that it begins with, as in PEFT.",
        tests=[
            "tests/subspace/extension/test_adalora.py::test_the_defaults_are_a_target_of_8_from_12_and_a_scale_of_2"
        ],
    ),
    Mutant(
        name="flexlora-triplets-never-rest",
        file="dist_subspace/subspace/extension/flexlora.py",
        text="return self.lora_E * self.active",
        becomes="return self.lora_E",
        promise="Triplets that FlexLoRA's schedule has put to rest do not act.",
        tests=[
            "tests/subspace/extension/test_flexlora.py::test_the_output_is_the_golden_one_whatever_an_inactive_triplet_holds"
        ],
    ),
    Mutant(
        name="liera-linear-form-merged-as-exponential",
        file="dist_subspace/subspace/extension/liera.py",
        text='weight * (exponent.exp() if self.settings.options["form"] == "exp" else 1 + exponent)',
        becomes="weight * exponent.exp()",
        promise="LieRA merges in the form that it was trained in.",
        tests=["tests/subspace/extension/test_liera.py::test_the_merged_matrix_is_the_golden_one"],
    ),
    Mutant(
        name="vera-narrower-projections",
        file="dist_subspace/subspace/extension/vera.py",
        text="math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))",
        becomes="math.sqrt(3.0) / math.sqrt(columns)",
        promise="VeRA's frozen projections are the Kaiming-uniform ones that PEFT draws.",
        tests=["tests/subspace/extension/test_vera.py::test_projections_are_bit_for_bit_those_that_peft_draws[0]"],
    ),
    Mutant(
        name="parallel-adapter-learned-scale-unused",
        file="dist_subspace/subspace/extension/parallel_adapter.py",
        text="(self.strength() * hidden)",
        becomes="(self.scale * hidden)",
        promise="The parallel adapter's learned scale acts.",
        tests=["tests/subspace/extension/test_parallel_adapter.py::test_gradients_are_those_of_the_formula"],
    ),
    Mutant(
        name="houlsby-norm-biases-frozen",
        file="dist_subspace/subspace/extension/houlsby.py",
        text="scaled=True, shifted=has_bias",
        becomes="scaled=True, shifted=False",
        promise="Houlsby trains the biases of the norms, too.",
        tests=[
            "tests/subspace/extension/test_houlsby.py::test_the_norms_of_the_blocks_train_too_where_asked[GPT2LMHeadModel-4-64]"
        ],
    ),
    Mutant(
        name="pfeiffer-residual-of-the-norm",
        file="dist_subspace/subspace/blocks/bottleneck.py",
        text="self.base(u + bottleneck(self, y))",
        becomes="self.base(y + bottleneck(self, y))",
        promise="Pfeiffer's adapter of a post-norm block adds to what the norm is given: norm(u + Ad(norm(u))).",
        tests=["tests/subspace/extension/test_pfeiffer.py::test_around_a_norm_it_is_the_formula"],
    ),
    Mutant(
        name="bitfit-no-biases-brought",
        file="dist_subspace/subspace/reconstruction/bitfit.py",
        text='linear if biases == "add" or not existing else {}',
        becomes='linear if biases == "add" else {}',
        promise="BitFit gives linear layers a bias where the model has none.",
        tests=[
            "tests/subspace/reconstruction/test_bitfit.py::test_a_model_without_biases_gets_zero_ones_on_its_linear_layers"
        ],
    ),
    Mutant(
        name="ia3-bias-scaled-with-the-input",
        file="dist_subspace/subspace/reconstruction/ia3.py",
        text='self.settings.options["scale_bias"] and not self.scales_input',
        becomes='self.settings.options["scale_bias"]',
        promise="(IA)³ leaves the bias of a layer alone whose input it scales.",
        tests=[
            "tests/subspace/reconstruction/test_ia3.py::test_peft_computes_the_same_logits_from_our_files[GPT2LMHeadModel]"
        ],
    ),
    Mutant(
        name="ssl-merge-without-the-one",
        file="dist_subspace/subspace/reconstruction/ssl.py",
        text="weight * (1 + self.ssl_s.float()",
        becomes="weight * (self.ssl_s.float()",
        promise="SSL merges as W diag(1 + δ).",
        tests=["tests/subspace/reconstruction/test_ssl.py::test_the_merged_matrix_is_the_golden_one"],
    ),
    Mutant(
        name="ssb-bias-never-scaled",
        file="dist_subspace/subspace/reconstruction/ssb.py",
        text='bias * (1 + self.ssb_l) if self.settings.options["scale_bias"] else bias',
        becomes="bias",
        promise="SSB scales the bias where scale_bias says so.",
        tests=["tests/subspace/reconstruction/test_ssb.py::test_forward_is_the_golden_one"],
    ),
    Mutant(
        name="scaling-file-holds-deviations",
        file="dist_subspace/subspace/blocks/scaling.py",
        text="1 + p.detach().float()",
        becomes="p.detach().float()",
        promise="The file of a scaling method holds the factors themselves, as the paper and PEFT have them.",
        tests=[
            "tests/subspace/reconstruction/test_ssl.py::test_four_values_are_trained_and_the_file_holds_absolute_ones"
        ],
    ),
    Mutant(
        name="pissa-exact-ignored",
        file="dist_subspace/subspace/reconstruction/pissa.py",
        text='self.settings.options["svd"] == "exact"',
        becomes="False",
        promise="PiSSA's option svd: exact makes the exact decomposition.",
        tests=[
            "tests/subspace/reconstruction/test_pissa.py::test_the_exact_start_is_that_of_the_full_decomposition_where_the_published_shortcut_is_not"
        ],
    ),
    Mutant(
        name="pissa-unbalanced-by-the-scale",
        file="dist_subspace/subspace/reconstruction/pissa.py",
        text=".balanced(self.scale)",
        becomes=".balanced(1.0)",
        promise="PiSSA's factors are diag(√(σ/γ)) Vᵀ and U diag(√(σ/γ)).",
        tests=[
            "tests/subspace/reconstruction/test_pissa.py::test_the_factors_start_at_the_golden_ones[False-randomized-2]"
        ],
    ),
    Mutant(
        name="milora-later-rounds-fit-the-smallest",
        file="dist_subspace/subspace/reconstruction/milora.py",
        text="return largest(matrix, self.settings.rank, generator).balanced(self.scale)",
        becomes="return smallest(matrix, self.settings.rank).balanced(self.scale)",
        promise="Later rounds of MiLoRA's folded residual fit what the quantisation left most.",
        tests=[
            "tests/subspace/blocks/test_residual.py::test_later_rounds_of_milora_fit_the_largest_of_what_the_quantiser_left"
        ],
    ),
    Mutant(
        name="olora-last-columns",
        file="dist_subspace/subspace/reconstruction/olora.py",
        text="matrix[:, : self.settings.rank]",
        becomes="matrix[:, -self.settings.rank :]",
        promise="OLoRA starts at the first columns of Q.",
        tests=[
            "tests/subspace/reconstruction/test_olora.py::test_the_pair_starts_at_the_golden_head_of_the_decomposition[False]"
        ],
    ),
    Mutant(
        name="svdiff-stuck-at-zero",
        file="dist_subspace/subspace/combination/svdiff.py",
        text="torch.where(shift >= -self.spectral_S, shift",
        becomes="torch.where(shift > -self.spectral_S, shift",
        promise="A singular value of zero may still grow under SVDiff.",
        tests=["tests/subspace/combination/test_svdiff.py::test_a_singular_value_of_zero_may_still_grow"],
    ),
    Mutant(
        name="svdiff-strength-unused",
        file="dist_subspace/subspace/combination/svdiff.py",
        text='self.settings.options["strength"] * self.svdiff_delta',
        becomes="1.0 * self.svdiff_delta",
        promise="SVDiff multiplies its shifts by the option strength.",
        tests=[
            "tests/subspace/combination/test_svdiff.py::test_strength_zero_is_the_identity_and_another_scales_the_shifts"
        ],
    ),
    Mutant(
        name="sam-parser-file-of-shifts",
        file="dist_subspace/subspace/reconstruction/sam_parser.py",
        text="self.spectral_S + self.sam_parser_sigma.detach()",
        becomes="self.sam_parser_sigma.detach()",
        promise="SAM-PARSER's file holds the singular values themselves.",
        tests=[
            "tests/subspace/reconstruction/test_sam_parser.py::test_the_spectrum_starts_at_the_frozen_one_and_files_hold_it"
        ],
    ),
    Mutant(
        name="spectral-additive-merge-without-the-cross-term",
        file="dist_subspace/subspace/combination/spectral_additive.py",
        text="(wide(self.spectral_V) + q, q)",
        becomes="(wide(self.spectral_V), q)",
        promise="Spectral Adapter, additive, merges as (U + P) Σ (V + Q)ᵀ.",
        tests=["tests/subspace/combination/test_spectral_additive.py::test_the_merged_matrix_is_the_papers"],
    ),
    Mutant(
        name="spectral-rotational-gain-lost",
        file="dist_subspace/subspace/combination/spectral_rotational.py",
        text="core if gained is None else core + torch.diag(gained)",
        becomes="core",
        promise="The gain of Spectral Adapter, rotational, acts where nothing is turned.",
        tests=[
            "tests/subspace/combination/test_spectral_rotational.py::test_a_gain_multiplies_the_turned_singular_values_and_files_hold_it"
        ],
    ),
    Mutant(
        name="dora-norm-without-the-squared-scale",
        file="dist_subspace/subspace/blocks/magnitude.py",
        text="alpha=scale**2",
        becomes="alpha=scale",
        promise="DoRA's row norms are those of W + γ B A.",
        tests=["tests/subspace/combination/test_dora.py::test_forward_is_the_golden_one[False]"],
    ),
    Mutant(
        name="dora-merge-keeps-the-length",
        file="dist_subspace/subspace/combination/dora.py",
        text="(base_norms + magnitude) / torch.where(base_norms == 0, 1.0, n)",
        becomes="base_norms / torch.where(base_norms == 0, 1.0, n)",
        promise="DoRA's trained lengths are merged.",
        tests=[
            "tests/subspace/combination/test_dora.py::test_a_row_of_zeros_is_not_rescaled_and_its_magnitude_does_not_learn"
        ],
    ),
    Mutant(
        name="lora-dash-largest-changes-not-rates",
        file="dist_subspace/subspace/combination/lora_dash.py",
        text="self.coefficients(triplets.u, triplets.v).abs() / (triplets.s + EPSILON)",
        becomes="self.coefficients(triplets.u, triplets.v).abs()",
        promise="LoRA-Dash chooses the directions whose singular value changed most for its size.",
        tests=["tests/subspace/combination/test_lora_dash.py::test_a_direction_is_chosen_by_its_change_for_its_size"],
    ),
    Mutant(
        name="p-tuning-relu-at-the-end",
        file="dist_subspace/subspace/reconstruction/p_tuning.py",
        text="relu(x) if number + 1 < self.heads else x",
        becomes="relu(x)",
        promise="P-tuning's encoder ends in a linear layer, as in PEFT.",
        tests=["tests/subspace/reconstruction/test_p_tuning.py::test_the_encoder_is_pefts[mlp]"],
    ),
    Mutant(
        name="prefix-projection-without-tanh",
        file="dist_subspace/subspace/reconstruction/prefix.py",
        text="torch.tanh(linear(self.embedding, self.down, self.down_bias))",
        becomes="linear(self.embedding, self.down, self.down_bias)",
        promise="Prefix-tuning's projection has a tanh between its layers, as in PEFT.",
        tests=["tests/subspace/reconstruction/test_prefix.py::test_the_projection_is_pefts"],
    ),
    Mutant(
        name="prompt-text-not-repeated",
        file="dist_subspace/subspace/reconstruction/prompt.py",
        text="given[i % len(given)]",
        becomes="given[min(i, len(given) - 1)]",
        promise="A prompt longer than its text repeats the text, as in PEFT.",
        tests=["tests/subspace/reconstruction/test_prompt.py::test_it_begins_with_a_texts_embeddings_repeated_or_cut"],
    ),
    Mutant(
        name="low-rank-activation-after-the-scale",
        file="dist_subspace/subspace/blocks/low_rank.py",
        text="self.scale * self.activation()(Down.apply(x, self.lora_A, dropout))",
        becomes="self.activation()(self.scale * Down.apply(x, self.lora_A, dropout))",
        promise="Under MPC_n the activation stands between the factors, and γ outside of it.",
        tests=["tests/subspace/blocks/test_low_rank.py::test_gradients_are_those_of_the_formula[gelu-lora]"],
    ),
    Mutant(
        name="kaiming-spread-of-another-slope",
        file="dist_subspace/subspace/blocks/low_rank.py",
        text="bound = 1 / math.sqrt(columns)",
        becomes="bound = math.sqrt(6 / columns)",
        promise="A starts Kaiming-uniform with a = √5, as in PEFT.",
        tests=["tests/subspace/extension/test_lora.py::test_a_is_kaiming_uniform_and_b_zero"],
    ),
    Mutant(
        name="odd-matrix-decoded-by-a-compiled-function",
        file="dist_subspace/storage/bnb.py",
        text="else (1, numel + numel % 2),",
        becomes="else (1, numel),",
        promise="Decoding a 4-bit matrix compiles nothing.",
        tests=[
            "tests/storage/test_bnb.py::test_a_matrix_of_an_odd_number_of_values_is_decoded_without_compiling_anything"
        ],
    ),
]
