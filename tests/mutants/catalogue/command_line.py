"""Every option of the command line, its exit status, and whose words are heard."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="merge-ignores-base",
        file="dist_subspace/cli.py",
        text="write(model, out, base, dtype=dtype",
        becomes="write(model, out, dtype=dtype",
        promise="merge --base says what the update is merged into.",
        tests=["tests/interchange/test_commands.py::test_merge_takes_another_base_type_and_place"],
    ),
    Mutant(
        name="merge-ignores-dtype",
        file="dist_subspace/cli.py",
        text="write(model, out, base, dtype=dtype, ",
        becomes="write(model, out, base, ",
        promise="merge --dtype is the type of the written weights.",
        tests=["tests/interchange/test_commands.py::test_merge_takes_another_base_type_and_place"],
    ),
    Mutant(
        name="merge-opens-the-adapter-again",
        file="dist_subspace/cli.py",
        text="load_adapted(opened, base_model, storage)",
        becomes="load_adapted(opened.path, base_model, storage)",
        promise="A merge opens each file of the adapter once.",
        tests=["tests/interchange/test_adapter_folder.py::test_a_merge_opens_each_file_of_the_adapter_once[lora]"],
    ),
    Mutant(
        name="merge-ignores-storage",
        file="dist_subspace/cli.py",
        text="load_adapted(opened, base_model, storage)",
        becomes="load_adapted(opened, base_model)",
        promise="merge --storage says how the base is held.",
        tests=["tests/test_cli.py::test_merge_holds_the_base_as_it_is_told"],
    ),
    Mutant(
        name="merge-ignores-base-model",
        file="dist_subspace/cli.py",
        text="load_adapted(opened, base_model, storage)",
        becomes="load_adapted(opened, None, storage)",
        promise="merge --base-model names the base.",
        tests=["tests/interchange/test_commands.py::test_merge_takes_another_base_type_and_place"],
    ),
    Mutant(
        name="merge-ignores-json",
        file="dist_subspace/cli.py",
        text="opened.tokenizer(), report=None)\n    print(json.dumps(made.as_dict(), indent=2) if as_json else made)",
        becomes="opened.tokenizer(), report=None)\n    print(made)",
        promise="merge --json prints JSON.",
        tests=["tests/interchange/test_commands.py::test_merge_takes_another_base_type_and_place"],
    ),
    Mutant(
        name="merge-without-tokenizer",
        file="dist_subspace/cli.py",
        text="tokenizer=opened.tokenizer(), ",
        becomes="",
        promise="The adapter's tokenizer goes with the merged model.",
        tests=["tests/interchange/test_commands.py::test_merge_takes_another_base_type_and_place"],
    ),
    Mutant(
        name="merge-refuses-after-loading",
        file="dist_subspace/cli.py",
        text="    refuse_unmergeable(resolved.info, resolved.settings)\n",
        becomes="",
        promise="A method that does not merge is refused before its base is looked for.",
        tests=["tests/interchange/test_commands.py::test_what_is_refused_is_one_sentence_and_status_2"],
    ),
    Mutant(
        name="merge-killed-by-a-termination",
        file="dist_subspace/cli.py",
        text="    _leave_on_termination()\n    opened",
        becomes="    opened",
        promise="A merge that is terminated clears up.",
        tests=["tests/interchange/test_commands.py::test_a_terminated_merge_leaves_nothing"],
    ),
    Mutant(
        name="export-ignores-form",
        file="dist_subspace/cli.py",
        text="export_peft(source, out, form, for_class",
        becomes="export_peft(source, out, for_class",
        promise="export --form says which form.",
        tests=["tests/interchange/peft/test_forms.py::test_the_command_writes_the_form_that_it_is_asked_for"],
    ),
    Mutant(
        name="export-ignores-approximate-rank",
        file="dist_subspace/cli.py",
        text="approximate_rank=approximate_rank, ",
        becomes="",
        promise="export --approximate-rank asks for an approximation.",
        tests=[
            "tests/interchange/test_commands.py::test_export_measures_an_approximation_on_the_base_that_it_is_given"
        ],
    ),
    Mutant(
        name="export-ignores-for-class",
        file="dist_subspace/cli.py",
        text="for_class=for_class, ",
        becomes="",
        promise="export --for-class says whose module names are written.",
        tests=["tests/test_cli.py::test_export_names_modules_for_the_class_that_it_is_told"],
    ),
    Mutant(
        name="export-ignores-base-model",
        file="dist_subspace/cli.py",
        text="source = folder if base_model is None else load_adapted(folder, base_model)",
        becomes="source = folder",
        promise="export --base-model names the base that an approximation is measured on.",
        tests=[
            "tests/interchange/test_commands.py::test_export_measures_an_approximation_on_the_base_that_it_is_given"
        ],
    ),
    Mutant(
        name="export-ignores-json",
        file="dist_subspace/cli.py",
        text='print(json.dumps(made.as_dict(), indent=2) if as_json else made)\n\n\n@command("import"',
        becomes='print(made)\n\n\n@command("import"',
        promise="export --json prints JSON.",
        tests=["tests/test_cli.py::test_export_prints_json_and_makes_the_rank_that_it_is_asked_for"],
    ),
    Mutant(
        name="import-ignores-base-model",
        file="dist_subspace/cli.py",
        text="    if base_model is None:\n        imported",
        becomes="    if True:\n        imported",
        promise="import --base-model names the base that the start is made from.",
        tests=["tests/interchange/test_commands.py::test_import_asks_for_the_base_where_the_start_is_made_from_it"],
    ),
    Mutant(
        name="import-forgets-the-base",
        file="dist_subspace/cli.py",
        text="rewrite_peft(source, out, base_fingerprint)",
        becomes="rewrite_peft(source, out)",
        promise="An imported adapter knows its base's fingerprint.",
        tests=["tests/test_cli.py::test_an_imported_adapter_knows_its_base_and_takes_no_other_in_its_place"],
    ),
    Mutant(
        name="methods-ignores-name",
        file="dist_subspace/cli.py",
        text="registered() if name is None else {name: method_class(name).info}",
        becomes="registered()",
        promise="methods NAME says everything of one.",
        tests=["tests/report/test_tables.py::test_an_unknown_method_is_refused_with_the_nearest"],
    ),
    Mutant(
        name="methods-ignores-json",
        file="dist_subspace/cli.py",
        text="    if as_json:\n        print(json.dumps(methods_table",
        becomes="    if False:\n        print(json.dumps(methods_table",
        promise="methods --json prints JSON.",
        tests=["tests/report/test_tables.py::test_json_holds_everything"],
    ),
    Mutant(
        name="inspect-ignores-json",
        file="dist_subspace/cli.py",
        text="print(json.dumps(report, indent=2)) if as_json else print(adapter_text(report))",
        becomes="print(adapter_text(report))",
        promise="inspect --json prints JSON.",
        tests=["tests/report/test_adapter.py::test_it_says_what_the_adapter_is"],
    ),
    Mutant(
        name="inspect-ignores-picture",
        file="dist_subspace/cli.py",
        text="    if picture is not None:\n",
        becomes="    if False:\n",
        promise="inspect --picture draws.",
        tests=["tests/report/test_adapter.py::test_the_picture_is_drawn_only_where_it_was_asked_for[lora]"],
    ),
    Mutant(
        name="inspect-picture-among-the-json",
        file="dist_subspace/cli.py",
        text="file=sys.stderr if as_json else sys.stdout",
        becomes="file=sys.stdout",
        promise="inspect --json prints JSON alone.",
        tests=["tests/test_cli.py::test_inspect_prints_nothing_beside_the_json_and_draws_where_it_is_asked"],
    ),
    Mutant(
        name="train-ignores-overrides",
        file="dist_subspace/cli.py",
        text="run(config, overrides or [], logs=True",
        becomes="run(config, [], logs=True",
        promise="KEY=VALUE changes the configuration of train.",
        tests=[
            "tests/test_cli.py::test_train_takes_changes_and_leaves_with_the_runs_status_and_the_final_adapter_is_what_a_run_is"
        ],
    ),
    Mutant(
        name="train-always-succeeds",
        file="dist_subspace/cli.py",
        text="raise typer.Exit(status)",
        becomes="raise typer.Exit(0)",
        promise="train leaves with the status of its run.",
        tests=[
            "tests/test_cli.py::test_train_takes_changes_and_leaves_with_the_runs_status_and_the_final_adapter_is_what_a_run_is"
        ],
    ),
    Mutant(
        name="refusals-have-status-1",
        file="dist_subspace/cli.py",
        text='        print(f"error: {error}", file=sys.stderr)\n        return 2',
        becomes='        print(f"error: {error}", file=sys.stderr)\n        return 1',
        promise="What is refused has the exit status 2.",
        tests=["tests/interchange/test_commands.py::test_merge_takes_another_base_type_and_place"],
    ),
    Mutant(
        name="storage-errors-have-status-2",
        file="dist_subspace/cli.py",
        text='        print(f"error: {error}", file=sys.stderr)\n        return 1',
        becomes='        print(f"error: {error}", file=sys.stderr)\n        return 2',
        promise="What the disk refuses has the exit status 1.",
        tests=["tests/test_cli.py::test_what_the_disk_refuses_is_one_sentence_and_status_1"],
    ),
    Mutant(
        name="run-directory-gives-the-newest-checkpoint",
        file="dist_subspace/adapted/source.py",
        text="    if (inner / CONFIG).exists():\n        return inner\n",
        becomes="",
        promise="Of a run's directory its final adapter is meant.",
        tests=[
            "tests/test_cli.py::test_train_takes_changes_and_leaves_with_the_runs_status_and_the_final_adapter_is_what_a_run_is"
        ],
    ),
    Mutant(
        name="run-directory-without-checkpoints",
        file="dist_subspace/adapted/source.py",
        text="newest = newest_whole(folder, report=lambda sentence: print(sentence, file=sys.stderr))",
        becomes="newest = None",
        promise="Of a run that has no adapter yet the newest checkpoint is meant.",
        tests=[
            "tests/test_cli.py::test_train_takes_changes_and_leaves_with_the_runs_status_and_the_final_adapter_is_what_a_run_is"
        ],
    ),
    Mutant(
        name="notices-with-the-place-in-the-code",
        file="dist_subspace/cli.py",
        text="if issubclass(category, Notice):",
        becomes="if False:",
        promise="A notice is one line.",
        tests=[
            "tests/interchange/test_commands.py::test_what_loading_the_base_has_to_say_is_one_line_of_standard_error"
        ],
    ),
    Mutant(
        name="first-by-openmpi-unknown",
        file="dist_subspace/launchers.py",
        text='("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", *step)',
        becomes='("RANK", "PMI_RANK", *step)',
        promise="Under Open MPI rank 0 alone speaks before there is a process group.",
        tests=["tests/test_cli.py::test_rank_0_is_known_by_the_launchers_environment[variables4-False]"],
    ),
]
