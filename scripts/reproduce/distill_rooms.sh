#!/usr/bin/env bash
# The experiment of benchmarks/distill_rooms, in stages of at most 45 minutes each on two cores; what was stopped goes on. More arguments go to distill_rooms.py (see --help).
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE
for stage in rooms pretrain ceiling train probe tables; do
    code=3
    while [ "$code" = 3 ]; do
        code=0
        "${PYTHON:-python3}" scripts/reproduce/distill_rooms.py "$stage" "$@" || code=$?
    done
    [ "$code" = 0 ] || exit "$code"
done
