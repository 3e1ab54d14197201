#!/usr/bin/env bash
# sacrebleu 2.6.0: a paired bootstrap of chrF or TER ends in a TypeError when it prints its default format, JSON.
#
# The figures of these metrics are numpy's float32, which json does not write; BLEU's are Python's floats. With `--format text`, or by
# paired approximate randomisation (`--paired-ar`), the same command prints its table.
# Seen: bleu 0, chrf 1 and ter 1 as exit codes, "Object of type float32 is not JSON serializable"; chrf with --format text 0.
# Guess before the run (after a failure with both metrics): BLEU fails too. It was wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "sacrebleu==2.6.0" "numpy==2.4.6"
cd "$folder"
printf 'a b c d e\nthe cat sat on the mat\nhello world again\n' > reference
printf 'a b c d f\nthe cat sat on a mat\nhello world\n' > one
printf 'a b d e\nthe dog sat on the mat\nhello new world\n' > other
seen=""
for options in "bleu" "chrf" "ter" "chrf --format text"; do
    code=0
    venv/bin/python -m sacrebleu reference -i one other -m $options --paired-bs --paired-bs-n 100 > out 2> err || code=$?
    seen="$seen$options: $code; "
    if [ "$code" = 1 ]; then grep -q "Object of type float32 is not JSON serializable" err; fi
done
echo "sacrebleu 2.6.0: $seen"
[ "$seen" = "bleu: 0; chrf: 1; ter: 1; chrf --format text: 0; " ]
