#!/bin/sh
# The program behind process_agent.py: one process for each turn, JSON lines on standard input and
# output. Standard error goes to the gateway's log. POSIX sh and sed; with jq it would be shorter.
set -eu

tell() { printf '%s\n' "$1"; }
hear() { IFS= read -r answer; }

hear # {"event":"turn", ..., "text":"two words", "messages":[...], ...}
text=$(printf '%s\n' "$answer" | sed 's/^.*,"text":"\(.*\)","messages":\[.*$/\1/')

tell '{"event":"say","text":"I am counting."}'
hear # {"event":"ok","of":"say"}: it is on disk

tell '{"event":"step","name":"count"}'
hear
case $answer in
    '{"event":"run",'*)
        words=$(printf '%s\n' "$text" | wc -w | tr -d ' ')
        echo "$words" >>counted.log
        tell "{\"event\":\"done\",\"name\":\"count\",\"result\":$words}"
        hear # {"event":"ok","of":"step","name":"count"}: it is on disk, and not done again
        ;;
    *) # {"event":"remembered","name":"count","result":2}: done by an earlier attempt
        words=$(printf '%s\n' "$answer" | sed 's/^.*"result":\([0-9]*\).*$/\1/')
        ;;
esac

tell '{"event":"progress","text":"writing the answer"}'
sleep "${WORDS_PACE:-1}"
tell "{\"event\":\"reply\",\"text\":\"There are $words words.\"}"
