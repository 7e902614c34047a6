"""Random numbers of many tasks at once, each from the generator of its task."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from meta_lightning.checks import require

# O'Neill, 2014, "PCG": multiplier of the 128-bit generator, in halves
HIGH, LOW = np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645)
U32 = np.uint64(32)
Numbers = npt.NDArray[Any]
Pair = tuple[Any, Any]  # high and low halves of 128-bit numbers, uint64


def uniforms(prefix: Sequence[int], tasks: Sequence[int], count: int) -> Numbers:
    """The first numbers of ``np.random.default_rng((*prefix, task)).random(count)`` for every task.  # T count

    NumPy takes some 20 µs to make one generator; this takes less than 1 µs per task, for thousands of them.
    """
    state, increment = start(prefix, tasks)
    drawn = np.empty((count, len(tasks)), np.uint64)
    for n in range(count):
        state = high, low = add(times_multiplier(state), increment)
        mixed, turn = high ^ low, high >> np.uint64(58)
        drawn[n] = (mixed >> turn) | (mixed << (-turn & np.uint64(63)))  # rotated to the right
    return ((drawn >> np.uint64(11)) * 2.0**-53).T


def generators(prefix: Sequence[int], tasks: Sequence[int]) -> Iterator[np.random.Generator]:
    """``np.random.default_rng((*prefix, task))`` of every task in turn; each is valid until the next."""
    generator = np.random.Generator(np.random.PCG64(0))
    halves = [part.tolist() for pair in start(prefix, tasks) for part in pair]
    for state_high, state_low, increment_high, increment_low in zip(*halves, strict=True):
        state = {"state": state_high << 64 | state_low, "inc": increment_high << 64 | increment_low}
        generator.bit_generator.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
        yield generator


def start(prefix: Sequence[int], tasks: Sequence[int]) -> tuple[Pair, Pair]:
    """The state and the increment of every task's new generator.  # of T"""
    require(max(tasks) < 2**32, f"tasks must be below 2³², got {max(tasks)}")
    fixed = [n >> bits & 0xFFFFFFFF for n in map(int, prefix) for bits in range(0, max(1, n.bit_length()), 32)]
    words = seed_words([*(np.full(len(tasks), n) for n in fixed), np.asarray(tasks)], 4)
    state, increment = (words[0], words[1]), add(double(words[2], words[3]), (np.uint64(0), np.uint64(1)))
    return add(times_multiplier(add(increment, state)), increment), increment


def seed_words(entropy: list[Numbers], count: int) -> list[Numbers]:
    """``np.random.SeedSequence(entropy).generate_state(count, np.uint64)`` of every task.  # of T"""
    # O'Neill's seed_seq_fe, with the constants of numpy/random/bit_generator.pyx

    def hashed(constant: int, multiplier: int) -> Callable[[Numbers], Numbers]:
        def of(value: Numbers) -> Numbers:
            nonlocal constant
            value = value ^ np.uint32(constant)
            constant = constant * multiplier & 0xFFFFFFFF
            value = value * np.uint32(constant)
            return value ^ value >> np.uint32(16)

        return of

    def mix_into(target: int, value: Numbers) -> None:
        value = pool[target] * np.uint32(0xCA01F9DD) - mix(value) * np.uint32(0x4973F715)
        pool[target] = value ^ value >> np.uint32(16)

    mix = hashed(0x43B0D7E5, 0x931E8875)
    words = [word.astype(np.uint32) for word in entropy]
    pool = [mix(word) for word in [*words[:4], *[np.zeros_like(words[0])] * (4 - len(words))]]
    for source in range(4):
        for target in range(4):
            if source != target:
                mix_into(target, pool[source])
    for word in words[4:]:
        for target in range(4):
            mix_into(target, word)
    output = hashed(0x8B51F9DD, 0x58F38DED)
    halves = [output(pool[n % 4]).astype(np.uint64) for n in range(2 * count)]
    return [low | high << U32 for low, high in zip(halves[::2], halves[1::2], strict=True)]


def add(a: Pair, b: Pair) -> Pair:
    """The sum of 128-bit numbers."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def double(high: Numbers, low: Numbers) -> Pair:
    """Twice a 128-bit number."""
    return high << np.uint64(1) | low >> np.uint64(63), low << np.uint64(1)


def times_multiplier(a: Pair) -> Pair:
    """The product of a 128-bit number and the multiplier."""
    mask = np.uint64(0xFFFFFFFF)
    (a1, a0), (b1, b0) = ((n >> U32, n & mask) for n in (a[1], LOW))
    middle = a1 * b0 + (a0 * b0 >> U32)
    carried = (middle >> U32) + ((middle & mask) + a0 * b1 >> U32)
    return a1 * b1 + carried + a[0] * LOW + a[1] * HIGH, a[1] * LOW
