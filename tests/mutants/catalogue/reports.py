"""What is said of a model, an adapter and a run: cards, tables, sums."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="card-without-the-task",
        file="dist_subspace/interchange/card_usage.py",
        text='f", task={task!r}" if task != "causal-lm" else ""',
        becomes='""',
        promise="The model card loads the base for its task.",
        tests=["tests/interchange/test_model_card.py::test_a_method_of_our_own_is_shown_for_ours_alone"],
    ),
    Mutant(
        name="card-names-a-folder-as-the-base",
        file="dist_subspace/interchange/model_card.py",
        text="    of_hub = _is_hub_name(base)\n",
        becomes="    of_hub = True\n",
        promise="The model card names no folder of this machine as base_model.",
        tests=["tests/interchange/test_model_card.py::test_a_method_of_our_own_is_shown_for_ours_alone"],
    ),
    Mutant(
        name="card-imports-own-adapter",
        file="dist_subspace/interchange/card_usage.py",
        text='"load_adapter" if config.get("dist_subspace") else "import_peft"',
        becomes='"load_adapter"',
        promise="The card of PEFT's files says import_peft.",
        tests=[
            "tests/interchange/peft/test_export.py::test_the_card_of_an_export_says_how_peft_loads_it_and_how_we_read_it_back"
        ],
    ),
    Mutant(
        name="report-best-is-last",
        file="dist_subspace/report/run.py",
        text="last {_at(finite[-1])}, best {_at(min(finite))}",
        becomes="last {_at(finite[-1])}, best {_at(finite[-1])}",
        promise="report says the best training loss.",
        tests=["tests/report/test_run.py::test_a_run_is_summed_up"],
    ),
    Mutant(
        name="report-slowest-for-median",
        file="dist_subspace/report/run.py",
        text="speeds[len(speeds) // 2]",
        becomes="speeds[0]",
        promise="report says the median speed.",
        tests=["tests/report/test_run.py::test_a_run_is_summed_up"],
    ),
    Mutant(
        name="report-last-peak",
        file="dist_subspace/report/run.py",
        text="peak = max((line.peak_memory_bytes or 0",
        becomes="peak = min((line.peak_memory_bytes or 0",
        promise="report says the highest memory.",
        tests=["tests/report/test_run.py::test_a_run_is_summed_up"],
    ),
    Mutant(
        name="report-calls-every-checkpoint-whole",
        file="dist_subspace/report/run.py",
        text="{verify(path) or 'whole'}",
        becomes="whole",
        promise="report says which checkpoint is damaged.",
        tests=["tests/report/test_run.py::test_a_run_is_summed_up"],
    ),
    Mutant(
        name="inspect-parameters-without-full-copies",
        file="dist_subspace/report/adapter.py",
        text=" + sum(_numel(adapter, key) for key in _beside_layers(adapter))",
        becomes="",
        promise="inspect counts modules trained in full.",
        tests=["tests/report/test_adapter.py::test_a_module_that_was_trained_in_full_counts_among_the_trained_values"],
    ),
    Mutant(
        name="inspect-mean-of-the-largest",
        file="dist_subspace/report/adapter.py",
        text='"norm": sum(m.norm for m in group) / len(group)',
        becomes='"norm": most.norm',
        promise="inspect says the mean norm of a kind of module.",
        tests=["tests/report/test_adapter.py::test_layers_are_ranked_by_how_far_they_moved"],
    ),
    Mutant(
        name="inspect-peft-scale-of-lora",
        file="dist_subspace/report/movement.py",
        text='(math.sqrt(rank) if described.get("use_rslora") else rank)',
        becomes="rank",
        promise="inspect knows rsLoRA's γ.",
        tests=["tests/report/test_movement.py::test_an_adapter_of_peft_is_measured_too[settings2]"],
    ),
    Mutant(
        name="effective-rank-by-squares",
        file="dist_subspace/report/movement.py",
        text="shares = singular.double() / total",
        becomes="shares = singular.double().square() / singular.double().square().sum()",
        promise="The effective rank is exp of the entropy of σ / Σ σ.",
        tests=[
            "tests/report/test_movement.py::test_the_effective_rank_counts_equal_directions[singular4-1.7547653506]"
        ],
    ),
    Mutant(
        name="accounting-shared-twice",
        file="dist_subspace/accounting.py",
        text="        seen.add(id(parameter))\n",
        becomes="",
        promise="A tied parameter counts once.",
        tests=["tests/test_accounting.py::test_a_full_spectrum_says_how_there_can_be_less_of_it"],
    ),
    Mutant(
        name="accounting-packed-as-bytes",
        file="dist_subspace/accounting.py",
        text="frozen += full_numel(parameter) if operator is None else operator.weights_in(name)",
        becomes="frozen += full_numel(parameter)",
        promise="A packed weight counts as weights.",
        tests=["tests/test_accounting.py::test_counts_are_of_weights_and_bytes_of_what_is_stored[fp4]"],
    ),
    Mutant(
        name="accounting-share-of-the-frozen",
        file="dist_subspace/accounting.py",
        text="self.trainable / max(1, self.trainable + self.frozen)",
        becomes="self.trainable / max(1, self.frozen)",
        promise="The share is of all weights.",
        tests=["tests/test_accounting.py::test_the_share_is_of_all_weights"],
    ),
    Mutant(
        name="accounting-trainable-bytes-of-all",
        file="dist_subspace/accounting.py",
        text="trainable_bytes=sum(kept_bytes(p) for p in parameters if p.requires_grad)",
        becomes="trainable_bytes=sum(kept_bytes(p) for p in parameters)",
        promise="Bytes of trained and of frozen parameters are told apart.",
        tests=["tests/test_accounting.py::test_counts_are_of_weights_and_bytes_of_what_is_stored[bf16]"],
    ),
]
