"""Large tables and heads used where they lie, packed heads, and activations that are kept elsewhere."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_ROWS = "tests/placement/deepspeed/test_split_rows.py::"
_LOSS = "tests/training/test_cross_entropy_in_pieces.py::"
_HEAD = "tests/loading/test_packed_head.py::"

MUTANTS = [
    Mutant(
        name="cut-row-overwritten",
        file="dist_subspace/placement/deepspeed/split_rows.py",
        text="rows[begin : begin + len(part)] |= part",
        becomes="rows[begin : begin + len(part)] = part",
        promise="A row that lies on two ranks is put together of both parts.",
        tests=[f"{_ROWS}test_each_rank_has_the_files_bits_of_the_rows_that_it_asked_for[2-torch.bfloat16]"],
    ),
    Mutant(
        name="rows-sent-whatever-a-gather-would-take",
        file="dist_subspace/placement/deepspeed/split_rows.py",
        text="if _busiest(counts) * split.ranks > split.rows * (split.ranks - 1):",
        becomes="if False:",
        promise="A table is gathered where rows would be more bytes.",
        tests=[f"{_ROWS}test_where_a_gather_would_send_less_every_rank_knows_it"],
    ),
    Mutant(
        name="rows-asked-of-other-nodes",
        file="dist_subspace/placement/deepspeed/split_rows.py",
        text="    second = second_shard(parameter)\n",
        becomes="    second = None\n",
        promise="Second shards are asked within the node.",
        tests=[f"{_ROWS}test_second_shards_are_asked_within_the_node"],
    ),
    Mutant(
        name="end-of-a-cut-row-missing",
        file="dist_subspace/placement/deepspeed/split_rows.py",
        text="torch.cat([own, tail] if high > stop - start and rows else [own])",
        becomes="torch.cat([own])",
        promise="Pieces of a head are whole rows.",
        tests=[f"{_ROWS}test_every_row_comes_once_in_pieces_of_the_size[2-1]"],
    ),
    Mutant(
        name="looked-up-table-gathered-too",
        file="dist_subspace/placement/deepspeed/in_place.py",
        text="            set_apart(module)\n",
        becomes="",
        promise="A table that is looked up is whole on no rank.",
        tests=["tests/placement/deepspeed/test_in_place.py::test_it_trains_as_with_gathered_tables[bf16]"],
    ),
    Mutant(
        name="label-counted-among-the-others",
        file="dist_subspace/training/cross_entropy_in_pieces.py",
        text="        logits[at, column] = -torch.inf\n",
        becomes="",
        promise="A label stands apart from the other classes.",
        tests=[f"{_LOSS}test_it_is_torchs_loss_with_its_gradient[torch.float32-1.0-plain]"],
    ),
    Mutant(
        name="earlier-pieces-not-scaled-down",
        file="dist_subspace/training/cross_entropy_in_pieces.py",
        text="self.pull[part].mul_(kept[:, None]).addcmul_(",
        becomes="self.pull[part].addcmul_(",
        promise="What is known of a softmax is scaled down when a larger logit comes.",
        tests=[f"{_LOSS}test_it_is_torchs_loss_with_its_gradient[torch.float32-1.0-plain]"],
    ),
    Mutant(
        name="cap-not-differentiated-at-the-label",
        file="dist_subspace/training/cross_entropy_in_pieces.py",
        text="push = (self.scale * self.slope * self.others / self.total)",
        becomes="push = (self.scale * self.others / self.total)",
        promise="A cap changes the label's gradient too.",
        tests=[f"{_LOSS}test_it_is_torchs_loss_with_its_gradient[torch.float32-1.0-capped]"],
    ),
    Mutant(
        name="heads-storage-ignored",
        file="dist_subspace/loading/packing.py",
        text="(name == self.head or not left)",
        becomes="not left",
        promise="model.head_storage packs the head.",
        tests=[f"{_HEAD}test_its_options_are_those_of_the_models_storage_where_both_are_one"],
    ),
    Mutant(
        name="packed-head-without-new-tokens-in-a-merge",
        file="dist_subspace/subspace/beside/new_tokens.py",
        text='return tables | {f"{name}.weight": "head" for name in heads}',
        becomes="return tables",
        promise="A merge writes new tokens' rows into a head that was packed.",
        tests=[f"{_HEAD}test_a_merge_writes_what_it_stands_for_or_the_files_own"],
    ),
    Mutant(
        name="parameters-moved-with-activations",
        file="dist_subspace/training/activation_offload.py",
        text=" and large and not of_parameter",
        becomes=" and large",
        promise="Parameters stay where they are.",
        tests=[
            "tests/training/test_activation_offload.py::"
            "test_parameters_their_views_numbers_of_few_bytes_and_integers_stay"
        ],
    ),
    Mutant(
        name="proof-of-another-autocast-taken",
        file="dist_subspace/training/head_loss.py",
        text=", *_autocast(device), *_in_use(head))",
        becomes=", *_in_use(head))",
        promise="How a loss is made is found out anew in an autocast.",
        tests=["tests/training/test_head_loss.py::test_in_an_autocast_a_head_that_is_trained_keeps_its_logits_whole"],
    ),
]
