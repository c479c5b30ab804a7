"""The keys of the section `data`. All runs of the bench share one `data.cache_dir`: tokens of other settings are never taken."""

from __future__ import annotations

from tests.keys import data_columns, data_files, data_lengths
from tests.keys.table import Key

_CALL, _CHAT = "the tokenizer's own call", "tokenizer.apply_chat_template"
_COLUMN = "the column that is read, not the one of the format's name"

KEYS = [
    Key(
        "data.train",
        (".json", ".jsonl", ".csv", ".parquet", ".txt"),
        "the records",
        "datasets.Dataset.from_json, from_csv, from_parquet, from_text",
        data_files.train,
    ),
    Key("data.train.path", ("three files",), "all of a list are read", _CALL, data_files.train_path),
    Key("data.train.weight", (2.0, 0.5), "how often samples come in an epoch", "a count", data_files.train_weight),
    Key(
        "data.eval", ("a file", 0.3), "what is evaluated on, and not trained on", "transformers' loss", data_files.eval_
    ),
    Key(
        "data.format",
        ("alpaca", "chat", "completion", "text", "classification", "preference", "unpaired-preference"),
        "ids, labels, and the loss of a step",
        f"{_CALL}, {_CHAT}, transformers' loss of one batch",
        data_columns.format_,
    ),
    Key(
        "data.max_length",
        (24,),
        "prompts lose their left part; pieces of a text",
        "its definition",
        data_lengths.max_length,
    ),
    Key(
        "data.packing",
        (True, False),
        "rows shared, the loss unchanged",
        "transformers' loss unpacked",
        data_lengths.packing,
    ),
    Key("data.template", ("Q {{{instruction}}} ...",), "alpaca's prompt", _CALL, data_columns.template),
    Key("data.text_field", ("other",), _COLUMN, _CALL, data_columns.renamed("text")),
    Key("data.prompt_field", ("other",), _COLUMN, _CALL, data_columns.renamed("prompt")),
    Key("data.completion_field", ("other",), _COLUMN, _CALL, data_columns.renamed("completion")),
    Key("data.instruction_field", ("other",), _COLUMN, _CALL, data_columns.renamed("instruction")),
    Key("data.input_field", ("other",), _COLUMN, _CALL, data_columns.renamed("input")),
    Key("data.output_field", ("other",), _COLUMN, _CALL, data_columns.renamed("output")),
    Key("data.chosen_field", ("other",), _COLUMN, _CALL, data_columns.preferred("chosen")),
    Key("data.rejected_field", ("other",), _COLUMN, _CALL, data_columns.preferred("rejected")),
    Key("data.messages_field", ("other",), _COLUMN, _CHAT, data_columns.messages_field),
    Key("data.label_field", ("other",), _COLUMN, "names in their order", data_columns.label_field),
    Key("data.tools_field", ("other",), _COLUMN, f"{_CHAT}(tools=)", data_columns.tools_field),
    Key("data.documents_field", ("other",), _COLUMN, f"{_CHAT}(documents=)", data_columns.documents_field),
    Key(
        "data.chat_template_kwargs_field",
        ("other",),
        _COLUMN,
        f"{_CHAT}(mood=)",
        data_columns.chat_template_kwargs_field,
    ),
    Key(
        "data.truncation",
        ("tokens",),
        "what a long conversation loses",
        f"{_CHAT} of fewer turns",
        data_lengths.truncation,
    ),
    Key("data.split", ("extra",), "the part of a Hub data set", "datasets.load_dataset(split=)", data_files.hub_split),
    Key(
        "data.eval_split",
        ("extra",),
        "the part that is held out",
        "datasets.load_dataset(split=)",
        data_files.hub_eval_split,
    ),
    Key(
        "data.cache_dir",
        ("elsewhere", None),
        "where the tokens lie",
        "numpy.load of what is there",
        data_files.cache_dir,
    ),
]
