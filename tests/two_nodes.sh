#!/usr/bin/env bash
# Two nodes as two network namespaces that a veth pair joins, each with its own address:
#   tests/two_nodes.sh PYTHON RECIPE [settings]
# Needs iproute2 and the right to make network namespaces; ends with 77 and a line where one is missing.
set -euo pipefail
python=$1
shift
a=pskd-a-$$ b=pskd-b-$$

clean_up() {
  ip netns del "$a" 2>/dev/null || true
  ip netns del "$b" 2>/dev/null || true
}
trap clean_up EXIT

if ! command -v ip >/dev/null; then
  echo "skipped: no ip command (iproute2)"
  exit 77
fi
if ! ip netns add "$a" 2>/dev/null; then
  echo "skipped: no right to make network namespaces"
  exit 77
fi
ip netns add "$b"
ip -n "$a" link add veth0 type veth peer name veth0 netns "$b"
ip -n "$a" addr add 10.77.0.1/24 dev veth0
ip -n "$b" addr add 10.77.0.2/24 dev veth0
for node in "$a" "$b"; do
  ip -n "$node" link set lo up
  ip -n "$node" link set veth0 up
done

node() {
  local name=$1 rank=$2
  shift 2
  # gloo would look for the address of the host's name, which both nodes share here.
  GLOO_SOCKET_IFNAME=veth0 ip netns exec "$name" "$python" -m accelerate.commands.launch --multi_gpu \
    --num_machines 2 --num_processes 2 --machine_rank "$rank" --main_process_ip 10.77.0.1 --main_process_port 29500 \
    -m pskd_timm train "$@"
}

node "$b" 1 "$@" &
other=$!
node "$a" 0 "$@"
wait "$other"
