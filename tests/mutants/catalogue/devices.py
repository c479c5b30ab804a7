"""Slips that only another device than the CPU shows: a tensor left on the CPU, a value read in the middle of a step."""

from tests.mutants.mutant import Mutant

_STEP = "tests/devices/test_hot_path.py::test_a_step_of_every_method_stays_on_the_device"
_CONSTRAINT = "tests/devices/test_hot_path.py::test_a_step_with_a_constraint_stays_on_the_device"
_LOOP = "tests/devices/test_hot_path.py::test_the_loop_reads_the_losses_of_a_step_behind_its_last_round"
_EIGHT = "tests/placement/deepspeed/test_eight_bit.py"

MUTANTS = [
    Mutant(
        name="labels-stay-on-the-cpu",
        file="dist_subspace/training/loss.py",
        text="to_device(labels, logits.device)",
        becomes="labels",
        promise="The loss is computed where the logits lie.",
        tests=[f"{_STEP}[lora]"],
    ),
    Mutant(
        name="inputs-stay-on-the-cpu",
        file="dist_subspace/training/loss.py",
        text="to_device(value, device) if isinstance(value, Tensor) else value",
        becomes="value",
        promise="A micro-batch is brought to the model's device.",
        tests=[f"{_STEP}[lora]"],
    ),
    Mutant(
        name="loss-read-in-every-round",
        file="dist_subspace/training/engine.py",
        text="                losses.append(loss)\n",
        becomes="                losses.append(loss.cpu())\n",
        promise="The rounds of a step do not wait for one another.",
        tests=[_LOOP],
    ),
    Mutant(
        name="identity-of-a-rotation-on-the-cpu",
        file="dist_subspace/subspace/blocks/spectral.py",
        text="torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)",
        becomes="torch.eye(k.shape[-1], dtype=k.dtype)",
        promise="A rotation is made where its parameters lie.",
        tests=[f"{_STEP}[spectral-rotational]"],
    ),
    Mutant(
        name="identity-of-a-constraint-on-the-cpu",
        file="dist_subspace/subspace/core/constraints.py",
        text="dtype=gram.dtype, device=gram.device",
        becomes="dtype=gram.dtype",
        promise="A constraint is computed where its factors lie.",
        tests=[f"{_CONSTRAINT}[mpc_o]"],
    ),
    Mutant(
        name="penalty-read-in-backward",
        file="dist_subspace/subspace/core/constraints.py",
        text="self.penalties.values[self.name] = factor * (value_a + value_b)",
        becomes="self.penalties.values[self.name] = float(factor * (value_a + value_b))",
        promise="A penalty's value is read when somebody asks for it, and not in every layer's backward.",
        tests=[f"{_CONSTRAINT}[mpc_o]"],
    ),
    Mutant(
        name="places-of-virtual-tokens-on-the-cpu",
        file="dist_subspace/subspace/virtual_tokens/insertion.py",
        text="number = torch.arange(gaps.shape[1], device=gaps.device)",
        becomes="number = torch.arange(gaps.shape[1])",
        promise="Virtual tokens are inserted where the input lies.",
        tests=[f"{_STEP}[prompt]"],
    ),
    Mutant(
        name="row-of-zeros-asked-for-in-the-forward",
        file="dist_subspace/subspace/blocks/magnitude.py",
        text="    return torch.where(empty, 0.0, delta).float()",
        becomes="    return torch.where(empty, 0.0, delta).float() if empty.any() else delta.float()",
        promise="DoRA's deviation is computed without looking at a value.",
        tests=[f"{_STEP}[dora]"],
    ),
    Mutant(
        name="frozen-factor-is-a-plain-attribute",
        file="dist_subspace/subspace/core/factors.py",
        text="self.matrix = nn.Parameter(matrix.detach().to(dtype or matrix.dtype).contiguous(), requires_grad=False)",
        becomes="self.matrix = matrix.detach().to(dtype or matrix.dtype).contiguous()",
        promise="A frozen factor moves and is split with the model.",
        tests=[f"{_STEP}[lora-fa]"],
    ),
    Mutant(
        name="operator-asked-for-its-bias",
        file="dist_subspace/subspace/core/operator.py",
        text="    training: bool\n    if TYPE_CHECKING:",
        becomes="    training: bool\n    bias: nn.Parameter | None\n    if TYPE_CHECKING:",
        promise="A frozen matrix is known as an operator on Python 3.12 and later.",
        tests=["tests/subspace/test_methods.py::test_a_frozen_matrix_is_known_as_an_operator_on_every_python[nf4]"],
    ),
    Mutant(
        name="block-magnitudes-are-made-anew",
        file="dist_subspace/placement/eight_bit.py",
        text="all(dim=1) & (first >= largest)",
        becomes="all(dim=1) & (first > 2 * largest)",
        promise="Codes and magnitudes of 8-bit moments come back bit by bit.",
        tests=[f"{_EIGHT}::test_moments_of_an_unsplit_optimizer_are_its_own_numbers"],
    ),
    Mutant(
        name="block-magnitudes-are-not-written-back",
        file="dist_subspace/placement/eight_bit.py",
        text='    state[f"absmax{key[-1]}"].copy_(magnitude)\n',
        becomes="",
        promise="8-bit moments taken from a checkpoint are those of the checkpoint.",
        tests=[f"{_EIGHT}::test_an_optimizer_whose_blocks_are_cut_otherwise_takes_the_numbers_up"],
    ),
    Mutant(
        name="moments-linked-as-codes",
        file="dist_subspace/placement/deepspeed/optimizer_state.py",
        text="                if packed:\n                    forget_moments(parameter)\n",
        becomes="",
        promise="Under ZeRO 1 and 2 a checkpoint holds the numbers of 8-bit moments, and not their codes.",
        tests=[f"{_EIGHT}::test_moments_in_8_bits_come_back_bit_by_bit[1-2-adamw_bnb_8bit-2]"],
    ),
]
