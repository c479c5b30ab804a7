"""Breakages of what is promised of files: whole or absent, on disk before it is said, checked when it is read."""

from tests.mutants.mutant import Mutant

POWER = "tests/test_power_loss.py::"
TORN = f"{POWER}test_what_is_under_its_name_is_on_disk_to_the_last_byte"
CHECKPOINTS = f"{POWER}test_every_checkpoint_is_whole_and_none_that_was_said_to_be_saved_is_lost"
AGAIN = f"{POWER}test_a_checkpoint_that_is_written_again_or_deleted_is_the_old_one_or_the_new_one"
INSTEAD = f"{POWER}test_a_folder_in_the_place_of_another_is_the_old_one_or_the_new_one"
FINISHED = f"{POWER}test_a_run_that_has_finished_has_its_adapter_and_an_adapter_is_whole"
LINES = f"{POWER}test_the_configuration_and_the_lines_of_every_saved_step_are_there"
ASIDE = f"{POWER}test_what_is_set_aside_is_whole_under_its_old_name_or_its_new_one"
STORES = f"{POWER}test_a_store_of_tokens_or_factors_is_whole_or_absent"
MADE = f"{POWER}test_what_is_made_of_an_adapter_is_whole_or_absent_and_there_once_it_is_said"

MUTANTS = [
    Mutant(
        name="text-renamed-before-its-bytes-are-on-disk",
        file="dist_subspace/atomic_files.py",
        text="            handle.flush()\n            os.fsync(handle.fileno())\n",
        becomes="            handle.flush()\n",
        promise="A text (status.json, config.yaml, a manifest) is on disk before it has its name.",
        tests=[TORN],
    ),
    Mutant(
        name="name-of-a-text-not-synced",
        file="dist_subspace/atomic_files.py",
        text="        os.replace(partial, target)\n        sync(target.parent)\n",
        becomes="        os.replace(partial, target)\n",
        promise="A text that was written is found under its name after a crash.",
        tests=[AGAIN],
    ),
    Mutant(
        name="sync-syncs-nothing",
        file="dist_subspace/atomic_files.py",
        text="        os.fsync(descriptor)\n",
        becomes="        pass\n",
        promise="Files and folders are synced.",
        tests=[AGAIN],
    ),
    Mutant(
        name="name-of-a-new-folder-not-synced",
        file="dist_subspace/atomic_files.py",
        text="    for path in made:\n        sync(path.parent)\n",
        becomes="",
        promise="A run's folder that is new is still there after a crash.",
        tests=[AGAIN],
    ),
    Mutant(
        name="published-files-not-synced",
        file="dist_subspace/atomic_files.py",
        text="            sync(path)\n        sync(hidden)\n",
        becomes="        sync(hidden)\n",
        promise="Everything in a folder is on disk before the folder has its name.",
        tests=[INSTEAD],
    ),
    Mutant(
        name="published-names-not-synced",
        file="dist_subspace/atomic_files.py",
        text="            sync(path)\n        sync(hidden)\n",
        becomes="            sync(path)\n",
        promise="The names in a folder are on disk before the folder has its own.",
        tests=[INSTEAD],
    ),
    Mutant(
        name="name-of-a-published-folder-not-synced",
        file="dist_subspace/atomic_files.py",
        text="        os.rename(hidden, target)\n        sync(target.absolute().parent)\n",
        becomes="        os.rename(hidden, target)\n",
        promise="A folder that was said to be written is there after a crash.",
        tests=[INSTEAD],
    ),
    Mutant(
        name="old-folder-removed-before-the-new-one-has-its-name",
        file="dist_subspace/atomic_files.py",
        text="                os.rename(target, aside)\n",
        becomes="                shutil.rmtree(target)\n",
        promise="Until a new folder has its name the old one is whole.",
        tests=[INSTEAD],
    ),
    Mutant(
        name="checkpoint-files-not-synced",
        file="dist_subspace/run_folder/manifest.py",
        text="    for path in files:\n        sync(path)\n",
        becomes="",
        promise="A manifest vouches for bytes that are on disk.",
        tests=[AGAIN],
    ),
    Mutant(
        name="folders-in-a-checkpoint-not-synced",
        file="dist_subspace/run_folder/manifest.py",
        text='    for path in folder.rglob("*"):\n        if path.is_dir():\n            sync(path)\n',
        becomes="",
        promise="The names in a checkpoint's folders are on disk before its manifest is.",
        tests=[AGAIN],
    ),
    Mutant(
        name="name-of-a-checkpoint-not-synced",
        file="dist_subspace/checkpoint/store.py",
        text="    os.rename(partial, final)\n    sync(final.parent)\n",
        becomes="    os.rename(partial, final)\n",
        promise="A checkpoint that was said to be saved is found after a crash.",
        tests=[AGAIN],
    ),
    Mutant(
        name="former-checkpoint-removed-before-the-new-one-has-its-name",
        file="dist_subspace/checkpoint/store.py",
        text="        os.rename(final, aside)\n    os.rename(partial, final)\n",
        becomes="        shutil.rmtree(final)\n    os.rename(partial, final)\n",
        promise="A checkpoint that is written again is the old one or the new one at any moment.",
        tests=[AGAIN],
    ),
    Mutant(
        name="checkpoint-deleted-under-its-name",
        file="dist_subspace/checkpoint/store.py",
        text="        os.rename(path, hidden)\n        sync(run.path)\n        path = hidden\n",
        becomes="",
        promise="A crash while a checkpoint is deleted leaves none that looks damaged.",
        tests=[AGAIN],
    ),
    Mutant(
        name="hidden-name-of-a-deleted-checkpoint-not-synced",
        file="dist_subspace/checkpoint/store.py",
        text="        os.rename(path, hidden)\n        sync(run.path)\n",
        becomes="        os.rename(path, hidden)\n",
        promise="A deleted checkpoint's hidden name is on disk before anything in it is gone.",
        tests=[AGAIN],
    ),
    Mutant(
        name="older-checkpoints-purged-before-the-newer-is-written",
        file="dist_subspace/training/trainer.py",
        text="""        folder = save_checkpoint(
            self.plan.run_dir, self.model, self.engine, state, self._base_name(), self.observer.sync
        )
        keep = [self.plan.run_dir.checkpoint(progress.best["step"])] if progress.best else []
        on_main(purge, self.plan.run_dir, self.config.checkpoint.save_total_limit, keep)
""",
        becomes="""        keep = [self.plan.run_dir.checkpoint(progress.best["step"])] if progress.best else []
        on_main(purge, self.plan.run_dir, self.config.checkpoint.save_total_limit, keep)
        folder = save_checkpoint(
            self.plan.run_dir, self.model, self.engine, state, self._base_name(), self.observer.sync
        )
""",
        promise="After a save there are save_total_limit checkpoints, and before it none of them is gone.",
        tests=[CHECKPOINTS],
    ),
    Mutant(
        name="lines-of-saved-steps-not-synced",
        file="dist_subspace/training/trainer.py",
        text="self._base_name(), self.observer.sync\n",
        becomes="self._base_name()\n",
        promise="The lines of the steps of a checkpoint are on disk before the checkpoint is.",
        tests=[LINES],
    ),
    Mutant(
        name="finished-said-before-the-adapter-is-there",
        file="dist_subspace/training/run.py",
        text="""    on_main(write_results, plan, progress, observer, warning)
    status.write("finished", step=progress.step, warning=warning, skipped=progress.not_applied)
""",
        becomes="""    status.write("finished", step=progress.step, warning=warning, skipped=progress.not_applied)
    on_main(write_results, plan, progress, observer, warning)
""",
        promise="A run whose status says finished has its adapter.",
        tests=[FINISHED],
    ),
    Mutant(
        name="configuration-written-in-place",
        file="dist_subspace/training/run.py",
        text="write_text_atomic(plan.run_dir.config, dump_config(plan.config))",
        becomes="plan.run_dir.config.write_text(dump_config(plan.config))",
        promise="RUN/config.yaml is the old text or the new one.",
        tests=[TORN],
    ),
    Mutant(
        name="adapter-files-not-synced",
        file="dist_subspace/interchange/adapter.py",
        text="        for partial in partials.values():\n            sync(partial)\n",
        becomes="",
        promise="A saved adapter's files are on disk before they have their names.",
        tests=[TORN],
    ),
    Mutant(
        name="tokenizer-beside-a-saved-adapter-not-synced",
        file="dist_subspace/interchange/adapter.py",
        text='            for path in beside.rglob("*"):\n                sync(path)\n',
        becomes="",
        promise="The tokenizer beside a saved adapter is on disk before it has its names.",
        tests=[TORN],
    ),
    Mutant(
        name="adapter-configuration-before-its-weights",
        file="dist_subspace/interchange/adapter.py",
        text="        for name, partial in partials.items():\n            if name == CONFIG:",
        becomes="        for name, partial in reversed(partials.items()):\n            if name == CONFIG:",
        promise="A folder with an adapter's configuration is a folder with its weights.",
        tests=[f"{MADE}[saved]"],
    ),
    Mutant(
        name="names-of-a-saved-adapter-not-synced",
        file="dist_subspace/interchange/adapter.py",
        text="            os.replace(partial, folder / name)\n        sync(folder)\n",
        becomes="            os.replace(partial, folder / name)\n",
        promise="An adapter that save_adapter has written is there after a crash.",
        tests=[f"{MADE}[saved]"],
    ),
    Mutant(
        name="merged-folder-renamed-without-syncs",
        file="dist_subspace/interchange/merge.py",
        text="        publish_folder(hidden, target)\n",
        becomes="        hidden.rename(target)\n",
        promise="A merged model is on disk before it has its name, and its name before merge returns.",
        tests=[f"{MADE}[merged]"],
    ),
    Mutant(
        name="exported-folder-written-in-place",
        file="dist_subspace/interchange/peft/export.py",
        text="    with whole_folder(wish.out, size) as folder:\n",
        becomes="    for folder in [wish.out]:\n        folder.mkdir(parents=True)\n",
        promise="An exported adapter appears whole or not at all.",
        tests=[f"{MADE}[exported]"],
    ),
    Mutant(
        name="factor-files-not-synced",
        file="dist_subspace/statistics/cache.py",
        text="            sync(partial)\n",
        becomes="",
        promise="A factor file is on disk before it has its name.",
        tests=[STORES],
    ),
    Mutant(
        name="names-of-factor-files-not-synced",
        file="dist_subspace/statistics/cache.py",
        text="            sync(self.folder)",
        becomes="            pass",
        promise="The factors that a saved checkpoint needs are there after a crash.",
        tests=[STORES],
    ),
    Mutant(
        name="stored-tokens-not-synced",
        file="dist_subspace/training/data/store.py",
        text="        for path in (*hidden.iterdir(), hidden):\n            sync(path)\n",
        becomes="",
        promise="A store of tokens is on disk before it has its name.",
        tests=[STORES],
    ),
    Mutant(
        name="folder-of-what-is-set-aside-not-synced",
        file="dist_subspace/checkpoint/set_aside.py",
        text="            sync(run.path)  # what is moved into it is lost without its name\n",
        becomes="",
        promise="A folder is on disk before checkpoints are moved into it.",
        tests=[ASIDE],
    ),
    Mutant(
        name="copies-of-what-is-set-aside-not-synced",
        file="dist_subspace/checkpoint/set_aside.py",
        text="                sync(folder / path.name)\n",
        becomes="",
        promise="The configuration and the curve beside set-aside checkpoints are on disk.",
        tests=[TORN],
    ),
    Mutant(
        name="names-of-what-is-set-aside-not-synced",
        file="dist_subspace/checkpoint/set_aside.py",
        text="        sync(folder)\n        sync(run.path)\n",
        becomes="        sync(run.path)\n",
        promise="What is said to be set aside is there after a crash.",
        tests=[ASIDE],
    ),
    Mutant(
        name="curve-rewritten-in-place-on-resume",
        file="dist_subspace/run_folder/metrics.py",
        text='write_text_atomic(path, "".join(_text(line) for line in kept))',
        becomes='path.write_text("".join(_text(line) for line in kept))',
        promise="A run that goes on loses no line of the steps before it.",
        tests=[LINES],
    ),
    Mutant(
        name="status-written-in-place",
        file="dist_subspace/run_folder/status.py",
        text='write_json_atomic(file, known | more, writer=".heartbeat" if "heartbeat" in more else "")',
        becomes="file.write_text(json.dumps(known | more))",
        promise="RUN/status.json is whole at any moment.",
        tests=[TORN],
    ),
    Mutant(
        name="adapter-of-a-run-written-in-place",
        file="dist_subspace/training/results.py",
        text="    with whole_folder(folder, replace=True) as hidden:",
        becomes="    for hidden in [folder]:",
        promise="RUN/adapter appears whole or not at all.",
        tests=[FINISHED],
    ),
    Mutant(
        name="rewritten-adapter-in-place",
        file="dist_subspace/interchange/peft/importing.py",
        text="    with whole_folder(Path(out)) as hidden:",
        becomes="    for hidden in [Path(out)]:",
        promise="An imported adapter appears whole or not at all.",
        tests=[f"{MADE}[rewritten]"],
    ),
    Mutant(
        name="imported-adapter-in-place",
        file="dist_subspace/api.py",
        text="    with whole_folder(Path(out)) as hidden:",
        becomes="    for hidden in [Path(out)]:",
        promise="An adapter that is imported on its base appears whole or not at all.",
        tests=[f"{MADE}[imported]"],
    ),
]
