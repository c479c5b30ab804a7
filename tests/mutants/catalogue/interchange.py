"""What is merged, exported, imported and read back."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="merge-onto-original-of-the-held",
        file="dist_subspace/interchange/plain.py",
        text="onto_original = part.merged_onto_original if isinstance(part, FoldsIntoBase) else onto_held",
        becomes="onto_original = onto_held",
        promise="A merge onto the original weights takes the update for them.",
        tests=["tests/interchange/test_merge.py::test_a_folded_residual_is_merged_onto_either_base[olora]"],
    ),
    Mutant(
        name="merge-float-base-always-held",
        file="dist_subspace/interchange/plain.py",
        text='if original is not None and operator.is_float and self.base == "original":',
        becomes="if False:",
        promise="A merge onto the original reads weights that are held in 16 bits again.",
        tests=["tests/test_cli.py::test_merge_holds_the_base_as_it_is_told"],
    ),
    Mutant(
        name="merge-drift-relative-to-nothing",
        file="dist_subspace/interchange/plain.py",
        text="torch.tensor(distances).norm() / torch.tensor(norms).norm()",
        becomes="torch.tensor(distances).sum() / torch.tensor(norms).sum()",
        promise="The drift over all layers is that of them as one.",
        tests=[
            "tests/interchange/test_merge.py::test_both_bases_are_offered_and_their_distance_is_measured_and_printed[nf4]"
        ],
    ),
    Mutant(
        name="merge-ignores-shard-size",
        file="dist_subspace/interchange/merge.py",
        text="WeightsWriter(hidden, plan, max_shard_bytes)",
        becomes="WeightsWriter(hidden, plan, SHARD_BYTES)",
        promise="max_shard_bytes limits a file.",
        tests=["tests/interchange/test_merge.py::test_files_of_a_bounded_size_have_an_index"],
    ),
    Mutant(
        name="merge-type-not-in-the-configuration",
        file="dist_subspace/interchange/merge.py",
        text="    config.dtype = dtype\n",
        becomes="",
        promise="A merged checkpoint's configuration says its type.",
        tests=["tests/interchange/test_merge.py::test_the_weights_are_written_in_the_type_that_is_asked_for[float32]"],
    ),
    Mutant(
        name="merge-class-not-in-the-configuration",
        file="dist_subspace/interchange/merge.py",
        text="    config.architectures = [type(model).__name__]\n",
        becomes="",
        promise="A merged checkpoint's configuration says its class.",
        tests=["tests/test_cli.py::test_a_merged_model_names_its_own_class_and_brings_its_own_code"],
    ),
    Mutant(
        name="merge-without-generation-config",
        file="dist_subspace/interchange/merge.py",
        text="            _save_generation_config(model, hidden)\n",
        becomes="            pass\n",
        promise="The generation configuration goes with a merged model.",
        tests=["tests/interchange/test_merge.py::test_the_tokenizer_and_the_generation_settings_go_with_it"],
    ),
    Mutant(
        name="merge-ties-in-spite-of-changes",
        file="dist_subspace/interchange/merge.py",
        text="        say_untied(model, config)  # nothing is tied any more\n",
        becomes="        pass\n",
        promise="An output layer that was changed without its embedding is no longer tied.",
        tests=[
            "tests/interchange/test_merge.py::test_an_output_layer_that_was_changed_without_its_embedding_is_no_longer_tied"
        ],
    ),
    Mutant(
        name="merge-without-the-models-code",
        file="dist_subspace/interchange/merge.py",
        text="        copy_files(source, names, hidden)\n",
        becomes="",
        promise="The code of a model of its own class goes with the merged one.",
        tests=["tests/test_cli.py::test_a_merged_model_names_its_own_class_and_brings_its_own_code"],
    ),
    Mutant(
        name="merge-folder-stays-after-an-error",
        file="dist_subspace/interchange/merge.py",
        text="        shutil.rmtree(writer.folder, ignore_errors=True)\n",
        becomes="        pass\n",
        promise="A merge that fails leaves nothing.",
        tests=["tests/interchange/test_merge.py::test_a_value_that_the_type_cannot_hold_is_refused"],
    ),
    Mutant(
        name="export-alphas-not-written",
        file="dist_subspace/interchange/peft/written_forms.py",
        text='"alpha_pattern": dict(fewer)',
        becomes='"alpha_pattern": {}',
        promise="Every layer of an exported LoRA has γ = 1.",
        tests=[
            "tests/interchange/peft/test_export.py::test_layers_with_ranks_of_their_own_have_one_scale_for_vllm_and_patterns_for_peft[lora]"
        ],
    ),
    Mutant(
        name="export-rslora-compared-as-lora",
        file="dist_subspace/interchange/peft/written_forms.py",
        text='(math.sqrt(rank) if described.get("use_rslora") else rank)',
        becomes="rank",
        promise="vLLM is never given patterns that it does not read.",
        tests=[
            "tests/interchange/peft/test_forms.py::test_ranks_and_alphas_of_single_layers_stay_in_the_file_where_all_have_one_scale[rslora-4.0-direct]"
        ],
    ),
    Mutant(
        name="export-lora-not-for-conv1d",
        file="dist_subspace/interchange/peft/written_forms.py",
        text='"alpha_pattern": dict(fewer), "fan_in_fan_out": _conv1d(described)}',
        becomes='"alpha_pattern": dict(fewer), "fan_in_fan_out": False}',
        promise="PEFT is told of Conv1D layers.",
        tests=[
            "tests/interchange/peft/test_forms.py::test_peft_is_told_how_a_layer_lies_and_has_nothing_to_correct[GPT2LMHeadModel-True]"
        ],
    ),
    Mutant(
        name="export-new-tokens-left-out",
        file="dist_subspace/interchange/peft/export.py",
        text='if described["dist_subspace"].get("new_tokens"):',
        becomes="if False:",
        promise="An adapter with new tokens is not exported without them.",
        tests=["tests/interchange/peft/test_export.py::test_new_tokens_are_refused_with_merge_suggested"],
    ),
    Mutant(
        name="export-drops-full-copies",
        file="dist_subspace/interchange/peft/export.py",
        text='        tensors |= of_no_layer(native, described["dist_subspace"]["layers"])\n',
        becomes="",
        promise="Modules that were trained in full are exported.",
        tests=[
            "tests/interchange/peft/test_export.py::test_modules_that_were_trained_in_full_go_with_it_and_vllm_is_said_not_to_read_them[ssl]"
        ],
    ),
    Mutant(
        name="export-error-of-what-was-kept",
        file="dist_subspace/interchange/peft/forms.py",
        text="float(s[rank:].double().square().sum())",
        becomes="float(s[:rank].double().square().sum())",
        promise="An approximation's error is that of what is missing.",
        tests=["tests/interchange/peft/test_export.py::test_an_approximation_has_its_error_measured[ssb]"],
    ),
    Mutant(
        name="export-empty-triplets-kept",
        file="dist_subspace/interchange/peft/forms.py",
        text="kept = (pair[0].abs().amax(1) > 0) & (pair[1].abs().amax(0) > 0)",
        becomes="kept = torch.ones(len(pair[0]), dtype=torch.bool)",
        promise="Triplets that were taken away take no room.",
        tests=[
            "tests/interchange/peft/test_export.py::test_triplets_that_were_taken_away_take_no_room_in_a_lora[adalora]"
        ],
    ),
    Mutant(
        name="export-scaled-bias-as-a-lora",
        file="dist_subspace/interchange/peft/forms.py",
        text="return isinstance(part, AddsBias) or (biased and not torch.equal(_scaled_ones(part), ones))",
        becomes="return isinstance(part, AddsBias)",
        promise="A LoRA is not exact where the bias is scaled.",
        tests=["tests/interchange/peft/test_forms.py::test_no_approximation_leaves_a_changed_bias_out"],
    ),
    Mutant(
        name="import-by-the-words-of-the-base-class",
        file="dist_subspace/subspace/core/registry.py",
        text="return max(claiming, key=",
        becomes="return min(claiming, key=",
        promise="Of PEFT's LORA, single fields make another method.",
        tests=[
            "tests/subspace/core/test_peft_words.py::test_single_fields_of_a_lora_make_another_method[fields2-dora]"
        ],
    ),
    Mutant(
        name="import-of-an-entry-that-another-method-reads",
        file="dist_subspace/interchange/peft/importing.py",
        text="not in ENTRIES_OF_EVERY_KIND | words.known_entries and",
        becomes='not in {*ENTRIES_OF_EVERY_KIND, *words.known_entries, "oft_block_size"} and',
        promise="An entry of PEFT's that is not known is refused by its name.",
        tests=["tests/interchange/peft/test_importing.py::test_an_entry_of_another_kind_is_refused"],
    ),
    Mutant(
        name="import-pissa-randomized",
        file="dist_subspace/subspace/reconstruction/pissa.py",
        text='ClassVar[Entries] = {"svd": "exact"}',
        becomes="ClassVar[Entries] = {}",
        promise="PEFT's PiSSA starts at the exact decomposition.",
        tests=["tests/interchange/peft/test_importing.py::test_conv1d_layers_are_read_as_what_they_compute"],
    ),
    Mutant(
        name="import-rslora-of-dora-as-lora",
        file="dist_subspace/subspace/extension/lora.py",
        text="alphas = {name: alpha * math.sqrt(ranks[name]) for name, alpha in alphas.items()}",
        becomes="pass",
        promise="DoRA with use_rslora has γ = α / √r.",
        tests=["tests/interchange/peft/test_importing.py::test_a_lora_of_peft_has_the_same_logits[dora and rslora]"],
    ),
    Mutant(
        name="import-takes-what-is-no-number",
        file="dist_subspace/interchange/peft/importing.py",
        text="opened.described, opened.tensors()",
        becomes="opened.described, {key: opened.tensor(key) for key in opened.keys}",
        promise="An adapter with NaN is refused.",
        tests=[
            "tests/interchange/peft/test_rules.py::test_a_value_that_is_no_number_is_said_as_such_on_every_way[lora-nan]"
        ],
    ),
    Mutant(
        name="import-adalora-always-penalised",
        file="dist_subspace/subspace/extension/adalora.py",
        text='constraint=None if weight > 0 else "none"',
        becomes="constraint=None",
        promise="An AdaLoRA of PEFT without orth_reg_weight has no penalty.",
        tests=["tests/interchange/peft/test_kinds.py::test_an_adalora_has_the_penalty_that_peft_gave_it_or_none[0.0]"],
    ),
    Mutant(
        name="import-adalora-rows-moved-up",
        file="dist_subspace/subspace/extension/adalora.py",
        text="places = torch.arange(kept) if mask is None else torch.tensor(mask).nonzero().flatten()",
        becomes="places = torch.arange(kept)",
        promise="Triplets of a shortened AdaLoRA come back to their places.",
        tests=["tests/interchange/peft/test_kinds.py::test_triplets_that_adalora_has_kept_come_back_to_their_places"],
    ),
    Mutant(
        name="import-vera-without-seed",
        file="dist_subspace/subspace/extension/vera.py",
        text='int(described.get("projection_prng_key") or 0)',
        becomes="0",
        promise="VeRA's projections are drawn with PEFT's key.",
        tests=[
            "tests/interchange/peft/test_kinds.py::test_veras_projections_are_drawn_again_from_its_key_where_they_are_not_saved[7]"
        ],
    ),
    Mutant(
        name="import-alpha-pattern-unread",
        file="dist_subspace/subspace/extension/lora.py",
        text='by_pattern(described.get("alpha_pattern"), described["lora_alpha"], layers)',
        becomes='dict.fromkeys(layers, described["lora_alpha"])',
        promise="PEFT's alpha_pattern is read.",
        tests=["tests/interchange/peft/test_importing.py::test_a_lora_of_peft_has_the_same_logits[patterns]"],
    ),
    Mutant(
        name="import-vera-dropout-lost",
        file="dist_subspace/subspace/extension/vera.py",
        text='float(described.get("vera_dropout") or 0.0)',
        becomes="0.0",
        promise="An imported adapter trains on with its dropout.",
        tests=[
            "tests/interchange/peft/test_kinds.py::test_it_trains_on_with_the_dropout_that_it_was_trained_with[vera-0.25]"
        ],
    ),
    Mutant(
        name="import-trained-biases-left-out",
        file="dist_subspace/interchange/peft/importing.py",
        text='if bias != "none" and any(key.endswith(".bias") for key in tensors):',
        becomes="if False:",
        promise="Trained biases are not left out in silence.",
        tests=["tests/interchange/peft/test_rules.py::test_a_model_without_biases_has_none_to_train[all]"],
    ),
    Mutant(
        name="import-without-the-tokenizer",
        file="dist_subspace/interchange/peft/importing.py",
        text="tokenizer = Path(folder) if has_tokenizer(Path(folder)) else None",
        becomes="tokenizer = None",
        promise="The tokenizer goes with an imported adapter.",
        tests=[
            "tests/interchange/test_description.py::test_a_saved_and_an_exported_adapter_bring_the_bases_tokenizer[us]"
        ],
    ),
    Mutant(
        name="adapter-with-nan-loads",
        file="dist_subspace/interchange/adapter_folder.py",
        text="        check_finite(self.path, tensors)\n",
        becomes="",
        promise="An adapter with values that are no numbers is refused.",
        tests=[
            "tests/interchange/peft/test_rules.py::test_a_value_that_is_no_number_is_said_as_such_on_every_way[lora-nan]"
        ],
    ),
    Mutant(
        name="adapter-of-another-base",
        file="dist_subspace/interchange/base_model.py",
        text="if wanted is None or fingerprint(place) == wanted:",
        becomes="if True:",
        promise="Another model in the base's place is not taken for it.",
        tests=[
            "tests/interchange/test_description.py::test_another_model_of_the_same_name_is_never_taken_for_the_base"
        ],
    ),
    Mutant(
        name="adapter-base-not-remembered",
        file="dist_subspace/interchange/base_model.py",
        text="            remember_base(path, described[OWN][FINGERPRINT])\n",
        becomes="            pass\n",
        promise="A base that was moved beside another is found where this machine has seen it.",
        tests=["tests/interchange/test_description.py::test_a_base_anywhere_on_this_machine_is_found_by_what_it_holds"],
    ),
    Mutant(
        name="adapter-of-another-format",
        file="dist_subspace/interchange/description.py",
        text='if ours.get("format") != FORMAT:',
        becomes="if False:",
        promise="An adapter of another format is refused.",
        tests=["tests/interchange/test_adapter.py::test_an_adapter_of_another_format_or_an_unknown_method_is_said"],
    ),
    Mutant(
        name="adapter-shape-of-one-side",
        file="dist_subspace/interchange/fitting.py",
        text="return module.out_features, module.in_features",
        becomes="return module.out_features, module.out_features",
        promise="An adapter of a layer of another shape is refused.",
        tests=["tests/test_cli.py::test_merge_holds_the_base_as_it_is_told"],
    ),
    Mutant(
        name="adapter-copies-unchecked",
        file="dist_subspace/interchange/peft/base_copies.py",
        text='if list(parameter.shape) != copies[name]["shape"] or not torch.allclose(',
        becomes='if list(parameter.shape) != copies[name]["shape"] or False and not torch.allclose(',
        promise="Weights of the base in PEFT's file must be this base's.",
        tests=["tests/interchange/peft/test_rules.py::test_the_copy_is_compared_with_a_base_in_fewer_bits[bf16]"],
    ),
    Mutant(
        name="export-without-tokenizer",
        file="dist_subspace/interchange/peft/export.py",
        text="            beside = tokenizer_of(Path(model_or_folder))",
        becomes="            beside = None",
        promise="The adapter's tokenizer goes with the exported one.",
        tests=["tests/interchange/test_description.py::test_a_saved_and_an_exported_adapter_bring_the_bases_tokenizer"],
    ),
    Mutant(
        name="rank-of-a-layer-that-a-pattern-names",
        file="dist_subspace/interchange/model_description.py",
        text="_usual(attachment, parts, ranks).rank",
        becomes="settings.rank",
        promise="The rank in an adapter's file is that of the layers that no rank pattern names.",
        tests=[
            "tests/interchange/test_adapter.py::test_an_adapter_whose_every_layer_a_pattern_names_is_read_back[lora]"
        ],
    ),
]
