"""Methods in other people's training loops: timm's tasks and the Hugging Face Trainer."""

import numpy as np
import torch.utils.data

LABELS = ("labels", "label", "label_ids")


class Indexed(torch.utils.data.Dataset):
    """A training set whose targets are pairs (label, index), so that a loop that knows nothing of samples carries their ids.

    The samples of `dataset` are pairs (image, label), as timm's, or mappings with the label under `labels` or `label`, as
    the HF Trainer's; collated, the targets are int64 [B, 2].
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index: int):
        sample = self.dataset[index]
        if isinstance(sample, tuple):
            return sample[0], np.array([int(sample[1]), index])
        key = next(name for name in LABELS if name in sample)
        rest = {name: value for name, value in sample.items() if name != key}
        return rest | {"labels": np.array([int(sample[key]), index])}

    # timm's create_loader hands a data set its transform.
    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform):
        self.dataset.transform = transform
