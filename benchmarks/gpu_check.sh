#!/usr/bin/env bash
# Everything that only a GPU can show, offline, in one command and under 6 minutes: build, smoke, graph, benchmark,
# profile, tests, sanitizers. A build that fails ends it; another step that fails or runs out of time does not stop the
# next. What failed, and each target beside what came, is told at the end.
#
#   benchmarks/gpu_check.sh [folder for results]     (default: benchmarks/results)
#
# Writes gpu.json (the benchmark), gpu_profile.json (each kernel's time), gpu_check.json (each step's outcome) as they go,
# and gpu_check.log.
# DIMAP_COMMIT: the commit, where the folder is not a git checkout. PYTHON: the interpreter, with torch for CUDA,
# scikit-build-core, pybind11, ninja, cmake, pytest and hypothesis. SECONDS_IN_ALL: 350 by default.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd) || exit 1
python=${PYTHON:-$(command -v python3 || command -v python)}
in_all=${SECONDS_IN_ALL:-350}
PATH=$PATH:/usr/local/cuda/bin
site=$PWD/build/gpu_check
log=$results/gpu_check.log
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
step build 150 "$python" -m pip install --no-index --no-build-isolation --no-deps --upgrade --target "$site" \
  --config-settings=build-dir=build/gpu_build --config-settings=cmake.define.DIMAP_CUDA=ON \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$capability-real" .
[ ${#failed[@]} -eq 0 ] || { echo "nothing else can be checked: $log"; exit 1; }
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
step "every operator once" 40 "$python" benchmarks/gpu_small.py
step "graph capture and replay" 30 "$python" benchmarks/gpu_small.py --graph
step benchmark 110 "$python" benchmarks/bench_gpu.py --seconds 60 --output "$results/gpu.json"
step profile 30 "$python" benchmarks/gpu_small.py --profile "$results/gpu_profile.json"
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
step "tests on the device" 80 env OMP_NUM_THREADS=2 "$python" -m pytest -q --maxfail=8 -p no:cacheprovider \
  ${workers[@]+"${workers[@]}"} -k cuda tests/cuda/test_cuda_ops.py tests/ops/test_ops.py tests/ops/test_ops_errors.py tests/ops/test_stages.py
# Memory and races of dimap's own kernels only; what is read unset may have come from anywhere.
for tool in memcheck racecheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    only=(--kernel-name kernel_substring=dimap)
    [ "$tool" != initcheck ] || only=()
    step "$tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" ${only[@]+"${only[@]}"} \
      --error-exitcode 9 --print-limit 20 "$python" benchmarks/gpu_small.py
  else
    step "$tool" 5 bash -c 'echo "compute-sanitizer is not on the PATH"; exit 127'
  fi
done

"$python" - "$results/gpu.json" <<'PY' || true
import json, sys
print(f"{'target':<56}{'came':>8}{'reach':>8}{'aim':>8}")
for t in json.load(open(sys.argv[1])).get("targets", []):
    print(f"{t['job']:<56}{t['value']:>8.3g}{t['reach']:>8g}{t['aim']:>8g}")
PY

echo
if [ ${#failed[@]} -gt 0 ]; then
  printf 'not passed: %s\n' "${failed[@]}"
  echo "log: $log"
  exit 1
fi
echo "all passed"
