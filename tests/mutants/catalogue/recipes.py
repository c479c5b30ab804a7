"""What the recipes lean on: long rows whose logits outweigh the model, offload, and the count of bytes."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_LOSS = "tests/training/test_loss.py::"
_OFFLOAD = "tests/config/test_recipes.py::test_a_recipes_header_is_what_its_model_and_its_method_give[llama-3.3-70b-24gb-offload]"
_SAME = f"{_LOSS}test_rows_taken_after_one_another_give_the_same_loss_and_the_same_gradient"

MUTANTS = [
    Mutant(
        name="long-logits-whole",
        file="dist_subspace/training/cross_entropy.py",
        text="step = max(1, PIECE // max(1, classes))",
        becomes="step = max(1, rows)",
        promise="The logits of a long row are in float32 a part at a time.",
        tests=[f"{_LOSS}test_long_rows_are_in_float32_a_part_at_a_time"],
    ),
    Mutant(
        name="rows-without-the-incoming-gradient",
        file="dist_subspace/training/cross_entropy.py",
        text="torch.where(labels[rows] == IGNORED, 0.0, g[rows])",
        becomes="torch.where(labels[rows] == IGNORED, 0.0, 1.0)",
        promise="The loss of a long row is weighted as that of a short one.",
        tests=[f"{_SAME}[tokens-dtype0]"],
    ),
    Mutant(
        name="the-last-position-predicts-a-token",
        file="dist_subspace/training/loss.py",
        text="functional.pad(labels[:, 1:], (0, 1), value=IGNORED)",
        becomes="functional.pad(labels[:, 1:], (0, 1), value=0)",
        promise="The last position of a long row has no target.",
        tests=[f"{_SAME}[tokens-dtype0]"],
    ),
    Mutant(
        name="long-labels-not-shifted",
        file="dist_subspace/training/loss.py",
        text="functional.pad(labels[:, 1:], (0, 1), value=IGNORED)",
        becomes="labels",
        promise="A position of a long row predicts the next.",
        tests=[f"{_SAME}[tokens-dtype0]"],
    ),
    Mutant(
        name="copies-of-all-logits-counted",
        file="dist_subspace/training/loss.py",
        text="6 * min(count, PIECE)",
        becomes="6 * count",
        promise="What is said to lower out of memory counts the logits of some rows alone.",
        tests=["tests/training/test_memory.py::test_the_advice_is_what_the_logits_and_the_kept_activations_take"],
    ),
    Mutant(
        name="offloaded-weights-stay-on-the-gpu",
        file="dist_subspace/placement/deepspeed/presets.py",
        text='section["offload_param"] = {"device": "cpu", "pin_memory": True}',
        becomes="pass",
        promise="zero3-offload holds the weights in the machine's memory.",
        tests=[_OFFLOAD],
    ),
    Mutant(
        name="offloaded-optimizer-stays-on-the-gpu",
        file="dist_subspace/placement/deepspeed/presets.py",
        text='if preset.endswith(("-offload", "-nvme")):',
        becomes='if preset.endswith("-nvme"):',
        promise="The offloading presets hold the optimizer's state in the machine's memory.",
        tests=[_OFFLOAD],
    ),
    Mutant(
        name="held-bytes-without-statistics",
        file="dist_subspace/storage/four_bit.py",
        text="return math.ceil(d_out * d_in / 2) + statistics",
        becomes="return math.ceil(d_out * d_in / 2)",
        promise="The bytes of a 4-bit matrix are counted with its statistics.",
        tests=["tests/config/test_recipe_bytes.py::test_the_bytes_of_a_rank_are_what_ranks_hold[2-zero0-nf4]"],
    ),
]
