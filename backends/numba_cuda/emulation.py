"""The engine on a machine without a GPU: its kernels in Numba's simulator."""
from __future__ import annotations

from torch import Tensor

from flexref.backends import numba_cuda
from flexref.backends.numba_cuda import launch
from flexref.backends.numba_cuda.device import simulator
from flexref.problem import Gradients, Output, Problem, Tensors


class Emulated:
    """A backend for tensors of the CPU; `reach`: longer sequences take too long."""

    name, rank, options = numba_cuda.name, numba_cuda.rank, numba_cuda.options
    how, reach = "simulated", 48

    def __repr__(self) -> str:
        return f"{self.name} ({self.how})"

    def unavailable(self) -> list[str]:
        """Why Numba cannot simulate in this process."""
        from flexref.backends.numba_cuda import simulator

        return numba_cuda._missing() or simulator.unavailable()

    def unsupported(self, problem: Problem) -> list[str]:
        """What the engine refuses on a GPU, too."""
        reasons = [] if problem.device == "cpu" else [f"the tensors are on {problem.device}, the simulator runs on cpu"]
        return reasons + numba_cuda._limits(problem)

    def forward(self, problem: Problem, tensors: Tensors) -> Output:
        """As numba_cuda.forward."""
        return launch.forward(problem, tensors, simulator())

    def backward(
        self, problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        """As numba_cuda.backward."""
        return launch.backward(problem, tensors, output, grad_out, grad_lse, simulator())
