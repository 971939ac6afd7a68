#!/bin/sh
# The newcomer's run: real servers, a real network on real data, five seeds, each beside its ungrown twin.
# What a person reads goes to standard error; standard output gets one JSON line. Usage: demo.sh ESPERCTL [SEEDS]
set -eu
esperctl=$1
seeds=${2:-5}
"$esperctl" up >&2
result=$("$esperctl" train digits-narrow --repeat "$seeds" -o json)
printf '\nWhat took root, and how one of them got there:\n' >&2
"$esperctl" seed list --run any --state fossilized >&2
run=$(printf '%s' "$result" | sed -n 's/.*"run": *"\([^"]*\)".*/\1/p')
"$esperctl" seed show fc2:fc3 --run "$run" >&2 || true
printf '\nThe platform is still up: esperctl --help, or `make down` to stop it. The report is a web page; its path is below.\n\n' >&2
printf '%s\n' "$result"
