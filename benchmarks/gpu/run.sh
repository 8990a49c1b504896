#!/usr/bin/env bash
# On a machine with a GPU and no network: unpack what pack.sh made and measure.
#
#   benchmarks/gpu/run.sh OUT [ARGUMENTS of python -m benchmarks.gpu]
#
# The machine brings Python 3.12 with torch, triton and numpy. PYTHON chooses the interpreter, MEGAMOE_GPU_SITE the folder
# that the packages are unpacked in (default: a new one in the folder for temporary files).
set -euo pipefail

refuse() { echo "run.sh: $1" >&2; exit 2; }

(($#)) || refuse "give the folder for the results: benchmarks/gpu/run.sh OUT [ARGUMENTS]"
out=$(realpath -m -- "$1")
site=${MEGAMOE_GPU_SITE:+$(realpath -m -- "$MEGAMOE_GPU_SITE")}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
pack=$PWD/benchmarks/gpu/.pack
python=${PYTHON:-python3}

[[ -s $pack/recipe ]] || refuse "there is no $pack; make it by benchmarks/gpu/pack.sh where there is a network"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || refuse "$python does not run; set PYTHON"
[[ $version == 3.12 ]] || refuse "the pack is for Python 3.12, and $python is $version; set PYTHON"
why=$("$python" -c 'import numpy, torch' 2>&1) || refuse "$python does not import torch: ${why##*$'\n'}"

# Unzipped, not installed: it works without pip, takes a second, and our wheels need nothing of what pip does beside it.
site=${site:-$(mktemp -d)}
"$python" -c 'import sys, zipfile
for wheel in sys.argv[2:]:
    zipfile.ZipFile(wheel).extractall(sys.argv[1])' "$site" "$pack"/wheels/*.whl

# A copy can be newer than its original, and an index that is older than its shard is refused.
touch -d @0 "$pack"/data/*/*.tar

# The repository is first because fairscale has a package "benchmarks" as well. Both are before the packages of the machine,
# of which torch, triton and numpy are used: pack.sh takes none of these.
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.gpu --out "$out" --data "$pack/data" "$@"
