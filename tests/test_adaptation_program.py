"""Exported adaptation: equal to ``adapt`` in a process without the package, for other sizes too, or refused by name."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from conftest import fails
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from meta_lightning import (
    FOMAML,
    LSLR,
    MAML,
    MLP,
    Adam,
    Conv4,
    InnerRule,
    MetaLearner,
    MetaSGD,
    OneVector,
    ProtoNet,
    Prototypes,
    Reptile,
    ResNet12,
    TaskLoss,
    TaskPredictor,
    ZeroRows,
    load_learner,
)
from meta_lightning.checks import InputError
from meta_lightning.cli import main
from meta_lightning.inner.compiling import ReadingNoValues, UnrecordableError

Task = tuple[Any, Any, Any]
WAYS, FEATURES = 3, 4
# runs a program on tasks where the package cannot be imported
FRESH = """
import sys
sys.modules["meta_lightning"] = None
import torch
adapt = torch.export.load(sys.argv[1]).module()
torch.save([adapt(*task) for task in torch.load(sys.argv[2])], sys.argv[3])
assert not [name for name in sys.modules if name.startswith(("meta_lightning.", "lightning"))]
"""


def vectors(shots: int, queries: int) -> Task:
    return torch.randn(WAYS * shots, FEATURES), torch.arange(WAYS).repeat(shots), torch.randn(queries, FEATURES)


def curves(shots: int, queries: int) -> Task:
    x = 10 * torch.rand(3 * shots, 1) - 5
    return x, x.sin(), 10 * torch.rand(queries, 1) - 5


def words(shots: int, queries: int) -> Task:
    _, y, _ = vectors(shots, 1)
    return torch.randint(20, (len(y), 6)), y, torch.randint(20, (queries, 6))


def sequences(shots: int, queries: int) -> Task:
    _, y, _ = vectors(shots, 1)
    return torch.randn(len(y), 6, FEATURES), y, torch.randn(queries, 6, FEATURES)


def nests(shots: int, queries: int) -> Task:
    x, y, query_x = vectors(shots, queries)
    support, query = ({"a": part, "b": part[:, :1].exp()} for part in (x, query_x))
    return support, y, query


def images(shots: int, queries: int, ways: int = 5, channels: int = 1, size: int = 28) -> Task:
    shape = channels, size, size
    return torch.rand(ways * shots, *shape), torch.arange(ways).repeat(shots), torch.rand(queries, *shape)


def colours(shots: int, queries: int) -> Task:
    x, y, query_x = images(shots, queries, channels=3, size=32)
    return x.double(), y, query_x.double()


class Body(nn.Module):
    """A layer, a head, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module = nn.Tanh()) -> None:  # noqa: B008
        super().__init__()
        self.body, self.head, self.between = nn.Linear(FEATURES, 8), nn.Linear(8, WAYS), between

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.body(x)))
        return logits


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class OfKeywords(Body):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a) * b


class OfDict(Body):
    def forward(self, x: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x["a"]) * x["b"]


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6, padding_idx=0), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(x).mean(1))
        return logits


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True)  # with dropout, off in evaluation
        self.head = nn.Linear(FEATURES, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x).mean(1))
        return logits


class Slope(TaskLoss):
    """A loss with derivatives with respect to the samples."""

    def forward(self, network: TaskPredictor, x: Tensor, y: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: network(x).sum())(x)
        return F.mse_loss(network(x), y) + 0.1 * (slope - x.cos()).square().mean()


def maml(network: nn.Module, **options: Any) -> MetaLearner:
    return MAML(network, inner_lr=0.1, inner_steps=2, **options)


def normalised() -> nn.Module:
    return Body(nn.Sequential(nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.ReLU()))


