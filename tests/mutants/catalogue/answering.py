"""Slips of the parts that answer: prompts, batches, streams, files, chats, and ranks that end early."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="company-leaves-early",
        file="dist_subspace/placement/generation.py",
        text="while _someone_writes(False):",
        becomes="if _someone_writes(False):",
        promise="A rank whose texts have ended keeps the others company until the longest text is done.",
        tests=["tests/placement/test_generation.py::test_a_rank_whose_row_is_full_keeps_the_others_company"],
    ),
    Mutant(
        name="batch-padded-on-the-right",
        file="dist_subspace/generation/room.py",
        text="place = slice(0, len(row)) if right else slice(longest - len(row), longest)",
        becomes="place = slice(0, len(row))",
        promise="A batch of a decoder is padded on the left: each row gets the text that it gets alone.",
        tests=["tests/generation/test_room.py::test_padding_stands_where_the_answer_does_not_follow_it"],
    ),
    Mutant(
        name="draws-by-rank",
        file="dist_subspace/generation/answers.py",
        text="with drawing_from(seed, batch.first):",
        becomes="with drawing_from(seed, world().rank):",
        promise="What is drawn depends on the prompts and the seed, and not on the ranks.",
        tests=[
            "tests/generation/test_answers.py::test_answers_are_the_same_on_any_number_of_ranks_whole_or_split[2-zero0]"
        ],
    ),
    Mutant(
        name="full-rows-cut-the-others",
        file="dist_subspace/generation/batches.py",
        text="if last is not None and alike and room == last.new_tokens and",
        becomes="if last is not None and alike and",
        promise="A row near the end of the context does not share a batch with rows that have room.",
        tests=["tests/generation/test_batches.py"],
    ),
    Mutant(
        name="template-end-is-no-stop",
        file="dist_subspace/training/data/prompting.py",
        text="            ids += self._closing()",
        becomes="            pass",
        promise="An answer ends at the token that closes a turn in the chat template.",
        tests=[
            "tests/training/data/test_prompting.py::test_a_chat_is_rendered_by_the_template_with_its_system_turn_tools_and_history"
        ],
    ),
    Mutant(
        name="answer-in-its-own-prompt",
        file="dist_subspace/training/data/prompting.py",
        text="asked = [talk.upto(_before_answer(talk)) for talk in talks]",
        becomes="asked = talks",
        promise="A record's own answer is no part of its prompt.",
        tests=["tests/training/data/test_prompting.py::test_the_prompt_is_what_stands_before_the_trained_tokens[chat]"],
    ),
    Mutant(
        name="greedy-inherits-a-draw",
        file="dist_subspace/generation/settings.py",
        text='return {"do_sample": True} if drawing else {"do_sample": False} if "temperature" in wanted else {}',
        becomes='return {"do_sample": True} if drawing else {}',
        promise="A temperature of 0 is greedy also where the model's own settings draw.",
        tests=[
            "tests/generation/test_settings.py::test_a_temperature_draws_and_zero_is_greedy_without_the_models_ways_to_draw"
        ],
    ),
    Mutant(
        name="half-line-counts-as-an-answer",
        file="dist_subspace/talking/answer_file.py",
        text='                if not line.endswith(b"\\n"):\n                    break\n',
        becomes="",
        promise="What a killed process has left of a line is answered again.",
        tests=["tests/talking/test_answer_file.py::test_it_appears_whole_and_goes_on_after_the_last_whole_line"],
    ),
    Mutant(
        name="history-is-not-shown",
        file="dist_subspace/talking/chat.py",
        text='return self.history if self.prompting.settings.format == "chat" else []',
        becomes="return []",
        promise="A turn is answered in the whole conversation.",
        tests=["tests/talking/test_chat.py::test_each_turn_is_answered_in_the_whole_conversation_and_reset_forgets_it"],
    ),
    Mutant(
        name="another-base-is-taken",
        file="dist_subspace/adapted/opened.py",
        text="if wanted is not None and folder is not None and base_fingerprint(folder) != wanted:",
        becomes="if wanted is not None and folder is None:",
        promise="An adapter is not put on another base of the same shape.",
        tests=["tests/adapted/test_opened.py::test_another_base_of_the_same_shape_is_refused"],
    ),
    Mutant(
        name="sum-without-weights",
        file="dist_subspace/adapted/combining.py",
        text="terms.setdefault(layer, []).append((a, weights[path] * b))",
        becomes="terms.setdefault(layer, []).append((a, b))",
        promise="A sum of adapters is weighted.",
        tests=["tests/adapted/test_combining.py::test_the_sum_computes_the_weighted_sum_of_what_peft_merges[3]"],
    ),
    Mutant(
        name="switched-with-another-alpha",
        file="dist_subspace/adapted/switching.py",
        text="        if there[name] != value:",
        becomes='        if name != "alpha" and there[name] != value:',
        promise="An adapter with another alpha is not put into the place of a model's own.",
        tests=["tests/adapted/test_switching.py"],
    ),
    Mutant(
        name="blank-before-a-word-lost",
        file="dist_subspace/generation/answers.py",
        text="    before = list(prompt[-CONTEXT:])",
        becomes="    before: list[int] = []",
        promise="An answer's first word keeps the blank that stands before it.",
        tests=["tests/generation/test_answers.py::test_a_word_behind_a_prompt_keeps_its_blank"],
    ),
    Mutant(
        name="next-turn-is-no-stop",
        file="dist_subspace/training/data/prompting.py",
        text="        return followed",
        becomes="        return []",
        promise="Where a template closes no answer, the tokens that begin the next turn end one, as in training.",
        tests=[
            "tests/training/data/test_prompting.py::test_in_every_family_of_templates_the_prompt_is_trained_before_its_answer_and_the_answer_ends_at_a_stop[glm4_5]"
        ],
    ),
]
