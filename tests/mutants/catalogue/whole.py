"""The engine of plain torch, and who chooses it."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_RUNS = "tests/placement/whole/test_runs.py"
_EQUAL = f"{_RUNS}::test_a_run_of_plain_torch_is_bit_for_bit_that_of_zero_0_on_one_rank"
_RESUMED = f"{_RUNS}::test_it_resumes_bit_for_bit_and_continues_under_zero_and_the_other_way_round"
_CLIPPED = "lora on nf4, every gradient clipped"
_ABSENT = "tests/placement/whole/test_without_deepspeed.py"
_CHOICE = "tests/placement/test_engines.py"

MUTANTS = [
    Mutant(
        name="whole-clips-by-a-reciprocal",
        file="dist_subspace/placement/whole/engine.py",
        text="torch.full_like(total, largest) / total",
        becomes="largest / total",
        promise="A clipped run of preset none is bit for bit that of zero0.",
        tests=[f"{_EQUAL}[{_CLIPPED}]"],
    ),
    Mutant(
        name="whole-does-not-clip",
        file="dist_subspace/placement/whole/engine.py",
        text="            if self.max_grad_norm > 0:",
        becomes="            if self.max_grad_norm < 0:",
        promise="training.max_grad_norm counts for preset none.",
        tests=[f"{_EQUAL}[{_CLIPPED}]"],
    ),
    Mutant(
        name="whole-takes-an-infinite-gradient",
        file="dist_subspace/placement/whole/engine.py",
        text="applied = finite and are_finite(gradients)",
        becomes="applied = finite",
        promise="A step with a gradient that is not finite is left out.",
        tests=[
            "tests/training/test_engine.py::test_a_step_with_one_gradient_that_is_not_finite_is_left_out_and_the_others_are_plain_"
            "torchs[None-1-inf]"
        ],
    ),
    Mutant(
        name="whole-takes-a-step-that-is-not-finite",
        file="dist_subspace/placement/whole/engine.py",
        text="applied = finite and are_finite(gradients)",
        becomes="applied = are_finite(gradients)",
        promise="A step whose loss is not finite changes nothing.",
        tests=["tests/training/test_engine.py::test_a_step_that_is_not_finite_changes_nothing_where_nothing_is_split"],
    ),
    Mutant(
        name="whole-keeps-gradients",
        file="dist_subspace/placement/whole/engine.py",
        text="        self.drop_gradients()\n        return applied",
        becomes="        return applied",
        promise="A step begins with gradients of zero.",
        tests=[f"{_EQUAL}[lora]"],
    ),
    Mutant(
        name="whole-leaves-idle-parameters",
        file="dist_subspace/placement/whole/engine.py",
        text="                parameter.grad = torch.zeros_like(parameter)",
        becomes="                parameter.grad = None",
        promise="A parameter that no micro-batch used moves by its momentum.",
        tests=[f"{_CHOICE}::test_a_parameter_that_no_micro_batch_used_moves_as_with_a_gradient_of_zero"],
    ),
    Mutant(
        name="whole-counts-steps-anew",
        file="dist_subspace/placement/whole/engine.py",
        text="            set_step(state, steps if stored else 0)",
        becomes="            set_step(state, 1)",
        promise="A resumed run of preset none goes on with the optimizer's counters.",
        tests=[f"{_RESUMED}[{_CLIPPED}]"],
    ),
    Mutant(
        name="whole-forgets-moments",
        file="dist_subspace/placement/whole/engine.py",
        text="        held.copy_(value.view(held.shape))",
        becomes="        held.copy_(value.view(held.shape) if key is None else 0 * held)",
        promise="A resumed run of preset none goes on with the optimizer's moments.",
        tests=[f"{_RESUMED}[{_CLIPPED}]"],
    ),
    Mutant(
        name="none-on-several-ranks",
        file="dist_subspace/placement/engines.py",
        text="    ranks = max(world().size, launchers.read(os.environ).size)",
        becomes="    ranks = 1",
        promise="Preset none is refused on several ranks.",
        tests=[f"{_CHOICE}::test_a_launcher_that_started_several_processes_is_seen_before_they_have_met"],
    ),
    Mutant(
        name="missing-deepspeed-not-refused",
        file="dist_subspace/placement/engines.py",
        text="    missing = deepspeed_is_missing()\n",
        becomes="    missing = None\n",
        promise="A preset of DeepSpeed is refused in one sentence where DeepSpeed cannot be imported.",
        tests=[f"{_CHOICE}::test_without_deepspeed_only_none_is_accepted"],
    ),
    Mutant(
        name="none-with-a-stock-json",
        file="dist_subspace/config/schema.py",
        text='if self.preset == "none" and self.config is not None:',
        becomes='if self.preset == "none" and self.config is None and self.nvme_path == "":',
        promise="Preset none together with a DeepSpeed JSON is refused.",
        tests=[f"{_CHOICE}::test_a_stock_json_together_with_none_is_refused"],
    ),
    Mutant(
        name="leaf-blocks-import-deepspeed",
        file="dist_subspace/placement/deepspeed/leaf_blocks.py",
        text="        block._z3_leaf = True",
        becomes='        __import__("deepspeed").utils.set_z3_leaf_module(block, True)',
        promise="attach works where DeepSpeed is not installed.",
        tests=[f"{_ABSENT}::test_the_python_interface_works_without_deepspeed[lora]"],
    ),
    Mutant(
        name="one-process-meets-by-deepspeed",
        file="dist_subspace/placement/process_group.py",
        text="    if is_distributed() or place.is_alone:",
        becomes="    if is_distributed():",
        promise="A run of preset none does not import DeepSpeed.",
        tests=[f"{_ABSENT}::test_a_run_and_a_merge_on_the_command_line_never_import_deepspeed[present]"],
    ),
]
