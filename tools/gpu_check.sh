#!/bin/bash
# Test and measure w2s on one Hopper GPU, within 10 minutes, and write docs/h100.md.
#
#   tools/gpu_check.sh [--rehearse] [PART...]    all parts without a name; those of earlier calls stay in the results
#
# Where the folder .te lies (wheels, and run.sh that unpacks them and runs a command), a machine without network will do.
# --rehearse goes the same way on a CPU with tiny sizes; then the page stays beside the results, in runs/gpu_check.
# If OUT names a folder, the page and an archive of the results are copied into it.
set -u
cd "$(dirname "$0")/.."
repository=$PWD
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-580}))
rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=yes; shift; fi
wanted=" $* "
results=$repository/runs/gpu_check${rehearse:+_rehearsal}
mkdir -p "$repository/runs"

if [ -d .te ]; then
    site=${TE_DIR:-/tmp}/site
    on=(bash "$repository/.te/run.sh")
    "${on[@]}" python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target "$site" . || exit 1
    w2s=("${on[@]}" python3 "$site/bin/w2s")
    # Away from the sources, which lack w2s.configs where they are not installed in place.
    tests=$(mktemp -d)
    cp -r tests setup.cfg "$tests"
else
    on=()
    w2s=(w2s)
    tests=$repository
fi
python=(${on[@]+"${on[@]}"} python3)

# part NAME SECONDS COMMAND...: one that fails or takes too long does not stop the others.
part() {
    local name=$1 budget=$2 left=$((deadline - SECONDS)) begun=$SECONDS code
    shift 2
    if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
    echo "$name" >&2
    if [ "$left" -ge 15 ]; then
        if [ "$left" -lt "$budget" ]; then budget=$left; fi
        timeout -k 5 "$budget" "$@" >"$results/$name.json" 2>"$results/$name.log"
        code=$?
        # 137 is also the code of a rank that was killed, as for memory.
        if [ "$code" -ne 0 ] && [ "$((SECONDS - begun))" -ge "$budget" ]; then code=124; fi
        echo "$code" >"$results/$name.rc"
    elif [ -e "$results/$name.rc" ]; then
        echo "no time was left: its earlier result stays" >&2
    else
        echo "no time was left" | tee "$results/$name.log" >&2
        echo 124 >"$results/$name.rc"
    fi
}

# bench NAME SECONDS STAGE ARGUMENTS...
bench() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "${w2s[@]}" bench step "$@" "${size[@]}" --json
}

# What was measured elsewhere or with other packages does not stand on the same page.
"${python[@]}" tools/machine.py >"$results.now" || exit 1
if [ -e "$results/machine.json" ] && ! diff -q -I '"date"' "$results.now" "$results/machine.json" >&2; then
    rm -r "$results"
fi
mkdir -p "$results"
mv "$results.now" "$results/machine.json"
cat "$results/machine.json" >&2

if [ "$rehearse" ]; then
    size=(model=tiny hardware=cpu teacher.source=timm:test_vit teacher.image_size=64 --layers 1 --steps 1)
    every=(--micro-batch 16 --micro-batch 32) large=(--micro-batch 32)
    first=emulated others=() pytest=(--collect-only) tiny=(--tiny)
else
    size=(model=eva_18b teacher=eva02_clip_e_plus hardware.device=cuda precision.compute=bf16 teacher.precision=bf16
        --layers 4 --steps 8)
    every=(--micro-batch 16 --micro-batch 32 --micro-batch 64 --micro-batch 128)
    large=(--micro-batch 64 --micro-batch 128)
    first=tensorwise others=(delayed blockwise) pytest=() tiny=()
fi

# What matters most comes first: the first eight parts have 560 seconds together, and the last four need a second call.
part calibration 40 "${python[@]}" tools/calibrate.py ${tiny[@]+"${tiny[@]}"}
bench mim_bf16 75 mim "${every[@]}"
bench clip_bf16 75 clip "${every[@]}"
bench "mim_$first" 50 mim "${large[@]}" "precision.fp8=$first"
bench "clip_$first" 50 clip "${large[@]}" "precision.fp8=$first"
# Only files that hold tests for a GPU: others may need packages that are missing here.
files=$(grep -rl 'mark\.gpu' tests)
part tests 110 bash -c 'cd "$1" && shift && exec "$@" >&2' - "$tests" \
    "${python[@]}" -m pytest -p no:cacheprovider -m gpu ${pytest[@]+"${pytest[@]}"} $files
bench mim_timm 80 mim --vs timm --rounds 1 --micro-batch 64 teacher.compile=true
bench clip_open_clip 80 clip --vs open_clip --rounds 1 --micro-batch 128
for recipe in ${others[@]+"${others[@]}"}; do
    bench "mim_$recipe" 60 mim "${large[@]}" "precision.fp8=$recipe"
    bench "clip_$recipe" 60 clip "${large[@]}" "precision.fp8=$recipe"
done

page=$repository/docs/h100.md
if [ "$rehearse" ]; then page=$results/h100.md; fi
"${python[@]}" tools/gpu_page.py "$results" >"$results/page" && mv "$results/page" "$page" && echo "written: $page" >&2
if [ -n "${OUT:-}" ]; then
    cp "$page" "$OUT"
    tar -C "$(dirname "$results")" -czf "$OUT/results.tar.gz" "$(basename "$results")"
fi
