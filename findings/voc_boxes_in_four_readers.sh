#!/usr/bin/env bash
# The same Pascal VOC file in four readers. VOC counts pixels from 1 and xmax, ymax belong to the object: its own code takes
# xmax - xmin + 1 for the width. globox 2.9.0, pylabel 0.1.55 and datumaro 1.13.12 take the four numbers for edges: an object of twelve
# pixels is eleven wide and a pixel off, and one that fills the picture leaves out its first row and column. supervision 0.31.2 reads
# it as VOC means it. Of the small object the two readings overlap by 0.84, so that a detector that is right by the one misses every
# AP from 0.85 on by the other.
#
# Input: a picture of 64×64 with an object in pixels 10 … 21 and 30 … 41 and one that fills it, 1 … 64 both ways.
# Seen: supervision 9, 29, 21, 41 and 0, 0, 64, 64; the three others 10, 30, 21, 41 and 1, 1, 64, 64.
# Expected before: the three as seen, supervision 9, 29, 20, 40 (both corners moved).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "supervision==0.31.2" "globox==2.9.0" "pylabel==0.1.55" "datumaro==1.13.12"
mkdir -p "$folder"/voc/{Annotations,JPEGImages,ImageSets/Main}
echo a > "$folder/voc/ImageSets/Main/train.txt"
cat > "$folder/voc/Annotations/a.xml" <<'XML'
<annotation>
  <folder>voc</folder>
  <filename>a.jpg</filename>
  <size><width>64</width><height>64</height><depth>3</depth></size>
  <segmented>0</segmented>
  <object>
    <name>cat</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
    <bndbox><xmin>10</xmin><ymin>30</ymin><xmax>21</xmax><ymax>41</ymax></bndbox>
  </object>
  <object>
    <name>dog</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>64</ymax></bndbox>
  </object>
</annotation>
XML
cd "$folder"
venv/bin/python -W ignore - 2>/dev/null <<'PY'
from importlib.metadata import version

import datumaro
import supervision
from globox import AnnotationSet
from PIL import Image
from pylabel import importer

Image.new("RGB", (64, 64)).save("voc/JPEGImages/a.jpg")
corners = [f"ann_bbox_{name}" for name in ("xmin", "ymin", "xmax", "ymax")]
supervised = supervision.DetectionDataset.from_pascal_voc("voc/JPEGImages", "voc/Annotations")
found = {
    "supervision": [box for each in supervised.annotations.values() for box in each.xyxy.tolist()],
    "globox": [[*box.ltrb] for each in AnnotationSet.from_pascal_voc("voc/Annotations") for box in each.boxes],
    "pylabel": importer.ImportVOC("voc/Annotations").df[corners].to_numpy().tolist(),
    "datumaro": [box.points for item in datumaro.Dataset.import_from("voc", "voc") for box in item.annotations],
}
for name, boxes in found.items():
    print(name, version(name), boxes)
assert found.pop("supervision") == [[9, 29, 21, 41], [0, 0, 64, 64]]
assert all(boxes == [[10, 30, 21, 41], [1, 1, 64, 64]] for boxes in found.values())
shared = (21 - 10) * (41 - 30) / ((21 - 9) * (41 - 29))
print(f"overlap of the small object's two readings: {shared:.2f}")
assert shared < 0.85
PY
