#!/usr/bin/env bash
# One run on the hosts of a hostfile, over ssh:  launch/deepspeed.sh CONFIG [key=value ...]  on one of them.
#
# Change, here or in the environment: HOSTFILE (see launch/hostfile.example), PORT (another one for each run on the same hosts),
# INTERFACE (see launch/carried.sh), HOST_TIMEOUT (seconds after which a host that no longer answers is given up). Every host has
# this folder and the Python environment at the same path, and lets this user in by ssh without a password. With pdsh the hosts are
# started by DeepSpeed itself, without it by plain ssh.
set -euo pipefail
HOSTFILE="$(realpath "${HOSTFILE:-$(dirname "${BASH_SOURCE[0]}")/hostfile}")" PORT="${PORT:-29500}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
. launch/carried.sh

# The ranks leave by themselves (training.rank_timeout); without this the ssh to a host that has vanished would stay for ever.
HOST_TIMEOUT="${HOST_TIMEOUT:-240}"
alive=(-o "ServerAliveInterval=$(((HOST_TIMEOUT + 7) / 8))" -o ServerAliveCountMax=8)
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} ${alive[*]}"

mapfile -t hosts < <(awk '!/^#/ && NF {print $1}' "$HOSTFILE")
[ ${#hosts[@]} -gt 0 ] || { echo "error: HOSTFILE is $HOSTFILE, which names no host" >&2; exit 2; }

# DeepSpeed hands on PYTHON* and NCCL* alone; each host is given the rest as a file that its user alone can read.
settings=".dist-subspace-$PORT.sh" # in the home folder
for host in "${hosts[@]}"; do
    carried_lines | ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" "umask 077; cat > $settings" ||
        { echo "error: $host, of $HOSTFILE, was not reached by ssh without a password" >&2; exit 2; }
done

options=(--hostfile "$HOSTFILE" --master_addr "${hosts[0]}" --master_port "$PORT" --no_local_rank)
if command -v pdsh >/dev/null; then
    exec deepspeed "${options[@]}" --no_ssh_check --force_multi --venv_script "./$settings" launch/train.py "$@"
fi
started=() status=0
trap 'kill "${started[@]}" 2>/dev/null' INT TERM
for rank in "${!hosts[@]}"; do
    line="$(printf '%q ' deepspeed "${options[@]}" --no_ssh --node_rank "$rank" launch/train.py "$@")"
    ssh "${alive[@]}" -tt "${hosts[$rank]}" ". ./$settings; cd $(printf %q "$PWD") && exec $line" </dev/null & # -tt: it ends there when it ends here
    started+=($!)
done
for process in "${started[@]}"; do wait "$process" || status=$?; done
exit "$status"
