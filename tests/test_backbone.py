"""Pretrained networks in front of a head."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meta_lightning import FOMAML, Backbone, Predictor, load_learner
from meta_lightning.adaptation.surgery import rebuildable
from meta_lightning.checks import InputError
from meta_lightning.cli import main
from meta_lightning.networks.backbone import without_weights

pytestmark = pytest.mark.filterwarnings("ignore:All of the backbone")


class Encoder(nn.Module):
    """A body of one's own, from pictures to 6 features."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4)
        self.second, self.pool = nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.second(self.norm(self.first(x)))).flatten(1)


def test_a_network_of_torchvision_without_its_classifier() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = Backbone("torchvision/resnet18", ways=3)
    torch.manual_seed(0)
    body = resnet18().eval()
    body.fc = nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.eval()(x), network.head(body(x)))
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert FOMAML(network).train()(x).equal(network(x))


def test_a_network_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="needs timm, the extra backbones")
    torch.manual_seed(0)
    network = Backbone("timm/resnet10t", ways=3, unfreeze=["layer4.*"]).eval()
    torch.manual_seed(0)
    body = timm.create_model("resnet10t", num_classes=0).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.body(x), body(x))
    assert [name for name, _ in network.body.named_children()] == [name for name, _ in body.named_children()]


@pytest.mark.parametrize("backbone", [f"{__name__}.Encoder", Encoder(1)])
def test_a_module_of_ones_own(backbone: Any) -> None:
    network = Backbone(backbone, ways=2)
    assert network.head.in_features == 6
    assert network.body is not backbone
    assert not any(p.requires_grad for p in network.body.parameters())


def test_features_may_be_given() -> None:
    assert Backbone(nn.Linear(3, 7), features=7).head.in_features == 7


def test_unfrozen_blocks_of_a_chain_and_of_another_module() -> None:
    chain = Backbone("torchvision/resnet18", unfreeze=["layer4.*"])
    trained = [name for name, p in chain.named_parameters() if p.requires_grad]
    assert all(name.startswith(("body.layer4.", "head.")) for name in trained)
    assert len(trained) == 17
    assert isinstance(chain.body, nn.Sequential)
    for kind in (Branching, Dropping):
        with pytest.warns(UserWarning, match=rf"backbone runs at every inner step .*second\.\*.* {kind.__name__}"):
            Backbone(kind(), unfreeze=["second.*"])


class Branching(Encoder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.second(2 * self.norm(self.first(x)))).flatten(1)


