#!/usr/bin/env bash
# Serve a quantized checkpoint and check all that a deployment relies on: ready, /health, two equal
# greedy completions, the same streamed, a chat, metrics that are there and move, no NaN in the
# logits, and a clean end on SIGTERM with requests in flight.
#
#   deploy/smoke.sh DIRECTORY [flags for vllm serve]
#
# VLLM=path/to/vllm, PYTHON=path/to/python of its environment and SMOKE_SECONDS=300 (time to become
# ready) may be set. The checks are in deploy/checks.py, which the demo uses as well.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
vllm=${VLLM:-$(command -v vllm || echo "$here/../.venv/bin/vllm")}
python=${PYTHON:-$(dirname "$vllm")/python3}
[[ -x $vllm && -x $python ]] || {
  echo "smoke: no $vllm, or no $python beside it; set VLLM and PYTHON" >&2
  exit 1
}
VLLM=$vllm exec "$python" "$here/smoke.py" "$@"
