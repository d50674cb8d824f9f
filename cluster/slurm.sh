#!/usr/bin/env bash
#SBATCH --job-name=metadist
#SBATCH --output=%x-%j.log
# Five minutes before the time limit the driver ends its meta-step, writes a checkpoint, and the job is queued again: the same run goes
# on from it, as after a node that failed. scancel ends it for good. `metadist render slurm CONFIG` fills in the lines below for a run.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# A Ray cluster over the nodes of the allocation; its head and the run's driver share the first with workers, but for one core.
# Needs: a folder that all nodes see (RUN_DIR), and metadist in the environment that SETUP enters on each node.
#   sbatch --export=ALL,CONFIG=omniglot_maml_5w1s,RUN_DIR=/shared/runs/a,METADIST_DATA=/shared/data cluster/slurm.sh
set -euo pipefail

CONFIG="${CONFIG:?the config: a YAML file that all nodes see, or the name of a shipped one}"
RUN_DIR="${RUN_DIR:?the run directory: a folder that all nodes see, or a URL}"
OVERRIDES="${OVERRIDES:-}"                 # KEY=VALUE … for metadist train
SETUP="${SETUP:-true}"                     # such as: source /shared/metadist/bin/activate
PORT="${PORT:-6379}"
export METADIST_RUNS="${METADIST_RUNS:-$(dirname "$RUN_DIR")}"

# The token: for this job, in a file that this user alone reads, on the disk that the nodes share.
umask 077
STATE="${STATE:-$HOME/.metadist-slurm/$SLURM_JOB_ID}"
mkdir -p "$STATE"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$STATE/token"
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD="${NODES[0]}"
ADDRESS="$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname --ip-address | awk '{print $1}')"
GPUS="${SLURM_GPUS_ON_NODE:-0}"
CPUS="${SLURM_CPUS_PER_TASK:-1}"
export RAY_ADDRESS="$ADDRESS:$PORT" OMP_NUM_THREADS=1
TEMP="${RAY_TEMP:-/tmp/ray-$SLURM_JOB_ID}" # short: sockets lie in it

PIDS=()
node() { # NODE OPTION…: a Ray node that ends with its srun
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" bash -c "$SETUP; exec ray start --block --disable-usage-stats ${*:2}" &
    PIDS+=($!)
}
# shellcheck disable=SC2329  # by the trap
end() {
    trap - EXIT
    for pid in "${PIDS[@]}"; do
        kill -TERM "$pid" 2>/dev/null || true
    done
    wait "${PIDS[@]}" 2>/dev/null || true
    rm -rf "$STATE"
}
trap end EXIT

node "$HEAD" --head --node-ip-address="$ADDRESS" --port="$PORT" --num-cpus="$((CPUS > 1 ? CPUS - 1 : 1))" --num-gpus="$GPUS" \
    --dashboard-host=127.0.0.1 "--temp-dir=$TEMP"
for _ in $(seq 60); do
    if (exec 3<>"/dev/tcp/$ADDRESS/$PORT") 2>/dev/null; then
        break
    fi
    sleep 2
done
for name in "${NODES[@]:1}"; do
    node "$name" --address="$RAY_ADDRESS" --num-cpus="$CPUS" --num-gpus="$GPUS"
done

# The driver. It ends its meta-step and writes a checkpoint when it is told to; `wait` is broken off by the signal, so it is asked again.
# shellcheck disable=SC2086  # OVERRIDES are words
bash -c "$SETUP; exec metadist train \"\$@\"" train "$CONFIG" $OVERRIDES --run-dir "$RUN_DIR" --resume &
DRIVER=$!
AGAIN=no
trap 'AGAIN=yes; kill -TERM "$DRIVER" 2>/dev/null || true' USR1
trap 'kill -TERM "$DRIVER" 2>/dev/null || true' TERM INT
STATUS=0
wait "$DRIVER" || STATUS=$?
while kill -0 "$DRIVER" 2>/dev/null; do
    STATUS=0
    wait "$DRIVER" || STATUS=$?
done
if [ "$AGAIN" = yes ] && [ "$STATUS" -eq 130 ]; then # 130: stopped before its end
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
