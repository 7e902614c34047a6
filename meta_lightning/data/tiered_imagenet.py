"""tiered-ImageNet."""

import pickle

import numpy as np

from meta_lightning.checks import InputError
from meta_lightning.data.learn2learn_sets import PublishedSplits, SplitImages, decode, reading
from meta_lightning.data.tasks import SPLITS, Split


class TieredImagenet(PublishedSplits):
    """tiered-ImageNet: 608 classes of ImageNet, 779,165 photographs, 84×84 (Ren et al., ICLR 2018).

    351 classes for training, 97 for validation and 160 for test, from 20, 6 and 8 of the 34 categories of the ImageNet
    hierarchy: no category is in two splits. This is the split of the paper (Meta-Learning for Semi-Supervised Few-Shot
    Classification, and ``tiered_imagenet_split`` of https://github.com/renmengye/few-shot-ssl-public), with its names
    of the classes.

    Files, in the folder ``tiered-imagenet``: ``{train,val,test}_images_png.pkl``, each a pickled list of PNG files, and
    ``{train,val,test}_labels.pkl``, each a pickle of ``{"label_specific": [number, …], "label_specific_str": [name,
    …]}``. A pickle can run code when it is read: use only files that you trust. The decoded images take 16.5 GB on
    disk; packing the cache takes memory for the files of one split and some minutes, once.
    """

    image_size = 84
    title = "tiered-ImageNet"
    loader = "TieredImagenet"
    files = tuple(f"tiered-imagenet/{split}_{part}.pkl" for split in SPLITS for part in ("images_png", "labels"))
    origin = "a folder tiered-imagenet with these files: tiered-imagenet-* from https://zenodo.org/record/7978538"

    def read_split(self, split: Split) -> SplitImages:
        """Read the two pickles of a split, the images through learn2learn."""
        path = self.folder / "tiered-imagenet" / f"{split}_images_png.pkl"
        labels_path = path.with_name(f"{split}_labels.pkl")
        with reading(labels_path), labels_path.open("rb") as file:
            described = pickle.load(file)  # learn2learn drops the names
            labels, names = np.asarray(described["label_specific"]), [str(n) for n in described["label_specific_str"]]
        with reading(path):
            dataset = self.dataset(self.folder, split)
        numbers = np.unique(labels).tolist()
        if len(dataset.images) != len(labels) or not set(numbers) <= set(range(len(names))):
            expected = f"the {len(dataset.images)} images of {path.name} by its {len(names)} classes from 0"
            came = f"{len(labels)} numbers from {min(numbers, default=0)} to {max(numbers, default=0)}"
            raise InputError(f"{labels_path} must number {expected}, got {came}")
        images = decode(self.image_size, len(labels), lambda row: dataset[row][0], lambda row: f"image {row} of {path}")
        return images, labels.astype(np.int64), names
