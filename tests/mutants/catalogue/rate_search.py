"""The search for the learning rate: one start, halving, ends of the grid, divergence."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

SEARCH, BENCH = "tests/rate_search/test_search.py", "tests/rate_search/test_bench.py"
_AS_A_RUN = f"{BENCH}::test_a_rate_that_is_tried_between_others_is_a_run_at_that_rate_bit_for_bit"

MUTANTS = [
    Mutant(
        name="rates-go-on-from-the-first-state",
        file="dist_subspace/rate_search/bench.py",
        text="        held, training = tried.held or self.first, self.config.training\n",
        becomes="        held, training = self.first, self.config.training\n",
        promise="A rate goes on from where it stood.",
        tests=[f"{_AS_A_RUN}[adalora]"],
    ),
    Mutant(
        name="plan-of-another-rate",
        file="dist_subspace/rate_search/held.py",
        text="    restore_schedule(model, held.schedule, held.optimizer_steps, known)\n",
        becomes="",
        promise="The method's schedule goes on from where the rate's stood.",
        tests=[f"{_AS_A_RUN}[lora-dash]"],
    ),
    Mutant(
        name="directions-held-by-reference",
        file="dist_subspace/rate_search/held.py",
        text='buffer.detach().to("cpu", copy=True)',
        becomes="buffer.detach()",
        promise="What a schedule fills in place is held as it was.",
        tests=[f"{_AS_A_RUN}[lora-dash]"],
    ),
    Mutant(
        name="gradients-stay-uncollected",
        file="dist_subspace/advancing.py",
        text="        _collect_for(attached_method, attached_method.schedule, step + 1, max_steps)\n",
        becomes="        pass\n",
        promise="After a rate's last phase the next one's gradients are collected again.",
        tests=[f"{_AS_A_RUN}[adalora]"],
    ),
    Mutant(
        name="directions-stay-after-the-switch",
        file="dist_subspace/subspace/schedules/switching.py",
        text="if self.switched is not None or all(key in tensors for key in factors.values()):",
        becomes="if self.switched is not None:",
        promise="A rate that begins anew has no directions of another one.",
        tests=[f"{_AS_A_RUN}[lora-dash]"],
    ),
    Mutant(
        name="schedule-begins-anew-at-a-rung",
        file="dist_subspace/rate_search/bench.py",
        text="        self.schedule.restore({}, tried.steps)\n",
        becomes="",
        promise="A rate that goes on is behind its warm-up.",
        tests=[f"{_AS_A_RUN}[adalora]"],
    ),
    Mutant(
        name="worse-half-goes-on",
        file="dist_subspace/rate_search/search.py",
        text="for tried in going[count:]:",
        becomes="for tried in going[: len(going) - count]:",
        promise="The better half goes on.",
        tests=[f"{SEARCH}::test_the_better_half_goes_on_from_where_it_stood"],
    ),
    Mutant(
        name="grid-extended-to-the-other-side",
        file="dist_subspace/rate_search/search.py",
        text="        return best.rate == max(rates)\n",
        becomes="        return best.rate == min(rates)\n",
        promise="A grid is extended to the side of its best rate.",
        tests=[f"{SEARCH}::test_a_grid_is_extended_to_the_side_of_the_best_one_and_it_is_said"],
    ),
    Mutant(
        name="diverged-rate-is-the-best",
        file="dist_subspace/rate_search/search.py",
        text="measured = [tried for tried in self.tried if tried.evaluations and not tried.diverged]",
        becomes="measured = [tried for tried in self.tried if tried.evaluations]",
        promise="A rate that diverged after it was measured is not the best.",
        tests=[f"{SEARCH}::test_the_best_is_one_of_those_that_got_furthest_and_did_not_diverge"],
    ),
    Mutant(
        name="skipped-steps-are-no-divergence",
        file="dist_subspace/rate_search/bench.py",
        text="    if skipped or not math.isfinite(losses[-1]):\n",
        becomes="    if not math.isfinite(losses[-1]):\n",
        promise="A rate whose gradient is not finite is given up.",
        tests=[f"{BENCH}::test_a_rate_diverges_by_what_is_not_finite_or_by_a_mean_far_above_the_start"],
    ),
]
