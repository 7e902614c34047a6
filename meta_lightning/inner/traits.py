"""What decides how a network runs for several tasks, found by running it once."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from meta_lightning.checks import InputError, require
from meta_lightning.inner.copies import copied, with_parameters
from meta_lightning.inner.exact import EXACT, Exact, differentiable_attention
from meta_lightning.inner.params import Params, tree_leaves, tree_map
from meta_lightning.inner.samples import (
    Output,
    Padded,
    Samples,
    as_floats,
    by_keywords,
    call,
    structure_of,
    valid,
)
from meta_lightning.inner.state import (
    RTOL,
    Contents,
    adopt,
    apart,
    changes,
    contents,
    greatest,
    has_backward_hooks,
    listed,
    members,
    put_back,
    set_values,
    taken_back,
)
from meta_lightning.inner.task_loss import TaskLoss, TaskPredictor
from meta_lightning.random_states import drew_from, kept_random_states, random_states, set_random_states

MISSING = object()
# whose derivatives have a wrong rule for vmap
NORMALISATIONS = {
    *(F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm, torch.batch_norm, torch.instance_norm),
    *(torch.layer_norm, torch.group_norm),
}


class Calls(TorchFunctionMode):
    """Notes the functions of torch that are called from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call."""
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


class Traits(NamedTuple):
    """What decides how a network runs for several tasks."""

    aliases: dict[str, str]  # further names of tied parameters
    recurrent: bool
    looped: str = ""  # why vmap would be wrong; empty if it is right
    in_turn: str = ""  # why a task must take all its steps before the next one starts; empty if it need not
    left: tuple[tuple[str, str], ...] = ()  # modules and attributes: activations that a forward leaves there
    recomputes: bool = False  # backward runs parts of the forward again
    replaced: bool = False  # forward calls functions that EXACT replaces
    size: int = 0  # the only number of samples that the network takes; 0 if it takes any
    outputs: int = 0  # per sample, if these are a vector
    last: str = ""  # the layer with parameters that runs last
    keywords: bool = False  # samples are a dict, whose entries forward takes as keywords
    floats: bool = False  # integers are features, which the network takes as floating point
    output: Output | None = None  # makes predictions of what the network returns
    mixes: bool = False  # samples of a task affect each other, and tasks are padded

    @classmethod
    def of(
        cls,
        network: nn.Module,
        loss: Any,
        x: Samples,
        y: Samples | None,
        ways: int = 0,
        computed: bool = False,
        keywords: bool | None = None,
        output: Output | None = None,
        seen: Samples = None,
    ) -> "Traits":
        """Those of a network and, if targets are given, a loss, from copies that run on one task.  # S ..., S ...

        ``ways`` is the number of classes of the tasks, if they have class numbers, and ``computed`` says whether the
        head start makes an output for each. ``keywords`` says whether the entries of samples are keywords of forward,
        None if that is not known. ``output`` makes predictions of what the network returns. ``seen`` are the samples
        that a ``TaskLoss`` sees, of which ``x`` is what the network takes.

        Raises:
            InputError: If the network does not take the samples, or does not compute with its own parameters.
        """
        padded, x, y = isinstance(x, Padded), valid(x), valid(y)
        keywords = by_keywords(network, x) if keywords is None else keywords
        recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
        traits = cls(other_names(network), recurrent, keywords=keywords, output=output)
        device = tree_leaves(x)[0].device
        with (
            kept_random_states(device) as states,
            torch.inference_mode(False),
            torch.enable_grad(),
            differentiable_attention(),
            Exact(),
            warnings.catch_warnings(action="ignore"),
        ):
            given = y is not None  # and the loss with them
            parts = x, y if given else (), () if seen is None else valid(seen)
            x, y, seen = (tree_map(lambda t: t.detach().clone(), part) for part in parts)
            # other than θ, so that what still computes with θ is seen
            params = {name: 1.1 * p.detach() for name, p in network.named_parameters() if p.requires_grad}
            traits = traits.with_floats(network, params, x)
            set_random_states(states, device)
            one = copied(network)
            before = contents(one)
            with Calls() as calls, layers_started(one) as started:
                try:
                    predictions = traits.forward(one, params, x)
                except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
                    require_floating_point(x, error)
                    if not isinstance(x, Tensor) or isinstance(loss, TaskLoss):
                        raise unfitting(network, keywords, x, error) from None
                    return traits  # an error of the network itself, which training shows as well
            drawn = random_states(device)
            vectors = isinstance(predictions, Tensor) and predictions.ndim == 2
            traits = traits._replace(outputs=predictions.shape[1] if vectors else 0, last=started[-1])
            traits = traits._replace(
                looped=reason_to_loop(network, states, drawn), replaced=bool(calls.seen & EXACT.keys())
            )
            twice = tree_map(lambda t: torch.cat([t, t]), x)
            size = len(tree_leaves(x)[0])
            traits = traits._replace(size=0 if traits.takes(network, params, twice) else size)
            if traits.size and isinstance(x, Tensor):
                came = f"batches must have the shape T S ..., tasks by samples, got tasks of shape {list(x.shape)},"
                missing = "the dimension of the tasks, or of the features, is missing"
                require(x.ndim > 1, f"{came} which the network takes as one sample: {missing}")
            if padded:
                traits = traits.with_padding(network, calls.seen, params, x, drawn)
            traits = traits.with_state(network, one, before, params, x, drawn)
            if given and isinstance(loss, TaskLoss):
                traits = traits.with_task_loss(loss, network, calls.seen, params, seen, y)
            elif given and isinstance(loss, nn.Module):
                more = ways > traits.outputs > 0 and refuses_classes(loss, y, traits.outputs)
                if ways and isinstance(predictions, Tensor) and (computed or more):
                    # as many outputs as classes
                    predictions = predictions[:, torch.arange(ways, device=device) % predictions.shape[1]]
                traits = traits.with_loss(loss, predictions, y)
            return traits.compared(network, params, x, drawn)

    def with_floats(self, network: nn.Module, params: Params, x: Samples) -> "Traits":
        """Add whether integers have to be floating point for the network."""
        if all(t.is_floating_point() for t in tree_leaves(x)) or self.takes(network, params, x):
            return self
        floats = self._replace(floats=True)
        return floats if floats.takes(network, params, x) else self

    def with_padding(self, network: nn.Module, called: set[Any], params: Params, x: Samples, drawn: Any) -> "Traits":
        """Add whether a sample's prediction depends on the other samples of its task."""
        outputs = []
        device = tree_leaves(x)[0].device
        rows = torch.arange(len(tree_leaves(x)[0]), device=device)
        kept = len(rows) // 2 + 1

        def others(t: Tensor) -> Tensor:  # the last samples replaced, which leaves the number of them
            replaced = t[rows % kept]
            return torch.cat([replaced[:kept], 0.9 * replaced[kept:] if t.is_floating_point() else replaced[kept:]])

        for seen in (x, tree_map(others, x)):
            set_random_states(drawn, device)
            predicted = self.forward(copied(network), params, seen)
            outputs.append(flat(tree_map(lambda t: t[:kept], predicted)).detach())
        # one or two samples show nothing
        if not apart(*outputs) and F.batch_norm not in called and len(rows) > kept:
            return self
        reason = "tasks are of unequal size, and in the network the samples of a task affect each other"
        return self._replace(mixes=True, looped=self.looped or reason)

    def takes(self, network: nn.Module, params: Params, x: Samples) -> bool:
        """Whether the network takes these samples."""
        try:
            self.forward(copied(network), params, x)
        except torch.OutOfMemoryError:
            return True
        except Exception:  # a network raises what it likes
            return False
        return True

    def with_state(
        self, network: nn.Module, one: nn.Module, before: Contents, params: Params, x: Samples, drawn: Any
    ) -> "Traits":
        """Complete them by what a first forward has changed in a copy, and whether the next one depends on it."""
        after = contents(one)
        changed = changes(before, after)
        other = tree_map(lambda t: t[torch.arange(len(t)) // 2], x)  # valid samples, with other statistics
        outputs = []
        for copy in (one, copied(network)):
            set_random_states(drawn, tree_leaves(x)[0].device)
            try:
                outputs.append(flat(self.forward(copy, params, other)).detach())
            except (RuntimeError, TypeError, ValueError, IndexError):
                return self._replace(in_turn=f"the network's forward changes {listed(changed)}" if changed else "")
        moving = changes(after, contents(one))
        if apart(*outputs) or not all(taken_back(one, place, place in moving) for place in changed):
            reason = f"changes {listed(changed)}" if changed else "depends on earlier ones"
            return self._replace(in_turn=f"the network's forward {reason}")
        adopt(one, network, changed)
        return self._replace(
            left=tuple((module, name) for kind, module, name in sorted(changed) if kind == "attribute")
        )

    def with_task_loss(
        self, loss: TaskLoss, network: nn.Module, called: set[Any], params: Params, x: Samples, y: Samples
    ) -> "Traits":
        """Add what a loss does that sees the task."""
        # by torch.func, as losses of physics take it: the gradient of a gradient under vmap
        reason = "a TaskLoss may differentiate the network, and vmap is wrong for derivatives of its normalisation"
        traits = self._replace(looped=self.looped or reason) if called & NORMALISATIONS else self
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        return traits.with_loss(loss, TaskPredictor(partial(self.forward, copied(network)), leaves, leaves), x, y)

    def with_loss(self, loss: nn.Module, *inputs: Any) -> "Traits":
        """Complete them by whether the loss changes itself."""
        one = copied(loss)
        before = contents(one)
        one(*inputs)
        changed = changes(before, contents(one))
        return self._replace(in_turn=self.in_turn or f"the loss changes {listed(changed)}") if changed else self

    def compared(self, network: nn.Module, params: Params, x: Samples, drawn: Any) -> "Traits":
        """Complete them by comparing gradients with those of a copy that holds the parameters."""

        def run(function: Callable[[Samples], Samples]) -> Tensor:
            set_random_states(drawn, tree_leaves(x)[0].device)
            with self.kernels():
                return flat(function(x)).abs().square().sum()

        other = copied(network)
        set_values(other, params)
        value = run(partial(self.apply, other))
        if not value.requires_grad:
            return self
        theta = {name: p for name, p in network.named_parameters() if p.requires_grad}
        reached = torch.autograd.grad(value, [*theta.values()], allow_unused=True, retain_graph=True)
        names = [name for name, g in zip(theta, reached, strict=True) if g is not None]
        advice = (
            "parameters must be attributes of its modules, functions refer to these, and checkpointing have "
            "use_reentrant=False"
        )
        require(not names, f"network must be copyable, got a copy that computes with its {', '.join(names)}: {advice}")
        again: list[nn.Module] = []
        for module in other.modules():
            module.register_forward_pre_hook(lambda module, args: again.append(module))
        try:
            value.backward()
        except RuntimeError as error:
            if torch.is_anomaly_enabled():
                raise
            kinds = "weight_norm and embeddings with padding must not be checkpointed, " if self.replaced else ""
            raise InputError(f"network must be differentiable: {kinds}torch says: {error}") from None
        grads = {name: p.grad for name, p in other.named_parameters()}
        expected = {name: torch.zeros_like(p) if (g := grads[name]) is None else g for name, p in params.items()}
        recomputing = self._replace(
            recomputes=True, looped=self.looped or "backward runs parts of the network's forward again"
        )
        wrong = []
        # a function that is recomputed is no call of a module, but its gradients with given parameters are wrong
        for traits in [recomputing] if again else [self, recomputing]:
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            value = run(partial(traits.forward, copied(network), leaves))
            by_name = torch.autograd.grad(value, [*leaves.values()], materialize_grads=True)
            pairs = {n: (g.to_dense(), expected[n].to_dense()) for n, g in zip(leaves, by_name, strict=True)}
            scale = max(greatest(e) for _, e in pairs.values())  # of all: some are nothing but rounding
            wrong = [name for name, (g, e) in pairs.items() if greatest(g - e) > RTOL * scale]
            if not wrong:
                return traits
        raise InputError(
            "network must compute with the parameters that it is given, by torch.autograd.grad too, got other "
            f"gradients of {', '.join(wrong)}: {advice}, and its forward must not depend on what is outside of it"
        )

    def forward(self, network: nn.Module, params: Params, x: Samples) -> Samples:
        """Predictions of a network with given parameters.  # S ... -> S ..."""
        weights = self.named(params)
        with self.kernels(), self.without_leaving(network) if self.left else nullcontext():
            if self.recomputes:
                return self.apply(with_parameters(network, weights), x)
            # torch's own tying restores parameters of a module with two names in the wrong order
            return self.apply(partial(functional_call, network, weights, tie_weights=False), x, functional=True)

    def apply(self, network: Callable[..., Any], x: Samples, functional: bool = False) -> Samples:
        """Predictions of a network with its own parameters, or of a ``functional_call``.  # S ... -> S ..."""
        return call(network, as_floats(x) if self.floats else x, self.keywords, self.output, functional)

    def kernels(self) -> Any:
        """Disable kernels that have not all derivatives: cuDNN's of recurrent layers, also the first in evaluation."""
        return torch.backends.cudnn.flags(enabled=False) if self.recurrent else nullcontext()

    def named(self, params: Params) -> Params:
        """Parameters, those with several names under each of them."""
        return params | {alias: params[name] for alias, name in self.aliases.items() if name in params}

    @contextmanager
    def without_leaving(self, network: nn.Module) -> Iterator[None]:
        """Restore what a forward leaves on the network's modules."""
        places = [(vars(network.get_submodule(module)), name) for module, name in self.left]
        before = [(attributes.get(name, MISSING), members(attributes.get(name))) for attributes, name in places]
        try:
            yield
        finally:
            for (attributes, name), (value, held) in zip(places, before, strict=True):
                if value is MISSING:
                    attributes.pop(name, None)
                else:
                    attributes[name] = value
                    put_back(value, held)


def refuses_classes(loss: Any, y: Tensor, outputs: int) -> bool:
    """Whether a loss refuses these class numbers for so few outputs, as cross-entropy does.  # S"""
    loss = copied(loss).cpu() if isinstance(loss, nn.Module) else loss  # a GPU's error would end the process
    try:
        loss(torch.zeros(len(y), outputs), y.cpu())
    except (IndexError, RuntimeError, ValueError):
        return True
    return False


@contextmanager
def layers_started(network: nn.Module) -> Iterator[list[str]]:
    """The names of the layers with parameters, as they start; by a hook that leaves nothing on the modules."""
    names = {part: name for name, part in network.named_modules() if any(True for _ in part.parameters(recurse=False))}
    started = [""]

    def note(module: nn.Module, args: Any) -> None:
        if module in names:
            started.append(names[module])

    hook = register_module_forward_pre_hook(note)
    try:
        yield started
    finally:
        hook.remove()


def other_names(network: nn.Module) -> dict[str, str]:
    """Map further names of tied parameters, those in other modules, to the first name."""
    first: dict[int, str] = {}
    places: set[tuple[int, str]] = set()
    others = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        place = (id(network.get_submodule(owner)), attribute)
        if id(p) in first and place not in places:
            others[name] = first[id(p)]
        first.setdefault(id(p), name)
        places.add(place)
    return others


def flat(predictions: Samples) -> Tensor:
    """All numbers of predictions."""
    if isinstance(predictions, Tensor):
        return predictions
    return torch.cat([t.flatten() for t in tree_leaves(predictions)])


def require_floating_point(x: Samples, error: Exception) -> None:
    """Raise InputError for integers that a network does not take."""
    expected = "x must be floating-point unless the network embeds it"
    dtypes = [t.dtype for t in tree_leaves(x) if not t.is_floating_point()]
    require(not dtypes, f"{expected}, got {', '.join(map(str, dtypes))}, of which it says: {error}")


def unfitting(network: nn.Module, keywords: bool, x: Samples, error: Exception) -> InputError:
    """The error of samples that a network does not take."""
    takes = f"as {'keywords' if keywords else 'one argument'} of forward{inspect.signature(network.forward)}"
    part = ", or inputs of a TaskLoss must give the part that it takes"
    expected = f"network must take samples of the structure {structure_of(x)} {takes}{part}"
    return InputError(f"{expected}, got {type(error).__name__}: {error}")


def reason_to_loop(network: nn.Module, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Why vmap would be wrong, from the hooks of a network and the random states before and after its forward."""
    if has_backward_hooks(network.modules()):
        return "the network has backward hooks, which vmap does not call"
    if drew_from(before, after) & {"python", "numpy"}:
        return "the network draws random numbers of Python or NumPy, which would be the same for all tasks"
    return ""
