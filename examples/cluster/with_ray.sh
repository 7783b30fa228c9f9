#!/usr/bin/env bash
# A Ray cluster for the time of one command: other hosts generate, this one trains.
#
#   examples/cluster/with_ray.sh "gpu1 gpu2" reinforcepp train --rollout ray://auto --output_dir runs/train ...
#   examples/cluster/with_ray.sh "gpu1 gpu2" torchrun --nproc_per_node 8 -m reinforcepp train --rollout ray://auto ...
#
# The hosts are reached by ssh, without a password, and have this package and Ray installed as here. When the command
# ends, so does the cluster; Ctrl-C and TERM let the training save first. In the environment, where a default doesn't fit:
#
#   HEAD    this machine's address, as the others reach it        the first one that `hostname -I` names
#   PORT    of the head of the cluster                            6379
#   RAY     the command on every host                             ray
#   ON      runs a command, which follows, on the host {}         ssh -tt -o BatchMode=yes {}

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

stop() { # the training saves with the cluster still there
  if [ -n "$command" ]; then kill -TERM "$command" 2>/dev/null || true; else exit 143; fi
}

finish() {
  for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
  wait || true
}

if listens; then
  echo "error: Something listens on $head:$port already: stop it, or choose another port with PORT=6380." >&2
  exit 2
fi
trap finish EXIT
trap stop INT TERM

# Nobody else may give this cluster work. The word for that goes to the hosts by what they read, not by what `ps` shows.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# The head only keeps the books: this machine's GPU is the trainer's.
"$ray" start --head --block --node-ip-address="$head" --port="$port" --num-cpus=0 --num-gpus=0 \
  --include-dashboard=false --disable-usage-stats >/dev/null &
started+=($!)
for _ in $(seq 60); do
  if listens || ! kill -0 "${started[0]}" 2>/dev/null; then break; fi
  sleep 1
done
if ! listens; then
  echo "error: The head of the cluster did not start on $head:$port; what Ray said is above." >&2
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
  wait "$command" || code=$? # a signal ends the waiting, not the training
done
exit "$code"
