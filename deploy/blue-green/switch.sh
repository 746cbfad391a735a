#!/bin/sh
# Sends the traffic to a colour after checking it, or back:
#
#   deploy/blue-green/switch.sh green
#   deploy/blue-green/switch.sh back
#
# First every pod of the colour must be rolled out and ready. Then one of them, which gets no traffic from
# the Service yet, must pass the smoke test. Only then one patch moves all new connections. The other
# colour keeps running, so "back" is the same patch and needs no start.
set -eu

service=dynamic-moe-router-service
port="${SWITCH_PORT:-18080}"

fail() { echo "switch.sh: $1" >&2; exit 1; }

[ $# -eq 1 ] || { echo "usage: switch.sh blue|green|back" >&2; exit 2; }
current=$(kubectl get service "$service" -o 'jsonpath={.spec.selector.color}') ||
  fail "expected $service to exist. Run: kubectl apply -k deploy/blue-green/shared"
case "$1" in
  blue | green) target=$1 ;;
  back) [ "$current" = blue ] && target=green || target=blue ;;
  *) echo "usage: switch.sh blue|green|back" >&2; exit 2 ;;
esac
if [ "$current" = "$target" ]; then
  echo "$service already points at $target: nothing changed"
  exit 0
fi

kubectl rollout status "deployment/dynamic-moe-router-$target" --timeout="${SWITCH_TIMEOUT:-300s}" ||
  fail "$target is not ready, $service still points at $current. Look at its pods and logs."

kubectl port-forward "deployment/dynamic-moe-router-$target" "$port:8000" >/dev/null &
forward=$!
trap 'kill "$forward" 2>/dev/null || true' EXIT
sleep "${SWITCH_SETTLE:-2}"
moe-jax smoke "http://127.0.0.1:$port" ||
  fail "$target failed its smoke test, $service still points at $current."

kubectl patch service "$service" --type merge \
  -p "{\"spec\":{\"selector\":{\"app\":\"dynamic-moe-router\",\"color\":\"$target\"}}}" ||
  fail "the patch was refused, $service still points at $current."
echo "$service: $current -> $target. Watch errors and latency. To go back: switch.sh back"
