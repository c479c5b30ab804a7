"""Learning rates: what a method declares, how it scales, what a run makes of `auto`, and what is said."""

from __future__ import annotations

from tests.mutants.catalogue.wiring import key_tests
from tests.mutants.mutant import Mutant

_CHOICE, _SCALE = "tests/training/test_learning_rate.py", "tests/subspace/test_learning_rates.py"

MUTANTS = [
    Mutant(
        name="rate-between-widths-on-a-line",
        file="dist_subspace/subspace/core/learning_rate.py",
        text="share = math.log(width / WIDTHS[low]) / math.log(WIDTHS[low + 1] / WIDTHS[low])",
        becomes="share = (width - WIDTHS[low]) / (WIDTHS[low + 1] - WIDTHS[low])",
        promise="Between two widths lies a power law.",
        tests=["tests/subspace/core/test_learning_rate.py::test_between_two_widths_lies_a_power_law"],
    ),
    Mutant(
        name="rate-rises-with-alpha",
        file="dist_subspace/subspace/learning_rates.py",
        text="_own_effect(resolved) / _effect(declared, resolved.settings)",
        becomes="_effect(declared, resolved.settings) / _own_effect(resolved)",
        promise="What multiplies the update divides the rate.",
        tests=[f"{_SCALE}::test_what_multiplies_the_update_divides_the_rate"],
    ),
    Mutant(
        name="rate-of-rslora-without-its-root",
        file="dist_subspace/subspace/extension/rslora.py",
        text="return lora_effect(settings) * math.sqrt(math.sqrt(settings.rank))",
        becomes="return lora_effect(settings)",
        promise="rsLoRA's factor falls with the root of the rank alone, so a higher rank needs a lower rate.",
        tests=[f"{_SCALE}::test_what_multiplies_the_update_divides_the_rate"],
    ),
    Mutant(
        name="auto-forgets-the-checkpoint",
        file="dist_subspace/training/plan.py",
        text="choose_rate, config, read.resolved, folder, checkpoint)",
        becomes="choose_rate, config, read.resolved, folder, None)",
        promise="A resume without a rate keeps the checkpoint's.",
        tests=[f"{_CHOICE}::test_a_run_writes_the_number_and_goes_on_with_it"],
    ),
    Mutant(
        name="auto-stays-in-the-configuration",
        file="dist_subspace/training/plan.py",
        text="config=with_rate(config, rate.rate),",
        becomes="config=config,",
        promise="config.yaml holds the number that auto stands for.",
        tests=[*key_tests("training.learning_rate")],
    ),
    Mutant(
        name="auto-for-any-optimizer",
        file="dist_subspace/training/optimizers.py",
        text='return "adamw" in name',
        becomes="return True",
        promise="The rates of methods are AdamW's: another optimizer needs a number.",
        tests=[f"{_CHOICE}::test_rates_are_those_of_adamw_so_another_optimizer_needs_a_number"],
    ),
    Mutant(
        name="auto-for-preferences-as-for-samples",
        file="dist_subspace/training/learning_rate.py",
        text='return own if objective == "sft" else',
        becomes="return own if objective else",
        promise="An objective of preferences trains at a twentieth of the rate.",
        tests=[f"{_CHOICE}::test_an_objective_of_preferences_trains_at_a_twentieth_as_trls_defaults"],
    ),
    Mutant(
        name="far-rate-in-silence",
        file="dist_subspace/subspace/learning_rates.py",
        text="return not self.lowest <= rate <= self.highest",
        becomes="return rate > self.highest",
        promise="A rate far below the method's own is said.",
        tests=[f"{_CHOICE}::test_a_rate_far_from_the_methods_own_is_said_with_that_one_and_what_may_come_of_it"],
    ),
    Mutant(
        name="width-of-a-tower",
        file="dist_subspace/loading/widths.py",
        text=" and not is_unreached(name, apart)",
        becomes="",
        promise="The width of a model of several inputs is that of its text.",
        tests=["tests/loading/test_widths.py::test_a_tower_that_text_never_reaches_does_not_count"],
    ),
]
