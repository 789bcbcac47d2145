#!/usr/bin/env bash
# One command on a bare CUDA machine: build csrc, run the GPU tests, run the benches, print a short table last.
#
#   bash bench/device.sh [--out DIR] [--quick] [--seconds N] [--stages "build tests sanitize step bench head hybrid"]
#
# Needs Python with torch (CUDA), triton, transformers, pytest, pytest-benchmark, hypothesis; nvcc for the CUDA objects; no
# network, no git (then COMMIT=... or a file .commit names the commit). Stages, in this order: build, tests, sanitize, train
# (the trainer's own tests, on the GPU), step, bench (attention and plans), head, hybrid (recurrent layers), split (parted key tiles against whole ones),
# tune, profile, cuda (the CUDA kernels, those for Hopper among them: tests, race with Triton in both backward modes, memcheck,
# ncu); train and the last four are not among the default ones, and --quick leaves out sanitize and all tests but those of
# repeated runs and of the head. A failing stage is reported and the next one still runs. It ends before N seconds (default
# 540, with --quick 240): a stage gets its share of what is left (build a third), and what does not fit is skipped and said so.
# DIR (default bench/results/<gpu>-<commit>) receives machine.json, log.txt, bench.json and report.md, and never holds
# results of two commits or two states of the sources.
set -uo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
stages=""
quick=""
seconds=""
out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --stages) stages=$2; shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --quick) quick="--quick"; shift ;;
    -h|--help) sed -n '2,14{s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "unknown option $1: see --help" >&2; exit 2 ;;
  esac
