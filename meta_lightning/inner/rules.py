"""Inner rules: how the gradient of the support loss becomes an inner step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.inner.described import Described
from meta_lightning.inner.params import Params

# prefixes in state dicts of version 0.1, and their present names
FORMER_KEYS = {"inner_rates.": "inner_rule.rates.", "moments.": "inner_rule."}


class InnerRule(Described, ABC):
    """Rule of the inner steps, ``θ' ← θ' + update(∇L_support(θ'))``.

    A custom rule implements ``update``. Parameters created in ``prepare`` are part of θ and meta-learnt; buffers are
    saved in checkpoints. Constructor arguments must be plain values and kept as attributes of the same name, so that a
    checkpoint can describe the rule.
    """

    argument = "inner_rule"

    def prepare(self, params: Params, lr: float) -> None:
        """Create the rule's parameters and buffers; called once, by the learner.

        Args:
            params: Parameters that inner steps update; of a head whose rows a task computes, one row.  # ..., 1 D
            lr: The inner learning rate α.
        """

    def start(self) -> Any:
        """Initial state of every task: a container of tensors, empty for a rule without state."""
        return ()

    @abstractmethod
    def update(self, grads: Params, state: Any, own: Params, lr: float) -> tuple[Params, Any]:
        """Compute one inner step of all tasks.

        Args:
            grads: Gradients of the support losses with respect to the updated parameters.  # T ...
            state: State before the step.
            own: The rule's parameters by name, expanded to the tasks.  # T ...
            lr: The inner learning rate α.

        Returns:
            The change of each parameter, and the state after the step.
        """

    def carried(self, state: Any) -> Params:
        """Parts of the final state, by name, that Reptile averages over tasks and passes to ``keep``.  # T ..."""
        return {}

    def keep(self, means: Params, steps: int) -> None:
        """Store the means of what was ``carried`` as the start of Reptile's next tasks, after ``steps`` more steps."""


def require_no_parameters(rule: InnerRule, reason: str) -> None:
    """Raise InputError for a rule with parameters, which some algorithms cannot learn."""
    learnt = [name for name, _ in rule.named_parameters()]
    require(not learnt, f"inner_rule must have no parameters, {reason}, got {learnt}")


def require_prepared(rule: InnerRule, prepared: Collection[str], names: Iterable[str]) -> None:
    """Raise InputError for parameters that were unfrozen after a rule with state was made."""
    if type(rule).prepare is not InnerRule.prepare and not (new := set(names)) <= set(prepared):
        came = f"got {', '.join(sorted(new - set(prepared)))}, unfrozen later"
        raise InputError(f"inner_rule {type(rule).__name__} must know all parameters when the learner is made, {came}")


def chosen_by(option: str, rule: InnerRule | None, options: dict[str, Any]) -> None:
    """Set ``inner_rule`` from an option of version 0.1 unless it is given, and warn with the present spelling."""
    if rule is None:
        return
    name, changed = type(rule).__name__, {"beta1": rule.beta1} if isinstance(rule, Adam) and rule.beta1 else {}
    flags = "".join(f" --model.inner_rule.{argument} {value}" for argument, value in changed.items())
    arguments = ", ".join(f"{argument}={value}" for argument, value in changed.items())
    said = f"{option} is now --model.inner_rule {name}{flags}, in Python inner_rule={name}({arguments})"
    rank_zero_warn(f"{said}; the former name will be removed in version 0.3", category=FutureWarning, stacklevel=6)
    if options.get("inner_rule") is None:
        options["inner_rule"] = rule


def in_module(name: str) -> str:
    """The parameter's name as an attribute of a module, which must not contain dots."""
    return name.replace(".", "/")


class SGD(InnerRule):
    """``θ' ← θ' − α g``."""

    def update(self, grads: Params, state: Any, own: Params, lr: float) -> tuple[Params, Any]:
        """Return −α g."""
        return {name: -lr * g for name, g in grads.items()}, state


class MetaSGD(InnerRule):
    """``θ' ← θ' − α ⊙ g`` with a learnt rate per element of θ (Li et al., 2017, https://arxiv.org/abs/1707.09835).

    The rates start at ``inner_lr`` and are meta-learnt together with θ.
    """

    def prepare(self, params: Params, lr: float) -> None:
        """Create the rates."""
        self.rates = nn.Module()
        for name, p in sorted(params.items(), key=lambda item: in_module(item[0])):  # the order in checkpoints
            self.rates.register_parameter(in_module(name), nn.Parameter(torch.full_like(p, lr)))

    def update(self, grads: Params, state: Any, own: Params, lr: float) -> tuple[Params, Any]:
        """Return −α ⊙ g."""
        return {name: -own[f"rates.{in_module(name)}"] * g for name, g in grads.items()}, state


class LSLR(InnerRule):
    """``θ'_p ← θ'_p − α_p,k g_p`` with a learnt rate per parameter tensor p and inner step k.

    These are the per-layer per-step learning rates of MAML++ (Antoniou, Edwards and Storkey, 2019,
    https://arxiv.org/abs/1810.09502, section 4). The rates start at ``inner_lr`` and are meta-learnt together with θ.

    Args:
        steps: Number of inner steps with rates of their own, usually ``inner_steps``; later steps use the last rates.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(self, steps: int = 5) -> None:
        super().__init__()
        require_at_least(1, steps=steps)
        self.steps = steps

    def prepare(self, params: Params, lr: float) -> None:
        """Create the rates."""
        self.register_buffer("taken", torch.zeros(1, dtype=torch.int64), persistent=False)  # moves with the learner
        self.rates = nn.Module()
        for name, p in params.items():
            self.rates.register_parameter(in_module(name), nn.Parameter(p.new_full((self.steps,), lr)))

    def start(self) -> Tensor:
        """No steps taken."""
        return self.get_buffer("taken")

    def update(self, grads: Params, state: Tensor, own: Params, lr: float) -> tuple[Params, Tensor]:
        """Return −α_p,k g and the number of steps taken."""
        k = state.clamp(max=self.steps - 1)
        rates = {name: own[f"rates.{in_module(name)}"].index_select(1, k) for name in grads}  # T 1
        return {name: -rates[name].view(-1, *[1] * (g.ndim - 1)) * g for name, g in grads.items()}, state + 1


class AdamState(NamedTuple):
    """Adam's step count and moments."""

    step: Tensor
    first: Params
    second: Params


class Adam(InnerRule):
    """Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980); β1 defaults to 0, as in Reptile's code.

    In Reptile the moments persist: every task starts with the moments of the previous meta-iteration, averaged over
    its tasks. In MAML and FOMAML they start at zero in every task.

    Args:
        beta1: Decay rate of the first moment, β1.
        beta2: Decay rate of the second moment, β2.
        eps: Term added to the denominator, ε.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(self, beta1: float = 0.0, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            require(0 <= beta < 1, f"{name} of the inner Adam must be in [0, 1), got {beta}")
        require(eps > 0, f"eps of the inner Adam must be greater than 0, got {eps}")
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def prepare(self, params: Params, lr: float) -> None:
        """Create the moments."""
        self.names = list(params)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.first, self.second = nn.Module(), nn.Module()
        for moments in (self.first, self.second):
            for name, p in params.items():
                moments.register_buffer(in_module(name), torch.zeros_like(p))

    def start(self) -> AdamState:
        """The stored moments."""
        first, second = ({n: m.get_buffer(in_module(n)) for n in self.names} for m in (self.first, self.second))
        return AdamState(self.get_buffer("step"), first, second)

    def update(self, grads: Params, state: AdamState, own: Params, lr: float) -> tuple[Params, AdamState]:
        """Return −α m̂ / (√v̂ + ε) and the new moments."""
        step = state.step + 1
        first = {n: self.beta1 * state.first[n] + (1 - self.beta1) * g for n, g in grads.items()}
        second = {n: self.beta2 * state.second[n] + (1 - self.beta2) * g.square() for n, g in grads.items()}
        scale1, scale2 = one_minus_power(self.beta1, step), one_minus_power(self.beta2, step)
        change = {n: -lr * (first[n] / scale1) / (root(second[n] / scale2) + self.eps) for n in grads}
        return change, AdamState(step, first, second)

    def carried(self, state: AdamState) -> Params:
        """The moments by buffer name."""
        moments = {"first": state.first, "second": state.second}
        named = {f"{order}.{in_module(n)}": m for order, of_order in moments.items() for n, m in of_order.items()}
        # rows of a head that a start computes share their moments
        return {n: m if m.shape[1:] == self.get_buffer(n).shape else m.mean(1, keepdim=True) for n, m in named.items()}

    def keep(self, means: Params, steps: int) -> None:
        """Store the moments."""
        self.get_buffer("step").add_(steps)
        for name, mean in means.items():
            self.get_buffer(name).copy_(mean)


def one_minus_power(beta: float, step: Tensor) -> Tensor:
    """Compute 1 − β^step without cancellation."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


def root(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, so that g/(√g² + ε) has the derivative 1/ε at g = 0."""
    if not x.requires_grad:
        return x.sqrt()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
