#!/usr/bin/env bash
# Everything that only a GPU can show, offline, in one command and under 8 minutes: build, tests, sanitizer, benchmark.
#   benchmarks/gpu_check.sh [folder for results]     (default: benchmarks/results)
# PYTHON: the interpreter, with torch for CUDA. DIMAP_BUILT=1: the package is built and installed already.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
python=${PYTHON:-python}
failed=()
step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  local start=$SECONDS
  timeout "$limit" "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - start)) s"
}

if [ -z "${DIMAP_BUILT:-}" ]; then
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 1
  CUDAARCHS="$capability-real" step build 240 "$python" -m pip install --no-build-isolation --no-deps \
    -C cmake.define.DIMAP_CUDA=ON .
fi
step tests 200 "$python" -m pytest -q tests/test_cuda_ops.py tests/test_cuda_solver.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -c '
import torch, dimap
w = [torch.randn(20000, device="cuda").to(t).round(decimals=1) for t in (torch.float32, torch.bfloat16, torch.float16)]
torch.ops.dimap.select(w, [0, 1, 2], [0, 0, 1], [17000, 9000])
torch.ops.dimap.score(w, [0, 1, 2])
torch.ops.dimap.prune_(w, [0, 1, 2], [0, 0, 1], [17000, 9000])
torch.cuda.synchronize()'
  done
else
  echo "== compute-sanitizer is not installed: its checks were left out"
fi
step benchmark 180 "$python" benchmarks/bench_gpu.py --quick --output "$results/gpu.json"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
