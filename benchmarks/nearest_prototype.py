"""Raw-pixel nearest prototype on the test tasks of a data module: the floor that a learner has to leave behind.

    python benchmarks/nearest_prototype.py --data Omniglot --data.root data --data.shots 5

A class's prototype is the mean of its support images; a query belongs to the nearest in Euclidean distance.
"""

import torch
from jsonargparse import ArgumentParser

from meta_lightning import TaskDataModule, TaskMean
from meta_lightning.data.tasks import as_task_batch

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_subclass_arguments(TaskDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args()).data
    accuracy = TaskMean()
    for batch in data.test_dataloader():
        support_x, support_y, query_x, query_y = as_task_batch(batch)
        for x, y, queries, labels in zip(support_x.flatten(2), support_y, query_x.flatten(2), query_y, strict=True):
            prototypes = torch.stack([x[y == way].mean(0) for way in range(data.ways)])
            accuracy.update((torch.cdist(queries, prototypes).argmin(1) == labels).float().mean()[None])
    mean, ci95, tasks = accuracy.compute()
    print(f"raw-pixel nearest prototype: {100 * mean:.2f} ± {100 * ci95:.2f} % over {int(tasks)} tasks")
