# shellcheck shell=bash
# What a rank on another host needs of this shell's environment. Sourced by the scripts beside this one, after environment.sh.
#
# `carried` prints the names, of those that are set. Values go over standard input or stay with the launcher: a command line is
# read by every user of a host, and HF_TOKEN is among them. INTERFACE (the network card between the hosts, the same name on
# each, see `ip -br address`) becomes the setting of NCCL and of gloo; empty, these choose.

if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"
fi

carried() {
    compgen -e | grep -E '^(PATH|PYTHONPATH|VIRTUAL_ENV|LD_LIBRARY_PATH|TMPDIR|DS_ACCELERATOR|OMP_NUM_THREADS)$|^(CUDA|TOKENIZERS|TRANSFORMERS|HF|NCCL|GLOO|TORCH|PYTORCH|UCX|FI|DIST_SUBSPACE|WANDB|MLFLOW)_' |
        grep -vx 'CUDA_VISIBLE_DEVICES'
}

# The same as lines of a script.
carried_lines() {
    local name
    for name in $(carried); do printf 'export %s=%q\n' "$name" "${!name}"; done
}
