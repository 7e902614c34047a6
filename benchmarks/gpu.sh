#!/bin/sh
# Check and measure on a GPU in one go, without a network: gradients against float64, a pass against learn2learn and JAX,
# whole fits, and Omniglot 5-way 1-shot at the paper's length. The table comes last, and stands in OUT/table.txt.
#
#     benchmarks/gpu.sh [--device cpu] [--wheels FOLDER] [--out FOLDER] [--root DATA] [--steps 60000] [STAGE ...]
#
# STAGE: gradients speed fit train; all by default. FOLDER of wheels: what the machine lacks, installed for this run only.
# DATA holds torchvision's omniglot-py; without it, or its cache, nothing is trained. Each stage has a limit.
set -u
cd "$(dirname "$0")/.." || exit
device=cuda wheels='' out=benchmarks/runs/gpu root=data steps=60000 stages=''
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    --out) out=$2; shift ;;
    --root) root=$2; shift ;;
    --steps) steps=$2; shift ;;
    gradients | speed | fit | train) stages="$stages $1" ;;
    *) sed -n '2,9s/^# \{0,1\}//p' benchmarks/gpu.sh; exit 2 ;;
    esac
    shift
done
PY=${PY:-python3}
accelerator=$device few='' repeats=5 fit_steps=300
if [ "$device" = cuda ]; then accelerator=gpu; else few='--tasks 2' repeats=1 fit_steps=20; fi
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    $PY -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
    export PYTHONPATH="$site:$PYTHONPATH"
fi

# stage LIMIT NAME COMMAND: what it prints is in OUT/NAME.log
stage() {
    limit=$1 name=$2
    shift 2
    echo "$(date +%T) $name" >&2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || echo "$name: exit status $?, see $out/$name.log" | tee -a "$out/failed"
}

rm -f "$out/failed"
for stage in ${stages:-gradients speed fit train}; do
    case $stage in
    gradients) stage 300 gradients $PY benchmarks/gradients.py --device "$device" ;;
    speed)
        for workload in omniglot large small; do
            # shellcheck disable=SC2086
            stage 240 "speed-$workload" $PY benchmarks/speed.py --device "$device" --repeats $repeats $few \
                --only $workload --without torch.func compiled
        done
        ;;
    fit) stage 120 fit $PY benchmarks/fit.py --steps $fit_steps --accelerator "$accelerator" ;;
    train)
        stage 900 train $PY benchmarks/evaluate.py --config omniglot/maml_5way_1shot.yaml --data.root "$root" \
            --trainer.accelerator "$accelerator" --trainer.max_steps "$steps" --trainer.enable_progress_bar false \
            --out "$out" --tests transductive-1 transductive-15 alone-1
        ;;
    esac
done

{
    $PY -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "")'
    for log in gradients speed-omniglot speed-large speed-small fit train; do
        [ -e "$out/$log.log" ] || continue
        case $log in
        gradients) echo "gradients: $(grep -c '^ok' "$out/$log.log") within their bounds"; grep '^FAIL' "$out/$log.log" ;;
        speed-*) grep -E '^\||steps$|MAML|Reptile' "$out/$log.log" ;;
        fit) grep 'pass ' "$out/$log.log" ;;
        train) grep -E ', (transductive|alone)-' "$out/$log.log" ;;
        esac
    done
    cat "$out/failed" 2>/dev/null
} | tee "$out/table.txt"
[ ! -e "$out/failed" ]
