"""What a run is at each moment: measured, skipped, saved, continued."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINER, EVALUATE, ENGINE, RUN, PLAN, PROGRESS, MODEL = (
    f"dist_subspace/training/{name}.py"
    for name in ("trainer", "evaluate", "engine", "run", "plan", "progress", "model")
)
OF_RUNS, OF_STATES, OF_STEPS = (
    "tests/training/test_trainer.py",
    "tests/checkpoint/test_state.py",
    "tests/training/test_engine.py",
)
LINES = f"{OF_RUNS}::test_a_continued_run_has_every_line_of_the_one_that_was_not_interrupted"
ENDS = f"{OF_RUNS}::test_a_continued_run_ends_in_the_state_of_the_one_that_was_not_interrupted"
COUNTS = f"{OF_RUNS}::test_time_samples_and_tokens_go_on_from_where_the_run_was_left"
SKIPPED = f"{OF_RUNS}::test_skipped_steps_from_before_and_after_the_resume_are_one_sum"
BEST = f"{OF_RUNS}::test_the_best_from_before_the_resume_is_the_adapter"
NO_TRACE = f"{OF_RUNS}::test_an_evaluation_leaves_no_trace_in_the_training"
HELD_OUT = f"{OF_RUNS}::test_the_held_out_loss_is_that_of_transformers_and_peft"
HEAD = f"{OF_RUNS}::test_modules_trained_beside_a_new_head_are_saved_with_it_and_the_metrics_are_those_of_transformers"
METHOD = f"{OF_STATES}::test_a_method_that_differs_in_anything_is_refused"
OTHER = f"{OF_STATES}::test_another_base_or_other_data_under_the_same_name_is_refused_unless_it_is_allowed"
FACTOR = f"{OF_STATES}::test_a_factor_file_that_was_replaced_is_refused_and_one_that_is_lost_is_made_again"
FROZEN = f"{OF_STATES}::test_a_frozen_factor_that_is_not_the_checkpoints_is_refused"
HISTORIES = "tests/training/test_histories.py::test_newer_checkpoints_survive_a_run_that_does_not_continue_them"
BROKEN = f"{OF_STEPS}::test_a_step_with_one_gradient_that_is_not_finite_is_left_out_and_the_others_are_plain_torchs"

MUTANTS = [
    Mutant(
        name="stays-in-eval-after-an-evaluation",
        file="dist_subspace/placement/evaluation_mode.py",
        text="        model.train(was_training)\n",
        becomes="        pass\n",
        promise="After an evaluation the model trains again: dropout is on.",
        tests=[NO_TRACE],
    ),
    Mutant(
        name="evaluates-in-training-mode",
        file="dist_subspace/placement/evaluation_mode.py",
        text="    model.eval()\n",
        becomes="    model.train()\n",
        promise="A held-out loss is measured without dropout.",
        tests=[HELD_OUT],
    ),
    Mutant(
        name="evaluation-records-gradients",
        file="dist_subspace/training/sample_results.py",
        text="@torch.no_grad()\ndef sample_results",
        becomes="def sample_results",
        promise="An evaluation keeps no activations for a backward.",
        tests=[NO_TRACE],
    ),
    Mutant(
        name="filler-counts-in-the-held-out-loss",
        file="dist_subspace/training/evaluate.py",
        text="            if batch is not None:\n                loss += float(found.losses.sum())\n"
        "                targets += batch.targets\n",
        becomes="            loss += float(found.losses.sum())\n            targets += int(found.targets.sum())\n"
        "            if batch is not None:\n",
        promise="What an idle rank runs counts nothing.",
        tests=[f"{OF_RUNS}::test_ranks_that_idle_in_an_evaluation_count_nothing[2-zero2]"],
    ),
    Mutant(
        name="best-forgotten-on-resume",
        file="dist_subspace/training/trainer.py",
        text="self.progress = Progress(*counts, state.elapsed_seconds, best, ",
        becomes="self.progress = Progress(*counts, state.elapsed_seconds, None, ",
        promise="The best checkpoint from before a resume still counts.",
        tests=[BEST],
    ),
    Mutant(
        name="best-removed-by-the-limit",
        file="dist_subspace/training/trainer.py",
        text="self.config.checkpoint.save_total_limit, keep)",
        becomes="self.config.checkpoint.save_total_limit, [])",
        promise="save_total_limit does not remove the best checkpoint.",
        tests=[NO_TRACE],
    ),
    Mutant(
        name="plateau-forgotten-on-resume",
        file="dist_subspace/training/trainer.py",
        text="self.schedule.restore(state.schedule, state.step)",
        becomes="self.schedule.restore({}, state.step)",
        promise="A plateau schedule goes on with what it had learned.",
        tests=[LINES],
    ),
    Mutant(
        name="time-begins-anew-on-resume",
        file="dist_subspace/training/trainer.py",
        text="self.progress = Progress(*counts, state.elapsed_seconds, best, ",
        becomes="self.progress = Progress(*counts, 0.0, best, ",
        promise="elapsed_seconds is of the whole run.",
        tests=[COUNTS],
    ),
    Mutant(
        name="skipped-steps-forgotten-on-resume",
        file="dist_subspace/training/trainer.py",
        text="state.tokens, state.skipped, state.overflowed)",
        becomes="state.tokens, 0, state.overflowed)",
        promise="Steps that were skipped are counted over the whole run.",
        tests=[SKIPPED],
    ),
    Mutant(
        name="data-begins-anew-on-resume",
        file="dist_subspace/training/trainer.py",
        text="        batch = self.plan.batches.batch(self.progress.step)\n",
        becomes="        batch = self.plan.batches.batch(len(self.losses))\n",
        promise="A continued run goes on with the batch that comes, in the middle of an epoch.",
        tests=[LINES],
    ),
    Mutant(
        name="metrics-keep-the-lines-beyond-the-resume",
        file="dist_subspace/training/run.py",
        text="MetricsWriter(plan.run_dir, resume_step=step)",
        becomes="MetricsWriter(plan.run_dir, resume_step=plan.total_steps)",
        promise="metrics.jsonl has each step once.",
        tests=[LINES],
    ),
    Mutant(
        name="tracker-not-told-of-the-resume",
        file="dist_subspace/training/run.py",
        text="plan.config.run.report_to, plan.run_dir, plan.config.model_dump(), observer.display.warning, step\n",
        becomes="plan.config.run.report_to, plan.run_dir, plan.config.model_dump(), observer.display.warning\n",
        promise="A tracker shows each step of a continued run once.",
        tests=[f"{OF_RUNS}::test_a_tracker_shows_each_step_of_a_continued_run_once"],
    ),
    Mutant(
        name="optimizer-counters-not-restored",
        file="dist_subspace/checkpoint/state.py",
        text="tensors, state.optimizer_steps)\n    engine.restore_scaler",
        becomes="tensors, 1)\n    engine.restore_scaler",
        promise="Adam's bias correction goes on where it stood.",
        tests=[ENDS],
    ),
    Mutant(
        name="modules-to-save-dropped-beside-a-head",
        file="dist_subspace/training/model.py",
        text="dict.fromkeys([*plan.subspace.modules_to_save, *heads, *poolers])",
        becomes="dict.fromkeys([*heads, *poolers])",
        promise="modules_to_save are trained in full beside a new classification head.",
        tests=[HEAD],
    ),
    Mutant(
        name="method-known-by-its-name",
        file="dist_subspace/training/plan.py",
        text="[resolved.info.name, resolved.config.as_dict(), str(resolved.settings)]",
        becomes="[resolved.info.name]",
        promise="A checkpoint of another rank is not continued.",
        tests=[f"{METHOD}[rank]"],
    ),
    Mutant(
        name="method-known-by-a-layers-settings",
        file="dist_subspace/training/plan.py",
        text="[resolved.info.name, resolved.config.as_dict(), str(resolved.settings)]",
        becomes="[resolved.info.name, str(resolved.settings)]",
        promise="A checkpoint of other targets, or of a rank of one layer, is not continued.",
        tests=[f"{METHOD}[target_modules]"],
    ),
    Mutant(
        name="base-known-by-its-name",
        file="dist_subspace/training/plan.py",
        text='"model": base_fingerprint(folder),',
        becomes='"model": hashlib.sha256(folder.name.encode()).hexdigest(),',
        promise="A base whose file was replaced is another one.",
        tests=[f"{OTHER}[another_weight-model]"],
    ),
    Mutant(
        name="base-known-by-its-place",
        file="dist_subspace/training/plan.py",
        text='"model": base_fingerprint(folder),',
        becomes='"model": hashlib.sha256(str(folder).encode()).hexdigest(),',
        promise="A base that was moved is the same one.",
        tests=[f"{OF_STATES}::test_the_same_base_and_data_in_another_place_go_on"],
    ),
    Mutant(
        name="one-allowed-difference-allows-all",
        file="dist_subspace/checkpoint/state.py",
        text="and what not in allowed:",
        becomes="and not allowed:",
        promise="allow_different allows what it names.",
        tests=[f"{OTHER}[another_record-data]"],
    ),
    Mutant(
        name="replaced-factors-accepted",
        file="dist_subspace/training/trainer.py",
        text="        on_main(check_factors, folder, self.model, self.plan.run_dir.factors)\n",
        becomes="",
        promise="A factor file that was replaced is refused on resume.",
        tests=[f"{FACTOR}[pissa]"],
    ),
    Mutant(
        name="replaced-row-norms-accepted",
        file="dist_subspace/checkpoint/state.py",
        text='        described[OWN]["statistics"] = remade_files(model, run_dir.factors)\n',
        becomes="",
        promise="So are DoRA's row norms, which no adapter holds.",
        tests=[f"{FACTOR}[dora]"],
    ),
    Mutant(
        name="altered-frozen-factor-accepted",
        file="dist_subspace/checkpoint/state.py",
        text="    _check_frozen(model, folder)\n    trainables",
        becomes="    trainables",
        promise="A frozen A that is not the checkpoint's is refused.",
        tests=[f"{FROZEN}[lora-fa-.lora_A.weight]"],
    ),
    Mutant(
        name="one-frozen-factor-is-compared",
        file="dist_subspace/subspace/extension/vera.py",
        text="return dict(zip(PROJECTIONS, (self.projections.a, self.projections.b), strict=True))",
        becomes="return {PROJECTIONS[0]: self.projections.a}",
        promise="VeRA's B is kept and compared too.",
        tests=[f"{FROZEN}[vera-.vera_B]"],
    ),
    Mutant(
        name="infinite-gradient-accepted",
        file="dist_subspace/placement/deepspeed/engine.py",
        text="if not (finite and are_finite(gradients)):",
        becomes="if not finite:",
        promise="A finite loss with an infinite gradient changes nothing at stage 0.",
        tests=[f"{BROKEN}[0-1-inf]"],
    ),
    Mutant(
        name="skipped-step-shifts-the-accumulation",
        file="dist_subspace/placement/deepspeed/engine.py",
        text="                self.deepspeed.micro_steps += 1  # what engine.step would have counted\n",
        becomes="",
        promise="After a skipped step the next one is made after all its rounds.",
        tests=[f"{BROKEN}[0-1-inf]"],
    ),
    Mutant(
        name="skipped-gradients-are-kept",
        file="dist_subspace/placement/deepspeed/engine.py",
        text="                self.drop_gradients()\n                self.deepspeed.micro_steps",
        becomes="                self.deepspeed.micro_steps",
        promise="A skipped step's gradients are not added to the next one's.",
        tests=[f"{BROKEN}[0-1-inf]"],
    ),
    Mutant(
        name="newer-checkpoints-not-set-aside",
        file="dist_subspace/training/run.py",
        text="    set_aside_others(plan.run_dir, step, resumed, anew, observer.display.warning)\n",
        becomes="",
        promise="What a run finds in its folder and does not continue is moved away, and never overwritten.",
        tests=[f"{HISTORIES}[none-1-kept1]"],
    ),
    Mutant(
        name="checkpoints-beyond-the-resumed-one-stay",
        file="dist_subspace/checkpoint/set_aside.py",
        text="if foreign or number > step]",
        becomes="if foreign]",
        promise="Checkpoints newer than the one that is continued from are set aside.",
        tests=[
            "tests/checkpoint/test_set_aside.py::"
            "test_newer_checkpoints_than_the_one_that_is_continued_from_are_moved_with_their_metrics_and_adapter"
        ],
    ),
    Mutant(
        name="micro-batches-not-seeded",
        file="dist_subspace/training/engine.py",
        text="        seed_micro_batch(self.seed, micro.number)\n",
        becomes="",
        promise="Dropout after a resume is what it would have been.",
        tests=[LINES],
    ),
    Mutant(
        name="micro-batches-seeded-alike",
        file="dist_subspace/training/randomness.py",
        text='f"{seed}:{number}"',
        becomes='f"{seed}"',
        promise="Each micro-batch has dropout of its own.",
        tests=[
            "tests/training/test_randomness.py::"
            "test_each_micro_batch_of_each_run_has_draws_of_its_own_whatever_ran_before"
        ],
    ),
    Mutant(
        name="nothing-saved-before-a-decomposition",
        file="dist_subspace/training/trainer.py",
        text="        self._save_before_decomposing()\n",
        becomes="",
        promise="The step before a long decomposition is saved.",
        tests=[
            "tests/training/test_schedules.py::"
            "test_a_run_resumed_in_the_middle_of_its_schedule_ends_bit_for_bit_alike[lora-dash-zero0-1]"
        ],
    ),
    Mutant(
        name="best-is-no-number",
        file="dist_subspace/training/best.py",
        text="if math.isfinite(value) and (best",
        becomes="if (best",
        promise="An evaluation that gives no number is never the best.",
        tests=[f"{OF_RUNS}::test_a_run_whose_evaluations_give_no_number_has_no_best_and_goes_on"],
    ),
    Mutant(
        name="best-is-replaced-by-its-equal",
        file="dist_subspace/training/best.py",
        text='(value > best["value"] if up else value < best["value"])',
        becomes='(value > best["value"]) == up',
        promise="Of two equal evaluations the first is the best, as in transformers.",
        tests=[
            f"{OF_RUNS}::test_a_model_that_gives_no_number_and_one_that_is_no_better_do_not_replace_the_best[1e-30-0]"
        ],
    ),
    Mutant(
        name="plateau-takes-null-for-a-number",
        file="dist_subspace/training/schedule.py",
        text="            if learned[key] is not None:  # `best`",
        becomes="            if True:  # `best`",
        promise="A plateau schedule without a finite loss so far is read back.",
        tests=[f"{OF_RUNS}::test_a_run_whose_evaluations_give_no_number_has_no_best_and_goes_on"],
    ),
    Mutant(
        name="optimizer-tensors-of-another-shape-not-refused",
        file="dist_subspace/checkpoint/state.py",
        text="        if stored != here:\n",
        becomes="        if False:\n",
        promise="A checkpoint of another rank, which was allowed, is refused in a sentence and not by a traceback.",
        tests=[f"{OF_STATES}::test_an_allowed_method_that_its_tensors_do_not_fit_is_refused_in_a_sentence"],
    ),
]
