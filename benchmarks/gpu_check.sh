#!/usr/bin/env bash
# Everything that only a GPU can show, offline, in one command and under 8 minutes: build, tests, benchmark, graph,
# sanitizers. A step that fails or runs out of time does not stop the next; what failed is told at the end.
#
#   benchmarks/gpu_check.sh [folder for results]     (default: benchmarks/results)
#
# Writes gpu.json (the benchmark) and gpu_check.json (each step's outcome), both as they go.
# DIMAP_COMMIT: the commit, where the folder is not a git checkout. PYTHON: the interpreter, with torch for CUDA, scikit-build-core, pybind11, ninja, cmake, pytest and hypothesis.
# SECONDS_IN_ALL: 470 by default.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd) || exit 1
python=${PYTHON:-$(command -v python3 || command -v python)}
in_all=${SECONDS_IN_ALL:-470}
PATH=$PATH:/usr/local/cuda/bin
site=$PWD/build/gpu_check
log=$PWD/build/gpu_check.log
mkdir -p "$site" && : >"$log"
failed=()

record() {  # record NAME OUTCOME SECONDS
  "$python" - "$results/gpu_check.json" "$log" "$@" <<'PY'
import json, pathlib, sys
path, log, name, outcome, seconds = sys.argv[1:]
path = pathlib.Path(path)
steps = json.loads(path.read_text()) if path.exists() else {}
steps[name] = {"outcome": outcome, "seconds": int(seconds)}
if outcome != "passed":
    steps[name]["log"] = pathlib.Path(log).read_text(errors="replace").split("\n== ")[-1][-4000:]
path.write_text(json.dumps(steps, indent=1) + "\n")
PY
}

step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS outcome=passed left=$((in_all - SECONDS)) from
  shift 2
  from=$(wc -c <"$log")
  printf '\n== %s\n' "$name" >>"$log"
  if [ "$left" -lt 5 ]; then
    outcome="left out: no time"
  else
    timeout -k 5 "$((left < limit ? left : limit))" "$@" >>"$log" 2>&1
    local code=$?
    case $code in 0) ;; 124 | 137) outcome="out of time" ;; *) outcome="failed: exit $code" ;; esac
  fi
  [ "$outcome" = passed ] || failed+=("$name ($outcome)")
  [ "$outcome" = passed ] || tail -c +$((from + 1)) "$log" | tail -n 25
  echo "== $name: $outcome, $((SECONDS - start)) s"
  record "$name" "$outcome" "$((SECONDS - start))"
}

"$python" - "$results/gpu_check.json" <<'PY' || { echo "gpu_check.sh needs a CUDA device that torch can use"; exit 1; }
import json, sys
sys.path.insert(0, "benchmarks")
import gpu_machine
open(sys.argv[1], "w").write(json.dumps({"machine": gpu_machine.about()}, indent=1) + "\n")
PY
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
step build 200 "$python" -m pip install --no-index --no-build-isolation --no-deps --upgrade --target "$site" \
  -C build-dir=build/gpu_build -C cmake.define.DIMAP_CUDA=ON \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$capability-real" .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
step "every operator once" 60 "$python" benchmarks/gpu_small.py
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
step "tests on the device" 120 env OMP_NUM_THREADS=2 "$python" -m pytest -q --maxfail=8 -p no:cacheprovider \
  ${workers[@]+"${workers[@]}"} -k cuda tests/cuda/test_cuda_ops.py tests/ops/test_ops.py tests/ops/test_ops_errors.py tests/ops/test_stages.py
step "graph capture and replay" 40 "$python" benchmarks/gpu_small.py --graph
bench_time=$((in_all - SECONDS - 110))  # what the steps after it need, left over
bench_time=$((bench_time < 180 ? bench_time : 180))
step benchmark "$((bench_time > 60 ? bench_time : 60))" "$python" benchmarks/bench_gpu.py \
  --seconds "$((bench_time > 90 ? bench_time - 40 : 50))" --output "$results/gpu.json"
for tool in memcheck racecheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    step "$tool" 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --print-limit 20 "$python" benchmarks/gpu_small.py
  else
    step "$tool" 5 bash -c 'echo "compute-sanitizer is not on the PATH"; exit 127'
  fi
done
step "the whole suite" 200 env OMP_NUM_THREADS=2 "$python" -m pytest -q -p no:cacheprovider \
  ${workers[@]+"${workers[@]}"} tests --ignore tests/cuda/test_cuda_ops.py

echo
if [ ${#failed[@]} -gt 0 ]; then
  printf 'not passed: %s\n' "${failed[@]}"
  echo "log: $log"
  exit 1
fi
echo "all passed"
