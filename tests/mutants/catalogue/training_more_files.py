"""Beside the loop: checkpoints, the hold on a folder, fingerprints, stops, adapters to begin with."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="set-aside-wins-over-the-new-one",
        file="dist_subspace/run_folder/folder.py",
        text="folders.setdefault(int(match[1]), path)",
        becomes="folders[int(match[1])] = path",
        promise="A checkpoint that has its name counts, not the former one that was set aside.",
        tests=[
            "tests/checkpoint/test_store.py::test_one_that_was_set_aside_never_stands_for_the_one_that_has_its_name"
        ],
    ),
    Mutant(
        name="leftover-of-a-step-in-the-way",
        file="dist_subspace/checkpoint/store.py",
        text="        _clear_leftovers(run, step)\n        partial.mkdir()",
        becomes="        partial.mkdir()",
        promise="A checkpoint is written whatever a killed process left of its step.",
        tests=["tests/checkpoint/test_store.py::test_what_a_killed_process_left_of_a_step_does_not_stand_in_its_way"],
    ),
    Mutant(
        name="heartbeat-file-of-all",
        file="dist_subspace/run_folder/status.py",
        text='writer=".heartbeat" if "heartbeat" in more else ""',
        becomes='writer=""',
        promise="The heartbeat and a failing rank write their status through files of their own.",
        tests=[
            "tests/run_folder/test_status.py::test_a_heartbeat_and_a_rank_that_fails_at_the_same_moment_do_not_write_into_one_file"
        ],
    ),
    Mutant(
        name="clock-that-is-ahead-is-young-for-ever",
        file="dist_subspace/checkpoint/occupancy.py",
        text="return abs(time.time() - datetime",
        becomes="return (time.time() - datetime",
        promise="A heartbeat from a clock that is far ahead does not keep a folder.",
        tests=["tests/checkpoint/test_occupancy.py::test_a_young_heartbeat_of_another_host_is_refused_with_what_to_do"],
    ),
    Mutant(
        name="former-holders-name-stays",
        file="dist_subspace/checkpoint/occupancy.py",
        text="    os.ftruncate(descriptor, 0)\n",
        becomes="",
        promise="The lock of a folder names its holder alone.",
        tests=["tests/checkpoint/test_occupancy.py::test_the_lock_names_its_holder_and_nothing_of_a_former_one"],
    ),
    Mutant(
        name="heartbeat-ends-on-a-full-disk",
        file="dist_subspace/checkpoint/occupancy.py",
        text="                    continue  # a full disk",
        becomes="                    return  # a full disk",
        promise="The heartbeat goes on after a disk that refused for a while.",
        tests=["tests/checkpoint/test_occupancy.py::test_the_heartbeat_outlives_a_disk_that_refuses_for_a_while"],
    ),
    Mutant(
        name="unknown-error-of-a-lock-is-no-lock",
        file="dist_subspace/checkpoint/occupancy.py",
        text="        if error.errno in _NO_LOCKS:",
        becomes="        if error.errno not in (errno.EAGAIN, errno.EACCES):",
        promise="An error of the disk does not pass for a disk without locks.",
        tests=[
            "tests/checkpoint/test_occupancy.py::test_an_error_of_the_disk_while_it_is_locked_does_not_pass_for_a_disk_without_locks"
        ],
    ),
    Mutant(
        name="relative-checkpoint-is-elsewhere",
        file="dist_subspace/run_folder/folder.py",
        text="checkpoint.resolve().parent == self.path.resolve()",
        becomes="checkpoint.parent == self.path",
        promise="A checkpoint of the run is its own however its place is spelled; it is not set aside.",
        tests=[
            "tests/checkpoint/test_set_aside.py::test_the_newest_checkpoint_is_the_runs_own_however_its_place_is_spelled"
        ],
    ),
    Mutant(
        name="metadata-counts",
        file="dist_subspace/checkpoint/fingerprint.py",
        text="            handle.seek(start)\n            while",
        becomes="            while",
        promise="The metadata of a weights file are no part of the model.",
        tests=[
            "tests/checkpoint/test_fingerprint.py::test_the_same_tensors_with_a_header_in_other_words_are_the_same_model"
        ],
    ),
    Mutant(
        name="order-of-tensors-counts",
        file="dist_subspace/checkpoint/fingerprint.py",
        text="return sorted(tensors), 8 + length",
        becomes="return tensors, 8 + length",
        promise="The order of a weights file's header is no part of the model.",
        tests=[
            "tests/checkpoint/test_fingerprint.py::test_the_same_tensors_with_a_header_in_other_words_are_the_same_model"
        ],
    ),
    Mutant(
        name="samples-at-the-begin-alone",
        file="dist_subspace/checkpoint/fingerprint.py",
        text="start + number * stride",
        becomes="start",
        promise="A large file is sampled all over.",
        tests=["tests/checkpoint/test_fingerprint.py::test_a_large_file_is_sampled_at_both_ends_and_between"],
    ),
    Mutant(
        name="published-for-the-owner-alone",
        file="dist_subspace/atomic_files.py",
        text="                path.chmod(0o644)  #",
        becomes="                pass  #",
        promise="Published files can be read by others.",
        tests=["tests/test_atomic_files.py::test_what_is_published_can_be_read_by_others"],
    ),
    Mutant(
        name="last-reason-stays",
        file="dist_subspace/stopping.py",
        text="        if self.reason is None:\n            self.since = time.monotonic()",
        becomes="        if True:\n            self.since = time.monotonic()",
        promise="The first reason of a stop stays.",
        tests=["tests/test_stopping.py::test_what_a_stop_interrupts_cleans_up_in_peace_and_the_first_reason_stays"],
    ),
    Mutant(
        name="raises-in-the-clean-up-again",
        file="dist_subspace/stopping.py",
        text="            self._may_raise = False\n            raise Interrupted",
        becomes="            raise Interrupted",
        promise="What a stop interrupts cleans up in peace.",
        tests=["tests/test_stopping.py::test_what_a_stop_interrupts_cleans_up_in_peace_and_the_first_reason_stays"],
    ),
    Mutant(
        name="inner-block-ends-the-outer",
        file="dist_subspace/stopping.py",
        text="            yield\n        finally:\n            self._leavable = before",
        becomes="            yield\n        finally:\n            self._leavable = False",
        promise="An inner block in which nothing is lost does not end the outer one.",
        tests=["tests/test_stopping.py::test_an_inner_block_that_is_over_does_not_end_the_outer_one"],
    ),
    Mutant(
        name="inner-interruptible-ends-the-outer",
        file="dist_subspace/stopping.py",
        text="            yield\n        finally:\n            self._may_raise = before",
        becomes="            yield\n        finally:\n            self._may_raise = False",
        promise="An inner block that may be interrupted does not end the outer one.",
        tests=["tests/test_stopping.py::test_an_inner_block_that_is_over_does_not_end_the_outer_one"],
    ),
    Mutant(
        name="leavable-for-ever",
        file="dist_subspace/stopping.py",
        text="            yield\n        finally:\n            self._leavable = before",
        becomes="            yield\n        finally:\n            self._leavable = True",
        promise="Behind a block in which nothing is lost a stop interrupts nothing.",
        tests=["tests/test_stopping.py::test_an_inner_block_that_is_over_does_not_end_the_outer_one"],
    ),
    Mutant(
        name="alpha-pattern-not-compared",
        file="dist_subspace/training/beginning.py",
        text='("method", "rank", "alpha", "rank_pattern", "alpha_pattern")',
        becomes='("method", "rank", "alpha", "rank_pattern")',
        promise="A run that begins with an adapter refuses another alpha_pattern.",
        tests=["tests/training/test_beginning.py::test_what_contradicts_the_adapter_is_refused_naming_both"],
    ),
]
