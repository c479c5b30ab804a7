"""Every launcher's environment is read as that launcher means it, and one that no launcher makes is a sentence. The variables are
those that the real programs set (tests/cluster runs them); what nothing here reads is left out."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dist_subspace import launchers
from dist_subspace.errors import UsageError
from dist_subspace.launchers import NODE_RANK, PORT, Place, enter, first_host, is_first, read, tasks_of_node
from tests.ranks import ROOT, free_port

MEETING = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29400"}
# deepspeed 0.19: three ranks, one and two a node.
DEEPSPEED = (
    MEETING
    | {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    | {"LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
)
# torchrun of torch 2.13.
TORCHRUN = MEETING | {
    **{"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "ROLE_RANK": "2"},
    **{"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
}
BY_HAND = MEETING | {"RANK": "1", "WORLD_SIZE": "2"}
# Open MPI 4.1: mpirun -H node1:1,node2:2 on node1.
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1"},
    **{"OMPI_MCA_ess_base_jobid": "1263861761", "OMPI_MCA_orte_hnp_uri": "1263861760.0;tcp://10.77.0.1:46781"},
    **{"PMIX_NAMESPACE": "1263861761", "PMIX_RANK": "2", "PMIX_SERVER_URI4": "1263861760.1;tcp4://127.0.0.1:55507"},
}
# MPICH 4.0, and so Intel MPI: mpiexec -hosts node1:1,node2:2 -np 3.
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "6"}
# SLURM 22.05: sbatch of three nodes, in it srun --nodes=2 --ntasks=3.
SBATCH = {
    **{
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    },
    **{"SLURM_NTASKS": "6", "SLURM_NPROCS": "6", "SLURM_NNODES": "3", "SLURM_TASKS_PER_NODE": "2(x3)"},
}
SRUN = SBATCH | {
    **{
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "3",
    },
    **{"SLURM_STEP_NODELIST": "node[2-3]", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NUM_NODES": "2"},
}
LAUNCHED = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "Open MPI": OPEN_MPI, "MPICH": MPICH | MEETING, "srun": SRUN}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place("none")),
        (DEEPSPEED, Place("deepspeed", 2, 3, 1, 2, "10.77.0.1", 29400)),
        (TORCHRUN, Place("torchrun", 2, 3, 1, 2, "10.77.0.1", 29400)),
        (BY_HAND, Place(launchers.BY_HAND, 1, 2, 0, None, "10.77.0.1", 29400)),
        (OPEN_MPI | MEETING, Place("Open MPI", 2, 3, 1, 2, "10.77.0.1", 29400)),
        (MPICH | MEETING, Place("MPICH", 2, 3, 1, 2, "10.77.0.1", 29400)),
        (SRUN | MEETING, Place("srun", 2, 3, 0, 1, "10.77.0.1", 29400)),
        (SBATCH, Place("none")),  # its shell starts one process, which is no rank
        (SBATCH | {"SLURM_STEP_ID": "4294967291"}, Place("none")),  # as newer ones number that shell
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place("none")),  # left by a process that was alone
        ({"WORLD_SIZE": "1"}, Place("none")),
        ({"LOCAL_RANK": "1"}, Place("none")),
    ],
    ids=str,
)
def test_a_launchers_variables_are_a_place(variables: dict[str, str], place: Place) -> None:
    assert read(variables) == place


def test_where_the_ranks_meet_is_found_out() -> None:
    srun = read(SRUN)
    assert srun.address == "node2"  # the step's first host, not the job's
    assert read(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).port == srun.port != PORT
    assert read(SRUN | {"SLURM_STEP_ID": "1"}).port != srun.port != read(SRUN | {"SLURM_JOB_ID": "8"}).port
    assert 15000 <= srun.port < 30000
    assert read(OPEN_MPI).address == "10.77.0.1"
    assert read(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1]:1024"}).address == "fe80::1"
    assert read(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.9,192.168.0.1:1024"}).address == "10.0.0.9"
    assert read(MPICH | {"MPI_LOCALNRANKS": "3"}).address == "127.0.0.1"  # all on one node
    assert read(MPICH | {"SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "7"}).address == "gpu07"
    for variables in (SRUN, OPEN_MPI, MPICH):
        assert read(variables | {"MASTER_ADDR": "there", "MASTER_PORT": "1"}).address == "there"


def test_of_several_launchers_the_one_that_started_the_process_is_believed_and_named() -> None:
    order = list(LAUNCHED)
    for inner, outer in itertools.combinations(order, 2):
        variables = LAUNCHED[outer] | LAUNCHED[inner]
        if {inner, outer} == {"torchrun", "deepspeed"}:
            continue  # both write the same variables
        place = read(variables)
        assert place.launcher == inner and place.within == (outer,)
        assert place.nested_text() == f"started by {inner} within {outer}: {inner} says which rank this is"
    within_both = read(TORCHRUN | OPEN_MPI | SRUN)
    assert within_both.within == ("Open MPI", "srun") and "within Open MPI within srun" in str(
        within_both.nested_text()
    )
    assert read(SRUN).nested_text() is None
    # SLURM with PMI: its own tasks, and no mpiexec between.
    by_slurm = read(SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_JOBID": "7.0"})
    assert by_slurm.launcher == "srun" and not by_slurm.within


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"RANK": "1"},
            "WORLD_SIZE is not set, and RANK is '1'; accepted: all of them, as the launcher sets them, or none",
        ),
        ({"RANK": "0"}, "WORLD_SIZE is not set, and RANK is '0'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, and WORLD_SIZE is '2'"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set, and RANK is 1 of 2: the ranks would not meet"),
        (BY_HAND | {"MASTER_PORT": ""}, "MASTER_PORT is not set, and RANK is 1 of 2"),
        (BY_HAND | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; accepted: 1 to 65535"),
        (BY_HAND | {"RANK": "one"}, "RANK is 'one'; accepted: a number from 0 on"),
        (BY_HAND | {"RANK": "-1"}, "RANK is '-1'"),
        (BY_HAND | {"RANK": "2"}, "rank 2 of 2 by the variables of RANK and WORLD_SIZE; accepted: ranks from 0 to 1"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "rank 2 is number 2 of 2 on its node by the variables of torchrun"),
        (
            {k: v for k, v in OPEN_MPI.items() if k != "OMPI_COMM_WORLD_SIZE"},
            "OMPI_COMM_WORLD_SIZE is not set, and OMPI_",
        ),
        ({k: v for k, v in MPICH.items() if k != "PMI_RANK"}, "PMI_RANK is not set, and PMI_FD is '6'"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_PROCID is not set, and SLURM_STEP_ID is '0'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "3"}, "rank 3 of 3 by the variables of Open MPI"),
        (MPICH, "MPICH started 3 ranks on several nodes, and MASTER_ADDR is not set"),
        (BY_HAND | {"RANK": "0", "WORLD_SIZE": "1"} | SRUN, "RANK is 0 of 1, and srun says rank 2 of 3"),
        (BY_HAND | {"RANK": "1", "WORLD_SIZE": "3"} | OPEN_MPI, "RANK is 1 of 3, and Open MPI says rank 2 of 3"),
    ],
    ids=str,
)
def test_variables_that_are_half_there_or_contradict_each_other_are_a_sentence(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as if mpi4py, which could tell, were not there
    with pytest.raises(UsageError) as refused:
        read(variables)
    assert sentence in str(refused.value) and "accepted: " in str(refused.value)


def test_a_script_below_a_launcher_may_start_more_ranks_than_it() -> None:
    own = BY_HAND | {"RANK": "5", "WORLD_SIZE": "6"}
    assert read(own | SRUN).rank == 5
    assert read(BY_HAND | {"RANK": "2", "WORLD_SIZE": "3"} | SRUN).size == 3  # and may repeat what it says


def test_what_is_read_is_written_as_torch_and_deepspeed_read_it_and_once_more_changes_nothing() -> None:
    variables = dict(SRUN)
    place = enter(variables)
    wanted = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node2"}
    assert variables == SRUN | wanted | {"MASTER_PORT": str(place.port)}
    again = dict(variables)
    assert enter(again).rank == 2 and again == variables
    alone: dict[str, str] = {}
    assert enter(alone).is_alone and alone == {}


def test_a_rank_that_sees_one_device_alone_computes_there_and_keeps_its_number_on_the_node() -> None:
    variables = OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "3"}
    for _ in range(2):
        assert enter(variables).local_rank == 1
        assert variables["LOCAL_RANK"] == "0" and variables[NODE_RANK] == "1"
        assert variables["CUDA_VISIBLE_DEVICES"] == "3"
    several = OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "2,3"}
    enter(several)
    assert several["LOCAL_RANK"] == "1" and NODE_RANK not in several


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1"),
        ("node[2,4-5],other", "node2"),
        ("gpu-[003-010]-a,gpu-020", "gpu-003-a"),
        ("r[1-2]n[05-06]", "r1n05"),
        ("a,b", "a"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_nodes_tasks_by_slurms_list() -> None:
    assert [tasks_of_node("2(x2),1", node) for node in range(4)] == [2, 2, 1, None]
    assert tasks_of_node("8", 0) == 8 and tasks_of_node("", 0) is None


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({"PMI_RANK": "1"}, False),
        ({"PMI_RANK": "0"}, True),
        (SRUN, False),
        (SBATCH | {"SLURM_PROCID": "1"}, True),  # no step: no rank
        ({"RANK": "0"} | SRUN, True),
    ],
    ids=str,
)
def test_rank_0_is_known_before_anything_is_checked(variables: dict[str, str], first: bool) -> None:
    assert is_first(variables) is first


def test_the_module_is_read_without_torch() -> None:
    script = "import sys, dist_subspace.launchers; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0


def test_a_refusal_comes_before_the_libraries_are_imported() -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "none.yaml"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "RANK": "3", "WORLD_SIZE": "2"} | MEETING
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: rank 3 of 2 by the variables of RANK and WORLD_SIZE; accepted: ranks from 0 to 1\n"


def test_a_node_without_the_package_is_named(tmp_path: Path) -> None:
    """A Python of its own that finds neither the package nor what it needs."""
    script = tmp_path / "train.py"
    script.write_text((ROOT / "launch" / "train.py").read_text())
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "none.yaml"], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert (
        done.stderr.startswith(f"error: {socket.gethostname()}: No module named 'dist_subspace")
        and sys.executable in done.stderr
    )


def test_a_port_that_is_in_use_is_one_sentence() -> None:
    """The store is not even tried: its C++ code would write a page."""
    with socket.socket() as other:
        port = free_port()
        other.bind(("", port))
        other.listen()
        script = (
            "import sys; from dist_subspace.launchers import enter; from dist_subspace.placement.rendezvous import met\n"
            "from dist_subspace.errors import UsageError\n"
            "try:\n    met(enter(), 5.0, {}).__enter__()\n"
            "except UsageError as error: sys.exit(str(error))\n"
        )
        environment = {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"port {port} of ") and "accepted: another MASTER_PORT" in done.stderr
