"""Which launcher started this process, which rank it is, and where the ranks meet: read from the environment, before torch is
imported, and written back in the names that torch and DeepSpeed read.

| launcher | is known by | rank, number of ranks | on its node: number, ranks | the ranks meet at |
|---|---|---|---|---|
| torchrun | TORCHELASTIC_RUN_ID | RANK, WORLD_SIZE | LOCAL_RANK, LOCAL_WORLD_SIZE | MASTER_ADDR, MASTER_PORT |
| deepspeed | CROSS_RANK, LOCAL_SIZE | RANK, WORLD_SIZE | LOCAL_RANK, LOCAL_SIZE | MASTER_ADDR, MASTER_PORT |
| by hand | RANK, WORLD_SIZE | RANK, WORLD_SIZE | LOCAL_RANK (or 0), LOCAL_WORLD_SIZE | MASTER_ADDR, MASTER_PORT |
| Open MPI | OMPI_COMM_WORLD_RANK | OMPI_COMM_WORLD_RANK, _SIZE | OMPI_COMM_WORLD_LOCAL_RANK, _LOCAL_SIZE | the host of mpirun |
| MPICH, Intel MPI | PMI_RANK | PMI_RANK, PMI_SIZE | MPI_LOCALRANKID, MPI_LOCALNRANKS | the first host of SLURM's job |
| srun | SLURM_STEP_ID | SLURM_PROCID, SLURM_STEP_NUM_TASKS | SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE | the step's first host |

MASTER_ADDR and MASTER_PORT win everywhere; ranks of one node meet at 127.0.0.1. Where several launchers have left their
variables, the first of this table has started the process: torchrun and deepspeed start processes of their own node, and are
started there by the others; mpirun goes through srun. A shell of SLURM's (sbatch, salloc) is no rank.
"""

from __future__ import annotations

import importlib.util
import os
import re
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

from dist_subspace.errors import UsageError

Variables = Mapping[str, str]
PORT = 29500  # where nothing tells two runs of one host apart; torch's and DeepSpeed's own
NODE_RANK = "DIST_SUBSPACE_LOCAL_RANK"  # the number on the node, where LOCAL_RANK must be another one: see `enter`


