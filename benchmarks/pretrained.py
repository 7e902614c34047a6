"""A ResNet-18 pretrained on the training classes of a data set, then frozen in front of a head that MAML meta-trains.

    python benchmarks/pretrained.py pretrain --root data --bf16     # writes resnet18.pt; the same command goes on
    python benchmarks/pretrained.py test --root data                # on the test classes, beside features by hand

``root`` holds files as mini-ImageNet's. Pretraining is plain classification of all training classes, equally many
images of each; not by ``Baseline``, which keeps no running statistics of batch norm.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.transforms import v2

from meta_lightning import LSLR, MAML, Backbone, MiniImagenet, Prototypes, TaskMean
from meta_lightning.data.tasks import FewShotTasks, Split, as_task_batch, scale_pixels
from meta_lightning.quiet import silence
from meta_lightning.runs.machine import keep_freed_memory

CLASSES_AT_ONCE, CROP, WARM_UP, EVERY = 32, 64, 100, 50  # of pretraining
AT_ONCE = 20  # tasks
AUGMENT = v2.Compose([v2.RandomResizedCrop(CROP, (0.3, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)])


def interval(values: Tensor) -> str:
    """Mean and half-width of the 95 % interval over tasks, in per cent."""
    mean = TaskMean()
    mean.update(values)
    return "{:.2f} ± {:.2f}".format(*(100 * value for value in mean.compute()[:2]))


def tasks_of(options: argparse.Namespace, split: Split, **sizes: int) -> FewShotTasks:
    """The tasks of a split."""
    return MiniImagenet(options.root, cache_dir=options.cache_dir, **sizes).task_set(split)


@torch.no_grad()
def tasks_by_hand(options: argparse.Namespace, plain: nn.Module, split: Split, shots: int) -> FewShotTasks:
    """The same tasks, with what the plain network makes of the pictures in their place."""
    tasks = copy.copy(tasks_of(options, split, shots=shots))
    rows = torch.from_numpy(np.concatenate(tasks.rows_by_class))
    features = torch.cat([plain(scale_pixels(part)) for part in tasks.images[rows].split(64)])
    tasks.images = features.new_zeros(len(tasks.images), features.shape[1]).index_copy(0, rows, features)
    return tasks


def centroid(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """The class of the nearest centroid.  # S D, S, R D -> R"""
    means = torch.stack([x[y == way].mean(0) for way in range(int(y.max()) + 1)])
    return torch.cdist(queries, means).argmin(1)


# --------------------------------------------------------------------------------------------------------- pretraining


def pretrain(options: argparse.Namespace) -> None:
    """Train a classifier of the training classes."""
    mini_batch = {"train_ways": CLASSES_AT_ONCE, "train_shots": 1, "train_queries": 1, "train_labels": "split"}
    data = MiniImagenet(options.root, cache_dir=options.cache_dir, **mini_batch)
    tasks = data.task_set("train")
    torch.manual_seed(0)
    network = resnet18(num_classes=options.classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), options.lr, 0.9, weight_decay=5e-4, nesterov=True)
    first, seconds, cpu, state = 0, 0.0, 0.0, Path(options.weights).with_suffix(".part")
    if state.exists():
        saved = torch.load(state)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds, cpu = saved["step"], saved["seconds"], saved["cpu"]
    start, cpu_start = time.perf_counter() - seconds, time.process_time() - cpu
    for step in range(first, options.steps):
        torch.manual_seed(step)
        support_x, support_y, query_x, query_y = as_task_batch(tasks.batch([step]))
        x, y = torch.cat([support_x, query_x], 1)[0], torch.cat([support_y, query_y], 1)[0]
        x = scale_pixels(torch.stack([AUGMENT(image) for image in x])).contiguous(memory_format=torch.channels_last)
        left = 0.5 + 0.5 * math.cos(math.pi * step / options.steps)
        optimizer.param_groups[0]["lr"] = options.lr * left * min(1, (step + 1) / WARM_UP)
        network.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            predictions = network(x)
        loss = F.cross_entropy(predictions.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0 or step + 1 == options.steps:
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            saved = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(saved | {"seconds": seconds, "cpu": cpu}, state)
            right = (predictions.argmax(1) == y).float().mean()
            print(
                f"step {step + 1}, {seconds / 60:.1f} min ({cpu / 60:.1f} of the processor): "
                f"loss {loss:.3f}, right {100 * right:.0f} % of the batch",
                flush=True,
            )
    torch.save(network.state_dict(), options.weights)
    network.fc = nn.Identity()
    tasks = tasks_by_hand(options, network.eval(), "val", shots=1)
    x, y, queries, labels = as_task_batch(tasks.batch(range(options.tasks)))
    right = (torch.stack([*map(centroid, x, y, queries)]) == labels).float().mean(1)
    print(f"nearest centroid, 5-way 1-shot, {options.tasks} val tasks: {interval(right)}")


# -------------------------------------------------------------------------------------------------------------- testing


def learner_of(options: argparse.Namespace, norm: bool) -> MAML:
    """MAML of a head in front of the frozen network, perhaps with meta-learnt weights of the normalised features."""
    network = Backbone("torchvision/resnet18", weights=options.weights, cache_dir=f"{options.weights}.features")
    if norm:
        network.head = nn.Sequential(nn.RMSNorm(network.head.in_features), network.head)
    return MAML(
        network,
        inner_lr=0.01 if norm else 0.1,
        inner_steps=5,
        test_inner_steps=20,
        inner_rule=LSLR(5),
        inner_freeze=["head.0.*"] if norm else [],
        head_start=Prototypes(0.01),
        outer_lr=0.01 if norm else 0.001,
    )


def meta_trained(options: argparse.Namespace, plain: nn.Module, shots: int, norm: bool) -> MAML:
    """Meta-train the head; print whether the frozen network stayed as it was and computes what the plain one does."""
    learner = learner_of(options, norm)
    data = MiniImagenet(options.root, cache_dir=options.cache_dir, shots=shots)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0}
    start = time.process_time()
    L.Trainer(max_steps=options.meta_steps, accelerator="cpu", **quiet).fit(learner, data)
    seconds = time.process_time() - start
    after = learner.network.body.state_dict()
    equal = all(torch.equal(value, after[name]) for name, value in plain.state_dict().items())
    x = scale_pixels(as_task_batch(data.task_set(options.split).batch([0])).query_x)
    with torch.no_grad():
        difference = (learner.task_network.ahead(x)[0] - plain(x[0])).abs().max()
    print(
        f"{shots}-shot, {'RMSNorm' if norm else 'plain'} head: {options.meta_steps} meta-iterations in {seconds:.0f} s "
        f"of the processor; weights and batch-norm statistics {'equal to' if equal else 'OTHER THAN'} the plain "
        f"network's, outputs of {x.shape[1]} pictures differ by {difference:.1e} at most",
        flush=True,
    )
    return learner


