#!/usr/bin/env bash
# One run on NODES nodes: the same line on each of them, in any order:  launch/torchrun.sh CONFIG [key=value ...]
#
# Change, here or in the environment: NODES (2:3: two are enough, and the run goes on with those that are left); FIRST (a node's
# name and a free port, the same everywhere; that node holds the meeting); DEVICES (ranks a node; gpu: all of its GPUs); RESTARTS
# (so often the run goes on from its newest checkpoint after a rank has died); INTERFACE (see launch/carried.sh). On each node this
# folder is at the same path.
set -euo pipefail
NODES="${NODES:-1}" FIRST="${FIRST:-localhost:29400}" RESTARTS="${RESTARTS:-3}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
. launch/carried.sh
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else ranks that are started again read the addresses of those before them
DEVICES="${DEVICES:-$([ "${DS_ACCELERATOR:-}" = cpu ] && echo 1 || echo gpu)}"

# torchrun leaves with 1 whatever the ranks leave with: RUN/status.json says whether a run was interrupted, refused or failed.
exec torchrun --nnodes "$NODES" --nproc-per-node "$DEVICES" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST" --rdzv-id "${RUN_ID:-dist-subspace}" launch/train.py "$@"
