"""What a run is at each moment: measured, skipped, saved, continued."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINER, EVALUATE, ENGINE, RUN, PLAN, PROGRESS, MODEL = (
    f"dist_subspace/training/{name}.py"
    for name in ("trainer", "evaluate", "engine", "run", "plan", "progress", "model")
)
STATE, STORE = "dist_subspace/checkpoint/state.py", "dist_subspace/checkpoint/store.py"
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
BROKEN = f"{OF_STEPS}::test_a_step_with_one_gradient_that_is_not_finite_is_left_out_and_the_others_are_plain_torchs"

MUTANTS = [
    Mutant(
        name="stays-in-eval-after-an-evaluation",
        file=EVALUATE,
        text="        model.train(was_training)\n",
        becomes="        pass\n",
        promise="After an evaluation the model trains again: dropout is on.",
        tests=[NO_TRACE],
    ),
    Mutant(
        name="evaluates-in-training-mode",
        file=EVALUATE,
        text="    model.eval()\n",
        becomes="    model.train()\n",
        promise="A held-out loss is measured without dropout.",
        tests=[HELD_OUT],
    ),
    Mutant(
        name="evaluation-records-gradients",
        file=EVALUATE,
        text="@torch.no_grad()\ndef evaluate",
        becomes="def evaluate",
        promise="An evaluation keeps no activations for a backward.",
        tests=[NO_TRACE],
    ),
    Mutant(
        name="filler-counts-in-the-held-out-loss",
        file=EVALUATE,
        text="            if batch is not None:\n                loss += float(summed_loss(logits, batch.labels))\n"
        "                targets += batch.targets\n",
        becomes="            loss += float(summed_loss(logits, used.labels))\n            targets += used.targets\n"
        "            if batch is not None:\n",
        promise="What an idle rank runs counts nothing.",
        tests=[f"{OF_RUNS}::test_ranks_that_idle_in_an_evaluation_count_nothing[2-zero2]"],
    ),
    Mutant(
        name="held-out-loss-of-one-rank",
        file=EVALUATE,
        text="    loss, targets, *summed = sum_over_ranks([loss, targets, *counts])\n",
        becomes="    summed = counts\n",
        promise="The held-out loss is that of all ranks' samples.",
        tests=[f"{OF_RUNS}::test_ranks_that_idle_in_an_evaluation_count_nothing[2-zero2]"],
    ),
    Mutant(
        name="held-out-loss-is-a-mean-of-means",
        file=EVALUATE,
        text="                targets += batch.targets\n",
        becomes="                targets += batch.samples\n",
        promise="The held-out loss is the mean over all targets.",
        tests=[HELD_OUT],
    ),
    Mutant(
        name="best-forgotten-on-resume",
        file=TRAINER,
        text="self.progress = Progress(*counts, state.elapsed_seconds, best)",
        becomes="self.progress = Progress(*counts, state.elapsed_seconds)",
        promise="The best checkpoint from before a resume still counts.",
        tests=[BEST],
    ),
    Mutant(
        name="best-not-saved",
        file=TRAINER,
        text="            best=progress.best,\n",
        becomes="",
        promise="A checkpoint knows the best evaluation so far.",
        tests=[BEST],
    ),
    Mutant(
        name="best-is-the-newest",
        file=TRAINER,
        text='        if best is None or (values[name] > best["value"]) == up:\n',
        becomes="        if best is None or up:\n",
        promise="The best is the one with the best metric, in the direction that was asked for.",
        tests=[BEST],
    ),
    Mutant(
        name="best-removed-by-the-limit",
        file=TRAINER,
        text="self.config.checkpoint.save_total_limit, keep)",
        becomes="self.config.checkpoint.save_total_limit, [])",
        promise="save_total_limit does not remove the best checkpoint.",
        tests=[NO_TRACE],
    ),
    Mutant(
        name="limit-removes-the-newest",
        file=STORE,
        text="    for path in spare[:excess]:\n        _delete(Path(run_dir), path)\n    return spare[:excess]\n",
        becomes="    spare = spare[::-1]\n    for path in spare[:excess]:\n        _delete(Path(run_dir), path)\n"
        "    return spare[:excess]\n",
        promise="save_total_limit removes the oldest checkpoints.",
        tests=["tests/checkpoint/test_store.py::test_purge_keeps_the_newest_the_named_and_the_only_whole_one"],
    ),
    Mutant(
        name="plateau-forgotten-on-resume",
        file=TRAINER,
        text="self.schedule.restore(state.schedule, state.step)",
        becomes="self.schedule.restore({}, state.step)",
        promise="A plateau schedule goes on with what it had learned.",
        tests=[LINES],
    ),
    Mutant(
        name="plateau-hears-no-evaluation",
        file=TRAINER,
        text='        self.schedule.evaluated(values["eval_loss"])\n',
        becomes="",
        promise="A plateau schedule follows the held-out losses.",
        tests=[f"{OF_RUNS}::test_the_rate_of_each_step_is_that_of_torchs_plateau_schedule_on_the_logged_losses"],
    ),
    Mutant(
        name="time-begins-anew-on-resume",
        file=TRAINER,
        text="self.progress = Progress(*counts, state.elapsed_seconds, best)",
        becomes="self.progress = Progress(*counts, 0.0, best)",
        promise="elapsed_seconds is of the whole run.",
        tests=[COUNTS],
    ),
    Mutant(
        name="samples-begin-anew-on-resume",
        file=TRAINER,
        text="counts = (state.step, state.samples, state.tokens,",
        becomes="counts = (state.step, 0, state.tokens,",
        promise="Samples are counted over the whole run.",
        tests=[COUNTS],
    ),
    Mutant(
        name="skipped-steps-forgotten-on-resume",
        file=TRAINER,
        text="state.tokens, state.skipped, state.overflowed)",
        becomes="state.tokens, 0, state.overflowed)",
        promise="Steps that were skipped are counted over the whole run.",
        tests=[SKIPPED],
    ),
    Mutant(
        name="skipped-step-counts-as-overflow",
        file=TRAINER,
        text="        if math.isfinite(loss) and self.engine.fp16_enabled():\n",
        becomes="        if not math.isfinite(loss) or self.engine.fp16_enabled():\n",
        promise="Only a step beyond fp16's range counts as an overflow.",
        tests=[SKIPPED],
    ),
    Mutant(
        name="data-begins-anew-on-resume",
        file=TRAINER,
        text="        batch = self.plan.batches.batch(self.progress.step)\n",
        becomes="        batch = self.plan.batches.batch(len(self.losses))\n",
        promise="A continued run goes on with the batch that comes, in the middle of an epoch.",
        tests=[LINES],
    ),
    Mutant(
        name="metrics-keep-the-lines-beyond-the-resume",
        file=RUN,
        text="MetricsWriter(plan.run_dir, resume_step=step)",
        becomes="MetricsWriter(plan.run_dir, resume_step=plan.total_steps)",
        promise="metrics.jsonl has each step once.",
        tests=[LINES],
    ),
    Mutant(
        name="tracker-not-told-of-the-resume",
        file=RUN,
        text="plan.config.run.report_to, plan.run_dir, plan.config.model_dump(), observer.display.warning, step\n",
        becomes="plan.config.run.report_to, plan.run_dir, plan.config.model_dump(), observer.display.warning\n",
        promise="A tracker shows each step of a continued run once.",
        tests=[f"{OF_RUNS}::test_a_tracker_shows_each_step_of_a_continued_run_once"],
    ),
    Mutant(
        name="optimizer-counters-not-restored",
        file=STATE,
        text="tensors, state.optimizer_steps)\n    restore_scaler",
        becomes="tensors, 1)\n    restore_scaler",
        promise="Adam's bias correction goes on where it stood.",
        tests=[ENDS],
    ),
    Mutant(
        name="modules-to-save-dropped-beside-a-head",
        file=MODEL,
        text="dict.fromkeys([*plan.subspace.modules_to_save, *heads, *poolers])",
        becomes="dict.fromkeys([*heads, *poolers])",
        promise="modules_to_save are trained in full beside a new classification head.",
        tests=[HEAD],
    ),
    Mutant(
        name="method-known-by-its-name",
        file=PLAN,
        text="[resolved.info.name, resolved.config.as_dict(), str(resolved.settings)]",
        becomes="[resolved.info.name]",
        promise="A checkpoint of another rank is not continued.",
        tests=[f"{METHOD}[rank]"],
    ),
    Mutant(
        name="method-known-by-a-layers-settings",
        file=PLAN,
        text="[resolved.info.name, resolved.config.as_dict(), str(resolved.settings)]",
        becomes="[resolved.info.name, str(resolved.settings)]",
        promise="A checkpoint of other targets, or of a rank of one layer, is not continued.",
        tests=[f"{METHOD}[target_modules]"],
    ),
    Mutant(
        name="base-known-by-its-place",
        file=PLAN,
        text='"model": base_fingerprint(folder),',
        becomes='"model": hashlib.sha256(str(folder).encode()).hexdigest(),',
        promise="A base whose file was replaced is another one.",
        tests=[f"{OTHER}[another_weight-model]"],
    ),
    Mutant(
        name="differences-are-not-looked-for",
        file=PLAN,
        text="        check_same_run(found[0], found[1].fingerprints, fingerprints, list(config.checkpoint.allow_different))\n",
        becomes="        pass\n",
        promise="A checkpoint of other data is not continued.",
        tests=[f"{OTHER}[another_record-data]"],
    ),
    Mutant(
        name="one-allowed-difference-allows-all",
        file=STATE,
        text="and what not in allowed:",
        becomes="and not allowed:",
        promise="allow_different allows what it names.",
        tests=[f"{OTHER}[another_record-data]"],
    ),
    Mutant(
        name="replaced-factors-accepted",
        file=TRAINER,
        text="        on_main(check_factors, folder, self.model, self.plan.run_dir / FACTORS)\n",
        becomes="",
        promise="A factor file that was replaced is refused on resume.",
        tests=[f"{FACTOR}[pissa]"],
    ),
    Mutant(
        name="replaced-row-norms-accepted",
        file=STATE,
        text='        described[OWN]["statistics"] = remade_files(model, run_dir / FACTORS)\n',
        becomes="",
        promise="So are DoRA's row norms, which no adapter holds.",
        tests=[f"{FACTOR}[dora]"],
    ),
    Mutant(
        name="altered-frozen-factor-accepted",
        file=STATE,
        text="    _check_frozen(model, folder)\n    tensors",
        becomes="    tensors",
        promise="A frozen A that is not the checkpoint's is refused.",
        tests=[f"{FROZEN}[lora-fa-.lora_A.weight]"],
    ),
    Mutant(
        name="one-frozen-factor-is-compared",
        file="dist_subspace/subspace/extension/vera.py",
        text='        return {"base_model.vera_A": self.projections.a, "base_model.vera_B": self.projections.b}\n',
        becomes='        return {"base_model.vera_A": self.projections.a}\n',
        promise="VeRA's B is kept and compared too.",
        tests=[f"{FROZEN}[vera-.vera_B]"],
    ),
    Mutant(
        name="infinite-gradient-accepted",
        file=ENGINE,
        text="if not (finite and self._gradients_are_finite()):",
        becomes="if not finite:",
        promise="A finite loss with an infinite gradient changes nothing at stage 0.",
        tests=[f"{BROKEN}[0-1-inf]"],
    ),
    Mutant(
        name="infinite-gradient-is-a-number",
        file=ENGINE,
        text="bool(gradient.isfinite().all())",
        becomes="not bool(gradient.isnan().any())",
        promise="An infinity counts as not finite, as NaN does.",
        tests=[f"{BROKEN}[0-1-inf]"],
    ),
    Mutant(
        name="skipped-step-shifts-the-accumulation",
        file=ENGINE,
        text="                self.engine.micro_steps += 1  # what engine.step would have counted\n",
        becomes="",
        promise="After a skipped step the next one is made after all its rounds.",
        tests=[f"{BROKEN}[0-1-inf]"],
    ),
    Mutant(
        name="skipped-gradients-are-kept",
        file=ENGINE,
        text="                self.engine.zero_grad()\n                self.engine.micro_steps",
        becomes="                self.engine.micro_steps",
        promise="A skipped step's gradients are not added to the next one's.",
        tests=[f"{BROKEN}[0-1-inf]"],
    ),
]
