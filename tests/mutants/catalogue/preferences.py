"""Objectives of preferences: what the answers are, what they are compared with, and what the loss is a mean of."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_PREFERENCES = "dist_subspace/training/preferences"
_TESTS = "tests/training/preferences"
_DATA = "tests/training/data"
_ALIKE = f"{_TESTS}/test_objectives.py::test_ranks_micro_batches_and_a_stop_on_the_way_make_no_difference"
_KEY = "tests/keys/test_training.py::test_a_key_changes_the_run_as_the_reference_says"

MUTANTS = [
    Mutant(
        name="reference-with-the-adapter",
        file=f"{_PREFERENCES}/reference.py",
        text="            with disabled(self.model):\n                yield\n            return",
        becomes="            yield\n            return",
        promise="dpo and kto compare with the base alone.",
        tests=[f"{_TESTS}/test_reference.py::test_it_is_the_base_as_it_was[lora]"],
    ),
    Mutant(
        name="reference-follows-the-training",
        file=f"{_PREFERENCES}/reference.py",
        text="{name: p.detach().clone() for name",
        becomes="{name: p.detach() for name",
        promise="The reference of a run that begins with an adapter stays what it was.",
        tests=[f"{_TESTS}/test_reference.py::test_it_is_the_adapter_that_the_run_began_with"],
    ),
    Mutant(
        name="reference-of-a-resumed-run-is-its-checkpoint",
        file="dist_subspace/training/plan.py",
        text="newest is None or needs_beginning(config) else",
        becomes="newest is None else",
        promise="A run that goes on keeps the reference that it began with.",
        tests=[f"{_TESTS}/test_objectives.py::test_a_run_that_goes_on_from_an_adapter_keeps_its_reference"],
    ),
    Mutant(
        name="distance-of-the-own-rank",
        file=f"{_PREFERENCES}/objectives.py",
        text="        kl = total / max(1, terms)",
        becomes="        kl = sum(map(float, own), 0.0) / max(1, terms)",
        promise="kto's distance from the reference is that of all ranks.",
        tests=[f"{_ALIKE}[kto]"],
    ),
    Mutant(
        name="tokens-weighed-by-the-micro-batch",
        file=f"{_PREFERENCES}/objectives.py",
        text="        loss = self._pairs_a_token * nll",
        becomes="        loss = batch.terms / said.chosen_tokens * nll",
        promise="orpo's loss of the chosen texts is a mean over the tokens of the global batch.",
        tests=[f"{_ALIKE}[orpo]"],
    ),
    Mutant(
        name="mean-over-targets-of-preferences",
        file="dist_subspace/training/data/batches.py",
        text="return self.targets if self.filler.preferences is None else self.samples",
        becomes="return self.targets",
        promise="The loss of preferences is a mean over pairs.",
        tests=[f"{_KEY}[training.preference.beta]"],
    ),
    Mutant(
        name="an-answer-behind-its-own-prompt",
        file="dist_subspace/training/data/batches.py",
        text="    return samples[-1:] + samples[:-1]",
        becomes="    return samples",
        promise="kto's distance is taken on prompts before another one's answer.",
        tests=[
            f"{_DATA}/test_preference_batch.py::test_every_answer_stands_once_behind_the_prompt_of_the_next_sample[2]"
        ],
    ),
    Mutant(
        name="a-loss-that-is-no-number-left-out",
        file=f"{_PREFERENCES}/trl_losses.py",
        text="    return loss + 0.0 * logps.sum()",
        becomes="    return loss",
        promise="A loss of kto that is no number is seen.",
        tests=[
            f"{_TESTS}/test_trl_losses.py::test_a_loss_of_single_answers_is_a_mean_and_hides_no_number_that_is_none[kto]"
        ],
    ),
    Mutant(
        name="rows-of-one-weight",
        file="dist_subspace/training/cross_entropy.py",
        text="    return factor[:, None] if factor.dim() else factor",
        becomes="    return factor.mean()",
        promise="Each answer has its own weight in the gradient.",
        tests=[f"{_TESTS}/test_logps.py::test_each_row_has_its_own_weight_in_the_gradient[dense]"],
    ),
    Mutant(
        name="a-trained-head-as-a-frozen-one",
        file="dist_subspace/training/loss.py",
        text="    is_trained = torch.is_grad_enabled() and _trains_head(model)",
        becomes="    is_trained = False",
        promise="The gradients of a trained head are those of plain transformers.",
        tests=[f"{_TESTS}/test_logps.py::test_each_row_has_its_own_weight_in_the_gradient[trained]"],
    ),
    Mutant(
        name="prompt-cut-to-the-first-answer",
        file="dist_subspace/training/data/preference.py",
        text="    longest = max(map(len, answers))",
        becomes="    longest = len(answers[0])",
        promise="Both texts of a pair are within data.max_length.",
        tests=[f"{_DATA}/test_preference.py::test_a_prompt_gives_way_on_its_left_to_the_longer_answer"],
    ),
    Mutant(
        name="dropout-against-the-base",
        file=f"{_PREFERENCES}/choice.py",
        text="            module.p = 0.0",
        becomes="            module.p = module.p",
        promise="The model is compared with its base without dropout.",
        tests=[f"{_TESTS}/test_choice.py::test_the_models_own_dropout_is_off_where_it_is_compared"],
    ),
]
