"""Loading, data and configuration once more: what a run gets where every step ends well."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LOAD_TESTS, DATA_TESTS, CONFIG_TESTS = "tests/loading", "tests/training/data", "tests/config"
CONVERSIONS = f"{LOAD_TESTS}/test_conversions.py"
LOADING, DATA, CONFIG = "dist_subspace/loading", "dist_subspace/training/data", "dist_subspace/config"

MUTANTS = [
    Mutant(
        name="probe-in-training-mode",
        file=f"{DATA}/packed_attention.py",
        text="    model.eval()\n    try:",
        becomes="    try:",
        promise="The probe for leaks draws no dropout.",
        tests=[
            f"{DATA_TESTS}/test_packed_attention.py::test_the_probe_draws_no_dropout_and_leaves_the_model_in_its_mode"
        ],
    ),
    Mutant(
        name="csv-blank-rows-are-records",
        file=f"{DATA}/tables.py",
        text="                if row:\n",
        becomes="                if True:\n",
        promise="A blank line of a CSV is no record.",
        tests=[f"{DATA_TESTS}/test_sources.py::test_a_byte_order_mark_and_windows_line_ends_are_tolerated"],
    ),
    Mutant(
        name="shape-ignores-options",
        file=f"{DATA}/recipes.py",
        text="rest = [talk.tools, talk.documents, talk.options]",
        becomes="rest = [talk.tools, talk.documents]",
        promise="Variables of the template are part of a conversation's shape.",
        tests=[f"{DATA_TESTS}/test_recipes.py::test_variables_of_the_template_are_part_of_the_shape"],
    ),
    Mutant(
        name="null-template-variables-passed",
        file=f"{DATA}/messages.py",
        text="return {key: value for key, value in found.items() if value is not None}",
        becomes="return dict(found)",
        promise="A null that Arrow fills in is no variable of the template.",
        tests=[
            f"{DATA_TESTS}/test_messages.py::test_a_null_among_the_variables_of_the_template_is_none_that_was_given"
        ],
    ),
    Mutant(
        name="slow-tokenizer-loses-the-last-token",
        file=f"{DATA}/masked.py",
        text="            end += end < len(beginnings[2 * number + 1])\n",
        becomes="",
        promise="A token that reaches over the end of a span is trained.",
        tests=[f"{DATA_TESTS}/test_masked.py::test_a_span_that_ends_within_a_token_has_it_without_positions_too"],
    ),
    Mutant(
        name="marks-without-options",
        file=f"{DATA}/template.py",
        text="**{**self.tokenizer.special_tokens_map, **talk.options},",
        becomes="**self.tokenizer.special_tokens_map,",
        promise="A template's marks are those of the rendering with the conversation's variables.",
        tests=[
            f"{DATA_TESTS}/test_chat_templates.py::test_marks_are_those_of_the_rendering_with_the_conversations_own_variables"
        ],
    ),
    Mutant(
        name="cutting-of-first-file-only",
        file=f"{DATA}/tokens.py",
        text="counted([c.seen for c in columns], [c.dropped for c in columns]",
        becomes="counted([c.seen for c in columns[:1]], [c.dropped for c in columns]",
        promise="What was cut is counted over all files.",
        tests=[f"{DATA_TESTS}/test_cutting.py::test_what_was_cut_is_counted_over_all_files"],
    ),
    Mutant(
        name="fast-path-without-target-check",
        file=f"{DATA}/chat.py",
        text="    if len(draft.ids) <= limit and draft.trained[1:].any():\n",
        becomes="    if len(draft.ids) <= limit:\n",
        promise="A conversation whose answer is no token is left out.",
        tests=[f"{DATA_TESTS}/test_cutting.py::test_a_conversation_whose_answer_is_no_token_is_left_out"],
    ),
    Mutant(
        name="ratio-of-one-accepted",
        file=f"{CONFIG}/schema.py",
        text="or not 0 <= ratio < 1:",
        becomes="or not 0 <= ratio <= 1:",
        promise="A warmup_ratio of 1 is refused: as warmup_steps it would be one step.",
        tests=[f"{CONFIG_TESTS}/test_schema.py::test_warmup_ratio_becomes_warmup_steps_and_both_are_refused"],
    ),
    Mutant(
        name="nvme-without-config-refused",
        file=f"{CONFIG}/schema.py",
        text='self.preset == "zero3-nvme" and self.config is None and',
        becomes='self.preset == "zero3-nvme" and',
        promise="A DeepSpeed configuration of one's own needs no nvme_path beside it.",
        tests=[f"{CONFIG_TESTS}/test_schema.py::test_nvme_needs_a_folder"],
    ),
    Mutant(
        name="developer-no-system",
        file=f"{DATA}/chat.py",
        text='SYSTEM = ("system", "developer")',
        becomes='SYSTEM = ("system",)',
        promise="A developer's turn stays where older turns are cut.",
        tests=[f"{DATA_TESTS}/test_cutting.py::test_a_developers_turn_stays_as_the_systems_does"],
    ),
    Mutant(
        name="leak-hidden-by-length",
        file=f"{DATA}/packed_attention.py",
        text="    changed = (packed[first:] - alone_b)[:NEAR].abs().mean()\n",
        becomes="    changed = (packed[first:] - alone_b).abs().mean()\n",
        promise="What leaks over the border of two samples is seen however long they are.",
        tests=[
            f"{DATA_TESTS}/test_packed_attention.py::test_a_memory_of_a_few_tokens_is_found_out_in_short_samples_and_in_long_ones[2048]"
        ],
    ),
    Mutant(
        name="leak-limit-wide",
        file=f"{DATA}/packed_attention.py",
        text="LEAK_LIMIT = 1e-3",
        becomes="LEAK_LIMIT = 1e-2",
        promise="A hybrid model whose state runs on is refused packed rows.",
        tests=[
            f"{DATA_TESTS}/test_packed_attention.py::test_a_memory_of_a_few_tokens_is_found_out_in_short_samples_and_in_long_ones[2048]"
        ],
    ),
    Mutant(
        name="infinite-rate-accepted",
        file=f"{CONFIG}/fields.py",
        text="allow_inf_nan=False",
        becomes="allow_inf_nan=True",
        promise="A number of the configuration is finite.",
        tests=[f"{CONFIG_TESTS}/test_schema.py::test_a_wrong_type_or_range_names_field_value_and_accepted"],
    ),
    Mutant(
        name="duplicates-compared-at-their-beginning",
        file=f"{LOADING}/index.py",
        text="for start in range(0, shape[0], rows)",
        becomes="for start in range(0, min(rows, shape[0]), rows)",
        promise="Two tensors for one parameter are the same only if every row is.",
        tests=[f"{LOAD_TESTS}/test_index.py::test_two_tensors_are_the_same_only_if_every_row_is"],
    ),
    Mutant(
        name="experts-in-the-order-of-text",
        file=f"{LOADING}/transformers_internals.py",
        text="for key in sorted(keys, key=dot_natural_key):",
        becomes="for key in sorted(keys):",
        promise="Expert 10 is stacked behind expert 9, and not behind expert 1.",
        tests=[f"{CONVERSIONS}::test_every_parameter_is_what_transformers_makes_of_the_file[experts one by one-fp32]"],
    ),
    Mutant(
        name="stored-buffers-not-read",
        file=f"{LOADING}/stream.py",
        text="value = self.sources.read(self.model, name) if self.sources.has(name) else buffer\n",
        becomes="value = buffer\n",
        promise="A buffer that the checkpoint holds (a router's correction) is read.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_every_tensor_has_the_type_and_the_values_that_transformers_gives_it[deepseek-bf16]"
        ],
    ),
    Mutant(
        name="stored-buffers-lose-their-type",
        file=f"{LOADING}/stream.py",
        text="kind = self.kept(name) if self.sources.has(name) else None",
        becomes="kind = None",
        promise="A stored buffer has the type that transformers keeps it in.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_every_tensor_has_the_type_and_the_values_that_transformers_gives_it[deepseek-bf16]"
        ],
    ),
    Mutant(
        name="heads-of-several-layers-packed",
        file=f"{LOADING}/stream.py",
        text='        if name.partition(".")[0] in CLASSIFIERS:\n            return True\n',
        becomes="",
        promise="A stored head of several layers is as dense as one of a single layer.",
        tests=[
            f"{LOAD_TESTS}/test_stays_dense.py::test_a_classification_head_that_the_checkpoint_has_keeps_every_value[RobertaForSequenceClassification]"
        ],
    ),
    Mutant(
        name="score-is-packed",
        file=f"{LOADING}/stream.py",
        text='HEADS = ("lm_head", "score", ',
        becomes='HEADS = ("lm_head", ',
        promise="A stored classification head is not packed.",
        tests=[
            f"{LOAD_TESTS}/test_stays_dense.py::test_a_classification_head_that_the_checkpoint_has_keeps_every_value[LlamaForSequenceClassification]"
        ],
    ),
    Mutant(
        name="classifier-is-packed",
        file=f"{LOADING}/stream.py",
        text='"score", "classifier", ',
        becomes='"score", ',
        promise="A stored classification head is not packed.",
        tests=[
            f"{LOAD_TESTS}/test_stays_dense.py::test_a_classification_head_that_the_checkpoint_has_keeps_every_value[BertForSequenceClassification]"
        ],
    ),
    Mutant(
        name="pre-classifier-is-packed",
        file=f"{LOADING}/stream.py",
        text=', "pre_classifier")',
        becomes=")",
        promise="The layer before a classifier is part of the head.",
        tests=[
            f"{LOAD_TESTS}/test_stays_dense.py::test_a_classification_head_that_the_checkpoint_has_keeps_every_value[DistilBertForSequenceClassification]"
        ],
    ),
    Mutant(
        name="overflow-of-norms-unseen",
        file=f"{LOADING}/stream.py",
        text="        self._refuse_overflow(name, value, kind)\n",
        becomes="",
        promise="A value that float16 cannot hold is refused in every parameter.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_one_value_beyond_float16_of_any_sign_in_any_part_is_refused[embed_tokens-torch.float32]"
        ],
    ),
    Mutant(
        name="double-overflows-unseen",
        file=f"{LOADING}/stream.py",
        text="WIDER = (torch.float32, torch.bfloat16, torch.float64)",
        becomes="WIDER = (torch.float32, torch.bfloat16)",
        promise="A float64 value that float16 cannot hold is refused.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_one_value_beyond_float16_of_any_sign_in_any_part_is_refused[up_proj-torch.float64]"
        ],
    ),
    Mutant(
        name="overflow-only-of-positive-values",
        file=f"{LOADING}/stream.py",
        text="largest = value.abs().amax()",
        becomes="largest = value.amax()",
        promise="A negative value that float16 cannot hold is refused.",
        tests=[
            f"{LOAD_TESTS}/test_types.py::test_one_value_beyond_float16_of_any_sign_in_any_part_is_refused[up_proj-torch.float32]"
        ],
    ),
    Mutant(
        name="warmup-steps-override-keeps-ratio",
        file=f"{CONFIG}/load.py",
        text='    "training.warmup_steps": "warmup_ratio",\n',
        becomes="",
        promise="An override of warmup_steps takes the file's warmup_ratio away.",
        tests=[
            f"{CONFIG_TESTS}/test_load.py::test_an_override_of_one_of_a_pair_takes_the_other_of_the_file_away_and_null_takes_nothing[warmup_steps-warmup_ratio]"
        ],
    ),
    Mutant(
        name="epochs-override-keeps-steps",
        file=f"{CONFIG}/load.py",
        text='    "training.num_train_epochs": "max_steps",\n',
        becomes="",
        promise="An override of num_train_epochs takes the file's max_steps away.",
        tests=[
            f"{CONFIG_TESTS}/test_load.py::test_an_override_of_one_of_a_pair_takes_the_other_of_the_file_away_and_null_takes_nothing[num_train_epochs-max_steps]"
        ],
    ),
    Mutant(
        name="null-override-takes-the-other-away",
        file=f"{CONFIG}/load.py",
        text="if other is not None and node[last] is not None:",
        becomes="if other is not None:",
        promise="An override with null takes nothing away.",
        tests=[
            f"{CONFIG_TESTS}/test_load.py::test_an_override_of_one_of_a_pair_takes_the_other_of_the_file_away_and_null_takes_nothing[max_steps-num_train_epochs]"
        ],
    ),
    Mutant(
        name="null-output-dir-stays",
        file=f"{CONFIG}/load.py",
        text='run.get("output_dir") is None',
        becomes='"output_dir" not in run',
        promise="A run.output_dir of null is the file's own.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_a_folder_that_is_null_is_the_files"],
    ),
    Mutant(
        name="places-compared-between-ranks",
        file=f"{CONFIG}/load.py",
        text='_PLACES = {\n    *("model.path", ',
        becomes="_PLACES = {\n    *(",
        promise="A rank may have the model elsewhere than another.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_ranks_must_share_every_key_but_those_that_say_where_something_lies"],
    ),
    Mutant(
        name="max-length-of-ranks-not-compared",
        file=f"{CONFIG}/load.py",
        text='"data.eval", "data.cache_dir"),',
        becomes='"data.eval", "data.cache_dir", "data.max_length"),',
        promise="Ranks must share data.max_length.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_ranks_must_share_every_key_but_those_that_say_where_something_lies"],
    ),
    Mutant(
        name="negative-numbers-text",
        file=f"{CONFIG}/yaml_text.py",
        text='("int", _INT, "-+0123456789")',
        becomes='("int", _INT, "+0123456789")',
        promise="-3 is a number.",
        tests=[f"{CONFIG_TESTS}/test_load.py::test_a_value_that_yaml_1_1_misreads_is_what_a_person_meant"],
    ),
    Mutant(
        name="first-token-of-the-record-before",
        file="dist_subspace/training/vocabulary.py",
        text='np.searchsorted(columns.offsets, place, side="right") - 1',
        becomes='np.searchsorted(columns.offsets, place, side="left") - 1',
        promise="A token without a row is said with its own record.",
        tests=["tests/training/test_vocabulary.py::test_the_record_is_named_wherever_the_token_stands"],
    ),
    Mutant(
        name="evaluation-ids-not-checked",
        file="dist_subspace/training/vocabulary.py",
        text='((data.train, list(names)), (data.eval, ["data.eval"]))',
        becomes="((data.train, list(names)),)",
        promise="Evaluation data is held to the model's rows too.",
        tests=["tests/training/test_vocabulary.py::test_the_record_is_named_wherever_the_token_stands"],
    ),
    Mutant(
        name="only-first-part-checked",
        file="dist_subspace/training/vocabulary.py",
        text="for number, part in enumerate(table.parts):",
        becomes="for number, part in enumerate(table.parts[:1]):",
        promise="Every training file is held to the model's rows.",
        tests=["tests/training/test_vocabulary.py::test_the_record_is_named_wherever_the_token_stands"],
    ),
    Mutant(
        name="fraction-ignores-the-seed",
        file=f"{DATA}/order.py",
        text="np.random.default_rng([seed, epoch, SHARE, number])",
        becomes="np.random.default_rng([0, epoch, SHARE, number])",
        promise="training.seed draws the part of a file of fractional weight.",
        tests=[
            f"{DATA_TESTS}/test_order.py::test_a_fraction_is_rounded_to_the_nearest_number_of_samples_and_drawn_by_the_seed"
        ],
    ),
    Mutant(
        name="fraction-rounds-down",
        file=f"{DATA}/order.py",
        text="extra = round((weight - whole) * n)",
        becomes="extra = int((weight - whole) * n)",
        promise="A fraction of a file is rounded to the nearest sample.",
        tests=[
            f"{DATA_TESTS}/test_order.py::test_a_fraction_is_rounded_to_the_nearest_number_of_samples_and_drawn_by_the_seed"
        ],
    ),
    Mutant(
        name="csv-fields-limited",
        file=f"{DATA}/tables.py",
        text="    csv.field_size_limit(2**31 - 1)\n",
        becomes="",
        promise="A long cell of a CSV is read.",
        tests=[f"{DATA_TESTS}/test_sources.py::test_a_text_of_a_megabyte_is_one_value[a.csv]"],
    ),
    Mutant(
        name="held-out-seed-not-in-fingerprint",
        file=f"{DATA}/tokens.py",
        text="held = [settings.eval, seed]",
        becomes="held = [settings.eval]",
        promise="Another held-out part is other training data.",
        tests=[
            f"{DATA_TESTS}/test_tokens.py::test_the_seed_is_in_the_fingerprint_where_it_draws_what_is_held_out_and_there_alone"
        ],
    ),
    Mutant(
        name="state-of-the-last-call-in-the-digest",
        file=f"{DATA}/fingerprint.py",
        text='if key not in ("truncation", "padding")',
        becomes='if key != "padding"',
        promise="Truncation of the last call is no part of a tokenizer's digest.",
        tests=[f"{DATA_TESTS}/test_tokens.py::test_what_a_tokenizer_was_last_asked_for_is_no_part_of_the_fingerprint"],
    ),
    Mutant(
        name="remarks-of-one-piece-only",
        file=f"{DATA}/store.py",
        text="remarks[remark] = remarks.get(remark, 0) + count",
        becomes="remarks[remark] = count",
        promise="What is said of records counts those of every piece.",
        tests=[f"{DATA_TESTS}/test_messages.py::test_what_is_said_of_records_counts_those_of_every_piece_and_file"],
    ),
    Mutant(
        name="notices-of-first-file-only",
        file=f"{DATA}/tokens.py",
        text="    for one in columns:\n        counts.update",
        becomes="    for one in columns[:1]:\n        counts.update",
        promise="What is said of records counts those of every file.",
        tests=[f"{DATA_TESTS}/test_messages.py::test_what_is_said_of_records_counts_those_of_every_piece_and_file"],
    ),
]
