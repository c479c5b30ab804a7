"""What an adapter folder holds, read from its two files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import CONFIG, PREFIX, WEIGHTS


def adapter_report(folder: Path) -> dict[str, Any]:
    """Method, base model, settings, counts, bytes, and the Frobenius norm of each tensor.

    Raises:
        UsageError: for a folder without an adapter, or a file that is cut short.
    """
    try:
        described = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no whole adapter: {Path(str(error.filename)).name} is missing") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder} holds no whole adapter ({error}); copy it again") from error
    ours = described.get("dist_subspace") or {}
    return {
        "folder": str(folder),
        "method": ours.get("method") or described.get("peft_type"),
        "peft_type": described.get("peft_type"),
        "base_model": described.get("base_model_name_or_path"),
        "rank": ours.get("rank", described.get("r")),
        "alpha": ours.get("alpha", described.get("lora_alpha")),
        "layers": len(ours.get("layers") or []),
        "modules_to_save": described.get("modules_to_save") or [],
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "norms": {key.removeprefix(PREFIX): float(t.float().norm()) for key, t in tensors.items()},
    }


def adapter_text(found: dict[str, Any]) -> str:
    """The report in lines; a row for each trained tensor with its norm."""
    lines = [f"{key.replace('_', ' ') + ':':<18}{value}" for key, value in found.items() if key != "norms"]
    width = max((len(name) for name in found["norms"]), default=0)
    lines.append("norm of each trained tensor:")
    lines += [f"  {name:<{width}}  {norm:.4g}" for name, norm in found["norms"].items()]
    return "\n".join(lines)
