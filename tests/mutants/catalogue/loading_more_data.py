"""Data once more: which tokens are trained, and what is said of them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

DATA_TESTS = "tests/training/data"

MUTANTS = [
    Mutant(
        name="worker-takes-another-tokenizer",
        file="dist_subspace/training/data/worker.py",
        text='tokenizer is None or tokenizer_digest(tokenizer) != task["tokenizer"]',
        becomes="tokenizer is None",
        promise="A tokenizer that its files do not give back works in no other process.",
        tests=[
            f"{DATA_TESTS}/test_tokenising.py::test_a_tokenizer_that_comes_back_otherwise_from_its_files_works_here_alone"
        ],
    ),
    Mutant(
        name="probe-in-training-mode",
        file="dist_subspace/training/data/packed_attention.py",
        text="    model.eval()\n    try:",
        becomes="    try:",
        promise="The probe for leaks draws no dropout.",
        tests=[
            f"{DATA_TESTS}/test_packed_attention.py::test_the_probe_draws_no_dropout_and_leaves_the_model_in_its_mode"
        ],
    ),
    Mutant(
        name="csv-blank-rows-are-records",
        file="dist_subspace/training/data/tables.py",
        text="                if row:\n",
        becomes="                if True:\n",
        promise="A blank line of a CSV is no record.",
        tests=[f"{DATA_TESTS}/test_sources.py::test_a_byte_order_mark_and_windows_line_ends_are_tolerated"],
    ),
    Mutant(
        name="shape-ignores-options",
        file="dist_subspace/training/data/recipes.py",
        text="rest = [talk.tools, talk.documents, talk.options]",
        becomes="rest = [talk.tools, talk.documents]",
        promise="Variables of the template are part of a conversation's shape.",
        tests=[f"{DATA_TESTS}/test_recipes.py::test_variables_of_the_template_are_part_of_the_shape"],
    ),
    Mutant(
        name="null-template-variables-passed",
        file="dist_subspace/training/data/messages.py",
        text="return {key: value for key, value in options.items() if value is not None}",
        becomes="return dict(options)",
        promise="A null that Arrow fills in is no variable of the template.",
        tests=[
            f"{DATA_TESTS}/test_messages.py::test_a_null_among_the_variables_of_the_template_is_none_that_was_given"
        ],
    ),
    Mutant(
        name="slow-tokenizer-loses-the-last-token",
        file="dist_subspace/training/data/masked.py",
        text="            end += end < len(beginnings[2 * number + 1])\n",
        becomes="",
        promise="A token that reaches over the end of a span is trained.",
        tests=[f"{DATA_TESTS}/test_masked.py::test_a_span_that_ends_within_a_token_has_it_without_positions_too"],
    ),
    Mutant(
        name="marks-without-options",
        file="dist_subspace/training/data/template.py",
        text="variables = self.tokenizer.special_tokens_map | talk.options",
        becomes="variables = self.tokenizer.special_tokens_map",
        promise="A template's marks are those of the rendering with the conversation's variables.",
        tests=[
            f"{DATA_TESTS}/test_chat_templates.py::test_marks_are_those_of_the_rendering_with_the_conversations_own_variables"
        ],
    ),
    Mutant(
        name="cutting-of-first-file-only",
        file="dist_subspace/training/data/tokens.py",
        text="counted([c.seen for c in columns], [c.dropped for c in columns]",
        becomes="counted([c.seen for c in columns[:1]], [c.dropped for c in columns]",
        promise="What was cut is counted over all files.",
        tests=[f"{DATA_TESTS}/test_cutting.py::test_what_was_cut_is_counted_over_all_files"],
    ),
    Mutant(
        name="fast-path-without-target-check",
        file="dist_subspace/training/data/chat.py",
        text="    if len(draft.ids) <= limit and draft.trained[1:].any():\n",
        becomes="    if len(draft.ids) <= limit:\n",
        promise="A conversation whose answer is no token is left out.",
        tests=[f"{DATA_TESTS}/test_cutting.py::test_a_conversation_whose_answer_is_no_token_is_left_out"],
    ),
    Mutant(
        name="developer-no-system",
        file="dist_subspace/training/data/chat.py",
        text='SYSTEM = ("system", "developer")',
        becomes='SYSTEM = ("system",)',
        promise="A developer's turn stays where older turns are cut.",
        tests=[f"{DATA_TESTS}/test_cutting.py::test_a_developers_turn_stays_as_the_systems_does"],
    ),
    Mutant(
        name="leak-hidden-by-length",
        file="dist_subspace/training/data/packed_attention.py",
        text="    changed = (packed[first:] - alone_b)[:NEAR].abs().mean()\n",
        becomes="    changed = (packed[first:] - alone_b).abs().mean()\n",
        promise="What leaks over the border of two samples is seen however long they are.",
        tests=[
            f"{DATA_TESTS}/test_packed_attention.py::test_a_memory_of_a_few_tokens_is_found_out_in_short_samples_and_in_long_ones[2048]"
        ],
    ),
    Mutant(
        name="leak-limit-wide",
        file="dist_subspace/training/data/packed_attention.py",
        text="LEAK_LIMIT = 1e-3",
        becomes="LEAK_LIMIT = 1e-2",
        promise="A hybrid model whose state runs on is refused packed rows.",
        tests=[
            f"{DATA_TESTS}/test_packed_attention.py::test_a_memory_of_a_few_tokens_is_found_out_in_short_samples_and_in_long_ones[2048]"
        ],
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
        file="dist_subspace/training/data/order.py",
        text="np.random.default_rng([seed, epoch, SHARE, number])",
        becomes="np.random.default_rng([0, epoch, SHARE, number])",
        promise="training.seed draws the part of a file of fractional weight.",
        tests=[
            f"{DATA_TESTS}/test_order.py::test_a_fraction_is_rounded_to_the_nearest_number_of_samples_and_drawn_by_the_seed"
        ],
    ),
    Mutant(
        name="fraction-rounds-down",
        file="dist_subspace/training/data/order.py",
        text="extra = round((weight - whole) * n)",
        becomes="extra = int((weight - whole) * n)",
        promise="A fraction of a file is rounded to the nearest sample.",
        tests=[
            f"{DATA_TESTS}/test_order.py::test_a_fraction_is_rounded_to_the_nearest_number_of_samples_and_drawn_by_the_seed"
        ],
    ),
    Mutant(
        name="csv-fields-limited",
        file="dist_subspace/training/data/tables.py",
        text="    csv.field_size_limit(2**31 - 1)\n",
        becomes="",
        promise="A long cell of a CSV is read.",
        tests=[f"{DATA_TESTS}/test_sources.py::test_a_text_of_a_megabyte_is_one_value[a.csv]"],
    ),
    Mutant(
        name="held-out-seed-not-in-fingerprint",
        file="dist_subspace/training/data/tokens.py",
        text="held_out = [settings.eval, seed]",
        becomes="held_out = [settings.eval]",
        promise="Another held-out part is other training data.",
        tests=[
            f"{DATA_TESTS}/test_tokens.py::test_the_seed_is_in_the_fingerprint_where_it_draws_what_is_held_out_and_there_alone"
        ],
    ),
    Mutant(
        name="state-of-the-last-call-in-the-digest",
        file="dist_subspace/training/data/fingerprint.py",
        text='if key not in ("truncation", "padding")',
        becomes='if key != "padding"',
        promise="Truncation of the last call is no part of a tokenizer's digest.",
        tests=[f"{DATA_TESTS}/test_tokens.py::test_what_a_tokenizer_was_last_asked_for_is_no_part_of_the_fingerprint"],
    ),
    Mutant(
        name="remarks-of-one-piece-only",
        file="dist_subspace/training/data/store.py",
        text="remarks[remark] = remarks.get(remark, 0) + count",
        becomes="remarks[remark] = count",
        promise="What is said of records counts those of every piece.",
        tests=[f"{DATA_TESTS}/test_messages.py::test_what_is_said_of_records_counts_those_of_every_piece_and_file"],
    ),
    Mutant(
        name="notices-of-first-file-only",
        file="dist_subspace/training/data/tokens.py",
        text="    for source_columns in columns:\n        counts.update",
        becomes="    for source_columns in columns[:1]:\n        counts.update",
        promise="What is said of records counts those of every file.",
        tests=[f"{DATA_TESTS}/test_messages.py::test_what_is_said_of_records_counts_those_of_every_piece_and_file"],
    ),
]
