"""Slips where somebody else's trainer trains a model with a method."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/trainers"
_MIXIN, _STEPS = "dist_subspace/trainers/mixin.py", "dist_subspace/trainers/trainer_internals.py"
_REFUSALS, _REFERENCE = "dist_subspace/trainers/refusals.py", "dist_subspace/trainers/reference.py"
_SENTENCES = f"{_TESTS}/test_refusals.py::test_one_sentence_names_what_is_given_and_what_is_accepted"

MUTANTS = [
    Mutant(
        name="trainer-optimizer-without-the-methods-groups",
        file=_MIXIN,
        text="        if self.optimizer is None:\n",
        becomes="        if False:\n",
        promise="Under a Trainer LoRA+'s rates are the optimizer's.",
        tests=[f"{_TESTS}/test_mixin.py::test_the_optimizer_has_the_methods_groups"],
    ),
    Mutant(
        name="trainer-loss-does-not-tell-its-share",
        file=_MIXIN,
        text="loss = accumulation.probe(result[0] if return_outputs else result, part)",
        becomes="loss = result[0] if return_outputs else result",
        promise="A penalty counts once a step, however many micro-batches TRL makes of it.",
        tests=[f"{_TESTS}/test_mixin.py::test_gradient_accumulation_counts_a_penalty_once_a_step"],
    ),
    Mutant(
        name="trainer-checkpoint-without-the-state",
        file=_STEPS,
        text="        self.is_writing_checkpoint = True\n",
        becomes="",
        promise="A Trainer's checkpoint holds what a resumed training needs.",
        tests=[f"{_TESTS}/test_mixin.py::test_a_resumed_training_goes_on_to_the_bit_and_says_nothing_of_missing_keys"],
    ),
    Mutant(
        name="trainer-resumes-without-the-schedule",
        file="dist_subspace/trainers/state.py",
        text="        schedule.restore(on_main(_numbers, folder / STATE), ChainMap(kept, tensors))\n",
        becomes="",
        promise="A resumed AdaLoRA goes on with the importance that it had.",
        tests=[f"{_TESTS}/test_mixin.py::test_a_resumed_training_goes_on_to_the_bit_and_says_nothing_of_missing_keys"],
    ),
    Mutant(
        name="trainer-reads-another-machines-factors",
        file="dist_subspace/trainers/state.py",
        text="    on_main(_check_adapter, folder, held)\n",
        becomes="",
        promise="Frozen factors that came out otherwise than in the checkpoint are refused.",
        tests=[f"{_TESTS}/test_state.py::test_frozen_factors_that_came_out_otherwise_are_refused"],
    ),
    Mutant(
        name="trainer-best-checkpoint-left-lying",
        file=_STEPS,
        text="            restore_values(self.model, Path(best))\n",
        becomes="            pass\n",
        promise="`load_best_model_at_end` loads the best adapter.",
        tests=[f"{_TESTS}/test_mixin.py::test_the_best_checkpoint_is_loaded_at_the_end_and_a_training_stops_early"],
    ),
    Mutant(
        name="trainer-schedule-stands-still",
        file="dist_subspace/trainers/callback.py",
        text="        advance(model, state.global_step, state.max_steps)\n",
        becomes="        return\n",
        promise="A schedule advances under TRL.",
        tests=[f"{_TESTS}/test_callback.py::test_adalora_ends_at_its_target_under_trl"],
    ),
    Mutant(
        name="trainer-reference-with-the-adapter",
        file=_REFERENCE,
        text="        with disabled(self.model):\n",
        becomes="        with nullcontext():\n",
        promise="The reference of DPO is the base, whatever the adapter has become.",
        tests=[f"{_TESTS}/test_mixin.py::test_losses_are_those_of_pefts_lora_in_trls_trainer[DPOTrainer]"],
    ),
    Mutant(
        name="trainer-dropout-of-the-branch-left-on",
        file=_MIXIN,
        text="            without_dropout(self.model)\n",
        becomes="            pass\n",
        promise="TRL's `disable_dropout` turns the method's dropout off.",
        tests=[f"{_TESTS}/test_dropout.py::test_disable_dropout_reaches_the_methods_branch"],
    ),
    Mutant(
        name="trainer-passes-by-an-adapted-head",
        file=_REFUSALS,
        text="    if isinstance(head, TrainedModule):\n",
        becomes="    if False:\n",
        promise="A head with a method is refused where a trainer reads its weight.",
        tests=[_SENTENCES],
    ),
    Mutant(
        name="trainer-passes-by-new-tokens",
        file=_REFUSALS,
        text="    if attached(model).new_tokens is not None:\n",
        becomes="    if False:\n",
        promise="New tokens are refused where a trainer reads the head's weight.",
        tests=[_SENTENCES],
    ),
    Mutant(
        name="trainer-loaded-adapter-measured-against-the-base",
        file=_REFUSALS,
        text="    if attached(model).loaded and not early:\n",
        becomes="    if False:\n",
        promise="A policy that was loaded has no reference that it does not begin with.",
        tests=[f"{_TESTS}/test_refusals.py::test_an_adapter_that_was_loaded_is_no_policy_whose_reference_is_the_base"],
    ),
    Mutant(
        name="trainer-reward-head-stays-random",
        file=_REFUSALS,
        text="    _check_fresh(model)\n",
        becomes="",
        promise="A head that the checkpoint lacks is not left frozen at random numbers.",
        tests=[_SENTENCES],
    ),
    Mutant(
        name="frozen-weights-kept-under-their-second-name",
        file=_STEPS,
        text="named_parameters(remove_duplicate=False) if not p.requires_grad}",
        becomes="named_parameters() if not p.requires_grad}",
        promise="DeepSpeed's files under a Trainer hold no tied head either.",
        tests=[
            f"{_TESTS}/test_trainer_internals.py::test_frozen_weights_are_left_out_under_all_their_names_and_not_missed"
        ],
    ),
    Mutant(
        name="save-pretrained-writes-the-packed-base",
        file="dist_subspace/api.py",
        text="    write_adapters_only(model, base_fingerprint)\n",
        becomes="",
        promise="`save_pretrained` of a model with a method writes its adapter.",
        tests=["tests/interchange/test_save_pretrained.py::test_save_pretrained_writes_what_load_adapter_reads"],
    ),
    Mutant(
        name="schedule-forgotten-without-a-word",
        file="dist_subspace/api.py",
        text="        after_steps(FORGOTTEN, functools.partial(_remind, weakref.ref(model)))\n",
        becomes="",
        promise="A loop that never moves a schedule on is told.",
        tests=["tests/test_advancing.py::test_a_loop_that_never_moves_the_schedule_on_is_told_once"],
    ),
    Mutant(
        name="pushed-checkpoint-lacks-our-description",
        file=_STEPS,
        text="            for name in (CONFIG, WEIGHTS, OWN_CONFIG):\n",
        becomes="            for name in (CONFIG, WEIGHTS):\n",
        promise="What a Trainer pushes while it saves is an adapter that loads.",
        tests=[f"{_TESTS}/test_push.py::test_a_checkpoint_and_the_end_are_pushed_as_an_adapter"],
    ),
    Mutant(
        name="penalty-counted-anew-by-a-reference",
        file="dist_subspace/subspace/core/constraints.py",
        text="            if torch.is_grad_enabled():  # a reference's forward may lie between this one's and its backward\n",
        becomes="            if True:\n",
        promise="A reference's forward does not change how a penalty is shared among a block's calls.",
        tests=["tests/subspace/core/test_constraints.py::test_a_layer_that_all_blocks_share_is_penalised_once"],
    ),
]
