#!/usr/bin/env bash
# Runs the C extension under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: `make sanitize`.
#
# The page pool and the page arena run alone against models, ten million steps each; then the tests that reach the extension run with a build of
# it that watches itself, in a copy of this checkout. It needs gcc. Anything that a sanitizer finds ends it with an error.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
steps=${STEPS:-10000000}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

flags="-g -O1 -fno-omit-frame-pointer -pthread -Wall -Wextra"
for what in pool arena; do
    echo "== the page $what against a model, $steps steps: addresses, undefined behaviour"
    gcc $flags -fsanitize=address,undefined -fno-sanitize-recover=all tests/native/page_${what}_stress.c -o "$folder/stress"
    "$folder/stress" "$steps" 1
    echo "== threads"
    gcc $flags -fsanitize=thread tests/native/page_${what}_stress.c -o "$folder/stress"
    "$folder/stress" "$((steps / 20))" 2
done

echo "== the tests that reach the extension: addresses, undefined behaviour"
git ls-files -z | tar --null -cf - -T - | tar -xf - -C "$folder"
cd "$folder"
extension=chainer_ooc/swap/devices/ram
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
gcc $flags -D_GNU_SOURCE -DPy_LIMITED_API=0x030b0000 -shared -fPIC -fvisibility=hidden -I"$include" \
    -fsanitize=address,undefined -fno-sanitize-recover=all $(find chainer_ooc -name '*.c') -ldl -o $extension/_allocator.abi3.so
# Python and NumPy keep memory to the end on purpose; what they allocate is watched only with malloc itself.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=1 PYTHONMALLOC=malloc PYTHONPATH=$folder
# The sanitizer's own memory is resident, too.
resident="whatever_comes_and_goes or scattered_blocks or limit_of_address_space or beside_a_look"
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$python" -m pytest -q -p no:cacheprovider \
    tests/swap/test_page_pool.py tests/swap/test_allocator.py tests/swap/test_allocation_failures.py \
    tests/swap/test_engine_lock.py tests/graph/test_fast_property.py tests/graph/test_margin.py \
    tests/swap/cuda/test_page_arena.py -k "not ($resident)" "$@"
