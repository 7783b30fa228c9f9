#!/usr/bin/env bash
# Start a Ray cluster for one command: other hosts generate, this one trains.
#
#   examples/cluster/with_ray.sh "gpu1 gpu2" reinforcepp train --rollout ray://auto --output_dir runs/train ...
#   examples/cluster/with_ray.sh "gpu1 gpu2" torchrun --nproc_per_node 8 -m reinforcepp train --rollout ray://auto ...
#
# This host connects to the others by ssh, without a password. They need this package and Ray 2.52 or later, in the same
# versions as here. The cluster requires a token that is new for each run, but traffic isn't encrypted, so use a network that
# you trust. When the command ends, so does the cluster; after Ctrl-C or TERM the training saves first. Set these variables to
# change a default:
#
#   HEAD    this host's address, as the others reach it           the first one that `hostname -I` prints
#   PORT    port of the head of the cluster                       6379
#   RAY     the ray command on every host                         ray
#   ON      runs the command that follows it on the host {}       ssh -tt -o BatchMode=yes {}

set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 \"HOST [HOST ...]\" COMMAND ..." >&2
  exit 2
fi
read -ra hosts <<<"$1"
shift
head=${HEAD:-$(hostname -I | cut -d' ' -f1)}
port=${PORT:-6379}
ray=${RAY:-ray}
on=${ON:-ssh -tt -o BatchMode=yes {\}}
command=
started=()

listens() { (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; }

stop() { # the training saves while the cluster is still running
  if [ -n "$command" ]; then kill -TERM "$command" 2>/dev/null || true; else exit 143; fi
}

finish() {
  for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
  wait || true
}

if listens; then
  echo "error: $head:$port is in use. Stop the program that listens there, or choose another port, such as PORT=6380." >&2
  exit 2
fi
trap finish EXIT
trap stop INT TERM

# Only processes with this token can use the cluster. Hosts read it from standard input, because `ps` shows command lines to
# all users.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# The head has no resources for workers, because the trainer uses this host's GPU.
"$ray" start --head --block --node-ip-address="$head" --port="$port" --num-cpus=0 --num-gpus=0 \
  --include-dashboard=false --disable-usage-stats >/dev/null &
started+=($!)
for _ in $(seq 60); do
  if listens || ! kill -0 "${started[0]}" 2>/dev/null; then break; fi
  sleep 1
done
if ! listens; then
  echo "error: The head of the cluster didn't start on $head:$port. Ray's messages are above." >&2
  exit 1
fi

join="read -r RAY_AUTH_TOKEN; export RAY_AUTH_TOKEN RAY_AUTH_MODE=token;"
join="$join exec $ray start --block --address=$head:$port --disable-usage-stats"
for host in "${hosts[@]}"; do
  read -ra there <<<"${on//\{\}/$host}"
  "${there[@]}" "$join" <<<"$RAY_AUTH_TOKEN" >/dev/null &
  started+=($!)
done

RAY_ADDRESS="$head:$port" "$@" &
command=$!
code=0
while kill -0 "$command" 2>/dev/null; do
  code=0
  wait "$command" || code=$? # a signal interrupts only this wait, not the training
done
exit "$code"
