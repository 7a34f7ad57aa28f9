#!/usr/bin/env bash
# Everything that a session on a GPU should tell, what gives most first; made for half an hour on a card.
#
#   benchmarks/gpu_session.sh FOLDER                  all parts, one after another
#   benchmarks/gpu_session.sh FOLDER smoke tests off  these parts only, for cards that are lent by the command
#
# Each part is a process of its own with a time limit: a part that fails or hangs costs no other. FOLDER gets a log per
# part, the results' JSON, and summary.txt: exit status and seconds of each part (124 is its limit).
#
#   part     limit  what
#   smoke     120   a tiny model through all of bench_gpu_step.py: what is broken at all
#   kernels   150   the attention backends (but for Flex) and the commit kernel against their definitions
#   off       300   drafting off against HF generate, as it is and compiled, and the copy bandwidth
#   step      240   steps of 1 to 64 nodes, their target passes, and where the time goes
#   tests     300   the other tests marked gpu: identity in float32, captured and not; near-ties in bfloat16
#   accept    300   tokens per second at 2, 3 and 4.5 tokens per pass
#   batches   240   1, 4, 16 and 64 rows, and what the budget chooses
#   pair      600   trains the pair of 123 M and 10 M parameters
#   bench     300   real acceptance on that pair: Lookahead, the draft model, auto
#
# A context or batch that was measured is in the JSON, whatever becomes of the next one. Needs the environment of
# `make env` on a machine with a GPU; the tests run on several processes where pytest-xdist is installed.
#
# PYTHON  the Python to use (default: .venv/bin/python if there is one, else python3)
# PRESET  of bench_gpu_step.py (default: llama-8b); DEVICE  cuda, or cpu to see that the script runs (with PRESET=tiny)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${1:?"name a folder for the results: benchmarks/gpu_session.sh FOLDER [PART...]"}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
python=${PYTHON:-}
[[ -n $python ]] || { [[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python3; }
preset=${PRESET:-llama-8b}
device=${DEVICE:-cuda}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
KERNELS="attention or paths_move"
TESTS=(-m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py)
"$python" -c "import xdist" 2>/dev/null && TESTS+=(-n "${WORKERS:-8}")

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS code=0
    shift 2
    printf '== %s (at most %d s)\n' "$name" "$limit"
    timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    printf '%-8s status %3d  %4d s\n' "$name" "$code" $((SECONDS - started)) | tee -a "$out/summary.txt"
    ((code == 0)) || tail -n 15 "$out/$name.log"
}

measure() { # PART SECONDS
    part "$1" "$2" "$python" benchmarks/bench_gpu_step.py --preset "$preset" --device "$device" --part "$1" \
        --name "${preset}_$1" --output "$out"
}

run() { # PART
    case $1 in
    smoke) part smoke 120 "$python" benchmarks/bench_gpu_step.py --preset tiny --device "$device" --output "$out" ;;
    kernels) part kernels 150 "$python" "${TESTS[@]}" -k "$KERNELS" ;;
    tests) part tests 300 "$python" "${TESTS[@]}" -k "not ($KERNELS)" ;;
    off | accept) measure "$1" 300 ;;
    step | batches) measure "$1" 240 ;;
    pair) part pair 600 "$python" examples/gpu_pair/train.py --work "$out/pair" ;;
    bench) part bench 300 "$python" -m specdec bench --model "$out/pair/exported/target" \
        --draft-model "$out/pair/exported/draft" --dtype bfloat16 --device "$device" --output "$out/bench" ;;
    *) printf 'No such part: %s\n' "$1" >&2 && exit 2 ;;
    esac
}

(($#)) || set -- smoke kernels off step tests accept batches pair bench
: >"$out/machine.txt"
nvidia-smi >>"$out/machine.txt" 2>&1
"$python" -m pip list >>"$out/machine.txt" 2>&1
for name in "$@"; do run "$name"; done
printf '\n' && cat "$out/summary.txt"
