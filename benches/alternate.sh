#!/bin/sh
# Runs commands in turn, so that whatever else the machine does meets all of them, and prints the median of each:
#   benches/alternate.sh ROUNDS 'COMMAND' 'COMMAND' ...
# A command's last line of JSON with "ms_per_step" (`carrousel profile step --json`) or "ms_median" is its result.
set -eu
[ $# -ge 2 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
rounds=$1
shift
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
round=0
while [ "$round" -lt "$rounds" ]; do
    n=0
    for command in "$@"; do
        n=$((n + 1))
        ms=$(sh -c "$command" 2>/dev/null | sed -n 's/.*"\(ms_per_step\|ms_median\)": *\([0-9.eE+-]*\).*/\2/p' | tail -n 1)
        [ -n "$ms" ] || { echo "no milliseconds from: $command" >&2; exit 1; }
        echo "$ms" >>"$results/$n"
    done
    round=$((round + 1))
done
n=0
for command in "$@"; do
    n=$((n + 1))
    sort -g "$results/$n" | awk -v command="$command" '
        { ms[NR] = $1 }
        END { printf "%10.3f ms median, %10.3f least of %d  %s\n", (ms[int((NR + 1) / 2)] + ms[int(NR / 2) + 1]) / 2, ms[1], NR, command }'
done
