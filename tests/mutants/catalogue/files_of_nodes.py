"""Files on many nodes: who sees, makes, reads and compares them, and what the Hub is asked for."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_SEEN, _LOCAL = "dist_subspace/placement/shared_folders.py", "dist_subspace/run_folder/local.py"
_DATA, _HUB = "dist_subspace/training/prepared_data.py", "dist_subspace/loading/hub.py"
_SEEN_TESTS, _LOCAL_TESTS = "tests/placement/test_shared_folders.py", "tests/run_folder/test_local.py"
_DATA_TESTS, _HUB_TESTS = "tests/training/test_prepared_data.py", "tests/loading/test_hub.py"
_DISKS = "tests/faults/test_decisions.py::test_a_rank_whose_disk_holds_something_else_is_named_and_nothing_is_trained"

MUTANTS = [
    Mutant(
        name="a-copy-of-a-folder-passes-for-it",
        file=_SEEN,
        text='if file.read_text(encoding="ascii") == text:',
        becomes="if file.parent.is_dir():",
        promise="A folder is shared where what rank 0 has just written is seen, and not where one of that name is.",
        tests=[f"{_SEEN_TESTS}::test_a_copy_of_the_folder_is_another_folder"],
    ),
    Mutant(
        name="a-folder-is-looked-at-once",
        file=_SEEN,
        text="        if time.monotonic() > deadline:\n            return False\n",
        becomes="        return False\n",
        promise="A network file system may take a moment to show a file.",
        tests=[f"{_SEEN_TESTS}::test_what_comes_into_sight_after_a_moment_is_seen"],
    ),
    Mutant(
        name="every-node-tokenises-for-itself",
        file=_DATA,
        text="makes = world().is_main or (world().local_rank == 0 and not is_seen)",
        becomes="makes = world().is_main or world().local_rank == 0",
        promise="A node that sees rank 0's tokens makes none, and needs no data.",
        tests=[f"{_DATA_TESTS}::test_one_makes_them_for_all_that_see_them_and_the_others_read_no_data"],
    ),
    Mutant(
        name="tokens-in-a-run-folder-that-is-not-rank-0-s",
        file=_DATA,
        text="    if is_seen:\n        return",
        becomes="    if True:\n        return",
        promise="A node that does not see the run's folder keeps its tokens in its own, and makes no run's folder.",
        tests=[f"{_DATA_TESTS}::test_each_node_makes_its_own_where_it_does_not_see_rank_0_s"],
    ),
    Mutant(
        name="data-of-nodes-not-compared",
        file=_DATA,
        text="if other.content != ours.content:",
        becomes="if False:",
        promise="A node whose data are others is named with the file, what is evaluated on too.",
        tests=[f"{_DATA_TESTS}::test_a_node_with_other_data_is_named_with_its_file"],
    ),
    Mutant(
        name="tokenizers-of-ranks-not-compared",
        file=_DATA,
        text='        "tokenizer": tokenizer_digest(tokenizer)[:12],\n',
        becomes="",
        promise="A rank whose tokenizer is another hears that, and not that its data are.",
        tests=[f"{_DISKS}[another_tokenizer]"],
    ),
    Mutant(
        name="stock-json-of-ranks-not-compared",
        file="dist_subspace/training/plan.py",
        text="    refuse_unlike(stock)\n",
        becomes="",
        promise="A rank whose DeepSpeed configuration is another is named, and nothing is trained.",
        tests=[f"{_DISKS}[another_stock_json]"],
    ),
    Mutant(
        name="checkpoints-elsewhere-are-forgotten",
        file="dist_subspace/checkpoint/elsewhere.py",
        text="    if step > first:\n",
        becomes="    if False:\n",
        promise="A run whose checkpoints another host has does not begin anew without a word.",
        tests=["tests/checkpoint/test_elsewhere.py"],
    ),
    Mutant(
        name="the-last-word-goes-into-any-folder",
        file="dist_subspace/training/run_status.py",
        text="                    if not self.is_running():",
        becomes="                    if False:",
        promise="A rank that does not see the run's folder writes nothing at its path.",
        tests=[
            "tests/training/test_histories.py"
            "::test_a_rank_that_does_not_see_the_run_s_folder_writes_no_word_there_and_makes_none"
        ],
    ),
    Mutant(
        name="a-planted-link-is-followed",
        file=_LOCAL,
        text="found = folder.lstat()",
        becomes="found = folder.stat()",
        promise="The folder of a run on a node is no link that somebody else has left there.",
        tests=[f"{_LOCAL_TESTS}::test_a_link_that_somebody_has_left_there_is_not_followed"],
    ),
    Mutant(
        name="a-node-s-folder-is-open-to-all",
        file=_LOCAL,
        text="            folder.chmod(0o700)\n",
        becomes="            pass\n",
        promise="Only its user sees into the folder of a run on a node.",
        tests=[f"{_LOCAL_TESTS}::test_only_its_user_sees_into_it"],
    ),
    Mutant(
        name="refusals-without-a-host",
        file="dist_subspace/placement/collectives.py",
        text="return message if failed == hosts else",
        becomes="return message if True else",
        promise="A refusal that is not true on every host names the one where it is.",
        tests=[
            "tests/placement/test_collectives.py::test_a_refusal_that_is_not_true_on_every_host_names_the_host",
        ],
    ),
    Mutant(
        name="a-refusal-of-the-hub-is-asked-again",
        file=_HUB,
        text="if not fault.passes or pause is None or",
        becomes="if pause is None or",
        promise="What the hub refuses for good is not asked for again.",
        tests=[f"{_HUB_TESTS}::test_what_does_not_come_is_one_sentence_with_host_tries_and_what_to_do"],
    ),
    Mutant(
        name="the-hub-is-asked-once",
        file=_HUB,
        text="pauses = [*(WAITS if waits is None else waits), None]",
        becomes="pauses = [None]",
        promise="A hub that is busy, or a connection that breaks, is asked again.",
        tests=[f"{_HUB_TESTS}::test_what_passes_is_asked_for_again_and_a_download_that_broke_is_taken_up"],
    ),
    Mutant(
        name="commits-of-nodes-not-compared",
        file="dist_subspace/loading/load.py",
        text="    refuse_unlike(commits)\n",
        becomes="",
        promise="Nodes to which the hub, or their caches, give different commits are refused.",
        tests=[f"{_HUB_TESTS}::test_nodes_that_have_different_commits_are_refused"],
    ),
    Mutant(
        name="an-older-copy-without-a-word",
        file=_HUB,
        text='        say(f"the copy of {name}',
        becomes='        str(f"the copy of {name}',
        promise="A copy in the cache that is taken because the hub did not answer is said.",
        tests=[f"{_HUB_TESTS}::test_a_whole_copy_is_taken_where_the_hub_cannot_be_asked_and_that_is_said"],
    ),
]