done
stages=${stages:-$([ -n "$quick" ] && echo "build tests step bench head" || echo "build tests sanitize step bench head hybrid")}
seconds=${seconds:-$([ -n "$quick" ] && echo 240 || echo 540)}
case "$seconds" in *[!0-9]*) echo "--seconds takes whole seconds, not $seconds" >&2; exit 2 ;; esac
case "$out" in ""|/*) ;; *) out=$called_from/$out ;; esac
# the merge and the last table need this much
reserve=12

# weight of each stage: its share of the time that is left, against the chosen stages not yet run
order="build tests sanitize train step bench head hybrid split tune profile cuda"
declare -A weight=([build]=0 [tests]=10 [sanitize]=4 [train]=5 [step]=12 [bench]=9 [head]=2 [hybrid]=2 [split]=4 [tune]=8 [profile]=2 [cuda]=9)
for name in $stages; do
  [ -n "${weight[$name]:-}" ] || { echo "unknown stage $name: use ${!weight[*]}" >&2; exit 2; }
done

gpu=$($python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-'))" 2>/dev/null) || {
  echo "no CUDA device seen by $python: this script is for a GPU machine (make test runs anywhere)" >&2; exit 2; }
commit=${COMMIT:-$(git describe --always --dirty --exclude='*' 2>/dev/null || cat .commit 2>/dev/null || echo unknown)}
sources=$(find treegrpo kernels csrc bench tests setup.py pyproject.toml -type f \
  \( -name '*.py' -o -name '*.sh' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl' -o -name '*.toml' \) \
  | LC_ALL=C sort | xargs sha1sum | sha1sum | cut -c1-12)
[ "$commit" = unknown ] && commit="sources-$sources"
out=${out:-bench/results/$gpu-$commit}
mkdir -p "$out"
if [ -e "$out/machine.json" ] && ! { grep -qF "\"commit\": \"$commit\"" "$out/machine.json" && grep -qF "\"sources\": \"$sources\"" "$out/machine.json"; }; then
  echo "$out holds results of another commit or of other sources: choose another --out" >&2; exit 2
fi
parts=$(mktemp -d)
log="$out/log.txt"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COMMIT="$commit"
unset TRITON_INTERPRET

echo "=== $(date -u +%FT%TZ) commit $commit, sources $sources, stages: $stages $quick, $seconds s" >> "$log"
OUT="$out" SOURCES="$sources" $python - <<'PY' | tee -a "$log"
import importlib.metadata, json, os, platform, subprocess
import torch

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
try:
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
except OSError as error:
    driver = str(error)
record = dict(commit=os.environ["COMMIT"], sources=os.environ["SOURCES"], gpu=torch.cuda.get_device_name(),
              driver_clock_power=driver, python=platform.python_version(), cuda=torch.version.cuda, cores=os.cpu_count(),
              cudnn=torch.backends.cudnn.version())
record |= {name: version(name) for name in ("torch", "triton", "transformers", "flash-attn", "trl", "matplotlib", "pytest-xdist")}
with open(os.path.join(os.environ["OUT"], "machine.json"), "w") as file:
    json.dump(record, file, indent=1)
print(record)
PY

summary=()
share() { # share NAME: seconds this stage may take
  local total=0 passed="" other
  [ "$1" = build ] && { echo $(((seconds - reserve - SECONDS) / 3)); return; }
  for other in $order; do
    [ "$other" = "$1" ] && passed=yes
    case " $stages " in *" $other "*) [ -n "$passed" ] && total=$((total + ${weight[$other]})) ;; esac
  done
  echo $(((seconds - reserve - SECONDS) * ${weight[$1]} / total))
}

run() { # run NAME LEAST COMMAND...: the command sees its limit as {limit}, and is interrupted when that is over
  local name=$1 least=$2; shift 2
  case " $stages " in *" $name "*) ;; *) return 1 ;; esac
  local limit; limit=$(share "$name")
  if [ "$limit" -lt "$least" ]; then summary+=("$name|skipped: $limit s are left for it, it needs $least|0"); return 1; fi
  echo "== $name (at most $limit s)" | tee -a "$log"
  local start=$SECONDS rc
  # an interrupted pytest still writes its results; what knows its limit ends before
  local interrupt=$((limit > 30 ? limit - 8 : limit))
  local own=$((interrupt > 48 ? interrupt - 8 : interrupt * 5 / 6))
  timeout -s INT -k 8 "$interrupt" "${@//\{limit\}/$own}" >> "$log" 2>&1
  rc=$?
  tail -n 6 "$log" | cut -c1-200
  case $rc in
    0) summary+=("$name|ok|$((SECONDS - start))") ;;
    9) summary+=("$name|FAILED: cut off in what never ended, see log.txt|$((SECONDS - start))") ;;
    124|137) summary+=("$name|FAILED: out of time after $limit s, see log.txt|$((SECONDS - start))") ;;
    *) summary+=("$name|FAILED ($rc), see log.txt|$((SECONDS - start))") ;;
  esac
}

merge() { # merge NAME: the stage's result joins bench.json
  [ -s "$parts/$1.json" ] || return 0
  $python -m bench.report "$parts/$1.json" --merge "$out/bench.json" --out "$out" --no-pictures > /dev/null 2>> "$log" ||
    { echo "$1: its results could not be joined, they stay in $1.json"; cp "$parts/$1.json" "$out/"; }
}

measure() { # measure NAME LEAST FILES...
  local name=$1 least=$2; shift 2
  run "$name" "$least" $python -m pytest "$@" $quick -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
    --bench-seconds={limit} --benchmark-json="$parts/$name.json" && merge "$name"
}

modules() { # modules PATTERN: bench modules that match, with the options of ours they take
  local file
  for file in bench/$1; do
    [ -e "$file" ] || continue
    local module=bench.$(basename "$file" .py) options="" known
    known=$($python -m "$module" --help 2>/dev/null)
    case "$known" in *--out*) options="--out $out/$(basename "$file" .py).json" ;; esac
    case "$known" in *--seconds*) options="$options --seconds {limit}" ;; esac
    case "$known" in *--quick*) options="$options $quick" ;; esac
    echo "$module $options"
  done
}

run_modules() { # run_modules NAME PATTERN
  case " $stages " in *" $1 "*) ;; *) return ;; esac
  local found; found=$(modules "$2")
  if [ -z "$found" ]; then summary+=("$1|skipped: there is no bench/$2|0"); return; fi
  run "$1" 20 bash -c "set -e; while read -r line; do echo \"-- \$line\"; $python -m \$line; done <<< '$found'"
}

# where nvcc is, a CUDA object that does not build is a failure
run build 20 env TREEGRPO_BUILD=$(command -v nvcc > /dev/null && echo cuda || echo auto) $python setup.py build_ext --inplace
# only the files that have GPU tests: the others import packages that a bare machine may lack; what takes the time of a
# call runs last and alone
with_gpu_tests=$(grep -lE "mark\.gpu" tests/test_*.py | tr '\n' ' ')
tested=$([ -n "$quick" ] && echo tests/test_gpu_runs.py tests/test_gpu_head.py || echo "$with_gpu_tests")
workers=$($python -c "import xdist; print('-n 6 --dist worksteal')" 2>/dev/null)
# a kernel that never ends takes one worker with it, not the others
workers="$workers $($python -c "import pytest_timeout; print('--timeout=100 --timeout-method=thread')" 2>/dev/null)"
timed="of_the_host or within_a_millisecond"
# the CUDA kernels for Hopper have waited for ever once: as long as they have not been rerun, not beside the others
run tests 20 bash -c "$python -m pytest $tested -m 'gpu and not cuda_kernels' -k 'not ($timed)' -q $workers --maxfail=30 \
  -p no:cacheprovider; failed=\$?
  $python -m pytest tests/test_gpu_plan.py -m 'gpu and not cuda_kernels' -k '$timed' -q -p no:cacheprovider && exit \$failed"
run sanitize 30 $python tests/sanitize.py --seconds {limit}
# whatever takes the accelerator that is there; processes of their own would go to the CPU
trained="tests/test_trainer.py tests/test_engine_hf*.py"
$python -c "import bm25s" 2> /dev/null && trained="$trained tests/test_online.py"
$python -c "import trl" 2> /dev/null && trained="$trained tests/test_trl.py tests/test_trl_tree.py"
run train 40 bash -c "$python -m pytest $trained -k 'not process' -q $workers --maxfail=30 -p no:cacheprovider"
measure step 30 bench/test_real_step.py
measure bench 40 bench/test_attention_gpu.py bench/test_plan.py
measure head 20 bench/test_head.py
measure hybrid 20 bench/test_recurrence.py
run_modules split tune_split.py
run_modules tune tune.py
run_modules profile 'profile*.py'
# at the clocks of the race: by default ncu would set others, on a machine that may be somebody else's too
counters="--set full --clock-control none --kernel-name-base demangled --kernel-name 'regex:sm90.*(forward|dq|dkv)_kernel'"
counters="$counters --launch-count 8"
# a test that never ends leaves half of the time to the race
run cuda 60 bash -c "
  timeout -s INT -k 5 \$(({limit} / 2)) $python -m pytest $with_gpu_tests -m 'gpu and cuda_kernels' -q $workers --maxfail=10 \
    -p no:cacheprovider; failed=\$?
  $python -m bench.race_cuda $quick --out $out/race_cuda.json || failed=1
  if command -v compute-sanitizer; then
    timeout -k 5 90 compute-sanitizer --error-exitcode 9 $python tests/sanitize.py sm90 || failed=1
  fi
  if command -v ncu; then ncu $counters --csv --page details $python -m bench.race_cuda --quick > $out/ncu.csv; fi
  exit \$failed"

rm -rf "$parts"
{
  echo
  echo "commit $commit on $gpu, results in $out"
  [ -s "$out/bench.json" ] && $python -m bench.report "$out/bench.json" --short 2>&1
  missing=$($python -c "import treegrpo_kernels as tk
print('; '.join(f'{name}: {why}' for name, why in tk.backends().items() if why and name != 'cpu'))" 2>> "$log")
  [ -n "$missing" ] && echo "kernels that do not work here: $missing"
  printf '%-9s %-60s %s\n' stage outcome seconds
  for row in "${summary[@]}"; do IFS='|' read -r name outcome spent <<< "$row"; printf '%-9s %-60s %s\n' "$name" "$outcome" "$spent"; done
  echo "$SECONDS s in all"
} | tee -a "$log"
