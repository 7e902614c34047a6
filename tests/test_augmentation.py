import torch

from meta_lightning.data.augmentation import FlipCropJitter


def test_each_image_is_flipped_cropped_and_jittered_by_itself() -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 12, 12)
    batch = image.expand(64, -1, -1, -1)
    flipped = FlipCropJitter(padding=0, jitter=0)(batch)
    same = [torch.equal(x, image) for x in flipped]
    mirrored = [torch.equal(x, image.flip(-1)) for x in flipped]
    assert sum(same) + sum(mirrored) == 64
    assert min(sum(same), sum(mirrored)) > 15

    cropped = FlipCropJitter(padding=2, jitter=0, flip=0)(batch)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    windows = [padded[:, top : top + 12, left : left + 12] for top in range(5) for left in range(5)]
    found = [next(i for i, window in enumerate(windows) if torch.allclose(x, window, atol=1e-5)) for x in cropped]
    assert len(set(found)) > 10

    jittered = FlipCropJitter(padding=0, flip=0)(batch)
    assert 0 <= jittered.min() <= jittered.max() <= 1
    assert len({round(x.mean().item(), 4) for x in jittered}) > 50
