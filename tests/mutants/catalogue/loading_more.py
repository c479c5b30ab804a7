"""Loading and configuration once more: what a run gets where every step ends well."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LOAD_TESTS = "tests/loading"
CONFIG_TESTS = "tests/config"
CONVERSIONS = "tests/loading/test_conversions.py"

MUTANTS = [
    Mutant(
        name="heads-of-t5-packed",
        file="dist_subspace/families/heads.py",
        text='CLASSIFICATION_HEADS = (*CLASSIFIERS, "classification_head")',
        becomes="CLASSIFICATION_HEADS = CLASSIFIERS",
        promise="classification_head is a head too.",
        tests=[
            f"{LOAD_TESTS}/test_stays_dense.py::test_a_classification_head_that_the_checkpoint_has_keeps_every_value[T5ForSequenceClassification]"
        ],
    ),
    Mutant(
        name="mtp-layers-refused",
        file="dist_subspace/families/configuration.py",
        text='("num_nextn_predict_layers", "mtp_num_hidden_layers")',
        becomes='("num_nextn_predict_layers",)',
        promise="Layers that the configuration names by mtp_num_hidden_layers are left out, as transformers does.",
        tests=[
            f"{LOAD_TESTS}/test_unused.py::test_layers_that_a_familys_list_or_its_configuration_leaves_out_are_not_refused"
        ],
    ),
    Mutant(
        name="fsdp-names-not-known",
        file="dist_subspace/loading/unused.py",
        text='    "_fsdp_wrapped_module",\n',
        becomes="",
        promise="A wrapper's names are said to be a wrapper's.",
        tests=[f"{LOAD_TESTS}/test_unused.py::test_a_tensor_that_changes_what_a_module_computes_is_refused[FSDP]"],
    ),
    Mutant(
        name="adapter-names-vera",
        file="dist_subspace/loading/unused.py",
        text="|vera_\\w+|",
        becomes="|",
        promise="Parts of an adapter are refused as such, and not called a model's own.",
        tests=[f"{LOAD_TESTS}/test_unused.py::test_a_tensor_that_changes_what_a_module_computes_is_refused[VeRA]"],
    ),
    Mutant(
        name="gptq-not-known",
        file="dist_subspace/loading/unused.py",
        text="|zero_point|qweight|qzeros|",
        becomes="|zero_point|",
        promise="Codes of GPTQ are refused as quantised weights.",
        tests=[f"{LOAD_TESTS}/test_unused.py::test_a_tensor_that_changes_what_a_module_computes_is_refused[GPTQ]"],
    ),
    Mutant(
        name="ratio-of-one-accepted",
        file="dist_subspace/config/schema.py",
        text="or not 0 <= ratio < 1:",
        becomes="or not 0 <= ratio <= 1:",
        promise="A warmup_ratio of 1 is refused: as warmup_steps it would be one step.",
        tests=[f"{CONFIG_TESTS}/test_schema.py::test_warmup_ratio_becomes_warmup_steps_and_both_are_refused"],
    ),
    Mutant(
        name="nvme-without-config-refused",
        file="dist_subspace/config/schema.py",
        text='self.preset == "zero3-nvme" and self.config is None and',
        becomes='self.preset == "zero3-nvme" and',
        promise="A DeepSpeed configuration of one's own needs no nvme_path beside it.",
        tests=[f"{CONFIG_TESTS}/test_schema.py::test_nvme_needs_a_folder"],
    ),
    Mutant(
        name="infinite-rate-accepted",
        file="dist_subspace/config/fields.py",
        text="allow_inf_nan=False",
        becomes="allow_inf_nan=True",
        promise="A number of the configuration is finite.",
        tests=[f"{CONFIG_TESTS}/test_schema.py::test_a_wrong_type_or_range_names_field_value_and_accepted"],
    ),
    Mutant(
        name="duplicates-compared-at-their-beginning",
        file="dist_subspace/loading/index.py",
        text="for start in range(first, last, rows)",
        becomes="for start in range(first, min(first + rows, last), rows)",
        promise="Two tensors for one parameter are the same only if every row is.",
        tests=[f"{LOAD_TESTS}/test_index.py::test_two_tensors_are_the_same_only_if_every_row_is"],
    ),
    Mutant(
        name="experts-in-the-order-of-text",
        file="dist_subspace/loading/transformers_internals.py",
        text="for key in sorted(keys, key=dot_natural_key):",
        becomes="for key in sorted(keys):",
        promise="Expert 10 is stacked behind expert 9, and not behind expert 1.",
        tests=[f"{CONVERSIONS}::test_every_parameter_is_what_transformers_makes_of_the_file[experts one by one-fp32]"],
    ),
    Mutant(
        name="stored-buffers-not-read",
        file="dist_subspace/loading/stream.py",
        text="value = self.sources.read(self.model, name) if self.sources.has(name) else buffer\n",
        becomes="value = buffer\n",
        promise="A buffer that the checkpoint holds (a router's correction) is read.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_every_tensor_has_the_type_and_the_values_that_transformers_gives_it[deepseek-bf16]"
        ],
    ),
    Mutant(
        name="stored-buffers-lose-their-type",
        file="dist_subspace/loading/stream.py",
        text="kind = self.kept_type(name) if self.sources.has(name) else None",
        becomes="kind = None",
        promise="A stored buffer has the type that transformers keeps it in.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_every_tensor_has_the_type_and_the_values_that_transformers_gives_it[deepseek-bf16]"
        ],
    ),
    Mutant(
        name="heads-of-several-layers-packed",
        file="dist_subspace/loading/stays_dense.py",
        text="    if is_inside_classification_head(name):\n        return True\n",
        becomes="",
        promise="A stored head of several layers is as dense as one of a single layer.",
        tests=[
            f"{LOAD_TESTS}/test_stays_dense.py::test_a_classification_head_that_the_checkpoint_has_keeps_every_value[RobertaForSequenceClassification]"
        ],
    ),
    Mutant(
        name="pre-classifier-is-packed",
        file="dist_subspace/families/heads.py",
        text=', "pre_classifier")',
        becomes=")",
        promise="The layer before a classifier is part of the head.",
        tests=[
            f"{LOAD_TESTS}/test_stays_dense.py::test_a_classification_head_that_the_checkpoint_has_keeps_every_value[DistilBertForSequenceClassification]"
        ],
    ),
    Mutant(
        name="overflow-of-norms-unseen",
        file="dist_subspace/loading/stream.py",
        text="value = watch(self._whole(name, old))",
        becomes="value = self._whole(name, old)",
        promise="A value that float16 cannot hold is refused in every parameter.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_one_value_beyond_float16_of_any_sign_in_any_part_is_refused[embed_tokens-torch.float32]"
        ],
    ),
    Mutant(
        name="double-overflows-unseen",
        file="dist_subspace/loading/float16.py",
        text="WIDER = (torch.float32, torch.bfloat16, torch.float64)",
        becomes="WIDER = (torch.float32, torch.bfloat16)",
        promise="A float64 value that float16 cannot hold is refused.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_one_value_beyond_float16_of_any_sign_in_any_part_is_refused[embed_tokens-torch.float64]"
        ],
    ),
    Mutant(
        name="overflow-only-of-positive-values",
        file="dist_subspace/loading/float16.py",
        text="magnitudes = values.abs()",
        becomes="magnitudes = values",
        promise="A negative value that float16 cannot hold is refused.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_one_value_beyond_float16_of_any_sign_in_any_part_is_refused[up_proj-torch.float32]"
        ],
    ),
    Mutant(
        name="warmup-steps-override-keeps-ratio",
        file="dist_subspace/config/load.py",
        text='    "training.warmup_steps": "warmup_ratio",\n',
        becomes="",
        promise="An override of warmup_steps takes the file's warmup_ratio away.",
        tests=[
            f"{CONFIG_TESTS}/test_load.py::test_an_override_of_one_of_a_pair_takes_the_other_of_the_file_away_and_null_takes_nothing[warmup_steps-warmup_ratio]"
        ],
    ),
    Mutant(
        name="epochs-override-keeps-steps",
        file="dist_subspace/config/load.py",
        text='    "training.num_train_epochs": "max_steps",\n',
        becomes="",
        promise="An override of num_train_epochs takes the file's max_steps away.",
        tests=[
            f"{CONFIG_TESTS}/test_load.py::test_an_override_of_one_of_a_pair_takes_the_other_of_the_file_away_and_null_takes_nothing[num_train_epochs-max_steps]"
        ],
    ),
    Mutant(
        name="null-override-takes-the-other-away",
        file="dist_subspace/config/load.py",
        text="if other is not None and node[last] is not None:",
        becomes="if other is not None:",
        promise="An override with null takes nothing away.",
        tests=[
            f"{CONFIG_TESTS}/test_load.py::test_an_override_of_one_of_a_pair_takes_the_other_of_the_file_away_and_null_takes_nothing[max_steps-num_train_epochs]"
        ],
    ),
    Mutant(
        name="null-output-dir-stays",
        file="dist_subspace/config/load.py",
        text='run.get("output_dir") is None',
        becomes='"output_dir" not in run',
        promise="A run.output_dir of null is the file's own.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_a_folder_that_is_null_is_the_files"],
    ),
    Mutant(
        name="places-compared-between-ranks",
        file="dist_subspace/config/load.py",
        text='_PLACES = frozenset(\n    {\n        "model.path",\n',
        becomes="_PLACES = frozenset(\n    {\n",
        promise="A rank may have the model elsewhere than another.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_ranks_must_share_every_key_but_those_that_say_where_something_lies"],
    ),
    Mutant(
        name="max-length-of-ranks-not-compared",
        file="dist_subspace/config/load.py",
        text='        "data.eval",\n        "data.cache_dir",\n',
        becomes='        "data.eval",\n        "data.cache_dir",\n        "data.max_length",\n',
        promise="Ranks must share data.max_length.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_ranks_must_share_every_key_but_those_that_say_where_something_lies"],
    ),
    Mutant(
        name="negative-numbers-text",
        file="dist_subspace/config/yaml_text.py",
        text='("int", _INT, "-+0123456789")',
        becomes='("int", _INT, "+0123456789")',
        promise="-3 is a number.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_a_value_that_yaml_1_1_misreads_is_what_a_person_meant"],
    ),
]
