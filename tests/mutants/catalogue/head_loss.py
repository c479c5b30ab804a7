"""The loss inside the head: what is shifted, scaled and let go, and what the model does behind its head."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_MATHS = "tests/training/test_cross_entropy.py::"
_MODEL = "tests/training/test_head_loss.py::"
_OF_HEAD = f"{_MATHS}test_of_a_head_it_is_torchs_loss_and_the_gradients_of_rows_weight_and_bias"

MUTANTS = [
    Mutant(
        name="head-loss-not-shifted",
        file="dist_subspace/training/cross_entropy.py",
        text="functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()",
        becomes="labels.flatten()",
        promise="A position predicts the next token.",
        tests=[f"{_MATHS}test_a_position_predicts_the_next_token_and_the_last_of_a_row_none"],
    ),
    Mutant(
        name="head-gradients-keep-their-scale",
        file="dist_subspace/training/cross_entropy.py",
        text="factor = by_row(g / ctx.scale)",
        becomes="factor = by_row(g)",
        promise="A scale that float16 needs within is gone without.",
        tests=[f"{_OF_HEAD}[dtype2-False]"],
    ),
    Mutant(
        name="small-probabilities-lost-in-float16",
        file="dist_subspace/training/cross_entropy.py",
        text="{torch.float16: 256.0}",
        becomes="{torch.float16: 1.0}",
        promise="What many unlikely tokens add up to is not lost in float16.",
        tests=[f"{_MATHS}test_in_16_bits_what_many_unlikely_tokens_add_up_to_is_not_lost"],
    ),
    Mutant(
        name="ignored-rows-have-gradients",
        file="dist_subspace/training/cross_entropy.py",
        text=".masked_fill_(y == IGNORED, 0.0)",
        becomes="",
        promise="An ignored row has no gradient.",
        tests=[f"{_OF_HEAD}[dtype0-False]"],
    ),
    Mutant(
        name="gradients-made-without-autograd",
        file="dist_subspace/training/cross_entropy.py",
        text="wanted = torch.is_grad_enabled()",
        becomes="wanted = True",
        promise="An evaluation makes no gradients.",
        tests=[f"{_MATHS}test_a_frozen_head_gets_no_gradient_and_without_autograd_nothing_is_made_for_one"],
    ),
    Mutant(
        name="learned-scale-taken-for-a-number",
        file="dist_subspace/training/recorded.py",
        text=" or any(own)",
        becomes="",
        promise="A scale that is a tensor is no number that can be done again.",
        tests=["tests/training/test_recorded.py::test_what_one_rows_logits_do_not_say_is_known_by_name"],
    ),
    Mutant(
        name="cap-behind-the-head-forgotten",
        file="dist_subspace/training/head_loss.py",
        text="classes, kind, _finish(self.program, tokens)",
        becomes="classes, kind, _finish(Program(), tokens)",
        promise="What a model does with its head's result is a part of the loss.",
        tests=[f"{_MODEL}test_it_is_transformers_loss_with_its_gradients[Gemma2ForCausalLM-dtype0]"],
    ),
    Mutant(
        name="hooks-on-the-head-unnoticed",
        file="dist_subspace/training/head_loss.py",
        text="known is None or known.hooks != hooks",
        becomes="known is None",
        promise="A hook that changes the head's result is noticed.",
        tests=[f"{_MODEL}test_a_hook_that_comes_and_goes_is_noticed"],
    ),
    Mutant(
        name="another-forward-than-the-proved-one",
        file="dist_subspace/training/head_loss.py",
        text="torch.where(as_before, self.loss.new_ones(()), math.nan)",
        becomes="1.0",
        promise="A model that does another thing with its logits than it did has no loss.",
        tests=[f"{_MODEL}test_a_model_that_does_another_thing_later_has_a_loss_that_is_no_number"],
    ),
    Mutant(
        name="all-rows-through-the-head",
        file="dist_subspace/training/head_loss.py",
        text="return (args[0][:1, :1].detach(),)",
        becomes="return (args[0].detach(),)",
        promise="Logits of tokens x vocabulary never exist.",
        tests=[f"{_MODEL}test_a_step_never_holds_tokens_times_vocabulary"],
    ),
]
