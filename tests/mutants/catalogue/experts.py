"""Slips in how the experts of a mixture are held, called, trained and written."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_STACK = "dist_subspace/storage/stack.py"
_INTERNALS = "dist_subspace/loading/experts_internals.py"
_OF_STACK = "tests/storage/test_stack.py"
_OF_INTERNALS = "tests/loading/test_experts_internals.py"
_OF_PARTS = "tests/subspace/core/test_stacks.py"

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
        text="weights.masked_fill(ids >= experts.num_experts, 0.0)",
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
]
