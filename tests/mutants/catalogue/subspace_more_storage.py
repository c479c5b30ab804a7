"""Slips in how weights are held, taken over and shown, and in what their statistics are kept under."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="plain-layer-initialised",
        file="dist_subspace/storage/linear_layers.py",
        text="nn.utils.skip_init(nn.Linear, 6,",
        becomes="nn.Linear(6,",
        promise="Adoption draws none of the caller's random numbers.",
        tests=["tests/storage/test_adopt.py::test_a_subclass_that_computes_the_same_is_adopted"],
    ),
    Mutant(
        name="rng-moved-by-adoption",
        file="dist_subspace/storage/linear_layers.py",
        text="with torch.no_grad(), torch.random.fork_rng(devices=[]):",
        becomes="with torch.no_grad():",
        promise="Adoption draws none of the caller's random numbers, whatever a class's forward draws.",
        tests=["tests/storage/test_adopt.py::test_a_subclass_that_computes_the_same_is_adopted"],
    ),
    Mutant(
        name="full-backward-hooks-become-old-ones",
        file="dist_subspace/module_places.py",
        text="    other._is_full_backward_hook = module._is_full_backward_hook\n",
        becomes="",
        promise="A full backward hook on a layer sees the layer's own gradients after attach.",
        tests=["tests/subspace/test_places.py::test_hooks_see_what_they_saw_of_the_layer_itself[lora]"],
    ),
    Mutant(
        name="backward-hooks-stay-behind",
        file="dist_subspace/module_places.py",
        text='    "_backward_hooks",\n',
        becomes="",
        promise="A backward hook on a layer is called after attach.",
        tests=["tests/subspace/test_places.py::test_hooks_see_what_they_saw_of_the_layer_itself[lora]"],
    ),
    Mutant(
        name="hooks-with-keywords-lose-them",
        file="dist_subspace/module_places.py",
        text='    "_forward_hooks_with_kwargs",\n',
        becomes="",
        promise="A forward hook that asks for keyword arguments gets them after attach.",
        tests=["tests/subspace/test_places.py::test_hooks_see_what_they_saw_of_the_layer_itself[lora]"],
    ),
    Mutant(
        name="pre-hooks-with-keywords-lose-them",
        file="dist_subspace/module_places.py",
        text='    "_forward_pre_hooks_with_kwargs",\n',
        becomes="",
        promise="A hook before a layer that asks for keyword arguments gets them after attach.",
        tests=["tests/subspace/test_places.py::test_hooks_see_what_they_saw_of_the_layer_itself[lora]"],
    ),
    Mutant(
        name="nested-code-unchecked",
        file="dist_subspace/storage/bnb.py",
        text="if state.nested and not torch.equal(",
        becomes="if state.nested and False and not torch.equal(",
        promise="Nested statistics that are coded otherwise are refused, not decoded wrongly.",
        tests=["tests/storage/test_bnb.py::test_nested_statistics_of_another_kind_are_refused"],
    ),
    Mutant(
        name="nested-blocks-of-another-size-taken",
        file="dist_subspace/storage/bnb.py",
        text="if state.nested and state.state2.blocksize != NESTED_BLOCKSIZE:",
        becomes="if state.nested and state.state2.blocksize > 4096:",
        promise="Nested statistics in other blocks are refused, not decoded wrongly.",
        tests=["tests/storage/test_bnb.py::test_nested_statistics_of_another_kind_are_refused"],
    ),
    Mutant(
        name="fp8-scales-of-any-type",
        file="dist_subspace/storage/fp8.py",
        text="        and scale.dtype == torch.float32\n",
        becomes="",
        promise="A layer with scales of another type is not taken over as fp8.",
        tests=["tests/storage/test_fp8.py::test_scales_of_another_type_are_not_taken_for_float32"],
    ),
    Mutant(
        name="lacking-factor-is-a-traceback",
        file="dist_subspace/statistics/setup.py",
        text="        with _complete(name, file_of(name)):\n            _give_factors(",
        becomes="        if True:\n            _give_factors(",
        promise="A file of factors that lacks one is named in one sentence.",
        tests=["tests/statistics/test_setup.py::test_a_file_that_lacks_a_factor_is_named"],
    ),
    Mutant(
        name="given-factors-not-kept",
        file="dist_subspace/statistics/setup.py",
        text="        if not store.has(key):\n            store.write(key, name, factors)\n            continue\n",
        becomes="        if not store.has(key):\n            continue\n",
        promise="The factors of an adapter that a run begins with lie in the run's folder.",
        tests=[
            "tests/statistics/test_setup.py::test_factors_that_come_with_an_adapter_are_kept_and_others_of_that_name_refused"
        ],
    ),
    Mutant(
        name="other-factors-pass",
        file="dist_subspace/statistics/setup.py",
        text="if held.keys() != factors.keys() or not all(",
        becomes="if held.keys() != factors.keys() and not all(",
        promise="A folder that holds other factors than the adapter's is refused.",
        tests=[
            "tests/statistics/test_setup.py::test_factors_that_come_with_an_adapter_are_kept_and_others_of_that_name_refused"
        ],
    ),
    Mutant(
        name="rounds-not-in-the-name",
        file="dist_subspace/statistics/cache.py",
        text='_IRRELEVANT = ("lr_ratio", "power", "reduction", "activation")',
        becomes='_IRRELEVANT = ("lr_ratio", "power", "reduction", "activation", "iterations")',
        promise="Factors of another number of rounds are not found under one name.",
        tests=[
            "tests/statistics/test_setup.py::test_an_option_that_a_statistic_depends_on_is_in_the_name_of_its_file_and_no_other"
        ],
    ),
    Mutant(
        name="top-k-not-in-the-name",
        file="dist_subspace/statistics/cache.py",
        text='_IRRELEVANT = ("lr_ratio", "power", "reduction", "activation")',
        becomes='_IRRELEVANT = ("lr_ratio", "power", "reduction", "activation", "top_k")',
        promise="Factors of another number of singular values are not found under one name.",
        tests=[
            "tests/statistics/test_setup.py::test_an_option_that_a_statistic_depends_on_is_in_the_name_of_its_file_and_no_other"
        ],
    ),
    Mutant(
        name="everything-in-the-name",
        file="dist_subspace/statistics/cache.py",
        text='_IRRELEVANT = ("lr_ratio", "power", "reduction", "activation")',
        becomes='_IRRELEVANT = ("activation",)',
        promise="Options that no statistic depends on do not make it again.",
        tests=[
            "tests/statistics/test_setup.py::test_an_option_that_a_statistic_depends_on_is_in_the_name_of_its_file_and_no_other"
        ],
    ),
    Mutant(
        name="unread-weights-data-can-be-read",
        file="dist_subspace/unread_weight.py",
        text='if name in ("torch.Tensor.data.__get__", "torch.Tensor.detach"):\n            return weight',
        becomes='if name in ("torch.Tensor.data.__get__", "torch.Tensor.detach"):\n            return weight.held',
        promise="`data` of a weight that is not there leads to no values.",
        tests=["tests/test_unread_weight.py"],
    ),
    Mutant(
        name="unread-weight-may-be-compared",
        file="dist_subspace/unread_weight.py",
        text='"__hash__", "__len__", "detach",',
        becomes='"__hash__", "__len__", "detach", "eq", "item", "copy_",',
        promise="A weight that is not there cannot be compared or copied from.",
        tests=["tests/test_unread_weight.py"],
    ),
    Mutant(
        name="packed-weight-says-float32",
        file="dist_subspace/storage/adopt.py",
        text='operator.name, operator.compute_dtype = name, getattr(model, "dtype", torch.float32)',
        becomes="operator.name = name",
        promise="A packed layer shows the type of the computation, which models cast activations to.",
        tests=["tests/test_unread_weight.py"],
    ),
    Mutant(
        name="unread-weight-says-nothing-of-the-shard",
        file="dist_subspace/unread_weight.py",
        text="        return getattr(self.stored, name)",
        becomes="        raise AttributeError(name)",
        promise="A library's marks on the real parameter are seen on what is shown.",
        tests=["tests/test_unread_weight.py"],
    ),
    Mutant(
        name="dense-is-the-weight-itself",
        file="dist_subspace/storage/operator.py",
        text="return self.decode(dtype).clone(memory_format=torch.contiguous_format)",
        becomes="return self.decode(dtype)",
        promise="Who writes into the dense matrix does not write into the weight.",
        tests=["tests/storage/test_operator.py::test_who_writes_into_the_dense_matrix_does_not_write_into_the_weight"],
    ),
]
