#!/bin/sh
# onnxruntime 1.32.0 (Linux x86-64, CPython 3.11): importing it writes a device number and a database of events.
#
# One would expect:  a library for inference that is imported, and nothing else, leaves no file behind; and a call named
#                    disable_telemetry_events() is the way to have it so.
# What happens:      `import onnxruntime` makes two files below the user's cache, Microsoft/DeveloperTools/.onnxruntime:
#                    `deviceid`, a UUID in text that stays the same from one process to the next, and `onnxruntime.db`,
#                    an SQLite database with a table of events. The call can only come after the import, when they are
#                    there. ORT_DISABLE_TELEMETRY=1 in the environment during the import prevents both; set after the
#                    import it comes too late; taken away after the import it is not missed.
# Not looked at:     whether, when and where anything is sent.
# Output seen:       both files after the import, with the call, with the variable set late, and with the variable at 0;
#                    nothing with the variable at 1 during the import; tables `events` and `settings` in the database.
#
# Runs no code of ours. Exit status 0: as written here; 1: it behaves differently now.   sh findings/NAME.sh
set -eu
PYTHON="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT INT TERM
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --disable-pip-version-check --quiet --only-binary :all: \
    onnxruntime==1.32.0 numpy==2.4.6
failed=0

# files NAME CODE [VARIABLE=VALUE]: run code with an empty home that is kept under NAME; list what is below it.
files() {
    mkdir -p "$work/$1"
    env -u XDG_CACHE_HOME -u ORT_DISABLE_TELEMETRY HOME="$work/$1" ${3:-} "$work/venv/bin/python" -c "$2"
    (cd "$work/$1" && find . -type f ! -name '*-wal' ! -name '*-shm' ! -name '*-journal' | LC_ALL=C sort | tr '\n' ' ')
}

# expect WHAT SEEN WANTED
expect() {
    printf '%-46s %s\n' "$1" "${2:-nothing}"
    [ "$2" = "$3" ] || { echo "  differs; it was: ${3:-nothing}"; failed=1; }
}

PLACE=".cache/Microsoft/DeveloperTools/.onnxruntime"
BOTH="./$PLACE/deviceid ./$PLACE/onnxruntime.db "
SET="import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'"
expect "import" "$(files a 'import onnxruntime')" "$BOTH"
expect "import, disable_telemetry_events()" "$(files b 'import onnxruntime as o; o.disable_telemetry_events()')" "$BOTH"
expect "import, then the variable" "$(files c "import onnxruntime; $SET")" "$BOTH"
expect "the variable, then import" "$(files d "$SET; import onnxruntime")" ""
GONE="$SET; import onnxruntime; del os.environ['ORT_DISABLE_TELEMETRY']"
expect "the variable, import, variable away" "$(files e "$GONE")" ""
expect "the variable is 0, import" "$(files f 'import onnxruntime' ORT_DISABLE_TELEMETRY=0)" "$BOTH"

id="$work/a/$PLACE"
first="$(cat "$id/deviceid")"
files a 'import onnxruntime' > "$work/again"
expect "the number after another import" "$([ "$first" = "$(cat "$id/deviceid")" ] && echo same)" "same"
expect "its length" "${#first}" "36"
tables="$("$work/venv/bin/python" -c "
import sqlite3, sys
rows = sqlite3.connect(sys.argv[1]).execute(\"select name from sqlite_master where type = 'table' order by name\")
print(*[name for (name,) in rows])" "$id/onnxruntime.db")"
expect "tables of the database" "$tables" "events settings"
exit "$failed"
