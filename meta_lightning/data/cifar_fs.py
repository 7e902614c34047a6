"""CIFAR-FS."""

import tempfile
from pathlib import Path

import numpy as np

from meta_lightning.checks import require
from meta_lightning.data.learn2learn_sets import PublishedSplits, SplitImages, decode, reading
from meta_lightning.data.tasks import SPLITS, Split


class CIFARFS(PublishedSplits):
    """CIFAR-FS: the 100 classes of CIFAR-100, 600 photographs each, 32×32 (Bertinetto et al., ICLR 2019).

    64 classes to train on, 16 to validate and 20 to test: the random split of the paper (Meta-learning with
    differentiable closed-form solvers), which comes with the images. Classes have their CIFAR-100 names.

    Files, in the folder ``cifarfs/cifar100``: ``data/<class>/*.png``, and ``splits/bertinetto/{train,val,test}.txt``
    with a class a line. The folder ``cifarfs/processed`` that learn2learn makes of them is neither needed nor read:
    when learn2learn is stopped at it, it is taken for whole.
    """

    image_size = 32
    channels = 3
    title = "CIFAR-FS"
    loader = "CIFARFS"
    files = (
        "cifarfs/cifar100/data",
        *(f"cifarfs/cifar100/splits/bertinetto/{split}.txt" for split in SPLITS),
    )
    origin = (
        "a folder cifarfs with the folder cifar100 that cifar100.zip from https://zenodo.org/record/7978538 unpacks to"
    )

    def read_split(self, split: Split) -> SplitImages:
        """Read the images of a split, through learn2learn."""
        raw = self.folder.resolve() / "cifarfs" / "cifar100"
        listing = raw / "splits" / "bertinetto" / f"{split}.txt"
        with reading(listing):
            names = sorted({line.strip() for line in listing.read_text().splitlines()} - {""})
        with tempfile.TemporaryDirectory() as links:
            # what learn2learn would have copied, into root, is only pointed at
            processed = Path(links) / "cifarfs" / "processed" / split
            processed.mkdir(parents=True)
            for name in names:
                folder = raw / "data" / name
                require(folder.is_dir(), f"{listing} must list folders of {raw / 'data'}, got {name}, which is none")
                (processed / name).symlink_to(folder, target_is_directory=True)
            with reading(raw / "data"):
                dataset = self.dataset(Path(links), split)
            images = decode(dataset, lambda row: Path(dataset.samples[row][0]).resolve())
        return SplitImages(images, np.array(dataset.targets), dataset.classes)
