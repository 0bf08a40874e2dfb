#!/usr/bin/env bash
# Serve a quantized checkpoint and check that it answers: up, /health, two greedy completions
# that are equal, metrics present, down.
#
#   deploy/smoke.sh DIRECTORY [flags for vllm serve]
#
# VLLM=path/to/vllm and SMOKE_SECONDS=300 (time to become ready) may be set. Needs curl.
set -euo pipefail

model=${1:?usage: deploy/smoke.sh DIRECTORY [flags for vllm serve]}
shift
vllm=${VLLM:-$(command -v vllm || echo "$(dirname "$0")/../.venv/bin/vllm")}
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
log=$(mktemp)
answers=$(mktemp -d)

get() { curl --silent --show-error --fail --noproxy '*' --max-time 120 "$@"; }
fail() {
  echo "smoke: FAILED: $1; last lines of the server:" >&2
  tail -n 25 "$log" >&2
  exit 1
}
down() {
  trap '' INT TERM
  kill -TERM "$server" 2>/dev/null || true
  for _ in $(seq 20); do kill -0 "$server" 2>/dev/null || break; sleep 1; done
  kill -KILL -- "-$server" 2>/dev/null || true # engines that outlived it
  wait "$server" 2>/dev/null || true
  rm -rf "$log" "$answers"
}

set -m # a process group of its own for the server
VLLM_NO_USAGE_STATS=1 "$vllm" serve "$model" --quantization precalib --served-model-name smoke \
  --host 127.0.0.1 --port "$port" "$@" >"$log" 2>&1 </dev/null &
server=$!
set +m
trap down EXIT
trap 'exit 130' INT TERM

echo "smoke: waiting for $url/health"
for ((second = 0; ; second++)); do
  get "$url/health" 2>/dev/null && break
  kill -0 "$server" 2>/dev/null || fail "the server ended"
  ((second < ${SMOKE_SECONDS:-300})) || fail "not ready after $second seconds"
  sleep 1
done

request='{"model": "smoke", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 16}'
for n in 1 2; do
  get "$url/v1/completions" -H 'Content-Type: application/json' -d "$request" |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["text"])' >"$answers/$n" ||
    fail "no completion"
done
[[ -n $(tr -d '[:space:]' <"$answers/1") ]] || fail "the completion is empty"
cmp -s "$answers/1" "$answers/2" || fail "two greedy completions differ: $(cat "$answers"/*)"
echo "smoke: completion:$(cat "$answers/1")"

get "$url/metrics" >"$answers/metrics" || fail "no /metrics"
for metric in vllm:generation_tokens_total vllm:time_to_first_token_seconds_count vllm:request_success_total; do
  grep -q "^$metric" "$answers/metrics" || fail "metric $metric is missing"
done
echo "smoke: ok"
