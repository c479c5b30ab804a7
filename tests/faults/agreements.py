"""Where a rank can fail alone: for every call of an agreement or a message a fault, or the reason why it needs none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.faults.injection import Fault
from tests.faults.places import Place, function, places


@dataclass(frozen=True)
class Row:
    """A fault of one rank in one place.

    place: of `places()`, or a function. scene: what is run, or called, there (test_agreement.py). target, kind, after: as
    `Fault` has them (a target that begins with a dot is the product's). rank: the one at fault; 0 where the others only wait.
    """

    place: str
    scene: str
    target: str
    rank: int = 1
    kind: str = "disk"
    after: int = 0

    @property
    def fault(self) -> Fault:
        place: Place = places().get(self.place) or function(self.place)
        target = f"dist_subspace{self.target}" if self.target.startswith(".") else self.target
        return Fault(target, place, self.kind, self.after)

    @property
    def agrees(self) -> bool:
        """Whether the ranks agree at the end of the place, instead of finding out."""
        return self.place in places() and "(" in self.place

    def __str__(self) -> str:
        """`training-plan-make_plan-checking-the-configuration-check_installed`."""
        words = f"{self.place} {self.target.partition(':')[2]} {'kill' if self.kind == 'kill' else ''}"
        return "-".join(re.findall(r"\w+", words.replace("agreed(", "").replace("on_main(", "")))


_T, _D, _C, _S = ".training", ".training.data", ".checkpoint", ".checkpoint.state"
_MLP = "transformers.models.llama.modeling_llama:LlamaMLP.forward"
_MAKING = "training/trainer Trainer._make_engine agreed"
_LOADING = "loading/load load_frozen together"
_SEEN = "placement/shared_folders seen_by_ranks"
_DATA = "training/prepared_data prepare_data agreed"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"

# In a run: each agreement, then each message with what a rank does for itself before it, then what lies between two of them.
RUNS = [
    Row("training/run _train agreed('reading the configuration')", "plain", ".config.load:_read", kind="usage"),
    Row("training/run _watch_ranks agreed(\"opening this rank's log\")", "plain", f"{_T}.run:RankLog", kind="usage"),
    Row("training/run_status RunStatus.take on_main(self._occupy)", "plain", f"{_C}.store:check_writable", 0, "usage"),
    Row("training/plan make_plan agreed('checking the configuration')", "plain", f"{_T}.trackers:check_installed", kind="usage"),
    Row("training/plan make_plan on_main(_open_run)", "plain", f"{_C}.store:remove_leftovers", 0),
    Row("training/plan make_plan on_main(_find_beginning)", "begun", f"{_T}.beginning:find_beginning", 0, "json"),
    Row("training/plan make_plan agreed('reading the tokenizer')", "plain", ".loading.tokenizer:load_tokenizer"),
    Row(f"{_SEEN} on_main(_leave_mark)", "plain", ".placement.shared_folders:_clear", 0, "usage"),
    Row(f"{_SEEN} agreed('looking for a file of rank 0')", "plain", ".placement.shared_folders:_finds"),
    Row(f"{_SEEN} on_main(_take_away)", "plain", ".placement.shared_folders:_take_away", 0),
    Row("checkpoint/elsewhere refuse_newer_elsewhere agreed('looking for checkpoints')", "plain", f"{_C}.elsewhere:_newest"),
    Row(f"{_DATA}('reading the tokenizer')", "plain", f"{_T}.prepared_data:tokenizer_digest", kind="usage"),
    Row(f"{_DATA}('reading the data')", "plain", f"{_D}.sources:open_sources", 0, "usage"),
    Row(f"{_DATA}('tokenising the data')", "plain", f"{_D}.tokens:prepare", 0, "usage"),
    Row(f"{_DATA}('reading the tokenised data')", "plain", f"{_D}.store:read_columns"),
    Row("training/plan make_plan agreed('planning the batches')", "plain", f"{_D}.batches:Batches.__init__", kind="usage"),
    Row("training/plan make_plan agreed(\"comparing the model's files\")", "plain", f"{_C}.fingerprint:base_fingerprint", 0),
    Row("training/plan make_plan on_main(_fingerprints)", "plain", f"{_T}.plan:_fingerprints", 0),
    Row("training/plan make_plan on_main(_find_checkpoint)", "frozen", f"{_C}.state:read_trainer_state", 0, "json"),
    Row("training/plan make_plan on_main(choose_rate)", "plain", f"{_T}.learning_rate:model_widths", 0, "usage"),
    Row(f"{_LOADING}(\"reading the model's configuration\")", "plain", ".loading.index:open_checkpoint"),
    Row(f"{_LOADING}(\"reading the model's weights\")", "zero3", ".storage.registry:storage_info"),
    Row("training/model _attached on_main(_layers)", "frozen", f"{_T}.model:_layers", 0, "json"),
    Row("training/beginning attach_beginning on_main(_about)", "begun", f"{_T}.beginning:_about", 0),
    Row("training/beginning attach_beginning on_rank_zero_only(_tensors_of)", "begun", f"{_T}.beginning:_tensors_of", 0),
    Row("statistics/setup set_up_statistics on_main(_stored)", "pissa", ".statistics.cache:FactorCache.has", 0),
    Row("statistics/setup set_up_statistics on_main(_keep_given)", "begun", ".statistics.cache:FactorCache.write", 0),
    Row("statistics/setup set_up_statistics on_main(store.write)", "pissa", ".statistics.cache:FactorCache.write", 0, after=1),
    Row("statistics/setup _read on_main(read)", "pissa-again", ".statistics.cache:FactorCache.read", 0, after=1),
    Row("statistics/rounds in_rounds agreed('a statistic of the frozen weights')", "pissa", "torch.linalg:svd"),
    Row("training/trainer Trainer._resume on_main(check_factors)", "pissa-again", f"{_C}.state:read_description", 0, "usage"),
    Row("checkpoint/state _check_frozen on_rank_zero_only(_read_tensors)", "frozen", f"{_C}.state:_read_tensors", 0),
    Row("checkpoint/state _check_frozen agreed('comparing frozen factors')", "frozen", "torch:equal", kind="usage"),
    Row("checkpoint/state restore on_main(_optimizer_sizes)", "frozen", f"{_C}.state:_optimizer_sizes", 0, "usage"),
    Row("checkpoint/state StoredState.sent on_rank_zero_only(_read_tensors)", "frozen", f"{_S}:_read_tensors", 0, "usage"),
    Row("checkpoint/state _restore_schedule on_rank_zero_only(adapter_by_part)", "dash-again", f"{_S}:adapter_by_part", 0),
    Row("training/trainer Trainer._resume on_main(best_in_run)", "frozen", f"{_T}.progress:best_in_run", 0),
    Row("training/run _run agreed('opening the run directory')", "plain", f"{_C}.set_aside:set_aside_others", 0),
    Row("checkpoint/state save_checkpoint on_main(write_checkpoint)", "plain", ".interchange.adapter:write_adapter", 0),
    Row("training/trainer Trainer._write on_main(purge)", "plain", f"{_C}.store:purge", 0, after=1),
    Row("checkpoint/state save_checkpoint on_main(write_checkpoint)", "plain", f"{_T}.observer:Observer.sync", 0),
    Row("training/run _run on_main(hide_adapter)", "diverged", f"{_T}.results:hide_adapter", 0),
    Row("training/run _run on_main(doubts)", "plain", f"{_T}.results:doubts", 0),
    Row("training/run _run on_main(write_results)", "plain", f"{_T}.results:model_card", 0),
    # Messages.
    Row("training/trainer Trainer._refuse_leaky_packing max_over_ranks", "packed", _MLP),
    Row("checkpoint/state restore", "frozen", ".placement.deepspeed.engine:DeepSpeedEngine.write_state"),
    Row("training/trainer Trainer.one_step sum_over_ranks", "plain", f"{_D}.batches:Batches.batch", after=1),
    Row("training/observer Observer.log max_over_ranks", "plain", f"{_T}.memory:peak_memory"),
    Row("training/evaluate evaluate sum_over_ranks", "plain", _MLP, after=1, kind="json"),
    Row("training/engine Stepper.measure sum_over_ranks", "plain", _MLP),
    Row("advancing _mean_gradients summed_over_ranks", "adalora", ".subspace.core.collect:GradientCollector.take"),
    # What lies between.
    Row("training/model _loaded", "plain", ".placement.engines:check_supported", kind="usage"),
    Row("training/model _attached", "zero3", ".api:attach_method", kind="usage"),
    Row(f"{_MAKING}('making the optimizer')", "plain", f"{_T}.optimizers:make_optimizer", kind="usage"),
    Row("placement/deepspeed/engine initialize", "zero3", "deepspeed:initialize", 0),
    Row("training/trainer Trainer._resume", "frozen", f"{_T}.engine:Stepper.prime", 0),
    Row("training/run _say_first", "frozen", f"{_T}.changes:changed_settings", 0, "usage"),
    Row("training/engine Stepper._backward", "zero3", _MLP, after=1),
    Row("training/engine Stepper._backward", "plain", f"{_ENGINE}.backward", 0, after=1),
    Row("placement/deepspeed/engine DeepSpeedEngine.step", "plain", f"{_ENGINE}.step"),
    Row("training/trainer Trainer.one_step", "plain", f"{_T}.schedule:Schedule.advance", after=1),
    Row("training/observer Observer.log", "plain", ".run_folder.metrics:MetricsWriter.write", 0),
    Row("training/trainer Trainer.evaluate", "plain", f"{_D}.batches:eval_batches"),
    Row("checkpoint/state save_checkpoint", "plain", ".interchange.model_description:adapter_config", after=1),
    Row("training/observer Observer.close", "plain", ".run_folder.metrics:MetricsWriter.close", 0),
    # A rank that says nothing any more.
    Row("training/engine Stepper._backward", "plain", _MLP, 1, "kill", after=1),
    Row("training/plan make_plan on_main(_fingerprints)", "plain", f"{_T}.plan:_fingerprints", 0, "kill"),
]  # fmt: skip

_STATE, _PLANNED = "trainers/state", "restore_schedule"
_SEARCH = "rate_search/command _searched agreed"
_I, _F = ".interchange", ".interchange.adapter_folder"
_OPENING = f"{_F}:AdapterFolder.__init__"
_FITTING = "api attach_adapter agreed('comparing the adapter with the model')"
_COPIES = "interchange/peft/base_copies check_copies agreed"
# In a library call that is made on every rank.
CALLS = [
    Row(f"{_LOADING}(\"reading the model's configuration\")", "load", ".placement.for_loading:read_deepspeed"),
    Row("loading/twins compare together('comparing tensors of the checkpoint')", "load", ".loading.twins:world"),
    Row(f"{_LOADING}('planning the load')", "load", ".loading.stream:find_sources"),
    Row(f"{_LOADING}(\"reading the model's weights\")", "load", ".loading.stream:Stream.run"),
    Row("loading/load download once_per_node(fetch_missing)", "download", ".loading.load:fetch", 0, "usage"),
    Row("api load_adapter agreed('reading the adapter')", "load_adapter", f"{_F}:read_adapter", kind="usage"),
    Row(_FITTING, "load_adapter", f"{_I}.loaded_adapter:LoadedAdapter.check", 1, "usage"),
    Row("interchange/adapter fill_adapter agreed('reading the adapter')", "load_adapter", f"{_I}.tensor_names:file_key"),
    Row("api import_peft agreed(\"reading PEFT's adapter\")", "import_peft", f"{_I}.peft.importing:read_peft"),
    Row(f"{_COPIES}(\"finding the base's own weights\")", "import_peft", f"{_I}.peft.base_copies:_parameter"),
    Row(f"{_COPIES}(\"comparing the base's own weights\")", "import_peft", f"{_I}.peft.base_copies:_sample"),
    Row("adapted/opened open_adapted agreed('looking for the adapter')", "generate", ".adapted.opened:find_source", kind="usage"),
    Row("adapted/opened open_adapted agreed('reading the tokenizer')", "generate", ".adapted.opened:load_tokenizer"),
    Row("adapted/combining combine_adapters on_main(_combined)", "combine", ".adapted.combining:write_adapter", 0),
    Row("adapted/switching switch_adapter agreed('reading the adapter')", "switch", ".adapted.switching:adapter_folder"),
    Row("talking/command _generate agreed('reading the options')", "generate", ".talking.command:_checked", kind="usage"),
    Row("talking/command _generate agreed('preparing to generate')", "generate", ".talking.command:_prepared", kind="usage"),
    Row("talking/files answer_file on_main(begin)", "generate", ".talking.files:read_prompts", 0, "usage"),
    Row("generation/answers rounds agreed('measuring the prompts')", "generate", ".generation.answers:checked_room"),
    Row("generation/answers answered", "generate", ".generation.answers:_written"),
    Row("talking/files answer_file on_main(_append)", "generate", ".talking.answer_file:AnswerFile.append", 0),
    Row("talking/files answer_file on_main(finish)", "generate", ".talking.answer_file:AnswerFile.finish", 0),
    Row("evaluation/measuring measure on_main(read_material)", "evaluate", ".evaluation.reading:read_samples", 0, "usage"),
    Row("evaluation/model _open_base agreed('reading the tokenizer')", "evaluate", ".evaluation.model:load_tokenizer"),
    Row("evaluation/measuring kept_by_main on_main(keep)", "evaluate", ".evaluation.measuring:_open_predictions", 0),
    Row("evaluation/measuring _results on_main(_write)", "evaluate", ".evaluation.measuring:_write", 0),
    Row(f"{_SEARCH}('reading the configuration')", "search", ".rate_search.asked:Asked.check", kind="usage"),
    Row(f"{_SEARCH}('planning the search')", "search", ".rate_search.command:rungs", kind="usage"),
    Row("interchange/adapter save_adapter agreed('describing the adapter')", "save_adapter", f"{_I}.adapter:base_tokenizer"),
    Row("interchange/adapter save_adapter on_main(write)", "save_adapter", f"{_I}.adapter:write_adapter", 0),
    Row("interchange/adapter _factors whole_on_main(frozen)", "save_adapter", f"{_I}.adapter:_on_cpu", 0),
    Row("trainers/state save_state on_main(write)", "save_state", ".trainers.state:save_file", 0),
    Row(f"{_STATE} _tensors on_rank_zero_only(read)", "restore_values", ".trainers.state:safe_open", 0),
    Row(
        f"{_STATE} restore_values agreed('comparing the checkpoint with the model')",
        *("restore_values", ".trainers.state:_check_alike", 1, "usage"),
    ),
    Row(f"{_STATE} restore_schedule on_rank_zero_only(adapter_by_part)", _PLANNED, ".trainers.state:adapter_by_part", 0),
    Row(f"{_STATE} restore_schedule on_main(_numbers)", _PLANNED, ".trainers.state:_numbers", 0),
    Row(f"{_STATE} restore_schedule on_main(_check_adapter)", _PLANNED, ".trainers.state:_check_adapter", 0, "usage"),
    Row("interchange/merge merge agreed('planning the merge')", "merge", f"{_I}.merge:plain_entries", kind="usage"),
    Row("interchange/merge merge on_main(begin_folder)", "merge", ".atomic_files:hidden_folder", 0),
    Row("interchange/merge _write whole_on_main(entry.entry.needs)", "merge", f"{_I}.weights:WeightsWriter.write", 0, after=1),
    Row("interchange/merge merge on_main(_finish)", "merge", f"{_I}.weights:WeightsWriter.finish", 0),
    Row("interchange/peft/export export_peft agreed('planning the export')", "export", f"{_I}.peft.export:adapter_config"),
    Row("interchange/peft/export export_peft on_main(_export_folder)", "export_folder", _OPENING, 0, "json"),
    Row("interchange/peft/export _export_model on_main(_choose)", "export", f"{_I}.peft.export:_choose", 0, "usage"),
    Row("interchange/peft/export _export_model on_main(_write_form)", "export", f"{_I}.peft.export:_write", 0),
    Row("interchange/peft/export _export_model on_main(_write_experts)", "export_experts", f"{_I}.peft.export:_write", 0),
    Row("interchange/peft/export _export_model _on_whole(layer)", "export_experts", f"{_I}.peft.export:pair_of", 0),
    Row("interchange/peft/export _export_model _on_whole(name)", "export", f"{_I}.peft.export:_form_of", 0),
    Row("interchange/peft/export _export_model _on_whole(n)", "export", f"{_I}.peft.forms:lora_of", 0),
]  # fmt: skip

_PASSED_ON = "it is what the functions around it are made of, and theirs are the rows"
_SENT = "what is sent was made in an agreement that has a row, and a message of ours has no work of a rank before it"
NO_ROW = {
    "checkpoint/state on_rank_zero_only on_main(run)": _PASSED_ON,
    "placement/tensors whole_on_main agreed(what)": _PASSED_ON,
    "interchange/peft/export _on_whole whole_on_main(gathered)": _PASSED_ON,
    "advancing _decompose broadcast_tensors": _SENT,
    "placement/deepspeed/partitioner Partitioner.of_all gather_objects": _SENT,
    "placement/deepspeed/partitioner Partitioner.of_first broadcast_object": _SENT,
    "placement/deepspeed/partitioner Partitioner.summed summed_over_ranks": _SENT,
    "placement/replicas Replicas.of_all gather_objects": _SENT,
    "placement/replicas Replicas.of_first broadcast_object": _SENT,
    "placement/replicas Replicas.__init__ gather_objects": "it follows an agreement at once",
    "checkpoint/state StoredState.sent broadcast_tensors": _SENT,
    "checkpoint/state _restore_schedule broadcast_tensors": _SENT,
    "checkpoint/state _check_frozen broadcast_tensors": _SENT,
    "interchange/merge merge broadcast_object": _SENT,
    "trainers/state _tensors broadcast_tensors": _SENT,
    "trainers/state restore_schedule broadcast_tensors": _SENT,
    "statistics/setup _read broadcast_tensors": _SENT,
    "statistics/setup _replace_base broadcast_object": _SENT,
    "statistics/setup _replace_base broadcast_tensors": _SENT,
    "statistics/setup set_up_statistics broadcast_tensors": _SENT,
    "training/beginning attach_beginning broadcast_tensors": _SENT,
    "generation/answers answered agreed('writing answers')": "the row of the whole function: it stands in an expression",
    "generation/answers answered gather_objects": "it follows an agreement at once, or is one of many messages",
    "training/preferences/evaluate evaluate_preferences sum_over_ranks": "as training/evaluate evaluate",
    "training/preferences/objectives Kto.begin sum_over_ranks": "as Trainer.one_step, whose first forward it is",
    "placement/generation _someone_writes sum_over_ranks": "tests/placement/test_generation.py: a rank whose call is refused",
    "talking/files answer_file any_rank": "it asks who was told to stop, and reads no file",
    "talking/terminal next_line meet": "rank 0 waits for its user, and the others for rank 0, which only a signal ends",
    "talking/terminal next_line broadcast_object": _SENT,
    "evaluation/command _evaluated on_main(read_subject)": "tests/evaluation/test_command.py: refused on two ranks",
    "evaluation/command _evaluated on_main(_conclude)": "rank 0 speaks and writes, as in a row of evaluation/measuring",
    "evaluation/harness measure_tasks agreed('reading the tasks')": "what it reads is there with the extra `eval` alone",
    "evaluation/measuring _all_results broadcast_object": _SENT,
    "evaluation/scoring heed gather_objects": "it asks who was told to stop, and reads no file",
    "evaluation/scoring scores gather_objects": "tests/evaluation/test_command.py: a rank that fails in a forward",
    "evaluation/harness shared gather_objects": "forwards, as in evaluation/scoring, stand before it",
    "evaluation/harness _results broadcast_object": "forwards, as in evaluation/scoring, stand before it",
    "rate_search/command _searched refuse_unlike": "it follows an agreement at once",
    "rate_search/command _found on_main(_conclude)": "rank 0 speaks and writes, as in a row of evaluation/measuring",
    "rate_search/bench Bench.__init__ max_over_ranks": "an evaluation stands before it, which has rows of its own",
    "rate_search/bench Bench._seconds_of_a_step max_over_ranks": "a step stands before it, which has rows of its own",
    "rate_search/held hold broadcast_object": "parameters are gathered before it, by all or by none",
    "rate_search/held HeldTensors.sent broadcast_tensors": _SENT,
    "interchange/merge merge all_here": "it is the first line: tests/placement/test_collectives.py lets a rank come alone",
    "interchange/peft/export export_peft all_here": "it is the first line, as in merge",
    "training/last_words end meet": "the last line of every run; a peer that is gone is no news there",
    "placement/edits restart_counters any_rank": "it asks what the ranks hold, and reads no file",
    "placement/edits restart_counters max_over_ranks": "it asks what the ranks hold, and reads no file",
    "training/pause Pause.__call__ largest_over_ranks": "a decision: tests/faults/test_decisions.py",
    "training/pause Pause.agree gather_objects": "a decision: tests/faults/test_decisions.py",
    "training/run _train refuse_unlike": "a decision: tests/faults/test_decisions.py",
    "training/plan make_plan refuse_unlike": "a decision: tests/faults/test_decisions.py",
    "training/whereabouts whereabouts gather_objects": "it follows an agreement at once",
    "loading/computation_type unset_type any_rank": "it asks torch what the processors multiply, and reads no file",
    "training/environment gather_environment gather_objects": "it sends names of host and processor, which every rank has",
    "training/run _run on_main(show_dry_run)": "the last line of a dry run; what it shows is in memory",
    "placement/shared_folders seen_by_ranks gather_objects": "it follows an agreement at once",
    "checkpoint/elsewhere refuse_newer_elsewhere gather_objects": "it follows an agreement at once",
    "placement/nodes ranks_per_node gather_objects": "it follows an agreement at once",
    "placement/nodes ranks_per_node agreed('counting the ranks of each node')": "it reads what the launcher's reader has read "
    "before, and no file: in tests/placement/test_nodes.py ranks say nothing, and are refused by all",
    "training/prepared_data _compared gather_objects": "it follows an agreement at once",
    "training/prepared_data prepare_data refuse_unlike": "a decision: tests/faults/test_decisions.py",
    "loading/load download refuse_unlike": "it follows an agreement at once: tests/loading/test_hub.py",
    "loading/load download any_rank": "a decision: tests/faults/test_decisions.py",
}