# what docs/how_to/deployment.md says of each, and the learner and its tasks
ANY, QUERIES, FIXED = "any sizes", "any number of queries", "the sizes of the example"
KINDS: dict[str, tuple[str, Callable[[], MetaLearner], Callable[[int, int], Task]]] = {
    "`MLP`, classes": (ANY, lambda: FOMAML(MLP(FEATURES, [8], WAYS), inner_lr=0.1, inner_steps=2), vectors),
    "`MLP`, regression": (ANY, lambda: MAML(MLP(hidden=[8]), inner_steps=2), curves),
    "a frozen body": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), inner_freeze=["features.*"]), vectors),
    "`MetaSGD`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), inner_rule=MetaSGD()), vectors),
    "`LSLR`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), inner_rule=LSLR(1)), vectors),
    "Reptile with `Adam`": (
        ANY,
        lambda: Reptile(MLP(FEATURES, [8], WAYS), inner_rule=Adam(), inner_lr=0.01, test_inner_steps=3),
        vectors,
    ),
    "`ProtoNet`": (ANY, lambda: ProtoNet(MLP(FEATURES, [8], 2)), vectors),
    "`Prototypes`, more classes than outputs": (
        ANY,
        lambda: maml(MLP(FEATURES, [8], 2), head_start=Prototypes()),
        vectors,
    ),
    "`ZeroRows`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), head_start=ZeroRows()), vectors),
    "`OneVector`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), head_start=OneVector()), vectors),
    "batch, group and layer norm": (ANY, lambda: maml(normalised()), vectors),
    "a dict as keywords": (ANY, lambda: maml(OfKeywords()), nests),
    "a dict as one argument": (ANY, lambda: maml(OfDict()), nests),
    "an embedding": (ANY, lambda: maml(Embedding()), words),
    "a `TaskLoss` with derivatives by the samples": (
        ANY,
        lambda: maml(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), loss=Slope()),
        curves,
    ),
    "Reptile with `test_inner_batch_size`": (
        QUERIES,
        lambda: Reptile(MLP(FEATURES, [8], WAYS), test_inner_batch_size=4, test_inner_steps=3),
        vectors,
    ),
    "a forward that asks for `x.shape[0]`": (
        FIXED,
        lambda: maml(Body(lambda x: x * (2 if x.shape[0] > 1000 else 1))),
        vectors,
    ),
    "a forward that asks for `len(x)`": (FIXED, lambda: maml(Body(lambda x: x * (2 if len(x) > 1000 else 1))), vectors),
    "a forward that takes one number of samples": (FIXED, lambda: maml(Body(lambda x: x + torch.zeros(9, 1))), vectors),
    "a tensor that is an attribute, no buffer": (FIXED, lambda: maml(Body(Scaled())), vectors),
    '`Conv4`, `downsample="stride"`': (ANY, lambda: MAML(Conv4(filters=8), inner_lr=0.1), images),
    '`Conv4`, `downsample="max_pool"`': (
        ANY,
        lambda: Reptile(Conv4(filters=8, downsample="max_pool"), inner_rule=Adam(), inner_lr=0.002, inner_steps=5),
        images,
    ),
    "`ProtoNet` of `Conv4`": (ANY, lambda: ProtoNet(Conv4(filters=8)), images),
    # batch norm of many layers amplifies the rounding of float32 to 6e-4
    "`ResNet12`": (ANY, lambda: MAML(ResNet12(filters=[4, 4, 8, 8]).double(), inner_steps=1), colours),
    "a transformer": (ANY, lambda: maml(Attention()), sequences),
}


def run_fresh(path: str, tasks: list[Task]) -> list[Any]:
    """What a program answers in a process in which the package cannot be imported."""
    torch.save(tasks, "tasks.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, path, "tasks.pt", "answers.pt"], check=True)
    answers: list[Any] = torch.load("answers.pt")
    return answers


def check_kind(serves: str, make: Callable[[], MetaLearner], task: Callable[[int, int], Task]) -> None:
    torch.manual_seed(0)
    learner, example = make(), task(3, 15)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    made = learner.export_adaptation("adapt.pt2", *example[:2])
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    S = len(example[1])
    assert (made["support_samples"], made["query_samples"]) == {
        ANY: ("any", "any"),
        QUERIES: (S, "any"),
        FIXED: (S, S),
    }[serves]
    assert (made["fixed_since"] is None) == (serves == ANY)
    shots, queries = (3, 1, 7) if serves == ANY else (3, 3, 3), (S, S, S) if serves == FIXED else (15, 1, 40)
    tasks = [task(*counts) for counts in zip(shots, queries, strict=True)]
    for (x, y, query_x), answer in zip(tasks, run_fresh("adapt.pt2", tasks), strict=True):
        expected = learner.adapt(x, y)(query_x)
        assert answer.shape == expected.shape
        assert answer.dtype == expected.dtype
        assert (answer - expected).abs().max() < (1e-9 if answer.dtype == torch.float64 else 1e-5)


QUICK = {"`MLP`, regression", "`Prototypes`, more classes than outputs"}


@pytest.mark.filterwarnings("ignore:The program takes")
@pytest.mark.filterwarnings("ignore:The network takes no other number")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in KINDS]
)
def test_what_is_exported_is_adapt_without_the_package(kind: str) -> None:
    check_kind(*KINDS[kind])