@dataclass(frozen=True)
class Place:
    """One rank among the others. `local_rank` is its number on its node; `address` is None where only MPI itself can tell it."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = None
    address: str | None = None
    port: int = PORT
    within: tuple[str, ...] = ()

    @property
    def is_alone(self) -> bool:
        """Nobody started this process as a rank."""
        return self.launcher == "none"

    def nested_text(self) -> str | None:
        """One line where several launchers left their variables; None where one did, or none."""
        if not self.within:
            return None
        return (
            f"started by {self.launcher} within {' within '.join(self.within)}: {self.launcher} says which rank this is"
        )


ALONE = Place("none")


def read(variables: Variables) -> Place:
    """Where this process stands by its environment.

    Raises:
        UsageError: variables that are half there, are no numbers, or contradict each other.
    """
    places = [place for reader in READERS if (place := reader(variables)) is not None]
    if not places:
        return ALONE
    first, *others = places
    for place in (first, *others[:1]):
        _check(place)
    if first.launcher == BY_HAND and others:
        _refuse_left_over(first, others[0])
    return replace(first, within=tuple(place.launcher for place in others))


def enter(variables: MutableMapping[str, str] = os.environ) -> Place:
    """Read the place, and write it as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Again: the same.

    A launcher that shows each rank one device alone (`srun --gpus-per-task=1`) makes that device number 0 for every rank:
    LOCAL_RANK, by which torch and DeepSpeed choose it, is 0 then, and the number on the node is kept beside it.
    """
    place = read(variables)
    if place.is_alone or place.address is None:
        return place
    written = {"RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_RANK": place.local_rank}
    if place.local_size is not None:
        written["LOCAL_WORLD_SIZE"] = place.local_size
    variables.update({name: str(value) for name, value in written.items()})
    variables.update({"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)})
    if place.local_rank and len(_listed(variables.get("CUDA_VISIBLE_DEVICES", ""))) == 1:
        variables.update({"LOCAL_RANK": "0", NODE_RANK: str(place.local_rank)})
    return place


def by_torchrun(variables: Variables) -> Place | None:
    return _standard("torchrun", "LOCAL_WORLD_SIZE", variables) if is_torchrun(variables) else None


def by_deepspeed(variables: Variables) -> Place | None:
    return _standard("deepspeed", "LOCAL_SIZE", variables) if is_deepspeed(variables) else None


BY_HAND = "RANK and WORLD_SIZE"


def by_hand(variables: Variables) -> Place | None:
    """A script or Kubernetes, one process at a time. A process that was alone leaves RANK=0, WORLD_SIZE=1 and no address to its
    children, which are alone too."""
    if is_torchrun(variables) or is_deepspeed(variables) or not {"RANK", "WORLD_SIZE"} & variables.keys():
        return None
    if variables.get("WORLD_SIZE") == "1" and not {"RANK", "MASTER_ADDR"} <= variables.keys():
        return None
    return _standard(BY_HAND, "LOCAL_WORLD_SIZE", variables)


def by_open_mpi(variables: Variables) -> Place | None:
    if "OMPI_COMM_WORLD_RANK" not in variables and "OMPI_COMM_WORLD_SIZE" not in variables:
        return None
    read = _Reader("Open MPI", "OMPI_COMM_WORLD_", variables)
    local_size = read.number("OMPI_COMM_WORLD_LOCAL_SIZE")
    # mpirun is its own first host, as a rule: "1263861760.0;tcp://10.77.0.1,192.168.0.1:46781".
    of_mpirun = re.search(r";tcp6?://(\[[^\]]+\]|[^,:]+)", variables.get("OMPI_MCA_orte_hnp_uri", ""))
    return read.place(
        read.number("OMPI_COMM_WORLD_RANK"),
        read.number("OMPI_COMM_WORLD_SIZE"),
        read.number("OMPI_COMM_WORLD_LOCAL_RANK"),
        local_size,
        address=of_mpirun[1].strip("[]") if of_mpirun else None,
        job=variables.get("OMPI_MCA_ess_base_jobid") or variables.get("PMIX_NAMESPACE"),
    )


def by_mpich(variables: Variables) -> Place | None:
    """MPICH's, and what is built on it. A SLURM with PMI sets the first two as well, and is read as srun."""
    if "PMI_RANK" not in variables and "PMI_SIZE" not in variables:
        return None
    if _step(variables) is not None and "MPI_LOCALRANKID" not in variables:
        return None
    read = _Reader("MPICH", "PMI_", variables)
    local_size = read.number("MPI_LOCALNRANKS") if "MPI_LOCALNRANKS" in variables else None
    address, job = variables.get("SLURM_JOB_NODELIST"), variables.get("SLURM_JOB_ID")
    return read.place(
        read.number("PMI_RANK"),
        read.number("PMI_SIZE"),
        read.number("MPI_LOCALRANKID"),
        local_size,
        address=first_host(address) if address else None,
        job=job,
    )


def by_srun(variables: Variables) -> Place | None:
    """A task of a step."""
    step = _step(variables)
    if step is None:
        return None
    read = _Reader("srun", "SLURM_STEP_", variables)
    node = read.number("SLURM_NODEID")
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    return read.place(
        read.number("SLURM_PROCID"),
        read.number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"),
        read.number("SLURM_LOCALID"),
        tasks_of_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""), node),
        address=first_host(nodes) if nodes else None,
        job=f"{variables.get('SLURM_JOB_ID')}.{step}",
    )


def is_first(variables: Variables = os.environ) -> bool:
    """Whether this is rank 0 by the launcher's environment, before there is a process group; whole or not."""
    step = ("SLURM_PROCID",) if _step(variables) is not None else ()
    ranks = [variables[name] for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", *step) if name in variables]
    return not ranks or ranks[0] == "0"


READERS: tuple[Callable[[Variables], Place | None], ...] = (
    by_torchrun,
    by_deepspeed,
    by_hand,
    by_open_mpi,
    by_mpich,
    by_srun,
)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The command line without what the deepspeed launcher adds (`--local_rank=N`), which is in the environment too."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: node1 of "node[1-3,7],other", gpu-003-a of "gpu-[003-010]-a"."""
    outer = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes.strip())
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", outer[0]) if outer else nodes


def tasks_of_node(tasks: str, node: int) -> int | None:
    """How many tasks a node has, by SLURM's list of them: "2(x3),1"; None where the list does not say."""
    counts = [
        int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", tasks) for _ in range(int(times or 1))
    ]
    return counts[node] if node < len(counts) else None


