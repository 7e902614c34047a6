"""FC100."""

import numpy as np

from meta_lightning.data.learn2learn_sets import PublishedSplits, SplitImages, reading
from meta_lightning.data.tasks import SPLITS, Split


class FC100(PublishedSplits):
    """FC100: the 100 classes of CIFAR-100, 600 photographs each, 32×32 (Oreshkin et al., NeurIPS 2018).

    60 classes for training, 20 for validation and 20 for test, from 12, 4 and 4 of the 20 superclasses of CIFAR-100: no
    superclass is in two splits. This is the split of the paper (TADAM, supplementary material), in the files of
    MetaOptNet (Lee et al., 2019) as learn2learn distributes them. They number the classes over all splits, without
    names: a class is named by its number.

    Files: ``FC100_{train,val,test}.pickle``, each a pickle of ``{"data": uint8 [images, 32, 32, 3], "labels": [number,
    …]}``. A pickle can run code when it is read: use only files that you trust.
    """

    image_size = 32
    title = "FC100"
    loader = "FC100"
    files = tuple(f"FC100_{split}.pickle" for split in SPLITS)
    origin = "the files of fc100.zip from https://zenodo.org/record/7978538"

    def read_split(self, split: Split) -> SplitImages:
        """Read one pickle, through learn2learn."""
        path = self.folder / f"FC100_{split}.pickle"
        with reading(path):
            dataset = self.dataset(self.folder, split)
            images = np.asarray(dataset.images)
            numbers, labels = np.unique(dataset.labels, return_inverse=True)
        return images, labels.astype(np.int64), [str(n) for n in numbers]