class Clipped(InnerRule):
    """A rule that reads the norm of the gradient."""

    def update(self, grads: dict[str, Tensor], state: Any, own: dict[str, Tensor], lr: float) -> tuple[Any, Any]:
        norm = sum(g.square().sum().item() for g in grads.values()) ** 0.5
        return {name: -lr * g / max(norm, 1) for name, g in grads.items()}, state


class Counting(Body):
    """A network that changes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


REFUSED: dict[str, tuple[Callable[[], MetaLearner], str]] = {
    "dropout that is active in evaluation": (
        lambda: maml(Body(lambda x: F.dropout(x, 0.5, training=True))),
        r"must not draw random numbers.*dropout.*of torch",
    ),
    "an inner rule that reads values": (lambda: maml(Body(), inner_rule=Clipped()), r"reads values of a tensor"),
    "a network that reads values": (
        lambda: maml(Body(lambda x: x if x.sum() > 0 else -x)),
        r"reads values of a tensor",
    ),
    "a network that changes itself in forward": (lambda: maml(Counting()), r"must be of a network.*changes calls"),
    "learnt rows for fewer classes than the task has": (
        lambda: maml(MLP(FEATURES, [8], 2)),
        r"y of the support set must hold no more classes than the network has outputs.*got 3",
    ),
}


@pytest.mark.filterwarnings("ignore:.*adaptations to groups", "ignore:Tasks run one after another")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(kind: str) -> None:
    make, sentence = REFUSED[kind]
    with pytest.raises(InputError, match=sentence):
        make().export_adaptation("adapt.pt2", *vectors(3, 1)[:2])
    assert not list(Path().iterdir())


def test_bad_input_is_refused_in_a_sentence() -> None:
    x, y, _ = vectors(3, 1)
    learner = maml(MLP(FEATURES, [8], WAYS))
    with pytest.raises(InputError, match=r"suffix of path .*'\.pt2'.*'\.onnx'"):
        learner.export_adaptation("adapt.onnx", x, y)
    with pytest.raises(InputError, match=r"in_features 4.*\(5,\)"):
        learner.export_adaptation("adapt.pt2", torch.randn(9, 5), y)
    with pytest.raises(InputError, match=r"same length, got 9 and 8"):
        learner.export_adaptation("adapt.pt2", x, y[:8])
    with pytest.raises(InputError, match=r"steps must be at least 1, got 0"):
        learner.export_adaptation("adapt.pt2", x, y, steps=0)
    with pytest.raises(InputError, match=r"lazy parameters.*weight"):
        maml(nn.LazyLinear(WAYS)).export_adaptation("adapt.pt2", x, y)
    Path("adapt.pt2").write_text("mine")
    with pytest.raises(InputError, match=r"path .*overwrite.*adapt\.pt2"):
        learner.export_adaptation("adapt.pt2", x, y)
    assert Path("adapt.pt2").read_text() == "mine"


def test_images_of_another_shape_than_in_training_are_refused(checkpoint: str) -> None:
    with pytest.raises(InputError, match=r"\[S, 1, 28, 28\], as in training, got \[10, 1, 14, 14\]"):
        load_learner(checkpoint).export_adaptation("adapt.pt2", torch.rand(10, 1, 14, 14), torch.arange(5).repeat(2))


def test_an_index_by_numbers_reads_no_values() -> None:
    x = torch.arange(6.0).view(2, 3)
    with ReadingNoValues():
        by_numbers = x[:, torch.tensor([2, 0])]
        with pytest.raises(UnrecordableError, match="reads values"):
            x[x > 1]
    assert by_numbers.tolist() == [[2.0, 0.0], [5.0, 3.0]]


@pytest.mark.slow
def test_the_command_line_exports_a_checkpoint(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = (255 * torch.rand(6, 28, 28)).to(torch.uint8).numpy()
    for number, picture in enumerate(pictures):
        folder = Path("photos", f"class{number % 2}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    given = ["export", "--ckpt_path", checkpoint, "--support", "photos", "--steps", "1", "--out"]
    assert "suffix of out" in fails(*given, "adapt.onnx")
    main([*given, "adapt.pt2"])
    said = capsys.readouterr().out
    assert "to 2 classes, of any number of support pictures and any number of queries" in said
    files = {"description": ""}
    program = torch.export.load("adapt.pt2", extra_files=files).module()
    made = json.loads(files["description"])
    assert (made["classes"], made["outputs"], made["pixels"], made["inner_steps"]) == (2, "logits", True, 1)
    assert made["inputs"]["support_x"] == {"shape": [None, 1, 28, 28], "dtype": "float32"}
    learner = load_learner(checkpoint)
    x = torch.from_numpy(np.stack([learner.form.ink_on_ground(picture[None]) for picture in pictures]))
    y = torch.tensor([0, 1]).repeat(3)
    expected = learner.adapt(x, y, steps=1)(x)
    assert (program(x / 255, y, x / 255) - expected).abs().max() < 1e-5
    assert "overwrite" in fails(*given, "adapt.pt2")


# -------------------------------------------------------------------------------------------- docs/how_to/deployment.md

PAGE = (Path(__file__).parents[1] / "docs" / "how_to" / "deployment.md").read_text()


def test_the_table_of_the_page_is_what_is_tested() -> None:
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE))
    del rows["network, rule or loss"]
    assert rows == {kind: serves for kind, (serves, *_) in KINDS.items()} | dict.fromkeys(REFUSED, "refused")


def post(port: int, contents: dict[str, Any]) -> Tensor:
    data = json.dumps({name: part.tolist() for name, part in contents.items()}).encode()
    with urlopen(Request(f"http://127.0.0.1:{port}", data), timeout=60) as answer:
        return torch.tensor(json.load(answer))


@contextmanager
def service(path: str) -> Iterator[int]:
    """The page's service in a process in which the package cannot be imported; yields its port."""
    _, block = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    Path("service.py").write_text('import sys\nsys.modules["meta_lightning"] = None\n' + block)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "service.py", path, str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None
            with suppress(URLError), urlopen(f"http://127.0.0.1:{port}", timeout=60):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def test_the_service_of_the_page_answers_as_adapt_does() -> None:
    torch.manual_seed(0)
    learner, (x, y, query_x) = MAML(MLP(hidden=[8]), inner_steps=1), curves(2, 4)
    learner.export_adaptation("adaptation.pt2", x, y)
    predictor = learner.adapt(x, y)
    predictor.save("adapted.pt2")
    with service("adapted.pt2") as port:
        assert (post(port, {"query_x": query_x}) - predictor(query_x)).abs().max() < 1e-5
    with service("adaptation.pt2") as port:
        for shots in (2, 5):
            x, y, query_x = curves(shots, 4 + shots)
            sent = {"support_x": x, "support_y": y, "query_x": query_x}
            assert (post(port, sent) - learner.adapt(x, y)(query_x)).abs().max() < 1e-5
        with urlopen(f"http://127.0.0.1:{port}", timeout=60) as answer:
            assert json.load(answer)["outputs"] == "values"


@pytest.mark.slow
def test_the_export_of_the_page_works() -> None:
    code, _ = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code, "deployment.md", "exec"), {})
    x, y, query_x = images(3, 20)
    answers = run_fresh("adaptation.pt2", [(x, y, query_x)])
    assert (answers[0] - load_learner("hub:maml").adapt(x, y)(query_x)).abs().max() < 1e-5
