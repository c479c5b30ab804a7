#!/usr/bin/env bash
# One run under MPI (Open MPI, MPICH, Intel MPI):  launch/mpirun.sh CONFIG [key=value ...]
#
# Change, here or in the environment: HOSTS (host:ranks,host:ranks; the first holds rank 0, and the others reach it by this
# name), PORT (another one for each run on the same hosts), INTERFACE (see launch/carried.sh), MPIRUN (the program). MPI starts
# the ranks only; NCCL or gloo carry the data. On each host this folder and the Python environment are at the same path.
set -euo pipefail
HOSTS="${HOSTS:-localhost:1}" MPIRUN="${MPIRUN:-mpirun}"
export MASTER_ADDR="${HOSTS%%[:,]*}" MASTER_PORT="${PORT:-29500}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
. launch/carried.sh

mapfile -t names < <(carried; echo MASTER_ADDR; echo MASTER_PORT) # names alone: values stay out of the command line
ranks=0
for host in ${HOSTS//,/ }; do [[ $host == *:* ]] && ranks=$((ranks + ${host##*:})) || ranks=$((ranks + 1)); done

if "$MPIRUN" --version 2>&1 | grep -qi "open.\?mpi"; then
    options=(-H "$HOSTS" --bind-to none)
    for name in "${names[@]}"; do options+=(-x "$name"); done
else
    options=(-hosts "$HOSTS" -genvlist "$(IFS=,; echo "${names[*]}")")
fi
exec "$MPIRUN" -np "$ranks" "${options[@]}" python launch/train.py "$@"
