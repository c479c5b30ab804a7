"""Formats of quantised weights that are not read: refused by name, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.loading.formats.registry import method_of, read_methods

# quant_method -> what a person calls it
NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fouroversix": "Four Over Six",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's own quantisation",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal",
    "modelopt": "NVIDIA ModelOpt",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
INSTEAD = (
    "give the 16-bit model that it was made of, whose weights model.storage quantises while they are read, or one whose weights "
    "are held in bitsandbytes' 4 or 8 bits, in FP8 or in MXFP4"
)


def check_read(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UsageError for weights in a format that is not read; it names the format and what to do."""
    method = method_of(settings)
    if method in read_methods():
        return
    name = NAMES.get(method, repr(method) if method else "a format that quant_method does not name")
    raise UsageError(
        f"model.path is {str(folder)!r}, whose weights are quantised as {name} (quantization_config.quant_method: "
        f"{method or 'not given'}), which is not read; {INSTEAD}"
    )
