"""Ranks that are lost, and what ranks say: signs of life, last words, and logs of their own."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_HEARTBEAT, _PEERS = "dist_subspace/placement/heartbeat.py", "dist_subspace/placement/peers.py"
_BEATS, _LOST = "tests/placement/test_heartbeat.py", "tests/faults/test_lost_ranks.py"
_LOGS, _WORDS = "dist_subspace/training/rank_logs.py", "dist_subspace/training/last_words.py"
_OWN_LOG = "tests/training/test_rank_logs.py"

MUTANTS = [
    Mutant(
        name="joined-without-the-others",
        file=_PEERS,
        text="    peers.know_all(_TO_JOIN)\n",
        becomes="",
        promise="A rank that is killed in a run's first moment is named.",
        tests=[
            "tests/placement/test_peers.py::test_ranks_that_have_joined_know_each_other_before_a_sign_of_life_was_given"
        ],
    ),
    Mutant(
        name="silent-ranks-not-lost",
        file=_HEARTBEAT,
        text="        if len(ended) < len(gone):\n",
        becomes="        if len(ended) > len(gone):\n",
        promise="A rank without a sign of life is lost, and the others leave.",
        tests=[f"{_BEATS}::test_a_rank_that_falls_silent_is_lost_and_who_is_left_says_so_and_leaves_with_that_status"],
    ),
    Mutant(
        name="watcher-not-watched",
        file=_HEARTBEAT,
        text="        silent = self._answer.look(self._rounds)\n",
        becomes="        silent = self._answer.look(object())\n",
        promise="A store that keeps who asks is noticed, as when rank 0's host has vanished.",
        tests=[f"{_BEATS}::test_a_store_that_keeps_who_asks_is_noticed_by_the_thread_that_waits_for_nobody"],
    ),
    Mutant(
        name="no-time-to-leave",
        file=_HEARTBEAT,
        text="timeout - max(_TO_LEAVE, _SHARE * timeout)",
        becomes="timeout",
        promise="Ranks have left within training.rank_timeout, last words included.",
        tests=[f"{_BEATS}::test_most_of_the_timeout_is_waited_and_the_rest_is_kept_for_the_last_words[300.0-240.0]"],
    ),
    Mutant(
        name="pause-of-the-listener-counts",
        file="dist_subspace/placement/silence.py",
        text="min(now - self._looked, self._longest)",
        becomes="now - self._looked",
        promise="A rank that was stopped itself blames nobody for what it did not listen to.",
        tests=["tests/placement/test_silence.py::test_a_pause_of_the_listener_itself_counts_as_one_look"],
    ),
    Mutant(
        name="rank-that-left-in-order-lost",
        file=_PEERS,
        text='return not self._has(f"bye/{peer.rank}")',
        becomes="return True",
        promise="A rank whose run is over is not missed.",
        tests=[f"{_BEATS}::test_silence_is_no_loss_where_it_is_not_watched_or_the_rank_has_left_in_order[10.0-True]"],
    ),
    Mutant(
        name="waits-for-who-has-left",
        file=_PEERS,
        text=' or self._has(f"bye/{rank}")',
        becomes="",
        promise="A rank that has said why the run ends waits for none that has left.",
        tests=["tests/placement/test_peers.py"],
    ),
    Mutant(
        name="met-by-nobody",
        file="dist_subspace/placement/collectives.py",
        text="if _peers is not None and _peers.told is not None:",
        becomes="if _peers is None:",
        promise="Who waits in a meeting leaves as soon as another rank has said why the run ends.",
        tests=[
            "tests/faults/test_agreement.py::test_a_rank_that_fails_alone_in_a_run_ends_all_with_its_one_sentence"
            "[training-model-_attached-attach_method]"
        ],
    ),
    Mutant(
        name="collectives-run-out-first",
        file="dist_subspace/placement/process_group.py",
        text="set_collective_timeout(timedelta(seconds=max(made, 2 * rank_timeout)))",
        becomes="timedelta(seconds=max(made, 2 * rank_timeout))",
        promise="No collective runs out without a name before the heartbeat says who was lost.",
        tests=["tests/faults/test_waiting.py::test_a_collective_waits_longer_than_a_rank_may_be_silent"],
    ),
    Mutant(
        name="last-word-overwritten",
        file="dist_subspace/training/run_status.py",
        text="                    if not self.is_running():",
        becomes="                    if not self.sees_folder():",
        promise="The first that says why the run ended stays in status.json.",
        tests=[f"{_LOST}::test_a_rank_that_is_stopped_is_named_in_time_and_leaves_too_when_it_wakes_up"],
    ),
    Mutant(
        name="errors-stay-on-the-screen",
        file=_LOGS,
        text="        for number in descriptors:\n",
        becomes="        for number in descriptors[:1]:\n",
        promise="What libraries write to standard error on another rank goes into its log.",
        tests=[f"{_OWN_LOG}::test_what_is_said_goes_into_the_log_and_only_the_last_word_onto_the_screen"],
    ),
    Mutant(
        name="log-grows-without-end",
        file=_LOGS,
        text="                _cut_large(self.path)\n",
        becomes="                pass\n",
        promise="A rank's log is cut while it is written.",
        tests=[f"{_OWN_LOG}::test_a_log_does_not_grow_without_an_end"],
    ),
    Mutant(
        name="killed-rank-s-log-not-kept",
        file=_WORDS,
        text="        keep_logs(run)\n        tell_peers(status)\n",
        becomes="        tell_peers(status)\n",
        promise="The end of a killed rank's log comes into RUN/logs.",
        tests=[f"{_LOST}::test_what_a_failing_rank_said_is_in_its_own_log_and_the_end_of_it_in_the_run_s_folder[kill]"],
    ),
    Mutant(
        name="restarted-ranks-look-for-those-before-them",
        file="dist_subspace/placement/store.py",
        text="    if not is_kept() or place.address is None:\n",
        becomes="    if True:\n",
        promise="Ranks that torchrun starts again connect to each other, and not to the addresses of the earlier ones.",
        tests=["tests/placement/test_store.py::test_ranks_that_are_started_again_do_not_look_for_those_before_them"],
    ),
    Mutant(
        name="attempts-counted-by-each-agent-for-itself",
        file="dist_subspace/placement/store.py",
        text='"0") if is_kept(variables) else "0"',
        becomes='"0")',
        promise="Agents that count restarts differently do not keep the ranks apart.",
        tests=["tests/placement/test_store.py::test_attempts_are_told_apart_where_the_store_is_kept"],
    ),
    Mutant(
        name="frames-of-the-main-thread-at-every-beat",
        file="dist_subspace/placement/peers.py",
        text='asked = not self._asks and self._has("where")',
        becomes="asked = True",
        promise="A sign of life does not disturb what the main thread computes.",
        tests=["tests/placement/test_heartbeat.py"],
    ),
]
