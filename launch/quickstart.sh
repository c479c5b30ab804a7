#!/usr/bin/env bash
# NF4 + ZeRO-3 + LoRA on two processes (on a machine with GPUs: one a GPU), from nothing to held-out samples.
#
#   launch/quickstart.sh [key=value ...]     changes to the configuration, for example subspace.method=ssl
#
# Where DIST_SUBSPACE_DATA (unset: ../shared/data beside the repository) holds stories260K and openbookqa, these are used;
# otherwise a small LLaMA is pretrained here, in about a minute, on the docstrings of the standard library.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

start=$SECONDS
say_step() { echo; echo "== $* ($((SECONDS - start)) s)"; }

data="${DIST_SUBSPACE_DATA:-$ROOT/../shared/data}"
task=docstrings config=configs/quickstart-docstrings.yaml source=() remark=()
if [ -f "$data/models/stories260K/hf/config.json" ] && [ -f "$data/instruct/openbookqa_train.json" ]; then
    task=openbookqa config=configs/quickstart.yaml source=(--data "$data")
    remark=(--remark "A model of 0.26 million parameters does not know the facts (chance: 25%); it learned to answer in the form asked for.")
fi

gpus=0
[ "${DS_ACCELERATOR:-}" = "cpu" ] || gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
processes=$gpus
if [ "$gpus" -eq 0 ]; then
    processes=2
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
# Only this machine's own packages and files from here on.
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

say_step "a pretrained model and data"
OMP_NUM_THREADS="$(nproc)" python launch/quickstart/prepare.py ".quickstart/$task" "${source[@]}"

say_step "fine-tuning on $processes processes: $config"
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
rm -rf runs/quickstart
deepspeed --log_level error --num_accelerators "$processes" --master_addr 127.0.0.1 --master_port "$port" --no_local_rank \
    launch/train.py "$config" "$@"

say_step "before and after"
OMP_NUM_THREADS="$(nproc)" python launch/quickstart/show.py \
    ".quickstart/$task/model" runs/quickstart/adapter ".quickstart/$task/heldout.jsonl" "${remark[@]}"

say_step "done"
echo "loss curve: runs/quickstart/loss.png    adapter: runs/quickstart/adapter"
