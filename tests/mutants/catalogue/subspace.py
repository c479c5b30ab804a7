"""Slips in the methods: dropout, new tokens, default targets, the lists of names."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="dropout-in-evaluation-low-rank",
        file="dist_subspace/subspace/blocks/low_rank.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=["tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[lora]"],
    ),
    Mutant(
        name="dropout-in-evaluation-spectral",
        file="dist_subspace/subspace/blocks/spectral.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[svdiff]"
        ],
    ),
    Mutant(
        name="dropout-in-evaluation-spectral-additive",
        file="dist_subspace/subspace/combination/spectral_additive.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[spectral-additive]"
        ],
    ),
    Mutant(
        name="dropout-in-evaluation-residual",
        file="dist_subspace/subspace/blocks/residual.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[olora]"
        ],
    ),
    Mutant(
        name="dropout-in-evaluation-lora-dash",
        file="dist_subspace/subspace/combination/lora_dash.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[lora-dash]"
        ],
    ),
    Mutant(
        name="dropout-in-evaluation-dora",
        file="dist_subspace/subspace/combination/dora.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=["tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[dora]"],
    ),
    Mutant(
        name="dropout-in-evaluation-vera",
        file="dist_subspace/subspace/extension/vera.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=["tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[vera]"],
    ),
    Mutant(
        name="dropout-in-evaluation-liera",
        file="dist_subspace/subspace/extension/liera.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="self.settings.dropout",
        promise="In evaluation dropout is off.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[liera]"
        ],
    ),
    Mutant(
        name="dropout-removed-spectral",
        file="dist_subspace/subspace/blocks/spectral.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="0.0",
        promise="In training the input of the adapter's branch is dropped.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[sam-parser]"
        ],
    ),
    Mutant(
        name="dropout-removed-residual",
        file="dist_subspace/subspace/blocks/residual.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="0.0",
        promise="In training the input of the adapter's branch is dropped.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[pissa]"
        ],
    ),
    Mutant(
        name="dropout-removed-lora-fa",
        file="dist_subspace/subspace/extension/lora_fa.py",
        text="self.settings.dropout if self.training else 0.0",
        becomes="0.0",
        promise="In training the input of the adapter's branch is dropped.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[lora-fa]"
        ],
    ),
    Mutant(
        name="dropout-with-the-complement",
        file="dist_subspace/subspace/blocks/dropout.py",
        text=">= self.p",
        becomes=">= 1 - self.p",
        promise="An input is dropped with probability subspace.dropout.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[lora]"
        ],
    ),
    Mutant(
        name="dropout-not-scaled",
        file="dist_subspace/subspace/blocks/dropout.py",
        text=".div_(1 - self.p)",
        becomes="",
        promise="What is kept is scaled by 1 / (1 - p).",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[lora]"
        ],
    ),
    Mutant(
        name="dropout-one-mask-for-ever",
        file="dist_subspace/subspace/blocks/dropout.py",
        text="int(torch.randint(2**62, ()).item())",
        becomes="1234",
        promise="Every call draws a mask of its own.",
        tests=[
            "tests/subspace/test_dropout.py::test_every_call_draws_anew_and_checkpointing_draws_again_what_it_drew[lora]"
        ],
    ),
    Mutant(
        name="dropout-one-mask-for-all-tokens",
        file="dist_subspace/subspace/blocks/dropout.py",
        text="self.shape, self.device = x.shape, x.device",
        becomes="self.shape, self.device = x.shape[-1:], x.device",
        promise="Every token is dropped by itself.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[lora]"
        ],
    ),
    Mutant(
        name="dropout-not-in-backward",
        file="dist_subspace/subspace/blocks/dropout.py",
        text="return ctx.drop(g), None",
        becomes="return g, None",
        promise="Gradients pass through the mask that forward drew.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[svdiff]"
        ],
    ),
    Mutant(
        name="dropout-on-the-stacked-residual",
        file="dist_subspace/subspace/blocks/residual.py",
        text="if not self.rebases and dropout == 0:\n"
        "            return DeviationUpdate.apply(z, x, self.lora_A, self.lora_B, self, True, 0.0)",
        becomes="if not self.rebases:\n"
        "            return DeviationUpdate.apply(z, x, self.lora_A, self.lora_B, self, True, dropout)",
        promise="The frozen residual's input is not dropped.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[pissa]"
        ],
    ),
    Mutant(
        name="dropout-on-doras-frozen-path",
        file="dist_subspace/subspace/blocks/magnitude.py",
        text="y = torch.addmm(out[:tokens], hidden.t(), left).addcmul_(u, near)",
        becomes="y = torch.addmm(out[tokens : 2 * tokens], hidden.t(), left).addcmul_(u, near)",
        promise="DoRA's W x sees the input as it is.",
        tests=[
            "tests/subspace/test_dropout.py::test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn[dora]"
        ],
    ),
    Mutant(
        name="dropout-before-the-parallel-adapter",
        file="dist_subspace/subspace/extension/parallel_adapter.py",
        text="functional.relu(Down.apply(x, self.lora_A, 0.0))",
        becomes="functional.relu(Down.apply(x, self.lora_A, self.settings.dropout))",
        promise="The parallel adapter drops its activations, not its input.",
        tests=["tests/subspace/test_dropout.py::test_the_parallel_adapter_drops_its_activations"],
    ),
    Mutant(
        name="part-trains-on-a-model-in-evaluation",
        file="dist_subspace/subspace/attach.py",
        text="part.train(site.training)",
        becomes="part",
        promise="A part has the mode of the layer whose place it takes.",
        tests=["tests/subspace/test_dropout.py::test_in_evaluation_and_without_a_probability_nothing_is_dropped[lora]"],
    ),
    Mutant(
        name="dropout-unused-not-said",
        file="dist_subspace/subspace/config.py",
        text="if not info.uses_dropout and config.dropout:",
        becomes="if info.uses_dropout and not config.dropout:",
        promise="A method without dropout says that it is unused.",
        tests=[
            "tests/subspace/test_dropout.py::test_a_method_without_dropout_says_that_it_is_unused_and_drops_nothing[ssl]"
        ],
    ),
    Mutant(
        name="new-rows-not-scaled",
        file="dist_subspace/subspace/beside/new_tokens.py",
        text="rows = rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)",
        becomes="rows = rows if scale is None else rows",
        promise="New tokens' rows are scaled as the model's embedding scales its own.",
        tests=[
            "tests/subspace/beside/test_new_tokens.py::test_new_rows_are_scaled_as_the_models_own_embedding_scales_its_rows[Gemma3ForCausalLM]"
        ],
    ),
    Mutant(
        name="funnels-value-not-known",
        file="dist_subspace/families/projections.py",
        text='    "v_head": "Funnel",\n',
        becomes="",
        promise="The scalings know every family's key, value and FFN-up.",
        tests=[
            "tests/subspace/test_family_names.py::test_the_scalings_mean_key_value_and_ffn_up_of_every_family[masked-lm/funnel]"
        ],
    ),
    Mutant(
        name="codegens-ffn-not-known",
        file="dist_subspace/families/projections.py",
        text='    "fc_in": "GPT-J, CodeGen",\n',
        becomes="",
        promise="The scalings know every family's key, value and FFN-up.",
        tests=[
            "tests/subspace/test_family_names.py::test_the_scalings_mean_key_value_and_ffn_up_of_every_family[causal-lm/codegen]"
        ],
    ),
    Mutant(
        name="phis-attention-output-not-known",
        file="dist_subspace/families/projections.py",
        text='    "self_attn.dense": "Phi, Persimmon",\n',
        becomes="",
        promise="Adapters stand behind every family's attention outputs.",
        tests=[
            "tests/subspace/test_family_names.py::test_the_adapters_stand_behind_every_attention_and_every_ffn[causal-lm/phi]"
        ],
    ),
    Mutant(
        name="lfm2s-ffn-output-not-known",
        file="dist_subspace/families/projections.py",
        text='    "w2": "LFM2",\n',
        becomes="",
        promise="Adapters stand behind every family's FFN outputs.",
        tests=[
            "tests/subspace/test_family_names.py::test_the_adapters_stand_behind_every_attention_and_every_ffn[causal-lm/lfm2]"
        ],
    ),
    Mutant(
        name="post-norm-of-distilbert-not-known",
        file="dist_subspace/families/norms.py",
        text='    "ffn.lin2": "output_layer_norm",  # DistilBERT\n',
        becomes="",
        promise="Pfeiffer's adapter stands around the output norm of a post-norm encoder.",
        tests=[
            "tests/subspace/test_family_names.py::test_one_adapter_a_block_stands_around_the_norm_of_a_post_norm_encoder[distilbert]"
        ],
    ),
    Mutant(
        name="a-router-is-adapted",
        file="dist_subspace/families/projections.py",
        text="return ends_with_any(name, FFN_OUTPUTS) and not attention and not is_inside_router(name)",
        becomes="return ends_with_any(name, FFN_OUTPUTS) and not attention",
        promise="A router's layers are no outputs of an FFN, whatever they are called.",
        tests=[
            "tests/subspace/test_family_names.py::test_the_adapters_stand_behind_every_attention_and_every_ffn[causal-lm/zaya]"
        ],
    ),
    Mutant(
        name="a-name-beside-others-is-dropped",
        file="dist_subspace/subspace/core/targets.py",
        text="        if (chosen or beside) and not isinstance(targets, str) and not only:\n",
        becomes="        if False:\n",
        promise="A target that names no layer is refused, also beside others that do.",
        tests=["tests/subspace/core/test_targets.py"],
    ),
    Mutant(
        name="an-exclusion-of-nothing-is-let-through",
        file="dist_subspace/subspace/attach.py",
        text="        check_excluded(model, config.exclude_modules)\n",
        becomes="        pass\n",
        promise="An exclusion that would leave nothing out is refused.",
        tests=["tests/subspace/core/test_targets.py"],
    ),
    Mutant(
        name="a-router-is-scaled",
        file="dist_subspace/subspace/core/targets.py",
        text="        return {name: module for name, module in chosen.items() if not is_inside_router(name)}\n",
        becomes="        return chosen\n",
        promise="A router's layers are not scaled by default.",
        tests=[
            "tests/subspace/test_family_names.py::test_the_scalings_mean_key_value_and_ffn_up_of_every_family[causal-lm/zaya]"
        ],
    ),
    Mutant(
        name="mobileberts-bottleneck-is-adapted",
        file="dist_subspace/families/projections.py",
        text="        and not ends_with_any(name, NOT_ATTENTION_OUTPUTS)\n",
        becomes="",
        promise="What narrows an attention's input is no output of it.",
        tests=[
            "tests/subspace/test_family_names.py::test_the_adapters_stand_behind_every_attention_and_every_ffn[masked-lm/mobilebert]"
        ],
    ),
    Mutant(
        name="former-targets-of-an-adapter-lost",
        file="dist_subspace/subspace/core/targets.py",
        text="if has_role(n) or n in self.only}",
        becomes="if has_role(n)}",
        promise="An adapter that was made when a default meant more layers keeps them.",
        tests=[
            "tests/subspace/test_family_names.py::test_an_adapter_that_was_made_when_a_default_meant_more_layers_keeps_them"
        ],
    ),
    Mutant(
        name="a-split-norms-width-not-gathered",
        file="dist_subspace/subspace/attach.py",
        text="    with gathered(_norm_weights(sites)):\n        parts = _put_parts(",
        becomes="    if True:\n        parts = _put_parts(",
        promise="A norm whose weight is split over the ranks is as wide as its weight.",
        tests=["tests/subspace/blocks/test_norm_part.py::test_parts_on_norms_train_alike_where_norms_are_split"],
    ),
    Mutant(
        name="a-method-is-not-registered",
        file="dist_subspace/subspace/extension/moslora.py",
        text="@register(\n",
        becomes="@(lambda info: lambda kind: setattr(kind, 'info', info) or kind)(\n",
        promise="The methods are registered.",
        tests=["tests/test_names.py::test_the_methods_are_these_with_the_defaults_of_their_cards"],
    ),
    Mutant(
        name="doras-alpha-is-its-rank",
        file="dist_subspace/subspace/combination/dora.py",
        text="alpha_over_rank=2.0",
        becomes="alpha_over_rank=1.0",
        promise="Unset, alpha is twice the rank.",
        tests=["tests/test_names.py::test_the_methods_are_these_with_the_defaults_of_their_cards"],
    ),
]
