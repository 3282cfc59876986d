#!/bin/sh
# One program for all events: runs the script in "shell" with the name of the event, which is the
# first argument. Events without a script are accepted.

script="$(dirname "$0")/shell/$1"

if [ -x "$script" ]; then
    exec "$script"
fi
