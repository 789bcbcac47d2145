#!/usr/bin/env bash
# One command on a bare CUDA machine: build csrc, run the GPU tests, run the benches, print a short table last.
#
#   bash bench/device.sh [--out DIR] [--quick] [--stages "build tests sanitize bench"]
#
# Needs Python with torch (CUDA), triton, transformers, pytest, pytest-benchmark, hypothesis; nvcc for the CUDA objects; no
# network. Everything is written below DIR (default bench/results/<gpu>-<commit>); a failing stage is reported and the next
# one still runs; one folder never mixes commits.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
stages="build tests sanitize bench"
quick=""
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --stages) stages=$2; shift 2 ;;
    --quick) quick="--quick"; shift ;;
    -h|--help) sed -n 's/^# \{0,1\}//p' "$0" | sed -n '2,9p'; exit 0 ;;
    *) echo "unknown option $1: see --help" >&2; exit 2 ;;
  esac
done

gpu=$($python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-'))" 2>/dev/null) || {
  echo "no CUDA device seen by $python: this script is for a GPU machine (make test runs anywhere)" >&2; exit 2; }
out=${out:-bench/results/$gpu-$commit}
mkdir -p "$out"
if [ -e "$out/machine.json" ] && ! grep -q "\"commit\": \"$commit\"" "$out/machine.json"; then
  echo "$out holds results of another commit: choose another --out" >&2; exit 2
fi
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
OUT="$out" COMMIT="$commit" $python - <<'PY'
import json, os, platform, subprocess, sys
import torch, transformers, triton
driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
                        capture_output=True, text=True).stdout.strip()
record = dict(commit=os.environ["COMMIT"], gpu=torch.cuda.get_device_name(), driver_clock_power=driver, python=sys.version.split()[0],
              torch=torch.__version__, cuda=torch.version.cuda, triton=triton.__version__, transformers=transformers.__version__,
              cpu=platform.processor() or platform.machine())
json.dump(record, open(os.path.join(os.environ["OUT"], "machine.json"), "w"), indent=1)
print(record)
PY

summary=()
stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  case " $stages " in *" $name "*) ;; *) summary+=("$name|skipped|0"); return ;; esac
  echo "== $name"
  local start=$SECONDS
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  local rc=$?
  tail -n 5 "$out/$name.log"
  summary+=("$name|$([ $rc = 0 ] && echo ok || echo "FAILED ($rc), see $name.log")|$((SECONDS - start))")
}

stage build 240 env TREEGRPO_BUILD=auto $python setup.py build_ext --inplace
# only the files that have GPU tests: the others import packages that a bare machine may lack
stage tests 240 $python -m pytest $(grep -ln "mark.gpu" tests/test_*.py) -m gpu -q --maxfail=20 -p no:cacheprovider
stage sanitize 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
  $python -m pytest tests/test_triton.py tests/test_cuda.py -m gpu -q -p no:cacheprovider -k "worked_example"
stage bench $([ -n "$quick" ] && echo 150 || echo 420) $python -m pytest bench $quick -q -p no:cacheprovider --benchmark-json="$out/bench.json"
[ -s "$out/bench.json" ] && $python -m bench.report "$out/bench.json" --out "$out" > "$out/report.txt" 2>&1

echo
echo "commit $commit on $gpu, results in $out"
[ -s "$out/report.txt" ] && head -n 60 "$out/report.txt"
printf '%-10s %-40s %s\n' stage outcome seconds
for row in "${summary[@]}"; do IFS='|' read -r name outcome seconds <<< "$row"; printf '%-10s %-40s %s\n' "$name" "$outcome" "$seconds"; done
