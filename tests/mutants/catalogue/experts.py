"""Slips in how the experts of a mixture are held, called, trained and written."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_STACK = "dist_subspace/storage/stack.py"
_INTERNALS = "dist_subspace/loading/experts_internals.py"
_OF_STACK = "tests/storage/test_stack.py"
_OF_INTERNALS = "tests/loading/test_experts_internals.py"
_OF_PARTS = "tests/subspace/core/test_stacks.py"
_OF_PEFT = "tests/interchange/peft/test_experts.py"
_OF_ROUTERS = "tests/training/test_router_loss.py"
_OF_FAMILIES = (
    "tests/families/test_experts.py::test_a_method_on_a_familys_experts_computes_trains_and_merges_as_the_formula"
)

MUTANTS = [
    Mutant(
        name="stack-one-offset-for-all-experts",
        file=_STACK,
        text="operator.set_plain_values(self.plain[number])",
        becomes="operator.set_plain_values(self.plain[0])",
        promise="Each expert is decoded with its own statistics, the double quantisation's mean among them.",
        tests=[f"{_OF_STACK}::test_each_expert_is_held_as_a_linear_layer_of_its_own[False-nf4]"],
    ),
    Mutant(
        name="stack-operator-keeps-the-experts-bytes",
        file=_STACK,
        text="        self.stack, self.number = stack, number\n",
        becomes="        self.stack, self.number = stack, number\n        kept = stack.expert(number)\n"
        "        self.transposed_product = kept.transposed_product\n",
        promise="Backward reads an expert's bytes again, and keeps none of the gathered ones.",
        tests=[f"{_OF_STACK}::test_backward_reads_the_experts_again_and_keeps_nothing_of_them[True]"],
    ),
    Mutant(
        name="stack-multiplies-experts-without-tokens",
        file=_STACK,
        text="        if count:\n",
        becomes="        if True:\n",
        promise="Only experts with tokens are decoded.",
        tests=[f"{_OF_STACK}::test_one_matrix_is_decoded_at_a_time_and_only_of_experts_with_tokens"],
    ),
    Mutant(
        name="experts-weights-of-another-order",
        file=_INTERNALS,
        text="weights = top_k_weights.reshape(-1)[order]",
        becomes="weights = top_k_weights.reshape(-1)",
        promise="Each token's experts are weighted by that token's weights.",
        tests=[f"{_OF_INTERNALS}::test_biases_norms_and_indices_of_no_expert[True]"],
    ),
    Mutant(
        name="experts-index-of-none-counts",
        file=_INTERNALS,
        text="weights.masked_fill(ids >= number, 0.0)",
        becomes="weights",
        promise="An index beyond the experts is none of them.",
        tests=[f"{_OF_INTERNALS}::test_biases_norms_and_indices_of_no_expert[True]"],
    ),
    Mutant(
        name="experts-gate-and-up-changed-places",
        file=_INTERNALS,
        text="up * experts.act_fn(gate)",
        becomes="gate * experts.act_fn(up)",
        promise="Llama 4's gate is the first half.",
        tests=[
            f"{_OF_INTERNALS}::test_logits_and_gradients_are_transformers_on_the_same_weights"
            "[transposed, each given every token-int8]"
        ],
    ),
    Mutant(
        name="experts-merged-in-the-operators-layout",
        file="dist_subspace/interchange/plain.py",
        text="made[number] = onto.t() if stack.transposed else onto",
        becomes="made[number] = onto.reshape(made[number].shape)",
        promise="A merged stack has the layout of its family.",
        tests=[
            f"{_OF_INTERNALS}::test_a_merge_writes_the_stacks_of_the_chosen_base_as_the_family_holds_them"
            "[transposed, interleaved, with biases]"
        ],
    ),
    Mutant(
        name="experts-all-drawn-alike",
        file="dist_subspace/subspace/core/stacks.py",
        text="drawn = [part.trainables()[name].data for part in parts]",
        becomes="drawn = [parts[0].trainables()[name].data for part in parts]",
        promise="Each expert begins with its own draw.",
        tests=[f"{_OF_PARTS}::test_every_expert_begins_with_its_own_draw_and_none_changes_the_model"],
    ),
    Mutant(
        name="experts-vectors-decayed",
        file="dist_subspace/subspace/groups.py",
        text="of_experts = isinstance(part, StackedPart) and not part.shared",
        becomes="of_experts = False",
        promise="Vectors of experts have no weight decay, as vectors have none.",
        tests=[f"{_OF_PARTS}::test_vectors_of_experts_have_no_weight_decay"],
    ),
    Mutant(
        name="experts-left-out-without-a-word",
        file="dist_subspace/subspace/attach.py",
        text="for n, why in unnamed_stacks(model, stacks).items()",
        becomes="for n, why in ()",
        promise="A default that leaves experts out says so.",
        tests=[f"{_OF_PARTS}::test_all_linear_leaves_experts_out_and_says_so"],
    ),
    Mutant(
        name="experts-b-by-expert-first",
        file="dist_subspace/interchange/peft/experts.py",
        text="b.permute(1, 2, 0)",
        becomes="b.permute(1, 0, 2)",
        promise="PEFT reads each expert's B as its own.",
        tests=[
            "tests/interchange/peft/test_experts.py::test_peft_reads_the_folder_and_computes_the_same[both-Mixtral]"
        ],
    ),
    Mutant(
        name="experts-packed-copy-trained-in-full",
        file="dist_subspace/subspace/attach.py",
        text="        _refuse_stacks(model, ending, named)\n",
        becomes="",
        promise="Packed experts are not trained in full without training anything.",
        tests=[f"{_OF_INTERNALS}::test_packed_experts_cannot_be_trained_in_full"],
    ),
    Mutant(
        name="experts-all-with-the-first-ones-norms",
        file="dist_subspace/subspace/core/stacks.py",
        text="part.set_factors({name: factor[number] for name, factor in factors.items()})",
        becomes="part.set_factors({name: factor[0] for name, factor in factors.items()})",
        promise="DoRA's magnitudes of an expert are measured from its own rows.",
        tests=[f"{_OF_PARTS}::test_outputs_and_gradients_are_those_of_the_formula[fp32-dora]"],
    ),
    Mutant(
        name="experts-all-beside-the-first-ones-pair",
        file="dist_subspace/subspace/core/statistic.py",
        text="return of_all[number]",
        becomes="return of_all[0]",
        promise="PiSSA's residual of an expert lacks that expert's own triplets.",
        tests=[f"{_OF_PARTS}::test_outputs_and_gradients_are_those_of_the_formula[fp32-pissa]"],
    ),
    Mutant(
        name="experts-statistic-of-the-first-one",
        file="dist_subspace/statistics/rounds.py",
        text="expert = self.stack.expert(number)",
        becomes="expert = self.stack.expert(0)",
        promise="Each expert's own matrix is taken apart.",
        tests=[f"{_OF_PARTS}::test_pissa_starts_at_each_experts_own_largest_triplets[stacked-fp32]"],
    ),
    Mutant(
        name="experts-frozen-without-their-residual",
        file="dist_subspace/subspace/core/stacks.py",
        text="if not self.enabled and not self.rebases:",
        becomes="if not self.enabled:",
        promise="Disabled, experts that hold a residual compute what the model computed before.",
        tests=[f"{_OF_PARTS}::test_pissa_starts_at_each_experts_own_largest_triplets[fold-fp32]"],
    ),
    Mutant(
        name="experts-that-share-decayed-as-vectors-of-each",
        file="dist_subspace/subspace/groups.py",
        text="isinstance(part, StackedPart) and not part.shared",
        becomes="isinstance(part, StackedPart)",
        promise="A matrix that experts share has weight decay.",
        tests=[f"{_OF_PARTS}::test_vectors_of_experts_have_no_weight_decay"],
    ),
    Mutant(
        name="experts-merged-as-one-tensor",
        file="dist_subspace/interchange/merge.py",
        text="split = splits.get(entry.name)",
        becomes="split = None",
        promise="A merge writes each expert's matrices under the names that the checkpoint has.",
        tests=[f"{_OF_FAMILIES}[Mixtral-lora]"],
    ),
    Mutant(
        name="experts-merged-without-their-frozen-pair",
        file="dist_subspace/interchange/plain.py",
        text="needs = tuple(dict.fromkeys((*held, *own)))",
        becomes="needs = tuple(dict.fromkeys((*held, *(() if part is None else part.trainables().values()))))",
        promise="A merge gathers the frozen factors of a stack's part too.",
        tests=["tests/placement/deepspeed/test_experts.py::test_a_merge_of_split_stacks_is_that_of_whole_ones"],
    ),
    Mutant(
        name="experts-not-turned-for-peft",
        file="dist_subspace/interchange/peft/experts.py",
        text="            if name in turned:\n",
        becomes="            if False:\n",
        promise="PEFT takes Llama 4's stacks for the other layout, and is given their factors so.",
        tests=[f"{_OF_PEFT}::test_peft_reads_the_folder_and_computes_the_same[both-Llama4]"],
    ),
    Mutant(
        name="experts-of-peft-not-turned-back",
        file="dist_subspace/interchange/loaded_adapter.py",
        text="a, b = turned_pair(a, b) if turned else (a, b)",
        becomes="a, b = (a, b)",
        promise="The factors of Llama 4's stacks in a folder of PEFT's are read as they are meant.",
        tests=[f"{_OF_PEFT}::test_a_folder_of_pefts_is_read_and_computes_the_same[Llama4-config2]"],
    ),
    Mutant(
        name="routers-among-all-linear",
        file="dist_subspace/subspace/core/targets.py",
        text="for name in routers_among(model, wanted) if name not in only",
        becomes="for name in ()",
        promise="Routers are left alone unless they are named.",
        tests=[
            "tests/subspace/core/test_targets.py"
            "::test_routers_that_are_linear_layers_are_left_alone_unless_they_are_named"
        ],
    ),
    Mutant(
        name="routers-loss-without-its-weight",
        file="dist_subspace/training/router_loss.py",
        text="self.coefficient * targets * loss.float()",
        becomes="self.coefficient * loss.float()",
        promise="A micro-batch's auxiliary loss weighs as its targets do.",
        tests=[f"{_OF_ROUTERS}::test_the_loss_is_the_one_that_transformers_makes_with_its_routers_logits[mixtral]"],
    ),
    Mutant(
        name="routers-loss-measured-too",
        file="dist_subspace/training/loss.py",
        text="routers = router_loss_of(model) if torch.is_grad_enabled() else None",
        becomes="routers = router_loss_of(model)",
        promise="Evaluation measures the targets alone.",
        tests=[f"{_OF_ROUTERS}::test_the_loss_is_the_one_that_transformers_makes_with_its_routers_logits[mixtral]"],
    ),
    Mutant(
        name="routers-loss-without-a-gradient",
        file="dist_subspace/training/router_loss.py",
        text=" or not loss.requires_grad",
        becomes="",
        promise="A trained router is not left out of balance without a word.",
        tests=[f"{_OF_ROUTERS}::test_recomputed_blocks_pass_its_gradient_on_or_it_is_refused[True]"],
    ),
]