class Dropping(Encoder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_ones_own(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(5)
    model, path = resnet18(num_classes=7), tmp_path / f"weights.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(model.state_dict(), path)
    network = Backbone("torchvision/resnet18", weights=str(path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in network.body.state_dict().items())
    path.unlink()
    with without_weights():
        Backbone("torchvision/resnet18", weights=str(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "torchvision/resnet81"}, r"backbone must name .*torchvision/resnet81.*mean torchvision/resnet"),
        ({"backbone": "nowhere.Net"}, r"backbone must be .*nowhere\.Net"),
        ({"backbone": "torch.nn.Linear"}, r"backbone must be .*without required arguments, got 'torch.nn.Linear': .*"),
        ({"backbone": "torch.relu"}, r"backbone must be .*class path .*torch\.relu"),
        ({"backbone": "torchvision/squeezenet1_0"}, r"backbone must end with a linear classifier.*squeezenet"),
        ({"backbone": nn.Linear(3, 4)}, r"features must be given"),
        ({"backbone": Encoder(), "unfreeze": ["layer9.*"]}, r"unfreeze must match .*layer9"),
        ({"backbone": Encoder(), "ways": 0}, r"ways must be at least 1, got 0"),
        ({"backbone": Encoder(), "weights": "default"}, r"weights must be a path"),
        ({"backbone": Encoder(), "weights": "gone.pt"}, r"weights must be .*gone\.pt, which is not a file"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Backbone(**options)


def test_weights_that_do_not_fit_or_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(Encoder(1).state_dict(), path)
    with pytest.raises(InputError, match=r"weights must be of the backbone.*first\.weight: expected \(4, 3, 3, 3\)"):
        Backbone(Encoder(), weights=str(path))
    torch.save([1], path)
    with pytest.raises(InputError, match=r"weights must be .*something else"):
        Backbone(Encoder(), weights=str(path))
    for contents in (b"nothing", b"hi", b""):  # each another error of the unpickler
        for name in ("weights.pt", "weights.safetensors"):
            (tmp_path / name).write_bytes(contents)
            with pytest.raises(InputError, match=rf"weights must be .*{name}, which cannot be read: \w+: "):
                Backbone(Encoder(), weights=str(tmp_path / name))


def test_weights_that_are_not_there_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    words = (
        r"weights 'default' of torchvision/resnet18 .*OSError: Name or service not known; .*path of their state dict"
    )
    with pytest.raises(InputError, match=words):
        Backbone("torchvision/resnet18", weights="default")


NORM = partial(nn.LayerNorm, eps=1e-6)


class WithPartial(nn.Module):
    """A network with a default that no configuration can hold, as torchvision's vision transformer has."""

    def __init__(self, width: int = 4, norm: Callable[..., nn.Module] = NORM) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, width), norm(width), nn.Linear(width, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Path:
        main(["fit", "--config", str(Path(__file__).parent / "tiny.yaml"), *args])
        return Path("lightning_logs/version_0/checkpoints/last.ckpt")

    return run


def test_a_default_that_no_checkpoint_can_describe_is_the_classs_own(fit: Callable[..., Path]) -> None:
    path = fit(f"--model.network={__name__}.WithPartial", "--model.network.width=3")
    learner = load_learner(path)
    assert learner.network.layers[2].eps == 1e-6
    assert learner.network.layers[2].normalized_shape == (3,)


def test_what_no_checkpoint_can_describe_is_refused() -> None:
    with pytest.raises(InputError, match=r"network must have arguments that a checkpoint can describe.*many"):
        rebuildable({"class_path": "torch.nn.Linear", "init_args": {"in_features": "many", "out_features": 2}})


def test_a_backbone_on_the_command_line(fit: Callable[..., Path]) -> None:
    weights = Path("weights.pt")
    torch.save(Encoder(1).state_dict(), weights)
    body = ["--model.network.backbone.class_path", f"{__name__}.Encoder", "--model.network.backbone.channels", "1"]
    network = ["--model.network", "Backbone", *body, "--model.network.weights", str(weights)]
    path = fit(*network, "--model.network.unfreeze", "[second.*]")
    expected = torch.load(weights, weights_only=True)
    weights.unlink()  # the checkpoint has them
    learner = load_learner(path)
    assert torch.equal(learner.network.body.first.weight, expected["first.weight"])
    assert not torch.equal(learner.network.body.second.weight, expected["second.weight"])
    assert learner.network.body.norm.running_mean is not None
    main(["test", "--config", str(Path(__file__).parent / "tiny.yaml"), *network, f"--ckpt_path={path}"])
    x = torch.rand(10, 1, 28, 28)
    predictor = learner.adapt(x, torch.arange(5).repeat(2))
    predictor.save("a.safetensors")
    assert torch.equal(Predictor.load("a.safetensors")(x), predictor(x))
    predictor.save("delta.safetensors", delta=True)
    with pytest.raises(InputError, match=r"weights must be .*weights\.pt, which is not a file"):
        Predictor.load("delta.safetensors")
    assert torch.equal(Predictor.load("delta.safetensors", load_learner(path).network)(x), predictor(x))
    torch.save(expected, weights)
    assert torch.equal(Predictor.load("delta.safetensors")(x), predictor(x))


def test_paths_of_weights_in_the_home_folder_and_another_cache(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    torch.save(Encoder(1).state_dict(), Path("home/weights.pt"))
    body = ["--model.network.backbone.class_path", f"{__name__}.Encoder", "--model.network.backbone.channels", "1"]
    network = ["--model.network", "Backbone", *body, "--model.network.weights", "~/weights.pt"]
    first = fit(*network, "--model.network.cache_dir", "one")
    assert [*Path("one").glob("*.keys")]
    other = ["--model.network.cache_dir", "other", "--ckpt_path", "last", "--trainer.max_steps"]
    steps = torch.load(first, weights_only=True)["global_step"] + 1
    fit(*network, *other, str(steps))
    assert torch.load(first, weights_only=True)["global_step"] == steps
    assert [*Path("other").glob("*.keys")]
    first.rename(Path("home/first.ckpt"))
    started = Backbone(Encoder(1))
    FOMAML(started, init_from="~/first.ckpt")
    assert torch.equal(started.head.weight, load_learner("~/first.ckpt").network.head.weight)
