"""The end of the process group: with a command of ours, and never with a call from a program that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import run_lines


@pytest.mark.parametrize("ends", [True, False])
def test_a_command_ends_its_group_and_a_program_that_calls_commands_keeps_it(ends: bool, tmp_path: Path) -> None:
    """The group is torch's own, of one rank, in a process of its own."""
    done = run_lines(
        f"""
import torch
from dist_subspace.placement import process_group
assert process_group.ENDS_WITH_COMMAND, "what is called by nobody is a command"
process_group.ENDS_WITH_COMMAND = {ends}
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)
process_group.leave_process_group()
assert torch.distributed.is_initialized() is {not ends}
if not {ends}:
    torch.distributed.all_reduce(torch.ones(1))
    torch.distributed.destroy_process_group()
"""
    )
    assert done.returncode == 0, done.stderr
