"""What others get: cards, pushes, names on the Hub, trackers."""

from __future__ import annotations

from tests.mutants.catalogue.wiring import key_tests
from tests.mutants.mutant import Mutant

_CARD = "tests/interchange/test_model_card.py"
_CONTENTS = "tests/publishing/test_contents.py"
_PUSH = "tests/publishing/test_push.py"

MUTANTS = [
    Mutant(
        name="card-shows-where-the-base-lies",
        file="dist_subspace/interchange/card_usage.py",
        text='return f"path/to/{Path(short).name}" if is_local(short) else short',
        becomes="return short",
        promise="No path of this machine is in a card.",
        tests=[f"{_CARD}::test_a_local_base_model_is_no_repository_of_the_hub"],
    ),
    Mutant(
        name="card-offers-dora-to-vllm",
        file="dist_subspace/interchange/card_usage.py",
        text="has_one_scale(config) and not reader_notes(config)",
        becomes="has_one_scale(config)",
        promise="vLLM is shown where it reads the files.",
        tests=[f"{_CARD}::test_vllm_is_shown_where_it_reads_the_files"],
    ),
    Mutant(
        name="card-with-our-names-of-metrics",
        file="dist_subspace/interchange/card_training.py",
        text="return _METRICS.get(name, name)",
        becomes="return name",
        promise="A card has the Hub's names of metrics.",
        tests=[f"{_CARD}::test_the_head_of_a_card_is_what_the_hub_takes_with_figures_data_and_license"],
    ),
    Mutant(
        name="edited-card-is-overwritten",
        file="dist_subspace/training/card.py",
        text="return None if is_unedited(card) else card",
        becomes="return None",
        promise="A card that a person has edited is kept.",
        tests=["tests/training/test_card.py"],
    ),
    Mutant(
        name="push-over-what-was-edited-on-the-hub",
        file="dist_subspace/publishing/push.py",
        text="not is_unedited(on_hub) and is_unedited(card)",
        becomes="False",
        promise="A card that was edited on the Hub stays.",
        tests=[f"{_PUSH}::test_what_is_outdated_goes_and_what_people_put_there_stays"],
    ),
    Mutant(
        name="push-of-whatever-lies-there",
        file="dist_subspace/publishing/contents.py",
        text="    return files | {f",
        becomes='    files |= {p.name: p for p in folder.glob("*.safetensors")}\n    return files | {f',
        promise="Optimizer state is not pushed.",
        tests=[f"{_PUSH}::test_what_was_pushed_is_loaded_by_its_name_and_computes_the_same"],
    ),
    Mutant(
        name="push-waits-for-ranks-that-are-gone",
        file="dist_subspace/interchange/peft/export.py",
        text='return _export_folder(folder, _Wish(out, "auto", None, tokenizer=tokenizer_of(folder)))',
        becomes="return export_peft(folder, out, report=None)",
        promise="The form for PEFT is made by one rank that nobody waits for.",
        tests=[f"{_CONTENTS}::test_the_form_for_peft_is_made_by_one_rank_that_nobody_waits_for"],
    ),
    Mutant(
        name="push-leaves-another-form-beside",
        file="dist_subspace/publishing/contents.py",
        text='n.startswith(f"{EXPORT}/") or ',
        becomes="",
        promise="Another method's form for PEFT does not stay in the repository.",
        tests=[f"{_CONTENTS}::test_of_an_earlier_push_goes_what_would_be_read_beside_the_new_one"],
    ),
    Mutant(
        name="private-push-into-a-public-repository",
        file="dist_subspace/publishing/repository.py",
        text="if self.private and info.private is False:",
        becomes="if False:",
        promise="What shall be private is not pushed where everybody reads.",
        tests=[f"{_PUSH}::test_what_the_hub_does_not_take_is_one_sentence"],
    ),
    Mutant(
        name="adapter-pushed-beside-a-model",
        file="dist_subspace/publishing/push.py",
        text="if found not in (None, kind):",
        becomes="if False:",
        promise="An adapter is not pushed into a model's repository.",
        tests=[f"{_PUSH}::test_what_the_hub_does_not_take_is_one_sentence"],
    ),
    Mutant(
        name="a-hub-that-fails-fails-the-run",
        file="dist_subspace/publishing/at_the_end.py",
        text="    except Exception as error:  # the run is whole, whatever happened here\n",
        becomes="    except KeyError as error:\n",
        promise="A Hub that fails never fails a run.",
        tests=["tests/publishing/test_at_the_end.py::test_a_hub_that_is_down_stops_no_run"],
    ),
    Mutant(
        name="run-pushes-nothing",
        file="dist_subspace/training/run.py",
        text="    run.result = plan.run_dir.adapter\n",
        becomes="",
        promise="run.push_to_hub pushes the final adapter.",
        tests=key_tests("run.push_to_hub"),
    ),
    Mutant(
        name="a-broken-download-is-an-adapter",
        file="dist_subspace/loading/hub.py",
        text='        if not all((folder / name).exists() for name in files if "*" not in name):\n            return None\n',
        becomes="",
        promise="A copy that lacks the adapter's weights is no copy.",
        tests=["tests/interchange/test_hub_adapter.py"],
    ),
    Mutant(
        name="tracker-without-the-configuration",
        file="dist_subspace/training/tracked.py",
        text="self._tracker.store_init_configuration(dict(flat(config)))",
        becomes="pass",
        promise="Trackers get the configuration.",
        tests=["tests/training/test_trackers.py::test_tensorboard_gets_the_configuration_and_the_picture"],
    ),
    Mutant(
        name="tracker-with-a-second-branch",
        file="dist_subspace/training/tracked.py",
        text='hidden = {"purge_step": resume_step + 1} if resume_step else {}',
        becomes="hidden: Arguments = {}",
        promise="A resumed run's curve has no second branch.",
        tests=["tests/training/test_trackers.py::test_a_resumed_run_has_one_branch_in_tensorboard"],
    ),
]
