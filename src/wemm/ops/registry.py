"""Ops, the kernels attached to them, and the tolerance each must meet.

@op(cases=_cases, model_cases=_model_cases, flops=_flops)    # ops/rms_norm.py: the definition
def rms_norm(x, weight, eps): ...

@rms_norm.impl("cpp", device="cpu", supports=_supports)      # kernels/cpu/rms_norm.py
def _(x, weight, eps): ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from wemm.config import ModelConfig, PloraConfig
from wemm.errors import ParameterError
from wemm.quantization import SCHEMES

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

DEFINITION = "definition"


@dataclass(frozen=True)
class Tolerance:
    """|result - oracle| <= atol + rtol * |oracle|, the oracle computed in float32."""

    rtol: float
    atol: float


# eps is half the spacing of neighbouring numbers near 1: 2**-24, 2**-8, 2**-11. An op rounds its
# result once and perhaps two intermediates; sums of unit-normal products of a few hundred terms
# differ by order, which is what float32 is allowed beyond that.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.bfloat16: Tolerance(rtol=3 * 2**-8, atol=3 * 2**-8),
    torch.float16: Tolerance(rtol=3 * 2**-11, atol=3 * 2**-11),
}


def looser(factor: float) -> dict[torch.dtype, Tolerance]:
    """For an op whose 16-bit definition rounds more often than the table allows for."""
    dtypes = (torch.bfloat16, torch.float16)
    return {d: Tolerance(TOLERANCES[d].rtol * factor, TOLERANCES[d].atol * factor) for d in dtypes}


class Inputs:
    """Makes the arguments of a case: seeded, in one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers in the case's dtype."""
        return (torch.randn(shape, generator=self._generator) * scale).to(self.device, self.dtype)

    def quantized(self, scheme: str, out_size: int, in_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight of unit-normal rows / sqrt(in_size), in one of quantization.SCHEMES: integers and scale."""
        return SCHEMES[scheme].quantize(self.normal(out_size, in_size, scale=in_size**-0.5))

    def float32(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [-1, 1), float32 in every case."""
        return (torch.rand(shape, generator=self._generator) * 2 - 1).to(self.device)

    def uint8(self, *shape: int) -> torch.Tensor:
        """Uniform integers from 0 to 255, uint8 in every case."""
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self._generator).to(self.device)

    def int32(self, values: Sequence[Any]) -> torch.Tensor:
        """Given integers, int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def permutation(self, length: int) -> torch.Tensor:
        """0..length-1 shuffled, int64."""
        return torch.randperm(length, generator=self._generator).to(self.device)


Cases = Callable[[Inputs], Mapping[str, tuple[Any, ...]]]
"""Case name → positional arguments."""


@dataclass(frozen=True)
class ModelShapes:
    """The sizes at which one model meets its ops: one large image, a question, several answers."""

    config: ModelConfig
    plora: PloraConfig | None
    num_patches: int
    """Of the image."""
    num_image_tokens: int
    num_prompt_tokens: int
    """Of image and question together; also the context of every decoding sequence."""
    decode_batches: tuple[int, ...] = (1, 4, 16)


LazyCases = Mapping[str, Callable[[], tuple[Any, ...]]]
"""Case name → what makes its positional arguments: some are gigabytes, so none is made before its turn."""
ModelCases = Callable[[Inputs, ModelShapes], LazyCases]


def tensor_bytes(values: Any) -> int:
    """Bytes of a tensor, or of all tensors of a tuple."""
    tensors = values if isinstance(values, tuple) else (values,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """One kernel: where it runs, and which arguments it takes."""

    name: str
    device: str
    function: Callable[P, R]
    supports: Callable[P, bool]
    automatic: bool = True
    """False: it loses to the definition on this machine, and runs only where it is asked for."""


class Op(Generic[P, R]):
    """A named operation. Calling it runs the first attached kernel that supports the arguments."""

    def __init__(
        self,
        definition: Callable[P, R],
        cases: Cases,
        tolerances: Mapping[torch.dtype, Tolerance],
        model_cases: ModelCases = lambda inputs, shapes: {},
        flops: Callable[P, int] | None = None,
        moved_bytes: Callable[P, int] | None = None,
        arithmetic: torch.dtype | None = None,
    ) -> None:
        self.name = definition.__name__
        self.definition = definition
        self.cases = cases
        self.model_cases = model_cases
        self.tolerances = {**TOLERANCES, **tolerances}
        self.arithmetic = arithmetic
        self._flops = flops
        self._moved_bytes = moved_bytes
        self.implementations: list[Implementation[P, R]] = []
        self._requested: str | None = None
        self._logged: set[str] = set()
        self.__doc__ = definition.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the chosen kernel or the definition."""
        return self._choose(*args, **kwargs)(*args, **kwargs)

    def work(self, arguments: tuple[Any, ...], result: R) -> tuple[int, int]:
        """(FLOPs, bytes that must move) of a call, whichever implementation ran."""
        count_flops: Any = self._flops
        count_bytes: Any = self._moved_bytes
        flops = count_flops(*arguments) if count_flops else 0
        moved = count_bytes(*arguments) if count_bytes else tensor_bytes(arguments) + tensor_bytes(result)
        return flops, moved

    def _choose(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        # Kernels have no backward: training runs the definitions.
        if not self.implementations or self._requested == DEFINITION or torch.is_grad_enabled():
            return self.definition
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        for candidate in self.implementations:
            wanted = candidate.automatic if self._requested is None else candidate.name == self._requested
            wanted = wanted and candidate.device == device
            if wanted and candidate.supports(*args, **kwargs):
                if candidate.name not in self._logged:
                    self._logged.add(candidate.name)
                    logger.info("%s: kernel %s on %s", self.name, candidate.name, device)
                return candidate.function
        if self._requested is not None:
            raise ParameterError(f"{self.name}: kernel {self._requested!r} does not support these arguments")
        return self.definition

    def impl(
        self, name: str, device: str, supports: Callable[P, bool], automatic: bool = True
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Attach a kernel for a device type; `supports` takes the op's own arguments.

        One that is not `automatic` runs inside `using` only.
        """

        def attach(function: Callable[P, R]) -> Callable[P, R]:
            self.implementations.append(Implementation(name, device, function, supports, automatic))
            return function

        return attach

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Inside, only this kernel runs ("definition": none). Raises ParameterError if it is absent."""
        known = [DEFINITION, *(i.name for i in self.implementations)]
        if name not in known:
            raise ParameterError(f"{self.name} has no kernel {name!r}; loaded: {', '.join(known)}")
        before, self._requested = self._requested, name
        try:
            yield
        finally:
            self._requested = before


OPS: dict[str, Op[Any, Any]] = {}
"""Every declared op by name."""


@contextmanager
def definitions_only() -> Iterator[None]:
    """Inside, no kernel of any op runs."""
    with ExitStack() as stack:
        for declared in OPS.values():
            stack.enter_context(declared.using(DEFINITION))
        yield


def op(
    cases: Cases,
    tolerances: Mapping[torch.dtype, Tolerance] | None = None,
    *,
    model_cases: ModelCases = lambda inputs, shapes: {},
    flops: Callable[..., int] | None = None,
    moved_bytes: Callable[..., int] | None = None,
    arithmetic: torch.dtype | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare the decorated plain-torch function as an op.

    `cases` makes arguments for the parity test; an op that writes into its arguments returns them.
    `tolerances` override the table where the op's arithmetic asks for it. For the benchmark, `model_cases`
    makes arguments of a model's sizes, `flops` counts a call's additions and multiplications (default: none
    worth counting), `moved_bytes` its traffic where that is not every tensor read and the result written, and
    `arithmetic` says what it multiplies where that is not the dtype of the activations.
    """

    def declare(definition: Callable[P, R]) -> Op[P, R]:
        declared = Op(definition, cases, tolerances or {}, model_cases, flops, moved_bytes, arithmetic)
        OPS[declared.name] = declared
        return declared

    return declare
