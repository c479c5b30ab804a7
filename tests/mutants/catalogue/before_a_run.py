"""What a person learns before and during a run: the data, the time that is left, the type, the best, the profile."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_PREVIEW, _BEST, _PACE = "tests/training/test_preview.py", "tests/training/test_best.py", "tests/training/test_pace.py"
_COMPUTATION, _RUN_KEYS = "tests/training/test_computation.py", "tests/keys/test_run.py"
_KEY = "test_a_key_changes_the_run_as_the_reference_says"

MUTANTS = [
    Mutant(
        name="preview-marks-what-is-not-trained",
        file="dist_subspace/training/rendering.py",
        text="if colour or not span.trained else",
        becomes="if colour or span.trained else",
        promise="preview marks what is trained, and nothing else.",
        tests=[f"{_PREVIEW}::test_the_first_samples_are_shown_with_what_is_trained_between_marks"],
    ),
    Mutant(
        name="preview-counts-after-cutting",
        file="dist_subspace/training/data_report.py",
        text="parts = [part.columns.seen for part in data.train.parts]",
        becomes="parts = [data.train.lengths]",
        promise="The histogram shows lengths before anything is cut.",
        tests=[f"{_PREVIEW}::test_counts_are_those_of_the_tokenizer"],
    ),
    Mutant(
        name="prepare-before-the-length-is-settled",
        file="dist_subspace/training/preview.py",
        text="        settled = materials.config\n",
        becomes="        settled = given\n",
        promise="What is prepared ahead has the length that the run has, and is found by it.",
        tests=[f"{_PREVIEW}::test_a_length_that_nobody_gave_is_the_models_in_the_run_and_ahead_of_it"],
    ),
    Mutant(
        name="length-given-is-capped-in-silence",
        file="dist_subspace/training/materials.py",
        text='if "max_length" in config.data.model_fields_set or room < 2:',
        becomes="if room < 2:",
        promise="A data.max_length that was given and is above the model's positions is refused.",
        tests=["tests/training/test_plan.py::test_a_row_that_the_model_has_no_positions_for_is_refused"],
    ),
    Mutant(
        name="early-stopping-counts-equal-as-better",
        file="dist_subspace/training/best.py",
        text='else value < best["value"]',
        becomes='else value <= best["value"]',
        promise="An evaluation that is equal to the best one is not better.",
        tests=[f"{_BEST}::test_a_run_ends_after_so_many_evaluations_in_a_row_that_bring_nothing_better"],
    ),
    Mutant(
        name="early-stopping-forgets-its-count",
        file="dist_subspace/training/trainer.py",
        text="            stale=progress.stale,\n",
        becomes="",
        promise="A run that has stopped early is over when it is started again.",
        tests=[f"tests/keys/test_training.py::{_KEY}[training.early_stopping_patience]"],
    ),
    Mutant(
        name="early-stopping-loses-the-last-lines",
        file="dist_subspace/training/trainer.py",
        text="            self.observer.log()\n            self.observer.notice(stopped",
        becomes="            self.observer.notice(stopped",
        promise="The steps before a run stops early have their line.",
        tests=[f"tests/keys/test_training.py::{_KEY}[training.early_stopping_patience]"],
    ),
    Mutant(
        name="time-left-counts-the-first-step",
        file="dist_subspace/training/pace.py",
        text="            self._first = seconds\n        else:\n            self._steps.append(seconds)\n",
        becomes="            self._first = seconds\n        self._steps.append(seconds)\n",
        promise="The first step, which warms up, is not taken for the others.",
        tests=[f"{_PACE}::test_after_every_step_but_the_first_the_time_left_is_what_the_run_then_takes"],
    ),
    Mutant(
        name="time-left-without-evaluations",
        file="dist_subspace/training/pace.py",
        text=" + sum(self._due(kind) * seconds for kind, seconds in self._asides.items())",
        becomes="",
        promise="The time that is left has the evaluations and checkpoints that come.",
        tests=[f"{_PACE}::test_after_every_step_but_the_first_the_time_left_is_what_the_run_then_takes"],
    ),
    Mutant(
        name="dtype-of-a-run-that-goes-on-changes-with-the-machine",
        file="dist_subspace/training/computation.py",
        text='dtype = begun_with or (str(SLOW).removeprefix("torch.") if slow else None)',
        becomes='dtype = str(SLOW).removeprefix("torch.") if slow else None',
        promise="A run that goes on keeps the type that it computes in.",
        tests=[f"{_COMPUTATION}::test_a_run_that_goes_on_keeps_its_type_wherever_it_goes_on"],
    ),
    Mutant(
        name="status-follows-the-heartbeat-alone",
        file="dist_subspace/checkpoint/occupancy.py",
        text='        self._said = {**self._said, **facts, "step": step}\n        self._changed.set()\n',
        becomes='        self._said = {**self._said, **facts, "step": step}\n',
        promise="status.json follows the steps within a second or two.",
        tests=["tests/checkpoint/test_occupancy.py::test_the_status_follows_the_steps_and_not_the_heartbeat_alone"],
    ),
    Mutant(
        name="dry-run-leaves-its-status",
        file="dist_subspace/checkpoint/occupancy.py",
        text="            _put_back(self.run.status, self._before)\n",
        becomes="            pass\n",
        promise="A dry run leaves the status of a run as it was.",
        tests=["tests/training/test_dry_run.py::test_a_run_that_is_there_stays_as_it_is_and_goes_on_afterwards"],
    ),
    Mutant(
        name="profile-of-one-step-less",
        file="dist_subspace/training/profile.py",
        text="elif self._made == BEFORE + self._steps:",
        becomes="elif self._made == BEFORE + self._steps - 1:",
        promise="run.profile traces as many steps as it is told.",
        tests=[f"{_RUN_KEYS}::{_KEY}[run.profile]"],
    ),
    Mutant(
        name="samples-of-later-steps-stay",
        file="dist_subspace/training/samples.py",
        text='if line["step"] < first]',
        becomes="]",
        promise="A run that goes on writes the answers of its steps again, and none twice.",
        tests=[
            "tests/training/test_samples.py::test_answers_stand_behind_those_of_earlier_steps_and_in_the_place_of_later_ones"
        ],
    ),
    Mutant(
        name="imports-compile",
        file="dist_subspace/late_compile.py",
        text="    torch.compile = later\n",
        becomes="",
        promise="bitsandbytes' import does not bring torch's compiler.",
        tests=["tests/test_command_line.py::test_a_start_imports_nothing_that_it_does_not_need"],
    ),
    Mutant(
        name="configuration-before-it-is-accepted",
        file="dist_subspace/training/run.py",
        text="                run.plan = make_plan(config, display.notice)\n",
        becomes="                display.show_config(brief_lines(config), config.run.output_dir)\n"
        "                run.plan = make_plan(config, display.notice)\n",
        promise="A refusal has no page of settings before it.",
        tests=["tests/training/test_said.py::test_a_refusal_is_one_sentence_and_no_page_of_settings_before_it"],
    ),
]
