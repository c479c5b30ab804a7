"""Reports, pictures and tables: figures that stand for something else."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="report-rank-at-fault-not-said",
        file="dist_subspace/report/run.py",
        text='    text += f" on rank {status[\'rank\']}" if status.get("rank") is not None else ""\n',
        becomes="",
        promise="report names the rank at fault.",
        tests=["tests/report/test_run.py::test_who_was_at_fault_what_is_doubtful_and_where_the_adapter_lies_is_said"],
    ),
    Mutant(
        name="report-warning-not-said",
        file="dist_subspace/report/run.py",
        text='status.get("message") or status.get("warning")',
        becomes='status.get("message")',
        promise="report says what is doubtful about a run that finished.",
        tests=["tests/report/test_run.py::test_who_was_at_fault_what_is_doubtful_and_where_the_adapter_lies_is_said"],
    ),
    Mutant(
        name="report-adapter-not-said",
        file="dist_subspace/report/run.py",
        text='[("adapter", str(run.adapter))] if run.adapter.is_dir() else []',
        becomes="[]",
        promise="report says where the adapter lies.",
        tests=["tests/report/test_run.py::test_who_was_at_fault_what_is_doubtful_and_where_the_adapter_lies_is_said"],
    ),
    Mutant(
        name="curve-rate-is-the-loss",
        file="dist_subspace/report/curve.py",
        text="_values(line.learning_rate for line in train)",
        becomes="_values(line.loss for line in train)",
        promise="loss.png draws the learning rate below the losses.",
        tests=[
            "tests/report/test_curve.py::test_losses_evaluations_and_rates_stand_at_their_steps_and_go_as_they_went"
        ],
    ),
    Mutant(
        name="curve-evaluations-at-training-steps",
        file="dist_subspace/report/curve.py",
        text="_values(line.step for line in evaluated)",
        becomes="_values(line.step for line in train[: len(evaluated)])",
        promise="loss.png draws an evaluation at its step.",
        tests=[
            "tests/report/test_curve.py::test_losses_evaluations_and_rates_stand_at_their_steps_and_go_as_they_went"
        ],
    ),
    Mutant(
        name="curve-against-line-numbers",
        file="dist_subspace/report/curve.py",
        text="steps, losses = _values(line.step for line in train), ",
        becomes="steps, losses = _values(range(len(train))), ",
        promise="loss.png draws a loss at its step, however far apart lines are.",
        tests=[
            "tests/report/test_curve.py::test_losses_evaluations_and_rates_stand_at_their_steps_and_go_as_they_went"
        ],
    ),
    Mutant(
        name="curve-spike-presses-it-flat",
        file="dist_subspace/report/curve.py",
        text="        axes.set_ylim(low - margin, shown.max() + margin)\n",
        becomes="        pass\n",
        promise="A spike does not press the curve flat.",
        tests=["tests/report/test_curve.py::test_a_spike_neither_presses_the_curve_flat_nor_lifts_its_mean"],
    ),
    Mutant(
        name="curve-mean-with-spikes",
        file="dist_subspace/report/curve.py",
        text="mean = smoothed(numpy.where(spikes(losses), numpy.nan, losses), 2 * half + 1)",
        becomes="mean = smoothed(losses, 2 * half + 1)",
        promise="A spike takes no part in the drawn mean.",
        tests=["tests/report/test_curve.py::test_a_spike_neither_presses_the_curve_flat_nor_lifts_its_mean"],
    ),
    Mutant(
        name="clock-days-dropped",
        file="dist_subspace/report/quantities.py",
        text='return f"{days} d {clock}" if days else clock',
        becomes="return clock",
        promise="A time of days says its days.",
        tests=["tests/report/test_quantities.py"],
    ),
    Mutant(
        name="clock-floors",
        file="dist_subspace/report/quantities.py",
        text="divmod(round(seconds), 60)",
        becomes="divmod(int(seconds), 60)",
        promise="A time is rounded to whole seconds.",
        tests=["tests/report/test_quantities.py"],
    ),
    Mutant(
        name="amount-small-shown-as-zero",
        file="dist_subspace/report/quantities.py",
        text="if 1e-3 <= abs(value) < 1e3 or value == 0",
        becomes="if abs(value) < 1e3",
        promise="A small loss keeps its digits.",
        tests=["tests/report/test_quantities.py"],
    ),
    Mutant(
        name="bytes-by-thousand",
        file="dist_subspace/report/quantities.py",
        text="size /= 1024",
        becomes="size /= 1000",
        promise="KiB, MiB and GiB are powers of 1024.",
        tests=["tests/report/test_quantities.py"],
    ),
    Mutant(
        name="penalty-not-shown",
        file="dist_subspace/report/quantities.py",
        text='    if record.penalty is not None:\n        parts.append(f"penalty {amount(record.penalty)}")\n',
        becomes="",
        promise="A step's line shows the constraint's penalty.",
        tests=["tests/report/test_quantities.py"],
    ),
    Mutant(
        name="inspect-alpha-is-the-rank",
        file="dist_subspace/report/adapter.py",
        text='ours.get("alpha", described.get("lora_alpha"))',
        becomes='ours.get("rank", described.get("lora_alpha"))',
        promise="inspect says alpha as it was given.",
        tests=[
            "tests/report/test_adapter.py::test_settings_are_said_as_they_were_given_and_a_constraint_where_the_method_has_its_own"
        ],
    ),
    Mutant(
        name="inspect-nonlinear-merges",
        file="dist_subspace/report/adapter.py",
        text='info.mergeable and constraint != "mpc_n" if info',
        becomes="info.mergeable if info",
        promise="inspect says that an adapter under mpc_n does not merge.",
        tests=[
            "tests/report/test_adapter.py::test_settings_are_said_as_they_were_given_and_a_constraint_where_the_method_has_its_own"
        ],
    ),
    Mutant(
        name="inspect-own-constraint-not-said",
        file="dist_subspace/report/adapter.py",
        text='ours.get("constraint") or (info.constraint if info else None)',
        becomes='ours.get("constraint")',
        promise="inspect says a method's own constraint where none was given.",
        tests=[
            "tests/report/test_adapter.py::test_settings_are_said_as_they_were_given_and_a_constraint_where_the_method_has_its_own"
        ],
    ),
    Mutant(
        name="inspect-most-for-least",
        file="dist_subspace/report/adapter.py",
        text="ranked[: -SHOWN // 2 - 1 : -1]",
        becomes="ranked[: SHOWN // 2]",
        promise="inspect lists the layers that moved least.",
        tests=["tests/report/test_adapter.py::test_of_many_layers_those_that_moved_most_and_least_are_listed"],
    ),
    Mutant(
        name="inspect-new-tokens-not-counted",
        file="dist_subspace/report/adapter.py",
        text='len(ours.get("new_tokens") or [])',
        becomes="0",
        promise="inspect counts the new tokens.",
        tests=[
            "tests/report/test_adapter.py::test_settings_are_said_as_they_were_given_and_a_constraint_where_the_method_has_its_own"
        ],
    ),
    Mutant(
        name="inspect-tokens-norm-of-the-other-side",
        file="dist_subspace/report/adapter.py",
        text=".float().norm(dim=1)]",
        becomes=".float().norm(dim=0)]",
        promise="inspect gives the norm of each virtual token.",
        tests=["tests/report/test_adapter.py::test_norms_are_of_the_trained_tensors_and_of_each_virtual_token"],
    ),
    Mutant(
        name="inspect-every-tensor-frozen-factors-too",
        file="dist_subspace/report/adapter.py",
        text="            if key not in factors\n",
        becomes="",
        promise="inspect lists norms of trained tensors alone.",
        tests=["tests/report/test_adapter.py::test_norms_are_of_the_trained_tensors_and_of_each_virtual_token"],
    ),
    Mutant(
        name="inspect-targets-of-the-configuration",
        file="dist_subspace/report/adapter.py",
        text='ours.get("target_modules") or',
        becomes="None or",
        promise="inspect says the targets that were given.",
        tests=[
            "tests/report/test_adapter.py::test_settings_are_said_as_they_were_given_and_a_constraint_where_the_method_has_its_own"
        ],
    ),
    Mutant(
        name="movement-ia3-of-peft-as-shift",
        file="dist_subspace/report/movement.py",
        text='[found["ia3_l"].float() - 1]',
        becomes='[found["ia3_l"].float()]',
        promise="Scales of PEFT's IA3 are measured from one.",
        tests=["tests/report/test_movement.py::test_scales_of_peft_are_measured_as_deviations_from_one"],
    ),
    Mutant(
        name="movement-houlsby-product-of-one",
        file="dist_subspace/report/movement.py",
        text='return of_product(layer, FACTORS, own["adapter_down"], own["adapter_up"])',
        becomes='return of_product(layer, FACTORS, own["adapter_down"], own["adapter_down"].t())',
        promise="A bottleneck's movement is the norm of up times down.",
        tests=["tests/report/test_movement.py::test_of_what_is_no_fixed_update_the_product_of_the_factors_is_measured"],
    ),
    Mutant(
        name="movement-factors-unscaled",
        file="dist_subspace/report/movement.py",
        text="part.scale * part.lora_B\n",
        becomes="part.lora_B\n",
        promise="The product of factors is scaled as the method scales it.",
        tests=["tests/report/test_movement.py::test_of_what_is_no_fixed_update_the_product_of_the_factors_is_measured"],
    ),
    Mutant(
        name="movement-core-forgotten",
        file="dist_subspace/report/movement.py",
        text="with_core_left(part.core(), part.lora_A.float())",
        becomes="part.lora_A.float()",
        promise="The product of factors has the core between them.",
        tests=["tests/report/test_movement.py::test_of_what_is_no_fixed_update_the_product_of_the_factors_is_measured"],
    ),
    Mutant(
        name="picture-sums-experts",
        file="dist_subspace/report/adapter_picture.py",
        text="sums / numpy.maximum(counts, 1)",
        becomes="sums",
        promise="A cell of the picture is the mean of its experts.",
        tests=[
            "tests/report/test_adapter.py::test_a_cell_of_the_picture_is_the_mean_of_its_layers_in_each_of_its_figures"
        ],
    ),
    Mutant(
        name="picture-draws-the-norm-twice",
        file="dist_subspace/report/adapter_picture.py",
        text="_grid(rows, kinds, depths, key)",
        becomes='_grid(rows, kinds, depths, "norm")',
        promise="The second panel of the picture is another figure than the norm.",
        tests=[
            "tests/report/test_adapter.py::test_a_cell_of_the_picture_is_the_mean_of_its_layers_in_each_of_its_figures"
        ],
    ),
    Mutant(
        name="tables-dropout-not-said",
        file="dist_subspace/report/tables.py",
        text='        ("dropout", "on the method\'s own branch" if info.uses_dropout else "none"),\n',
        becomes="",
        promise="The card of a method says whether it has dropout.",
        tests=["tests/report/test_tables.py::test_one_method_has_a_card"],
    ),
    Mutant(
        name="tables-alpha-of-one",
        file="dist_subspace/report/tables.py",
        text='{None: "", 1.0: "r"}',
        becomes='{None: "", 1.0: "2r"}',
        promise="The table says the default alpha of each method.",
        tests=["tests/report/test_tables.py::test_settings_and_constraints_are_shown_with_their_defaults"],
    ),
    Mutant(
        name="tables-json-identity",
        file="dist_subspace/report/tables.py",
        text='"identity_at_the_start": info.identity',
        becomes='"identity_at_the_start": info.mergeable',
        promise="`methods --json` says which methods begin as the identity.",
        tests=["tests/report/test_tables.py::test_json_holds_everything"],
    ),
    Mutant(
        name="tables-json-peft-type-lost",
        file="dist_subspace/report/tables.py",
        text='"peft_type": info.peft_type,',
        becomes='"peft_type": None,',
        promise="`methods --json` says which of PEFT's types reads the files.",
        tests=["tests/report/test_tables.py::test_json_holds_everything"],
    ),
    Mutant(
        name="tables-card-not-merging",
        file="dist_subspace/report/tables.py",
        text='("merges", _yes(info.mergeable)),\n',
        becomes='("merges", "yes"),\n',
        promise="The card of a method says whether it merges.",
        tests=["tests/report/test_tables.py::test_one_method_has_a_card"],
    ),
    Mutant(
        name="old-run-with-streaming-false-refused",
        file="dist_subspace/config/schema.py",
        text='        if data["streaming"] is not False:\n',
        becomes="        if data:\n",
        promise="config.yaml of a run of an earlier version has `data.streaming: false`, and is read.",
        tests=["tests/config/test_load.py::test_the_configuration_of_an_old_run_has_a_key_less_and_is_read"],
    ),
    Mutant(
        name="streaming-true-taken-for-false",
        file="dist_subspace/config/schema.py",
        text='        if data["streaming"] is not False:\n',
        becomes="        if not data:\n",
        promise="`data.streaming: true` is refused with what to do.",
        tests=["tests/config/test_load.py::test_streaming_is_refused_with_what_to_do"],
    ),
    Mutant(
        name="penalty-null-in-every-line",
        file="dist_subspace/run_folder/records.py",
        text='_LEFT_OUT_IF_NONE = ("penalty",)',
        becomes="_LEFT_OUT_IF_NONE = ()",
        promise="A line has a penalty only where the method has one.",
        tests=["tests/run_folder/test_metrics.py::test_lines_are_in_the_file_at_once_and_in_the_promised_order"],
    ),
    Mutant(
        name="speed-of-the-last-step-alone",
        file="dist_subspace/training/observer.py",
        text="sum(step.own_seconds for step in steps)",
        becomes="last.own_seconds",
        promise="The speed of a line is over all steps since the line before.",
        tests=["tests/training/test_observer.py"],
    ),
    Mutant(
        name="path-of-a-run-named-elsewhere",
        file="dist_subspace/training/progress.py",
        text="    return plan.run_dir.checkpoint(step)",
        becomes='    return plan.run_dir.path / f"checkpoint-{step}"',
        promise="What is in a run's folder has its name in one file.",
        tests=["tests/run_folder/test_folder.py::test_no_other_file_names_what_is_in_a_run[training/progress.py]"],
    ),
]
