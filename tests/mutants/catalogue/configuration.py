"""Reading the configuration: YAML, overrides, values."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LOAD, YAML_TEXT, FIELDS, SCHEMA = (
    f"dist_subspace/config/{name}.py" for name in ("load", "yaml_text", "fields", "schema")
)
TESTS = "tests/config/test_load.py"

MUTANTS = [
    Mutant(
        name="last-override-loses",
        file="dist_subspace/config/load.py",
        text="    for override in overrides:\n",
        becomes="    for override in reversed(overrides):\n",
        promise="Of two overrides of one key the later one wins.",
        tests=[f"{TESTS}::test_overrides_are_yaml_and_the_last_one_wins"],
    ),
    Mutant(
        name="override-leaves-the-other-of-a-pair",
        file="dist_subspace/config/load.py",
        text="        node.pop(other, None)\n",
        becomes="        pass\n",
        promise="An override of max_steps takes the file's num_train_epochs away.",
        tests=[f"{TESTS}::test_an_override_of_steps_takes_the_files_epochs_away"],
    ),
    Mutant(
        name="override-is-text",
        file="dist_subspace/config/load.py",
        text='    node[last] = parse(text, f"override {override!r}")',
        becomes="    node[last] = text",
        promise="The value of an override is YAML.",
        tests=[f"{TESTS}::test_overrides_are_yaml_and_the_last_one_wins"],
    ),
    Mutant(
        name="mapping-is-changed",
        file="dist_subspace/config/load.py",
        text="copy.deepcopy(dict(source))",
        becomes="dict(source)",
        promise="A mapping given to load_config stays as it was.",
        tests=[f"{TESTS}::test_a_mapping_is_not_changed"],
    ),
    Mutant(
        name="given-keys-are-filled",
        file="dist_subspace/config/load.py",
        text="        if key not in getattr(config, section).model_fields_set:\n",
        becomes="        if True:\n",
        promise="A stock DeepSpeed file fills only keys that the user left open.",
        tests=[f"{TESTS}::test_only_keys_left_open_are_filled"],
    ),
    Mutant(
        name="exponent-is-text",
        file="dist_subspace/config/yaml_text.py",
        text="| [0-9][0-9_]*[eE][-+]?[0-9]+ |",
        becomes="|",
        promise="2e-4 is a number.",
        tests=[f"{TESTS}::test_a_file_gives_the_run_its_folder"],
    ),
    Mutant(
        name="clock-is-a-number-to-base-60",
        file="dist_subspace/config/yaml_text.py",
        text="(?:0|[1-9][0-9_]*)|0x",
        becomes="(?:0|[1-9][0-9_]*(?::[0-5]?[0-9])*)|0x",
        promise="10:30:00 is text.",
        tests=[f"{TESTS}::test_a_value_that_yaml_1_1_misreads_is_what_a_person_meant"],
    ),
    Mutant(
        name="key-given-twice",
        file="dist_subspace/config/yaml_text.py",
        text='            if name in seen and name != "<<":\n',
        becomes='            if name in seen and name == "<<":\n',
        promise="A key given twice is refused, not overwritten.",
        tests=[f"{TESTS}::test_a_key_given_twice_is_refused"],
    ),
    Mutant(
        name="minutes-are-seconds",
        file="dist_subspace/config/fields.py",
        text="hours * 3600 + minutes * 60 + seconds",
        becomes="hours * 3600 + minutes + seconds",
        promise="training.max_time reads hh:mm:ss.",
        tests=["tests/config/test_schema.py"],
    ),
    Mutant(
        name="unknown-keys-are-ignored",
        file="dist_subspace/config/fields.py",
        text='extra="forbid"',
        becomes='extra="ignore"',
        promise="A misspelt key is an error.",
        tests=["tests/config/test_schema.py"],
    ),
    Mutant(
        name="batch-need-not-divide",
        file="dist_subspace/config/schema.py",
        text="self.global_batch_size % self.per_device_train_batch_size:",
        becomes="self.global_batch_size < self.per_device_train_batch_size:",
        promise="global_batch_size is a multiple of the micro-batch.",
        tests=["tests/config/test_schema.py"],
    ),
    Mutant(
        name="no-means-auto",
        file="dist_subspace/config/fields.py",
        text='return "none" if value is None or value is False else value',
        becomes='return "none" if value is None else value or "auto"',
        promise="checkpoint.resume: no starts anew.",
        tests=["tests/config/test_schema.py"],
    ),
]
