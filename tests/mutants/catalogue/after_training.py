"""What is asked of a trained adapter: prompts that are too long, figures in its card, names of the Hub, stops."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_SKIPPED = "tests/talking/test_files.py::test_prompts_that_are_too_long_are_named_and_skipped_where_that_is_asked_for"
_FIGURES = "tests/interchange/test_card_figures.py"
_TYPE = "tests/loading/test_computation_type.py"

MUTANTS = [
    Mutant(
        name="answers-move-up-where-prompts-are-skipped",
        file="dist_subspace/talking/files.py",
        text="zip(self.places[begun : begun + len(some)], some, strict=True)",
        becomes="zip(range(begun, begun + len(some)), some, strict=True)",
        promise="Each record has its own answer, also behind prompts that are skipped.",
        tests=[_SKIPPED],
    ),
    Mutant(
        name="skipped-prompts-at-the-end-are-lost",
        file="dist_subspace/talking/files.py",
        text="        self._write(len(self.records), {})\n",
        becomes="",
        promise="A file of answers has a line for each record.",
        tests=[_SKIPPED],
    ),
    Mutant(
        name="loaded-in-16-bits-where-they-are-slow",
        file="dist_subspace/loading/load.py",
        text="return unset_type(storage, loading_device(device, alone=not together), together=together)",
        becomes="return given",
        promise="A packed model of which no type is said computes in float32 where 16 bits are slow.",
        tests=[f"{_TYPE}::test_a_packed_model_computes_in_float32_where_16_bits_are_slow_and_others_as_they_do"],
    ),
    Mutant(
        name="each-rank-has-a-type-of-its-own",
        file="dist_subspace/loading/computation_type.py",
        text="(any_rank(slow) if together else slow)",
        becomes="slow",
        promise="All ranks compute in one type.",
        tests=[f"{_TYPE}::test_one_rank_that_is_slow_decides_for_all"],
    ),
    Mutant(
        name="tasks-run-on-after-a-signal",
        file="dist_subspace/evaluation/harness.py",
        text="        heed()\n        place",
        becomes="        place",
        promise="A signal ends an evaluation of tasks between two batches.",
        tests=["tests/evaluation/test_harness.py::test_a_stop_ends_the_tasks_between_two_batches_on_all_ranks"],
    ),
    Mutant(
        name="card-with-two-tables-of-one-data-set",
        file="dist_subspace/interchange/card_figures.py",
        text="    if there.search(text):",
        becomes="    if False:",
        promise="A later evaluation takes the place of an earlier one of the same data.",
        tests=[f"{_FIGURES}::test_a_later_evaluation_of_the_same_data_takes_the_place_of_the_earlier_one_and_no_other"],
    ),
    Mutant(
        name="figures-in-a-card-that-was-edited",
        file="dist_subspace/interchange/card_figures.py",
        text="if not is_unedited(card) or not figures:",
        becomes="if not figures:",
        promise="A card that a person has edited is theirs.",
        tests=[f"{_FIGURES}::test_a_card_that_a_person_has_edited_is_theirs"],
    ),
    Mutant(
        name="place-in-the-cache-is-shown",
        file="dist_subspace/interchange/base_model.py",
        text="return _hub_name(Path(path)) or str(path)",
        becomes="return str(path)",
        promise="A model of the Hub is shown by its name.",
        tests=[
            "tests/interchange/test_description.py::test_a_copy_in_the_cache_is_shown_by_the_name_that_the_hub_gives_it"
        ],
    ),
    Mutant(
        name="group-ends-within-a-program",
        file="dist_subspace/placement/process_group.py",
        text="if is_distributed() and ENDS_WITH_COMMAND:",
        becomes="if is_distributed():",
        promise="A program that calls commands one after another keeps its process group.",
        tests=[
            "tests/placement/test_process_group.py::"
            "test_a_command_ends_its_group_and_a_program_that_calls_commands_keeps_it[False]"
        ],
    ),
    Mutant(
        name="merged-with-a-tokenizer-that-lacks-new-tokens",
        file="dist_subspace/interchange/merge.py",
        text="if tokenizer is None and has_tokenizer(source) and attached(model).config.new_tokens:",
        becomes="if False:",
        promise="A merged model's tokenizer knows its tokens.",
        tests=[
            "tests/interchange/test_merge.py::test_a_tokenizer_that_lacks_the_new_tokens_is_not_written_beside_them"
        ],
    ),
]
