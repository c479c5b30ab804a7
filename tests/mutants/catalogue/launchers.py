"""Slips in reading who started this process, and in the ranks' first meeting."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FILE = "dist_subspace/launchers.py"
MEETING = "dist_subspace/placement/rendezvous.py"
READ = "tests/test_launchers.py"
MET = "tests/placement/test_rendezvous.py"

MUTANTS = [
    Mutant(
        name="shell-of-sbatch-is-a-rank",
        file=FILE,
        text="    return step if step.isdecimal() and int(step) < 0xFFFFFFF0 else None",
        becomes="    return step if step.isdecimal() else None",
        promise="A shell of SLURM's is no rank.",
        tests=[f"{READ}::test_a_launchers_variables_are_a_place"],
    ),
    Mutant(
        name="slurm-meets-at-the-jobs-first-host",
        file=FILE,
        text='variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")',
        becomes='variables.get("SLURM_JOB_NODELIST")',
        promise="The ranks of a step meet at a host of the step.",
        tests=[f"{READ}::test_where_the_ranks_meet_is_found_out"],
    ),
    Mutant(
        name="outer-launcher-believed",
        file=FILE,
        text="    by_torchrun,\n    by_deepspeed,\n    by_hand,\n    by_open_mpi,\n    by_mpich,\n    by_srun,\n",
        becomes="    by_open_mpi,\n    by_mpich,\n    by_srun,\n    by_torchrun,\n    by_deepspeed,\n    by_hand,\n",
        promise="Of nested launchers the inner one says which rank this is.",
        tests=[f"{READ}::test_of_several_launchers_the_one_that_started_the_process_is_believed_and_named"],
    ),
    Mutant(
        name="left-over-rank-believed",
        file=FILE,
        text="    if first.launcher == BY_HAND and others:\n",
        becomes="    if False:\n",
        promise="RANK and WORLD_SIZE of another run are refused, and do not make several runs of one rank.",
        tests=[f"{READ}::test_variables_that_are_half_there_or_contradict_each_other_are_a_sentence"],
    ),
    Mutant(
        name="one-device-each-at-its-number-on-the-node",
        file=FILE,
        text='        variables.update({"LOCAL_RANK": "0", NODE_RANK: str(place.local_rank)})\n',
        becomes="        pass\n",
        promise="A rank that is shown one device alone computes on it.",
        tests=[f"{READ}::test_a_rank_that_sees_one_device_alone_computes_there_and_keeps_its_number_on_the_node"],
    ),
    Mutant(
        name="two-ranks-with-one-number",
        file=MEETING,
        text="        if signed != text:\n",
        becomes="        if False:\n",
        promise="Two processes with one number are named; nobody waits for the number that is missing.",
        tests=[f"{MET}::test_two_processes_with_one_number_are_named"],
    ),
    Mutant(
        name="another-package-on-a-node",
        file=MEETING,
        text='                if first["alike"].get(name) != value:\n',
        becomes="                if False:\n",
        promise="A node with another package is named before a model is read.",
        tests=[f"{MET}::test_a_node_with_another_package_is_named_before_anything_else_is_done"],
    ),
]