class _Reader:
    """Numbers of one launcher's variables, and the place that they make. `prefix` is that of a variable by which it is known."""

    def __init__(self, launcher: str, prefix: str, variables: Variables) -> None:
        self.launcher, self.prefix, self.variables = launcher, prefix, variables

    def number(self, name: str) -> int:
        value = self.variables.get(name)
        if value is None:
            there = min(other for other in self.variables if other.startswith(self.prefix))
            raise UsageError(f"{name} is not set, and {there} is {self.variables[there]!r}; {_ACCEPTED}")
        if not value.strip().isdecimal():
            raise UsageError(f"{name} is {value!r}; accepted: a number from 0 on")
        return int(value)

    def place(
        self, rank: int, size: int, local_rank: int, local_size: int | None, address: str | None, job: str | None = None
    ) -> Place:
        """`address`, and a port that the job's number gives, hold where MASTER_ADDR and MASTER_PORT are not set."""
        if size == local_size:
            address = "127.0.0.1"
        port = self.number("MASTER_PORT") if "MASTER_PORT" in self.variables else port_of(job)
        address = self.variables.get("MASTER_ADDR") or address
        return Place(self.launcher, rank, size, local_rank, local_size, address, port)


_ACCEPTED = "accepted: all of them, as the launcher sets them, or none"


def port_of(job: str | None) -> int:
    """A port that two jobs of one host do not share, as a rule; outside the range that systems give to connections."""
    return PORT if job is None else 15000 + zlib.crc32(job.encode()) % 15000


def _standard(launcher: str, local_size: str, variables: Variables) -> Place:
    read = _Reader(launcher, "RANK" if "RANK" in variables else "WORLD_SIZE", variables)
    rank, size = read.number("RANK"), read.number("WORLD_SIZE")
    local = NODE_RANK if NODE_RANK in variables else "LOCAL_RANK"
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not variables.get(name):
            raise UsageError(f"{name} is not set, and RANK is {rank} of {size}: the ranks would not meet; {_ACCEPTED}")
    return read.place(
        rank,
        size,
        read.number(local) if local in variables or launcher != BY_HAND else 0,
        read.number(local_size) if local_size in variables else None,
        address=None,
    )


def _step(variables: Variables) -> str | None:
    """SLURM's step. The shell of sbatch has SLURM_PROCID too, but no step, or one with a number near 2**32."""
    step = variables.get("SLURM_STEP_ID", "")
    return step if step.isdecimal() and int(step) < 0xFFFFFFF0 else None


def is_torchrun(variables: Variables) -> bool:
    """Also of what is built on it (accelerate launch)."""
    return "TORCHELASTIC_RUN_ID" in variables


def is_deepspeed(variables: Variables) -> bool:
    return "CROSS_RANK" in variables and "LOCAL_SIZE" in variables


def _check(place: Place) -> None:
    of = f"by the variables of {place.launcher}"
    if place.rank >= place.size:
        raise UsageError(f"rank {place.rank} of {place.size} {of}; accepted: ranks from 0 to {place.size - 1}")
    if place.local_size is not None and place.local_rank >= place.local_size:
        raise UsageError(
            f"rank {place.rank} is number {place.local_rank} of {place.local_size} on its node {of}; "
            f"accepted: numbers from 0 to {place.local_size - 1}"
        )
    if place.address is None and importlib.util.find_spec("mpi4py") is None:
        raise UsageError(
            f"{place.launcher} started {place.size} ranks on several nodes, and MASTER_ADDR is not set; accepted: MASTER_ADDR, "
            "the host of rank 0, for every rank (launch/mpirun.sh does it), or the package mpi4py"
        )
    if not 0 < place.port < 2**16:
        raise UsageError(f"MASTER_PORT is {place.port}; accepted: 1 to 65535")


def _refuse_left_over(by_hand: Place, other: Place) -> None:
    """RANK and WORLD_SIZE may be left over from another run; a script below a launcher starts as many ranks as that, or more."""
    if by_hand.size < other.size or (by_hand.size == other.size and by_hand.rank != other.rank):
        raise UsageError(
            f"RANK is {by_hand.rank} of {by_hand.size}, and {other.launcher} says rank {other.rank} of {other.size}; "
            f"accepted: variables that agree, or those of {other.launcher} alone (unset RANK WORLD_SIZE)"
        )


def _listed(devices: str) -> list[str]:
    return [device for device in devices.split(",") if device.strip()]
