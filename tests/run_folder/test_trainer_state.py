"""trainer_state.json is read back, that of an older version too, and another format is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.run_folder.trainer_state import TrainerState, read_trainer_state, write_trainer_state

STATE = TrainerState(3, 24, 900, 1.5, 3, {"name": "cosine"}, {"model": "aa"}, best={"step": 2}, begun={"rank": 4})


def test_a_state_is_read_back(tmp_path: Path) -> None:
    write_trainer_state(tmp_path, STATE)
    assert read_trainer_state(tmp_path) == STATE
    assert next(iter(json.loads((tmp_path / "trainer_state.json").read_text()).items())) == ("format", 1)


def test_an_older_state_lacks_later_fields_and_another_format_is_refused(tmp_path: Path) -> None:
    write_trainer_state(tmp_path, STATE)
    file = tmp_path / "trainer_state.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in stored.items() if k not in ("begun", "training", "overflowed")}))
    assert read_trainer_state(tmp_path).begun == {}
    file.write_text(json.dumps(stored | {"format": 2}))
    with pytest.raises(UsageError, match="another format than 1"):
        read_trainer_state(tmp_path)
