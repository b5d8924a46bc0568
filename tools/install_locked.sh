#!/bin/sh
# Installs locks/$2.txt with the Python $1; the files that pip gets are compared with the hashes there. torch is taken for
# processors alone where pip's index has that, as pip itself would, and as PyPI has it otherwise.
# LBS_LOCK=no installs the same versions without looking at hashes: from an index whose files are its own.
set -u
python=$1
lock=locks/$2.txt
install="$python -m pip install -q --no-compile"

if [ "${LBS_LOCK:-}" = no ]; then
    echo "LBS_LOCK=no: packages of $lock are installed without comparing hashes" >&2
    pins=$(mktemp) || exit 1
    trap 'rm -f "$pins"' EXIT
    sed -n 's/ \\$//p' "$lock" | grep -v '^ ' >"$pins"
    if [ "$2" = dev ]; then echo torch >>"$pins"; fi # whichever build of the version in constraints.txt
    $install -c constraints.txt -r "$pins"
    exit
fi

case $2 in
dev)
    said=$($install --require-hashes -r locks/torch-cpu.txt -r "$lock" 2>&1) && exit 0
    echo "not installed with torch for processors alone: $(printf '%s\n' "$said" | tail -n 1)" >&2
    $install --require-hashes -r locks/torch.txt -r "$lock" && exit 0
    ;;
*)
    $install --require-hashes -r "$lock" && exit 0
    ;;
esac
echo "error: what pip gets is not what $lock names. Hashes differ where an index packs its own files, or where somebody" >&2
echo "       changed them. Give pip another index, or LBS_LOCK=no make ... to install without comparing." >&2
exit 1
