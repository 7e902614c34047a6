"""mini-ImageNet."""

import numpy as np

from meta_lightning.checks import InputError
from meta_lightning.data.learn2learn_sets import PublishedSplits, SplitImages, reading
from meta_lightning.data.tasks import Split


class MiniImagenet(PublishedSplits):
    """mini-ImageNet: 100 classes of ImageNet, 600 photographs each, 84×84 (Vinyals et al., 2016).

    64 classes for training, 16 for validation and 20 for test: the split of Ravi and Larochelle (Optimization as a
    Model for Few-Shot Learning, ICLR 2017), as learn2learn distributes it. Classes are named by their WordNet IDs.

    Files: ``mini-imagenet-cache-{train,validation,test}.pkl``, each a pickle of ``{"image_data": uint8 [images, 84, 84,
    3], "class_dict": {name: [row, …]}}``. A pickle can run code when it is read: use only files that you trust.
    learn2learn also holds a split as float32: packing the cache takes 5 GB of memory, once.
    """

    image_size = 84
    title = "mini-ImageNet"
    loader = "MiniImagenet"
    files = tuple(f"mini-imagenet-cache-{mode}.pkl" for mode in ("train", "validation", "test"))
    origin = "the files of these names from https://zenodo.org/record/7978538"

    def read_split(self, split: Split) -> SplitImages:
        """Read one pickle, through learn2learn."""
        path = self.folder / f"mini-imagenet-cache-{'validation' if split == 'val' else split}.pkl"
        with reading(path):
            dataset = self.dataset(self.folder, split)
            images, members = dataset.data["image_data"], dataset.data["class_dict"]
            rows = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in members.values()])
        # learn2learn labels an image that no class lists as class 1, and one in two classes as the last of them
        if not np.array_equal(np.sort(rows), np.arange(len(images))):
            came = f"{len(rows)} rows, {len(np.unique(rows))} of them different, for {len(images)} images"
            raise InputError(f"class_dict of {path} must list every image once, got {came}")
        return images, dataset.y.astype(np.int64), [str(name) for name in members]
