#!/usr/bin/env bash
# Make what a machine with a GPU but no network lacks: wheels for its Python 3.12, small shards and a tokenizer.
#
#   benchmarks/gpu/pack.sh [FOLDER]     default: benchmarks/gpu/.pack, where run.sh looks for it
#
# It needs `make install` and a network; PYTHON chooses another interpreter that has MegaMoE. A pack that is current stays.
set -euo pipefail

LIMIT_MIB=60                  # such a machine takes a tree of 64 MiB, of which the repository has 4
SDISTS='deepspeed|fairscale'  # PyPI has no wheels of them
FOREIGN='torch|triton|numpy|nvidia.*'  # that machine has its own, made for its GPU

size() { du -sb --total "$@" | awk 'END { printf "%.1f", $1 / 2^20 }'; } # in MiB

fail() { echo "pack.sh: $1" >&2; exit 1; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $(command -v "$python") ]] || fail "there is no $python; run make install, or set PYTHON"
pack=$(realpath -m -- "${1:-$root/benchmarks/gpu/.pack}")
cd "$root"
mkdir -p "$pack"
[[ -f $pack/recipe || -z $(ls -A "$pack") ]] || fail "$pack holds something else; name a new folder"

wheels() { # FOLDER
    local requirements=benchmarks/gpu/requirements.txt
    # What pip has built before may hold compiled operators: --no-cache-dir builds anew. No isolation, as in the Makefile.
    grep -xE "$SDISTS" $requirements >"$temp/built"
    DS_BUILD_OPS=0 BUILD_CUDA_EXTENSIONS=0 "$python" -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation \
        --no-binary=:all: --requirement "$temp/built" --constraint constraints.txt --wheel-dir "$1"
    local wheel
    for wheel in "$1"/*.whl; do
        if "$python" -m zipfile --list "$wheel" | grep -E '\.(so|o|a|pyd)[ .]'; then
            fail "${wheel##*/} holds the files above, compiled for this machine"
        fi
        # The tag of this Python and machine would only say where the wheel was built.
        [[ $wheel == *-py3-none-any.whl ]] || "$python" -m wheel tags --remove --python-tag py3 --abi-tag none \
            --platform-tag any "$wheel" >/dev/null
    done
    grep -vxE "#.*|$SDISTS" $requirements >"$temp/taken"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --requirement "$temp/taken" --constraint constraints.txt --dest "$1"
    ! ls "$1" | grep -iE "^($FOREIGN)-" || fail "the wheels above would hide those of the machine"
}

data() { # FOLDER
    local megamoe=(env PYTHONPATH="$root" "$python" -m megamoe)
    "${megamoe[@]}" data synth "$1" --level 3 --image-size 224 --samples 512 --seed 1 --shard-size 128 --validation 32
    "${megamoe[@]}" data tokenizer "$1/train" "$1/tokenizer" --vocab-size 400
    local split
    for split in train validation combinations; do "${megamoe[@]}" data index "$1/$split"; done
}

# Data take three seconds, so they have no recipe of their own.
recipe=$(cat constraints.txt benchmarks/gpu/{requirements.txt,pack.sh} | sha256sum)
if [[ ! -f $pack/recipe || $(<"$pack/recipe") != "$recipe" ]]; then
    temp=$(mktemp -d)
    trap 'rm -rf "$temp"' EXIT
    wheels "$temp/wheels"
    data "$temp/data" >"$temp/log"
    mib=$(size "$temp/wheels" "$temp/data")
    awk "BEGIN { exit !($mib <= $LIMIT_MIB) }" || fail "$mib MiB of wheels and data; no more than $LIMIT_MIB may be carried"
    : >"$pack/recipe" # whatever happens before the last line, this is no pack
    rm -rf "$pack/wheels" "$pack/data"
    mv "$temp/wheels" "$temp/data" "$pack"
    echo "$recipe" >"$pack/recipe"
fi
echo "$pack: $(ls "$pack/wheels" | wc -l) wheels and data, $(size "$pack") MiB"
