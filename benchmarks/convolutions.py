"""Ways to convolve with weights a task, forward and backward: the table behind `task_parallel.py`'s choice.

    python benchmarks/convolutions.py [--device cuda] [--threads 1]

Milliseconds (CPU time on a CPU, where other work then counts little), the least of five; the gradient by the
input is left out for the layers that see images. Floor: the multiplications at --gflops.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LAYERS = [  # tasks, images, channels in and out, size, stride
    (8, 5, 1, 64, 28, 2),
    (8, 75, 1, 64, 28, 2),
    (8, 5, 64, 64, 14, 2),
    (8, 75, 64, 64, 14, 2),
    (8, 5, 64, 64, 7, 2),
    (8, 75, 64, 64, 7, 2),
    (8, 5, 64, 64, 4, 2),
    (2, 25, 3, 32, 84, 1),
    (2, 25, 32, 32, 42, 1),
    (2, 25, 32, 32, 21, 1),
]


def grouped(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """One convolution in groups, S T*C H W."""
    T, S, C, H, W = x.shape
    return F.conv2d(x.transpose(0, 1).reshape(S, T * C, H, W), w.flatten(0, 1), stride=stride, padding=1, groups=T)


def grouped_channels_last(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """The same, the maps channels last."""
    T, S, C, H, W = x.shape
    folded = x.permute(1, 3, 4, 0, 2).reshape(S, H, W, T * C).permute(0, 3, 1, 2)
    return F.conv2d(folded, w.flatten(0, 1), stride=stride, padding=1, groups=T)


def loop(x: Tensor, w: Tensor, stride: int) -> list[Tensor]:
    """One task after another."""
    return [F.conv2d(images, weight, stride=stride, padding=1) for images, weight in zip(x, w, strict=True)]


def im2col(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """Patches by batched matrix products."""
    T, S = x.shape[:2]
    patches = F.unfold(x.flatten(0, 1), 3, padding=1, stride=stride).unflatten(0, (T, S))  # T S C*9 L
    return w.flatten(2).unsqueeze(1) @ patches


def milliseconds(run: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = []
    for _ in range(6):
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((clock() - start) * 1e3)
    return min(times[1:])


def main(device: str, gflops: float) -> None:
    ways = [grouped, grouped_channels_last, loop, im2col]
    print(f"| layer | {' | '.join(way.__name__.replace('_', ' ') for way in ways)} | floor |")
    print(f"|---|{'---|' * len(ways)}---|")
    for tasks, images, inputs, outputs, size, stride in LAYERS:
        x = torch.rand(tasks, images, inputs, size, size, device=device, requires_grad=inputs > 3)
        w = torch.rand(tasks, outputs, inputs, 3, 3, device=device, requires_grad=True)
        cells = []
        for way in ways:
            with torch.no_grad():
                forward = milliseconds(lambda: way(x, w, stride), device)  # noqa: B023
            y = way(x, w, stride)
            grads = [torch.rand_like(part) for part in y] if isinstance(y, list) else torch.rand_like(y)
            inputs_of = [x, w] if inputs > 3 else [w]
            backward = milliseconds(
                lambda: torch.autograd.grad(y, inputs_of, grads, retain_graph=True),  # noqa: B023
                device,
            )
            cells.append(f"{forward:.2f} / {backward:.2f}")
        floor = 2e-6 * tasks * images * outputs * inputs * 9 * ((size - 1) // stride + 1) ** 2 / gflops
        name = f"{tasks} × {images}, {inputs}→{outputs}, {size}×{size}, stride {stride}"
        print(f"| {name} | {' | '.join(cells)} | {floor:.2f} / {floor * (2 if inputs > 3 else 1):.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gflops", type=float, default=87, help="the machine's, for the threads given")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.device, arguments.gflops)
