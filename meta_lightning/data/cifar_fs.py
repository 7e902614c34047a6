"""CIFAR-FS."""

import numpy as np
from PIL import Image

from meta_lightning.data.learn2learn_sets import PublishedSplits, SplitImages, decode, reading
from meta_lightning.data.tasks import SPLITS, Split


class CIFARFS(PublishedSplits):
    """CIFAR-FS: the 100 classes of CIFAR-100, 600 photographs each, 32×32 (Bertinetto et al., ICLR 2019).

    64 classes for training, 16 for validation and 20 for test: the random split of the paper (Meta-learning with
    differentiable closed-form solvers), which comes with the images. Classes have their CIFAR-100 names.

    Files, in the folder ``cifarfs/cifar100``: ``data/<class>/*.png``, and ``splits/bertinetto/{train,val,test}.txt``
    with one class per line. learn2learn's folder ``cifarfs/processed`` is neither needed nor read: if learn2learn is
    interrupted while it copies images there, it takes the folder for complete.
    """

    image_size = 32
    title = "CIFAR-FS"
    loader = "CIFARFS"
    files = ("cifarfs/cifar100/data", *(f"cifarfs/cifar100/splits/bertinetto/{split}.txt" for split in SPLITS))
    origin = "a folder cifarfs with the folder cifar100 of cifar100.zip from https://zenodo.org/record/7978538"

    def read_split(self, split: Split) -> SplitImages:
        """Read the images of a split."""
        data = self.folder / "cifarfs" / "cifar100" / "data"
        listing = data.parent / "splits" / "bertinetto" / f"{split}.txt"
        with reading(f"the classes of {listing} in {data}"):
            names = sorted({line.strip() for line in listing.read_text().splitlines()} - {""})
            by_class = [sorted((data / name).glob("*.png")) for name in names]
            if empty := [name for name, paths in zip(names, by_class, strict=True) if not paths]:
                raise FileNotFoundError(f"no images of {', '.join(empty)}")
        paths = [path for of_class in by_class for path in of_class]
        images = decode(self.image_size, len(paths), lambda row: Image.open(paths[row]), lambda row: paths[row])
        return images, np.repeat(np.arange(len(names)), [*map(len, by_class)]), names
