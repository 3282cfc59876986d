#!/bin/sh
# One program for all events: runs the script of the directory "shell" that is named like the
# event, which is the first argument. An event without a script is accepted.

script="$(dirname "$0")/shell/$1"

if [ -x "$script" ]; then
    exec "$script"
fi
