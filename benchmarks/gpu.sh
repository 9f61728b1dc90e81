#!/usr/bin/env bash
# Print all tables of docs/benchmarks.md that need a GPU, in under eight minutes (python -m pytest tests the code there):
#   bash benchmarks/gpu.sh [FOLDER for the tables as JSON]          one NVIDIA GPU of 80 GB
# These peers are measured if they are installed: transformers, peft, liger-kernel, quack-kernels, cut-cross-entropy.
# If a part fails, the others still run, and the end names it. TRY=1 uses tiny sizes, to try the script on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} != -* ]] || { sed -n '2,5s/^# //p' "$0"; exit; }
out=$(realpath -m "${1:-out/gpu}")
mkdir -p "$out"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=()
shared=../shared/data # real text if this folder exists, else the bundled sample
[ -d $shared ] && data=(--data $shared/sib200 --tokenizer $shared/llama2) || data=()

part() { # arguments: time limit in seconds, then the command
    local limit=$1 began=$SECONDS
    shift
    echo
    echo "== $*"
    timeout "$limit" "$@" || failed+=("$* (status $?)")
    echo "== $((SECONDS - began)) s"
}

if [ "${TRY:-}" ]; then
    part 100 python3 benchmarks/cross_entropy.py --repeats 1 --shapes 64,32,2001
    part 200 python3 benchmarks/train_step.py --steps 1 --rounds 1
    part 100 python3 benchmarks/one_gpu.py --shape demo --device cpu --dtype float32 --seq-len 64 --batch-size 4 --steps 6
    part 200 python3 benchmarks/evaluate.py --shape demo --examples 4
else
    part 100 python3 benchmarks/cross_entropy.py --repeats 5 --dtypes mixed --out "$out/cross_entropy.json"
    part 200 python3 benchmarks/train_step.py --shape llama2-7b --steps 3 --rounds 1 --out "$out/train_step.json"
    part 100 python3 benchmarks/one_gpu.py --steps 15
    part 150 python3 benchmarks/evaluate.py --shape tinyllama-1.1b llama-2-7b "${data[@]}"
fi
echo
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
echo "all parts ran, $SECONDS s"