def logistic(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """The class by logistic regression.  # S D, S, R D -> R"""
    model = LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy())
    return torch.from_numpy(model.predict(queries.numpy()))


HAND = {
    "nearest centroid": centroid,
    "nearest centroid, unit length": lambda x, y, q: centroid(F.normalize(x), y, F.normalize(q)),
    "logistic regression": logistic,
    "logistic regression, unit length": lambda x, y, q: logistic(F.normalize(x), y, F.normalize(q)),
}


def test(options: argparse.Namespace) -> None:
    """Accuracy on tasks of unseen classes, of the learner and of features by hand."""
    plain = resnet18(num_classes=options.classes)
    plain.load_state_dict(torch.load(options.weights))
    plain.fc = nn.Identity()
    plain.eval()
    for shots in (1, 5):
        learners = {norm: meta_trained(options, plain, shots, norm) for norm in (True, False)}
        tasks = tasks_of(options, options.split, shots=shots)
        of_features = tasks_by_hand(options, plain, options.split, shots)
        right: dict[str, list[Tensor]] = {}
        for first in range(0, options.tasks, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, options.tasks))
            batch, (x, y, queries, labels) = (as_task_batch(t.batch(numbers)) for t in (tasks, of_features))
            answers = {}
            for norm, learner in learners.items():
                before, after = (part.argmax(-1) for part in learner.predict_tasks(batch))
                name = "Backbone and RMSNorm" if norm else "Backbone"
                answers |= {name: after, f"{name}, before inner steps": before}
            for name, classify in HAND.items():
                answers[f"by hand: {name}"] = torch.stack([*map(classify, x, y, queries)])
            for name, answer in answers.items():
                right.setdefault(name, []).append((answer == labels).float().mean(1))
        accuracy = {name: torch.cat(parts) for name, parts in right.items()}
        first_row = next(iter(accuracy.values()))
        print(f"5-way {shots}-shot, {options.tasks} {options.split} tasks, and the first row less this one, paired:")
        for name, values in accuracy.items():
            print(f"  {name}: {interval(values)}; {interval(first_row - values)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pretrain", "test"))
    parser.add_argument("--root", default="data")
    parser.add_argument("--cache_dir")
    parser.add_argument("--weights", default="resnet18.pt")
    parser.add_argument("--classes", type=int, default=64, help="training classes")
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining")
    parser.add_argument("--lr", type=float, default=0.05, help="of pretraining")
    parser.add_argument("--bf16", action="store_true", help="pretrain in bfloat16, for CPUs that multiply in it")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="settings were chosen on val")
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--meta_steps", type=int, default=200, help="meta-iterations of the head")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    silence()
    pretrain(options) if options.what == "pretrain" else test(options)
