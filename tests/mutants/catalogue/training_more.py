"""Training: what a step that is left out teaches, what a person learns of a run, what is found out early."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="announced-after-it-is-over",
        file="dist_subspace/training/announce.py",
        text="        pulse.close()\n",
        becomes="        pass\n",
        promise="What is over in time is not spoken of later.",
        tests=["tests/training/test_announce.py::test_what_is_over_in_time_is_not_spoken_of_later"],
    ),
    Mutant(
        name="clipping-changed-in-silence",
        file="dist_subspace/training/changes.py",
        text='    "max_grad_norm": _FOLLOWED,\n',
        becomes="",
        promise="A run that goes on with another max_grad_norm says so.",
        tests=["tests/training/test_changes.py::test_a_key_that_changes_what_comes_is_spoken_of_with_both_values"],
    ),
    Mutant(
        name="optimizer-changed-in-silence",
        file="dist_subspace/training/changes.py",
        text='    "optim": "its moments begin at zero",\n',
        becomes="",
        promise="A run that goes on with another optimizer says that its moments begin at zero.",
        tests=["tests/training/test_changes.py::test_a_key_that_changes_what_comes_is_spoken_of_with_both_values"],
    ),
    Mutant(
        name="epochs-changed-in-silence",
        file="dist_subspace/training/changes.py",
        text='    "num_train_epochs": _LENGTH,\n',
        becomes="",
        promise="A run that goes on for another number of epochs says so.",
        tests=["tests/training/test_changes.py::test_a_key_that_changes_what_comes_is_spoken_of_with_both_values"],
    ),
    Mutant(
        name="peak-in-kibibytes",
        file="dist_subspace/training/memory.py",
        text="else peak * 1024",
        becomes="else peak",
        promise="The peak of memory is in bytes.",
        tests=["tests/training/test_memory.py::test_the_peak_is_what_the_kernel_says_in_bytes"],
    ),
    Mutant(
        name="out-of-memory-on-a-cpu-not-known",
        file="dist_subspace/training/memory.py",
        text=' and "can\'t allocate memory" in str(error)',
        becomes=' and "out of memory" in str(error)',
        promise="torch's failed allocation on a CPU is known as one.",
        tests=["tests/training/test_memory.py::test_a_failed_allocation_is_known_whoever_made_it_and_nothing_else_is"],
    ),
    Mutant(
        name="advice-as-if-checkpointed",
        file="dist_subspace/training/memory.py",
        text="layers * (1 if checkpointing else 16)",
        becomes="layers * (16 if checkpointing else 1)",
        promise="The advice counts sixteen activations a block where there is no checkpointing.",
        tests=["tests/training/test_memory.py::test_the_advice_is_what_the_logits_and_the_kept_activations_take"],
    ),
    Mutant(
        name="out-of-memory-is-a-traceback",
        file="dist_subspace/training/run.py",
        text="if run.plan is not None and is_out_of_memory(error):",
        becomes="if False:",
        promise="A run that lacks memory says in a sentence what to lower.",
        tests=[
            "tests/training/test_said.py::test_what_a_method_has_no_use_for_is_said_and_so_is_what_to_lower_where_memory_is_short"
        ],
    ),
    Mutant(
        name="tokens-per-second-of-samples",
        file="dist_subspace/training/trainer.py",
        text="own_tokens=batch.tokens",
        becomes="own_tokens=batch.samples",
        promise="tokens_per_second counts tokens.",
        tests=["tests/training/test_said.py::test_the_speed_of_a_step_is_in_tokens_of_the_batch"],
    ),
    Mutant(
        name="infinite-gradient-taken-for-an-overflow",
        file="dist_subspace/training/trainer.py",
        text="if math.isfinite(loss) and self.engine.has_loss_scale:",
        becomes="if math.isfinite(loss):",
        promise="An infinite gradient outside fp16 is a skipped step, and ends a run that shall stop there.",
        tests=["tests/training/test_skipped.py::test_a_gradient_that_is_not_finite_ends_a_run_that_shall_stop_there"],
    ),
    Mutant(
        name="fp16-nan-taken-for-an-overflow",
        file="dist_subspace/training/trainer.py",
        text="if math.isfinite(loss) and self.engine.has_loss_scale:",
        becomes="if self.engine.has_loss_scale:",
        promise="A loss that is NaN is no overflow of fp16, and ends a run that shall stop there.",
        tests=["tests/training/test_skipped.py::test_a_loss_that_is_no_number_is_no_matter_of_the_fp16_scale"],
    ),
    Mutant(
        name="skipped-step-feeds-the-schedule",
        file="dist_subspace/training/trainer.py",
        text="            discard(self.model)\n            self._not_applied(loss)",
        becomes="            self._not_applied(loss)",
        promise="A method's schedule learns nothing of a skipped step.",
        tests=[
            "tests/training/test_skipped.py::test_a_gradient_that_is_not_finite_is_a_skipped_step_of_which_a_schedule_learns_nothing"
        ],
    ),
    Mutant(
        name="discard-keeps-the-weights",
        file="dist_subspace/advancing.py",
        text="attached(_unwrapped(model))\n    attached_method.accumulation.restart()\n",
        becomes="attached(_unwrapped(model))\n",
        promise="A step that was left out does not weigh in the next one's importance.",
        tests=[
            "tests/training/test_skipped.py::test_a_gradient_that_is_not_finite_is_a_skipped_step_of_which_a_schedule_learns_nothing"
        ],
    ),
    Mutant(
        name="discard-keeps-the-gradients",
        file="dist_subspace/advancing.py",
        text="    if attached_method.collector is not None:\n        attached_method.collector.take()\n",
        becomes="",
        promise="Gradients of a step that was left out are forgotten.",
        tests=[
            "tests/training/test_skipped.py::test_a_gradient_that_is_not_finite_is_a_skipped_step_of_which_a_schedule_learns_nothing"
        ],
    ),
    Mutant(
        name="perplexity-in-bits",
        file="dist_subspace/metrics/losses.py",
        text="math.exp(min(loss, LARGEST))",
        becomes="math.pow(2.0, min(loss, LARGEST))",
        promise="Perplexity is exp of the loss.",
        tests=["tests/training/test_said.py::test_every_logged_step_evaluation_and_checkpoint_is_on_the_screen"],
    ),
    Mutant(
        name="loss-in-16-bits",
        file="dist_subspace/training/cross_entropy.py",
        text="torch.empty(logits.shape, dtype=torch.float32, device=logits.device)",
        becomes="torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)",
        promise="Logits of 16 bits are summed up in float32.",
        tests=["tests/training/test_loss.py::test_logits_of_16_bits_are_summed_up_in_float32"],
    ),
    Mutant(
        name="keys-and-values-kept",
        file="dist_subspace/training/loss.py",
        text='        inputs["use_cache"] = False',
        becomes="        pass",
        promise="A decoder in training keeps no keys and values.",
        tests=[
            "tests/training/test_loss.py::test_a_decoder_keeps_no_keys_and_values_and_an_encoder_is_given_what_it_takes"
        ],
    ),
    Mutant(
        name="model-not-shown",
        file="dist_subspace/training/model.py",
        text="    observer.model_ready(model)\n",
        becomes="",
        promise="A run shows the table of its model.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
    Mutant(
        name="evaluation-not-shown",
        file="dist_subspace/training/observer.py",
        text="            self.display.evaluation(evaluation, remark)\n",
        becomes="",
        promise="An evaluation is on the screen.",
        tests=["tests/training/test_said.py::test_every_logged_step_evaluation_and_checkpoint_is_on_the_screen"],
    ),
    Mutant(
        name="step-not-shown",
        file="dist_subspace/training/observer.py",
        text="            self.display.update(record)\n",
        becomes="",
        promise="A logged step is on the screen.",
        tests=["tests/training/test_said.py::test_every_logged_step_evaluation_and_checkpoint_is_on_the_screen"],
    ),
    Mutant(
        name="saved-not-said",
        file="dist_subspace/training/observer.py",
        text='self.display.notice(f"saved {folder}")',
        becomes="pass",
        promise="A saved checkpoint is said.",
        tests=["tests/training/test_said.py::test_every_logged_step_evaluation_and_checkpoint_is_on_the_screen"],
    ),
    Mutant(
        name="tracker-not-closed",
        file="dist_subspace/training/observer.py",
        text="            self.trackers.close()\n",
        becomes="            pass\n",
        promise="Trackers are closed at the end.",
        tests=["tests/training/test_said.py::test_a_tracker_gets_the_configuration_every_figure_and_its_end"],
    ),
    Mutant(
        name="warnings-as-notices",
        file="dist_subspace/training/observer.py",
        text="        self.display.warning(text)\n",
        becomes="        self.display.notice(text)\n",
        promise="A warning says that it is one.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
    Mutant(
        name="heartbeat-without-the-step",
        file="dist_subspace/training/run.py",
        text="                observer.reached = status.reached\n",
        becomes="",
        promise="RUN/status.json knows the last whole step while the run lasts.",
        tests=["tests/training/test_said.py::test_the_status_of_a_run_that_lasts_knows_its_last_whole_step"],
    ),
    Mutant(
        name="size-of-the-run-not-said",
        file="dist_subspace/training/run.py",
        text="    observer.notice(steps_text(plan))\n",
        becomes="",
        promise="A run says how many steps and micro-batches it makes.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
    Mutant(
        name="data-notices-not-said",
        file="dist_subspace/training/run.py",
        text="    for sentence in plan.data.notices:\n        observer.notice(sentence)\n",
        becomes="",
        promise="What the data is read with is said.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
    Mutant(
        name="cut-samples-not-said",
        file="dist_subspace/training/run.py",
        text="        observer.display.notice(sentence, warning=many)\n",
        becomes="        pass\n",
        promise="Cut samples are said before the first step.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
    Mutant(
        name="unused-settings-not-said",
        file="dist_subspace/training/run.py",
        text="    if plan.resolved.unused:\n",
        becomes="    if False:\n",
        promise="A setting that the method has no use for is said.",
        tests=[
            "tests/training/test_said.py::test_what_a_method_has_no_use_for_is_said_and_so_is_what_to_lower_where_memory_is_short"
        ],
    ),
    Mutant(
        name="method-notice-not-said",
        file="dist_subspace/training/run.py",
        text="    if plan.resolved.notice:\n",
        becomes="    if False:\n",
        promise="What a constraint means for the method is said.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
    Mutant(
        name="useless-warmup-not-said",
        file="dist_subspace/training/run.py",
        text="        observer.warning(warning)\n",
        becomes="        pass\n",
        promise="A warm-up that the run never leaves is said by the run.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
    Mutant(
        name="older-tokens-not-said",
        file="dist_subspace/training/run.py",
        text="(*changed, *([older] if older else []))",
        becomes="changed",
        promise="A checkpoint of an earlier version that made other tokens is said.",
        tests=[
            "tests/training/test_said.py::test_a_run_that_goes_on_says_from_where_and_what_an_earlier_version_did_otherwise"
        ],
    ),
    Mutant(
        name="status-begins-without-the-step",
        file="dist_subspace/training/run.py",
        text='    status.write("running", step=step)\n',
        becomes="",
        promise="RUN/status.json knows from the start after which step the run goes on.",
        tests=[
            "tests/training/test_said.py::test_a_run_that_goes_on_says_from_where_and_what_an_earlier_version_did_otherwise"
        ],
    ),
    Mutant(
        name="trackers-without-the-configuration",
        file="dist_subspace/training/run.py",
        text="plan.config.run.report_to, plan.run_dir, plan.config.model_dump(),",
        becomes="plan.config.run.report_to, plan.run_dir, {},",
        promise="Trackers get the configuration.",
        tests=["tests/training/test_said.py::test_a_tracker_gets_the_configuration_every_figure_and_its_end"],
    ),
    Mutant(
        name="adapter-without-its-card",
        file="dist_subspace/training/results.py",
        text='        write_text_atomic(hidden / "README.md", card if edited is None else edited)\n',
        becomes="",
        promise="The adapter of a run has its card.",
        tests=["tests/training/test_said.py::test_the_card_of_the_adapter_says_how_it_was_trained"],
    ),
    Mutant(
        name="card-samples-for-tokens",
        file="dist_subspace/training/card.py",
        text='"tokens": progress.tokens',
        becomes='"tokens": progress.samples',
        promise="The card counts the tokens.",
        tests=["tests/training/test_said.py::test_the_card_of_the_adapter_says_how_it_was_trained"],
    ),
    Mutant(
        name="no-picture-at-the-end",
        file="dist_subspace/training/results.py",
        text="        curve = loss_curve(plan.run_dir)\n",
        becomes="        pass\n",
        promise="A run that is over has its picture.",
        tests=["tests/training/test_said.py::test_the_end_names_the_adapter_and_the_picture"],
    ),
    Mutant(
        name="adapter-not-named-at-the-end",
        file="dist_subspace/training/results.py",
        text=", adapter=folder, curve=curve, ",
        becomes=", ",
        promise="The end of a run names adapter and picture.",
        tests=["tests/training/test_said.py::test_the_end_names_the_adapter_and_the_picture"],
    ),
    Mutant(
        name="resume-not-said",
        file="dist_subspace/training/display.py",
        text='            self.notice(f"continuing after step {step:,}, to step {self.total_steps:,}{left}")\n',
        becomes="            pass\n",
        promise="A run that goes on says after which step.",
        tests=[
            "tests/training/test_said.py::test_a_run_that_goes_on_says_from_where_and_what_an_earlier_version_did_otherwise"
        ],
    ),
    Mutant(
        name="load-not-said-to-be-done",
        file="dist_subspace/training/display.py",
        text='        self._say(f"{what}: done in {self._clock() - began:.1f} s")\n',
        becomes="        pass\n",
        promise="A run says that the model was read.",
        tests=[
            "tests/training/test_said.py::test_a_run_says_how_long_it_is_and_what_it_does_with_its_data_and_settings"
        ],
    ),
]
