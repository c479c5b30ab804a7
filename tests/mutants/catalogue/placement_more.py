"""What a second look at placement and interchange found unnoticed."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        name="nvme-buffer-below-a-block",
        file="dist_subspace/placement/deepspeed/presets.py",
        text='"buffer_size": max(_NVME_BUFFER, block_numel)',
        becomes='"buffer_size": _NVME_BUFFER',
        promise="A buffer of the NVMe swapper takes the largest block.",
        tests=[
            "tests/placement/deepspeed/test_presets.py::test_the_buffer_of_the_nvme_swapper_takes_the_largest_block"
        ],
    ),
    Mutant(
        name="overlap-below-stage-3",
        file="dist_subspace/placement/deepspeed/presets.py",
        text='"overlap_comm": stage == 3',
        becomes='"overlap_comm": stage >= 1',
        promise="Below stage 3 an adapter's buckets are not doubled.",
        tests=["tests/placement/deepspeed/test_presets.py::test_deepspeed_accepts_every_preset[zero2]"],
    ),
    Mutant(
        name="prefetch-nothing",
        file="dist_subspace/placement/deepspeed/thresholds.py",
        text='"stage3_prefetch_bucket_size": block_numel',
        becomes='"stage3_prefetch_bucket_size": 0',
        promise="At stage 3 the next block is fetched ahead.",
        tests=[
            "tests/placement/deepspeed/test_presets.py::test_stage_3_keeps_no_weight_whole_and_holds_two_blocks_at_most[zero3]"
        ],
    ),
    Mutant(
        name="manners-breakdown",
        file="dist_subspace/placement/deepspeed/thresholds.py",
        text='"wall_clock_breakdown": False',
        becomes='"wall_clock_breakdown": True',
        promise="The engine does not wait for its own timers.",
        tests=["tests/placement/deepspeed/test_presets.py::test_deepspeed_accepts_every_preset[zero2]"],
    ),
    Mutant(
        name="post-init-quant-taken",
        file="dist_subspace/placement/deepspeed/supported.py",
        text='("quantized_initialization", "post_init_quant")',
        becomes='("quantized_initialization",)',
        promise="ZeRO's own 4-bit weights are refused by either of their keys.",
        tests=["tests/placement/deepspeed/test_presets.py::test_quantised_initialisation_is_refused[post_init_quant]"],
    ),
    Mutant(
        name="bfloat16-section-unknown",
        file="dist_subspace/placement/deepspeed/supported.py",
        text='"bfloat16": "bfloat16", "fp16"',
        becomes='"fp16"',
        promise="An engine that contradicts the model is refused by the section's older name too.",
        tests=["tests/placement/deepspeed/test_presets.py::test_an_engine_that_contradicts_the_model_is_refused"],
    ),
    Mutant(
        name="nvme-lock-of-one-build",
        file="dist_subspace/placement/deepspeed/cpp_helpers.py",
        text='_NVME = ("async_io", "pin_memory")',
        becomes='_NVME = ("async_io",)',
        promise="The lock of either helper's build is seen.",
        tests=[
            "tests/placement/deepspeed/test_cpp_helpers.py::test_nvme_beside_the_lock_of_a_killed_build_is_refused_with_the_files_name[pin_memory]"
        ],
    ),
    Mutant(
        name="stock-warmuplr-decays",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='"warmuplr": ("constant_with_warmup",)',
        becomes='"warmuplr": ("linear",)',
        promise="DeepSpeed's WarmupLR stays at its peak.",
        tests=[
            "tests/placement/deepspeed/test_stock.py::test_a_scheduler_of_deepspeed_is_followed_by_the_transformers_one_of_its_shape"
        ],
    ),
    Mutant(
        name="stock-warmupcosine-is-linear",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='"warmupcosinelr": ("cosine",)',
        becomes='"warmupcosinelr": ("linear",)',
        promise="DeepSpeed's WarmupCosineLR falls as a cosine.",
        tests=[
            "tests/placement/deepspeed/test_stock.py::test_a_scheduler_of_deepspeed_is_followed_by_the_transformers_one_of_its_shape"
        ],
    ),
    Mutant(
        name="stock-lion-in-8-bits",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='"lion": ("lion_32bit",)',
        becomes='"lion": ("lion_8bit",)',
        promise="DeepSpeed's Lion is the Lion of 32 bits.",
        tests=[
            "tests/placement/deepspeed/test_stock.py::test_an_optimizer_of_deepspeed_is_the_one_of_its_name_and_no_other"
        ],
    ),
    Mutant(
        name="stock-values-nearly-equal",
        file="dist_subspace/placement/deepspeed/stock.py",
        text="rel_tol=1e-9",
        becomes="rel_tol=1e-2",
        promise="A JSON's rate that is another than the YAML's is refused.",
        tests=["tests/placement/deepspeed/test_stock.py::test_a_value_that_the_run_would_not_have_is_refused"],
    ),
    Mutant(
        name="stock-lists-of-other-length",
        file="dist_subspace/placement/deepspeed/stock.py",
        text="len(left) == len(right) and all(map(_same, left, right))",
        becomes="all(map(_same, left, right))",
        promise="Betas of another number are refused.",
        tests=["tests/placement/deepspeed/test_stock.py::test_a_value_that_the_run_would_not_have_is_refused"],
    ),
    Mutant(
        name="stock-min-ratio-unread",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='        ("scheduler.params.warmup_min_ratio", "the start of every schedule", 0),\n',
        becomes="",
        promise="A warm-up that begins above zero is refused.",
        tests=["tests/placement/deepspeed/test_stock.py::test_a_value_that_the_run_would_not_have_is_refused"],
    ),
    Mutant(
        name="stock-nested-auto-left",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='            _refuse_left_auto(value, f"{prefix}{key}.")\n',
        becomes="            continue\n",
        promise='An "auto" that nobody resolves is refused in every section.',
        tests=["tests/placement/deepspeed/test_stock.py::test_a_setting_that_nobody_would_read_is_refused"],
    ),
    Mutant(
        name="stage-0-where-the-json-says-a-number",
        file="dist_subspace/placement/deepspeed/json_file.py",
        text='section.get("stage", 0) if isinstance(section, Mapping) else section',
        becomes='section.get("stage", 1) if isinstance(section, Mapping) else section',
        promise="A JSON that names no stage has DeepSpeed's, 0.",
        tests=["tests/placement/deepspeed/test_stock.py::test_a_stage_that_is_not_named_is_deepspeeds_own"],
    ),
    Mutant(
        name="scale-always-1",
        file="dist_subspace/placement/deepspeed/loss_scale.py",
        text="return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0",
        becomes="return 1.0",
        promise="The loss scale is that of DeepSpeed's fp16 optimizer.",
        tests=[
            "tests/placement/deepspeed/test_loss_scale.py::test_an_unsplit_fp16_step_is_the_gradients_whatever_the_loss_scale[128.0]"
        ],
    ),
    Mutant(
        name="missing-scale-never",
        file="dist_subspace/placement/deepspeed/loss_scale.py",
        text='return loss_scale(engine) if hasattr(engine.optimizer, "fp32_groups") else 1.0',
        becomes="return 1.0",
        promise="The unsplit fp16 optimizer is given the scale that it divides by.",
        tests=[
            "tests/placement/deepspeed/test_loss_scale.py::test_an_unsplit_fp16_step_is_the_gradients_whatever_the_loss_scale[128.0]"
        ],
    ),
    Mutant(
        name="norm-times-the-scale",
        file="dist_subspace/placement/deepspeed/loss_scale.py",
        text='return float(norm) / scale if hasattr(engine.optimizer, "fp32_groups") else float(norm)',
        becomes="return float(norm)",
        promise="The gradient's norm is free of the loss scale.",
        tests=[
            "tests/placement/deepspeed/test_loss_scale.py::test_an_unsplit_fp16_step_is_the_gradients_whatever_the_loss_scale[128.0]"
        ],
    ),
    Mutant(
        name="card-without-the-adapter-s-alpha",
        file="dist_subspace/interchange/model_card.py",
        text='ours.get("alpha", config.get("lora_alpha"))',
        becomes='config.get("lora_alpha")',
        promise="The card says the alpha that the adapter has.",
        tests=["tests/interchange/test_model_card.py::test_a_method_that_peft_knows_is_shown_for_both_libraries"],
    ),
    Mutant(
        name="card-trained-in-full-unsaid",
        file="dist_subspace/interchange/model_card.py",
        text='        "trained in full": config.get("modules_to_save"),\n',
        becomes="",
        promise="The card says which modules were trained in full.",
        tests=[
            "tests/interchange/test_model_card.py::test_what_peft_wrote_and_what_was_trained_in_full_are_in_the_table"
        ],
    ),
    Mutant(
        name="chat-template-left-behind",
        file="dist_subspace/interchange/tokenizer_files.py",
        text='    "chat_template.jinja",\n',
        becomes="",
        promise="The chat template goes with an adapter and a merged model.",
        tests=["tests/interchange/test_tokenizer_files.py::test_every_file_of_a_tokenizer_goes_along"],
    ),
    Mutant(
        name="added-tokens-left-behind",
        file="dist_subspace/interchange/tokenizer_files.py",
        text='    "added_tokens.json",\n',
        becomes="",
        promise="Tokens that were added to a tokenizer go with it.",
        tests=["tests/interchange/test_tokenizer_files.py::test_every_file_of_a_tokenizer_goes_along"],
    ),
    Mutant(
        name="merges-left-behind",
        file="dist_subspace/interchange/tokenizer_files.py",
        text='    "merges.txt",\n',
        becomes="",
        promise="A vocabulary goes along with its merges.",
        tests=["tests/interchange/test_tokenizer_files.py::test_every_file_of_a_tokenizer_goes_along"],
    ),
    Mutant(
        name="run-s-new-tokens-not-in-the-tokenizer",
        file="dist_subspace/interchange/tokenizer_files.py",
        text='        extend_tokenizer(tokenizer, model.get("new_tokens") or [])\n',
        becomes="",
        promise="A checkpoint's tokenizer has the run's new tokens.",
        tests=[
            "tests/interchange/test_tokenizer_files.py::test_a_checkpoint_has_the_tokenizer_that_its_run_was_trained_with"
        ],
    ),
    Mutant(
        name="other-tokenizer-of-the-run-ignored",
        file="dist_subspace/interchange/tokenizer_files.py",
        text='if not model.get("tokenizer") and not model.get("new_tokens"):',
        becomes='if not model.get("new_tokens"):',
        promise="A checkpoint has the tokenizer that the run names.",
        tests=[
            "tests/interchange/test_tokenizer_files.py::test_a_checkpoint_has_the_tokenizer_that_its_run_was_trained_with"
        ],
    ),
    Mutant(
        name="tokenizer-of-the-run-not-the-adapter",
        file="dist_subspace/interchange/tokenizer_files.py",
        text="for place in (folder, RunFolder(run).adapter):",
        becomes="for place in (RunFolder(run).adapter, folder):",
        promise="A tokenizer in the folder comes before the run's.",
        tests=[
            "tests/interchange/test_tokenizer_files.py::test_a_tokenizer_in_the_folder_comes_before_the_run_s_final_adapter_s_and_that_before_the_base_s"
        ],
    ),
    Mutant(
        name="base-of-any-run",
        file="dist_subspace/interchange/base_model.py",
        text="if in_run and base_name(in_run) == name:",
        becomes="if in_run:",
        promise="A run's base stands in only for an adapter that names it.",
        tests=["tests/interchange/test_description.py::test_a_run_whose_base_has_another_name_is_not_asked_for_it"],
    ),
    Mutant(
        name="base-remembered-by-a-relative-path",
        file="dist_subspace/interchange/base_model.py",
        text='f"{Path(path).expanduser().resolve()}\\n"',
        becomes='f"{Path(path).expanduser()}\\n"',
        promise="A base that was given by a relative path is found from elsewhere.",
        tests=[
            "tests/interchange/test_description.py::test_a_base_that_was_given_by_a_relative_path_is_found_from_elsewhere"
        ],
    ),
    Mutant(
        name="cache-folder-not-ours",
        file="dist_subspace/interchange/base_model.py",
        text='os.environ.get("DIST_SUBSPACE_CACHE") or Path',
        becomes="Path",
        promise="DIST_SUBSPACE_CACHE names the folder where bases are remembered.",
        tests=[
            "tests/interchange/test_description.py::test_a_base_that_was_given_by_a_relative_path_is_found_from_elsewhere"
        ],
    ),
    Mutant(
        name="base-beside-by-name-alone",
        file="dist_subspace/interchange/base_model.py",
        text="    if wanted is not None:\n        yield folder.resolve().parent / short.name\n",
        becomes="    yield folder.resolve().parent / short.name\n    if wanted is not None:\n",
        promise="Without a fingerprint no folder is taken for the base by its name alone.",
        tests=[
            "tests/interchange/test_description.py::test_without_a_fingerprint_no_folder_beside_the_adapter_is_taken_for_its_name_alone"
        ],
    ),
    Mutant(
        name="sums-in-float32",
        file="dist_subspace/placement/collectives.py",
        text="    dist.all_reduce(tensor)\n",
        becomes="    tensor = tensor.float()\n    dist.all_reduce(tensor)\n",
        promise="Tokens are counted exactly however many they are.",
        tests=["tests/placement/test_collectives.py::test_small_questions_have_the_same_answer_on_every_rank"],
    ),
    Mutant(
        name="sent-as-it-lies",
        file="dist_subspace/placement/collectives.py",
        text=".to(message_device()).contiguous()",
        becomes=".to(message_device())",
        promise="A tensor that lies turned arrives as it is.",
        tests=["tests/placement/test_collectives.py::test_broadcast_tensors_arrive_bit_for_bit[2]"],
    ),
    Mutant(
        name="node-s-first-is-rank-0",
        file="dist_subspace/placement/collectives.py",
        text="if world().local_rank == 0:",
        becomes="if world().rank == 0:",
        promise="Every node's first rank leaves the files that its node needs.",
        tests=["tests/placement/test_collectives.py::test_the_first_rank_of_every_node_works_for_its_node"],
    ),
    Mutant(
        name="handed-layers-uncounted",
        file="dist_subspace/placement/deepspeed/reuse.py",
        text="for one in (function, *handed)",
        becomes="for one in (function,)",
        promise="A block that is handed on and called is used twice.",
        tests=[
            "tests/placement/deepspeed/test_reuse.py::test_a_stack_that_is_used_again_is_found",
            "tests/placement/deepspeed/test_reuse.py::test_a_stack_that_is_walked_once_is_found",
        ],
    ),
    Mutant(
        name="config-s-number-of-layers-unread",
        file="dist_subspace/placement/deepspeed/reuse.py",
        text="if several or (isinstance(layers, int) and layers > len(list(stack.children()))):",
        becomes="if several:",
        promise="A stack of fewer blocks than the configuration has layers is used again.",
        tests=["tests/placement/deepspeed/test_reuse.py::test_a_stack_that_is_used_again_is_found"],
    ),
    Mutant(
        name="import-on-a-base-without-tokenizer",
        file="dist_subspace/api.py",
        text="tokenizer = folder if has_tokenizer(Path(folder)) else None",
        becomes="tokenizer = None",
        promise="An adapter of PEFT that is read on its base brings its own tokenizer.",
        tests=["tests/interchange/test_commands.py::test_import_asks_for_the_base_where_the_start_is_made_from_it"],
    ),
    Mutant(
        name="import-on-a-base-without-its-task",
        file="dist_subspace/api.py",
        text='task=imported.task or "causal-lm")',
        becomes='task="causal-lm")',
        promise="An adapter of PEFT is read on the model of its task.",
        tests=["tests/interchange/test_commands.py::test_import_loads_the_base_as_the_model_of_the_adapters_task"],
    ),
    Mutant(
        name="stock-bias-correction-unread",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='        ("optimizer.params.bias_correction", "the bias correction of every Adam", True),\n',
        becomes="",
        promise="A JSON's Adam without bias correction is refused.",
        tests=["tests/placement/deepspeed/test_stock.py::test_a_value_that_the_run_would_not_have_is_refused"],
    ),
    Mutant(
        name="stock-decay-in-the-gradient-unread",
        file="dist_subspace/placement/deepspeed/stock.py",
        text='        ("optimizer.params.adam_w_mode", "the decay of weights apart from their gradient", True),\n',
        becomes="",
        promise="A JSON's Adam that decays by the gradient is refused.",
        tests=["tests/placement/deepspeed/test_stock.py::test_a_value_that_the_run_would_not_have_is_refused"],
    ),
    Mutant(
        name="offload-that-is-no-mapping",
        file="dist_subspace/placement/deepspeed/supported.py",
        text="        if not isinstance(target, Mapping):\n            yield",
        becomes="        if False:\n            yield",
        promise="An offload that is no mapping is refused in one sentence.",
        tests=["tests/placement/deepspeed/test_presets.py::test_an_offload_that_cannot_be_is_refused"],
    ),
    Mutant(
        name="sentencepieces-of-a-pair-left-behind",
        file="dist_subspace/interchange/tokenizer_files.py",
        text='    "target.spm",\n',
        becomes="",
        promise="Both models of a pair of languages go along.",
        tests=["tests/interchange/test_tokenizer_files.py::test_every_file_of_a_tokenizer_goes_along"],
    ),
]
