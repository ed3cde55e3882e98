#!/usr/bin/env bash
# Starts several processes on this machine, as on several hosts: rehearses a pod on a CPU.
#
#     launch/local.sh 2 --config=configs/mae_base.py --smoke --workdir=runs/smoke
#
# The first process prints; the others write to $WORK/process_N.log. If one fails, all are ended and
# the ends of the logs are shown. SIGTERM or Ctrl-C makes all of them save and stop. --dry-run as the
# first argument prints the commands.
set -euo pipefail
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
count=${1:?the number of processes}; shift
port=$((20000 + RANDOM % 20000))
work=${WORK:-$(mktemp -d)}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
trap 'kill -KILL $(jobs -p) 2>/dev/null || true' EXIT
trap 'kill -TERM $(jobs -p); wait; exit 143' INT TERM
for ((i = count - 1; i >= 0; i--)); do
    if [ "$dry" ]; then
        echo python -m mim_jax.main "$@" --distributed="localhost:$port,$count,$i"
        continue
    fi
    out=$work/process_$i.log
    [ "$i" = 0 ] && out=/dev/stdout
    python -m mim_jax.main "$@" --distributed="localhost:$port,$count,$i" >"$out" 2>&1 &
done
if [ "$dry" ]; then exit; fi
for ((i = 0; i < count; i++)); do
    wait -n && continue
    status=$?
    echo "a process failed; the logs of the others in $work end with:" >&2
    tail -n 5 "$work"/process_[1-9]*.log >&2 2>/dev/null || true
    exit "$status"
done
