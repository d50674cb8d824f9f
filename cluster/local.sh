#!/usr/bin/env bash
# Start a Ray cluster on this machine, with all of its GPUs, for `metadist submit`. Ctrl-C stops it.
#   cluster/local.sh                     the GPUs that nvidia-smi shows, all cores but one
#   GPUS=2 CPUS=8 cluster/local.sh       fewer
# Everyone with the token may run code here: the file ~/.ray/auth_token holds it, readable by this user only. Other
# machines need an ssh tunnel: ssh -L 8265:localhost:8265 HOST
set -euo pipefail

CPUS="${CPUS:-$(($(nproc) > 1 ? $(nproc) - 1 : 1))}"
if [ -z "${GPUS:-}" ]; then
    GPUS=0
    if command -v nvidia-smi >/dev/null; then
        GPUS="$(nvidia-smi --list-gpus | wc -l)"
    fi
fi
PORT="${PORT:-6379}"
DASHBOARD_PORT="${DASHBOARD_PORT:-8265}"

export RAY_AUTH_MODE=token
if [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
    ray get-auth-token --generate >/dev/null
    chmod 600 "$HOME/.ray/auth_token"
fi

echo "metadist submit CONFIG --address http://127.0.0.1:$DASHBOARD_PORT --run-dir \"\$PWD/runs/a\" --wait" >&2
exec ray start --head --block --disable-usage-stats \
    --node-ip-address=127.0.0.1 --port="$PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" \
    --num-cpus="$CPUS" --num-gpus="$GPUS" ${RAY_TEMP:+--temp-dir="$RAY_TEMP"}
