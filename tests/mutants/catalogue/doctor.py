"""Slips in the doctor: something that breaks and is not named, or is named where nothing is wrong."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="doctor-silent-on-other-versions",
        file="dist_subspace/doctor/versions.py",
        text="    must = name in MUST_BE_ALIKE\n",
        becomes="    must = name in ALIKE\n",
        promise="Another commit of this package, or another Python, on a node breaks a run, and the doctor says so.",
        tests=["tests/doctor/test_versions.py::test_what_computes_must_be_alike"],
    ),
    Mutant(
        name="doctor-takes-an-empty-folder-for-a-package",
        file="dist_subspace/doctor/versions.py",
        text='            if getattr(importlib.import_module(module), "__file__", None) is None:\n',
        becomes="            if importlib.import_module(module) is None:\n",
        promise="A package whose folder is empty counts as broken.",
        tests=["tests/doctor/test_versions.py"],
    ),
    Mutant(
        name="doctor-asks-one-way-alone",
        file="dist_subspace/doctor/command.py",
        text="                for a, b in ((node, other), (other, node))\n",
        becomes="                for a, b in ((node, other),)\n",
        promise="Of two nodes that do not reach each other, the one that the others do not reach either is left out.",
        tests=["tests/doctor/test_traffic.py::test_nodes_that_are_not_reached_by_the_others_are_left_out"],
    ),
    Mutant(
        name="doctor-trusts-a-connection-alone",
        file="dist_subspace/doctor/network.py",
        text='            return (None, seconds) if connection.recv(1) == b"k" else ("closed without an answer", None)\n',
        becomes="            return None, seconds\n",
        promise="A way that lets connections pass and large packets not is found.",
        tests=["tests/doctor/test_network.py::test_a_port_that_keeps_silent_is_given_up"],
    ),
    Mutant(
        name="doctor-waits-for-who-never-came",
        file="dist_subspace/doctor/attendance.py",
        text="            return now - self._began < self._patience\n",
        becomes="            return now - self._began < self._patience + 15\n",
        promise="A rank that never comes is not waited for beyond the patience.",
        tests=["tests/doctor/test_meeting.py::test_a_rank_that_never_comes_is_not_waited_for_beyond_the_patience"],
    ),
    Mutant(
        name="doctor-compares-free-space-with-one-checkpoint",
        file="dist_subspace/doctor/needs.py",
        text="    whole = None if count is None else count * checkpoint + adapter + 4 * factors + tokens\n",
        becomes="    whole = None if count is None else checkpoint + adapter + 4 * factors + tokens\n",
        promise="Free space is compared with all checkpoints that lie there at once.",
        tests=["tests/doctor/test_configuration.py::test_the_bytes_of_a_checkpoint_are_those_of_adapter_and_optimizer"],
    ),
    Mutant(
        name="doctor-asks-every-node-to-write-the-run",
        file="dist_subspace/doctor/folders.py",
        text='    breaks = use["writes"] == EACH_NODE or (use["writes"] == RANK_0 and rank == 0)\n',
        becomes='    breaks = use["writes"] in (EACH_NODE, RANK_0)\n',
        promise="Only rank 0's node must be able to write the run's folder.",
        tests=["tests/doctor/test_folders.py::test_only_rank_0_must_be_able_to_write_the_run"],
    ),
    Mutant(
        name="doctor-takes-the-round-trip-for-the-clock",
        file="dist_subspace/doctor/clocks.py",
        text='        away = abs(found["ahead"]) - found["error"]\n',
        becomes='        away = abs(found["ahead"])\n',
        promise="A clock is not called wrong for a round trip that was long.",
        tests=["tests/doctor/test_clocks.py::test_what_is_far_away_breaks"],
    ),
    Mutant(
        name="doctor-leaves-its-marks",
        file="dist_subspace/doctor/disks.py",
        text='            (Path(use["folder"]) / f"{MARK}{token}-{rank}").unlink()\n\n\ndef new_token',
        becomes="            pass\n\n\ndef new_token",
        promise="The doctor leaves nothing behind in the folders that it looks at.",
        tests=["tests/doctor/test_disks.py"],
    ),
    Mutant(
        name="doctor-libraries-on-the-screen",
        file="dist_subspace/doctor/screen.py",
        text="                os.dup2(unseen.fileno(), number)\n",
        becomes="                pass\n",
        promise="What libraries write does not stand in the doctor's JSON.",
        tests=["tests/doctor/test_command.py::test_what_libraries_write_does_not_come_between"],
    ),
]
