"""Slips in what is trained, in its start and its schedule that a run would survive in silence."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="gained-keeps-a-moment",
        file="dist_subspace/subspace/schedules/moving.py",
        text="new_vectors(1, a.shape[1], generator), moments=True)",
        becomes="new_vectors(1, a.shape[1], generator))",
        promise="A triplet that comes has no moments of one that went.",
        tests=["tests/test_advancing.py::test_what_moves_loses_its_moments_and_nothing_else_does"],
    ),
    Mutant(
        name="gained-strength-keeps-its-moment",
        file="dist_subspace/subspace/schedules/moving.py",
        text='Edit(self._parameter(name, "lora_E"), where, 0.0, moments=True)',
        becomes='Edit(self._parameter(name, "lora_E"), where, 0.0)',
        promise="The strength of a triplet that comes has no moments of one that went.",
        tests=["tests/test_advancing.py::test_what_moves_loses_its_moments_and_nothing_else_does"],
    ),
    Mutant(
        name="lost-keeps-its-moment",
        file="dist_subspace/subspace/schedules/moving.py",
        text="_only(place, len(mask)), 0.0, moments=True)",
        becomes="_only(place, len(mask)), 0.0)",
        promise="The strength of a triplet that goes loses its moments.",
        tests=["tests/test_advancing.py::test_what_moves_loses_its_moments_and_nothing_else_does"],
    ),
    Mutant(
        name="no-late-parameters",
        file="dist_subspace/subspace/core/schedule.py",
        text="if n in late_factors_of(type(part))]",
        becomes="if n not in late_factors_of(type(part))]",
        promise="Adam counts the steps of LoRA-Dash's strengths from the switch on, and those of A and B through.",
        tests=[
            "tests/test_advancing.py::test_adam_counts_the_steps_of_strengths_from_the_switch_on_and_all_others_through"
        ],
    ),
    Mutant(
        name="warm-up-of-a-fifth",
        file="dist_subspace/subspace/core/schedule.py",
        text="lambda: max_steps // 10",
        becomes="lambda: max_steps // 5",
        promise="An unset warm-up of a schedule is a tenth of the run.",
        tests=[
            "tests/subspace/schedules/test_cutting.py::test_unset_lengths_are_a_tenth_three_tenths_and_a_hundredth_of_the_run"
        ],
    ),
    Mutant(
        name="final-phase-of-a-third",
        file="dist_subspace/subspace/core/schedule.py",
        text="lambda: max_steps * 3 // 10",
        becomes="lambda: max_steps // 3",
        promise="An unset final phase of a schedule is three tenths of the run.",
        tests=[
            "tests/subspace/schedules/test_cutting.py::test_unset_lengths_are_a_tenth_three_tenths_and_a_hundredth_of_the_run"
        ],
    ),
    Mutant(
        name="cutting-decisions-of-moving",
        file="dist_subspace/subspace/schedules/cutting.py",
        text="DECISIONS = 100",
        becomes="DECISIONS = 50",
        promise="AdaLoRA decides about a hundred times in a run.",
        tests=[
            "tests/subspace/schedules/test_cutting.py::test_unset_lengths_are_a_tenth_three_tenths_and_a_hundredth_of_the_run"
        ],
    ),
    Mutant(
        name="moving-decisions-of-cutting",
        file="dist_subspace/subspace/schedules/moving.py",
        text="DECISIONS = 50",
        becomes="DECISIONS = 100",
        promise="FlexLoRA decides about fifty times in a run.",
        tests=[
            "tests/subspace/schedules/test_moving.py::test_unset_lengths_are_a_tenth_three_tenths_and_a_fiftieth_of_the_run"
        ],
    ),
    Mutant(
        name="gained-vectors-equal-in-all-layers",
        file="dist_subspace/subspace/schedules/moving.py",
        text='f"{name}:{step}"',
        becomes='f"{step}"',
        promise="Layers that gain a triplet in one step gain different ones.",
        tests=["tests/subspace/schedules/test_moving.py::test_layers_that_gain_in_one_step_gain_different_vectors"],
    ),
    Mutant(
        name="disabled-enables-all-at-its-end",
        file="dist_subspace/subspace/attach.py",
        text="part.enabled = enabled",
        becomes="part.enabled = True",
        promise="The end of an inner disabled block does not end the outer one.",
        tests=["tests/subspace/test_attach.py::test_the_end_of_an_inner_disabled_block_does_not_end_the_outer_one"],
    ),
    Mutant(
        name="unknown-keeps-the-weight",
        file="dist_subspace/subspace/core/accumulation.py",
        text='        """Called by a forward that makes no loss."""\n        self._upstream = None',
        becomes='        """Called by a forward that makes no loss."""',
        promise="A loss made from the logits has the whole penalty, whatever scale was before.",
        tests=[
            "tests/subspace/core/test_constraints.py::test_a_loss_made_from_the_logits_has_the_whole_penalty_whatever_was_before"
        ],
    ),
    Mutant(
        name="copy-hidden-in-text-config",
        file="dist_subspace/subspace/beside/new_tokens.py",
        text="holders = [model.config, text_config(model.config), model]",
        becomes="holders = [model.config, model]",
        promise="A model whose text has a configuration of its own takes its loss over new tokens too.",
        tests=[
            "tests/subspace/beside/test_new_tokens.py::test_a_model_whose_text_has_a_configuration_of_its_own_takes_its_loss_over_the_larger_vocabulary"
        ],
    ),
    Mutant(
        name="embedding-alone-of-several",
        file="dist_subspace/subspace/beside/new_tokens.py",
        text="for module in [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]:",
        becomes="for module in [model.get_input_embeddings()]:",
        promise="Every module that holds the table knows the new tokens.",
        tests=[
            "tests/subspace/beside/test_new_tokens.py::test_it_computes_what_a_model_with_larger_tables_does_and_has_its_gradients[T5ForConditionalGeneration]"
        ],
    ),
    Mutant(
        name="special-tokens-in-the-text",
        file="dist_subspace/subspace/reconstruction/prompt.py",
        text="tokenizer(text, add_special_tokens=False)",
        becomes="tokenizer(text)",
        promise="A prompt begins with its text's tokens, without the tokenizer's marks.",
        tests=["tests/subspace/reconstruction/test_prompt.py::test_a_runs_tokenizer_reads_the_text"],
    ),
    Mutant(
        name="prompt-vocabulary-one-short",
        file="dist_subspace/subspace/reconstruction/prompt.py",
        text="torch.randint(self.vocabulary, (self.count,)",
        becomes="torch.randint(self.count, (self.count,)",
        promise="A prompt's rows are drawn from the whole vocabulary.",
        tests=["tests/subspace/reconstruction/test_prompt.py::test_rows_are_drawn_from_the_whole_vocabulary"],
    ),
    Mutant(
        name="share-not-added",
        file="dist_subspace/subspace/core/accumulation.py",
        text="        self._share = weight\n        self._add(weight)",
        becomes="        self._share = weight",
        promise="Importance is free of the loss scale that a run's loop says.",
        tests=["tests/test_advancing.py::test_importance_is_free_of_accumulation_and_of_loss_scaling[2-64.0-True]"],
    ),
    Mutant(
        name="linear-parameters-of-the-outputs",
        file="dist_subspace/subspace/virtual_tokens/part.py",
        text="bound = in_features**-0.5",
        becomes="bound = out_features**-0.5",
        promise="Encoders of virtual tokens begin as torch's linear layers do.",
        tests=[
            "tests/subspace/test_initial_values.py::test_virtual_tokens_and_their_encoders_start_at_their_distributions"
        ],
    ),
    Mutant(
        name="encoder-of-one-direction",
        file="dist_subspace/subspace/reconstruction/p_tuning.py",
        text="uniform_(-(h**-0.5), h**-0.5, generator",
        becomes="uniform_(-(d**-0.5), d**-0.5, generator",
        promise="The LSTM of P-tuning begins as torch's does.",
        tests=[
            "tests/subspace/test_initial_values.py::test_virtual_tokens_and_their_encoders_start_at_their_distributions"
        ],
    ),
    Mutant(
        name="prefixs-embedding-small",
        file="dist_subspace/subspace/reconstruction/prefix.py",
        text="self.embedding = nn.Parameter(torch.randn(self.count, self.embedding_width, generator=generator))",
        becomes="self.embedding = nn.Parameter(STD * torch.randn(self.count, self.embedding_width, generator=generator))",
        promise="A prefix's embedding begins with spread one.",
        tests=[
            "tests/subspace/test_initial_values.py::test_virtual_tokens_and_their_encoders_start_at_their_distributions"
        ],
    ),
    Mutant(
        name="projections-spread",
        file="dist_subspace/subspace/reconstruction/prefix.py",
        text="generator=generator) * spread)",
        becomes="generator=generator))",
        promise="A prefix's projection begins with keys and values of a small spread.",
        tests=[
            "tests/subspace/test_initial_values.py::test_virtual_tokens_and_their_encoders_start_at_their_distributions"
        ],
    ),
    Mutant(
        name="bottleneck-down-small",
        file="dist_subspace/subspace/blocks/bottleneck.py",
        text="nn.Parameter(kaiming_uniform(settings.rank, width, generator))",
        becomes="nn.Parameter(0.1 * kaiming_uniform(settings.rank, width, generator))",
        promise="A bottleneck begins Kaiming-uniform.",
        tests=["tests/subspace/test_initial_values.py::test_a_layers_tensors_start_at_their_distributions"],
    ),
    Mutant(
        name="trilora-b-narrow",
        file="dist_subspace/subspace/extension/trilora.py",
        text="return kaiming_uniform(self.out_features, settings.rank, generator)",
        becomes="return kaiming_uniform(self.out_features, self.in_features, generator)[:, : settings.rank]",
        promise="TriLoRA's B begins Kaiming-uniform over the rank.",
        tests=["tests/subspace/test_initial_values.py::test_a_layers_tensors_start_at_their_distributions"],
    ),
    Mutant(
        name="flora-b-narrow",
        file="dist_subspace/subspace/extension/flora.py",
        text="return kaiming_uniform(self.out_features, settings.rank, generator)",
        becomes="return kaiming_uniform(settings.rank, self.out_features, generator).t().contiguous()",
        promise="FLoRA's B begins Kaiming-uniform over the rank.",
        tests=["tests/subspace/test_initial_values.py::test_a_layers_tensors_start_at_their_distributions"],
    ),
    Mutant(
        name="mixer-narrow",
        file="dist_subspace/subspace/extension/moslora.py",
        text="return kaiming_uniform(size, size, generator)",
        becomes="return kaiming_uniform(size, size * size, generator)[:, :size]",
        promise="MoSLoRA's mixer begins Kaiming-uniform over the rank.",
        tests=["tests/subspace/test_initial_values.py::test_a_layers_tensors_start_at_their_distributions"],
    ),
    Mutant(
        name="lora-fa-of-another-spread",
        file="dist_subspace/subspace/extension/lora_fa.py",
        text="FrozenFactor(self.initial_a(settings, generator).to",
        becomes="FrozenFactor((0.1 * self.initial_a(settings, generator)).to",
        promise="LoRA-FA's frozen A is drawn as LoRA's.",
        tests=["tests/subspace/test_initial_values.py::test_a_layers_tensors_start_at_their_distributions"],
    ),
    Mutant(
        name="passed-by-names-no-layer",
        file="dist_subspace/subspace/core/linear.py",
        text="weight_under_a_method(held, shape, self.name, self.info.name)",
        becomes='weight_under_a_method(held, shape, "a layer", self.info.name)',
        promise="Who reads a layer's weight past its method is told the layer.",
        tests=["tests/test_unread_weight.py"],
    ),
    Mutant(
        name="beta-defaults",
        file="dist_subspace/subspace/extension/adalora.py",
        text='"beta2": number(0.85,',
        becomes='"beta2": number(0.9,',
        promise="An option that is not given is PEFT's own: AdaLoRA smooths by 0.85.",
        tests=["tests/subspace/test_config.py::test_options_that_are_not_given_are_these"],
    ),
    Mutant(
        name="orthogonal-with-signs",
        file="dist_subspace/subspace/extension/moslora.py",
        text="q * r.diagonal().sign()",
        becomes="q",
        promise="An orthogonal mixer is drawn uniformly over all of them.",
        tests=["tests/subspace/extension/test_moslora.py::test_orthogonal_mixers_are_uniform_over_all_of_them"],
    ),
    Mutant(
        name="compute-dtype-not-set",
        file="dist_subspace/subspace/attach.py",
        text="part.compute_dtype, part.name = dtype, name",
        becomes="part.name = name",
        promise="Frozen factors are held in the type of the computation.",
        tests=["tests/statistics/test_setup.py::test_frozen_factors_are_held_in_the_type_of_the_computation"],
    ),
    Mutant(
        name="matrices-counted-as-two",
        file="dist_subspace/subspace/attach.py",
        text="penalties.matrices += len(factors)",
        becomes="penalties.matrices += 2",
        promise="Norms that are not squared are averaged over the matrices that a constraint acts on.",
        tests=[
            "tests/subspace/core/test_constraints.py::test_norms_that_are_not_squared_are_averaged_over_the_matrices_that_there_are[dora]"
        ],
    ),
    Mutant(
        name="begun-not-in-the-state",
        file="dist_subspace/subspace/schedules/switching.py",
        text='self.switched, self.begun = state.get("switched"), state.get("begun")',
        becomes='self.switched = state.get("switched")',
        promise="A resumed run knows when the optimizer began anew for the strengths.",
        tests=["tests/subspace/schedules/test_switching.py::test_phase_and_step_are_its_state"],
    ),
    Mutant(
        name="switch-on-chosen-directions",
        file="dist_subspace/subspace/schedules/switching.py",
        text="not chosen and self.switched is None",
        becomes="self.switched is None",
        promise="Directions that came with an adapter are not chosen anew.",
        tests=[
            "tests/subspace/schedules/test_switching.py::test_directions_that_came_with_an_adapter_are_not_chosen_anew"
        ],
    ),
    Mutant(
        name="target-of-the-model-not-the-layers",
        file="dist_subspace/subspace/schedules/cutting.py",
        text="sum(part.settings.rank for part in parts.values())",
        becomes="settings.rank * len(parts)",
        promise="AdaLoRA's budget ends at the sum of the layers' own ranks.",
        tests=["tests/subspace/schedules/test_cutting.py::test_the_target_is_the_sum_of_the_layers_own_ranks"],
    ),
    Mutant(
        name="doras-state-without-b",
        file="dist_subspace/subspace/combination/dora.py",
        text="(self.lora_A, self.lora_B, self.lora_magnitude_vector))",
        becomes="(self.lora_A, self.lora_magnitude_vector))",
        promise="DoRA's scale in evaluation follows B.",
        tests=[
            "tests/subspace/combination/test_dora.py::test_a_parameter_that_is_written_to_in_evaluation_acts_at_once[lora_B]"
        ],
    ),
    Mutant(
        name="loftq-is-promised-to-peft",
        file="dist_subspace/subspace/extension/lora.py",
        text="return not nonlinear and not (isinstance(part, LoftqLinear) and part.rebases)",
        becomes="return not nonlinear",
        promise="PEFT is not promised an adapter whose base it would not make.",
        tests=[
            "tests/subspace/blocks/test_loftq.py::test_peft_is_promised_it_only_where_the_base_is_the_one_that_peft_would_make"
        ],
    ),
    Mutant(
        name="copys-output-cast-always",
        file="dist_subspace/subspace/beside/trained_copy.py",
        text="return y.to(self.dtype) if self.is_embedding else y",
        becomes="return y.to(self.dtype)",
        promise="A head that is trained in full gives float32 logits.",
        tests=["tests/subspace/test_attach.py::test_a_saved_copy_is_float32_beside_a_half_precision_model"],
    ),
    Mutant(
        name="copys-weight-is-the-trained-when-disabled",
        file="dist_subspace/subspace/beside/trained_copy.py",
        text="return self.trained.weight if self.enabled else self.original.weight",
        becomes="return self.trained.weight",
        promise="Who reads the weight of a disabled module that is trained in full gets the frozen one.",
        tests=["tests/subspace/test_attach.py::test_tied_modules_that_are_saved_stay_tied"],
    ),
    Mutant(
        name="reduction-default-sum",
        file="dist_subspace/subspace/core/constraints.py",
        text='choice("mean", "of the penalty over layers", "sum")',
        becomes='choice("sum", "of the penalty over layers", "mean")',
        promise="An option that is not given is what the documentation says: the mean over layers.",
        tests=["tests/subspace/test_config.py::test_options_that_are_not_given_are_these"],
    ),
    Mutant(
        name="virtual-tokens-default",
        file="dist_subspace/subspace/virtual_tokens/part.py",
        text="whole(20, ",
        becomes="whole(10, ",
        promise="An option that is not given is what the documentation says: 20 virtual tokens.",
        tests=["tests/subspace/test_config.py::test_options_that_are_not_given_are_these"],
    ),
]
