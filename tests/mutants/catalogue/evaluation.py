"""What an adapter is worth: figures, the order of results, choices, files that are gone on with."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

METRICS, EVALUATION = "tests/metrics", "tests/evaluation"

MUTANTS = [
    Mutant(
        name="loss-of-a-mean-sample",
        file="dist_subspace/metrics/losses.py",
        text="max(1.0, float(np.sum(targets)))",
        becomes="max(1.0, float(len(targets)))",
        promise="Each target weighs the same in a loss.",
        tests=[f"{METRICS}/test_losses.py::test_each_target_weighs_the_same_and_the_order_does_not_matter"],
    ),
    Mutant(
        name="share-with-a-normal-interval",
        file="dist_subspace/metrics/intervals.py",
        text="max(0.0, centre - half), min(1.0, centre + half)",
        becomes="max(0.0, share - half), min(1.0, share + half)",
        promise="The interval of a share is Wilson's.",
        tests=[f"{METRICS}/test_intervals.py::test_the_interval_of_a_share_is_wilsons"],
    ),
    Mutant(
        name="numbers-compared-as-texts",
        file="dist_subspace/metrics/answers.py",
        text="    return numbers[0] is not None and numbers[0] == numbers[1]\n",
        becomes="    return False\n",
        promise="Two answers that are numbers are compared as numbers.",
        tests=[f"{METRICS}/test_answers.py::test_numbers_are_compared_as_numbers_and_texts_as_texts"],
    ),
    Mutant(
        name="scores-in-the-order-of-numbers",
        file="dist_subspace/evaluation/scoring.py",
        text="return [by_number[number] for number in numbers]",
        becomes="return [by_number[number] for number in sorted(numbers)]",
        promise="Scores come in the order in which samples are asked for.",
        tests=[
            f"{EVALUATION}/test_scoring.py::test_scores_come_in_the_order_that_was_asked_for_at_any_number_of_ranks"
        ],
    ),
    Mutant(
        name="micro-batches-by-ranks",
        file="dist_subspace/evaluation/scoring.py",
        text="micro_batches = [order[start : start + how.size] for start in range(0, len(order), how.size)]",
        becomes="size = -(-how.size // world().size)\n"
        "    micro_batches = [order[start : start + size] for start in range(0, len(order), size)]",
        promise="A micro-batch of an evaluation holds the same samples at any number of ranks.",
        tests=[
            f"{EVALUATION}/test_scoring.py::test_scores_come_in_the_order_that_was_asked_for_at_any_number_of_ranks"
        ],
    ),
    Mutant(
        name="earlier-answers-count-in-a-choice",
        file="dist_subspace/evaluation/choices.py",
        text="Sample(sample.ids, last_run(np.asarray(sample.trained, bool)))",
        becomes="Sample(sample.ids, np.asarray(sample.trained, bool))",
        promise="Of a conversation the last answer alone is a choice.",
        tests=[f"{EVALUATION}/test_choices.py::test_in_a_conversation_the_last_answer_alone_counts"],
    ),
    Mutant(
        name="half-a-block-is-kept",
        file="dist_subspace/evaluation/measuring.py",
        text="count if count == len(measurement) else count // BLOCK * BLOCK",
        becomes="count",
        promise="An evaluation goes on behind the last whole block.",
        tests=[f"{EVALUATION}/test_predictions.py::test_a_half_measured_file_is_gone_on_with"],
    ),
    Mutant(
        name="results-of-another-evaluation-are-taken",
        file="dist_subspace/evaluation/predictions.py",
        text="other = [key for key in of if before.get(key) != of[key]]",
        becomes="other: list[str] = []",
        promise="A file of results of another evaluation is refused.",
        tests=[f"{EVALUATION}/test_predictions.py::test_the_results_of_another_evaluation_are_refused"],
    ),
    Mutant(
        name="base-measured-with-its-adapter",
        file="dist_subspace/evaluation/measuring.py",
        text="disabled(opened.model) if asked.compare_base and who == BASE else nullcontext()",
        becomes="nullcontext()",
        promise="--compare-base measures the base without the adapter.",
        tests=[f"{EVALUATION}/test_command.py::test_the_base_beside_the_adapter_is_the_base_alone"],
    ),
    Mutant(
        name="head-of-before-is-measured",
        file="dist_subspace/training/head_loss.py",
        text="return (head.enabled,) if isinstance(head, TrainedCopy) else ()",
        becomes="return ()",
        promise="A trained head that is switched off is the base's, also where its loss was made inside it before.",
        tests=["tests/training/test_sample_results.py::test_a_head_that_is_switched_off_is_the_bases"],
    ),
    Mutant(
        name="evaluated-labels-are-classes-of-their-own",
        file="dist_subspace/training/data/tokens.py",
        text="_class_ids(columns, labels, source.name)",
        becomes="_class_ids(columns, label_names([columns]), source.name)",
        promise="A label that training never saw is refused by name.",
        tests=[f"{EVALUATION}/test_subject.py::test_labels_that_training_never_saw_are_refused_by_name"],
    ),
]
