"""Inner rules: how the gradient of a task's support loss becomes an inner step."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from meta_lightning.checks import InputError, plain, require
from meta_lightning.inner.params import Params

# prefixes of the state of a learner of version 0.1, and what they are now
FORMER_KEYS = {"inner_rates.": "inner_rule.rates.", "moments.": "inner_rule."}


class InnerRule(nn.Module, ABC):
    """The rule of the inner steps, ``θ' ← θ' + update(∇L_support(θ'))``.

    A rule of one's own implements ``update``. Its parameters, made in ``prepare``, are part of θ: the meta-gradient
    learns them. Its buffers are saved with the learner. It keeps the arguments of its constructor, plain values, under
    their own names, so that a checkpoint can describe it.
    """

    def prepare(self, params: Params, lr: float) -> None:
        """Make what the rule learns or keeps; called once, by the learner.

        Args:
            params: The parameters that the inner steps move.
            lr: The inner learning rate α.
        """

    def start(self) -> Any:
        """The state in which every task begins: a container of tensors, empty where there is none."""
        return ()

    @abstractmethod
    def update(self, grads: Params, state: Any, own: Params, lr: float) -> tuple[Params, Any]:
        """One inner step of all tasks.

        Args:
            grads: Gradients of the support losses by the parameters that move.  # T ...
            state: The state before the step.
            own: The rule's own parameters by name, as the tasks have them.  # T ...
            lr: The inner learning rate α.

        Returns:
            The change of each parameter, and the state after the step.
        """

    def carried(self, state: Any) -> Params:
        """What of the states that tasks end in Reptile averages over tasks, for ``keep``, by name.  # T ..."""
        return {}

    def keep(self, means: Params, steps: int) -> None:
        """Begin the next tasks of Reptile with the means of what was ``carried``, after so many inner steps more."""

    def shaped_like(self, name: str) -> list[str]:
        """The names of its own parameters of the shape of this one, which get rows with it."""
        return []

    def description(self) -> dict[str, Any]:
        """Class path and arguments, as configurations and checkpoints hold a rule.

        Raises:
            InputError: If an argument is not a plain value that the rule keeps under its name.
        """
        arguments = {}
        for name, p in signature(type(self)).parameters.items():
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                value = getattr(self, name, self)
                arguments[name] = plain(value)
                kept = value is None or arguments[name] is not None
                require(kept, f"inner_rule must keep its {name} under this name as a plain value, got {value}")
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": arguments}


def as_rule(given: InnerRule | Mapping[str, Any] | None) -> InnerRule:
    """A rule of a learner's own: what was given, or described; SGD where nothing was."""
    if isinstance(given, Mapping):
        try:
            rule = resolve_name(given["class_path"])(**given.get("init_args", {}))
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"inner_rule must be given: {given['class_path']} cannot be imported ({error})") from None
    else:
        rule = SGD() if given is None else copy.deepcopy(given)
    require(isinstance(rule, InnerRule), f"inner_rule must be an InnerRule, such as MetaSGD(), got {given!r}")
    return rule  # type: ignore[no-any-return]


def chosen_by(option: str, rule: InnerRule | None, options: dict[str, Any]) -> None:
    """Let an option of version 0.1 choose the rule where ``inner_rule`` does not, and say what to write instead."""
    if rule is None:
        return
    name, changed = type(rule).__name__, {"beta1": rule.beta1} if isinstance(rule, Adam) and rule.beta1 else {}
    flags = "".join(f" --model.inner_rule.{argument} {value}" for argument, value in changed.items())
    arguments = ", ".join(f"{argument}={value}" for argument, value in changed.items())
    said = f"{option} is now --model.inner_rule {name}{flags}, in Python inner_rule={name}({arguments})"
    rank_zero_warn(f"{said}; the former name goes in version 0.3", category=FutureWarning, stacklevel=6)
    if options.get("inner_rule") is None:
        options["inner_rule"] = rule


def in_module(name: str) -> str:
    """A parameter's name as a module can hold it: without dots."""
    return name.replace(".", "/")


class SGD(InnerRule):
    """``θ' ← θ' − α g``."""

    def update(self, grads: Params, state: Any, own: Params, lr: float) -> tuple[Params, Any]:
        """The change −α g; there is no state."""
        return {name: -lr * g for name, g in grads.items()}, state


class MetaSGD(InnerRule):
    """``θ' ← θ' − α ⊙ g`` with a learnt rate for every number of θ (Li et al., 2017, https://arxiv.org/abs/1707.09835).

    The rates begin at ``inner_lr``, and are learnt with θ and as θ is.
    """

    def prepare(self, params: Params, lr: float) -> None:
        """Make the rates."""
        self.rates = nn.Module()
        for name, p in sorted(params.items(), key=lambda item: in_module(item[0])):  # as checkpoints have them
            self.rates.register_parameter(in_module(name), nn.Parameter(torch.full_like(p, lr)))

    def update(self, grads: Params, state: Any, own: Params, lr: float) -> tuple[Params, Any]:
        """The change −α ⊙ g; there is no state."""
        return {name: -own[f"rates.{in_module(name)}"] * g for name, g in grads.items()}, state

    def shaped_like(self, name: str) -> list[str]:
        """The parameter's rates."""
        return [f"rates.{in_module(name)}"]


class AdamState(NamedTuple):
    """Adam's moments, and the number of steps behind them."""

    step: Tensor
    first: Params
    second: Params


class Adam(InnerRule):
    """Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980); β1 is 0 by default, as in Reptile's code.

    Reptile's moments persist: every task begins with those that training has left, averaged over the tasks of each
    meta-batch. In MAML and FOMAML every task begins with none.

    Args:
        beta1: Decay rate of the first moment, β1.
        beta2: Decay rate of the second moment, β2.
        eps: Added to the root of the second moment, ε.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(self, beta1: float = 0.0, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            require(0 <= value < 1, f"{name} of the inner Adam must be in [0, 1), got {value}")
        require(eps > 0, f"eps of the inner Adam must be greater than 0, got {eps}")
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def prepare(self, params: Params, lr: float) -> None:
        """Make the moments."""
        self.names = list(params)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.first, self.second = nn.Module(), nn.Module()
        for moments in (self.first, self.second):
            for name, p in params.items():
                moments.register_buffer(in_module(name), torch.zeros_like(p))

    def start(self) -> AdamState:
        """The moments that training has left."""
        first, second = (
            {name: moments.get_buffer(in_module(name)) for name in self.names} for moments in (self.first, self.second)
        )
        return AdamState(self.get_buffer("step"), first, second)

    def update(self, grads: Params, state: AdamState, own: Params, lr: float) -> tuple[Params, AdamState]:
        """The change −α m̂ / (√v̂ + ε), and the moments after it."""
        step = state.step + 1
        first = {n: self.beta1 * state.first[n] + (1 - self.beta1) * g for n, g in grads.items()}
        second = {n: self.beta2 * state.second[n] + (1 - self.beta2) * g.square() for n, g in grads.items()}
        scale1, scale2 = one_minus_power(self.beta1, step), one_minus_power(self.beta2, step)
        change = {n: -lr * (first[n] / scale1) / (root(second[n] / scale2) + self.eps) for n in grads}
        return change, AdamState(step, first, second)

    def carried(self, state: AdamState) -> Params:
        """The moments, by the names of their buffers."""
        moments = {"first": state.first, "second": state.second}
        return {f"{order}.{in_module(n)}": m for order, of_order in moments.items() for n, m in of_order.items()}

    def keep(self, means: Params, steps: int) -> None:
        """Keep the moments."""
        self.get_buffer("step").add_(steps)
        for name, mean in means.items():
            self.get_buffer(name).copy_(mean)


def one_minus_power(beta: float, step: Tensor) -> Tensor:
    """1 − β^step, without the rounding of β^step near 1."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


def root(x: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is taken as 0: of g/(√g² + ε) at g = 0 the limit 1/ε remains."""
    if not x.requires_grad:
        return x.sqrt()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
