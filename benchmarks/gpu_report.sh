#!/usr/bin/env bash
# The one command for a machine with a GPU: builds, tests, sanitizes and measures, and packs all of it.
#
#   bash benchmarks/gpu_report.sh           everything goes to gpu_report/, packed into gpu_report.tar.gz
#   OUT=/some/folder bash benchmarks/gpu_report.sh
#
# Each stage has a log of its own and a time limit, and the next runs whatever became of it. All of it ends within
# BUDGET seconds (nine minutes on 16 cores are enough for all): a stage gets what is left of them, less what is kept for
# the benchmark, which is the last, and none is started without. A benchmark that runs out of time is interrupted, and
# keeps what it has measured. Only the architecture at hand is built. The last lines are a summary; the exit status is
# the number of stages that failed.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-gpu_report}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python}
summary=$out/summary.txt
: >"$summary"
failed=0
budget=${BUDGET:-530}
reserve=$((budget / 3)) # for the benchmark; what the others leave is its too

# stage NAME SECONDS COMMAND...: runs it with its output in NAME.log, and notes how it ended.
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 left=$((budget - reserve - SECONDS)) outcome
  shift 2
  echo "== $name"
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -le 0 ]; then
    echo "no time was left" >"$out/$name.log"
    status=124
  else
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  fi
  tail -n 3 "$out/$name.log"
  outcome=ok
  if [ "$status" -ne 0 ]; then
    failed=$((failed + 1))
    outcome="exit $status"
    [ "$status" -ne 124 ] || outcome="time out"
  fi
  printf '%-22s %-10s %4d s   %s\n' "$name" "$outcome" $((SECONDS - start)) \
    "$(tail -n 1 "$out/$name.log" | cut -c1-100)" >>"$summary"
}

environment() {
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  $python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'
  git rev-parse HEAD
  git status --short
}

# "9.0" -> "90a": the architecture at hand, with the features that only it has.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
[ "$capability" = 90 ] && capability=90a

build() {
  FUSED_SEPCONV_CUDA=1 FUSED_SEPCONV_ARCHS=$capability MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    $python -m pip install --no-build-isolation --no-deps . && $python -m fused_sepconv
}

sanitize() { # TOOL
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not on this machine"
    return 1
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 \
    $python -m tests.run_cases
}

export -f environment build sanitize
export python capability

stage environment 30 bash -c environment
stage build 150 bash -c build
stage cases 60 $python -m tests.run_cases
for family in tensor split; do
  stage "accuracy-$family" 60 $python -m tests.accuracy --family $family
done
# Without the tests that are the CPU's alone.
stage tests 240 $python -m pytest -q -p no:cacheprovider --continue-on-collection-errors \
  --ignore=tests/test_emulator.py --ignore=tests/test_kernels.py --ignore=tests/test_mutants.py \
  --ignore=tests/test_packaging.py
for tool in memcheck racecheck initcheck synccheck; do
  stage "sanitizer-$tool" 30 bash -c "sanitize $tool"
done
stage conformance 40 $python -m tests.cuda_on_cpu.conformance
reserve=0 # the rest is for the benchmark: without compilers, then the compilers, Xception's layers alone
stage bench $(((budget - SECONDS) * 2 / 3)) $python benchmarks/bench.py --peers eager,forced --json "$out/bench.json"
stage bench-compile "$budget" $python benchmarks/bench.py --suite layers --networks xception --modes cold \
  --peers eager,compile,max-autotune --json "$out/bench-compile.json"

[ -f tests/cuda_on_cpu/conformance/vectors.npz ] && cp tests/cuda_on_cpu/conformance/vectors.npz "$out/"
archive=$out.tar.gz
tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")"
[ "$(stat -c %s "$archive")" -lt $((16 * 1024 * 1024)) ] || echo "the archive is larger than 16 MiB" >>"$summary"
echo
cat "$summary"
echo "$failed stages failed; $archive"
exit "$failed"
