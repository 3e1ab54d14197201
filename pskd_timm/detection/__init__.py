"""Detection: a trained network as the backbone of Faster R-CNN, on Pascal VOC and data sets like it."""
