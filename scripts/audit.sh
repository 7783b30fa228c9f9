#!/bin/sh
# Looks up every locked package in the vulnerability database osv.dev. `make audit` runs it; arguments are passed to pip-audit.
# Exit status: 0 if no package has a known vulnerability, 3 if the database can't be reached, otherwise 1.
set -eu
cd "$(dirname "$0")/.."

# Accepted vulnerabilities, one per line: the ID, and the reason why it doesn't concern this project.
accepted='
'
ignored=$(echo "$accepted" | sed -n 's/^\([A-Z][^ ]*\) .*/--ignore-vuln \1/p')
result=0
for file in requirements*.txt; do
    status=0
    # shellcheck disable=SC2086  # each option and each ID is a word
    found=$(.venv/bin/python -m pip_audit --strict --disable-pip --require-hashes --progress-spinner off --vulnerability-service osv \
        --requirement "$file" $ignored "$@" 2>&1) || status=1
    case $found in
        *ConnectionError:* | *ConnectTimeout* | *ReadTimeout* | *HTTPError*)
            echo "$file: not checked, because osv.dev can't be reached: $(echo "$found" | tail -n 1)" >&2
            exit 3
            ;;
    esac
    echo "$file: $(echo "$found" | grep -v ^WARNING)"
    [ $status = 0 ] || result=1
done
exit $result
